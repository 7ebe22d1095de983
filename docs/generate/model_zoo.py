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
    rf'(?:(?P<head>{"|".join(HEADS)})_)?(?P<family>gcvit|dat|quadtree|pvtv2)_(?P<size>[a-z]+\d?)'
    r'(?:_(?P<pretraining>21k))?(?:_(?P<extra>384|512|1x|3x|12e|36e))?'
    r'_(?P<dataset>imagenet|coco|ade20k)'
)
EXTRAS = {'384': '384 x 384', '512': '512 x 512', '12e': '12 epochs', '36e': '36 epochs'}
# Dataset -> title, and the columns that hold results: metric -> heading.
TASKS = {
    'imagenet': (
        'classifiers, ImageNet-1K',
        {'Top 1 Accuracy': 'top-1', 'Top 5 Accuracy': 'top-5'},
    ),
    'coco': (
        'detectors, COCO',
        {
            'box AP': 'box AP',
            'box AP50': 'AP50',
            'box AP75': 'AP75',
            'mask AP': 'mask AP',
            'mask AP50': 'AP50',
            'mask AP75': 'AP75',
        },
    ),
    'ade20k': ('segmentors, ADE20K', {'mIoU': 'mIoU', 'mIoU(ms+flip)': 'multi-scale'}),
}
HEADER = """\
# Model zoo

Each family's page on GitHub, linked below, has a table of all its models with their configs, made
from `configs/*/metafile.yml`. `mim search mmattn` lists them, too.

**Results are published ones**, and what the configs aim at; nothing was trained to that length
here. A model without results has none that we could read, or is there for comparison. GC ViT-L at
384 and 512 and DINO with GC ViT-L start from ImageNet-21K weights.

**params** (millions) and **FLOPs** (billions of multiply-adds) are counted here on the whole model;
published figures follow in parentheses, starred if counted otherwise. Classifiers have 1000 classes
and their training size, 224 x 224 unless named; detectors are counted at 1280 x 800 with 1000
proposals and 100 masks, segmentors at 512 x 512 without the auxiliary head. DINO's FLOPs are not
counted.

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
        'pvtv2': f'PVT v2-{size}',
    }[part['family']]
    pretraining = part['pretraining'] and 'ImageNet-21K'
    extra = EXTRAS.get(part['extra'], part['extra'])
    return ', '.join(filter(None, [HEADS.get(part['head']), backbone, pretraining, extra]))


def display(collection: Entry) -> str:
    return collection['Name'].replace('GCViT', 'GC ViT')


def order(model: Entry) -> tuple[int, int, str]:
    """By head as above, then by size; a longer schedule after a shorter one."""
    part = parse(model)
    head = list(HEADS).index(part['head']) if part['head'] else -1
    name = model['Name'].replace('21k', '~')  # after the same size without it
    return head, model['Metadata']['Parameters'], name


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f'| {" | ".join(cells)} |' for cells in (heads, ['---'] * len(heads), *rows)]


def size(model: Entry, key: str, unit: str) -> str:
    """The counted figure, and in parentheses the published one; a star if counted otherwise."""
    metadata = model['Metadata']
    counted = metadata.get(key)
    published = metadata.get(f'Published {key} ({unit})')
    counted = f'{counted / {"M": 1e6, "G": 1e9}[unit]:.2f}' if counted else ''
    star = '\\*' * bool(otherwise(model)) if key == 'FLOPs' else ''
    return f'{counted} ({published:g}{star})' if published else counted


def otherwise(model: Entry) -> str:
    """Way of counting of the published FLOPs, if it is not ours."""
    keys = ('Published FLOPs Input', 'Published FLOPs Count')
    notes = [model['Metadata'].get(key) for key in keys]
    return ', '.join(filter(None, notes))


def sources(model: Entry) -> str:
    """Sources of the results and of the published counts."""
    found = [result['Source'] for result in model.get('Results', [])]
    found += model['Metadata'].get('Published Counts From', '').split('; ')
    return '; '.join(dict.fromkeys(filter(None, found)))


def baseline(model: Entry) -> str:
    """Results of the model that it is compared with."""
    return ' / '.join(f'{value:.1f}' for value in results(model.get('Baseline', {})).values())


def tail(model: Entry, folder: str) -> list[str]:
    """The cells at the end of each row, with the config's path from ``folder``."""
    weights = f'[weights]({model["Weights"]})' if 'Weights' in model else ''
    link = f'[config]({os.path.relpath(model["Config"], folder)})'
    counts = [size(model, 'Parameters', 'M'), size(model, 'FLOPs', 'G')]
    return [*counts, sources(model), weights, link]


TAIL = ['params', 'FLOPs', 'sources', 'weights', 'config']


def regular(models: list[Entry]) -> list[Entry]:
    """Models that are no ablation, in the tables' order."""
    return sorted((m for m in models if 'Change' not in m['Metadata']), key=order)


def tables(collection: Entry, models: list[Entry], folder: str) -> Iterator[str]:
    """Lines of a collection's tables: one a task, one of ablations, one of other weights."""
    name = display(collection)
    for dataset, (heading, metrics) in TASKS.items():
        of_task = [m for m in regular(models) if parse(m)['dataset'] == dataset]
        if of_task:
            yield from ('', f'### {name}: {heading}', '')
            yield from task_table(of_task, metrics, folder)
    ablations = [model for model in models if 'Change' in model['Metadata']]
    if ablations:
        rows = [[m['Metadata']['Change'], effect(m), *tail(m, folder)] for m in ablations]
        yield from ('', f'### {name}: ablations', '')
        yield from table(['change', 'published effect', *TAIL], rows)
    others = [
        (entry, other)
        for entry in (collection, *regular(models), *ablations)
        for other in entry.get('Other Weights', [])
    ]
    if others:
        yield from ('', f'### {name}: other weights', '')
        yield from table(['model', 'weights', 'results'], [other_row(*pair) for pair in others])


def effect(model: Entry) -> str:
    """Published effect of an ablation."""
    figures = ', '.join(f'{value:.1f} {metric}' for metric, value in results(model).items())
    return model['Metadata'].get('Published Effect', figures)


def other_row(model: Entry, other: Entry) -> list[str]:
    """A row for a file that is not the one behind the model's results."""
    told = '; '.join(
        f'{r["Dataset"]}: {", ".join(f"{metric} {v}" for metric, v in r["Metrics"].items())}'
        f' ({r["Source"]})'
        for r in other.get('Results', [])
    )
    name = title(model) if 'Config' in model else display(model)  # a collection's
    return [name, f'[{other["Note"]}]({other["URL"]})', told]


def task_table(models: list[Entry], metrics: dict[str, str], folder: str) -> Iterator[str]:
    """Lines of the table of one task; metrics that none of the models has are left out."""
    shown = [metric for metric in metrics if any(metric in results(m) for m in models)]
    compared = any('Baseline' in m for m in models)
    rows = []
    for model in models:
        found = results(model)
        figures = [f'{found[m]:.1f}' if m in found else '' for m in shown]
        rows.append([title(model), *figures, *[baseline(model)] * compared, *tail(model, folder)])
    heads = ['model', *(metrics[m] for m in shown), *['PVT v2'] * compared, *TAIL]
    yield from table(heads, rows)
    notes: dict[str, list[str]] = {}
    for model in models:
        if note := otherwise(model):
            notes.setdefault(note, []).append(f'{model["Metadata"]["Published FLOPs (G)"]:g}')
    if notes:
        told = '; '.join(f'{", ".join(figures)}: {note}' for note, figures in notes.items())
        yield from ('', f'\\* Published FLOPs {told}.')


def spread(models: list[Entry], metric: str) -> str:
    """From the least to the greatest published value."""
    values = sorted(value for m in models if (value := results(m).get(metric)) is not None)
    ends = dict.fromkeys(f'{value:.1f}' for value in (*values[:1], *values[-1:]))
    return ' to '.join(ends)


def families() -> Iterator[tuple[str, Entry, list[Entry]]]:
    """Metafile, collection and models, without the collections of baselines."""
    for path, metafile in metafiles().items():
        for collection, models in collections(metafile):
            if regular(models):
                yield path, collection, models


def summary() -> str:
    """The table of README.md: one row for each collection."""
    metrics = {'top-1': 'Top 1 Accuracy', 'box AP': 'box AP', 'mIoU': 'mIoU'}
    rows = [
        [
            f'[{display(collection)}]({readme_beside(path)})',
            *(spread(models, metric) for metric in metrics.values()),
            str(len(models)),
        ]
        for path, collection, models in families()
    ]
    heads = ['family', 'ImageNet-1K top-1', 'COCO box AP', 'ADE20K mIoU', 'configs']
    return '\n'.join(table(heads, rows))


def page() -> str:
    """Text of docs/model_zoo.md: the table of README.md, and where the weights are."""
    rows = [re.sub(r'\((.*)/README.md\)', rf'({TREE}/\1)', row) for row in summary().splitlines()]
    metadata = [collection['Metadata'] for _, collection, _ in families()]
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
    readmes = {readme_beside(path): family_tables(path) for path in metafiles()}
    return {'README.md': summary(), **readmes}


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
