import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from helpers.small_backbones import KINDS
from helpers.small_backbones import small as small_of
from torch.utils.flop_counter import FlopCounterMode

from mmattn.backbones.quadtree import QuadTree, arch_zoo

SMALL = KINDS['quadtree'][1]


def small(**options):
    return small_of('quadtree', **options)


CASES = {
    'quadtree_b1_det_256x320': dict(arch='b1', topks=8),
    'quadtree_a_b0_det_224': dict(arch='b0', topks=8, attn_type='A'),
    'quadtree_b1_cls_224': dict(arch='b1', topks=8, value_act='GELU'),
}


@pytest.mark.parametrize('name', CASES)
def test_backbone_is_the_published_one(name):
    case, state = golden.Case(name), golden.state_dict(name)
    model = QuadTree(**CASES[name]).double().eval()
    model.load_state_dict(state)
    x = case.image.requires_grad_()
    maps = model(x)
    if case.output_names == ['logits']:
        maps = [F.linear(maps[3].mean((2, 3)), state['head.weight'], state['head.bias'])]
    outputs = dict(zip(case.output_names, maps, strict=True))
    assert max(case.output_error(name, out) for name, out in outputs.items()) < 1e-9
    case.loss(outputs).backward()
    tensors = golden.parameters(model, name) | dict(input=x)
    errors = [case.gradient_error(name, tensors[name].grad) for name in case.gradient_names]
    assert len(errors) == (1 if model.stages[0].blocks[0].attn.attn_type == 'A' else 25)
    assert max(errors) < 1e-9


# Millions of parameters, counted with a 1000-class head, and published multiply-adds in 1e9.
COUNTS = {
    'b0': (3.59, 0.7),
    'b1': (13.66, 2.3),
    'b2': (25.07, 4.5),
    'b3': (46.27, 7.8),
    'b4': (64.20, 11.5),
}


@pytest.mark.parametrize('arch', arch_zoo)
def test_parameters_and_flops(arch):
    with torch.device('meta'):
        backbone = QuadTree(arch, topks=8, out_indices=(3,))
        model = torch.nn.Sequential(
            backbone, torch.nn.Linear(backbone.stages[3].norm.weight.numel(), 1000)
        )
        image = torch.empty(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model[1](model[0](image)[0].mean((2, 3)))
    multiply_adds = counter.get_total_flops() / 2e9
    assert parameters / 1e6 == pytest.approx(COUNTS[arch][0], rel=5e-3)
    if arch == 'b0':  # published with one digit; the count is 0.62
        assert multiply_adds == pytest.approx(0.616, rel=5e-3)
    else:
        assert multiply_adds == pytest.approx(COUNTS[arch][1], rel=1e-2)


def test_every_argument_has_an_effect():
    x = torch.randn(1, 3, 128, 128)
    reference = small()(x)[3]
    for options in (dict(topks=1), dict(topks=(3, 3, 1, 3)), dict(value_act='GELU')):
        model = small(**options)
        model.load_state_dict(small().state_dict())
        assert not torch.allclose(model(x)[3], reference)


@pytest.mark.no_backend
def test_a_stage_takes_the_first_of_the_topks():
    with torch.device('meta'):
        model = QuadTree(SMALL, topks=(32, 16, 8, 4))
    topks = [stage.blocks[0].attn.topks for stage in model.stages]
    assert topks == [(32, 16, 8, 4), (32, 16, 8), (32, 16), (32,)]


@pytest.mark.no_backend
def test_fresh_weights():
    torch.manual_seed(0)
    block = QuadTree('b0').requires_grad_(False).stages[2].blocks[1]
    assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert (block.mlp.fc1.bias == 0).all() and (block.norm1.weight == 1).all()
    assert (block.attn.level_weights.softmax(0) == 0.5).all()


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(arch=SMALL | dict(dim=3)), ValueError, 'arch as a dict takes the keys embed_dims.*'),
        (dict(arch=SMALL | dict(depths=(2, 2))), ValueError, r'depths must be 4 .* got \(2, 2\)'),
        (dict(arch=SMALL | dict(num_heads=(1, 2, 3, 4))), ValueError, 'dim 40 and num_heads 3'),
        (dict(arch=SMALL | dict(num_levels=(6, 3, 2, 1))), ValueError, 'num_levels .* got 6'),
        (dict(attn_type='C'), ValueError, "attn_type must be one of A, B, got 'C'"),
        (dict(topks=0), ValueError, 'topks .* got 0'),
        (dict(topks=(8, 8, 8)), ValueError, r'topks must be an integer or 4 .* got \(8, 8, 8\)'),
        (dict(topks=(8, 0, 8, 8)), ValueError, 'topks .* got 0 for level 2'),
        (dict(topks='8'), ValueError, "topks .* got '8'"),
        (dict(value_act='Tanh'), ValueError, "value_act must be one of ReLU, GELU, got 'Tanh'"),
    ],
)
def test_constructor_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        QuadTree(**options)
