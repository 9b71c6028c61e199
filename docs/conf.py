"""Sphinx configuration. `python -m sphinx -W docs site` builds the pages into the folder `site`.

Pages that would repeat what the program says are written at build time, into `docs/generated`: the command line, the
public names, and the gallery of refusals. Notebooks are executed once and kept. `.ci/run` builds with
`-D nb_execution_mode=off`, which shows them without outputs: they train networks, which takes minutes, and the slow
tests execute every cell (tests/test_examples.py).
"""

import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

import lipbounds  # noqa: E402

project = "lipbounds"
author = copyright = "the lipbounds authors"
release = version = lipbounds.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["generated/notebooks.cache"]
html_theme = "furo"
html_title = "lipbounds"
html_copy_source = False

# dollarmath: the formulas of notebooks
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
smartquotes = False  # pages quote code and messages
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_cache_path = str(HERE / "generated" / "notebooks.cache")
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # annotations name types of other libraries
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


#: Files beside `docs` that pages link to, and the folder of the site that they are copied to.
BESIDE = {
    "examples/*.ipynb": "",
    "benchmarks/results/*.md": "results",
    "CONTRIBUTING.md": "",
    "CHANGELOG.md": "",
}


def _files(app: Any) -> None:
    """Pages made from the program, and those that live elsewhere in the repository."""
    for name, text in generate.pages().items():
        _write(name, text)
    for pattern, folder in BESIDE.items():
        for path in HERE.parent.glob(pattern):
            _write(f"{folder}/{path.name}".lstrip("/"), path.read_text(encoding="utf-8"))


def _write(name: str, text: str) -> None:
    """A file in `generated`, left alone where nothing changed, so that a second build is quick."""
    path = HERE / "generated" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _links(app: Any, page: str, source: list[str]) -> None:
    """Links to files beside `docs` lead to their copies."""
    up = "../" * page.count("/")
    source[0] = source[0].replace("](docs/", f"]({up}")
    for outside, inside in (
        (r"(?:\.\./)+examples/([\w.]+\.ipynb)", "generated/"),
        (r"(?:\.\./)+benchmarks/results/([\w.-]+\.md)", "generated/results/"),
        (r"(?:\.\./)*(CONTRIBUTING\.md|CHANGELOG\.md)", "generated/"),
    ):
        source[0] = re.sub(rf"\]\({outside}", rf"]({up}{inside}\1", source[0])


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = generate.restructured(lines)


def setup(app: Any) -> None:
    """Sphinx calls this when it reads the configuration."""
    app.connect("builder-inited", _files)
    app.connect("source-read", _links)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon reads sections
