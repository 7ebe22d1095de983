"""Prefixes that wrappers of a model put before its names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .names import FAMILIES, StateDict

# DDP, averaged models, torch.compile, FSDP, activation checkpointing: anywhere in a name.
_WRAPPERS = re.compile(
    r'(?:(?<=^)|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'
)
# Number of updates, which torch's AveragedModel saves beside its weights.
_COUNTER = 'n_averaged'


def unwrap(state: Mapping[str, Tensor]) -> StateDict:
    """Tensors without what torch's wrappers add to their names."""
    names = {name: _WRAPPERS.sub('', name) for name in state}
    wrapped = any(name != bare for name, bare in names.items())
    return {bare: state[name] for name, bare in names.items() if not (wrapped and bare == _COUNTER)}


def find_prefixes(state: Mapping[str, Tensor], family: str) -> list[str]:
    """Prefixes below which a state dict has models with a backbone of this family.

    ``''`` is one if there is such a model at the top; distillers have two, such as ``student.`` and
    ``teacher.``.
    """
    patterns = [re.compile(pattern) for pattern in FAMILIES[family].origins.values()]
    prefixes = []
    for name in state:
        for start in (0, *(match.end() for match in re.finditer(r'\.', name))):
            if any(pattern.match(name, start) for pattern in patterns):
                prefixes.append(name[:start].removesuffix('backbone.'))
                break
    return list(dict.fromkeys(prefixes))
