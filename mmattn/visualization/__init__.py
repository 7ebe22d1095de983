"""Pictures of what models see and how they learn; arrays in, arrays and figures out."""

from .curves import plot_learning_curve, plot_memory, plot_scaling
from .detection import Instances, plot_predictions
from .speedups import plot_speedups

__all__ = [
    'Instances',
    'plot_learning_curve',
    'plot_memory',
    'plot_predictions',
    'plot_scaling',
    'plot_speedups',
]
