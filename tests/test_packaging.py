"""The package: version, console scripts, type information, citation."""

import pathlib
import re
import tomllib

import pytest

import EasyLM

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("EasyLM", "tokenizer", "evaluation")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_command_is_a_console_script():
    commands = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "\ndef cli()" in path.read_text()
    ]
    assert sorted(PROJECT["scripts"].values()) == sorted(f"{command}:cli" for command in commands)


def test_citation_and_changelog_have_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == EasyLM.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (.*)$", changelog, re.MULTILINE)[1] == EasyLM.__version__


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").exists()


def test_named_extras_exist():
    """Error messages and documents name extras as `.[extra]`."""
    for path in [*ROOT.glob("*.md"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]:
        for names in re.findall(r"pip install -e '?\.\[([a-z,]+)\]", path.read_text()):
            assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), path


@pytest.mark.parametrize(("name", "gpu", "cuda"), [("gpu_environment", "gpu", 13), ("gpu12_environment", "gpu12", 12)])
def test_gpu_environments_run_the_quickstart_and_convert_torch_weights(name, gpu, cuda):
    text = (ROOT / "scripts" / f"{name}.yml").read_text()
    assert re.search(r"^name: (.*)$", text, re.MULTILINE)[1] == "LVM"
    installed = re.search(r"- -e \.\.\[(.*)\]", text)[1].split(",")
    assert {gpu, "torch", "quickstart"} <= set(installed) and not ({"gpu", "gpu12"} - {gpu}) & set(installed)
    extras = PROJECT["optional-dependencies"]
    packages = [re.match(r"[\w-]+(\[\w+\])?", package)[0] for extra in installed for package in extras[extra]]
    assert {f"jax[cuda{cuda}]", "torch", "transformers", "scikit-image", "scikit-learn", "matplotlib"} <= set(packages)
    versions = re.search(r"- python=([\d.]+)", text)[1], re.search(r"([\d.]+)", PROJECT["requires-python"])[1]
    given, least = (tuple(map(int, version.split("."))) for version in versions)
    assert given >= least
