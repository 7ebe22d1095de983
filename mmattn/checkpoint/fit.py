"""Fitting a backbone's tensors to a model by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .names import CLASSIFIER_HEAD, CLASSIFIER_NORM, REBUILT, StateDict, rename
from .resize import resize

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_OUTPUT_NORM = re.compile(r'norm\d+\.')
_STAGE = re.compile(r'stages\.(\d+)\.')


class Backbone(Protocol):
    """A module that names the family of its checkpoints."""

    family: str

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class Fitted:
    """Tensors of a backbone's file, sorted by what the backbone can do with them.

    Attributes:
        loaded: tensors in the wanted shape, by our names.
        resized: those of them that were resized, with the shapes before and after.
        dropped: names that the backbone needs not, with the reason.
        unfit: tensors that the backbone has no place for, by our names.
        classifier: norm and head of a classifier, by their names in :mod:`.names`.
    """

    loaded: StateDict = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unfit: StateDict = field(default_factory=dict)
    classifier: StateDict = field(default_factory=dict)


def fit_backbone(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], family: str) -> Fitted:
    """Rename and resize a backbone's tensors for a model.

    Args:
        state: tensors by the names of any origin, from the backbone on.
        wanted: the backbone's own state dict.
        family: of the backbone.
    """
    fitted = Fitted()
    num_stages = max(int(match[1]) for name in wanted if (match := _STAGE.match(name))) + 1
    for name, value in rename(state, family).items():
        if name.startswith((CLASSIFIER_NORM, CLASSIFIER_HEAD)):
            fitted.classifier[name] = value
        elif name in wanted:
            _fit_tensor(fitted, name, value, wanted[name])
        elif reason := _why_droppable(name, num_stages):
            fitted.dropped[name] = reason
        else:
            fitted.unfit[name] = value
    return fitted


def same_kind(value: Tensor, wanted: Tensor) -> bool:
    """True if a copy keeps the numbers, but for rounding: floats of 16 bits and more, or integers.

    Tensors on the meta device have no numbers; they suit a model that is there, too.
    """
    if value.is_meta and not wanted.is_meta:
        return False
    if wanted.is_floating_point():
        return value.dtype in FLOATS
    return value.dtype == wanted.dtype


def _fit_tensor(fitted: Fitted, name: str, value: Tensor, wanted: Tensor) -> None:
    before, shape = tuple(value.shape), tuple(wanted.shape)
    resized = value if before == shape else resize(name, value, shape)
    if resized is None or not same_kind(value, wanted):
        fitted.unfit[name] = value
        return
    fitted.loaded[name] = resized
    if before != shape:
        fitted.resized[name] = (before, shape)


def _why_droppable(name: str, num_stages: int) -> str | None:
    if name.rpartition('.')[2] in REBUILT:
        return 'built by the model'
    if is_output_norm(name):
        return 'norm of a stage without output'
    stage = _STAGE.match(name)
    return 'of a stage that is not built' if stage and int(stage[1]) >= num_stages else None


def is_output_norm(name: str) -> bool:
    """True for norms of outputs, which classifiers do not have."""
    return _OUTPUT_NORM.match(name) is not None


def rename_on_load(backbone: Backbone, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Fit published tensors to a backbone on their way into ``load_state_dict``.

    A pre-hook of :meth:`torch.nn.Module.load_state_dict`, which the backbones register. What does
    not fit is left for torch to report; norm and head of a classifier are dropped.

    Args:
        backbone: with its family in the attribute ``family``.
        state_dict: of the whole model; changed in place.
        prefix: of the backbone's names in it.
    """
    own = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    wanted = {
        name: value for name, value in backbone.state_dict().items() if isinstance(value, Tensor)
    }
    if all(name in wanted and value.shape == wanted[name].shape for name, value in own.items()):
        return
    if not any(map(_STAGE.match, wanted)):  # FSDP gives the names to rank 0 alone
        return
    fitted = fit_backbone(own, wanted, backbone.family)
    for name in own:
        del state_dict[prefix + name]
    for name, value in (fitted.loaded | fitted.unfit).items():
        state_dict[prefix + name] = value
