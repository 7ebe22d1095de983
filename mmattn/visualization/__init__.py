"""Pictures of what models attend to: arrays first, then figures of them.

:func:`capture` watches a forward pass and needs torch alone; :func:`attention_maps` and the
functions of one family turn what it saw into arrays; ``plot_*`` draw them. :class:`Subject` makes
all that from a config, a checkpoint and an image file. Other modules than ``capture`` are imported
at first use, as they need matplotlib.
"""

from importlib import import_module
from typing import Any

from .capture import Block, Capture, capture

_NAMES = {
    'attention': ('attention_maps',),
    'cam': ('grad_cam',),
    'deformable': ('sampling_points', 'top_keys'),
    'detection': ('Instances', 'plot_predictions'),
    'draw.deformable': ('plot_sampling_points', 'plot_top_keys'),
    'draw.maps': ('plot_features', 'plot_grad_cam', 'plot_receptive_field'),
    'draw.predictions': ('plot_prediction',),
    'draw.quadtree': ('plot_kept_patches',),
    'draw.windows': ('plot_chosen_window', 'plot_received_attention'),
    'page': ('PageImage', 'page_data', 'render_page'),
    'pca': ('feature_pca',),
    'quadtree': ('kept_patches', 'looks_across'),
    'receptive_field': ('effective_receptive_field',),
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
