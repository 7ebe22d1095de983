"""Properties of every compiled operator: registration, errors, choice of the backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.comparison import Draw
from torch.utils.flop_counter import FlopCounterMode

from mmattn import ops


def inputs_of(name, dtype=torch.float64, batch=2):
    """Small inputs by name; all floating-point tensors but the query grid require gradients."""
    draw = Draw(0)

    def tensor(*shape, dtype=dtype):
        return draw.tensor(*shape, dtype=dtype, strided=False).requires_grad_()

    where = torch.promote_types(dtype, torch.float32)
    if name == 'deform_sample':
        x, positions = tensor(batch, 4, 3, 5), tensor(batch, 2, 6, 2, dtype=where)
        return dict(x=x, positions=positions)
    if name == 'deform_attention':
        return dict(
            q=tensor(batch, 2, 4, 3),
            k=tensor(batch, 2, 5, 3),
            v=tensor(batch, 2, 5, 3),
            table=tensor(2, 5, 4, dtype=where),
            query_grid=tensor(4, 2, dtype=where).detach() / 2,
            key_positions=tensor(batch, 1, 5, 2, dtype=where),
            scale=0.5,
        )
    if name == 'window_attention':
        return dict(
            q=tensor(batch, 3, 5, 2, 3),
            k=tensor(batch, 3, 5, 2, 3),
            v=tensor(batch, 3, 5, 2, 3),
            bias=tensor(2, 4, 4, dtype=where),
            window_size=2,
            shift=1,
            pad_k=tensor(2, 3),
            pad_v=tensor(2, 3),
        )
    if name == 'neighborhood_attention':
        return dict(
            q=tensor(batch, 3, 4, 2, 3),
            k=tensor(batch, 3, 4, 2, 3),
            v=tensor(batch, 3, 4, 2, 3),
            rpb=tensor(2, 5, 5, dtype=where),
            kernel_size=3,
            scale=0.5,
        )
    assert name == 'quadtree_level'
    return dict(
        queries=tensor(batch, 2, 4, 2, 3),
        keys=tensor(batch, 12, 2, 3),
        values=tensor(batch, 12, 2, 3),
        parents=torch.tensor([[0, 2], [1, 0]])[None, :, :, None].expand(batch, 2, 2, 2),
        topk=3,
    )


OPERATORS = (
    'deform_sample',
    'deform_attention',
    'window_attention',
    'neighborhood_attention',
    'quadtree_level',
)
each = pytest.mark.parametrize('name', OPERATORS)


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def differentiable(inputs):
    return [n for n, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad]


def on_tensors(name, inputs):
    """The operator's first output as a function of its differentiable inputs alone."""
    names = differentiable(inputs)

    def function(*tensors):
        given = inputs | dict(zip(names, tensors, strict=True))
        return first(getattr(ops, name)(**given))

    return function, [inputs[n] for n in names]


@each
def test_gradients_are_the_derivatives(name):
    function, tensors = on_tensors(name, inputs_of(name))
    assert torch.autograd.gradcheck(function, tensors)


@each
def test_second_derivative_is_refused(name):
    function, tensors = on_tensors(name, inputs_of(name))
    gradients = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: set MMATTN_OPS=reference'):
        gradients[0].sum().backward()


# Not deform_sample: the oldest accepted torch has no second derivative of grid_sample.
@pytest.mark.parametrize('name', [name for name in OPERATORS if name != 'deform_sample'])
def test_reference_has_a_second_derivative(name, monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'reference')
    function, tensors = on_tensors(name, inputs_of(name, batch=1))
    if name == 'deform_attention':  # table and positions are sampled, too
        q, k, v, *rest = tensors
        rest = [t.detach() for t in rest]
        assert torch.autograd.gradgradcheck(lambda *qkv: function(*qkv, *rest), (q, k, v))
    else:
        assert torch.autograd.gradgradcheck(function, tensors)


@each
def test_vmap_is_a_loop(name):
    function, tensors = on_tensors(name, inputs_of(name))
    tensors = [torch.stack([t.detach(), 0.5 * t.detach()]) for t in tensors]
    mapped = torch.vmap(function)(*tensors)
    for i in range(2):
        torch.testing.assert_close(mapped[i], function(*(t[i] for t in tensors)))


@each
def test_compiles_to_one_graph(name):
    """Under torch.compile an operator stays one node, with gradients."""
    operator, inputs = getattr(ops, name), inputs_of(name)
    tensors = [inputs[n] for n in differentiable(inputs)]

    @torch.compile(fullgraph=True, backend='aot_eager')
    def compiled(inputs):
        return first(operator(**inputs)).sin()

    expected = first(operator(**inputs)).sin()
    actual = compiled(inputs)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(out.sum(), tensors) for out in (actual, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@each
def test_flops_are_those_of_the_reference(name, monkeypatch):
    inputs = inputs_of(name, torch.float32)
    counts = []
    for mode in ('compiled', 'reference'):
        monkeypatch.setenv('MMATTN_OPS', mode)
        with FlopCounterMode(display=False) as counter:
            getattr(ops, name)(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert counts[0] > 0 or name == 'deform_sample'


@each
def test_autocast_keeps_positions_and_biases(name):
    """Cast features to bfloat16, but not positions, tables and biases."""
    inputs = inputs_of(name, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        low = first(getattr(ops, name)(**inputs))
    assert low.dtype == (torch.float32 if name == 'deform_sample' else torch.bfloat16)
    exact = {n: t.double() if n in differentiable(inputs) else t for n, t in inputs.items()}
    expected = first(getattr(ops, name)(**exact))
    assert (low.double() - expected).abs().max() < 0.05 * expected.abs().max()


@each
def test_empty_batch(name):
    inputs = inputs_of(name, batch=0)
    out = first(getattr(ops, name)(**inputs))
    assert out.shape[0] == 0
    out.sum().backward()
    tensors = [inputs[n] for n in differentiable(inputs)]
    assert all(t.grad is not None and not t.grad.any() for t in tensors)


@each
def test_shapes_alone(name):
    inputs = {
        n: t.to('meta') if isinstance(t, torch.Tensor) else t for n, t in inputs_of(name).items()
    }
    out = first(getattr(ops, name)(**inputs))
    assert (
        out.device.type == 'meta'
        and out.shape == first(getattr(ops, name)(**inputs_of(name))).shape
    )


@each
def test_mixed_devices_and_dtypes_are_named(name):
    inputs = inputs_of(name)
    names = differentiable(inputs)
    other = names[1]
    with pytest.raises(ValueError, match=f'(?s){names[0]} and {other} .*cpu and meta'):
        getattr(ops, name)(**(inputs | {other: inputs[other].to('meta')}))
    if name != 'deform_sample':
        with pytest.raises(
            ValueError, match=f'{names[0]} and {other} .*torch.float64 and torch.float32'
        ):
            getattr(ops, name)(**(inputs | {other: inputs[other].float()}))
    with pytest.raises(
        ValueError, match=f'{names[0]} must be float16, bfloat16, float32 or float64'
    ):
        whole = {n: inputs[n].detach().int() for n in names}
        getattr(ops, name)(**(inputs | whole))


# ----------------------------------------------------------------------------------- backends


def test_report_names_the_backend_of_each_operator(monkeypatch):
    inputs = inputs_of('deform_sample')
    for mode, expected in (
        ('auto', 'compiled'),
        ('compiled', 'compiled'),
        ('reference', 'reference'),
    ):
        monkeypatch.setenv('MMATTN_OPS', mode)
        ops.deform_sample(**inputs)
        report = ops.backend_report()
        assert report.served['deform_sample', 'cpu'] == expected
        assert f'MMATTN_OPS={mode}' in str(report) and f'on cpu: {expected}' in str(report)
    assert report.backends['cpu'].instructions in ('default', 'avx2', 'avx512')


def test_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'fast')
    with pytest.raises(ValueError, match="one of auto, compiled, reference, got 'fast'"):
        ops.deform_sample(**inputs_of('deform_sample'))


def test_devices_without_kernels_run_the_reference(monkeypatch):
    """With one warning."""
    monkeypatch.setattr(ops._backend, '_warned', set())
    monkeypatch.setitem(ops._backend._backends, 'cpu', ops._backend.Backend(problem='not built'))
    inputs = inputs_of('window_attention')
    with pytest.warns(UserWarning, match=r'no compiled operators for cpu \(not built\)'):
        out = ops.window_attention(**inputs)
    torch.testing.assert_close(out, ops.window_attention_reference(**inputs))
    monkeypatch.setenv('MMATTN_OPS', 'compiled')
    with pytest.raises(RuntimeError, match=r'MMATTN_OPS=compiled, but .* for cpu: not built'):
        ops.window_attention(**inputs)


@pytest.mark.parametrize('isa', ['default', 'avx2'])
def test_lesser_instruction_sets(isa):
    """Kernels for older processors give the values of the reference."""
    if isa == 'avx2' and torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        pytest.skip('this processor has no AVX2, so that its kernels cannot run')
    program = """
import os
import torch
from mmattn import ops
from ops.test_operators import OPERATORS, differentiable, first, inputs_of

assert ops.backend_report().backends['cpu'].instructions == os.environ['ATEN_CPU_CAPABILITY']
for name in OPERATORS:
    for dtype in (torch.float32, torch.float64):
        results = []
        for mode in ('compiled', 'reference'):
            os.environ['MMATTN_OPS'] = mode
            inputs = inputs_of(name, dtype)
            out = first(getattr(ops, name)(**inputs))
            tensors = [inputs[n] for n in differentiable(inputs)]
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
"""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | dict(ATEN_CPU_CAPABILITY=isa, PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
