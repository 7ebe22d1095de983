import pytest
import torch

from mmattn.attention import NeighborhoodAttention
from mmattn.ops import neighborhood_attention


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(height=5, width=6, kernel=3):
    q, k, v = (draw(2, height, width, 2, 4, seed=seed) for seed in range(3))
    return q, k, v, draw(2, 2 * kernel - 1, 2 * kernel - 1, seed=3), kernel, 0.5


def test_definition_token_by_token():
    q, k, v, rpb, kernel, scale = make()
    expected = torch.empty_like(q)
    for y, x, h in torch.cartesian_prod(torch.arange(5), torch.arange(6), torch.arange(2)).tolist():
        top, left = min(max(y - 1, 0), 5 - 3), min(max(x - 1, 0), 6 - 3)
        places = [(i, j) for i in range(top, top + 3) for j in range(left, left + 3)]
        keys = torch.stack([k[:, i, j, h] for i, j in places], 1)
        values = torch.stack([v[:, i, j, h] for i, j in places], 1)
        bias = torch.stack([rpb[h, i - y + 2, j - x + 2] for i, j in places])
        weights = (scale * torch.einsum('bd,bnd->bn', q[:, y, x, h], keys) + bias).softmax(-1)
        expected[:, y, x, h] = torch.einsum('bn,bnd->bd', weights, values)
    torch.testing.assert_close(neighborhood_attention(q, k, v, rpb, kernel, scale), expected)


def test_a_kernel_over_the_map_is_plain_attention():
    q, k, v, rpb, kernel, scale = make(3, 3)
    flat = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(*flat, scale=scale)
    out = neighborhood_attention(q, k, v, torch.zeros_like(rpb), kernel, scale)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), plain)


def test_gradcheck():
    q, k, v, rpb, kernel, scale = make(3, 4)
    tensors = [t[:1].detach().requires_grad_() for t in (q, k, v)] + [rpb.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attention(*t, kernel, scale), tensors)


def test_smaller_maps_are_padded_with_zero_tokens():
    module = NeighborhoodAttention(8, 2).double()
    x = draw(1, 4, 9, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3))
    torch.testing.assert_close(module(x), module(padded)[:, :4])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(k=torch.zeros(2, 5, 5, 2, 4)), r'q, k and v .*\(2, 5, 5, 2, 4\)'),
        (dict(kernel_size=4), 'kernel_size must be odd and positive, got 4'),
        (dict(kernel_size=7), 'q must be at least kernel_size 7 .* got a map of 5 x 6'),
        (
            dict(rpb=torch.zeros(2, 5, 4)),
            r'rpb must be \(heads, N, N\) = \(2, 5, 5\), got \(2, 5, 4\)',
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    names = ('q', 'k', 'v', 'rpb', 'kernel_size', 'scale')
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**(dict(zip(names, make(), strict=True)) | change))


@pytest.mark.parametrize('arguments, name', [((30, 4), 'num_heads'), ((32, 4, 6), 'kernel_size')])
def test_module_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        NeighborhoodAttention(*arguments)
