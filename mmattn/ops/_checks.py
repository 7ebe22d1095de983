"""Checks of an operator's arguments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AUTOCAST_DEVICES = ('cpu', 'cuda')


def check_shape(name: str, tensor: Tensor, pattern: str, sizes: tuple[int | None, ...]) -> None:
    """Check a tensor's shape.

    Args:
        name: of the argument.
        tensor: its value.
        pattern: names of its dimensions, such as 'B H W heads d'.
        sizes: what they must be; None allows any size.

    Raises:
        ValueError: the shape does not fit.
    """
    shape = tensor.shape
    if shape == sizes:
        return
    if len(shape) != len(sizes) or any(
        size is not None and size != own for size, own in zip(sizes, shape, strict=True)
    ):
        words = pattern.split()
        expected = _as_tuple(w if n is None else str(n) for w, n in zip(words, sizes, strict=True))
        named = '' if None in sizes else f'{_as_tuple(words)} = '
        raise ValueError(f'{name} must be {named}{expected}, got {tuple(shape)}')


def _as_tuple(words: Iterable[str]) -> str:
    words = list(words)
    return f'({words[0]},)' if len(words) == 1 else f'({", ".join(words)})'


def check_alike(**tensors: Tensor | None) -> None:
    """Check that tensors are floating-point, on one device and of one dtype.

    Dtypes may differ where autocast is going to cast them.

    Raises:
        ValueError: they are not; the message names the two that differ.
    """
    (first, reference), *others = ((n, t) for n, t in tensors.items() if t is not None)
    dtype = reference.dtype
    if not reference.is_floating_point() or dtype.itemsize < 2:
        raise ValueError(f'{first} must be float16, bfloat16, float32 or float64, got {dtype}')
    for name, tensor in others:
        if tensor.device != reference.device:
            raise _device_error(first, reference, name, tensor)
        if tensor.dtype == dtype:
            continue
        if torch.float64 in (tensor.dtype, dtype) or not is_autocast_enabled(reference):
            raise ValueError(
                f'{first} and {name} must have one dtype, got {dtype} and {tensor.dtype}'
            )


def check_device(**tensors: Tensor | None) -> None:
    """Check that tensors are on one device.

    Raises:
        ValueError: they are not; the message names the two that differ.
    """
    (first, reference), *others = ((n, t) for n, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.device != reference.device:
            raise _device_error(first, reference, name, tensor)


def _device_error(first: str, reference: Tensor, name: str, tensor: Tensor) -> ValueError:
    devices = f'{reference.device} and {tensor.device}'
    return ValueError(f'{first} and {name} must be on one device, got {devices}')


def is_autocast_enabled(x: Tensor) -> bool:
    """True if autocast is enabled for the device of ``x``."""
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
