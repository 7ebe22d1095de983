"""Attention operators as plain functions, with their PyTorch references."""

from ._backend import (
    BackendReport,
    at_least,
    backend_report,
    exporting,
    known_equal,
    recording,
)
from .deformable import (
    deform_attention,
    deform_attention_reference,
    deform_bias,
    deform_sample,
    deform_sample_reference,
)
from .neighborhood import (
    neighborhood_attention,
    neighborhood_attention_reference,
    neighborhood_attention_weights,
)
from .quadtree import quadtree_level, quadtree_level_reference, quadtree_root
from .window import (
    window_attention,
    window_attention_reference,
    window_attention_weights,
)

__all__ = [
    'BackendReport',
    'at_least',
    'backend_report',
    'deform_attention',
    'deform_attention_reference',
    'deform_bias',
    'deform_sample',
    'deform_sample_reference',
    'exporting',
    'known_equal',
    'neighborhood_attention',
    'neighborhood_attention_reference',
    'neighborhood_attention_weights',
    'quadtree_level',
    'quadtree_level_reference',
    'quadtree_root',
    'recording',
    'window_attention',
    'window_attention_reference',
    'window_attention_weights',
]
