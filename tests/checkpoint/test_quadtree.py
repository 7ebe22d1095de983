"""QuadTree checkpoints: two types of attention, whose files do not fit each other."""

import pytest
import torch
from helpers import golden

from mmattn.backbones.quadtree import QuadTree
from mmattn.checkpoint import CheckpointError, load_checkpoint

CLS = 'quadtree_b1_cls_224'


def b1(**options):
    return QuadTree('b1', **dict(topks=8) | options)


def published(case=CLS):
    return {name: value.float() for name, value in golden.state_dict(case).items()}


def test_files_of_another_type_or_size_do_not_fit():
    model = b1()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'quadtree backbone .* does not fit'):
        load_checkpoint(model, published('quadtree_a_b0_det_224'))
    type_b = published()
    with pytest.raises(
        CheckpointError, match=r'cannot use, such as .*stages\.0\.blocks\.0\.attn\.level_weights'
    ):
        load_checkpoint(b1(attn_type='A'), type_b)
    type_a = {
        name: v for name, v in type_b.items() if 'py_att' not in name and 'value_' not in name
    }
    with pytest.raises(
        CheckpointError, match=r'it lacks, such as .*stages\.0\.blocks\.0\.attn\.value_branches'
    ):
        load_checkpoint(model, type_a)
    with pytest.raises(CheckpointError, match='is no quadtree'):
        load_checkpoint(model, {'block1.0.attn.q.weight': torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
