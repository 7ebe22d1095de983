"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
