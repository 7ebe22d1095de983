"""How much faster and leaner one implementation is than another."""

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
