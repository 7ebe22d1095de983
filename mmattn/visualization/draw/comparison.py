"""Chart of published and measured figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def plot_comparison(title: str, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw published and measured figures, and their differences.

    Args:
        title: of the chart.
        lines: from the top; each has the names ``row`` and ``metric``, numbers as text for
            ``measured`` and, where there are any, ``published`` and ``difference``; ``verdict``.
    """
    figure = Figure(figsize=(11, 1.8 + 0.35 * len(lines)), dpi=100, layout='constrained')
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = range(len(lines))
    both = [place for place in places if lines[place]['difference']]
    values = [[float(lines[place][key]) for place in both] for key in ('published', 'difference')]
    left.plot(values[0], both, 'o', markersize=9, fillstyle='none', color='C0', label='published')
    measured = [float(line['measured']) for line in lines]
    left.plot(measured, places, '.', color='C1', label='measured')
    within = [lines[place]['verdict'] == 'within the rounding' for place in both]
    bars = right.barh(both, values[1], 0.6, color=['C2' if good else 'C3' for good in within])
    right.bar_label(bars, [lines[place]['difference'] for place in both], padding=3, fontsize=7)
    right.axvline(0, color='black', linewidth=1)
    left.set_yticks(places, [f'{line["row"]}, {line["metric"]}' for line in lines], fontsize=8)
    left.set_ylim(len(lines) - 0.4, -0.6)
    left.set_xlabel('percent')
    right.set_xlabel('difference (green: within the rounding)')
    widest = max([abs(value) for value in values[1]], default=0) or 1
    right.set_xlim(-1.4 * widest, 1.4 * widest)
    left.legend(fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    for axes in (left, right):
        axes.grid(axis='x', alpha=0.3)
    return figure
