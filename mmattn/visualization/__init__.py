"""Pictures of what models see; arrays in, arrays and figures out.

:func:`capture` watches a forward pass; :func:`attention_maps` and the functions of one family turn what it saw into
arrays; ``plot_*`` draw them. :class:`Subject` makes all that from a config, a checkpoint and an image file.
"""

from .attention import attention_maps
from .cam import grad_cam
from .capture import Block, Capture, capture
from .deformable import sampling_points, top_keys
from .detection import Instances, plot_predictions
from .draw.deformable import plot_sampling_points, plot_top_keys
from .draw.maps import plot_features, plot_grad_cam, plot_receptive_field
from .draw.predictions import plot_prediction
from .draw.quadtree import plot_kept_patches
from .draw.windows import plot_chosen_window, plot_received_attention
from .hook import AttentionHook
from .page import PageImage, page_data, render_page
from .pca import feature_pca
from .quadtree import kept_patches, looks_across
from .receptive_field import effective_receptive_field
from .subject import Subject, View
from .windows import chosen_window, received_attention

__all__ = [
    'AttentionHook',
    'Block',
    'Capture',
    'Instances',
    'PageImage',
    'Subject',
    'View',
    'attention_maps',
    'capture',
    'chosen_window',
    'effective_receptive_field',
    'feature_pca',
    'grad_cam',
    'kept_patches',
    'looks_across',
    'page_data',
    'plot_chosen_window',
    'plot_features',
    'plot_grad_cam',
    'plot_kept_patches',
    'plot_prediction',
    'plot_predictions',
    'plot_received_attention',
    'plot_receptive_field',
    'plot_sampling_points',
    'plot_top_keys',
    'received_attention',
    'render_page',
    'sampling_points',
    'top_keys',
]
