"""Direct calls of ``torch.ops.mmattn`` with arguments that do not fit: an error, never a crash."""

import faulthandler
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmattn.ops  # noqa: F401  (registers the operators)

CALLS = 1500
SEED = 0
OPERATORS = (
    'window_attention',
    'neighborhood_attention',
    'deform_sample',
    'deform_attention',
    'quadtree_level',
)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.int64, torch.bool)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 7, 2**31, 2**32, 2**62, 2**63 - 1)


def operator(name):
    return getattr(torch.ops.mmattn, name).default


def argument_names(name):
    return [argument.name for argument in operator(name)._schema.arguments]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def inputs_of(name, draw):
    """Arguments that fit, of random small sizes, by name."""
    dtype = draw.choice(FLOATS)
    where = torch.promote_types(dtype, torch.float32)
    batch, heads, d = draw.randint(1, 3), draw.choice((2, 4)), draw.choice((1, 3, 8, 16))

    def tensor(*shape, dtype=dtype):
        return (torch.rand(shape) * 2 - 1).to(dtype)

    if name == 'window_attention':
        height, width, window = draw.randint(1, 7), draw.randint(1, 7), draw.randint(1, 4)
        shared = draw.random() < 0.3
        shift = 0 if shared else draw.randint(0, window - 1)
        k, v = (tensor(batch, height, width, heads, d) for _ in range(2))
        q = tensor(batch, window, window, heads, d) if shared else k.flip(0)
        bias = tensor(heads, window**2, window**2, dtype=where)
        return dict(
            q=q, k=k, v=v, bias=bias, pad_k=tensor(heads, d), pad_v=tensor(heads, d),
            window_size=window, shift=shift,
        )  # fmt: skip
    if name == 'neighborhood_attention':
        kernel = draw.choice((1, 3, 5))
        shape = batch, draw.randint(kernel, 9), draw.randint(kernel, 9), heads, d
        q, k, v = (tensor(*shape) for _ in range(3))
        rpb = tensor(heads, 2 * kernel - 1, 2 * kernel - 1, dtype=where)
        return dict(q=q, k=k, v=v, rpb=rpb, kernel_size=kernel, scale=0.5)
    groups = draw.choice((1, 2))
    if name == 'deform_sample':
        x = tensor(batch, groups * d, draw.randint(1, 6), draw.randint(1, 6))
        if draw.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        return dict(x=x, positions=tensor(batch, groups, draw.randint(0, 9), 2, dtype=where))
    if name == 'deform_attention':
        queries, keys = draw.randint(1, 40), draw.randint(1, 9)
        return dict(
            q=tensor(batch, heads, queries, d),
            k=tensor(batch, heads, keys, d),
            v=tensor(batch, heads, keys, d),
            table=tensor(heads, draw.randint(1, 7), draw.randint(1, 7), dtype=where),
            query_grid=tensor(queries, 2, dtype=where),
            key_positions=tensor(batch, groups, keys, 2, dtype=where),
            scale=0.5,
        )
    assert name == 'quadtree_level'
    count, families, key_families = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 5)
    type_a = draw.random() < 0.5
    return dict(
        queries=tensor(batch, count, 4, heads, d),
        keys=tensor(batch, 4 * key_families, heads, d),
        values=tensor(batch, 4 * key_families, heads, d),
        parents=torch.randint(key_families, (batch, count, families, heads)),
        parent_scores=tensor(batch, count, families, heads, dtype=where) if type_a else None,
        padding=torch.rand(4 * key_families) < 0.3 if draw.random() < 0.5 else None,
        topk=draw.randint(0, 5),
        with_scores=draw.random() < 0.5,
    )


def valid_call(draw):
    """Name and arguments, by name, of a call that fits."""
    name = draw.choice(OPERATORS)
    inputs = inputs_of(name, draw)
    if draw.random() < 0.5:
        return name, inputs
    outputs = as_tuple(operator(name)(*inputs.values()))
    own = argument_names(f'{name}_backward')
    upstream = [x for x in own if x.startswith('grad_')]
    saved = own[len(upstream) + len(inputs) :]
    # The outputs with a gradient come first, the saved ones last.
    values = [torch.ones_like(x) for x in outputs[: len(upstream)]]
    values += [*inputs.values(), *outputs[len(outputs) - len(saved) :]]
    return f'{name}_backward', dict(zip(own, values, strict=True))


def unfit(value, draw):
    """The value of an argument, changed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice((0.0, -1.0, float('inf'), float('nan'), 1e300))
    if value is None:
        shape = [draw.randint(0, 12) for _ in range(draw.choice((1, 4)))]
        return torch.ones(shape).to(draw.choice(DTYPES))
    shape, dtype = list(value.shape), value.dtype
    kind = draw.choice(('size', 'size', 'size', 'dtype', 'dtype', 'rank', 'empty', 'values'))
    if kind == 'values' and dtype in (torch.int32, torch.int64):
        return torch.full_like(value, draw.choice((-1, -(2**31), 5000, 2**31 - 1, 2)))
    if kind == 'values':
        return value.expand(2, *shape)[1]  # an overlapping view, of other strides
    if kind == 'dtype':
        return value.to(draw.choice(DTYPES))
    if kind == 'empty':
        return torch.empty(0, dtype=dtype)
    if kind == 'rank':
        return value[0] if shape and shape[0] and draw.random() < 0.5 else value[None]
    if not shape:
        return value
    place = draw.randrange(len(shape))
    n = shape[place]
    shape[place] = draw.choice((0, 1, max(n - 1, 0), n + 1, 2 * n, n + 4, 64))
    return torch.ones(shape).to(dtype)


def random_call(index):
    """Call ``index``: one that fits, with one or two arguments changed; name, arguments."""
    draw = random.Random(SEED * 10**6 + index)
    torch.manual_seed(index)
    name, arguments = valid_call(draw)
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.15:
            one, other = draw.sample(
                [n for n, x in arguments.items() if isinstance(x, torch.Tensor)], 2
            )
            arguments[one], arguments[other] = arguments[other], arguments[one]
        else:
            changed = draw.choice(list(arguments))
            arguments[changed] = unfit(arguments[changed], draw)
    return name, arguments


def describe(value):
    return f'{value.dtype} {tuple(value.shape)}' if isinstance(value, torch.Tensor) else value


def on_meta(value):
    return value.to('meta') if isinstance(value, torch.Tensor) else value


def run_calls(first, end, record):
    """Run calls in this process; the file ``record`` has the one that is running."""
    faulthandler.enable()
    results = Counter()
    for index in range(first, end):
        name, arguments = random_call(index)
        shown = ', '.join(f'{n}={describe(x)}' for n, x in arguments.items())
        Path(record).write_text(f'{index}: {name}({shown})')
        try:
            outputs = operator(name)(*arguments.values())
        except (RuntimeError, ValueError, TypeError) as error:
            results['refused'] += 1
            named = '|'.join(argument_names(name))
            assert re.search(rf'\b({named})\b', str(error)), str(error)
            continue
        results['accepted'] += 1
        expected = operator(name)(*map(on_meta, arguments.values()))
        for own, other in zip(as_tuple(outputs), as_tuple(expected), strict=True):
            assert own.dtype == other.dtype
            assert own.shape == other.shape or own.numel() == other.numel() == 0
    Path(record).write_text('after the last call')
    print(results['refused'], results['accepted'])


def test_calls_that_do_not_fit_are_refused(tmp_path):
    record = tmp_path / 'call.txt'
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, __file__, '0', str(CALLS), str(record)],
        env=os.environ | dict(PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    called = record.read_text() if record.exists() else 'before the first call'
    assert done.returncode == 0, f'{called}\n{done.stderr[-3000:]}'
    refused, accepted = map(int, done.stdout.split())
    assert refused + accepted == CALLS
    assert refused > CALLS // 2 and accepted > CALLS // 20


def test_calls_that_fit_are_accepted():
    for index in range(200):
        torch.manual_seed(index)
        name, arguments = valid_call(random.Random(index))
        outputs = as_tuple(operator(name)(*arguments.values()))
        expected = as_tuple(operator(name)(*map(on_meta, arguments.values())))
        assert [x.shape for x in outputs] == [x.shape for x in expected]


def call_of(name):
    """The first random call of this name that fits; where it matters, of type A that chooses."""
    for index in range(1000):
        torch.manual_seed(index)
        found, arguments = valid_call(random.Random(index))
        if found == name and ('kept' not in arguments or arguments['kept'].numel()):
            return arguments
    raise AssertionError(f'no call of {name}')


UNFIT = {
    'window_attention': dict(
        window_size=(0, 'window_size must be from 1 to 32768, got 0'),
        shift=(-2, 'shift must be from 0 to .*, got -2'),
        bias=(lambda x: x[:-1], r'bias must have the shape \(.*\), got \('),
        pad_k=(lambda x: x[:, :0], r'pad_k must have the shape \(.*\), got \(., 0\)'),
        k=(lambda x: x.to(torch.uint8), 'k must be float32, float64, float16 or bfloat16, got'),
    ),
    'window_attention_backward': dict(
        lse=(lambda x: x.to(torch.float8_e4m3fn), 'lse must be .*, got Float8_e4m3fn'),
        grad_out=(lambda x: x[..., :0], 'grad_out must have the shape'),
    ),
    'neighborhood_attention': dict(
        kernel_size=(2, 'kernel_size must be odd, positive and at most'),
        rpb=(lambda x: x[:, 1:], 'rpb must have the shape'),
    ),
    'neighborhood_attention_backward': dict(out=(lambda x: x[:, :0], 'out must have the shape')),
    'deform_sample': dict(
        positions=(lambda x: x[:, :0], 'groups of positions, got .* and 0'),
    ),
    'deform_sample_backward': dict(
        grad_sampled=(lambda x: x[:, :0], 'grad_sampled must have the shape'),
        positions=(lambda x: x.to(torch.uint8), 'positions must be (Float|Double), got Byte'),
    ),
    'deform_attention': dict(
        table=(
            lambda x: x[:, :1, :1].expand(-1, 46400, 46400),
            r'table must have fewer than 2\*\*',
        ),
        key_positions=(lambda x: x[:, :1].expand(-1, 64, -1, -1), 'groups of key_positions'),
        query_grid=(lambda x: x[:0], 'query_grid must have the shape'),
    ),
    'deform_attention_backward': dict(lse=(lambda x: x[..., :0], 'lse must have the shape')),
    'quadtree_level': dict(
        topk=(-1, 'topk must be at least 0'),
        parents=(lambda x: torch.full_like(x, 10**6), 'parents must be indices from 0 to'),
        values=(lambda x: x[:, :-1], 'values must have the shape'),
    ),
    'quadtree_level_backward': dict(
        kept=(lambda x: torch.full_like(x, 5000), 'kept must be candidates from 0 to'),
        parent_scores=(lambda x: x[:, :, :0], 'parent_scores must have the shape'),
    ),
}


@pytest.mark.parametrize('name', UNFIT)
def test_errors_say_what_is_expected(name):
    for argument, (change, message) in UNFIT[name].items():
        arguments = call_of(name)
        value = arguments[argument]
        arguments[argument] = change(value) if callable(change) else change
        with pytest.raises(RuntimeError, match=message):
            operator(name)(*arguments.values())


if __name__ == '__main__':
    run_calls(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
