"""The page as files: one HTML document that holds everything, or a folder of it with its data next to it.

The document holds its style, its script, its numbers and its pictures, asks no server for anything, follows the
reader's light or dark setting, and fits a phone. What users wrote is data in it, never markup. Files are written whole
or not at all.
"""

import base64
import errno
import json
import os
import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dmdata.atomic import write_whole
from dmpipeline.errors import SpecError, explain_os_errors
from dmpipeline.report.contents import Contents
from dmpipeline.report.payload import packed


def write_page(path: str | os.PathLike[str], contents: Contents) -> Path:
    """Write a page.

    Parameters
    ----------
    path : path
        Of the `.html`, which is replaced if it is there and holds everything; or of a folder, new or an earlier page,
        for what is too large for one file: it gets `index.html`, `numbers.js` and sheets of pictures.
    contents : Contents

    Returns
    -------
    path : pathlib.Path
        Of the HTML file.

    Raises
    ------
    SpecError, RunError
        As `checked_place`; or if it cannot be written.
    """
    path = checked_place(path)
    if is_one_file(path):
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _document(contents, numbers=None))
        return path
    return _write_folder(path, contents)


def is_one_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a page at this path is one file, not a folder."""
    return Path(path).suffix.lower() in (".html", ".htm")


def checked_place(path: str | os.PathLike[str]) -> Path:
    """Return where a page would be written, links followed; nothing is written yet.

    Raises
    ------
    SpecError
        If a folder is there that has anything but an earlier page's files.
    RunError
        If a folder is where a file should be.
    """
    path = Path(path).expanduser()
    path = path.resolve() if path.is_symlink() else path
    if is_one_file(path):
        with explain_os_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    elif path.exists() and not (path.is_dir() and _holds_only_a_page(path)):
        raise SpecError(f"{path} is not a page's folder; name a new folder, or a file that ends in .html", path=path)
    return path


def _holds_only_a_page(folder: Path) -> bool:
    entries = list(folder.iterdir())
    numbers = folder / _NUMBERS
    is_ours = not entries or (numbers.is_file() and numbers.read_bytes()[: len(_SETS)] == _SETS)
    return is_ours and all(re.fullmatch(_OWN_FILES, entry.name) for entry in entries)


_NUMBERS, _SETS = "numbers.js", b"globalThis.dmpipelineNumbers="
_OWN_FILES = r"index\.html|numbers\.js|(train|targets)-\d+\.webp"


def _document(contents: Contents, *, numbers: str | None) -> str:
    """Render the document; with `numbers`, the name of the script that brings the numbers, pictures are files, too."""
    text, places = packed(contents.arrays)
    pictures: dict[str, Any] = {}
    sheets: list[dict[str, str]] = []
    for part, of_part in contents.pictures.items():
        names = [f"{part}-{nth}" for nth in range(len(of_part.sheets))]
        if numbers is None:
            sheets += [
                {"name": name, "content": base64.b64encode(sheet).decode("ascii")}
                for name, sheet in zip(names, of_part.sheets, strict=True)
            ]
        else:
            names = [f"{name}.webp" for name in names]
        pictures[part] = of_part.facts() | {"sheets": names}
    facts = contents.facts | {"arrays": places, "pictures": pictures}
    own = resources.files("dmpipeline.report")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(own.joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=contents.facts["title"],
        summary=contents.facts["summary"],
        style=own.joinpath("explorer.css").read_text("utf-8"),
        script=own.joinpath("explorer.js").read_text("utf-8"),
        facts=_as_json(facts),
        numbers=numbers,
        text=text,
        sheets=sheets,
    )


def _write_folder(path: Path, contents: Contents) -> Path:
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for part, of_part in contents.pictures.items():
                for nth, sheet in enumerate(of_part.sheets):
                    (staging / f"{part}-{nth}.webp").write_bytes(sheet)
            text, _ = packed(contents.arrays)
            (staging / _NUMBERS).write_text(f'{_SETS.decode()}"{text}"\n')
            (staging / "index.html").write_text(_document(contents, numbers=_NUMBERS), "utf-8")
            staging.chmod(0o755)
            if path.exists():
                old = path.with_name(f"{staging.name}.old")
                path.rename(old)
                staging.rename(path)
                shutil.rmtree(old)
            else:
                staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return path / "index.html"


def _as_json(facts: dict[str, Any]) -> str:
    """Write JSON that stays inside a script element: no tag or comment can begin in it."""
    text = json.dumps(facts, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
