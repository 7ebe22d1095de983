"""Draw a model's attention: ``visualize.py CONFIG CHECKPOINT IMAGE... --out DIR``.

For GC ViT, DAT, DAT++ and QuadTree in a detector, segmentor or classifier: attention over the
image, predictions, Grad-CAM, receptive fields, features, and a page (index.html) with the
attention of each clicked point.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.device import get_device
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from mmattn.checkpoint import CheckpointError
from mmattn.engine.runtime import add_cfg_options, stop
from mmattn.visualization.detection import Instances
from mmattn.visualization.draw.base import rendered
from mmattn.visualization.ground_truth import GroundTruth
from mmattn.visualization.page import PageImage, page_data, render_page
from mmattn.visualization.pictures import PictureOptions, attention_pictures, model_pictures
from mmattn.visualization.subject import Subject, View

PATIENCE = 2.0  # seconds without a progress bar
SHEET_WIDTH = 1500  # pixels of a contact sheet
BAR = 30  # pixels above each of its pictures, for the name
WIDE = 2.0  # pictures of this width over their height stand alone in a row


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('config', help='config file of a detector, segmentor or classifier')
    parser.add_argument('checkpoint', help='your own or a published file, or a URL')
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='image files')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='where pictures go')
    parser.add_argument(
        '--query',
        type=point,
        action='append',
        default=[],
        metavar='Y,X',
        help='point of the image, in its pixels, to look from; may be repeated '
        '[the centers of the best two detections, or of the image]',
    )
    parser.add_argument('--stage', type=int, help='show this stage alone, from 0')
    parser.add_argument('--head', type=int, help='show this head beside the mean of all, from 0')
    parser.add_argument(
        '--class',
        dest='label',
        metavar='NAME',
        help='class, or its number, for Grad-CAM [the likeliest]',
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='detections below are left out'
    )
    parser.add_argument(
        '--swin', type=Path, metavar='CONFIG', help="mmdet's Swin, to compare DAT's keys with"
    )
    parser.add_argument('--swin-checkpoint', metavar='FILE', help="of mmengine's format")
    parser.add_argument(
        '--pair',
        type=Path,
        metavar='IMAGE',
        help='QuadTree: look from each image into this one, too',
    )
    parser.add_argument('--device', default=get_device(), help='where the model runs')
    add_cfg_options(parser)
    return parser.parse_args()


def point(text: str) -> tuple[float, float]:
    """``Y,X`` in pixels."""
    try:
        y, x = (float(value) for value in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'must be Y,X in pixels, such as 120,84; got {text}'
        ) from None
    return y, x


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    try:
        num = visualize(args)
    except (
        CheckpointError,
        FileNotFoundError,
        ValueError,
        TypeError,
        ModuleNotFoundError,
    ) as error:
        stop(str(error))
    print(
        f'{num} pictures of {len(args.images)} image{"s" * (len(args.images) > 1)} in {args.out} '
        f'({time.perf_counter() - start:.0f} s); open {args.out / "index.html"} in a browser'
    )


def visualize(args: argparse.Namespace) -> int:
    """Write all pictures and the page; return the number of pictures."""
    subject = build(args.config, args.checkpoint, args.device, args.cfg_options)
    swin = build(args.swin, None, args.device) if args.swin else None
    if swin and args.swin_checkpoint:
        from mmengine.runner import load_checkpoint

        load_checkpoint(swin.model, args.swin_checkpoint, map_location='cpu')
    label = class_index(args.label, subject.classes)
    truths = GroundTruth(subject)
    if truths.problem:
        print(f'No ground truth beside the predictions: {truths.problem}')
    folders = folders_of(args.images, args.out)

    todo, pages = [], []
    for path, folder in zip(args.images, folders, strict=True):
        view = subject.look(path)
        queries = [view.placement.seen(*query) for query in args.query]
        options = PictureOptions(queries, args.stage, args.head, label, args.score_thr)
        predicted = view.prediction if isinstance(view.prediction, Instances) else None
        found = None if predicted is None else predicted.above(args.score_thr)
        pictures = model_pictures(subject, view, truths.of(view), options)
        if predicted is not None and not len(predicted.labels):
            print(f'{path}: nothing was detected, so there is no Grad-CAM')
            del pictures['grad_cam']
        pictures |= attention_pictures(
            view.picture,
            view.seen,
            subject.name,
            options,
            found,
            subject.classes,
            swin.look(path).seen.blocks if swin else (),
            pair(subject, view, args.pair),
        )
        todo += [(folder, name, draw) for name, draw in pictures.items()]
        blocks = view.seen.last_blocks()
        pages.append(PageImage(path.name, view.picture, blocks, found))

    drawn: dict[str, list[Path]] = {}
    for folder, name, draw in progress(todo, 'pictures'):
        folder.mkdir(parents=True, exist_ok=True)
        drawn.setdefault(name, []).append(save(draw(), folder / f'{name}.png'))
    if len(args.images) > 1:
        for name, files in progress(list(drawn.items()), 'contact sheets'):
            contact_sheet(files).save(args.out / f'sheet_{name}.png')
    data = page_data(pages, subject.name, subject.classes, lambda todo: progress(todo, 'page'))
    (args.out / 'index.html').write_text(render_page(data))
    return len(todo)


def build(
    config: str | Path, checkpoint: str | None, device: str, options: dict | None = None
) -> Subject:
    """Build the model of a config, with the weights of a checkpoint or fresh ones."""
    if not Path(config).is_file():
        stop(f'there is no config file {config}')
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    return Subject(cfg, checkpoint, device)


def class_index(name: str | None, classes: Sequence[str]) -> int | None:
    """Index of a class, from one of its names (ImageNet's have several) or its number."""
    if name is None:
        return None
    if name.isdigit() and int(name) < len(classes):
        return int(name)
    for i, names in enumerate(classes):
        if name in (names, *names.split(', ')):
            return i
    near = difflib.get_close_matches(name, classes, n=5, cutoff=0.4) or classes[:10]
    stop(
        f'the model has no class {name}; it has {len(classes)} (0 to {len(classes) - 1}), '
        f'such as {"; ".join(near)}'
    )


def folders_of(images: Sequence[Path], out: Path) -> list[Path]:
    """Folder of each image, by its name, and its index in the list if names repeat."""
    stems = [path.stem for path in images]
    return [
        out / (stem if stems.count(stem) == 1 else f'{stem}_{i}') for i, stem in enumerate(stems)
    ]


def pair(subject: Subject, view: View, path: Path | None) -> Any:
    """Picture of the other image of a pair, and its captured attention."""
    if path is None:
        return None
    other = subject.look(path, resize_to=view.placement.file_size)
    return other.picture, other.seen


def progress(todo: Collection, what: str) -> tqdm:
    """Progress bar, shown if the work takes longer than PATIENCE."""
    return tqdm(todo, desc=what, delay=PATIENCE, leave=False, file=sys.stderr)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a small PNG file."""
    Image.fromarray(rendered(figure)).save(path, optimize=True)
    return path


def contact_sheet(paths: Sequence[Path]) -> Image.Image:
    """Picture files on one sheet, two per row if narrow, below the names of their folders."""
    pictures = [Image.open(path).convert('RGB') for path in paths]
    widest = max(picture.width / picture.height for picture in pictures)
    columns = 1 if widest > WIDE or len(pictures) == 1 else 2
    width = SHEET_WIDTH // columns
    tiles = [
        picture.resize(
            (width, round(width * picture.height / picture.width)), Image.Resampling.LANCZOS
        )
        for picture in pictures
    ]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [BAR + max(tile.height for tile in row) for row in rows]
    sheet = Image.new('RGB', (SHEET_WIDTH, sum(heights)), 'white')
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for i, (tile, path) in enumerate(zip(tiles, paths, strict=True)):
        left, top = i % columns * width, sum(heights[: i // columns])
        write.rectangle((left, top, left + width, top + BAR), fill='#e6e6e6')
        write.text((left + 10, top + 5), path.parent.name, fill='black', font=font)
        sheet.paste(tile, (left, top + BAR))
    return sheet


if __name__ == '__main__':
    main()
