import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from mmattn.layers import Mlp


def literal(mlp, x):
    hidden = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    return F.linear(F.gelu(hidden), mlp.fc2.weight, mlp.fc2.bias)


def test_is_its_definition_with_gradients():
    mlp = Mlp(6, 24).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    wanted = x, *mlp.parameters()
    results = []
    for out in (mlp(x), literal(mlp, x)):
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


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
        sizes = sorted(tensor.numel() for tensor in seen.values())
        return out, [size for size in sizes if size >= x.numel()]

    assert kept(mlp)[1] == [70 * 6, 70 * 24]
    assert kept(lambda x: literal(mlp, x))[1] == [70 * 6, 70 * 24, 70 * 24]


def test_nothing_is_recomputed_without_gradients():
    mlp = Mlp(6, 24).requires_grad_(False)
    x = torch.randn(2, 5, 7, 6)
    assert torch.equal(mlp(x), literal(mlp, x))
    assert 'checkpoint' not in str(torch.export.export(mlp, (x,)).graph)
    exported = torch.export.export(mlp.requires_grad_(True), (x,))
    assert 'checkpoint' not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), literal(mlp, x))
