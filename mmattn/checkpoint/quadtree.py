"""Names in QuadTree's published files. They are ours."""

from __future__ import annotations

import re

from mmattn.backbones.quadtree import QuadTree

from .family import Family


def _stage(name: str) -> int | None:
    match = re.match(r'(?:patch_embed|block|norm)(\d)\.', name)
    return match and int(match[1]) - 1


QUADTREE = Family(
    name='quadtree',
    backbone=QuadTree,
    origins={'published': ('block1.0.attn.q_proj.', dict)},
    classifier_norm=None,
    classifier_head='head.',
    output_norm=None,
    stage=_stage,
    rebuilt=(),
    resize={},
)
