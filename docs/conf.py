"""How Sphinx builds the documentation site: `make docs`, without network, with warnings as errors.

The pages are Markdown. Notebooks are executed, and a cell that fails fails the build; a server on loopback stands in
for the release's bucket. The reference of Python names is made from the `__all__` of both packages, and that of
commands from the click groups themselves, so neither is written by hand.
"""

import contextlib
import importlib.metadata
import logging as python_logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

# imported here, since autodoc would import them with TYPE_CHECKING set, which pydantic does not survive
import dmdata.cli.command  # noqa: F401
import dmpipeline.cli.command  # noqa: F401

project = "dmdata"
author = "The dmdata authors"
copyright = author  # noqa: A001 - Sphinx's own name
release = importlib.metadata.version("dmdata")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["reference/*-table.md"]  # included by other pages

html_theme = "furo"
html_title = f"dmdata {release}"
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_merge_streams = True
python_logging.getLogger("traitlets").setLevel("WARNING")  # says which notebook it executes, as Sphinx does

autodoc_member_order = "alphabetical"
autodoc_default_options = {"exclude-members": "model_config"}  # pydantic's own
autodoc_typehints = "none"  # the docstrings name types, with shapes and units
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # else words of a type, such as n_train, are looked up as if they were names
napoleon_custom_sections = [("Attributes", "params_style")]  # else an attribute that is a property is there twice
default_role = "code"
smartquotes = False  # or --json becomes a dash and "json"

ROOT = Path(__file__).parents[1]
_NOTEBOOKS = "notebooks/"
_LOADS = re.compile(rb"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']+""")


def refuse_what_needs_the_network(app: Sphinx, error: Exception | None) -> None:
    """Warn of each page that would load a script, style or picture from elsewhere: the site works offline."""
    if error or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        for found in _LOADS.findall(page.read_bytes()):
            logging.getLogger(__name__).warning("%s loads from the network: %s", page.name, found.decode())


def serve_release(app: Sphinx) -> None:
    """Start the server that notebooks read the release from, with a ledger of its own; it ends with the build."""
    sys.path.insert(0, str(ROOT / "tests"))
    from servers.release import released

    until_end = contextlib.ExitStack()
    folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
    server = until_end.enter_context(released(folder))
    # the commands of this environment, and nothing of the user's
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(server.env | {"DMDATA_HOME": str(folder / "home"), "DMDATA_CATALOG": "", "PATH": path})
    # where myst-nb puts pictures and executed notebooks, which are by then in the site
    until_end.callback(shutil.rmtree, Path(app.outdir).parent / "jupyter_execute", ignore_errors=True)
    app.connect("build-finished", lambda *_: until_end.close())


def list_notebooks(app: Sphinx, *_: object) -> list[str]:
    """Name the pages that are executed at every build: what they show depends on the whole code."""
    return [name for name in app.env.found_docs if name.startswith(_NOTEBOOKS)]


def keep_first_line(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Hide the first line of a property's docstring from napoleon, which takes words before a colon for its type."""
    if what == "property":
        lines.insert(0, "")


def setup(app: Sphinx) -> None:
    """Register what is ours with Sphinx."""
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
    app.connect("builder-inited", serve_release)
    app.connect("env-get-outdated", list_notebooks)
    app.connect("build-finished", refuse_what_needs_the_network)
