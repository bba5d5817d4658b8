"""Settings of Sphinx for the documentation: `bash scripts/docs.sh` builds it.

The source directory is the repository's root, so that README.md, DATASET.md and evaluation/EVAL.md are pages as they
are, and links between documents work on the site as they do in the repository.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from EasyLM import __version__

project = "EasyLM-LVM"
author = "The EasyLM-LVM authors"
copyright = f"2026, {author}"
version = release = __version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "DATASET.md",
    "evaluation/EVAL.md",
    "tokenizer/pretrained/README.md",
    "evaluation/demo_model/README.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
napoleon_use_ivar = True
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"EasyLM-LVM {version}"


def _keep_layout(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shows a module's docstring as it is written: the lists of a room's words and modules are aligned columns."""
    if what == "module" and lines:
        lines[:] = ["::", "", *(f"    {line}" for line in lines), ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _keep_layout)
