"""Published weights, read safely and fitted to a model."""

from .download import find_file
from .errors import CheckpointError
from .files import check_finite, read_checkpoint, read_state_dict, weight_sets, weights_of
from .fit import rename_on_load
from .loading import load_checkpoint, to_own_format
from .report import LoadReport

__all__ = [
    'CheckpointError',
    'LoadReport',
    'check_finite',
    'find_file',
    'load_checkpoint',
    'read_checkpoint',
    'read_state_dict',
    'rename_on_load',
    'to_own_format',
    'weight_sets',
    'weights_of',
]
