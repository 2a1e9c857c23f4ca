"""A labelled grid of pictures: a prompt a row, a method a column."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 128, 256  # sides of a cell in pixels
_MARGIN, _GAP, _LABELS = 12, 6, 190
_INK, _FAINT, _PAPER = (25, 25, 30), (110, 110, 120), (255, 255, 255)


def grid(
    images: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[tuple[str, str]]
) -> Image.Image:
    """Lays out pictures, [row][column] of uint8 [H, W, 3].

    Args:
      rows: a label for every row, wrapped to fit.
      columns: for every column its name and a second line.
    """
    side = images[0][0].shape[1]
    side = side * -(-SMALLEST // side) if side < SMALLEST else min(side, LARGEST)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    top = _MARGIN + 42
    width = _MARGIN + _LABELS + len(columns) * (side + _GAP) + _MARGIN - _GAP
    height = top + len(rows) * (side + _GAP) + _MARGIN - _GAP
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    for column, (name, figures) in enumerate(columns):
        x = _MARGIN + _LABELS + column * (side + _GAP)
        pen.text((x, _MARGIN), name, _INK, bold)
        pen.text((x, _MARGIN + 19), figures, _FAINT, plain)
    for row, label in enumerate(rows):
        y = top + row * (side + _GAP)
        pen.multiline_text((_MARGIN, y), "\n".join(textwrap.wrap(label, 26)), _INK, plain, spacing=4)
        for column, picture in enumerate(images[row]):
            cell = Image.fromarray(picture)
            if cell.width != side:
                cell = cell.resize((side, side), Image.NEAREST if cell.width < side else Image.LANCZOS)
            page.paste(cell, (_MARGIN + _LABELS + column * (side + _GAP), y))
    return page
