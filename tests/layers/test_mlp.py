import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from mmattn.layers import Mlp


def literal(mlp, x):
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def gradients(function, mlp, x):
    out = function(x)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (6,), (0, 5, 6)])
@pytest.mark.parametrize('frozen', [False, True])
def test_is_its_definition_with_gradients(shape, frozen):
    mlp = Mlp(6, 24).double()
    mlp.fc2.requires_grad_(not frozen)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = gradients(lambda x: literal(mlp, x), mlp, x)
    torch.testing.assert_close(gradients(mlp, mlp, x), expected, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(mlp, x) and torch.autograd.gradgradcheck(mlp, x)


def test_mixed_precision():
    mlp = Mlp(64, 256)
    x = torch.randn(2, 9, 64, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = [gradients(function, mlp, x) for function in (mlp, lambda x: literal(mlp, x))]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() < 0.01 * expected.norm()


def test_keeps_one_map_of_the_hidden_width():
    mlp = Mlp(6, 24)
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in mlp.parameters()}

    def kept(function):
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x)
        return out, sorted(tensor.numel() for tensor in seen.values())

    assert kept(mlp)[1] == [70 * 6, 70 * 24]
    assert kept(lambda x: literal(mlp, x))[1] == [70 * 6, 70 * 24, 70 * 24]


def test_export_holds_the_definition():
    mlp, x = Mlp(6, 24), torch.randn(2, 5, 7, 6)
    program = torch.export.export(mlp, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == 'call_function'] == [
        'aten.linear.default', 'aten.gelu.default', 'aten.linear.default'
    ]  # fmt: skip
    torch.testing.assert_close(program.module()(x), mlp(x))


@pytest.mark.parametrize('name', ['act', 'fc2'])
def test_layers_in_their_place_and_hooks_are_called(name):
    """An adapter that training passed by would be trained by nothing."""
    mlp, x = Mlp(6, 24), torch.randn(2, 6, requires_grad=True)
    calls = []
    getattr(mlp, name).register_forward_hook(lambda *_: calls.append(name))
    mlp(x)
    assert calls == [name]
    mlp = Mlp(6, 24)
    setattr(mlp, name, torch.nn.Sequential(getattr(mlp, name), torch.nn.Tanh()))
    torch.testing.assert_close(mlp(x), mlp(x.detach()))
