"""Contact sheets: one kind of picture of many images, on one page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

ROW_INCHES = 10.0


def contact_sheet(pictures: Sequence[np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Pictures below each other, two beside each other where they are narrow.

    Args:
        pictures: uint8 (H, W, 3 or 4), of any sizes.
        names: stand above them.
        title: stands above all.
    """
    shape = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    columns = 1 if shape > 2 or len(pictures) == 1 else 2
    rows = -(-len(pictures) // columns)
    height = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    figure = Figure(
        figsize=(ROW_INCHES, rows * (ROW_INCHES / columns * height + 0.3) + 0.5),
        dpi=110,
        layout='constrained',
    )
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, picture, name in zip(axes.flat, pictures, names, strict=False):
        panel.imshow(picture)
        panel.set_title(name, fontsize=9)
    return figure
