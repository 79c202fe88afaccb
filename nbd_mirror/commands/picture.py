# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of dirty maps: in a terminal, and as a PNG file."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UnsupportedError
from ..base.files import replace_file
from ..base.units import format_size

if TYPE_CHECKING:
    from PIL import Image

    from ..volume.mapview import DirtyMaps

__all__ = ["picture", "save_png"]

_SHADES = " ░▒▓█"
_SHADES_ASCII = ".-+*#"
_LEGEND = ("clean", "to 25% dirty", "to 50%", "to 75%", "more")

_PNG_SIDE = 512  # cells, at most, in a row and in a column
_PNG_CLEAN = (36, 58, 48)
_PNG_SOME, _PNG_ALL = (224, 176, 64), (214, 48, 40)


def _shade(share: float) -> int:
    """Return 0 for clean to 4; a single dirty region is always visible."""
    return min(math.ceil(share * 4), 4)


def picture(
    maps: DirtyMaps, width: int, *, height: int = 16, plain: bool = False
) -> list[str]:
    """
    Draw the map as lines of shaded cells, each an equal slice of the volume.

    Args:
        maps: whose dirty map is drawn, left to right, top to bottom.
        width: cells in a line, as many as the terminal has columns for.
        height: lines at most.
        plain: ASCII shades, for a terminal without block characters.
    Returns:
        Lines without colours; the last one is the legend.
    """
    shades = _SHADES_ASCII if plain else _SHADES
    width = max(width, 1)
    shares = maps.shares(width * max(height, 1))
    cell = maps.nr_regions * maps.region_size / len(shares)
    side = "|" if plain else "│"
    cells = "".join(shades[_shade(share)] for share in shares)
    lines = [side + cells[i : i + width] + side for i in range(0, len(cells), width)]
    legend = ", ".join(
        f"'{shade}' {meaning}" for shade, meaning in zip(shades, _LEGEND, strict=True)
    )
    return [*lines, f"one cell is {format_size(round(cell))}: {legend}"]


def save_png(maps: list[DirtyMaps], file: str | os.PathLike[str], title: str) -> None:
    """
    Save a picture of the dirty maps, one square under the other.

    Dark green is clean, amber to red are shares of dirty regions, from few to all.

    Args:
        maps: of one volume's remotes.
        file: replaced if it exists, once the whole picture is written.
        title: a line of text above.
    Raises:
        OSError: it cannot be written. UnsupportedError: Pillow is not installed.
        FormatError: a map was truncated in the meantime.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise UnsupportedError(
            "a picture needs Pillow, which is not installed",
            "pip install 'nbd-mirror[png]'",
        ) from None
    squares = [_square(one) for one in maps]
    text = 16
    total = Image.new(
        "RGB",
        (528, text + sum(image.height + text + 8 for _, image in squares)),
        "white",
    )
    draw = ImageDraw.Draw(total)
    draw.text((8, 2), title, fill="black")
    top = text
    for line, image in squares:
        draw.text((8, top + 2), line, fill="black")
        total.paste(image, (8, top + text))
        top += image.height + text + 8
    content = io.BytesIO()
    total.save(content, format="PNG")
    _write(Path(file), content.getvalue())


def _write(file: Path, content: bytes) -> None:
    """Replace an existing file; write into a device or a FIFO."""
    target = Path(os.path.realpath(file))  # a link stays a link
    mode = 0o666  # as for any file that a command writes
    with contextlib.suppress(FileNotFoundError):
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            target.write_bytes(content)
            return
        mode = stat.S_IMODE(status.st_mode)
    replace_file(target.parent, target.name, content, mode)


def _square(maps: DirtyMaps) -> tuple[str, Image.Image]:
    """Return a line of text, and the map as a square of 512 pixels."""
    from PIL import Image

    side = min(math.ceil(math.sqrt(maps.nr_regions)), _PNG_SIDE)
    shares = maps.shares(side * side)
    image = Image.new("RGB", (side, -(-len(shares) // side)), "white")
    image.putdata([_colour(share) for share in shares])
    scale = max(_PNG_SIDE // side, 1)
    dirty = format_size(maps.bytes_of(maps.dirty_regions))
    cell = format_size(round(maps.nr_regions * maps.region_size / len(shares)))
    return f"{maps.remote}: {dirty} dirty; a cell is {cell}", image.resize(
        (side * scale, image.height * scale), Image.Resampling.NEAREST
    )


def _colour(share: float) -> tuple[int, int, int]:
    if not share:
        return _PNG_CLEAN
    red, green, blue = (
        round(some + (all_ - some) * share)
        for some, all_ in zip(_PNG_SOME, _PNG_ALL, strict=True)
    )
    return red, green, blue
