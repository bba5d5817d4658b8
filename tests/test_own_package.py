"""Another project's package `tokenizer` in place of ours is named with the remedy, in one line."""

import os
import pathlib
import subprocess
import sys

import pytest

from EasyLM import errors
from EasyLM.errors import UserError, check_own_package

ROOT = pathlib.Path(__file__).parent.parent


def test_our_own_package_passes():
    check_own_package("tokenizer")
    with pytest.raises(UserError, match="the package json of another project hides that of this project"):
        check_own_package("json")


@pytest.mark.parametrize(
    "content", ["", "from tokenizer.tokenizer import *", (ROOT / "tokenizer/__init__.py").read_text()]
)
def test_an_overwritten_package_is_named(tmp_path, monkeypatch, content):
    """Both projects are installed into one directory: the later one has replaced the file."""
    for package in ("EasyLM", "tokenizer"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(content)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "EasyLM" / "errors.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tokenizer", raising=False)
    if errors.OWN_MARK in content:
        check_own_package("tokenizer")
    else:
        with pytest.raises(UserError, match=f"{tmp_path}/tokenizer/__init__.py: .*pip uninstall tokenizer"):
            check_own_package("tokenizer")


def test_a_hidden_package_is_named_at_import(tmp_path):
    """The other project comes first on the path, as it does before an editable install."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-c", "import evaluation"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith(
        f"ImportError: {tmp_path}/tokenizer/__init__.py: the package tokenizer"
    )
