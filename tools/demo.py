"""Train a small detector on generated images, evaluate it, and draw its predictions.

    python tools/demo.py [FAMILY]

It runs this project's tools, prints each command, and leaves in work_dirs/demo: predictions.png,
learning_curve.png, and the training and test runs with their logs and checkpoints.
"""

import argparse
import collections
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from pycocotools import mask as mask_utils

from mmattn.visualization import Instances, plot_predictions

Curve = tuple[Sequence[float], Sequence[float]]

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    family: f'configs/{family}/demo_cascade_mask_rcnn_{family}.py'
    for family in ('gcvit', 'dat', 'quadtree')
}
NUM_PICTURES = 8

TRAIN_LINE = re.compile(
    r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*? eta: (.+?)  time:.*? loss: ([\d.]+|nan)'
)
METRICS_LINE = re.compile(
    r'Epoch\((val|test)\).*coco/bbox_mAP: ([\d.-]+).*coco/segm_mAP: ([\d.-]+)'
)
LOSSES = {
    'all': r'loss',
    'region proposals': r'loss_rpn_(cls|bbox)',
    'classes': r's\d\.loss_cls',
    'boxes': r's\d\.loss_bbox',
    'masks': r's\d\.loss_mask',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('family', nargs='?', choices=CONFIGS, default='gcvit', help='[gcvit]')
    parser.add_argument('--work-dir', type=Path, default='work_dirs/demo', help='[work_dirs/demo]')
    parser.add_argument('--data', default='data/demo/coco', help='made if needed [data/demo/coco]')
    parser.add_argument('--train', type=int, default=1300, help='training images [1300]')
    parser.add_argument('--val', type=int, default=200, help='held-out images [200]')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override the config'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    train_dir, test_dir = args.work_dir / 'train', args.work_dir / 'test'
    move_aside(args.work_dir)

    run('tools/misc/make_demo_dataset.py', args.data, '--train', args.train, '--val', args.val)
    config = relative(CONFIGS[args.family])
    data = {'MMATTN_COCO': args.data}
    options = ['--cfg-options', *args.cfg_options]
    train = [config, '--work-dir', train_dir, *(options if args.cfg_options else [])]
    wall, cpu = run('tools/train.py', *train, variables=data, show=condense)
    checkpoint = os.path.relpath((train_dir / 'last_checkpoint').read_text())
    results = f'test_evaluator.outfile_prefix={test_dir / "results"}'
    test = [config, checkpoint, '--work-dir', test_dir, *options, results]
    run('tools/test.py', *test, variables=data, show=condense)

    name = Config.fromfile(config).model.backbone.type
    metrics = json.loads(only(test_dir, '*/*.json').read_text())
    # mmdet writes no mAP where nothing was detected.
    bbox, mask = (metrics.get(f'coco/{kind}_mAP', 0) for kind in ('bbox', 'segm'))
    score = f'bbox mAP {bbox:.3f}, mask mAP {mask:.3f} on {args.val} held-out images'
    pictures = {
        'predictions.png': draw_predictions(
            args.data, test_dir, f'{name} Cascade Mask R-CNN: {score}'
        ),
        'learning_curve.png': draw_learning_curve(
            train_dir, f'{name} Cascade Mask R-CNN on {args.train} generated images'
        ),
    }
    for file, figure in pictures.items():
        figure.savefig(args.work_dir / file)
    print(
        f'\n{score}; training took {minutes(wall)} ({minutes(cpu)} of CPU time), '
        f'all {minutes(time.perf_counter() - start)}; '
        f'pictures: {", ".join(str(args.work_dir / file) for file in pictures)}'
    )


# ------------------------------------------------------------------------------------- commands


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run by its date."""
    if not folder.exists():
        return
    made = time.localtime(folder.stat().st_mtime)
    earlier = folder.with_name(f'{folder.name}_{time.strftime("%Y%m%d_%H%M%S", made)}')
    folder.rename(earlier)
    print(f'An earlier run was in {folder}: it is now {earlier}')


def relative(path: str) -> str:
    """A path inside this project, relative to the current folder."""
    return os.path.relpath(ROOT / path)


def run(
    tool: str,
    *arguments: object,
    variables: Mapping[str, str] | None = None,
    show: Callable[[str], str | None] = str.rstrip,
) -> tuple[float, float]:
    """Run one of the project's tools; return its seconds of wall time and of CPU time.

    Args:
        tool: path inside the project.
        arguments: command line; each is converted by ``str``.
        variables: added to the environment.
        show: turns a line of output into the text to print, or None.
    """
    variables = variables or {}
    command = [relative(tool), *map(str, arguments)]
    shown = [f'{key}={shlex.quote(value)}' for key, value in variables.items()]
    print(f'\n$ {" ".join(shown)}{" " if shown else ""}python {shlex.join(command)}', flush=True)
    start, cpu_before = time.perf_counter(), children_cpu()
    last_lines: collections.deque[str] = collections.deque(maxlen=40)
    with subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last_lines.append(line)
            if (text := show(line)) is not None:
                print(text, flush=True)
    if process.returncode:
        sys.exit(f'{"".join(last_lines)}\n{tool} failed: the end of its output is above')
    return time.perf_counter() - start, children_cpu() - cpu_before


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def condense(line: str) -> str | None:
    """A short form of a line of mmengine's log, or None where it has no progress."""
    if match := TRAIN_LINE.search(line):
        epoch, iteration, last, eta, loss = match.groups()
        return f'  epoch {epoch:>2}  {iteration:>4}/{last}  loss {float(loss):.3f}  {eta} to go'
    if match := METRICS_LINE.search(line):
        task, bbox, segm = match.groups()
        return f'  {dict(val="validation", test="test")[task]}: bbox mAP {bbox}, mask mAP {segm}'
    return None


def minutes(seconds: float) -> str:
    return f'{int(seconds // 60)} min {int(seconds % 60)} s'


# ------------------------------------------------------------------------------------- pictures


def only(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches the pattern."""
    (path,) = folder.glob(pattern)
    return path


def draw_predictions(data: str, test_dir: Path, title: str) -> Figure:
    """Draw the first held-out images with their annotations and predictions."""
    truth = json.loads(Path(data, 'annotations/instances_val2017.json').read_text())
    predicted = json.loads((test_dir / 'results.segm.json').read_text())
    classes = [category['name'] for category in truth['categories']]
    examples = []
    for info in truth['images'][:NUM_PICTURES]:
        image = np.asarray(cv2.imread(str(Path(data, 'val2017', info['file_name']))))[..., ::-1]
        annotated, found = (
            [entry for entry in entries if entry['image_id'] == info['id']]
            for entries in (truth['annotations'], predicted)
        )
        examples.append((image, instances(annotated, image), instances(found, image, scored=True)))
    return plot_predictions(examples, classes, title)


def instances(entries: list[dict], image: np.ndarray, scored: bool = False) -> Instances:
    """COCO annotations or results of one image (H, W, 3) as arrays; category 1 is class 0."""
    num = len(entries)
    boxes = np.array([entry['bbox'] for entry in entries], float).reshape(num, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [mask_utils.decode(entry['segmentation']) for entry in entries]
    return Instances(
        labels=np.array([entry['category_id'] - 1 for entry in entries], int),
        boxes=boxes,
        masks=np.array(masks, bool).reshape(num, *image.shape[:2]),
        scores=np.array([entry['score'] for entry in entries]) if scored else None,
    )


def draw_learning_curve(train_dir: Path, title: str) -> Figure:
    """Draw losses and mAP from mmengine's log."""
    lines = only(train_dir, '*/vis_data/scalars.json').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if 'loss' in record]
    per_epoch = max(record['step'] for record in steps) / max(record['epoch'] for record in steps)
    epochs = [record['step'] / per_epoch for record in steps]
    losses = {
        name: (epochs, [sum(v for k, v in r.items() if re.fullmatch(keys, k)) for r in steps])
        for name, keys in LOSSES.items()
    }
    tests = [record for record in records if 'coco/bbox_mAP' in record]
    metrics = {
        name: ([record['step'] for record in tests], [record[key] for record in tests])
        for name, key in {'boxes': 'coco/bbox_mAP', 'masks': 'coco/segm_mAP'}.items()
    }
    return plot_learning_curve(losses, metrics, title)


def plot_learning_curve(
    losses: Mapping[str, Curve], metrics: Mapping[str, Curve], title: str
) -> Figure:
    """Draw losses above and metrics below, over the same epochs.

    Args:
        losses: name -> (epochs, values), on a logarithmic axis; the first has the thickest line.
        metrics: name -> (epochs, values in [0, 1]); the last value of each is written beside it.
        title: model and data set.
    """
    figure = Figure(figsize=(9, 8), dpi=110, layout='constrained')
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subplots(2, 1, sharex=True)

    for i, (name, (epochs, values)) in enumerate(losses.items()):
        upper.plot(epochs, values, label=name, color=f'C{i}', linewidth=1.2 if i else 2.4)
    upper.set(ylabel='training loss', yscale='log')
    upper.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=len(losses), frameon=False)

    for i, (name, (epochs, values)) in enumerate(metrics.items()):
        lower.plot(
            epochs, values, marker='o', label=f'{name} (last: {values[-1]:.3f})', color=f'C{i}'
        )
    lower.set(ylabel='COCO mAP on held-out images', ylim=(0, 1), xlabel='epoch')
    lower.legend(loc='upper left')
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))

    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    return figure


if __name__ == '__main__':
    main()
