"""What every operator is registered with: schema, shapes, derivative, autocast, FLOP formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_AUTOCAST_DEVICES = {'cpu': 'AutocastCPU', 'cuda': 'AutocastCUDA'}


def register(
    name: str,
    arguments: str,
    outputs: Sequence[str],
    fake: Callable,
    gradients: Sequence[str],
    low_precision: Sequence[str],
    flops: Callable[..., int],
    num_differentiable_outputs: int = 1,
    saved_outputs: Sequence[str] | None = None,
    fake_gradients: Callable | None = None,
    nondeterministic_backward: Sequence[str] = (),
) -> None:
    """Define ``mmattn::name`` and ``mmattn::name_backward``; their kernels are in the compiled libraries.

    The backward operator takes the gradients of the differentiable outputs, then the operator's
    arguments, then those of its outputs that are saved, and returns the gradients of the arguments in
    ``gradients``. It has no derivative of its own.

    Args:
        name: of the operator.
        arguments: of its schema.
        outputs: names of the tensors that it returns; the differentiable ones come first.
        fake: arguments -> the outputs on a device without data, a tuple unless it is one.
        gradients: the arguments that have a gradient.
        low_precision: the arguments that autocast casts; the others are left as they are.
        flops: shapes of the arguments, as torch's counter gives them -> floating-point operations of
            the forward operator; recomputing and differentiating its products takes 2.5 times as many.
        num_differentiable_outputs: how many of the outputs have a gradient.
        saved_outputs: the outputs that the backward operator needs; all by default.
        fake_gradients: arguments -> the gradients on a device without data, a tuple; by default they
            are contiguous and like the arguments.
        nondeterministic_backward: kinds of devices on which the backward kernel's sums depend on chance.
    """
    saved_outputs = outputs if saved_outputs is None else saved_outputs
    types = 'Tensor' if len(outputs) == 1 else f'({", ".join(["Tensor"] * len(outputs))})'
    forward, backward = f'mmattn::{name}', f'mmattn::{name}_backward'
    upstream = [f'Tensor grad_{output}' for output in outputs[:num_differentiable_outputs]]
    saved = [f'Tensor {output}' for output in saved_outputs]
    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(forward, f'({arguments}) -> {types}', tags=tags)
    torch.library.define(
        backward,
        f'({", ".join([*upstream, arguments, *saved])}) -> ({", ".join(["Tensor"] * len(gradients))})',
        tags=tags,
    )
    operator = getattr(torch.ops.mmattn, name).default
    backward_operator = getattr(torch.ops.mmattn, f'{name}_backward').default
    names = [argument.name for argument in operator._schema.arguments]
    first = len(upstream)

    torch.library.register_fake(forward, fake)

    @torch.library.register_fake(backward)
    def fake_backward(*args):
        inputs = dict(zip(names, args[first:], strict=False))
        if fake_gradients is not None:
            return fake_gradients(**inputs)
        return tuple(
            torch.empty_like(inputs[name], memory_format=torch.contiguous_format)
            for name in gradients
        )

    def setup_context(ctx, inputs, output):
        output = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*output[num_differentiable_outputs:])
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        named = zip(outputs, output, strict=True)
        ctx.save_for_backward(*tensors, *(x for name, x in named if name in saved_outputs))
        ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def differentiate(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.inputs]
        if inputs[0].device.type in nondeterministic_backward:
            alert_not_deterministic(f'the gradient of {forward}')
        result = backward_operator(*grads[:num_differentiable_outputs], *inputs, *saved)
        result = dict(zip(gradients, result, strict=True))
        needed = zip(names, ctx.needs_input_grad, strict=True)
        return tuple(result.get(name) if needs else None for name, needs in needed)

    def refuse(ctx, *grads):
        raise RuntimeError(
            f'{forward} has no second derivative: set MMATTN_OPS=reference, whose literal definition has one'
        )

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    torch.library.register_autograd(backward, refuse)
    for device, key in _AUTOCAST_DEVICES.items():
        torch.library.impl(forward, key)(_autocast(operator, device, key, names, low_precision))

    def count(*args, **kwargs):
        kwargs.pop('out_shape')
        return flops(*args, **kwargs)

    def count_backward(*args, **kwargs):
        kwargs.pop('out_shape')
        return flops(*args[first : first + len(names)], **kwargs) * 5 // 2

    register_flop_formula(operator.overloadpacket)(count)
    register_flop_formula(backward_operator.overloadpacket)(count_backward)


def _autocast(operator, device: str, key: str, names: Sequence[str], low_precision: Sequence[str]):
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [
            # As torch's own rules do, it leaves float64 alone.
            value.to(dtype)
            if name in low_precision and value is not None and value.dtype != torch.float64
            else value
            for name, value in zip(names, args, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*cast)

    return kernel


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, positions and biases are kept in for values of ``dtype``: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def check_alike(**tensors: Tensor | None) -> None:
    """The tensors are floating-point, on one device and of one dtype, or will be after autocast's casts.

    Raises:
        ValueError: they are not; the message names the two that differ.
    """
    (first, reference), *others = ((n, t) for n, t in tensors.items() if t is not None)
    device = reference.device
    if not reference.is_floating_point() or reference.dtype.itemsize < 2:
        raise ValueError(
            f'{first} must be float16, bfloat16, float32 or float64, got {reference.dtype}'
        )
    autocast = device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)
    for name, tensor in others:
        if tensor.device != device:
            raise ValueError(
                f'{first} and {name} must be on one device, got {device} and {tensor.device}'
            )
        cast_alike = autocast and torch.float64 not in (tensor.dtype, reference.dtype)
        if tensor.dtype != reference.dtype and not cast_alike:
            raise ValueError(
                f'{first} and {name} must have one dtype, got {reference.dtype} and {tensor.dtype}'
            )


def check_device(**tensors: Tensor | None) -> None:
    """The tensors are on one device.

    Raises:
        ValueError: they are not; the message names the two that differ.
    """
    (first, reference), *others = ((n, t) for n, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f'{first} and {name} must be on one device, '
                f'got {reference.device} and {tensor.device}'
            )


def alert_not_deterministic(name: str) -> None:
    """Raise, or warn, where ``torch.use_deterministic_algorithms`` asks for determinism."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f'{name} has no deterministic implementation on this device, and '
        'torch.use_deterministic_algorithms(True) is set; MMATTN_OPS=reference takes the literal definition'
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
