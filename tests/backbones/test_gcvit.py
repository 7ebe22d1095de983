import pytest
import torch
from helpers import golden
from helpers.small_backbones import KINDS
from helpers.small_backbones import small as small_of
from torch.utils.flop_counter import FlopCounterMode

from mmattn.backbones import GCViT
from mmattn.backbones.gcvit import arch_zoo

SMALL = KINDS['gcvit'][1]


def small(**options):
    return small_of('gcvit', **options)


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
    tensors = golden.parameters(model, 'gcvit_t_det_256x320') | dict(input=x)
    errors = {name: case.gradient_error(name, tensors[name].grad) for name in case.gradient_names}
    assert len(errors) == 25 and max(errors.values()) < gradient_error


# Millions of parameters and multiply-adds in 1e9, counted with a 1000-class head.
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


def test_one_window_of_local_attention_is_plain():
    """Padded tokens are attended; a window of the map's size has none."""
    model = small(window_size=(24, 12, 6, 3), odd_blocks='local').double()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    stem = model.stem(x.permute(0, 2, 3, 1))
    block = model.stages[0].blocks[0]
    tokens = block.norm1(stem).flatten(1, 2)
    q, k, v = block.attn.qkv(tokens).chunk(3, dim=-1)
    scores = q @ k.transpose(1, 2) / 32**0.5 + block.attn.bias()
    plain = block.attn.proj(scores.softmax(-1) @ v).view_as(stem)
    torch.testing.assert_close(block.attn(block.norm1(stem)), plain)


@pytest.mark.no_backend
def test_pooling_of_the_global_query_in_stage_2():
    def pools(window, resolution):
        with torch.device('meta'):
            model = GCViT('xxtiny', window_size=(7, 7, window, 7), resolution=resolution)
        steps = model.stages[2].global_query.steps
        return [isinstance(step.pool, torch.nn.MaxPool2d) for step in steps]

    assert pools(14, 224) == [False] and pools(24, 384) == [False] and pools(32, 512) == [False]
    assert pools(24, 224) == [True]


@pytest.mark.no_backend
def test_fresh_weights():
    torch.manual_seed(0)
    model = GCViT('small')
    block = model.requires_grad_(False).stages[2].blocks[3]
    assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attn.relative_position_bias_table.std() == pytest.approx(0.02, rel=0.05)
    assert (block.mlp.fc1.bias == 0).all() and (block.norm1.weight == 1).all()
    assert (block.gamma1 == 1e-5).all()


@pytest.mark.no_backend
def test_inductor_compiles_a_stage():
    stage, x = small().stages[2], torch.randn(1, 14, 12, 64)
    compiled = torch.compile(stage, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stage(x), rtol=1e-4, atol=1e-4)


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


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'options, error, message',
    [
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
        (dict(stem='swin'), ValueError, "stem must be one of conv, patchify, got 'swin'"),
        (dict(downsampler='conv'), ValueError, 'downsampler must be one of fused_mbconv, .*'),
        (dict(odd_blocks='none'), ValueError, 'odd_blocks must be one of global, shifted, local'),
    ],
)
def test_constructor_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        GCViT(**options)


@pytest.mark.parametrize('odd_blocks', ['local', 'global'])
def test_far_tokens_are_seen_through_the_global_query_alone(odd_blocks):
    stage = small(odd_blocks=odd_blocks).double().stages[0]
    torch.manual_seed(0)
    x = torch.randn(1, 24, 24, 32, dtype=torch.float64)
    far = x.clone()
    far[:, 12:, 12:] += 1
    changed = not torch.equal(stage(x)[:, :9, :9], stage(far)[:, :9, :9])
    assert changed == (odd_blocks == 'global')
