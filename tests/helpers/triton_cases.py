"""Program that runs cases of test_triton.py: ``values``, or ``compile ARCHITECTURE``.

It prints a line of JSON per case: the name, and null or the traceback. ``values`` needs
TRITON_INTERPRET=1, which Triton reads when kernels are defined, and ``compile`` needs it unset:
hence a process for each. Importing this module needs no Triton.
"""

import json
import sys
import traceback

import torch

# Maps that windows tile or not, smaller than a window, one window; one tile or several; every d.
# name: (batch, height, width, heads, d, window, shift, shared query, dtype, special inputs)
WINDOWS = {
    'tiled': (2, 4, 4, 1, 8, 2, 0, False, 'float32', 'padding of NaN, which is not read'),
    'padded': (2, 5, 7, 1, 8, 3, 0, False, 'float32', ''),
    'padded-shift': (2, 5, 7, 1, 8, 3, 2, False, 'float64', ''),
    'tiled-shift': (1, 8, 8, 1, 8, 4, 2, False, 'float32', ''),
    'smaller-than-window': (1, 5, 3, 2, 40, 7, 0, False, 'float32', ''),
    'smaller-than-window-shift': (1, 5, 3, 1, 40, 7, 3, False, 'float32', ''),
    'one-window': (1, 4, 4, 2, 32, 4, 0, False, 'float64', ''),
    'one-token': (1, 1, 1, 1, 1, 1, 0, False, 'float64', ''),
    'shared': (2, 5, 7, 1, 8, 3, 0, True, 'float64', ''),
    'shared-single': (1, 5, 7, 2, 8, 3, 0, True, 'float32', ''),
    'several-tiles': (1, 12, 9, 1, 8, 9, 4, False, 'float64', ''),
    'several-tiles-shared': (1, 12, 9, 1, 8, 9, 0, True, 'float32', ''),
    'several-tiles-even': (1, 8, 8, 1, 32, 8, 0, False, 'float32', ''),
    'half': (1, 11, 9, 2, 32, 7, 3, False, 'float16', ''),
    'half-several-tiles': (1, 11, 9, 1, 32, 9, 0, True, 'float16', ''),
    'offset': (1, 5, 7, 2, 8, 3, 0, False, 'float64', 'scores of 1e4 and -1e4'),
    'offset-several-tiles': (1, 7, 7, 2, 8, 7, 0, False, 'float64', 'scores of 1e4 and -1e4'),
    'expanded-gradient': (1, 5, 7, 2, 8, 3, 0, False, 'float32', 'expanded gradient'),
    'empty': (0, 5, 7, 2, 8, 3, 1, False, 'float32', ''),
    'empty-shared': (0, 5, 7, 2, 8, 3, 0, True, 'float16', ''),
}

# name: (batch, heads, queries, keys, d, groups, table, dtype, spread of positions, special inputs)
DEFORMED = {
    'small': (2, 4, 6, 5, 8, 2, (7, 5), 'float32', 1, ''),
    'small-double': (2, 4, 6, 5, 8, 2, (7, 5), 'float64', 1, ''),
    'several-tiles': (1, 2, 70, 75, 40, 1, (13, 13), 'float32', 1, ''),
    'several-tiles-double': (1, 2, 40, 35, 32, 2, (5, 13), 'float64', 1, ''),
    'outside': (1, 2, 33, 17, 16, 1, (9, 9), 'float32', 4, ''),
    'far-outside': (1, 1, 9, 17, 8, 1, (9, 9), 'float64', 1e12, ''),
    'one-key': (1, 2, 3, 1, 32, 1, (3, 3), 'float64', 1, ''),
    'one-query': (1, 1, 1, 5, 1, 1, (1, 4), 'float64', 1, ''),
    'half': (1, 2, 70, 75, 32, 1, (13, 13), 'float16', 1, ''),
    'offset': (1, 2, 20, 37, 8, 1, (9, 9), 'float64', 0.2, 'scores of 1e4 and -1e4'),
    'expanded-gradient': (1, 2, 6, 5, 8, 1, (7, 5), 'float32', 1, 'expanded gradient'),
    'empty': (0, 2, 6, 5, 8, 1, (7, 5), 'float32', 1, ''),
}

# Kernels by case: windows of one tile with a shared query, windows of several tiles with a shift,
# and deformable attention. 49 tokens of float32 are more than one tile.
COMPILED = {
    'window-small': ['_backward_whole', '_forward'],
    'window-large': ['_backward_bias', '_backward_key', '_backward_query', '_forward'],
    'deformed': ['_backward_key', '_backward_query', '_forward'],
}
WINDOW = {'float16': 7, 'bfloat16': 7, 'float32': 5}
COMPILED_TYPES = ('float16', 'bfloat16', 'float32')
ARCHITECTURES = (80, 90, 100)
# Bytes per program on sm_86 and sm_89, which have the least of the supported GPUs.
SHARED_MEMORY = 99 * 1024


def window_inputs(batch, height, width, heads, d, window, shared, dtype, special=''):
    """Inputs strided as in the modules: q, k and v views of one tensor, heads last in the bias."""
    dtype = getattr(torch, dtype)
    draw = drawer(dtype)
    q, k, v = draw(batch, height, width, 3, heads, d).unbind(3)
    if shared:
        q = draw(batch, window, window, heads, d)
    bias = draw(window**2, window**2, heads).permute(2, 0, 1)
    bias = bias.to(torch.promote_types(dtype, torch.float32))
    if 'scores' in special:
        bias += 1e4 - 2e4 * (torch.arange(window**2) % 2)[:, None]
    pad_k, pad_v = draw(2, heads, d) * (torch.nan if 'NaN' in special else 1)
    return q, k, v, bias, pad_k, pad_v


def deform_inputs(batch, heads, queries, keys, d, groups, table, dtype, spread=1, special=''):
    """Inputs strided as in the module: q from channel-last maps, k and v from channel-first."""
    dtype = getattr(torch, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    draw = drawer(dtype)
    q = draw(batch, queries, heads, d).transpose(1, 2)
    k, v = (draw(batch, heads, d, keys).transpose(2, 3) for _ in 'kv')
    table, grid = draw(heads, *table).to(exact), draw(queries, 2).to(exact) * spread
    positions = draw(batch, groups, keys, 2).to(exact) * spread
    if 'scores' in special:
        table += 1e4 - 2e4 * (torch.arange(heads) % 2)[:, None, None]
        grid, positions = grid.clamp(-1, 1), positions.clamp(-1, 1)
    return q, k, v, table, grid, positions


def drawer(dtype):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient_like(out, special):
    if 'expanded' in special:
        return out.new_full((), 0.5).expand(out.shape)
    return drawer(out.dtype)(*out.shape[::-1]).permute(*reversed(range(out.ndim)))


def differentiate(function, inputs, grad, count):
    """The reference and its gradients in float64."""
    inputs = [t.double().requires_grad_(i < count) for i, t in enumerate(inputs)]
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs[:count], grad.double(), allow_unused=True)
    return out.detach(), *(
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=False)
    )


def check(actual, expected, inputs, dtype):
    dtype = getattr(torch, dtype)
    for x, like in zip(actual[1:], inputs, strict=False):
        assert x.dtype == like.dtype and x.shape == like.shape
    for x, e in zip(actual, expected, strict=True):
        assert x.shape == e.shape and x.isfinite().all()
        error, size = (x.double() - e).abs(), e.abs()
        if not e.numel():
            continue
        if dtype == torch.float16:
            assert error.norm() <= 2 * torch.finfo(dtype).eps * size.norm(), (
                error.norm() / size.norm()
            )
        else:
            tolerance = 1e-5 if dtype == torch.float32 else 1e-10
            assert error.max() <= tolerance * max(1, size.max()), error.max()


def window_values(batch, height, width, heads, d, window, shift, shared, dtype, special):
    from mmattn.ops import window_attention_reference
    from mmattn.ops.triton import window_attention_backward, window_attention_forward

    inputs = window_inputs(batch, height, width, heads, d, window, shared, dtype, special)
    out, lse = window_attention_forward(*inputs, window, shift)
    grad = gradient_like(out, special)
    actual = out, *window_attention_backward(grad, *inputs, out, lse, window, shift)

    def reference(q, k, v, bias, pad_k, pad_v):
        return window_attention_reference(q, k, v, bias, window, shift, pad_k, pad_v)

    check(actual, differentiate(reference, inputs, grad, 6), inputs, dtype)
    assert lse.shape == out.shape[:-1] and lse.dtype == inputs[3].dtype
    if height == width == window:
        q, k = (t.double().flatten(1, 2).transpose(1, 2) for t in inputs[:2])
        scores = q @ k.transpose(2, 3) / d**0.5 + inputs[3].double()
        expected = scores.logsumexp(-1).transpose(1, 2).reshape(lse.shape)
        check((lse,), (expected,), (), dtype)


def deform_values(batch, heads, queries, keys, d, groups, table, dtype, spread, special):
    from mmattn.ops import deform_attention_reference, deform_bias
    from mmattn.ops.triton import deform_attention_backward, deform_attention_forward

    inputs = deform_inputs(batch, heads, queries, keys, d, groups, table, dtype, spread, special)
    scale = d**-0.5
    out, lse = deform_attention_forward(*inputs, scale)
    grad = gradient_like(out, special)
    actual = out, *deform_attention_backward(grad, *inputs, out, lse, scale)

    def reference(*tensors):
        return deform_attention_reference(*tensors, scale)

    if batch:  # grid_sample takes no empty batch
        check(actual, differentiate(reference, inputs, grad, 3), inputs, dtype)
        q, k = inputs[0].double(), inputs[1].double()
        scores = scale * q @ k.transpose(2, 3) + deform_bias(*(t.double() for t in inputs[3:]))
        check((lse,), (scores.logsumexp(-1),), (), dtype)
    else:
        assert [x.shape for x in actual] == [inputs[0].shape, *(t.shape for t in inputs[:3])]


def registered():
    """Call the kernels through the dispatcher; the CUDA kernel gives deform_bias's gradients."""
    from helpers import cuda_on_host
    from mmattn import ops
    from mmattn.ops import triton

    triton.register('CPU')
    by_position = cuda_on_host.operators().deform_bias_backward
    torch.library.impl('mmattn::deform_bias_backward', 'CPU')(by_position)

    def compare(function, reference, inputs):
        grad = drawer(inputs[0].dtype)(*reference(*inputs).shape)
        results = []
        for f in (function, reference):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            out = f(*leaves)
            gradients = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
            results.append((out, *gradients))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    q, k, v, table, grid, positions = deform_inputs(1, 2, 6, 5, 8, 1, (7, 5), 'float64')
    compare(
        lambda q, k, v, table, at: ops.deform_attention(q, k, v, table, grid, at, 0.5),
        lambda q, k, v, table, at: ops.deform_attention_reference(q, k, v, table, grid, at, 0.5),
        (q, k, v, table, positions),
    )
    inputs = window_inputs(1, 5, 7, 2, 8, 3, False, 'float64')
    compare(
        lambda q, k, v, bias, *pads: ops.window_attention(q, k, v, bias, 3, 1, *pads),
        lambda q, k, v, bias, *pads: ops.window_attention_reference(q, k, v, bias, 3, 1, *pads),
        inputs,
    )


def large_table():
    from mmattn.ops.triton import deform_attention_forward

    inputs = list(deform_inputs(1, 1, 2, 2, 8, 1, (1, 1), 'float32'))
    inputs[3] = torch.zeros(1, 1, 1).expand(1, 4096, 4096)
    try:
        deform_attention_forward(*inputs, 1.0)
    except ValueError as error:
        assert '(4096, 4096)' in str(error)
    else:
        raise AssertionError('no error')


def repeated():
    """Equal bits in two runs, with several partial sums."""
    from mmattn.ops.triton import window_attention_backward, window_attention_forward

    inputs = window_inputs(1, 7, 5, 1, 8, 3, True, 'float32')
    out, lse = window_attention_forward(*inputs, 3, 0)
    once, twice = (window_attention_backward(out, *inputs, out, lse, 3, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def run_compiled(name, dtype, batch, height, width):
    from mmattn.ops import triton as kernels

    if name == 'deformed':
        inputs = deform_inputs(batch, 6, height * width, height * 9, 32, 3, (27, width), dtype)
        settings = (0.5,)
        forward, backward = kernels.deform_attention_forward, kernels.deform_attention_backward
    else:
        shared = name == 'window-small'
        window = WINDOW[dtype] if shared else 24
        inputs = window_inputs(batch, height, width, 2, 32, window, shared, dtype)
        settings = (window, 0 if shared else 12)
        forward, backward = kernels.window_attention_forward, kernels.window_attention_backward
    out, lse = forward(*inputs, *settings)
    backward(out, *inputs, out, lse, *settings)


def compile_case(name, dtype, compiled):
    """Compile all kernels of a case; ``compiled`` receives them at their launch."""
    compiled.clear()
    run_compiled(name, dtype, 2, 32, 50)
    kernels = dict(compiled)
    assert sorted(kernels) == COMPILED[name]
    for kernel, binary in kernels.items():
        assert binary.asm['cubin']
        assert binary.metadata.shared <= SHARED_MEMORY, (kernel, binary.metadata.shared)
    run_compiled(name, dtype, 1, 51, 27)
    for kernel, binary in compiled.items():
        assert binary is kernels[kernel], f'{kernel} is compiled again for another image size'


class Compiler:
    """Stand-in for the driver of a GPU for which kernels are compiled, but not launched."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget('cuda', architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def value_cases():
    for name, case in WINDOWS.items():
        yield f'window-{name}', window_values, case
    for name, case in DEFORMED.items():
        yield f'deformed-{name}', deform_values, case
    yield 'large-table', large_table, ()
    yield 'repeated', repeated, ()
    yield 'registered', registered, ()  # last, as it replaces the CPU kernels


def compile_cases(architecture):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Compiler(architecture))
    launch, compiled = JITFunction.run, {}

    def compile_only(kernel, *args, warmup, **kwargs):
        compiled[kernel.__name__] = launch(kernel, *args, warmup=True, **kwargs)

    JITFunction.run = compile_only
    for name in COMPILED:
        for dtype in COMPILED_TYPES:
            yield f'{name}-{dtype}', compile_case, (name, dtype, compiled)


def main(mode, architecture=None):
    torch.set_num_threads(1)
    cases = value_cases() if mode == 'values' else compile_cases(int(architecture))
    for name, run, arguments in cases:
        try:
            run(*arguments)
        except Exception:
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        else:
            print(json.dumps([name, None]), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
