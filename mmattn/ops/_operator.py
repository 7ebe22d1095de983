"""Registration of an operator: schema, fake kernel, derivative, autocast, FLOP formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._checks import AUTOCAST_DEVICES, is_autocast_enabled

# Recomputing the scores and differentiating two products takes five products for two.
_BACKWARD_PRODUCTS, _FORWARD_PRODUCTS = 5, 2


@dataclass
class Operator:
    """The operator ``mmattn::name`` and its gradient ``mmattn::name_backward``.

    Creating one registers both; their kernels are in the compiled libraries. The gradient's
    operator takes the gradients of the differentiable outputs, then the operator's arguments, then
    those of its outputs that are saved, and returns the gradients of the arguments in
    ``gradients``. It has no derivative.

    Attributes:
        name: of the operator.
        arguments: of its schema.
        outputs: names of the tensors that it returns, the differentiable ones first.
        fake: arguments -> the outputs on a device without data, a tuple unless it is one.
        gradients: arguments that have a gradient.
        low_precision: arguments that autocast casts.
        flops: shapes of the arguments -> floating-point operations of the forward operator.
        num_differentiable_outputs: how many of the outputs have a gradient.
        saved_outputs: outputs that the backward operator needs; None for all.
        fake_gradients: arguments -> the gradients on a device without data, a tuple; None for
            contiguous ones like the arguments.
        nondeterministic_backward: device types whose backward kernel adds in no fixed order.
    """

    name: str
    arguments: str
    outputs: Sequence[str]
    fake: Callable[..., Any]
    gradients: Sequence[str]
    low_precision: Sequence[str]
    flops: Callable[..., int]
    num_differentiable_outputs: int = 1
    saved_outputs: Sequence[str] | None = None
    fake_gradients: Callable[..., tuple[Tensor, ...]] | None = None
    nondeterministic_backward: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._define()
        torch.library.register_fake(f'mmattn::{self.name}', self.fake)
        torch.library.register_fake(f'mmattn::{self.name}_backward', self._fake_backward)
        torch.library.register_autograd(
            f'mmattn::{self.name}', self._differentiate, setup_context=self._save
        )
        torch.library.register_autograd(f'mmattn::{self.name}_backward', self._refuse)
        for device in AUTOCAST_DEVICES:
            kernel = self._autocast_kernel(device)
            torch.library.impl(f'mmattn::{self.name}', f'Autocast{device.upper()}')(kernel)
        register_flop_formula(self._forward.overloadpacket)(self._count)
        register_flop_formula(self._backward.overloadpacket)(self._count_backward)

    def _define(self) -> None:
        saved = self.outputs if self.saved_outputs is None else self.saved_outputs
        upstream = [f'Tensor grad_{x}' for x in self.outputs[: self.num_differentiable_outputs]]
        of_backward = ', '.join([*upstream, self.arguments, *(f'Tensor {x}' for x in saved)])
        for name, arguments, results in (
            (self.name, self.arguments, self.outputs),
            (f'{self.name}_backward', of_backward, self.gradients),
        ):
            types = ', '.join(['Tensor'] * len(results))
            types = types if len(results) == 1 else f'({types})'
            schema = f'({arguments}) -> {types}'
            tags = (torch.Tag.pt2_compliant_tag,)
            torch.library.define(f'mmattn::{name}', schema, tags=tags)
        self._forward = getattr(torch.ops.mmattn, self.name).default
        self._backward = getattr(torch.ops.mmattn, f'{self.name}_backward').default
        self._argument_names = [x.name for x in self._forward._schema.arguments]
        self._saved = [x in saved for x in self.outputs]

    def _inputs_of_backward(self, args: Sequence[Any]) -> Sequence[Any]:
        first = self.num_differentiable_outputs
        return args[first : first + len(self._argument_names)]

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        inputs = dict(zip(self._argument_names, self._inputs_of_backward(args), strict=True))
        if self.fake_gradients is not None:
            return self.fake_gradients(**inputs)
        layout = torch.contiguous_format
        return tuple(torch.empty_like(inputs[x], memory_format=layout) for x in self.gradients)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save tensors through autograd, and what is no tensor beside them."""
        output = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*output[self.num_differentiable_outputs :])
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        results = [x for x, saved in zip(output, self._saved, strict=True) if saved]
        ctx.save_for_backward(*tensors, *results)
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def _differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.others]
        if inputs[0].device.type in self.nondeterministic_backward:
            alert_not_deterministic(f'the gradient of mmattn::{self.name}')
        upstream = grads[: self.num_differentiable_outputs]
        result = self._backward(*upstream, *inputs, *saved)
        result = dict(zip(self.gradients, result, strict=True))
        needed = zip(self._argument_names, ctx.needs_input_grad, strict=True)
        return tuple(result.get(name) if needs else None for name, needs in needed)

    def _refuse(self, ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f'mmattn::{self.name} has no second derivative: set MMATTN_OPS=reference for one'
        )

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        cast = [name in self.low_precision for name in self._argument_names]

        def kernel(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(
                # Like torch's rules, it leaves float64 alone.
                x.to(dtype) if low and x is not None and x.dtype != torch.float64 else x
                for x, low in zip(args, cast, strict=True)
            )
            with torch.autocast(device, enabled=False):
                return self._forward(*args)

        return kernel

    def _count(self, *shapes: Any, out_shape: Any = None, **others: Any) -> int:
        return self.flops(*shapes, **others)

    def _count_backward(self, *shapes: Any, out_shape: Any = None, **others: Any) -> int:
        forward = self.flops(*self._inputs_of_backward(shapes), **others)
        return forward * _BACKWARD_PRODUCTS // _FORWARD_PRODUCTS


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, positions and biases for values of ``dtype``: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def result_dtype(x: Tensor) -> torch.dtype:
    """Dtype of an operator's result for values ``x``: that of autocast where it is enabled."""
    autocast = is_autocast_enabled(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context of a reference: autocast is off, so that what is float32 stays so."""
    enabled = is_autocast_enabled(x)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


def alert_not_deterministic(name: str) -> None:
    """Raise, or warn, where ``torch.use_deterministic_algorithms`` asks for determinism."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f'{name} has no deterministic implementation on this device, and '
        'torch.use_deterministic_algorithms(True) is set; MMATTN_OPS=reference has one'
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
