"""Sphinx settings of the book; `make book` copies README and notebooks beside this file."""

import importlib.metadata
from pathlib import Path

import tomllib
from docutils import nodes

with (Path(__file__).resolve().parent / "pyproject.toml").open("rb") as file:
    repository = tomllib.load(file)["project"]["urls"]["Repository"]

project = "rho-VAE"
author = "the rho-VAE authors"
release = importlib.metadata.version("rhovae")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = "rho-VAE"
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "",
}
html_static_path = ["book.css", "book.js", "play.js", "spectra.js"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
templates_path = []
root_doc = "index"
exclude_patterns = ["package.md"]  # for package indexes

nb_execution_mode = "off"  # the committed outputs are those that CI has checked
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # outputs hold tables, which plain CommonMark does not know
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"


def as_written(app, what, name, obj, options, lines):
    """Docstrings hold formulas that are aligned by hand: show them as `help` does."""
    if lines:
        lines[:] = [".. code-block:: text", "", *("    " + line for line in lines), ""]


def with_tags(app, doctree):
    """Sphinx splits a formula of several rows into lines, where MathJax allows no \\tag: do not."""
    for formula in doctree.findall(nodes.math_block):
        if r"\tag" in formula.astext():
            formula["no-wrap"] = True
            formula.children = [nodes.Text(rf"\[{formula.astext()}\]")]


def setup(app):
    app.connect("doctree-read", with_tags)
    app.connect("autodoc-process-docstring", as_written)
