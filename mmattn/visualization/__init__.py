"""Attention, features and predictions of a model as arrays and as figures.

:func:`capture` records a forward pass and needs torch alone; :func:`attention_maps` and the
functions of one family turn the record into arrays; ``plot_*`` draw them. :class:`Subject` builds
all of that from a config, a checkpoint and an image file. Modules other than ``capture`` are
imported at first use, as most of them need matplotlib.
"""

from importlib import import_module
from typing import Any

# Imported here, as the submodule would hide the function of the same name.
from .capture import Block as Block
from .capture import Capture as Capture
from .capture import capture as capture

_NAMES = {
    'attention': ('attention_maps',),
    'deformable': ('sampling_points', 'top_keys'),
    'detection': ('Instances', 'plot_predictions'),
    'draw.deformable': ('plot_sampling_points', 'plot_top_keys'),
    'draw.maps': ('plot_features', 'plot_grad_cam', 'plot_receptive_field'),
    'draw.predictions': ('plot_prediction',),
    'draw.quadtree': ('plot_kept_patches',),
    'draw.windows': ('plot_chosen_window', 'plot_received_attention'),
    'explain': ('effective_receptive_field', 'feature_pca', 'grad_cam'),
    'page': ('PageImage', 'page_data', 'render_page'),
    'quadtree': ('attention_across', 'kept_patches'),
    'subject': ('Subject', 'View'),
    'windows': ('chosen_window', 'received_attention'),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_MODULES, 'Block', 'Capture', 'capture'])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
    return __all__
