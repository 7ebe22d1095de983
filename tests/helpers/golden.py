"""Golden cases: weights and inputs by a recipe, stored outputs of the published models."""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mmattn.checkpoint.names import rename

DATA = Path(__file__).parents[1] / 'data'
MADE_BY_MODULE = ('relative_position_index', 'attn_mask')
TABLES = ('relative_position_bias_table', 'rpe_table', 'rpb')


def tensor(name, shape):
    """Value of a published tensor by the recipe, float64."""
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rpartition('.')[2]
    if last.startswith('gamma'):
        n = 0.5 + 0.1 * n
    elif any(table in name for table in TABLES) and last not in ('weight', 'bias'):
        n = 0.5 * n
    elif len(shape) < 2:
        n = 1 + 0.1 * n if last == 'weight' else 0.1 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:])) * (2 if name.endswith('conv_offset.3.weight') else 1)
    return torch.from_numpy(np.asarray(n))


@cache
def shapes(case):
    """Names and shapes of the published state dict."""
    return json.loads((DATA / f'{case}.keys.json').read_text())


def state_dict_names(case):
    """Published names without the buffers that the module builds."""
    return [name for name in shapes(case) if not name.endswith(MADE_BY_MODULE)]


def state_dict(case):
    """Published state dict with values by the recipe, without index buffers."""
    return {name: tensor(name, shapes(case)[name]) for name in state_dict_names(case)}


def parameters(backbone, case):
    """Parameters of a backbone by their published names."""
    published = {name: torch.empty(0) for name in state_dict_names(case)}
    named = dict(backbone.named_parameters())
    ours = zip(published, rename(published, backbone.family), strict=True)
    return {theirs: named[own] for theirs, own in ours if own in named}


def image(shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)))


class Case:
    """Stored outputs and gradients of the published implementation."""

    def __init__(self, case):
        self.arrays = np.load(DATA / f'{case}.npz')

    @property
    def image(self):
        return image(self.arrays['input_shape'])

    @property
    def output_names(self):
        return [
            key.split('/')[1]
            for key in self.arrays
            if key.endswith('/shape') and key.startswith('out/')
        ]

    @property
    def gradient_names(self):
        return [key[len('grad/') : -len('/norm')] for key in self.arrays if key.endswith('/norm')]

    def loss(self, outputs):
        """The loss whose gradients are stored; ``outputs`` by name."""
        return sum(
            (outputs[name] * image(outputs[name].shape, seed=2 + i)).sum()
            for i, name in enumerate(self.output_names)
        )

    def output_error(self, name, output):
        """Greatest error of the stored values, relative to the output's standard deviation."""
        key = f'out/{name}'
        assert tuple(output.shape) == tuple(self.arrays[f'{key}/shape'])
        values = output.detach().double().flatten()[self.arrays[f'{key}/index']].numpy()
        return np.abs(values - self.arrays[f'{key}/value']).max() / self.arrays[f'{key}/std']

    def gradient_error(self, name, gradient):
        """Greatest error: of values, relative to their standard deviation, or of the norm."""
        key = f'grad/{name}'
        values = gradient.double().flatten()[self.arrays[f'{key}/index']].numpy()
        stored = self.arrays[f'{key}/value']
        norm = self.arrays[f'{key}/norm']
        return max(
            np.abs(values - stored).max() / stored.std(),
            abs(gradient.double().norm().item() / norm - 1),
        )
