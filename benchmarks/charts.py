"""Charts of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

Curve = tuple[Sequence[float], Sequence[float]]


def plot_scaling(
    time: Mapping[str, Curve],
    memory: Mapping[str, Curve],
    error: Mapping[str, Curve],
    title: str,
    note: str,
) -> Figure:
    """Cost of attention modules on maps of growing size, and their error against full attention.

    Args:
        time: name -> (tokens, seconds), on logarithmic axes beside lines of slope 1 and 2.
        memory: name -> (tokens, bytes), likewise; the same names have the same colors.
        error: name -> (kept keys, error relative to full attention), on logarithmic axes too.
        title: of the chart.
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
    """Cost of a training step on images of growing size.

    Args:
        time: name -> (pixels, seconds), on logarithmic axes beside lines of slope 1 and 2.
        memory: name -> (pixels, bytes), likewise; the same names have the same colors.
        note: machine and versions, below the panels.
    """
    figure = Figure(figsize=(11, 5), dpi=90, layout='constrained')
    figure.suptitle('A training step on one square image of growing side', fontsize=12)
    figure.supxlabel(note, fontsize=9, color='0.35')
    left, right = figure.subplots(1, 2)
    _plot_costs(left, right, time, memory, 'pixels')
    return figure


def _plot_costs(
    left: Axes, right: Axes, time: Mapping[str, Curve], memory: Mapping[str, Curve], unit: str
) -> list[str]:
    """Draw time and memory over an area, labeled by its side; return the names by color."""
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
        records: name -> ``allocated`` and ``resident``, bytes after each iteration; and ``size``,
            the (height, width) of its images, whose area is drawn below.
        warm_up: iterations in which memory may grow, shaded.
        title: of the chart.
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


def plot_speedups(
    cases: Sequence[str], ratios: Mapping[str, Sequence[float]], about: str
) -> Figure:
    """Horizontal bars of reference / compiled, a group for each case, on a logarithmic axis.

    Args:
        cases: their names.
        ratios: quantity (forward, step, memory) -> one ratio a case; above 1 is better.
        about: machine and versions, under the title.
    """
    figure = Figure(figsize=(10, 1.6 + 0.55 * len(cases)), dpi=110, layout='constrained')
    axes = figure.add_subplot()
    height = 0.8 / len(ratios)
    for i, (name, values) in enumerate(ratios.items()):
        places = [n + (i - (len(ratios) - 1) / 2) * height for n in range(len(cases))]
        bars = axes.barh(places, [value - 1 for value in values], height, left=1, label=name)
        axes.bar_label(bars, [f'{value:.1f}' for value in values], padding=3, fontsize=7)
    axes.axvline(1, color='black', linewidth=1)
    axes.set_xscale('log')
    axes.set_xticks([1, 3, 10, 30, 100], ['1x', '3x', '10x', '30x', '100x'])
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_xlabel('reference / compiled operator (right of 1: better)')
    axes.legend(
        fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ratios), frameon=False
    )
    figure.suptitle(f'Compiled operators against their references\n{about}', fontsize=10)
    return figure


def plot_steps(rows: Sequence[tuple[str, str, float | None, float | None]], about: str) -> Figure:
    """Horizontal bars of a training step: time on the left, memory on the right.

    Args:
        rows: (name, way to run it, milliseconds, MiB); None where it ran out of memory. Rows of one
            name stand together; each way to run it has its color.
        about: machine and versions, under the title.
    """
    names = list(dict.fromkeys(name for name, *_ in rows))
    ways = list(dict.fromkeys(way for _, way, *_ in rows))
    figure = Figure(figsize=(13, 1.8 + 0.28 * len(rows)), dpi=100, layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    starts: dict[str, float] = {}  # position of each name's first bar
    for place, (name, *_) in enumerate(rows):
        starts.setdefault(name, place + 0.7 * len(starts))
    for axes, column, label in ((panels[0], 2, 'ms'), (panels[1], 3, 'MiB')):
        for i, way in enumerate(ways):
            drawn = [
                (starts[row[0]] + [r for r in rows if r[0] == row[0]].index(row), row[column] or 0)
                for row in rows
                if row[1] == way
            ]
            bars = axes.barh(*zip(*drawn, strict=True), 0.9, label=way, color=f'C{i}')
            texts = [f'{value:.0f}' if value else 'out of memory' for _, value in drawn]
            axes.bar_label(bars, texts, padding=3, fontsize=7)
        axes.set_xlabel(f'a training step, {label} (less is better)')
        axes.margins(x=0.12, y=0.01)
        axes.grid(axis='x', alpha=0.3)
    counts = [sum(row[0] == name for row in rows) for name in names]
    middles = [starts[name] + (n - 1) / 2 for name, n in zip(names, counts, strict=True)]
    panels[0].set_yticks(middles, names, fontsize=8)
    panels[0].invert_yaxis()
    if len(ways) > 1:
        panels[0].legend(
            fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ways), frameon=False
        )
    figure.suptitle(f'Time and memory of a training step\n{about}', fontsize=10)
    return figure
