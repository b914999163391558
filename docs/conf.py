# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

from anomalib_ext import __version__

project = "anomalib-ext"
copyright = "The anomalib-ext developers"  # noqa: A001
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
html_theme = "sphinx_book_theme"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
# Links from the READMEs to files outside this folder.
suppress_warnings = ["myst.xref_missing"]
