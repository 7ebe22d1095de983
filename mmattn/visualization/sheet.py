"""Contact sheets: one kind of picture of many images, on one page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1500  # pixels of the sheet
BAR = 30  # pixels above a picture, for its name
WIDE = 2.0  # pictures of this width over their height stand alone in a row


def contact_sheet(pictures: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Pictures below each other, two in a row where they are narrow, each with its name above it.

    Args:
        pictures: uint8 RGB (H, W, 3), of any sizes.
        names: as many.

    Returns:
        uint8 RGB, 1500 pixels wide.
    """
    widest = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    columns = 1 if widest > WIDE or len(pictures) == 1 else 2
    width = WIDTH // columns
    tiles = []
    for picture in pictures:
        height = round(width * picture.shape[0] / picture.shape[1])
        tiles.append(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [BAR + max(tile.height for tile in row) for row in rows]
    sheet = Image.new('RGB', (WIDTH, sum(heights)), 'white')
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for i, (tile, name) in enumerate(zip(tiles, names, strict=True)):
        left, top = i % columns * width, sum(heights[: i // columns])
        write.rectangle((left, top, left + width, top + BAR), fill='#e6e6e6')
        write.text((left + 10, top + 5), name, fill='black', font=font)
        sheet.paste(tile, (left, top + BAR))
    return np.asarray(sheet)
