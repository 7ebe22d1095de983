"""Published weights, read safely and fitted to a model."""

from .files import CheckpointError, read_checkpoint, read_state_dict, weight_sets, weights_of
from .fit import rename_on_load
from .loading import load_checkpoint, to_own_format
from .report import LoadReport

__all__ = [
    'CheckpointError',
    'LoadReport',
    'load_checkpoint',
    'read_checkpoint',
    'read_state_dict',
    'rename_on_load',
    'to_own_format',
    'weight_sets',
    'weights_of',
]
