"""GC ViT checkpoints: gradients of a loaded classifier, tables for other windows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from mmengine.config import Config

from mmattn.backbones import GCViT
from mmattn.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
XXT = 'gcvit_xxt_cls_224'


@pytest.fixture
def classifier():
    from mmpretrain.registry import MODELS

    return MODELS.build(Config.fromfile(ROOT / 'configs/gcvit/gcvit_xxt_imagenet.py').model).eval()


@pytest.mark.parametrize(
    'dtype, output_error, gradient_error',
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-3, 5e-3)],
)
def test_classifier_from_our_config_is_the_published_one(
    classifier, dtype, output_error, gradient_error
):
    case, state = golden.Case(XXT), golden.state_dict(XXT)
    model = classifier.to(dtype)
    report = load_checkpoint(model, state)
    assert not report.dropped and not report.fresh and not report.resized
    x = case.image.to(dtype).requires_grad_()
    model.zero_grad()
    maps = {}
    hooks = [
        stage.blocks[-1].register_forward_hook(
            lambda _, __, out, i=i: maps.update({f'stage{i}': out.permute(0, 3, 1, 2)})
        )
        for i, stage in enumerate(model.backbone.stages)
    ]
    maps['logits'] = model(x)
    for hook in hooks:
        hook.remove()
    assert {
        name: case.output_error(name, maps[name]) < output_error for name in case.output_names
    } == dict.fromkeys(case.output_names, True)
    case.loss({name: out.double() for name, out in maps.items()}).backward()
    tensors = golden.parameters(model.backbone, XXT) | dict(input=x)
    errors = {name: case.gradient_error(name, tensors[name].grad) for name in case.gradient_names}
    assert len(errors) == len(case.gradient_names) > 20 and max(errors.values()) < gradient_error


def test_tables_are_resized_bicubically_for_other_windows():
    published = {name: value.float() for name, value in golden.state_dict(XXT).items()}
    model = GCViT('xxtiny', window_size=(24, 24, 24, 24))
    report = load_checkpoint(model, published)
    assert len(report.resized) == 12
    name = 'stages.2.blocks.0.attn.relative_position_bias_table'
    assert report.resized[f'backbone.{name}'] == ((729, 8), (2209, 8))
    image = published[name.replace('stages', 'levels')].t().reshape(1, 8, 27, 27)
    expected = F.interpolate(image, size=(47, 47), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.state_dict()[name], expected.view(8, -1).t())
