"""Make a data set of drawn shapes in COCO, ADE20K or ImageNet layout.

    python tools/misc/make_demo_dataset.py data/demo/coco --train 1000 --val 100 --size 128

Rotated, scaled, textured shapes of six classes lie on textured backgrounds and hide parts of
each other. Every image has its random generator, seeded by (seed, split, index): the same arguments
give the same files, and image i does not depend on the number of images.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

Scene = tuple[np.ndarray, np.ndarray, np.ndarray]  # see draw_scene

CLASSES = ('circle', 'triangle', 'square', 'star', 'ring', 'crescent')
SPLITS = ('train', 'val')
STAMP = 'made_by_make_demo_dataset.json'
MIN_SIZE = 32
MIN_VISIBLE = 0.6  # the least visible share of a shape's area
SUPERSAMPLE = 4


# ---------------------------------------------------------------------------------------- shapes


def _arc(start: float, stop: float, radius: float = 1.0, num: int = 48) -> np.ndarray:
    angle = np.linspace(start, stop, num)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """A regular polygon, or a star if every second corner lies on the `inner` radius."""
    points = _arc(0, 2 * np.pi, num=corners + 1)[:-1]
    if inner is not None:
        points[1::2] *= inner
    return points


def _crescent(bite: float = 0.8, shift: float = 0.5) -> np.ndarray:
    """The unit disk without a smaller disk whose center is moved along x."""
    meet = (1 + shift**2 - bite**2) / (2 * shift)
    outer = np.arccos(meet)
    inner = np.arctan2(np.sqrt(1 - meet**2), meet - shift)
    hollow = _arc(2 * np.pi - inner, inner, bite) + np.array([shift, 0])
    return np.concatenate([_arc(outer, 2 * np.pi - outer), hollow])


# Contours inside the unit circle, filled by the even-odd rule.
OUTLINES = {
    'circle': [_arc(0, 2 * np.pi)],
    'triangle': [_regular(3)],
    'square': [_regular(4)],
    'star': [_regular(10, inner=0.45)],
    'ring': [_arc(0, 2 * np.pi), _arc(0, 2 * np.pi, 0.55)],
    'crescent': [_crescent()],
}


def _coverage(
    label: int, center: np.ndarray, radius: float, angle: float, stretch: float
) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased picture of one shape.

    Returns the share of every pixel that the shape covers, float32 in [0, 1], and the image
    position (x, y) of the array's corner; the array may extend beyond the image.
    """
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corner = np.floor(center - radius).astype(int)
    side = int(np.ceil(2 * radius)) + 2
    canvas = np.zeros((side * SUPERSAMPLE,) * 2, np.uint8)
    contours = [
        (((points * [1, stretch]) @ turn * radius + center - corner) * SUPERSAMPLE * 16)
        for points in OUTLINES[CLASSES[label]]
    ]
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32) for points in contours], 255, shift=4)
    small = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255, corner


# -------------------------------------------------------------------------------------- textures


def _field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random pattern (height, width) in [0, 1]: clouds, gradient, stripes, checks or grain."""
    kind = rng.integers(5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(6, 24)
    if kind == 0:
        grid = rng.random((int(rng.integers(3, 9)),) * 2, dtype=np.float32)
        field = np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    elif kind == 1:
        field = (along - along.min()) / max(np.ptp(along), 1)
    elif kind == 2:
        field = 0.5 + 0.5 * np.sin(2 * np.pi * along / period)
    elif kind == 3:
        field = 0.5 + 0.5 * np.sign(
            np.sin(along * np.pi / period) * np.sin(across * np.pi / period)
        )
    else:
        field = rng.random((height, width), dtype=np.float32)
    return field.astype(np.float32)


def _texture(
    rng: np.random.Generator, height: int, width: int, color: np.ndarray, contrast: float
) -> np.ndarray:
    """(height, width, 3) float32: `color` with a pattern of at most `contrast` around it."""
    other = rng.uniform(-contrast, contrast, 3)
    field = _field(rng, height, width)[..., None] - 0.5
    return np.clip(color + field * other, 0, 1).astype(np.float32)


def _contrasting_color(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """The one of a few random colors (RGB in [0, 1]) that is farthest from `background`."""
    candidates = rng.random((6, 3))
    return candidates[np.argmax(np.abs(candidates - background).sum(1))]


# ----------------------------------------------------------------------------------------- scene


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    labels: Sequence[int] | np.ndarray,
    radii: tuple[float, float] = (0.11, 0.25),
) -> Scene:
    """Draw one image; later shapes lie on top of earlier ones.

    A shape is placed where `MIN_VISIBLE` of it and of all shapes below it stays visible; after ten
    failed tries it is left out.

    Args:
        rng: numpy Generator.
        size: (height, width) in pixels.
        labels: class indices to draw, from the bottom to the top.
        radii: smallest and largest radius, in units of the image's shorter side.

    Returns:
        image (height, width, 3) uint8 RGB; labels (n,) int64 of the shapes that were placed; their
        visible masks (n, height, width) bool, disjoint.
    """
    height, width = size
    background = rng.random(3)
    image = _texture(rng, height, width, background, 0.4)
    owner = np.full((height, width), -1)  # index of the topmost shape
    areas: list[int] = []
    placed: list[int] = []
    for label in labels:
        for _ in range(10):
            radius = max(rng.uniform(*radii) * min(size), 5)
            center = rng.uniform(0.08, 0.92, 2) * [width, height]
            alpha, (left, top) = _coverage(
                label, center, radius, rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1)
            )
            y0, x0 = max(top, 0), max(left, 0)
            inside = np.s_[y0 : top + alpha.shape[0], x0 : left + alpha.shape[1]]
            full_area = np.count_nonzero(alpha > 0.5)
            alpha = alpha[y0 - top :, x0 - left :][: height - y0, : width - x0]
            proposal = owner.copy()
            proposal[inside][alpha > 0.5] = len(placed)
            wanted = np.array([*areas, full_area]) * MIN_VISIBLE
            seen = np.bincount(proposal[proposal >= 0], minlength=len(wanted))
            if (seen >= wanted).all():
                break
        else:
            continue
        owner = proposal
        areas.append(full_area)
        placed.append(label)
        color = _contrasting_color(rng, image[inside].mean((0, 1)))
        paint = _texture(rng, alpha.shape[0], alpha.shape[1], color, 0.35)
        light = np.linspace(1.15, 0.75, alpha.shape[0], dtype=np.float32)[:, None, None]
        paint = np.clip(paint * light, 0, 1)
        alpha = alpha[..., None]
        image[inside] = image[inside] * (1 - alpha) + paint * alpha
    image += rng.normal(0, 0.015, image.shape)
    image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return image, np.array(placed, int), owner == np.arange(len(placed))[:, None, None]


def _scenes(split: str, num: int, size: tuple[int, int], seed: int) -> Iterator[Scene]:
    """Yield `num` crowded scenes of a split."""
    for index in range(num):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        yield draw_scene(rng, size, rng.integers(len(CLASSES), size=rng.integers(3, 8)))


# --------------------------------------------------------------------------------------- layouts


def _write_image(path: Path, array: np.ndarray) -> None:
    """Write (H, W, 3) RGB or (H, W) gray uint8, compressed by the suffix of the path."""
    if array.ndim == 3:
        array = array[..., ::-1]
    if not cv2.imwrite(str(path), array, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f'could not write {path}')


def write_coco(root: Path, nums: dict[str, int], size: tuple[int, int], seed: int) -> None:
    """`train2017/`, `val2017/` and `annotations/instances_*.json` with run-length masks."""
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    (root / 'annotations').mkdir()
    for split in SPLITS:
        folder = root / f'{split}2017'
        folder.mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for image_id, (image, labels, masks) in enumerate(_scenes(split, nums[split], size, seed)):
            name = f'{image_id:012d}.jpg'
            _write_image(folder / name, image)
            images.append(dict(id=image_id, file_name=name, height=size[0], width=size[1]))
            for label, mask in zip(labels, masks, strict=True):
                code = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=int(label) + 1,
                        bbox=mask_utils.toBbox(code).tolist(),
                        area=int(mask.sum()),
                        segmentation=dict(size=code['size'], counts=code['counts'].decode()),
                        iscrowd=0,
                    )
                )
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(content))


def write_ade20k(root: Path, nums: dict[str, int], size: tuple[int, int], seed: int) -> None:
    """`images/{training,validation}` and `annotations/` beside it: 0 background, 1.. classes."""
    for split, name in zip(SPLITS, ('training', 'validation'), strict=True):
        folders = root / 'images' / name, root / 'annotations' / name
        for folder in folders:
            folder.mkdir(parents=True)
        for index, (image, labels, masks) in enumerate(_scenes(split, nums[split], size, seed)):
            segments = ((labels[:, None, None] + 1) * masks).sum(0).astype(np.uint8)
            _write_image(folders[0] / f'ADE_{split}_{index:08d}.jpg', image)
            _write_image(folders[1] / f'ADE_{split}_{index:08d}.png', segments)


def write_imagenet(root: Path, nums: dict[str, int], size: tuple[int, int], seed: int) -> None:
    """`{train,val}/<class>/*.JPEG`, one large shape an image, the classes in turn.

    `meta/{train,val}.txt` list the files with their labels, for data sets with ImageNet's thousand
    classes, which refuse six folders.
    """
    (root / 'meta').mkdir()
    for split in SPLITS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        lines = []
        for index in range(nums[split]):
            label = index % len(CLASSES)
            rng = np.random.default_rng((seed, SPLITS.index(split), index))
            image, _, _ = draw_scene(rng, size, [label], radii=(0.25, 0.45))
            name = f'{CLASSES[label]}/{CLASSES[label]}_{index:08d}.JPEG'
            _write_image(root / split / name, image)
            lines.append(f'{name} {label}\n')
        (root / 'meta' / f'{split}.txt').write_text(''.join(lines))


LAYOUTS = dict(coco=write_coco, ade20k=write_ade20k, imagenet=write_imagenet)


# ------------------------------------------------------------------------------------------ tool


def make_dataset(
    out: str | Path,
    layout: str = 'coco',
    train: int = 1000,
    val: int = 100,
    size: int | Sequence[int] = 128,
    seed: int = 0,
) -> bool:
    """Make the data set and return True, or return False where `out` already holds it.

    Args:
        out: folder to make. One that this function made with other arguments is replaced.
        layout: 'coco', 'ade20k' or 'imagenet'.
        train, val: number of images of each split, at least 1.
        size: side in pixels of square images, or (height, width); at least 32.
        seed: a non-negative integer.

    Raises:
        ValueError: an argument has a wrong value.
        FileExistsError: `out` exists, is not empty and was not made here.
    """
    out = Path(out)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    for name, num in dict(train=train, val=val).items():
        if num < 1:
            raise ValueError(f'{name} must be at least 1, got {num}')
    if len(sides) != 2 or min(sides) < MIN_SIZE:
        raise ValueError(f'size must be one or two numbers (H W) from {MIN_SIZE} up, got {sides}')
    if seed < 0:
        raise ValueError(f'seed must not be negative, got {seed}')

    stamp = dict(layout=layout, train=train, val=val, size=list(sides), seed=seed)
    made_here = (out / STAMP).is_file()
    if made_here and json.loads((out / STAMP).read_text()) == stamp:
        return False
    if out.exists() and not made_here and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f'{out} exists and was not made by this tool: name a new or an empty folder'
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    # Made in a temporary folder and renamed: an interrupted run leaves no incomplete `out`.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}_', dir=out.parent) as temporary:
        root = Path(temporary) / 'dataset'
        root.mkdir()
        LAYOUTS[layout](root, dict(train=train, val=val), sides, seed)
        (root / STAMP).write_text(json.dumps(stamp))
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)
    return True


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', help='folder to make')
    parser.add_argument('--format', choices=LAYOUTS, default='coco', help='default: coco')
    parser.add_argument('--train', type=int, default=1000, metavar='N', help='default: 1000')
    parser.add_argument('--val', type=int, default=100, metavar='N', help='default: 100')
    parser.add_argument(
        '--size', type=int, nargs='+', default=[128], metavar='PX',
        help='side of square images, or height and width, default: 128',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_args()
    size = args.size * 2 if len(args.size) == 1 else args.size
    start = time.perf_counter()
    try:
        made = make_dataset(args.out, args.format, args.train, args.val, size, args.seed)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    if made:
        print(
            f'Made {args.train} training and {args.val} validation images of '
            f'{size[0]}x{size[1]} in {args.format} layout in {args.out} '
            f'({time.perf_counter() - start:.1f} s)'
        )
    else:
        print(f'{args.out} already holds this data set: nothing to do')


if __name__ == '__main__':
    main()
