"""Pictures of what models see and how they learn; arrays in, arrays and figures out."""

from .attention import attention_maps
from .capture import Block, Capture, capture
from .curves import plot_learning_curve, plot_scaling
from .detection import Instances, plot_predictions
from .speedups import plot_speedups

__all__ = [
    'Block',
    'Capture',
    'Instances',
    'attention_maps',
    'capture',
    'plot_learning_curve',
    'plot_predictions',
    'plot_scaling',
    'plot_speedups',
]
