"""Write the tables of models from the metafiles: docs/model_zoo.md, README.md, configs/*/README.md.

python docs/generate/model_zoo.py
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs/model_zoo.md'
# In the READMEs, what is generated stands between these two lines.
START, END = '<!-- From docs/generate/model_zoo.py -->', '<!-- To here -->'

HEADS = {
    'mask_rcnn': 'Mask R-CNN',
    'cascade_mask_rcnn': 'Cascade Mask R-CNN',
    'retinanet': 'RetinaNet',
    'dino': 'DINO',
    'upernet': 'UPerNet',
    'fpn': 'Semantic FPN',
}
NAME = re.compile(
    rf'(?:(?P<head>{"|".join(HEADS)})_)?(?P<family>gcvit|dat|quadtree)_(?P<size>[a-z]+\d?)'
    r'(?:_(?P<extra>384|512|1x|3x|12e|36e))?_(?P<dataset>imagenet|coco|ade20k)'
)
EXTRAS = {'384': '384 x 384', '512': '512 x 512', '12e': '12 epochs', '36e': '36 epochs'}
# Dataset -> title, and the columns that hold results: heading -> metric.
TASKS = {
    'imagenet': ('classifiers, ImageNet-1K', {'top-1': 'Top 1 Accuracy'}),
    'coco': ('detectors, COCO', {'box AP': 'box AP', 'mask AP': 'mask AP'}),
    'ade20k': ('segmentors, ADE20K', {'mIoU': 'mIoU', 'multi-scale': 'mIoU(ms)'}),
}
HEADER = """\
# Model zoo

Each family's page on GitHub, linked below, has a table of all its models with their configs, made
from `configs/*/metafile.yml`. `mim search mmattn` lists them, too.

**Results are the papers'**, and what the configs aim at; nothing was trained to that length here. A
model without results has none in our sources and is there for comparison. GC ViT-L at 384 and 512
and DINO with GC ViT-L start from ImageNet-21K weights.

**params** (millions) and **FLOPs** (billions of multiply-adds) are counted here on the whole model;
published figures follow in parentheses. Classifiers have 1000 classes and their training size,
224 x 224 unless named; detectors are counted at 1280 x 800 with 1000 proposals and 100 masks,
segmentors at 512 x 512 without the auxiliary head. DINO's FLOPs are not counted.

`_base_ = 'mmattn::PATH'`, with a path in `configs/`, inherits a config
([In your own project](your_project.md)). Weights come from the authors' pages
([Checkpoints](checkpoints.md)).

"""
TREE = 'https://github.com/mmattn/mmattn/tree/main'

# A metafile's collection or model.
Entry = dict[str, Any]


def metafiles() -> dict[str, Entry]:
    """The parsed metafiles that model-index.yml names, by their paths."""
    paths = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    return {path: yaml.safe_load((ROOT / path).read_text()) for path in paths}


def collections(metafile: Entry) -> Iterator[tuple[Entry, list[Entry]]]:
    """Each collection of a metafile with its models."""
    for collection in metafile['Collections']:
        name = collection['Name']
        yield collection, [m for m in metafile['Models'] if m['In Collection'] == name]


def results(model: Entry) -> dict[str, float]:
    """Metric -> published value."""
    return {k: v for result in model.get('Results', []) for k, v in result['Metrics'].items()}


def parse(model: Entry) -> dict[str, str | None]:
    """The parts of a model's name."""
    match = NAME.fullmatch(model['Name'])
    if match is None:
        raise ValueError(f'docs/generate/model_zoo.py does not understand the name {model["Name"]}')
    return match.groupdict()


def title(model: Entry) -> str:
    """``cascade_mask_rcnn_dat_spp_3x_coco`` is Cascade Mask R-CNN, DAT-S++, 3x."""
    part = parse(model)
    size = part['size']
    backbone = {
        'gcvit': f'GC ViT-{size.upper()}',
        'dat': f'DAT-{size[0].upper()}{"++" * size.endswith("pp")}',
        'quadtree': f'QuadTree-{size}',
    }[part['family']]
    extra = EXTRAS.get(part['extra'], part['extra'])
    return ', '.join(filter(None, [HEADS.get(part['head']), backbone, extra]))


def display(collection: Entry) -> str:
    return collection['Name'].replace('GCViT', 'GC ViT')


def order(model: Entry) -> tuple[int, int, str]:
    """By head as above, then by size; a longer schedule after a shorter one."""
    head = parse(model)['head']
    return (list(HEADS).index(head) if head else -1, model['Metadata']['Parameters'], model['Name'])


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f'| {" | ".join(cells)} |' for cells in (heads, ['---'] * len(heads), *rows)]


def size(model: Entry, key: str, unit: str) -> str:
    """The counted figure, and in parentheses the published one."""
    metadata = model['Metadata']
    counted = metadata.get(key)
    published = metadata.get(f'Published {key} ({unit})')
    counted = f'{counted / {"M": 1e6, "G": 1e9}[unit]:.2f}' if counted else ''
    return f'{counted} ({published:g})' if published else counted


def tail(model: Entry, folder: str) -> list[str]:
    """The cells at the end of each row, with the config's path from ``folder``."""
    link = f'[config]({os.path.relpath(model["Config"], folder)})'
    return [size(model, 'Parameters', 'M'), size(model, 'FLOPs', 'G'), link]


def tables(collection: Entry, models: list[Entry], folder: str) -> Iterator[str]:
    """Lines of a collection's tables: one for each task, and one of its ablations."""
    name = display(collection)
    ablations = [model for model in models if 'Change' in model['Metadata']]
    regular = sorted((model for model in models if model not in ablations), key=order)
    for dataset, (heading, metrics) in TASKS.items():
        rows = []
        for model in regular:
            if parse(model)['dataset'] == dataset:
                found = results(model)
                figures = [f'{found[m]:.1f}' if m in found else '' for m in metrics.values()]
                rows.append([title(model), *figures, *tail(model, folder)])
        yield from ('', f'### {name}: {heading}', '')
        yield from table(['model', *metrics, 'params', 'FLOPs', 'config'], rows)
    if ablations:
        rows = [
            [m['Metadata']['Change'], m['Metadata'].get('Published Effect', ''), *tail(m, folder)]
            for m in ablations
        ]
        yield from ('', f'### {name}: ablations', '')
        yield from table(['change', 'published effect', 'params', 'FLOPs', 'config'], rows)


def spread(models: list[Entry], metric: str) -> str:
    """From the least to the greatest published value."""
    values = sorted(value for m in models if (value := results(m).get(metric)) is not None)
    ends = dict.fromkeys(f'{value:.1f}' for value in (*values[:1], *values[-1:]))
    return ' to '.join(ends)


def summary() -> str:
    """The table of README.md: one row for each collection."""
    metrics = {'top-1': 'Top 1 Accuracy', 'box AP': 'box AP', 'mIoU': 'mIoU'}
    rows = [
        [
            f'[{display(collection)}]({readme_beside(path)})',
            *(spread(models, metric) for metric in metrics.values()),
            str(len(models)),
        ]
        for path, metafile in metafiles().items()
        for collection, models in collections(metafile)
    ]
    heads = ['family', 'ImageNet-1K top-1', 'COCO box AP', 'ADE20K mIoU', 'configs']
    return '\n'.join(table(heads, rows))


def page() -> str:
    """Text of docs/model_zoo.md: the table of README.md, and where the weights are."""
    rows = [re.sub(r'\((.*)/README.md\)', rf'({TREE}/\1)', row) for row in summary().splitlines()]
    metadata = [c['Metadata'] for metafile in metafiles().values() for c in metafile['Collections']]
    weights = [f' [{m["Weights License"]}]({m["Weights Page"]}) |' for m in metadata]
    tails = [" authors' weights: license |", ' --- |', *weights]
    return HEADER + ''.join(f'{row}{tail}\n' for row, tail in zip(rows, tails, strict=True))


def readme_beside(metafile: str) -> str:
    return os.path.join(os.path.dirname(metafile), 'README.md')


def family_tables(metafile: str) -> str:
    """The tables of the README beside a metafile."""
    folder, pairs = os.path.dirname(metafile), collections(metafiles()[metafile])
    lines = [line for pair in pairs for line in tables(*pair, folder)]
    return '\n'.join(lines[1:])


def generated() -> dict[str, str]:
    """Path -> what stands in it between the two lines."""
    families = {readme_beside(path): family_tables(path) for path in metafiles()}
    return {'README.md': summary(), **families}


def with_generated(text: str, tables: str) -> str:
    """``text`` with ``tables`` between the two lines."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f'{before}{START}\n\n{tables}\n\n{END}{after}'


def main() -> None:
    PAGE.write_text(page())
    for path, tables in generated().items():
        readme = ROOT / path
        readme.write_text(with_generated(readme.read_text(), tables))
    print('wrote', PAGE.relative_to(ROOT), *generated())


if __name__ == '__main__':
    main()
