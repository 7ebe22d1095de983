"""Names in GC ViT's published files. The authors' are ours; timm's differ."""

from __future__ import annotations

import re

from mmattn.backbones import GCViT

from .family import Family, StateDict
from .resize import resize_bias_table

_CONV_BLOCK = {
    'conv_dw': 'conv.0',
    'se.fc1': 'conv.2.fc.0',
    'se.fc2': 'conv.2.fc.2',
    'conv_pw': 'conv.3',
}

# In order; each pattern is applied to what the ones before have made of the name.
_TIMM = (
    (r'^stem\.conv1\.', 'patch_embed.proj.'),
    (r'^stem\.down\.', 'patch_embed.conv_down.'),
    (r'^stages\.(\d+)\.downsample\.', lambda m: f'levels.{int(m[1]) - 1}.downsample.'),
    (r'^stages\.3\.norm\.', 'norm.'),
    (
        r'^stages\.(\d+)\.global_block\.blocks\.conv(\d+)\.',
        lambda m: f'levels.{m[1]}.q_global_gen.to_q_global.{int(m[2]) - 1}.conv_block.',
    ),
    (r'^stages\.', 'levels.'),
    (r'conv_block\.(conv_dw|se\.fc1|se\.fc2|conv_pw)\.', lambda m: _CONV_BLOCK[m[1]] + '.'),
    (r'\.rel_pos\.', '.'),
    (r'\.ls([12])\.gamma$', r'.gamma\1'),
    (r'^head\.fc\.', 'head.'),
)


def _from_timm(state: StateDict) -> StateDict:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _TIMM:
            name = re.sub(pattern, replacement, name)
        # timm's squeeze-and-excitation is a 1x1 convolution where the authors' is a linear layer.
        renamed[name] = value.flatten(1) if '.conv.2.fc.' in name else value
    return renamed


def _stage(name: str) -> int | None:
    match = re.match(r'levels\.(\d)\.(downsample\.)?', name)
    return match and int(match[1]) + bool(match[2])


GCVIT = Family(
    name='gcvit',
    backbone=GCViT,
    origins={
        'published': ('levels.0.blocks.', dict),
        'timm': ('stages.0.global_block.', _from_timm),
    },
    classifier_norm='norm.',
    classifier_head='head.',
    output_norm='norm',
    stage=_stage,
    rebuilt=('relative_position_index',),
    resize={'relative_position_bias_table': resize_bias_table},
)
