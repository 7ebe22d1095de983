"""Shared parts of the benchmarks: time, peak memory, the machine's peak rates, generated images."""

import contextlib
import ctypes
import fnmatch
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
# Minimum measuring time and number of calls of each figure.
SECONDS = 1.0
CALLS = 3
MIB = 2**20

T = TypeVar('T')


class Machine(NamedTuple):
    """Peak rates of a device: multiply-adds and bytes, in a second."""

    products: float
    bandwidth: float


class Table(NamedTuple):
    """The result of a benchmark: rows for the JSON file, a chart, and the last sentence."""

    rows: list[dict]
    chart: Figure
    summary: str


def seconds(function: Callable[[], object]) -> float:
    """Median time of a call."""
    function()  # compiles, allocates
    timer = Timer('f()', globals=dict(f=function), num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=SECONDS).times
    while len(times) < CALLS:  # long calls, so that the overhead of timing each is negligible
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
    """MiB that a call allocates at its peak, above what was in use before."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # Return freed memory to the system, or the call would reuse it unnoticed.
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    function()
    return (memory_status('VmHWM') - before) / 1024


def memory_status(key: str) -> int:
    """A figure of this process's /proc/self/status, in KiB."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f'/proc/self/status has no {key}: memory is measured on Linux only')


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def hardware(device: str, dtype: torch.dtype) -> Machine:
    """Measure the rates of a large matrix product and of a copy."""
    n = 8192 if device == 'cuda' else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(2**28 if device == 'cuda' else 2**25, device=device)
    y = torch.empty_like(x)
    product, copy = seconds(lambda: a @ b), seconds(lambda: y.copy_(x))
    return Machine(n**3 / product, 2 * x.numel() * x.element_size() / copy)


def about_machine(device: str, dtype: str, machine: Machine) -> str:
    """One line: device, dtype, versions and the rates of :func:`hardware`."""
    name = torch.cuda.get_device_name() if device == 'cuda' else processor()
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    return (
        f'{name}{threads}, {dtype}, torch {torch.__version__}; matrix product '
        f'{machine.products * 2e-9:.0f} GFLOP/s, copy {machine.bandwidth * 1e-9:.0f} GB/s'
    )


def processor() -> str:
    """The model of the CPU."""
    for entry in Path('/proc/cpuinfo').read_text().splitlines():
        if entry.startswith('model name'):
            return entry.split(':', 1)[1].strip()
    return platform.processor()


@contextlib.contextmanager
def ops_mode(mode: str) -> Iterator[None]:
    """Context manager that sets ``MMATTN_OPS``."""
    before = os.environ.get('MMATTN_OPS')
    os.environ['MMATTN_OPS'] = mode
    try:
        yield
    finally:
        del os.environ['MMATTN_OPS']
        if before is not None:
            os.environ['MMATTN_OPS'] = before


def choose(cases: dict[str, T], patterns: list[str]) -> dict[str, T]:
    """The cases whose name matches one of the patterns."""
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


def make_images(folder: Path, **options: object) -> None:
    """Run tools/misc/make_demo_dataset.py, in a folder that need not exist, with its options."""
    words = [str(word) for key, value in options.items() for word in (f'--{key}', value)]
    tool = TOOLS / 'misc/make_demo_dataset.py'
    subprocess.run([sys.executable, str(tool), str(folder), *words], check=True)
