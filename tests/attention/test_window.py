import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.attention import GlobalWindowAttention, WindowAttention


def swin_attention(module, x):
    """Attention of mmdet's Swin with the same weights, on one window of tokens."""
    from mmdet.models.backbones.swin import WindowMSA

    dim, window = x.shape[-1], module.window_size
    swin = WindowMSA(dim, module.num_heads, (window, window)).double()
    swin.load_state_dict(
        module.state_dict() | {'relative_position_index': swin.relative_position_index}
    )
    return swin(x.flatten(1, 2)).view_as(x)


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.double().eval()


def test_equals_mmdets_swin_in_one_window():
    module = randomize(WindowAttention(32, 4, 7))
    x = torch.randn(2, 7, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x), swin_attention(module, x))


def test_padding_is_attended_as_zero_tokens():
    module = randomize(WindowAttention(8, 2, 5))
    x = torch.randn(1, 6, 3, 8, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 4))
    torch.testing.assert_close(module(x), module(padded)[:, :6, :3])


def test_global_attention_with_a_local_query_is_local():
    local, shared = randomize(WindowAttention(8, 2, 4)), randomize(GlobalWindowAttention(8, 2, 4))
    q, k, v = local.qkv.weight.detach().chunk(3)
    local.qkv.bias.data[:8] = 0
    shared.load_state_dict(
        local.state_dict() | {'qkv.weight': torch.cat([k, v]), 'qkv.bias': local.qkv.bias[8:]}
    )
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(shared(x, x @ q.t()), local(x))


def test_global_query_is_shared_by_all_windows():
    module = randomize(GlobalWindowAttention(8, 2, 4))
    window, query = (
        torch.randn(1, 4, 4, 8, dtype=torch.float64),
        torch.randn(1, 4, 4, 8, dtype=torch.float64),
    )
    out = module(window.repeat(1, 2, 3, 1), query)
    torch.testing.assert_close(out, module(window, query).repeat(1, 2, 3, 1))


@pytest.mark.parametrize('height, width', [(14, 21), (10, 13)])
@pytest.mark.parametrize('shift', [3, 4])
def test_tokens_attend_within_their_window_and_region(height, width, shift):
    """Shifted windows of DAT and Swin: tokens from opposite borders do not mix."""
    window, module = 7, randomize(WindowAttention(8, 2, 7, shift=shift))
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    before = module(x)

    def place(index, side):
        """Indices of window and region along an axis of the padded, shifted map."""
        side = -(-side // window) * window
        shifted = (index - shift) % side
        return shifted // window, int(shifted >= side - window) + int(shifted >= side - shift)

    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist()
    places = {(y, x): (place(y, height), place(x, width)) for y, x in cells}
    assert len({(row[1], column[1]) for row, column in places.values()}) >= 6
    for y, column in cells[::5]:
        changed = x.clone()
        changed[0, y, column] += 10
        moved = (module(changed) - before).abs().amax(-1)[0] > 0
        own = {cell for cell in places if places[cell] == places[y, column]}
        assert {(i, j) for i, j in cells if moved[i, j]} == own


@pytest.mark.parametrize('kind', ['local', 'global'])
def test_cost_is_the_papers(kind):
    height, width, dim, window = 14, 21, 64, 7
    x = torch.randn(1, height, width, dim)
    if kind == 'local':
        module, inputs = WindowAttention(dim, 2, window), (x,)
    else:
        module, inputs = (
            GlobalWindowAttention(dim, 2, window),
            (x, torch.randn(1, window, window, dim)),
        )
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    # GC ViT, section 3.3: 2HW(2C^2 + hwC), and HW(3C^2 + 2hwC) with a global query.
    projections = 4 if kind == 'local' else 3
    expected = height * width * (projections * dim**2 + 2 * window**2 * dim)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.no_backend
@pytest.mark.parametrize(
    'arguments, name',
    [
        ((30, 4, 7), 'num_heads'),
        ((32, 0, 7), 'num_heads'),
        ((32, 4, 0), 'window_size'),
        ((32, 4, 7, 7), 'shift'),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        WindowAttention(*arguments)


@pytest.mark.parametrize('size', [(8, 12), (10, 13)])
@pytest.mark.parametrize('shift', [0, 2])
def test_details_are_what_the_output_is_made_of(size, shift):
    """Weights of some tokens times the values of their windows, padding included."""
    torch.manual_seed(0)
    module = WindowAttention(8, 2, 4, shift=shift).double()
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    queries = torch.tensor([0, 5, size[0] * size[1] - 1])
    weights, keys = module.details(x, queries=queries)
    assert weights.shape == (2, 2, 3, 16) and keys.shape == (3, 16)
    tokens = torch.cat([x.flatten(1, 2), torch.zeros(2, 1, 8, dtype=torch.float64)], 1)
    values = module.qkv(tokens)[..., 16:].unflatten(2, (2, 4))[:, keys]  # -1 is the last: zero
    out = torch.einsum('bhnk,bnkhd->bnhd', weights, values).flatten(2)
    torch.testing.assert_close(module.proj(out), module(x).flatten(1, 2)[:, queries])
    everything = module.details(x)
    assert torch.equal(everything.weights[:, :, queries], weights)
    assert torch.equal(everything.keys[queries], keys)
