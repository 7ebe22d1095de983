"""Write docs/model_zoo.md, and the README's short table of models, from the metafiles.

python docs/generate/model_zoo.py
"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs/model_zoo.md'
README = ROOT / 'README.md'
# The README's table lies between these two lines.
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

Every model that has a config. This page is made from the metafiles, `configs/*/metafile.yml`, which
`mim search mmattn` shows as well.

**Results are the publications'**; the configs aim at them. No training of that length was run here. Where there
is none, none was published: the config is there for comparison. GC ViT-L at 384 and 512 and DINO with GC ViT-L start
from ImageNet-21K weights.

**params** (millions) and **FLOPs** (billions of multiply-adds) are counted here, on the whole model, with what
was published in parentheses. Classifiers are counted with 1000 classes at the size that they are trained at,
224 x 224 if none is named; detectors at 1280 x 800 with 1000 proposals and 100 masks; segmentors at 512 x 512
without the auxiliary head. FLOPs of DINO are not counted.

Config paths are those below `configs/`. In a project of yours, `_base_ = 'mmattn::PATH'` inherits one
([In your own project](your_project.md)). **Weights** are the authors', on the page that each section names, and
[load as they are](checkpoints.md).
"""


def metafiles():
    """The parsed metafiles that model-index.yml names."""
    paths = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    return [yaml.safe_load((ROOT / path).read_text()) for path in paths]


def results(model):
    """Metric -> value."""
    return {k: v for result in model.get('Results', []) for k, v in result['Metrics'].items()}


def parse(model):
    """The parts of a model's name."""
    match = NAME.fullmatch(model['Name'])
    if match is None:
        raise ValueError(f'docs/generate/model_zoo.py does not understand the name {model["Name"]}')
    return match.groupdict()


def title(model):
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


def display(collection):
    return collection['Name'].replace('GCViT', 'GC ViT')


def is_ablation(model):
    return '/ablations/' in model['Config']


def order(model):
    """By head as above, then by size; a longer schedule after a shorter one."""
    head = parse(model)['head']
    return (list(HEADS).index(head) if head else -1, model['Metadata']['Parameters'], model['Name'])


def table(heads, rows):
    """Lines of a Markdown table."""
    return [f'| {" | ".join(cells)} |' for cells in (heads, ['---'] * len(heads), *rows)]


def size(model, key, unit):
    """What was counted, and in parentheses what was published."""
    metadata = model['Metadata']
    counted = metadata.get(key)
    published = metadata.get(f'Published {key} ({unit})')
    counted = f'{counted / {"M": 1e6, "G": 1e9}[unit]:.2f}' if counted else ''
    return f'{counted} ({published:g})' if published else counted


def tail(model):
    """The cells that all tables end with."""
    path = model['Config'].removeprefix('configs/')
    return [size(model, 'Parameters', 'M'), size(model, 'FLOPs', 'G'), f'`{path}`']


def section(collection, models):
    """Lines about the models of one collection."""
    metadata, paper = collection['Metadata'], collection['Paper']
    name = display(collection)
    yield from ('', f'## {name}', '')
    yield f'[{paper["Title"]}]({paper["URL"]}).'
    yield f'Weights: <{metadata["Weights Page"]}>; licence: {metadata["Weights License"]}.'
    regular = sorted((m for m in models if not is_ablation(m)), key=order)
    for dataset, (heading, metrics) in TASKS.items():
        rows = []
        for model in regular:
            if parse(model)['dataset'] == dataset:
                found = results(model)
                figures = [f'{found[m]:.1f}' if m in found else '' for m in metrics.values()]
                rows.append([title(model), *figures, *tail(model)])
        yield from ('', f'### {name}: {heading}', '')
        yield from table(['model', *metrics, 'params', 'FLOPs', 'config'], rows)
    ablations = [m for m in models if is_ablation(m)]
    if ablations:
        rows = [[first_comment(model), *tail(model)] for model in ablations]
        yield from ('', f'### {name}: ablations', '')
        yield from table(['what differs', 'params', 'FLOPs', 'config'], rows)


def first_comment(model):
    return (ROOT / model['Config']).read_text().splitlines()[0].removeprefix('# ')


def collections():
    """Each collection with its models."""
    for metafile in metafiles():
        for collection in metafile['Collections']:
            name = collection['Name']
            yield collection, [m for m in metafile['Models'] if m['In Collection'] == name]


def page():
    """Text of docs/model_zoo.md."""
    lines = [line for part in collections() for line in section(*part)]
    return HEADER + '\n'.join(lines) + '\n'


def spread(models, metric):
    """From the least to the greatest published value."""
    values = sorted(value for m in models if (value := results(m).get(metric)) is not None)
    ends = dict.fromkeys(f'{value:.1f}' for value in (*values[:1], *values[-1:]))
    return ' to '.join(ends)


def summary():
    """The README's table: a line for each collection."""
    metrics = {'top-1': 'Top 1 Accuracy', 'box AP': 'box AP', 'mIoU': 'mIoU'}
    rows = [
        [
            f'[{display(collection)}]({collection["Paper"]["URL"]})',
            *(spread(models, metric) for metric in metrics.values()),
            str(len(models)),
        ]
        for collection, models in collections()
    ]
    heads = ['family', 'ImageNet-1K top-1', 'COCO box AP', 'ADE20K mIoU', 'configs']
    return '\n'.join(table(heads, rows))


def with_summary(readme):
    """The README's text with the table as it should be."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f'{before}{START}\n\n{summary()}\n\n{END}{after}'


def main():
    PAGE.write_text(page())
    README.write_text(with_summary(README.read_text()))
    print(f'wrote {PAGE.relative_to(ROOT)} and the table of {README.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
