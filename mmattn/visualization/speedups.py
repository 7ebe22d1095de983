"""How much faster and leaner one implementation is than another, and what each costs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def plot_speedups(
    cases: Sequence[str], ratios: Mapping[str, Sequence[float]], about: str
) -> Figure:
    """Horizontal bars of literal / compiled, a group for each case, on a logarithmic axis.

    Args:
        cases: names of what was measured.
        ratios: what was compared (forward, step, memory) -> one ratio a case; above 1 is better.
        about: machine and versions, under the title.

    Returns:
        A figure; ``savefig`` writes it.
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
    axes.set_xlabel('literal definition / compiled operator (right of 1: better)')
    axes.legend(
        fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ratios), frameon=False
    )
    figure.suptitle(f'Compiled operators against their literal definitions\n{about}', fontsize=10)
    return figure


def plot_steps(rows: Sequence[tuple[str, str, float | None, float | None]], about: str) -> Figure:
    """Horizontal bars of what a training step takes: time on the left, memory on the right.

    Args:
        rows: (what was measured, how it was run, milliseconds, MiB); None where memory did not suffice. Rows of
            one name stand together, each way to run it in a colour of its own.
        about: machine and versions, under the title.

    Returns:
        A figure; ``savefig`` writes it.
    """
    names = list(dict.fromkeys(name for name, *_ in rows))
    ways = list(dict.fromkeys(way for _, way, *_ in rows))
    figure = Figure(figsize=(13, 1.8 + 0.28 * len(rows)), dpi=100, layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    starts = {}  # of each name's bars
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
