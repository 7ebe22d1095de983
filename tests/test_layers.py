import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mmattn.layers import ConvMlp, ConvNorm, Mlp, ScaledResidual, pad_to_multiple, recompute_gelu

# ----------------------------------------------------------------------------------------- MLP


def reference(mlp, x):
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def gradients(function, mlp, x):
    out = function(x)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (6,), (0, 5, 6)])
@pytest.mark.parametrize('frozen', [False, True])
def test_mlp_equals_the_reference_with_gradients(shape, frozen, recompute):
    mlp = Mlp(6, 24).double()
    mlp.fc2.requires_grad_(not frozen)
    if recompute:
        assert recompute_gelu(mlp) == 1
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = gradients(lambda x: reference(mlp, x), mlp, x)
    torch.testing.assert_close(gradients(mlp, mlp, x), expected, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(mlp, x)


@pytest.mark.parametrize('recompute', [False, True])
def test_mlp_in_mixed_precision(recompute):
    mlp = Mlp(64, 256)
    mlp.recompute = recompute
    x = torch.randn(2, 9, 64, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = [gradients(function, mlp, x) for function in (mlp, lambda x: reference(mlp, x))]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() < 0.01 * expected.norm()


def stored(function, x, parameters):
    """Output, and sizes of the activations that its graph stores, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(x)
    return out, sorted(tensor.numel() for tensor in seen.values())


def test_recomputing_stores_one_hidden_activation():
    mlp, x = Mlp(6, 24), torch.randn(2, 5, 7, 6, requires_grad=True)
    _, plain = stored(mlp, x, mlp.parameters())
    recompute_gelu(mlp)
    _, recomputed = stored(mlp, x, mlp.parameters())
    assert plain == [70 * 6, 70 * 24, 70 * 24]
    assert recomputed == [70 * 6, 70 * 24]


def test_recompute_gelu_refuses_blocks_that_are_recomputed():
    block = nn.Sequential(Mlp(6, 24))
    block.with_cp = True
    with pytest.raises(ValueError, match='with_cp'):
        recompute_gelu(block)


@pytest.mark.parametrize('residual', [False, True])
def test_conv_mlp(residual):
    mlp = ConvMlp(6, 24, residual).double()
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    hidden = mlp.fc1(x)
    convolved = mlp.dwconv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = mlp.fc2(F.gelu(hidden + convolved if residual else convolved))
    torch.testing.assert_close(mlp(x), expected)


def test_export_holds_the_reference():
    mlp, x = Mlp(6, 24), torch.randn(2, 5, 7, 6)
    program = torch.export.export(mlp, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == 'call_function'] == [
        'aten.linear.default', 'aten.gelu.default', 'aten.linear.default'
    ]  # fmt: skip
    torch.testing.assert_close(program.module()(x), mlp(x))


# ---------------------------------------------------------------- padding, strided convolutions


@pytest.mark.parametrize('mode', ['constant', 'replicate'])
def test_pad_to_multiple(mode):
    x = torch.randn(2, 5, 8, 3)
    padded = pad_to_multiple(x, 4, mode)
    assert padded.shape == (2, 8, 8, 3) and torch.equal(padded[:, :5], x)
    expected = x[:, -1:].expand(-1, 3, -1, -1) if mode == 'replicate' else torch.zeros(2, 3, 8, 3)
    assert torch.equal(padded[:, 5:], expected)
    assert pad_to_multiple(padded, 4, mode) is padded


@pytest.mark.parametrize('kernel_size, stride', [(4, 4), (2, 2), (3, 2), (7, 4)])
@pytest.mark.parametrize('size', [(8, 12), (9, 11), (1, 5)])
def test_conv_norm_rounds_sizes_up(kernel_size, stride, size):
    layer = ConvNorm(3, 8, kernel_size, stride)
    out = layer(torch.randn(2, *size, 3))
    assert out.shape == (2, *(-(-side // stride) for side in size), 8)


# ------------------------------------------------------------------------------------ residual


def maps(batch=2):
    return torch.randn(2, batch, 3, 4, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize('mode', ['evaluation', 'training at rate 0'])
def test_is_a_sum_where_nothing_is_dropped(mode):
    module = ScaledResidual(0.5).eval() if mode == 'evaluation' else ScaledResidual(0.0)
    x, branch = maps()
    gamma = torch.randn(5, dtype=torch.float64)
    assert torch.equal(module(x, branch), x + branch)
    torch.testing.assert_close(module(x, branch, gamma), x + gamma * branch)


@pytest.mark.parametrize('scaled', [False, True])
def test_drops_whole_samples_and_keeps_the_mean(scaled):
    module, rate = ScaledResidual(0.25), 0.25
    x, branch = maps(batch=4000)
    gamma = torch.full((5,), 3.0, dtype=torch.float64, requires_grad=True) if scaled else None
    torch.manual_seed(0)
    out = module(x, branch, gamma)
    added = (out - x) / branch
    factor = added[:, 0, 0, 0]
    torch.testing.assert_close(added, factor[:, None, None, None].expand_as(added))
    survivor = (3 if scaled else 1) / (1 - rate)
    kept = torch.isclose(factor, torch.tensor(survivor, dtype=torch.float64))
    assert torch.equal(kept, factor.abs() > 1e-12)
    assert kept.double().mean() == pytest.approx(1 - rate, abs=0.03)
    (gradient,) = torch.autograd.grad(out.sum(), branch, retain_graph=True)
    torch.testing.assert_close(gradient, added)
    if scaled:
        (gradient,) = torch.autograd.grad(out.sum(), gamma)
        expected = (branch[kept] / (1 - rate)).sum((0, 1, 2))
        torch.testing.assert_close(gradient, expected)
