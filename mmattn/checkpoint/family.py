"""How the published files of one architecture differ from ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmattn.backbones.base import NUM_STAGES, PyramidBackbone

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What is known of an architecture's published files.

    Attributes:
        name: the family, as in ``configs/<name>``.
        backbone: our class.
        origins: for each author of such files, how a name begins that only his files have, and the function
            that turns his names (and shapes) into those of the published classifiers.
        classifier_norm: the published classifier's final norm; None where it is a norm of the body.
        classifier_head: the published classifier's linear layer.
        output_norm: our output norms' names before the stage's number; None where they also feed the next stage
            and so are part of the body.
        stage: name of a parameter -> the first stage, from 0, that a backbone must have to need it, or None.
        rebuilt: last parts of the names of buffers that the model builds itself.
        resize: by last part of a name, the function (tensor, shape) -> tensor that fits it to another size.
    """

    name: str
    backbone: type[PyramidBackbone]
    origins: dict[str, tuple[str, Callable[[StateDict], StateDict]]]
    classifier_norm: str | None
    classifier_head: str
    output_norm: str | None
    stage: Callable[[str], int | None]
    rebuilt: tuple[str, ...]
    resize: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor | None]]

    @property
    def last_norm(self) -> str | None:
        return self.output_norm and f'backbone.{self.output_norm}{NUM_STAGES - 1}.'

    def is_output_norm(self, name: str) -> bool:
        norm = self.output_norm
        return norm is not None and re.match(rf'backbone\.{re.escape(norm)}\d+\.', name) is not None

    def find_origin(self, body: StateDict) -> str | None:
        for origin, (start, _) in self.origins.items():
            if any(name.startswith(start) for name in body):
                return origin
        return None

    def resized(self, name: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        resize = self.resize.get(name.rpartition('.')[2])
        return None if resize is None else resize(value, tuple(wanted.shape))
