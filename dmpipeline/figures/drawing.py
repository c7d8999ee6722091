"""Figures in the colours of the report page, drawn by matplotlib's objects: inside the page, or as files of their own.

Both follow the reader's light or dark setting. In the page the page's style decides; a file brings its own, and shows
light where a viewer knows no such setting.
"""

import html
import io
import re
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours by their role, as #rrggbb."""

    paper: str
    ink: str
    soft: str
    accent: str
    accent_soft: str
    hurt: str


LIGHT = Palette("#ffffff", "#1a1d23", "#5b6472", "#1f5fa8", "#8fb4de", "#b4450c")
DARK = Palette("#14171c", "#e8eaee", "#a2abb8", "#7db4f2", "#3f6798", "#f29a62")

PAGE = Palette("#060606", "#010101", "#020202", "#030303", "#040404", "#050505")
"""Stand-ins, for which `page_svg` puts the variables of the page's style."""


def blank(
    width: float, height: float, *, rows: int = 1, columns: int = 1, palette: Palette = PAGE
) -> tuple[Figure, list[Any]]:
    """Make a figure in a palette's ink, without a frame's upper and right side; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=palette.paper)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(palette.soft)
        ax.tick_params(which="both", colors=palette.soft, labelsize=9)
        ax.xaxis.label.set(color=palette.ink, fontsize=10.5)
        ax.yaxis.label.set(color=palette.ink, fontsize=10.5)
    return figure, axes


def page_svg(figure: Figure, *, label: str, salt: str) -> str:
    """Draw as SVG to be put inside HTML: transparent, with real text and the page's colours, and no XML preamble.

    Parameters
    ----------
    figure : Figure
        In the colours of `PAGE`.
    label : str
        What a screen reader says.
    salt : str
        Keeps the names inside apart from those of the page's other figures.
    """
    head, rest = _svg(figure, salt=salt, transparent=True)
    head = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", head)
    text = _named(head, label) + ">" + rest.replace("xlink:href", "href")
    for role, stand_in in asdict(PAGE).items():
        text = text.replace(stand_in, f"var(--{role.replace('_', '-')})")
    return text


def file_bytes(figure: Figure, suffix: str, *, label: str) -> bytes:
    """Draw as a file: SVG with real text, which turns dark where its reader is, or PNG of 200 dots an inch.

    Parameters
    ----------
    figure : Figure
        In the colours of `LIGHT`.
    suffix : {".svg", ".png"}
    label : str
        What a screen reader says of an SVG.
    """
    if suffix == ".png":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return buffer.getvalue()
    head, rest = _svg(figure, salt="file", transparent=False)
    dark = asdict(DARK)
    rules = "".join(
        f'[style*="{what}: {color}"]{{{what}:{dark[role]}!important}}'
        for role, color in asdict(LIGHT).items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return f"{_named(head, label)}>{style}{rest}".encode()


def _svg(figure: Figure, *, salt: str, transparent: bool) -> tuple[str, str]:
    """Draw the same bytes each time, without what names the drawer; split before the end of the opening tag."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    return head, rest


def _named(head: str, label: str) -> str:
    return head.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
