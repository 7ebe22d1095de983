"""What the benchmarks share: time, peak memory, and what the machine could do at best."""

import contextlib
import ctypes
import fnmatch
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

# Of measuring, at least, for each figure.
SECONDS = 1.0
CALLS = 3
MiB = 2**20


def seconds(function: Callable[[], object]) -> float:
    """Median time of a call."""
    function()  # compiles, allocates
    timer = Timer('f()', globals=dict(f=function), num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=SECONDS).times
    while len(times) < CALLS:  # they take long; what timing them one by one costs does not count
        times.append(seconds_once(function))
    return statistics.median(times)


def seconds_once(function: Callable[[], object]) -> float:
    """Time of this one call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], object], device: str) -> float:
    """MiB that a call takes beyond what was there before."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MiB
    # What was freed before is given back to the system, or it would be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    function()
    return (memory_status('VmHWM') - before) / 1024


def memory_status(key: str) -> int:
    """kB, of this process."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f'/proc/self/status has no {key}: memory is measured on Linux only')


def hardware(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Multiply-adds and bytes a second of this machine's best matrix product and copy."""
    n = 8192 if device == 'cuda' else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(2**28 if device == 'cuda' else 2**25, device=device)
    y = torch.empty_like(x)
    product, copy = seconds(lambda: a @ b), seconds(lambda: y.copy_(x))
    return n**3 / product, 2 * x.numel() * x.element_size() / copy


def about_machine(device: str, dtype: str, machine: tuple[float, float]) -> str:
    """One line: device, type of numbers, versions and what :func:`hardware` found."""
    name = torch.cuda.get_device_name() if device == 'cuda' else processor()
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    return (
        f'{name}{threads}, {dtype}, torch {torch.__version__}; matrix product '
        f'{machine[0] * 2e-9:.0f} GFLOP/s, copy {machine[1] * 1e-9:.0f} GB/s'
    )


def processor() -> str:
    for entry in Path('/proc/cpuinfo').read_text().splitlines():
        if entry.startswith('model name'):
            return entry.split(':', 1)[1].strip()
    return platform.processor()


@contextlib.contextmanager
def served_by(mode: str):
    """Operators are those of ``MMATTN_OPS=mode``."""
    before = os.environ.get('MMATTN_OPS')
    os.environ['MMATTN_OPS'] = mode
    try:
        yield
    finally:
        del os.environ['MMATTN_OPS']
        if before is not None:
            os.environ['MMATTN_OPS'] = before


def choose(cases: dict, patterns: list[str]) -> dict:
    """Those whose name fits one of the patterns."""
    for pattern in patterns:
        if not fnmatch.filter(cases, pattern):
            raise SystemExit(f'no case matches {pattern!r}; there are:\n' + '\n'.join(cases))
    return {
        name: case
        for name, case in cases.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'
