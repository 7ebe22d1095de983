"""Interactive HTML page: click a point of an image to see its attention.

The page contains all its data and needs no network. For every layer the attention of a grid of
query points is computed in advance; the heat maps of a head are the tiles of one gray PNG, each
scaled from 0 to its maximum.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import cv2
import matplotlib
import numpy as np

from .attention import attention_maps
from .capture import Block
from .detection import Instances

QUERIES = 12  # query points along the longer side of an image
MAP_SIDE = 28  # longer side of a heat map, in cells
MAX_HEADS = 8
JPEG_QUALITY = 88
TEMPLATE = 'page.html'


@dataclass(frozen=True)
class PageImage:
    """An image of the page.

    Args:
        name: entry in the page's list of images.
        picture: uint8 RGB (H, W, 3).
        blocks: attention blocks to choose from.
        found: a detector's predictions, whose boxes can be shown.
    """

    name: str
    picture: np.ndarray
    blocks: Sequence[Block]
    found: Instances | None = None


def page_data(
    images: Sequence[PageImage],
    model: str,
    classes: Sequence[str] = (),
    progress: Callable[[list], Iterable] = iter,
) -> dict:
    """Data of the page, ready for JSON.

    Args:
        images: at least one image.
        model: name of the model.
        classes: names of a detector's classes.
        progress: wraps the list of all (image, block) pairs, for a progress bar.

    Returns:
        ``model``, ``colors`` (the color scale, from low to high) and ``images``, each with
        ``layers``: ``stage``, ``kind``, ``heads`` (names), ``stride``, ``size`` of its map in
        tokens, ``grid`` (rows, columns of query points), ``queries`` (their tokens), ``map`` (rows,
        columns of a heat map), ``peaks`` (by head and query: the largest share over the mean
        share), ``mosaics`` (by head: PNG).
    """
    todo = [(i, block) for i, image in enumerate(images) for block in image.blocks]
    layers: list[list[dict]] = [[] for _ in images]
    for i, block in progress(todo):
        layers[i].append(_layer(block))
    colors = matplotlib.colormaps['inferno'](np.linspace(0, 1, 64))[:, :3]
    return dict(
        model=model,
        colors=(255 * colors).round().astype(int).tolist(),
        images=[_image(*pair, classes) for pair in zip(images, layers, strict=True)],
    )


def render_page(data: dict) -> str:
    """HTML of the page, from the result of :func:`page_data`."""
    template = (files(__package__) / TEMPLATE).read_text()
    # Escaped, as a name with '</script>' would end the script.
    return template.replace('/*DATA*/', json.dumps(data).replace('<', '\\u003c'))


def _image(image: PageImage, layers: list[dict], classes: Sequence[str]) -> dict:
    height, width = image.picture.shape[:2]
    _, jpeg = cv2.imencode(
        '.jpg', image.picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    boxes = []
    if image.found is not None:
        found, scores = image.found, image.found.predicted_scores()
        boxes = [
            dict(box=[round(float(side), 1) for side in box], label=f'{classes[label]} {score:.2f}')
            for box, label, score in zip(found.boxes, found.labels, scores, strict=True)
        ]
    return dict(
        name=image.name,
        width=width,
        height=height,
        picture=_url(jpeg, 'jpeg'),
        boxes=boxes,
        layers=layers,
    )


def _layer(block: Block) -> dict:
    rows, columns = block.size
    grid = _fit(block.size, QUERIES)
    queries = [
        (int((i + 0.5) * rows / grid[0]), int((j + 0.5) * columns / grid[1]))
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    maps = attention_maps(block, queries)  # (n, heads, H, W)
    names = ['the only one']
    if block.num_heads > 1:
        names = [f'mean of {block.num_heads}', *(f'head {h}' for h in range(maps.shape[1]))]
        names = names[: 1 + MAX_HEADS]
        maps = np.concatenate([maps.mean(1, keepdims=True), maps[:, :MAX_HEADS]], 1)
    size = _fit(block.size, MAP_SIDE)
    small = np.stack(
        [
            [cv2.resize(share, size[::-1], interpolation=cv2.INTER_AREA) for share in heads]
            for heads in maps
        ]
    )
    peaks = small.max((2, 3))
    levels = (255 * small / np.maximum(peaks, 1e-30)[..., None, None]).round().astype(np.uint8)
    mosaics = []
    for head in range(levels.shape[1]):
        tiles = levels[:, head].reshape(*grid, *size).transpose(0, 2, 1, 3)
        _, png = cv2.imencode('.png', tiles.reshape(grid[0] * size[0], grid[1] * size[1]))
        mosaics.append(_url(png, 'png'))
    return dict(
        stage=block.stage,
        kind=block.kind,
        block=block.index,
        heads=names,
        stride=block.stride,
        size=block.size,
        grid=grid,
        queries=queries,
        map=size,
        peaks=[[float(f'{peak * rows * columns:.3g}') for peak in head] for head in peaks.T],
        mosaics=mosaics,
    )


def _fit(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Shrink a size to at most ``longest`` along its longer side, with the same aspect ratio."""
    shrink = max(1, max(size) / longest)
    return max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink))


def _url(encoded: np.ndarray, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}'
