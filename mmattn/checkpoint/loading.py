"""Fitting a checkpoint to a model: every tensor is accounted for before the first one is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mmattn.backbones.base import PyramidBackbone

from .dat import DAT_FAMILY
from .family import Family, StateDict
from .files import CheckpointError, read_state_dict
from .gcvit import GCVIT
from .quadtree import QUADTREE
from .report import LoadReport

FAMILIES = (GCVIT, DAT_FAMILY, QUADTREE)

# Names of an mmpretrain classifier's linear layer.
CLASSIFIER_HEAD = 'head.fc.'


def load_checkpoint(
    model: nn.Module, source: str | Path | Mapping, strict: bool = True
) -> LoadReport:
    """Load published or own weights into a backbone, or into an OpenMMLab model with one inside.

    What the source is (the authors' classifier, detector or segmentor, timm's classifier, or our own) is found
    out from its names. Position tables are resized where windows differ. A classifier's final norm and linear
    layer are used by a model with a classification head, where the norm is the last stage's output norm, and
    dropped otherwise. Layers that depend on the number of classes stay fresh where that number differs.

    Args:
        model: a backbone of this package, or a model whose ``backbone`` is one; DDP's wrapper may be around it.
        source: a path, a URL, or a state dict. Files, torch's or safetensors, are read without executing anything
            in them, and mapped where they can be: the model is the one copy in memory.
        strict: raise unless every tensor of the source is used or known to be droppable, and every one of the
            model is loaded or known to be fresh. Otherwise what does not fit is left out and reported.

    Returns:
        What was loaded, resized, dropped and left fresh; print it.

    Raises:
        CheckpointError: (a ValueError) the source cannot be read, is none of the known formats, or does not fit;
            the message names it, the format found and the first names in question. The model is unchanged.
        FileNotFoundError: there is no such file.
        TypeError: there is no backbone of this package in the model.
    """
    model = getattr(model, 'module', model)
    prefix, backbone = _find_backbone(model)
    family = next(family for family in FAMILIES if isinstance(backbone, family.backbone))
    state, label = read_state_dict(source)
    source_format, state, dropped = _to_own_names(state, family, label)
    report = LoadReport(label, str(source_format), dropped=dropped)

    wanted = {
        (name if prefix else f'backbone.{name}'): value
        for name, value in model.state_dict().items()
    }
    has_classifier = hasattr(getattr(model, 'head', None), 'fc')
    fitted, unfit = {}, []
    for name, value in state.items():
        reason = _why_droppable(
            name, wanted, source_format, bool(prefix), has_classifier, family, backbone
        )
        if reason:
            report.dropped[name] = reason
        elif name not in wanted:
            unfit.append(name)
        elif value.shape == wanted[name].shape:
            fitted[name] = value
            report.loaded.append(name)
        elif (resized := family.resized(name, value, wanted[name])) is not None:
            fitted[name] = resized
            report.resized[name] = (tuple(value.shape), tuple(resized.shape))
        elif _differs_in_classes(name, value, wanted[name]):
            report.dropped[name] = (
                f'has other classes: {tuple(value.shape)}, the model {tuple(wanted[name].shape)}'
            )
        else:
            unfit.append(
                f'{name} {tuple(value.shape)}, which is {tuple(wanted[name].shape)} in the model'
            )
    report.fresh = [name for name in wanted if name not in fitted]
    missing = [
        name
        for name in report.fresh
        if not _may_be_fresh(name, source_format, report.dropped, family)
    ]
    if (strict and (unfit or missing)) or not fitted:
        raise CheckpointError(
            _misfit(label, source_format, type(backbone).__name__, unfit, missing)
        )

    report.dropped |= {entry.split(' ')[0]: 'does not fit' for entry in unfit}
    if not prefix:
        fitted = {name.removeprefix('backbone.'): value for name, value in fitted.items()}
    model.load_state_dict(fitted, strict=False)
    return report


def to_own_format(state: StateDict, label: str = 'a state dict') -> tuple[str, StateDict]:
    """What a state dict is, and its tensors under the names of an OpenMMLab model with our backbone.

    Raises:
        CheckpointError: it is none of the known formats.
    """
    body, _ = _split(state)
    for family in FAMILIES:
        if family.find_origin(body):
            source_format, own, _ = _to_own_names(state, family, label)
            return str(source_format), own
    raise CheckpointError(_unknown(label, state, FAMILIES))


@dataclass(frozen=True)
class SourceFormat:
    """Whose names a checkpoint has, and how much of a model is in it: 'classifier', 'model' or 'backbone'."""

    origin: str
    family: str
    kind: str

    def __str__(self) -> str:
        return f'{self.origin} {self.family} {self.kind}'


def _find_backbone(model: nn.Module) -> tuple[str, PyramidBackbone]:
    for prefix, module in (('', model), ('backbone.', getattr(model, 'backbone', None))):
        if isinstance(module, tuple(family.backbone for family in FAMILIES)):
            return prefix, module
    names = ', '.join(family.backbone.__name__ for family in FAMILIES)
    raise TypeError(
        f'model must be or have as its backbone one of {names}, got {type(model).__name__}'
    )


def _split(state: StateDict) -> tuple[StateDict, StateDict]:
    """The backbone's tensors, without prefix, and all others. A file without a prefix is all backbone."""
    body = {
        name.removeprefix('backbone.'): v
        for name, v in state.items()
        if name.startswith('backbone.')
    }
    if not body:
        return state, {}
    return body, {name: v for name, v in state.items() if not name.startswith('backbone.')}


def _to_own_names(
    state: StateDict, family: Family, label: str
) -> tuple[SourceFormat, StateDict, dict[str, str]]:
    """(format, tensors by our names, names dropped and why)."""
    body, rest = _split(state)
    origin = family.find_origin(body)
    if origin is None:
        raise CheckpointError(_unknown(label, state, (family,)))
    body = family.origins[origin][1](body)
    own, dropped = dict(rest), {}
    for name, value in body.items():
        if name.rpartition('.')[2] in family.rebuilt:
            dropped[f'backbone.{name}'] = 'built by the model'
        elif family.classifier_norm and name.startswith(family.classifier_norm):
            own[family.last_norm + name.removeprefix(family.classifier_norm)] = value
        elif name.startswith(family.classifier_head):
            own[CLASSIFIER_HEAD + name.removeprefix(family.classifier_head)] = value
        else:
            own[f'backbone.{name}'] = value
    is_classifier = any(name.startswith(CLASSIFIER_HEAD) for name in own)
    kind = 'classifier' if is_classifier else 'model' if rest else 'backbone'
    return SourceFormat(origin, family.name, kind), own, dropped


def _why_droppable(
    name, wanted, source_format, is_whole, has_classifier, family, backbone
) -> str | None:
    if source_format.kind == 'classifier' and not has_classifier:
        if name.startswith(CLASSIFIER_HEAD):
            return "the classifier's head"
        if family.last_norm and name.startswith(family.last_norm):
            return "the classifier's norm"
    if name in wanted:
        return None
    if not name.startswith('backbone.'):
        return None if is_whole else 'not of the backbone'
    if family.is_output_norm(name):
        return 'norm of a stage without output'
    stage = family.stage(name.removeprefix('backbone.'))
    return (
        'of a stage that is not built'
        if stage is not None and stage >= backbone.num_built_stages
        else None
    )


def _differs_in_classes(name: str, value: Tensor, wanted: Tensor) -> bool:
    """A head's last layer, fit for another number of classes: all but the first dimension agree."""
    return (
        not name.startswith('backbone.') and value.ndim > 0 and value.shape[1:] == wanted.shape[1:]
    )


def _may_be_fresh(
    name: str, source_format: SourceFormat, dropped: dict[str, str], family: Family
) -> bool:
    if name.startswith('backbone.'):
        return family.is_output_norm(name)
    return name in dropped or source_format.kind != 'model'


def _misfit(
    label: str, source_format: SourceFormat, backbone: str, unfit: list[str], missing: list[str]
) -> str:
    parts = [
        f'{label} was taken for a {source_format} file, but does not fit the model with {backbone}'
    ]
    if unfit:
        parts.append(
            f'{len(unfit)} names that the model cannot use, such as {", ".join(unfit[:5])}'
        )
    if missing:
        parts.append(f'{len(missing)} names that it lacks, such as {", ".join(missing[:5])}')
    return '; '.join(parts) + '. The model is unchanged.'


def _unknown(label: str, state: StateDict, families: tuple[Family, ...]) -> str:
    known = ', '.join(f'{family.name} ({" or ".join(family.origins)})' for family in families)
    first = ', '.join(list(state)[:5])
    return f'{label} is no {known} checkpoint: its first names are {first}. The model is unchanged.'
