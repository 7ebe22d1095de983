import copy
import pickle

from helpers import golden
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmattn.backbones.quadtree import QuadTree, arch_zoo

SMALL = dict(embed_dims=(16, 32, 40, 64), depths=(2, 1, 1, 2), mlp_ratios=(2, 2, 2, 2))
CASES = {
    'quadtree_b1_det_256x320': dict(arch='b1', topks=8),
    'quadtree_a_b0_det_224': dict(arch='b0', topks=8, attn_type='A'),
    'quadtree_b1_cls_224': dict(arch='b1', topks=8, value_act='GELU'),
}


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = QuadTree(SMALL, **dict(topks=3) | options)
    for name, parameter in model.named_parameters():
        if 'bias' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def body(named):
    return {name: x for name, x in named.items() if not name.startswith('head.')}


@pytest.mark.parametrize('name', CASES)
def test_backbone_is_the_published_one(name):
    case, state = golden.Case(name), golden.state_dict(name)
    model = QuadTree(**CASES[name]).double().eval()
    model.load_state_dict(body(state))
    x = case.image.requires_grad_()
    maps = model(x)
    if case.output_names == ['logits']:
        maps = [F.linear(maps[3].mean((2, 3)), state['head.weight'], state['head.bias'])]
    outputs = dict(zip(case.output_names, maps, strict=True))
    assert max(case.output_error(name, out) for name, out in outputs.items()) < 1e-9
    case.loss(outputs).backward()
    tensors = dict(model.named_parameters(), input=x)
    errors = [case.gradient_error(name, tensors[name].grad) for name in case.gradient_names]
    assert len(errors) == (1 if model.block1[0].attn.attn_type == 'A' else 25)
    assert max(errors) < 1e-9


@pytest.mark.parametrize('name', CASES)
def test_names_of_all_published_parameters(name):
    with torch.device('meta'):
        model = QuadTree(**CASES[name])
    assert {k: list(p.shape) for k, p in model.state_dict().items()} == body(golden.shapes(name))


# Millions of parameters on the structure with a 1000-class head, and the published multiply-adds in 1e9.
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
        model = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.norm4.weight.numel(), 1000))
        image = torch.empty(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model[1](model[0](image)[0].mean((2, 3)))
    multiply_adds = counter.get_total_flops() / 2e9
    assert parameters / 1e6 == pytest.approx(COUNTS[arch][0], rel=5e-3)
    if arch == 'b0':  # published with one digit; it counts to 0.62
        assert multiply_adds == pytest.approx(0.616, rel=5e-3)
    else:
        assert multiply_adds == pytest.approx(COUNTS[arch][1], rel=1e-2)


@pytest.mark.parametrize('attn_type', 'AB')
@pytest.mark.parametrize('height, width', [(32, 32), (33, 95), (96, 96), (97, 64), (61, 200)])
def test_any_image_size(height, width, attn_type):
    outputs = small(attn_type=attn_type)(torch.randn(1, 3, height, width))
    for i, out in enumerate(outputs):
        stride = 2 ** (i + 2)
        shape = (1, SMALL['embed_dims'][i], -(-height // stride), -(-width // stride))
        assert out.shape == shape and out.is_contiguous() and out.isfinite().all()


@pytest.mark.parametrize('attn_type', 'AB')
def test_images_of_a_batch_do_not_mix(attn_type):
    model = small(attn_type=attn_type).double()
    x = torch.randn(2, 3, 70, 101, dtype=torch.float64)
    for both, alone in zip(model(x), model(x[1:]), strict=True):
        torch.testing.assert_close(both[1:], alone)


def test_every_argument_has_an_effect():
    x = torch.randn(1, 3, 128, 128)
    reference = small()(x)[3]
    for options in (dict(topks=1), dict(topks=(3, 3, 1, 3)), dict(value_act='GELU')):
        model = small(**options)
        model.load_state_dict(small().state_dict())
        assert not torch.allclose(model(x)[3], reference)


def test_a_stage_takes_the_first_of_the_topks():
    with torch.device('meta'):
        model = QuadTree(SMALL, topks=(32, 16, 8, 4))
    stages = [getattr(model, f'block{i}')[0].attn.topks for i in (1, 2, 3, 4)]
    assert stages == [(32, 16, 8, 4), (32, 16, 8), (32, 16), (32,)]


def test_checkpointing_gives_the_same_gradients_for_less_memory():
    x = torch.randn(1, 3, 128, 128)
    results, stored = [], []
    for with_cp in (False, True):
        model = small(with_cp=with_cp, drop_path_rate=0.2).train()
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(x)
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters())])
        stored.append(sum(saved.values()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)
    assert stored[1] < 0.5 * stored[0]


@pytest.mark.parametrize('frozen', range(-1, 5))
def test_frozen_stages(frozen):
    model = small(frozen_stages=frozen, drop_path_rate=0.5)
    before_training = [p.requires_grad for p in model.parameters()]
    model.train()
    assert model.patch_embed1.training is (frozen < 0)
    assert all(p.requires_grad is (frozen < 0) for p in model.patch_embed1.parameters())
    for i in range(4):
        is_frozen = i + 1 <= frozen
        for part in ('block', 'norm', *(('patch_embed',) if i else ())):
            module = getattr(model, f'{part}{i + 1}')
            assert module.training is not is_frozen
            assert all(p.requires_grad is not is_frozen for p in module.parameters())
    assert before_training == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize('attn_type', 'AB')
def test_stages_after_the_last_output_are_not_built(attn_type):
    model = small(out_indices=(0, 2), attn_type=attn_type)
    outputs = model.train()(torch.randn(2, 3, 70, 64))
    assert [out.shape[1] for out in outputs] == [16, 40]
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not hasattr(model, 'block4') and not hasattr(model, 'norm4')


def test_drop_path_rises_from_zero_and_is_off_in_evaluation():
    with torch.device('meta'):
        models = [QuadTree('b2'), QuadTree('b2', drop_path_rate=None)]
    for model in models:
        blocks = [block for i in (1, 2, 3, 4) for block in getattr(model, f'block{i}')]
        rates = [block.residual.rate for block in blocks]
        assert rates == pytest.approx([0.1 * i / 15 for i in range(16)])
    model, x = small(drop_path_rate=0.9), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x)[3], model(x)[3])
    model.train()
    assert not torch.equal(model(x)[3], model(x)[3])


def test_fresh_weights():
    torch.manual_seed(0)
    block = QuadTree('b0').requires_grad_(False).block3[1]
    assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert (block.mlp.fc1.bias == 0).all() and (block.norm1.weight == 1).all()
    assert (block.attn.py_att.weight.softmax(0) == 0.5).all()


def test_copies_and_pickles():
    model, x = small(), torch.randn(1, 3, 64, 40)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model(x), twin(x), strict=True))


def test_compiles_to_one_graph():
    model, x = small().double(), torch.randn(1, 3, 70, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for a, b in zip(model(x), compiled(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('attn_type', 'AB')
def test_autocast(dtype, attn_type):
    model = small(attn_type=attn_type, drop_path_rate=0.0, topks=1000).train()
    x = torch.randn(2, 3, 77, 96)
    with torch.no_grad():
        exact = model(x)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    for out, reference in zip(outputs, exact, strict=True):
        assert (out.float() - reference).norm() < 0.05 * reference.norm()
    sum(out.float().square().mean() for out in outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_registered_for_every_task():
    from mmdet.registry import MODELS as MMDET
    from mmengine.registry import MODELS
    from mmpretrain.registry import MODELS as MMPRETRAIN
    from mmseg.registry import MODELS as MMSEG

    for registry in (MODELS, MMDET, MMSEG, MMPRETRAIN):
        assert isinstance(registry.build(dict(type='QuadTree', arch=SMALL)), QuadTree)
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        assert MODELS.get(f'{scope}.QuadTree') is QuadTree


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(arch='b5'), ValueError, r"arch must be one of b0, .* got 'b5'"),
        (dict(arch=3), TypeError, 'arch must be a name or a dict .* got int'),
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
        (dict(out_indices=(0, 4)), ValueError, r'out_indices .* got \(0, 4\)'),
        (dict(drop_path_rate=1.5), ValueError, 'drop_path_rate .* got 1.5'),
        (dict(frozen_stages=5), ValueError, 'frozen_stages .* got 5'),
        (dict(window_size=7), TypeError, 'window_size'),
    ],
)
def test_constructor_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        QuadTree(**options)


@pytest.mark.parametrize('shape', [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_image_errors_give_the_shape(shape):
    with pytest.raises(ValueError, match=r'x must be .*\(' + ', '.join(map(str, shape)) + r'\)'):
        small()(torch.randn(shape))
