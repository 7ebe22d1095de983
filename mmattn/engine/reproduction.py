"""Tables of the papers: their rows, and what a test of a row says about its published figures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mmengine.config import Config

from .metafile import METAFILE


class Metric(NamedTuple):
    """A metric of a test: its name there, the factor to a percentage, and decimals afterwards."""

    key: str
    factor: int
    decimals: int


# By the metafiles' names. mmdet rounds to 0.1 and mmseg to 0.01 percent; mmpretrain's float32 has
# noise after the third decimal, where an image of ImageNet's 50,000 counts 0.002.
METRICS = {
    'Top 1 Accuracy': Metric('accuracy/top1', 1, 3),
    'Top 5 Accuracy': Metric('accuracy/top5', 1, 3),
    'box AP': Metric('coco/bbox_mAP', 100, 1),
    'box AP50': Metric('coco/bbox_mAP_50', 100, 1),
    'box AP75': Metric('coco/bbox_mAP_75', 100, 1),
    'mask AP': Metric('coco/segm_mAP', 100, 1),
    'mask AP50': Metric('coco/segm_mAP_50', 100, 1),
    'mask AP75': Metric('coco/segm_mAP_75', 100, 1),
    'mIoU': Metric('mIoU', 1, 2),
    'mIoU(ms+flip)': Metric('mIoU', 1, 2),
}
MULTI_SCALE = ('mIoU(ms+flip)',)


@dataclass(frozen=True)
class Row:
    """A model of a table, and how it is tested.

    Attributes:
        config: the config file.
        checkpoint: address of the published weights, or None.
        multi_scale: test at several scales and mirrored.
        options: overrides of the config.
        published: the figures, with the decimals that were published, by the metafile's names.
    """

    config: Path
    checkpoint: str | None
    multi_scale: bool
    options: dict[str, str]
    published: dict[str, Decimal]


@dataclass(frozen=True)
class Table:
    """A table of a paper: its title, and its rows by name."""

    title: str
    rows: dict[str, Row]


# --------------------------------------------------------------------------------------- reading


def read_tables(path: str | Path) -> dict[str, Table]:
    """Read a file of tables such as ``configs/tables.yml``, and the metafiles in folders beside it.

    Args:
        path: the file. Configs in the metafiles are relative to the folder above the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row names a model or a data set that does not exist, or has unknown keys.
    """
    path = Path(path).resolve()
    content = yaml.safe_load(path.read_text(encoding='utf-8'))
    datasets = content.get('datasets', {})
    models = _read_models(path.parent)
    tables = {}
    for name, table in content['tables'].items():
        rows = {}
        for row, settings in table['rows'].items():
            try:
                rows[row] = _row(row, settings or {}, models, datasets, path.parent.parent)
            except (KeyError, ValueError) as error:
                raise ValueError(f'{path}: table {name}, row {row}: {error}') from error
        tables[name] = Table(table['title'], rows)
    return tables


def _read_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Models of all metafiles by name, with numbers as text: 83.40 has two decimals."""
    models = {}
    for path in sorted(folder.glob(f'*/{METAFILE}')):
        content = yaml.load(path.read_text(encoding='utf-8'), yaml.BaseLoader)
        models.update({model['Name']: model for model in content['Models']})
    return models


def _row(
    name: str,
    settings: Mapping[str, Any],
    models: Mapping[str, dict[str, Any]],
    datasets: Mapping[str, dict[str, str]],
    root: Path,
) -> Row:
    allowed = {'model', 'weights', 'dataset', 'multi_scale'}
    if unknown := settings.keys() - allowed:
        raise ValueError(f'unknown {sorted(unknown)}; a row may have {sorted(allowed)}')
    model = models.get(settings.get('model', name))
    if model is None:
        raise ValueError(f'no {METAFILE} has the model {settings.get("model", name)}')
    dataset = settings.get('dataset')
    if dataset is not None and dataset not in datasets:
        raise ValueError(f'dataset must be one of {", ".join(datasets)}, got {dataset}')
    multi_scale = settings.get('multi_scale', False)
    weights = _weights(model, settings.get('weights'))
    results = weights.get('Results', [])
    tested_on = dataset or next((result['Dataset'] for result in results), None)
    published = {
        metric: Decimal(result['Metrics'][metric])
        for metric in METRICS
        for result in results
        if result['Dataset'] == tested_on and metric in result['Metrics']
        if (metric in MULTI_SCALE) == multi_scale
    }
    options = datasets[dataset] if dataset else {}
    return Row(root / model['Config'], weights.get('Weights'), multi_scale, options, published)


def _weights(model: Mapping[str, Any], note: str | None) -> Mapping[str, Any]:
    """Address and results of a model's weights, or of its other weights with this note."""
    if note is None:
        return model
    for other in model.get('Other Weights', []):
        if note in other['Note']:
            return {'Weights': other['URL'], 'Results': other.get('Results', [])}
    return {}


# -------------------------------------------------------------------------------------- testing


def fingerprint(row: Row, checkpoint: str, options: Sequence[str]) -> str:
    """Hash what a test depends on: the config with the place of its data, options, weights.

    Args:
        row: what is tested.
        checkpoint: a path or an address; a file counts by its size and time of change.
        options: further overrides of the config.
    """
    what = [Config.fromfile(row.config).to_dict(), row.options, row.multi_scale]
    what += [*options, checkpoint]
    path = Path(checkpoint)
    if path.is_file():
        what += [path.stat().st_size, path.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def measured_figures(row: Row, report: Mapping[str, Any]) -> dict[str, Decimal]:
    """Figures of a test by the metafile's names.

    Args:
        row: what was tested.
        report: metrics that mmengine wrote.

    Raises:
        ValueError: a published figure was not measured, or nothing known was.
    """
    figures = {
        name: (Decimal(report[key]) * factor).quantize(Decimal(1).scaleb(-decimals))
        for name, (key, factor, decimals) in METRICS.items()
        if (name in MULTI_SCALE) == row.multi_scale and math.isfinite(report.get(key, math.nan))
    }
    missing = row.published.keys() - figures.keys()
    if missing or not figures:
        raise ValueError(
            f'the test reported no {", ".join(sorted(missing)) or "known metric"} (a detector that '
            f'finds nothing at all has none), but {", ".join(report) or "nothing"}'
        )
    return figures


# ------------------------------------------------------------------------------------- comparing


def verdict(published: Decimal, measured: Decimal) -> str:
    """'within the rounding', 'higher' or 'lower'.

    Both numbers were rounded to their last decimals. They are within the rounding if one number can
    have been rounded to both.
    """
    difference = measured - published
    if abs(difference) < (_last_place(published) + _last_place(measured)) / 2:
        return 'within the rounding'
    return 'higher' if difference > 0 else 'lower'


def _last_place(number: Decimal) -> Decimal:
    return Decimal(1).scaleb(int(number.as_tuple().exponent))


# ------------------------------------------------------------------------------------- reporting


def compare(table: Table, outcomes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each row and published metric; where none is published, for all measured ones.

    Args:
        table: the table.
        outcomes: of the rows that were tested, by name: ``measured`` figures as text by metric, or
            the ``reason`` of a failure.

    Returns:
        Mappings with the keys row, metric, published, measured, difference, verdict; numbers are
        text with their decimals, or None.
    """
    lines = []
    for name, row in table.rows.items():
        outcome = outcomes.get(name, {})
        measured = outcome.get('measured', {})
        if 'reason' in outcome:
            state = 'failed'
        else:
            state = 'not tested' if row.checkpoint else 'not tested: train it first'
        for metric in row.published or measured or ['']:
            line = dict(row=name, metric=metric, published=None, measured=None, difference=None)
            line['verdict'] = state
            if metric in row.published:
                line['published'] = str(row.published[metric])
            if metric in measured:
                found = Decimal(measured[metric])
                line.update(measured=str(found), verdict='no published figure')
                if metric in row.published:
                    line['difference'] = f'{found - row.published[metric]:+}'
                    line['verdict'] = verdict(row.published[metric], found)
            lines.append(line)
    return lines


def to_markdown(table: Table, outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, reasons of failures, and what was tested."""
    heads = ('row', 'metric', 'published', 'measured', 'difference', 'verdict')
    lines = [
        f'# {table.title}',
        '',
        f'| {" | ".join(heads)} |',
        '| --- | --- | --: | --: | --: | --- |',
    ]
    for line in compare(table, outcomes):
        lines.append(f'| {" | ".join(line[head] or "" for head in heads)} |')
    lines += ['', 'Within the rounding: one number can have been rounded to both figures.', '']
    for name, outcome in outcomes.items():
        reason = f': failed: {outcome["reason"]}' if 'reason' in outcome else ''
        lines.append(f'- {name}: {outcome["checkpoint"]}{reason}')
    return '\n'.join(lines) + '\n'


def to_json(table: Table, outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """The table's lines, and what was tested."""
    content = dict(title=table.title, lines=compare(table, outcomes), tests=dict(outcomes))
    return json.dumps(content, indent=2) + '\n'
