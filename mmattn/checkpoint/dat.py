"""Names in DAT's and DAT++'s published files, for both the same."""

from __future__ import annotations

import re

from mmattn.backbones import DAT

from .family import Family, StateDict
from .resize import resize_bias_table, resize_displacement_table

# In order; each pattern is applied to what the ones before have made of the name.
_PUBLISHED = (
    # A norm of a channel-first map is a module with a norm inside; ours is one only between convolutions.
    (r'^norms\.(\d)\.norm\.', r'norm\1.'),
    (r'^(stages\.\d\.layer_norms\.\d+)\.norm\.', r'\1.'),
    (r'^cls_norm\.norm\.', 'cls_norm.'),
    (r'\.proj_qkv\.', '.qkv.'),
    (r'(\.mlps\.\d+)\.(?:chunk\.)?linear([12])\.(?:0\.)?', r'\1.fc\2.'),
)
_WINDOW_OUT = re.compile(r'(stages\.\d\.attns\.\d+)\.proj_out\.')


def _from_published(state: StateDict) -> StateDict:
    renamed = {}
    is_plus_plus = 'patch_proj.3.weight' in state
    for name, value in state.items():
        # Windows and deformable attention both end in proj_out; the windows' is ours named proj.
        window = _WINDOW_OUT.match(name)
        if window and f'{window[1]}.proj_qkv.weight' in state:
            name = name.replace('.proj_out.', '.proj.')
        for pattern, replacement in _PUBLISHED:
            name = re.sub(pattern, replacement, name)
        if not is_plus_plus:
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.0\.', r'\1.conv.', name)
            name = re.sub(r'^(patch_proj|down_projs\.\d)\.1\.', r'\1.norm.', name)
        # DAT++'s MLP has 1x1 convolutions where ours has linear layers.
        if '.mlps.' in name and '.fc' in name:
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[name] = value
    return renamed


def _stage(name: str) -> int | None:
    if match := re.match(r'stages\.(\d)\.', name):
        return int(match[1])
    match = re.match(r'down_projs\.(\d)\.', name)
    return match and int(match[1]) + 1


DAT_FAMILY = Family(
    name='dat',
    backbone=DAT,
    origins={'published': ('stages.0.attns.', _from_published)},
    classifier_norm='cls_norm.',
    classifier_head='cls_head.',
    output_norm='norm',
    stage=_stage,
    rebuilt=('relative_position_index', 'attn_mask'),
    resize={
        'relative_position_bias_table': resize_bias_table,
        'rpe_table': resize_displacement_table,
    },
)
