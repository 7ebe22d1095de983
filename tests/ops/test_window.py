import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.ops import window_attention, window_attention_reference


def make(
    batch=2, height=11, width=9, heads=3, d=4, window=7, shared=False, dtype=torch.float64, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    q_size = (window, window) if shared else (height, width)
    return dict(
        q=draw(batch, *q_size, heads, d),
        k=draw(batch, height, width, heads, d),
        v=draw(batch, height, width, heads, d),
        bias=draw(heads, window**2, window**2),
        pad_k=draw(heads, d),
        pad_v=draw(heads, d),
    )


def token_by_token(q, k, v, bias, window, shift, pad_k, pad_v):
    """Window attention by loops over queries, keys and heads."""
    batch, height, width, heads, _ = k.shape
    rows, columns = -(-height // window) * window, -(-width // window) * window
    shared = q.shape[1:3] != k.shape[1:3]
    out = torch.empty_like(v)

    def region(place, side):
        return int(place >= side - window) + int(place >= side - shift) if shift else 0

    for b, y, x, h in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, height, width, heads))
    ).tolist():
        ys, xs = (y - shift) % rows, (x - shift) % columns  # the token after the shift
        top, left = ys // window * window, xs // window * window
        n = (ys - top) * window + xs - left
        query = q[b, ys - top, xs - left, h] if shared else q[b, y, x, h]
        scores, values = [], []
        for m in range(window**2):
            yk, xk = top + m // window, left + m % window
            yo, xo = (yk + shift) % rows, (xk + shift) % columns  # the key before the shift
            inside = yo < height and xo < width
            key = k[b, yo, xo, h] if inside else pad_k[h]
            same = region(yk, rows) == region(ys, rows) and region(xk, columns) == region(
                xs, columns
            )
            scores.append(
                query @ key / query.numel() ** 0.5 + bias[h, n, m] + (0 if same else -100)
            )
            values.append(v[b, yo, xo, h] if inside else pad_v[h])
        out[b, y, x, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize('attention', [window_attention, window_attention_reference])
@pytest.mark.parametrize(
    'height, width, window, shift, shared',
    [
        (4, 6, 2, 0, False),
        (5, 3, 4, 0, False),
        (5, 7, 3, 2, False),
        (3, 3, 3, 1, False),
        (5, 7, 3, 0, True),
    ],
)
def test_definition_token_by_token(attention, height, width, window, shift, shared):
    inputs = make(1, height, width, 2, 4, window, shared)
    with torch.no_grad():
        expected = token_by_token(window=window, shift=shift, **inputs)
        actual = attention(window_size=window, shift=shift, **inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_gradcheck():
    inputs = make(1, 3, 4, 2, 2, window=2)
    names = list(inputs)

    def function(*tensors):
        return window_attention(window_size=2, shift=1, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_one_window_over_the_map_is_plain_attention():
    inputs = make(2, 5, 5, 3, 4, window=5)
    out = window_attention(window_size=5, **inputs)
    q, k, v = (inputs[name].flatten(1, 2).transpose(1, 2) for name in 'qkv')
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=inputs['bias'])
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), plain)


def test_padding_is_not_read_where_windows_tile_the_map():
    inputs = make(1, 4, 6, window=2)
    out = window_attention(window_size=2, **inputs)
    inputs['pad_k'], inputs['pad_v'] = torch.full((2, 3, 4), torch.nan, dtype=torch.float64)
    assert torch.equal(window_attention(window_size=2, **inputs), out)


def test_no_information_crosses_the_shift():
    inputs = make(1, 8, 8, window=4)
    before = window_attention(window_size=4, shift=2, **inputs)
    changed = inputs['v'].detach().clone()
    changed[:, :2] += 100  # rows that the shift moves to the other end
    after = window_attention(window_size=4, shift=2, **(inputs | {'v': changed}))
    moved = (after - before).abs().amax(dim=(0, 2, 3, 4))
    assert (moved[:2] > 1).all() and (moved[2:] == 0).all()


def test_batches_and_windows_do_not_mix():
    inputs = make(2, 6, 6, window=3)
    alone = {name: t[1:] if t.ndim == 5 else t for name, t in inputs.items()}
    torch.testing.assert_close(
        window_attention(window_size=3, **inputs)[1:], window_attention(window_size=3, **alone)
    )


def test_empty_batch():
    assert window_attention(window_size=7, **make(batch=0)).shape == (0, 11, 9, 3, 4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('window', [7, 16])
def test_lower_precision(dtype, window):
    inputs = make(window=window)
    expected = window_attention_reference(window_size=window, **inputs)
    low = {name: t.detach().to(dtype) for name, t in inputs.items()}
    actual = window_attention(window_size=window, **low)
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize('window', [7, 16])
def test_flops_are_counted_without_gradients_too(window):
    inputs = make(1, window, 2 * window, 2, 8, window, dtype=torch.float32)
    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            window_attention(window_size=window, **inputs)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * (2 * window**2) * window**2 * 2 * 8] * 2


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(q=torch.zeros(2, 5, 5, 3, 4)),
            r'q must be .*\(2, 11, 9, 3, 4\).* got \(2, 5, 5, 3, 4\)',
        ),
        (dict(v=torch.zeros(2, 11, 9, 3, 5)), r'k and v .*\(2, 11, 9, 3, 5\)'),
        (dict(bias=torch.zeros(3, 49, 48)), r'bias .*\(3, 49, 49\).* got \(3, 49, 48\)'),
        (dict(shift=7), r'shift .* got 7'),
        (dict(pad_k=torch.zeros(3)), r'pad_k .*\(3, 4\), got \(3,\)'),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        window_attention(**(make() | dict(window_size=7) | change))


def test_a_shared_query_cannot_be_shifted():
    with pytest.raises(ValueError, match='shared query'):
        window_attention(window_size=7, shift=3, **make(shared=True))
