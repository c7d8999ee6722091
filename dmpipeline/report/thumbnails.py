"""Thumbnails of pictures, on sheets: one image file of hundreds of them takes a tenth of what as many files take."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_COLUMNS = 40
_PER_SHEET = _COLUMNS * 40
_MOST_PIXELS = 48
_LOSSLESS_BELOW = 24
_QUALITY = 62
_SHADES = 15


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Thumbnails of a part of a dataset.

    Attributes
    ----------
    sheets : tuple of bytes
        WebP images of up to 1,600 thumbnails each, in rows of `columns`.
    width, height : int
        Of a thumbnail, in pixels.
    count : int
        Thumbnails there are.
    shown : tuple of int, or None
        Examples they are of, in order; None where they are of all.
    """

    sheets: tuple[bytes, ...]
    width: int
    height: int
    count: int
    shown: tuple[int, ...] | None

    def facts(self) -> dict[str, Any]:
        """State all but the sheets, ready for JSON."""
        return {
            "width": self.width,
            "height": self.height,
            "count": self.count,
            "columns": _COLUMNS,
            "per_sheet": _PER_SHEET,
            "shown": None if self.shown is None else list(self.shown),
            "type": "image/webp",
        }


def thumbnails(pictures: npt.NDArray[Any], shown: Sequence[int] | None = None) -> Thumbnails:
    """Make thumbnails.

    Parameters
    ----------
    pictures : array, shape (n, height, width) or (n, height, width, 3)
        Grey or colour; 0 to 255 where integers, 0 to 1 where floating. Grey ones are drawn dark on light, as ink is.
    shown : sequence of int, optional
        Which of them; all if not given.

    Returns
    -------
    thumbnails : Thumbnails
        At most 48 pixels wide and high. Small ones are lossless, grey ones in 16 shades.
    """
    height, width = pictures.shape[1:3]
    step = max(1, -(-max(height, width) // _MOST_PIXELS))
    places = np.arange(len(pictures)) if shown is None else np.asarray(shown, np.intp)
    sheets = []
    for start in range(0, len(places), _PER_SHEET):
        own = places[start : start + _PER_SHEET]
        small = _smaller(_as_bytes(np.asarray(pictures[own])), step)
        sheets.append(_sheet(small))
    size = (-(-height // step), -(-width // step))
    return Thumbnails(tuple(sheets), size[1], size[0], len(places), None if shown is None else tuple(places.tolist()))


def _as_bytes(pictures: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    values = pictures if pictures.dtype.kind in "iu" else np.rint(pictures.astype(np.float32) * 255)
    clipped: npt.NDArray[np.uint8] = np.clip(values, 0, 255).astype(np.uint8)
    return 255 - clipped if pictures.ndim == 3 else clipped[..., :3]


def _smaller(pictures: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Average squares of pixels; those at the edge may be smaller."""
    if step == 1:
        return pictures
    height, width = pictures.shape[1:3]
    down, across = np.arange(0, height, step), np.arange(0, width, step)
    sums = np.add.reduceat(np.add.reduceat(pictures.astype(np.float32), down, axis=1), across, axis=2)
    sizes = np.outer(np.diff([*down, height]), np.diff([*across, width]))
    shaped = sizes.reshape(1, *sizes.shape, *[1] * (pictures.ndim - 3))
    averaged: npt.NDArray[np.uint8] = np.rint(sums / shaped).astype(np.uint8)
    return averaged


def _sheet(pictures: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image  # slow to import

    n, height, width = pictures.shape[:3]
    rows = -(-n // _COLUMNS)
    full = np.full((rows * _COLUMNS, *pictures.shape[1:]), 255, np.uint8)
    full[:n] = pictures
    tiled = full.reshape(rows, _COLUMNS, *pictures.shape[1:]).swapaxes(1, 2)
    sheet = tiled.reshape(rows * height, _COLUMNS * width, *pictures.shape[3:])
    is_small = max(height, width) < _LOSSLESS_BELOW
    if sheet.ndim == 2 and not is_small:
        sheet = (np.rint(sheet / 255 * _SHADES) * (255 / _SHADES)).astype(np.uint8)
    buffer = io.BytesIO()
    is_lossless = is_small or sheet.ndim == 2
    Image.fromarray(sheet).save(buffer, "webp", lossless=is_lossless, quality=100 if is_lossless else _QUALITY)
    return buffer.getvalue()
