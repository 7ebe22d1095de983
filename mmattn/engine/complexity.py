"""FLOPs and activations of attention for mmengine's counter, which the stock get_flops.py run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmengine.analysis.complexity_analysis import (
    _DEFAULT_SUPPORTED_ACT_OPS,
    _DEFAULT_SUPPORTED_FLOP_OPS,
)
from mmengine.analysis.jit_handles import generic_activation_jit
from torch import Size
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def register_flops() -> None:
    """Add our operators and torch's fused attention to mmengine's tables."""
    formulas = {
        str(operator).replace('.', '::'): formula
        for operator, formula in flop_registry.items()
        if str(operator).startswith('mmattn.')
    }
    formulas['aten::scaled_dot_product_attention'] = _fused_attention
    for kind, formula in formulas.items():
        _DEFAULT_SUPPORTED_FLOP_OPS.setdefault(kind, _handle(formula))
        _DEFAULT_SUPPORTED_ACT_OPS.setdefault(kind, generic_activation_jit())


def _fused_attention(q: Size, k: Size, v: Size, *others: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _handle(formula: Callable[..., int]) -> Callable[[Sequence[Any], Sequence[Any]], int]:
    """Count of a node of a traced graph by a formula that takes shapes and numbers."""

    def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        arguments = [
            Size(value.type().sizes()) if value.isCompleteTensor() else value.toIValue()
            for value in inputs
        ]
        return formula(*arguments) // 2  # mmengine counts a multiply-add as one

    return count
