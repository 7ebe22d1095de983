import copy
import pickle

from helpers import golden
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.backbones import GCViT
from mmattn.backbones.gcvit import arch_zoo

SMALL = dict(
    embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2, layer_scale=0.5
)


def small(window=(3, 3, 6, 3), resolution=96, seed=0, **options):
    torch.manual_seed(seed)
    model = GCViT(SMALL, window_size=window, resolution=resolution, **options)
    for name, parameter in model.named_parameters():
        if 'bias' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    'dtype, output_error, gradient_error',
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-3, 5e-3)],
)
def test_detector_backbone_is_the_published_one(dtype, output_error, gradient_error):
    case = golden.Case('gcvit_t_det_256x320')
    model = GCViT('tiny', window_size=(24, 24, 24, 24)).to(dtype).eval()
    model.load_state_dict(golden.state_dict('gcvit_t_det_256x320'))
    x = case.image.to(dtype).requires_grad_()
    outputs = dict(zip(case.output_names, model(x), strict=True))
    assert all(case.output_error(name, out) < output_error for name, out in outputs.items())
    case.loss({name: out.double() for name, out in outputs.items()}).backward()
    tensors = dict(model.named_parameters(), input=x)
    errors = {name: case.gradient_error(name, tensors[name].grad) for name in case.gradient_names}
    assert len(errors) == 25 and max(errors.values()) < gradient_error


def test_names_of_all_published_parameters():
    for case, options in (
        ('gcvit_s_cls', dict(arch='small')),
        ('gcvit_xxt_cls_224', dict(arch='xxtiny')),
        ('gcvit_t_det_256x320', dict(arch='tiny', window_size=(24,) * 4)),
    ):
        with torch.device('meta'):
            model = GCViT(**options)
        published = golden.shapes(case)
        ours = {name: list(p.shape) for name, p in model.named_parameters()}
        norms = {name for name in ours if name.startswith('norm')}
        body = {
            k: v
            for k, v in published.items()
            if not k.endswith('_index') and k.split('.')[0] not in ('norm', 'head')
        }
        assert (
            body == {k: v for k, v in ours.items() if k in body}
            and ours.keys() - body.keys() <= norms
        )


# Counted on the structure with a 1000-class head (spec: millions of parameters, multiply-adds in 1e9).
COUNTS = {
    'xxtiny': (12.00, 2.12),
    'xtiny': (19.98, 2.91),
    'tiny': (28.22, 4.76),
    'tiny2': (34.54, 6.18),
    'small': (51.09, 8.53),
    'small2': (68.62, 11.54),
    'base': (90.32, 14.82),
    'large': (202.08, 32.55),
}


@pytest.mark.parametrize('arch', arch_zoo)
def test_parameters_and_flops(arch):
    with torch.device('meta'):
        model = torch.nn.Sequential(
            GCViT(arch, out_indices=(3,)), torch.nn.Linear(arch_zoo[arch].embed_dims * 8, 1000)
        )
        image = torch.empty(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model[1](model[0](image)[0].mean((2, 3)))
    assert parameters / 1e6 == pytest.approx(COUNTS[arch][0], rel=5e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(COUNTS[arch][1], rel=5e-3)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 95), (96, 96), (97, 64), (61, 200)])
def test_any_image_size(height, width):
    outputs = small()(torch.randn(1, 3, height, width))
    for i, out in enumerate(outputs):
        stride = 2 ** (i + 2)
        assert out.shape == (1, 32 * 2**i, -(-height // stride), -(-width // stride))
        assert out.is_contiguous() and out.isfinite().all()


def test_images_of_a_batch_do_not_mix():
    model = small().double()
    x = torch.randn(2, 3, 70, 101, dtype=torch.float64)
    for both, alone in zip(model(x), model(x[1:]), strict=True):
        torch.testing.assert_close(both[1:], alone)


def test_windows_larger_than_the_map_are_one_window_of_any_size_in_local_attention():
    """Padding takes part in attention; with one window of the map's size there is none, and attention is plain."""
    model = small(window=(24, 12, 6, 3), odd_blocks='local').double()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    stem = model.patch_embed(x)
    block = model.levels[0].blocks[0]
    tokens = block.norm1(stem).flatten(1, 2)
    q, k, v = block.attn.qkv(tokens).chunk(3, dim=-1)
    scores = q @ k.transpose(1, 2) / 32**0.5 + block.attn.bias()
    plain = block.attn.proj(scores.softmax(-1) @ v).view_as(stem)
    torch.testing.assert_close(block.attn(block.norm1(stem)), plain)


def test_far_pixels_are_seen_through_the_global_query_only():
    x = torch.randn(1, 3, 192, 192, dtype=torch.float64)
    far = x.clone()
    far[:, :, -16:, -16:] += 1

    def change_at_the_opposite_corner(odd_blocks):
        model = small(odd_blocks=odd_blocks).double()
        stage = model.levels[0]
        maps = [stage(model.patch_embed(image), model.run) for image in (x, far)]
        return (maps[0] - maps[1])[:, :9, :9].abs().max()

    # The downsampler's squeeze-and-excitation is global in both; the stem's is the only other way here.
    local, with_query = (
        change_at_the_opposite_corner('local'),
        change_at_the_opposite_corner('global'),
    )
    assert with_query > 1.5 * local


def test_query_pools_in_stage_2_unless_the_window_is_a_sixteenth_of_the_resolution():
    def pools(window, resolution):
        with torch.device('meta'):
            model = GCViT('xxtiny', window_size=(7, 7, window, 7), resolution=resolution)
        steps = model.levels[2].q_global_gen.to_q_global
        return [isinstance(step.pool, torch.nn.MaxPool2d) for step in steps]

    assert pools(14, 224) == [False] and pools(24, 384) == [False] and pools(32, 512) == [False]
    assert pools(24, 224) == [True]


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
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)
    assert stored[1] < 0.6 * stored[0]


@pytest.mark.parametrize('frozen', range(-1, 5))
def test_frozen_stages(frozen):
    model = small(frozen_stages=frozen, drop_path_rate=0.5)
    parts = [
        [model.patch_embed],
        *([level, getattr(model, f'norm{i}')] for i, level in enumerate(model.levels)),
    ]
    before_training = [p.requires_grad for p in model.parameters()]
    model.train()
    for i, modules in enumerate(parts):
        is_frozen = i <= frozen
        for module in modules:
            assert module.training is not is_frozen
            assert all(p.requires_grad is not is_frozen for p in module.parameters())
    assert before_training == [p.requires_grad for p in model.parameters()]


def test_stages_without_an_output_are_not_built():
    model = small(out_indices=(0, 2))
    outputs = model.train()(torch.randn(1, 3, 64, 64))
    assert [out.shape[1] for out in outputs] == [32, 128]
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_rises_from_zero_and_is_off_in_evaluation():
    with torch.device('meta'):
        model = GCViT('tiny')
        base = GCViT('base', drop_path_rate=0.1)
    rates = [block.residual.rate for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0.2 * i / 30 for i in range(31)])
    assert base.levels[3].blocks[-1].residual.rate == pytest.approx(0.1)
    model, x = small(drop_path_rate=0.9), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x)[3], model(x)[3])
    model.train()
    assert not torch.equal(model(x)[3], model(x)[3])


def test_fresh_weights():
    torch.manual_seed(0)
    model = GCViT('small')
    block = model.requires_grad_(False).levels[2].blocks[3]
    assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attn.relative_position_bias_table.std() == pytest.approx(0.02, rel=0.05)
    assert (block.mlp.fc1.bias == 0).all() and (block.norm1.weight == 1).all()
    assert (block.gamma1 == 1e-5).all()


def test_copies_and_pickles():
    model, x = small(), torch.randn(1, 3, 64, 40)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model(x), twin(x), strict=True))


def test_compiles_to_one_graph():
    model, x = small(), torch.randn(1, 3, 70, 64)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for a, b in zip(model(x), compiled(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_inductor_compiles_a_stage():
    stage, x = small().levels[2], torch.randn(1, 7, 6, 128)
    compiled = torch.compile(
        lambda x: stage(x, lambda block, *inputs: block(*inputs)), fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x), stage(x, lambda block, *inputs: block(*inputs)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('window', [(7, 7, 14, 7), (24, 24, 24, 24)])
def test_autocast(dtype, window):
    torch.manual_seed(0)
    model = GCViT('xxtiny', window_size=window, drop_path_rate=0.0).train()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        exact = model(x)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    for out, reference in zip(outputs, exact, strict=True):
        assert (out.float() - reference).norm() < 0.02 * reference.norm()
    sum(out.float().square().mean() for out in outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'options',
    [
        dict(stem='patchify'),
        dict(downsampler='max_pool'),
        dict(downsampler='patch_merging'),
        dict(odd_blocks='shifted'),
        dict(odd_blocks='local'),
    ],
    ids=lambda options: '-'.join(options.values()),
)
def test_ablations_train(options):
    model = small(**options).train()
    outputs = model(torch.randn(1, 3, 65, 34))
    assert [tuple(out.shape[2:]) for out in outputs] == [(17, 9), (9, 5), (5, 3), (3, 2)]
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_registered_for_every_task():
    from mmdet.registry import MODELS as MMDET
    from mmengine.registry import MODELS
    from mmpretrain.registry import MODELS as MMPRETRAIN
    from mmseg.registry import MODELS as MMSEG

    for registry in (MODELS, MMDET, MMSEG, MMPRETRAIN):
        assert isinstance(registry.build(dict(type='GCViT', arch=SMALL)), GCViT)
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        assert MODELS.get(f'{scope}.GCViT') is GCViT


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(arch='huge'), ValueError, r"arch must be one of xxtiny, .* got 'huge'"),
        (dict(arch=3), TypeError, 'arch must be a name or a dict .* got int'),
        (
            dict(arch=SMALL | dict(dim=3)),
            ValueError,
            'arch as a dict takes the keys embed_dims, .*dim',
        ),
        (
            dict(arch=SMALL | dict(depths=(2, 2, 2))),
            ValueError,
            r'depths must be 4 integers .* got \(2, 2, 2\)',
        ),
        (dict(arch=SMALL | dict(num_heads=(1, 2, 3, 4))), ValueError, 'num_heads 3'),
        (
            dict(window_size=(7, 7, 7)),
            ValueError,
            r'window_size must be 4 integers .* got \(7, 7, 7\)',
        ),
        (dict(window_size=7), ValueError, 'window_size must be 4 integers .* got 7'),
        (dict(resolution=(224, 224)), ValueError, 'resolution'),
        (dict(out_indices=(0, 4)), ValueError, r'out_indices .* got \(0, 4\)'),
        (dict(out_indices=()), ValueError, 'out_indices'),
        (dict(drop_path_rate=1.5), ValueError, 'drop_path_rate .* got 1.5'),
        (dict(frozen_stages=5), ValueError, 'frozen_stages .* got 5'),
        (dict(stem='swin'), ValueError, "stem must be one of conv, patchify, got 'swin'"),
        (dict(downsampler='conv'), ValueError, 'downsampler must be one of fused_mbconv, .*'),
        (dict(odd_blocks='none'), ValueError, 'odd_blocks must be one of global, shifted, local'),
        (dict(windows=7), TypeError, 'windows'),
    ],
)
def test_constructor_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        GCViT(**options)


@pytest.mark.parametrize('shape', [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_image_errors_give_the_shape(shape):
    with pytest.raises(
        ValueError, match=r'x must be .*' + str(shape).replace('(', r'\(').replace(')', r'\)')
    ):
        small()(torch.randn(shape))
