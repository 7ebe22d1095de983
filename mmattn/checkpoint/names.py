"""Names of published checkpoints, and of this package's 0.1.0, as patterns that give ours.

Ours are the same for all families: ``stem``, ``stages.i.{downsample, blocks.j.{norm1, attn, norm2,
mlp}}``, ``norm{i}`` of output i, and ``head.fc`` of a classifier. No pattern matches them, so files
of every origin go through one table a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

StateDict = dict[str, Tensor]
Replacement = str | Callable[[re.Match], str]

# Tensors of a classifier that lie outside its backbone.
CLASSIFIER_NORM = 'classifier_norm.'
CLASSIFIER_HEAD = 'head.fc.'

# Buffers that a model builds itself.
REBUILT = ('relative_position_index', 'attn_mask')

# Linear layers that are 1 x 1 convolutions in some files.
_LINEAR = re.compile(r'(attn\.(.*_)?proj|offsets\.proj|fc\d|\.fc\.\d)\.weight$')


@dataclass(frozen=True)
class Family:
    """Names of the files of one architecture.

    Attributes:
        origins: for each author, a pattern that some name of only his files matches.
        patterns: applied to each name in order, each to the result of those before.
    """

    origins: dict[str, str]
    patterns: tuple[tuple[str, Replacement], ...]


def _next_stage(rest: str) -> Callable[[re.Match], str]:
    """Downsampling belongs to the stage before it in the files, to the stage after it in ours."""
    return lambda match: f'stages.{int(match[1]) + 1}.downsample.{rest}'


def _stage_before(part: str) -> Callable[[re.Match], str]:
    """Stages count from 1 in the files, from 0 in ours."""
    return lambda match: f'stages.{int(match[1]) - 1}.{part}'


_MBCONV = {'conv_dw': '0', 'se.fc1': '2.fc.0', 'se.fc2': '2.fc.2', 'conv_pw': '3'}

GCVIT = Family(
    origins={
        'published': r'levels\.0\.blocks\.',
        'timm': r'stem\.conv1\.|stages\.0\.global_block\.',
        'mmattn': r'stem\.(proj|conv)\.',
    },
    patterns=(
        # timm
        (r'^stem\.conv1\.', 'stem.proj.'),
        (r'^stem\.down\.', 'stem.downsample.'),
        (r'^stages\.3\.norm\.', CLASSIFIER_NORM),
        (
            r'\.global_block\.blocks\.conv(\d+)\.',
            lambda match: f'.global_query.steps.{int(match[1]) - 1}.conv_block.',
        ),
        (
            r'\.conv_block\.(conv_dw|se\.fc1|se\.fc2|conv_pw)\.',
            lambda match: f'.conv.{_MBCONV[match[1]]}.',
        ),
        (r'\.rel_pos\.', '.'),
        (r'\.ls([12])\.gamma$', r'.gamma\1'),
        # the authors'
        (
            r'^patch_embed\.(projection|norm)\.',
            lambda m: f'stem.{m[1].replace("projection", "conv")}.',
        ),
        (r'^patch_embed\.proj\.', 'stem.proj.'),
        (r'^patch_embed\.conv_down\.', 'stem.downsample.'),
        (r'^levels\.(\d+)\.downsample\.', _next_stage('')),
        (r'^levels\.', 'stages.'),
        (r'\.q_global_gen\.to_q_global\.', '.global_query.steps.'),
        (r'^norm\.', CLASSIFIER_NORM),
        (r'^head\.(?!fc\.)', CLASSIFIER_HEAD),
    ),
)

DAT = Family(
    origins={
        'published': r'stages\.0\.(attns|layer_norms)\.',
        'mmattn': r'stem\.(0\.)?conv\.',
    },
    patterns=(
        # DAT++'s stem has two convolutions.
        (r'^patch_proj\.0\.', 'stem.0.conv.'),
        (r'^patch_proj\.1\.norm\.', 'stem.0.norm.'),
        (r'^patch_proj\.3\.', 'stem.2.conv.'),
        (r'^patch_proj\.4\.norm\.', 'stem.2.norm.'),
        (r'^patch_proj\.(conv\.|norm\.)(norm\.)?', r'stem.\1'),  # 0.1.0
        (r'^down_projs\.(\d+)\.(?:0|conv)\.', _next_stage('conv.')),
        (r'^down_projs\.(\d+)\.(?:1|norm)\.(?:norm\.)?', _next_stage('norm.')),
        (
            r'^stages\.(\d+)\.layer_norms\.(\d+)\.(?:norm\.)?',
            lambda m: f'stages.{m[1]}.blocks.{int(m[2]) // 2}.norm{int(m[2]) % 2 + 1}.',
        ),
        (r'^stages\.(\d+)\.attns\.(\d+)\.', r'stages.\1.blocks.\2.attn.'),
        (r'^stages\.(\d+)\.mlps\.(\d+)\.', r'stages.\1.blocks.\2.mlp.'),
        (r'^stages\.(\d+)\.local_perception_units\.(\d+)\.', r'stages.\1.blocks.\2.conv.'),
        (r'\.mlp\.(?:chunk\.)?linear([12])\.(?:0\.)?', r'.mlp.fc\1.'),
        (r'\.mlp\.dwc\.', '.mlp.dwconv.'),
        (r'\.attn\.proj_qkv\.', '.attn.qkv.'),
        (r'\.attn\.proj_out\.', '.attn.proj.'),
        (r'\.attn\.proj_([qkv])\.', r'.attn.\1_proj.'),
        (r'\.attn\.conv_offset\.0\.', '.attn.offsets.dwconv.'),
        (r'\.attn\.conv_offset\.1\.(?:norm\.)?', '.attn.offsets.norm.'),
        (r'\.attn\.conv_offset\.3\.', '.attn.offsets.proj.'),
        (r'\.attn\.rpe_table$', '.attn.position_bias.table'),
        (r'\.attn\.rpe_table\.mlp\.', '.attn.position_bias.mlp.'),
        (r'\.attn\.rpe_table\.(weight|bias)$', r'.attn.position_bias.conv.\1'),
        (r'^norms\.(\d+)\.norm\.', r'norm\1.'),
        (r'^cls_norm\.norm\.', CLASSIFIER_NORM),
        (r'^cls_head\.', CLASSIFIER_HEAD),
    ),
)

QUADTREE = Family(
    origins={
        'published': r'block1\.0\.attn\.q_proj\.',
        'mmattn': r'stages\.0\.norm\.',
    },
    patterns=(
        (r'^patch_embed1\.proj\.', 'stem.conv.'),
        (r'^patch_embed1\.norm\.', 'stem.norm.'),
        (r'^patch_embed(\d+)\.proj\.', _stage_before('downsample.conv.')),
        (r'^patch_embed(\d+)\.norm\.', _stage_before('downsample.norm.')),
        (r'^block(\d+)\.', _stage_before('blocks.')),
        (r'^norm(\d+)\.', _stage_before('norm.')),
        (r'\.attn\.py_att\.weight$', '.attn.level_weights'),
        (r'\.attn\.py_att\.get_vs\.', '.attn.lepe.'),
        (r'\.attn\.value_branchs\.', '.attn.value_branches.'),
        (r'\.mlp\.dwconv\.dwconv\.', '.mlp.dwconv.'),
        (r'^head\.(?!fc\.)', CLASSIFIER_HEAD),
    ),
)

# QuadTree before DAT, whose own pattern its files match, too.
FAMILIES = dict(gcvit=GCVIT, quadtree=QUADTREE, dat=DAT)


def find_origin(names: Iterable[str], family: str) -> str | None:
    """Author of a backbone's file by the names in it, or None if they are not this family's."""
    names = list(names)
    for origin, pattern in FAMILIES[family].origins.items():
        if any(re.match(pattern, name) for name in names):
            return origin
    return None


def rename(state: Mapping[str, Tensor], family: str) -> StateDict:
    """Tensors of a backbone's or classifier's file by our names and with our shapes.

    1 x 1 convolutions become linear layers. Names that no pattern matches stay.
    """
    renamed = {}
    # 0.1.0's bias for each pair of cells; with a weight beside it, the bias of a convolution.
    state = {
        name.replace('.rpe_table.bias', '.position_bias.pairs')
        if name.replace('.rpe_table.bias', '.rpe_table.weight') not in state
        else name: value
        for name, value in state.items()
    }
    # DAT's stem has one convolution under the names of DAT++'s first.
    one_stem = 'patch_proj.0.weight' in state and 'patch_proj.3.weight' not in state
    for name, value in state.items():
        for pattern, replacement in FAMILIES[family].patterns:
            name = re.sub(pattern, replacement, name)
        if one_stem:
            name = name.replace('stem.0.', 'stem.')
        if _LINEAR.search(name) and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        renamed[name] = value
    return renamed
