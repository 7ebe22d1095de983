import pytest
import torch

from mmattn.ops import deform_attention, deform_sample


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sampling_at_cell_centers_reads_the_cells():
    x = draw(2, 6, 3, 5)
    y, x_ = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 5), indexing='ij')
    positions = torch.stack([y, x_], -1).flatten(0, 1).double().expand(2, 3, -1, -1)
    torch.testing.assert_close(deform_sample(x, positions), x.flatten(2))


def test_each_group_is_sampled_at_its_own_positions():
    x, positions = draw(1, 4, 3, 3), torch.tensor([[[[-1.0, -1.0]], [[1.0, 0.0]]]]).double()
    out = deform_sample(x, positions)
    assert out[0, :2, 0].tolist() == x[0, :2, 0, 0].tolist()
    assert out[0, 2:, 0].tolist() == x[0, 2:, 2, 1].tolist()


def test_outside_the_map_is_zero():
    positions = torch.tensor([[[[1.0 + 2 / 2, 0.0], [0.0, -3.0], [1.5, 0.0]]]]).double()
    out = deform_sample(torch.ones(1, 1, 3, 3).double(), positions)
    assert out[0, 0].tolist() == [0, 0, 0.5]  # one cell, many cells, half a cell outside


def test_sample_gradcheck():
    x, positions = draw(1, 4, 3, 4).requires_grad_(), (draw(1, 2, 3, 2) * 0.4).requires_grad_()
    assert torch.autograd.gradcheck(deform_sample, (x, positions))


def test_bfloat16_maps_are_sampled_at_float32_positions():
    x, positions = draw(1, 2, 9, 9), draw(1, 1, 50, 2) / 2
    exact = deform_sample(x, positions)
    low = deform_sample(x.bfloat16(), positions.float())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * x.abs().max()


def attention_inputs():
    q, k, v = draw(2, 4, 6, 3), draw(2, 4, 5, 3, seed=1), draw(2, 4, 5, 3, seed=2)
    return q, k, v, draw(4, 7, 5, seed=3), draw(6, 2, seed=4) / 2, draw(2, 2, 5, 2, seed=5) / 2


def test_attention_gradcheck():
    inputs = [t.requires_grad_(i != 4) for i, t in enumerate(attention_inputs())]
    assert torch.autograd.gradcheck(lambda *t: deform_attention(*t, 0.5), inputs)


def test_a_constant_table_is_no_bias_inside_it():
    q, k, v, table, grid, positions = attention_inputs()
    out = deform_attention(
        q, k, v, torch.ones_like(table), grid.clamp(-1, 1), positions.clamp(-1, 1), 0.5
    )
    torch.testing.assert_close(out, torch.softmax(0.5 * q @ k.transpose(2, 3), -1) @ v)


@pytest.mark.parametrize(
    'index, replacement, message',
    [
        (1, torch.zeros(2, 4, 5, 2), r'k must be \(2, 4, Nk, 3\), got \(2, 4, 5, 2\)'),
        (2, torch.zeros(2, 4, 6, 3), r'v must be .* = \(2, 4, 5, 3\), got \(2, 4, 6, 3\)'),
        (3, torch.zeros(3, 7, 5), r'table must be \(4, Th, Tw\), got \(3, 7, 5\)'),
        (4, torch.zeros(5, 2), r'query_grid must be \(Nq, 2\) = \(6, 2\), got \(5, 2\)'),
        (5, torch.zeros(2, 2, 4, 2), r'key_positions must be \(2, G, 5, 2\), got \(2, 2, 4, 2\)'),
        (5, torch.zeros(2, 3, 5, 2), '4 heads are no multiple of the 3 groups'),
    ],
)
def test_attention_errors_name_the_argument(index, replacement, message):
    inputs = list(attention_inputs())
    inputs[index] = replacement.double()
    with pytest.raises(ValueError, match=message):
        deform_attention(*inputs, 0.5)


@pytest.mark.parametrize(
    'x, positions, message',
    [
        ((4, 3, 3), (1, 1, 2, 2), r'x must be \(B, G\*c, H, W\), got \(4, 3, 3\)'),
        ((1, 4, 3, 3), (2, 1, 2, 2), r'positions must be \(1, G, N, 2\)'),
        ((1, 4, 3, 3), (1, 3, 2, 2), 'no multiple of the 3 groups'),
    ],
)
def test_sample_errors_name_the_argument(x, positions, message):
    with pytest.raises(ValueError, match=message):
        deform_sample(torch.zeros(x), torch.zeros(positions))
