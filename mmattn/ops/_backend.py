"""Which implementation serves an operator: the compiled libraries, or the literal definitions."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

MODES = ('auto', 'compiled', 'reference')

# Device of the tensors -> the library that has its kernels; shapes alone (meta) need no kernels.
LIBRARIES = {'cpu': '_cpu.so', 'cuda': '_cuda.so'}


@dataclass
class Backend:
    """A device's compiled operators.

    Attributes:
        problem: why they cannot be used; empty where they can.
        instructions: the instruction set of the kernels, where there is a choice.
    """

    problem: str = ''
    instructions: str = ''


@dataclass
class BackendReport:
    """What :func:`backend_report` found; ``str()`` of it is for people.

    Attributes:
        mode: of ``MMATTN_OPS``: 'auto', 'compiled' or 'reference'.
        backends: device -> :class:`Backend`.
        served: (operator, device) -> 'compiled' or 'reference', for what was called in this process.
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
    """Which compiled operators there are, and which implementation served the calls so far."""
    return BackendReport(_mode(), dict(_backends), dict(_served))


def exporting() -> bool:
    """Whether the call is being recorded by ``torch.export`` or an ONNX exporter.

    An exported graph holds the literal definitions, so that it runs where this package is not: only
    ``MMATTN_OPS=compiled`` leaves the operators in it. Sizes may be symbols in it; what is recorded must not
    branch on them.
    """
    return torch.compiler.is_exporting() or (
        torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
    )


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; of a size that is a symbol in an exported graph, whether they always are.

    Comparing such a size outright would bind the graph to the answer for the size that it is recorded with.
    """
    equal = a == b
    return statically_known_true(equal) if isinstance(equal, torch.SymBool) else bool(equal)


@torch.compiler.assume_constant_result
def compiled_serves(name: str, device: str) -> bool:
    """Whether the compiled operator is to be called; the literal definition is, if not.

    Args:
        name: of the operator.
        device: type of the device of its tensors.

    Raises:
        ValueError: ``MMATTN_OPS`` is none of the modes.
        RuntimeError: ``MMATTN_OPS=compiled``, and there is no compiled operator for the device.
    """
    mode = _mode()
    if mode != 'compiled' and exporting():
        return False
    problem = '' if device == 'meta' else _backends.get(device, _NONE).problem
    compiled = mode != 'reference' and not problem
    if problem and mode == 'compiled':
        raise RuntimeError(f'MMATTN_OPS=compiled, but there is no {name} for {device}: {problem}')
    if problem and mode == 'auto' and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f'mmattn has no compiled operators for {device} ({problem}): the literal definitions '
            'serve, which are slower and take more memory. `python -m mmattn.doctor` says how to '
            'build them; MMATTN_OPS=reference silences this',
            stacklevel=3,
        )
    _served[name, device] = 'compiled' if compiled else 'reference'
    return compiled


def literal_is_asked_for() -> bool:
    """Whether ``MMATTN_OPS=reference``, or an export, forbids any faster way than the literal definition."""
    return exporting() or _mode() == 'reference'


def _mode() -> str:
    mode = os.environ.get('MMATTN_OPS', 'auto')
    if mode not in MODES:
        raise ValueError(f'MMATTN_OPS must be one of {", ".join(MODES)}, got {mode!r}')
    return mode


def _load(device: str) -> Backend:
    path = Path(__file__).with_name(LIBRARIES[device])
    if device == 'cuda' and torch.version.cuda is None:
        return Backend(problem='this torch is a CPU build')
    if device == 'cuda' and importlib.util.find_spec('triton') is None:
        return Backend(problem='triton is not installed: pip install triton')
    if not path.exists():
        return Backend(problem=f'{path.name} was not built with the package')
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Backend(problem=f'{path.name} does not load: {error}')
    if device == 'cpu':
        return Backend(instructions=torch.ops.mmattn.instruction_set())
    from . import triton  # here, because it needs triton

    triton.register('CUDA')
    return Backend()


torch.library.define('mmattn::instruction_set', '() -> str')

_NONE = Backend(problem='there are none for this kind of device')
_backends = {device: _load(device) for device in LIBRARIES}
_served: dict[tuple[str, str], str] = {}
_warned: set[str] = set()
