"""Choice between the compiled operators and their PyTorch references."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

MODES = ('auto', 'compiled', 'reference')

# torch's name of a CPU's instruction set -> that of the library compiled for it.
INSTRUCTION_SETS = {'AVX2': 'avx2', 'AVX512': 'avx512'}


@dataclass
class Backend:
    """A device's compiled operators.

    Attributes:
        problem: why they cannot be used; empty if they can.
        instructions: instruction set of the CPU kernels.
    """

    problem: str = ''
    instructions: str = ''


@dataclass
class BackendReport:
    """Result of :func:`backend_report`; ``str()`` formats it.

    Attributes:
        mode: value of ``MMATTN_OPS``: 'auto', 'compiled' or 'reference'.
        backends: device -> :class:`Backend`.
        served: (operator, device) -> 'compiled' or 'reference', for the calls of this process.
    """

    mode: str
    backends: dict[str, Backend]
    served: dict[tuple[str, str], str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'MMATTN_OPS={self.mode}']
        for device, backend in self.backends.items():
            instructions = f' ({backend.instructions})' if backend.instructions else ''
            lines.append(f'{device}: {backend.problem or "compiled operators" + instructions}')
        lines += [f'{name} on {device}: {by}' for (name, device), by in self.served.items()]
        return '\n'.join(lines)


def backend_report() -> BackendReport:
    """Report which compiled operators there are, and which implementation ran so far."""
    return BackendReport(_mode(), dict(_backends), dict(_served))


def exporting() -> bool:
    """True while ``torch.export`` or an ONNX exporter records the call.

    An exported graph holds the references, so that it runs without this package; only
    ``MMATTN_OPS=compiled`` leaves the operators in it. Sizes may be symbols in it, and the code
    that is recorded must not branch on them.
    """
    return torch.compiler.is_exporting() or (
        torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
    )


def recording() -> bool:
    """True while a graph is recorded that will run on maps of other sizes, too.

    Exporters do it, and ``torch.jit.trace``, for TensorBoard and mmengine's FLOP counter, too.
    Its graphs hold the operators, and the sizes in it are tensors.
    """
    return exporting() or torch.jit.is_tracing()


def known_equal(a: Any, b: Any) -> bool:
    """True if two sizes are equal; in a recorded graph, if they are equal for every input.

    A plain comparison would specialize the graph on the size that it is recorded with.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return statically_known_true(a == b) if exporting() else a == b


def at_least(size: Any, minimum: int) -> Any:
    """The greater of a size and a number, for every input of a recorded graph."""
    return size.clamp(min=minimum) if isinstance(size, Tensor) else torch.sym_max(size, minimum)


@torch.compiler.assume_constant_result
def use_compiled(name: str, device: str) -> bool:
    """Choose the implementation of a call and note it for :func:`backend_report`.

    Args:
        name: of the operator.
        device: device type of its tensors.

    Returns:
        True for the compiled operator, False for the reference.

    Raises:
        ValueError: ``MMATTN_OPS`` is none of the modes.
        RuntimeError: ``MMATTN_OPS=compiled``, and there is no compiled operator for the device.
    """
    mode = _mode()
    if mode != 'compiled' and exporting():
        return False
    problem = '' if device == 'meta' else _backends.get(device, _NONE).problem
    if problem:
        _report_problem(mode, name, device, problem)
    compiled = mode != 'reference' and not problem
    _served[name, device] = 'compiled' if compiled else 'reference'
    return compiled


def _report_problem(mode: str, name: str, device: str, problem: str) -> None:
    """Raise if the compiled operators are required; warn, once for each device, if preferred."""
    if mode == 'compiled':
        raise RuntimeError(f'MMATTN_OPS=compiled, but there is no {name} for {device}: {problem}')
    if mode == 'auto' and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f'mmattn has no compiled operators for {device} ({problem}): the references run, '
            'which are slower and take more memory. `python -m mmattn.doctor` says how to build '
            'the operators; MMATTN_OPS=reference silences this',
            stacklevel=4,
        )


def _mode() -> str:
    mode = os.environ.get('MMATTN_OPS', 'auto')
    if mode not in MODES:
        raise ValueError(f'MMATTN_OPS must be one of {", ".join(MODES)}, got {mode!r}')
    return mode


def _load_cpu() -> Backend:
    # ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability()
    instructions = INSTRUCTION_SETS.get(capability, 'default')
    problem = _load_library(f'_cpu_{instructions}.so')
    return Backend(problem, '' if problem else instructions)


def _load_cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend('this torch is a CPU build')
    if importlib.util.find_spec('triton') is None:
        return Backend('triton is not installed: pip install triton')
    problem = _load_library('_cuda.so')
    if not problem:
        try:
            from . import triton  # here, because it needs triton
        except Exception as error:  # of any kind: a broken triton, or one for another torch
            return Backend(f'triton does not import: {type(error).__name__}: {error}')
        triton.register('CUDA')
    return Backend(problem)


def _load_library(name: str) -> str:
    """Load a library of this folder; returns what went wrong."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        reason = path.with_name(f'{"_cuda" if "cuda" in name else "_cpu"}.txt')
        why = f': {reason.read_text().strip()}' if reason.is_file() else ''
        return f'{name} was not built with the package{why}'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f'{name} does not load: {error}'
    return ''


_NONE = Backend('there are none for this kind of device')
_backends = {'cpu': _load_cpu(), 'cuda': _load_cuda()}
_served: dict[tuple[str, str], str] = {}
_warned: set[str] = set()
