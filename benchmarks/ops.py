"""Each operator beside its reference implementation and the machine's floor."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmattn import ops

from .charts import plot_speedups
from .measuring import Machine, Table, choose, figure, peak_memory, seconds

Size = tuple[int, int]


@dataclass
class Case:
    """An operator at one of the sizes that models call it with.

    Attributes:
        name: operator, place in the model, and the sizes that decide its cost.
        compiled: the public function.
        reference: its reference implementation.
        inputs: by name; floating-point tensors require gradients.
    """

    name: str
    compiled: Callable
    reference: Callable
    inputs: dict


@dataclass
class Row:
    """The figures of a case; times in ms, memory in MiB above the inputs."""

    name: str
    reference_forward: float
    compiled_forward: float
    floor_forward: float
    reference_step: float
    compiled_step: float
    floor_step: float
    reference_memory: float
    compiled_memory: float


# ---------------------------------------------------------------------------------------- cases


class Maker:
    """Draws inputs on a device."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.where = torch.promote_types(dtype, torch.float32)
        torch.manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).requires_grad_()

    def grid(self, height: int, width: int) -> Tensor:
        axes = [(torch.arange(n, device=self.device) + 0.5) / n * 2 - 1 for n in (height, width)]
        return torch.stack(torch.meshgrid(*axes, indexing='ij'), -1).flatten(0, 1).to(self.where)

    def positions(self, batch: int, groups: int, height: int, width: int) -> Tensor:
        """The centers of a grid's cells, moved by about one cell."""
        grid = self.grid(height, width)
        steps = torch.tensor([2 / height, 2 / width], device=self.device)
        offsets = torch.randn(batch, groups, *grid.shape, device=self.device) * steps
        return (grid + offsets).to(self.where).requires_grad_()


def window(
    make: Maker, name: str, batch: int, size: Size, heads: int, side: int, shared: bool
) -> Case:
    height, width = size
    projected = make.draw(batch, height, width, 3, heads, 32)
    q, k, v = projected.unbind(3)
    if shared:
        q = make.draw(batch, side, side, heads, 32)
    return Case(
        name,
        ops.window_attention,
        ops.window_attention_reference,
        dict(
            q=q,
            k=k,
            v=v,
            bias=make.draw(heads, side**2, side**2, dtype=make.where),
            window_size=side,
            pad_k=make.draw(heads, 32),
            pad_v=make.draw(heads, 32),
        ),
    )


def deform(
    make: Maker,
    name: str,
    batch: int,
    heads: int,
    groups: int,
    queries: Size,
    keys: Size,
    table: int,
) -> Case:
    q = make.draw(batch, math.prod(queries), heads, 32)
    k, v = (make.draw(batch, math.prod(keys), heads, 32) for _ in range(2))
    return Case(
        name,
        ops.deform_attention,
        ops.deform_attention_reference,
        dict(
            q=q.transpose(1, 2),
            k=k.transpose(1, 2),
            v=v.transpose(1, 2),
            table=make.draw(heads, table, table, dtype=make.where),
            query_grid=make.grid(*queries),
            key_positions=make.positions(batch, groups, *keys),
            scale=32**-0.5,
        ),
    )


def sample(
    make: Maker, name: str, batch: int, channels: int, groups: int, size: Size, points: Size
) -> Case:
    return Case(
        name,
        ops.deform_sample,
        ops.deform_sample_reference,
        dict(
            x=make.draw(batch, *size, channels).permute(0, 3, 1, 2),
            positions=make.positions(batch, groups, *points),
        ),
    )


def neighborhood(make: Maker, name: str, batch: int, heads: int, size: Size) -> Case:
    q, k, v = make.draw(batch, *size, 3, heads, 32).unbind(3)
    return Case(
        name,
        ops.neighborhood_attention,
        ops.neighborhood_attention_reference,
        dict(
            q=q,
            k=k,
            v=v,
            rpb=make.draw(heads, 13, 13, dtype=make.where),
            kernel_size=7,
            scale=32**-0.5,
        ),
    )


def quadtree(
    make: Maker,
    name: str,
    batch: int,
    heads: int,
    d: int,
    tokens: int,
    kept: int,
    topk: int | None,
) -> Case:
    """A level of self-attention; the kept keys of a query are neighbors, as on photographs."""
    first = torch.randint(tokens // 4 - kept, (batch, tokens // 4, 1, heads), device=make.device)
    parents = first + torch.arange(kept, device=make.device)[:, None]
    return Case(
        name,
        ops.quadtree_level,
        ops.quadtree_level_reference,
        dict(
            queries=make.draw(batch, heads, tokens, d).transpose(1, 2).unflatten(1, (-1, 4)),
            keys=make.draw(batch, heads, tokens, d).transpose(1, 2),
            values=make.draw(batch, heads, tokens, d).transpose(1, 2),
            parents=parents,
            topk=topk,
        ),
    )


def cases(make: Maker) -> dict[str, Callable[[], Case]]:
    """Name -> constructor; sizes of detection (800 x 1344) and classification (224 x 224)."""
    det, cls = (2, 64) if make.device == 'cuda' else (1, 4)
    stage1, tokens = (200, 336), 200 * 336
    found: dict[str, Callable[[], Case]] = {}

    def add(name: str, maker: Callable[..., Case], *arguments: object) -> None:
        found[name] = lambda: maker(make, name, *arguments)

    for query in ('', ' shared query,'):
        shared = bool(query)
        for model, batch, size, heads, side in (
            ('GC ViT-T det, stage 1', det, stage1, 2, 24),
            ('GC ViT-T det, stage 3', det, (50, 84), 8, 24),
            ('GC ViT-T 224, stage 1', cls, (56, 56), 2, 7),
            ('GC ViT-T 224, stage 3', cls, (14, 14), 8, 14),
            ('GC ViT-T 224, stage 4', cls, (7, 7), 16, 7),
        ):
            name = f'window_attention:{query} {model}, window {side}'
            add(name, window, batch, size, heads, side, shared)
    add('deform_attention: DAT-T det, stage 3', deform, det, 12, 3, (50, 84), (50, 84), 27)
    add('deform_attention: DAT-T det, stage 4', deform, det, 24, 6, (25, 42), (25, 42), 13)
    add('deform_attention: DAT++-T det, stage 1', deform, det, 2, 1, stage1, (25, 42), 111)
    add('deform_attention: DAT-T 224, stage 3', deform, cls, 12, 3, (14, 14), (14, 14), 27)
    add('deform_attention: DAT-T 224, stage 4', deform, cls, 24, 6, (7, 7), (7, 7), 13)
    add('deform_sample: DAT-T det, stage 3', sample, det, 384, 3, (50, 84), (50, 84))
    add('deform_sample: DAT++-T det, stage 1', sample, det, 64, 1, stage1, (25, 42))
    add('neighborhood_attention: DAT++-T det, stage 1', neighborhood, det, 2, stage1)
    add('neighborhood_attention: DAT++-T 224, stage 1', neighborhood, cls, 2, (56, 56))
    add('quadtree_level: B2 det, stage 1, level 0, K 32', quadtree, det, 1, 64, tokens, 32, None)
    add('quadtree_level: B2 det, stage 1, level 1, K 32', quadtree, det, 1, 64, tokens // 4, 32, 32)
    add('quadtree_level: B2 224, stage 1, level 0, K 8', quadtree, cls, 1, 64, 56 * 56, 8, None)
    add('quadtree_level: LoFTR, level 0, K 16', quadtree, 2, 8, 32, 64 * 80, 16, None)
    add('quadtree_level: LoFTR, level 1, K 16', quadtree, 2, 8, 32, 32 * 40, 16, 16)
    return found


# ------------------------------------------------------------------------------------ measuring


def measure(case: Case, device: str, machine: Machine) -> Row:
    """Times and memory of both implementations, and the floor."""
    leaves = [
        t
        for t in case.inputs.values()
        if isinstance(t, Tensor) and (t.requires_grad or t.grad_fn is not None)
    ]

    def forward(function: Callable) -> Any:
        with torch.no_grad():
            return function(**case.inputs)

    def step(function: Callable) -> tuple[Tensor, ...]:
        out = first(function(**case.inputs))
        return torch.autograd.grad(out, leaves, torch.ones_like(out), materialize_grads=True)

    with FlopCounterMode(display=False) as counter:
        out = first(forward(case.reference))
    products = counter.get_total_flops() / 2
    moved = sum(
        t.numel() * t.element_size() for t in [*case.inputs.values(), out] if isinstance(t, Tensor)
    )
    row: dict[str, float] = {}
    for name, function in (('reference', case.reference), ('compiled', case.compiled)):
        row[f'{name}_forward'] = seconds(partial(forward, function)) * 1e3
        row[f'{name}_step'] = seconds(partial(step, function)) * 1e3
        row[f'{name}_memory'] = peak_memory(partial(step, function), device)
    rate, bandwidth = machine.products, machine.bandwidth
    return Row(
        case.name,
        floor_forward=max(products / rate, moved / bandwidth) * 1e3,
        floor_step=max(3.5 * products / rate, 2 * moved / bandwidth) * 1e3,
        **row,
    )


def first(outputs: Any) -> Tensor:
    """The output, or the first of several."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


# -------------------------------------------------------------------------------------- output

HELP = 'the operators, one by one'
DTYPE = dict(cpu='float32', cuda='bfloat16')
HEADER = (
    'times in ms, memory of a step in MiB\n\n'
    '| operator | forward: reference | compiled | ratio | floor '
    '| step: reference | compiled | ratio | floor '
    '| memory: reference | compiled |\n|---|' + '---|' * 10
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """No options besides those of every table."""


def line(row: Row) -> str:
    """The row of the Markdown table."""
    cells = [
        row.name,
        figure(row.reference_forward),
        figure(row.compiled_forward),
        f'{row.reference_forward / row.compiled_forward:.1f}x',
        figure(row.floor_forward),
        figure(row.reference_step),
        figure(row.compiled_step),
        f'{row.reference_step / row.compiled_step:.1f}x',
        figure(row.floor_step),
        f'{row.reference_memory:.0f}',
        f'{row.compiled_memory:.0f}',
    ]
    return f'| {" | ".join(cells)} |'


def run(args: argparse.Namespace, machine: Machine, about: str) -> Table:
    """Measure the chosen cases."""
    chosen = choose(cases(Maker(args.device, getattr(torch, args.dtype))), args.only)
    print(HEADER, flush=True)
    rows = []
    for make_case in chosen.values():
        rows.append(measure(make_case(), args.device, machine))
        print(line(rows[-1]), flush=True)
    ratios = {
        'forward': [row.reference_forward / row.compiled_forward for row in rows],
        'step': [row.reference_step / row.compiled_step for row in rows],
        'memory of a step': [row.reference_memory / max(row.compiled_memory, 1) for row in rows],
    }
    geometric = statistics.geometric_mean(ratios['step'])
    return Table(
        [asdict(row) for row in rows],
        plot_speedups([row.name for row in rows], ratios, about),
        f'steps are {geometric:.1f} times faster (geometric mean)',
    )
