"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

Curve = tuple[Sequence[float], Sequence[float]]


def plot_learning_curve(
    losses: Mapping[str, Curve], metrics: Mapping[str, Curve], title: str
) -> Figure:
    """Losses above, metrics below, over the same epochs.

    Args:
        losses: name -> (epochs, values), on a logarithmic axis; the first is drawn as the main one.
        metrics: name -> (epochs, values in [0, 1]); the last value of each is written beside it.
        title: what was trained on what.
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


def plot_scaling(
    time: Mapping[str, Curve],
    memory: Mapping[str, Curve],
    error: Mapping[str, Curve],
    title: str,
    note: str,
) -> Figure:
    """What an attention costs on maps of growing size, and how near it comes to full attention.

    Args:
        time: name -> (tokens, seconds), drawn on logarithmic axes beside a line of slope 1 and one of slope 2.
        memory: name -> (tokens, bytes), likewise; the same names have the same colours.
        error: name -> (kept keys, error relative to full attention), on logarithmic axes too.
        title: what was measured.
        note: the setting, below the panels.
    """
    figure = Figure(figsize=(13, 5), dpi=90, layout='constrained')
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(note, fontsize=9, color='0.35')
    left, middle, right = figure.subplots(1, 3)
    names = _plot_costs(left, middle, time, memory, 'tokens of the map')
    for i, (name, (keys, errors)) in enumerate(error.items()):
        right.plot(keys, errors, marker='o', label=name, color=f'C{i + len(names)}')
    right.set(xscale='log', yscale='log')
    right.set(xlabel='keys kept at each level, K', ylabel='error relative to full attention')
    ticks = sorted({key for keys, _ in error.values() for key in keys})
    right.set_xticks(ticks, [str(key) for key in ticks])
    right.xaxis.set_minor_locator(NullLocator())
    right.legend(frameon=False, fontsize=9)
    right.grid(alpha=0.3)
    return figure


def plot_growth(time: Mapping[str, Curve], memory: Mapping[str, Curve], note: str) -> Figure:
    """What a training step costs on images of growing size.

    Args:
        time: name -> (pixels, seconds), drawn on logarithmic axes beside a line of slope 1 and one of slope 2.
        memory: name -> (pixels, bytes), likewise; the same names have the same colours.
        note: machine and versions, below the panels.
    """
    figure = Figure(figsize=(11, 5), dpi=90, layout='constrained')
    figure.suptitle('A training step on one square image of growing side', fontsize=12)
    figure.supxlabel(note, fontsize=9, color='0.35')
    _plot_costs(*figure.subplots(1, 2), time, memory, 'pixels')
    return figure


def _plot_costs(left, right, time, memory, unit: str) -> list[str]:
    """Time and memory over a number that is shown as a square; returns the names in the order of their colours."""
    names = list(dict.fromkeys([*time, *memory]))
    for axes, curves, label, scale in (
        (left, time, 'time of a training step (s)', 1.0),
        (right, memory, 'peak memory of a training step (MiB)', 2.0**20),
    ):
        ticks = sorted({tokens for xs, _ in curves.values() for tokens in xs})
        for name, (tokens, values) in curves.items():
            scaled = [value / scale for value in values]
            axes.plot(tokens, scaled, marker='o', label=name, color=f'C{names.index(name)}')
        first = min(values[0] for _, values in curves.values()) / scale
        for slope, style in ((1, ':'), (2, '--')):
            guide = [first * (x / ticks[0]) ** slope for x in ticks]
            axes.plot(ticks, guide, style, color='0.6', label=f'slope {slope}', zorder=0)
        axes.set(xscale='log', yscale='log', xlabel=unit, ylabel=label)
        axes.set_ylim(first / 2, 2 * max(max(values) for _, values in curves.values()) / scale)
        axes.set_xticks(ticks, [f'{round(x**0.5)}²' for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=9)
    return names


def plot_memory(records: Mapping[str, Mapping[str, Sequence]], warm_up: int, title: str) -> Figure:
    """Memory after each iteration of a training, one panel for each model.

    Args:
        records: name -> ``allocated`` and ``resident``, bytes after each iteration; and ``size``, the (height,
            width) of its images, of which the area is drawn below.
        warm_up: iterations in which memory may grow, shaded.
        title: what was trained.
    """
    figure = Figure(figsize=(4 * len(records) + 1, 4.5), dpi=90, layout='constrained')
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2, len(records), sharex=True, squeeze=False, height_ratios=(3, 1))
    for (upper, lower), (name, record) in zip(panels.T, records.items(), strict=True):
        iterations = range(1, len(record['size']) + 1)
        for i, kind in enumerate(('resident', 'allocated')):
            values = [value / 2**20 for value in record[kind]]
            upper.plot(iterations, values, color=f'C{i}', label=f'{kind} (last: {values[-1]:.0f})')
        upper.set(title=name, ylim=(0, None))
        upper.legend(loc='lower right', frameon=False, fontsize=9)
        areas = [height * width / 1000 for height, width in record['size']]
        lower.plot(iterations, areas, '.', markersize=2, color='0.5')
        lower.set(xlabel='iteration', ylim=(0, None))
        for axes in (upper, lower):
            axes.axvspan(0, warm_up, color='0.93', zorder=0)
            axes.grid(alpha=0.3)
            axes.set_xlim(0, len(areas))
    panels[0, 0].set_ylabel('memory of the process (MiB)')
    panels[1, 0].set_ylabel('kilopixels')
    return figure
