"""Comparison of operators with their references: values and gradients on random inputs."""

import random

import torch

EPS = {
    torch.float64: torch.finfo(torch.float64).eps,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
DTYPES = tuple(EPS)


def rounding(dtype, long=250, short=24):
    """Tolerance: ``short`` eps for results in 16 bits, ``long`` eps for sums kept in ``dtype``.

    Backward multiplies the rounded result by the upstream gradient. Where a sum of such terms
    cancels, as in the gradient of a table with one entry, only their rounding is left.
    """
    return EPS[dtype] * (short if dtype.itemsize == 2 else long)


class Draw:
    """Source of random tensors, sizes and layouts from one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def one_of(self, *choices):
        return self.random.choice(choices)

    def dtype(self):
        return self.random.choice(DTYPES)

    def tensor(self, *shape, dtype=torch.float64, strided=True):
        """Normal numbers; if ``strided``, sometimes with swapped dimensions or gaps in memory."""
        layout = self.random.choice(('dense', 'swapped', 'gaps')) if strided else 'dense'
        if layout == 'swapped' and len(shape) > 1:
            first, second = self.random.sample(range(len(shape)), 2)
            swapped = list(shape)
            swapped[first], swapped[second] = shape[second], shape[first]
            return self._normal(swapped, dtype).transpose(first, second)
        if layout == 'gaps':
            return self._normal([*shape[:-1], 2 * shape[-1] + 1], dtype)[..., 1 : 1 + shape[-1]]
        return self._normal(shape, dtype)

    def _normal(self, shape, dtype):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)


def results(function, inputs, differentiable, seed=0):
    """Outputs of ``function(**inputs)`` and gradients of a random sum of them, by name.

    Outputs without gradient, such as indices, are not summed.
    """
    leaves = {
        name: inputs[name].detach().requires_grad_() for name in differentiable if name in inputs
    }
    outputs = function(**(inputs | leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for output in outputs:
        if output is not None and output.requires_grad:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (output.double() * weight.to(output.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f'output {i}': output for i, output in enumerate(outputs) if output is not None}
    return named | {f'gradient of {n}': g for n, g in zip(leaves, gradients, strict=True)}


def exact(inputs):
    """The inputs in float64, in which the reference is computed."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def assert_agree(actual, expected, eps, factor, context=''):
    """Assert errors of at most ``factor * eps``, relative to the greatest value or 1."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        wanted = expected[name]
        assert value.shape == wanted.shape, f'{context}: {name}'
        if value.numel() == 0:
            continue
        error = (value.double() - wanted.double()).abs().max().item()
        # Inputs are about 1: values that cancel to 0, such as the derivative of a softmax over one
        # key, keep their rounding errors.
        scale = max(wanted.double().abs().max().item(), 1.0)
        assert error <= factor * eps * scale, (
            f'{context}: {name} differs by {error / scale:.1e}, {factor * eps:.1e} is allowed'
        )
