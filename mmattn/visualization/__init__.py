"""Pictures of what models see and how they learn; arrays in, arrays and figures out."""

from .curves import plot_growth, plot_learning_curve, plot_scaling
from .detection import Instances, plot_predictions
from .speedups import plot_speedups, plot_steps

__all__ = [
    'Instances',
    'plot_growth',
    'plot_learning_curve',
    'plot_predictions',
    'plot_scaling',
    'plot_speedups',
    'plot_steps',
]
