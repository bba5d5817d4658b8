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
