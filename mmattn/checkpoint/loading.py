"""Loading a checkpoint: every tensor is accounted for before the first one is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .by_name import load_by_name
from .errors import CheckpointError
from .files import default_container, is_finite, read_checkpoint, weight_sets, weights_of
from .fit import Backbone, Fitted, fit_backbone, is_output_norm, same_kind
from .names import (
    CLASSIFIER_HEAD,
    CLASSIFIER_NORM,
    FAMILIES,
    REBUILT,
    StateDict,
    find_origin,
    rename,
)
from .report import LoadReport
from .wrappers import find_prefixes

BACKBONE = 'backbone.'
LAST_NORM = 'norm3.'


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping,
    strict: bool = True,
    prefix: str | None = None,
) -> LoadReport:
    """Load published or own weights into a backbone, or into an OpenMMLab model with one inside.

    The origin (the authors' classifier, detector or segmentor, timm's classifier, or our own) is
    found from the names. Position tables are resized where windows differ. A classifier's final
    norm and linear layer are used by a model with a classification head, where the norm is the last
    stage's output norm, and dropped otherwise. Layers that depend on the number of classes stay
    fresh where that number differs.

    Files of models with other backbones are taken by their names: :func:`load_by_name`.

    Args:
        model: a backbone of this package, or a model whose ``backbone`` is one, or any other; DDP's
            wrapper may be around it.
        source: a path, a URL, or a state dict. Files, torch's or safetensors, are read without
            executing anything in them, and mapped where they can be: the model is the one copy in
            memory.
        strict: raise unless every tensor of the source is used or known to be droppable, and every
            one of the model is loaded or known to be fresh. Otherwise what does not fit is left out
            and reported.
        prefix: take only names that begin so, without it. Not needed for what torch's wrappers add
            to names, nor where all weights of a model lie below one prefix, such as ``model.``.

    Returns:
        Report of what was loaded, resized, dropped and left fresh; print it.

    Raises:
        CheckpointError: (a ValueError) the source cannot be read, has no known format, or does not
            fit; the message names it, the format found and the first names in question. A model
            with a backbone of this package is unchanged.
        FileNotFoundError: there is no such file.
    """
    model = getattr(model, 'module', model)
    found = _find_backbone(model)
    if found is None:
        return load_by_name(model, source, strict, prefix)
    backbone, is_whole = found
    content, label = read_checkpoint(source)
    container = default_container(content)
    state = weights_of(content, label, container)
    if prefix is None:
        prefix = _only_prefix(state, label, backbone.family)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'  # as mmengine
    outside = [name for name in state if not name.startswith(prefix)]
    state = _below(state, prefix, label)
    body, heads = _split(state)
    origin = find_origin(body, backbone.family)
    if origin is None:
        raise CheckpointError(_unknown(label, state, (backbone.family,)))

    fitted = fit_backbone(body, backbone.state_dict(), backbone.family)
    kind = _kind(fitted.classifier, heads)
    report = LoadReport(label, f'{origin} {backbone.family} {kind}')
    report.dropped |= dict.fromkeys(outside, f'not below {prefix!r}')
    report.other_sets = {k: name for k, name in weight_sets(content).items() if name != container}
    wanted = model.state_dict()
    if not is_whole:
        wanted = {BACKBONE + name: value for name, value in wanted.items()}
    has_classifier = is_whole and hasattr(getattr(model, 'head', None), 'fc')
    if kind == 'classifier':
        _sort_classifier(fitted, heads, has_classifier)
    taken = _take_backbone(fitted, report)
    unfit = [f'{BACKBONE}{name}' for name in fitted.unfit]
    for name, value in heads.items():
        if name in wanted and value.shape == wanted[name].shape and same_kind(value, wanted[name]):
            taken[name] = value
            report.loaded.append(name)
        elif reason := _why_droppable(name, value, wanted, is_whole, has_classifier):
            report.dropped[name] = reason
        else:
            unfit.append(name)

    report.fresh = [name for name in wanted if name not in taken]
    missing = [name for name in report.fresh if not _may_be_fresh(name, kind, report)]
    if (strict and (unfit or missing)) or not taken:
        values = {BACKBONE + name: value for name, value in fitted.unfit.items()} | heads
        described = [_with_shapes(name, values[name], wanted) for name in unfit]
        raise CheckpointError(_misfit(report, type(backbone).__name__, described, missing))
    report.dropped |= dict.fromkeys(unfit, 'does not fit')
    report.not_finite = [k for k, v in taken.items() if not is_finite(v.to(wanted[k].dtype))]
    if not is_whole:
        taken = {name.removeprefix(BACKBONE): value for name, value in taken.items()}
    model.load_state_dict(taken, strict=False)
    return report


def to_own_format(state: StateDict, label: str = 'a state dict') -> tuple[str, StateDict]:
    """Format of a state dict, and its tensors under the names of a model with our backbone.

    Raises:
        CheckpointError: it has no known format.
    """
    body, heads = _split(state)
    for family in FAMILIES:
        if origin := find_origin(body, family):
            own, classifier = {}, {}
            for name, value in rename(body, family).items():
                if name.rpartition('.')[2] in REBUILT:
                    continue
                if name.startswith((CLASSIFIER_NORM, CLASSIFIER_HEAD)):
                    classifier[name.replace(CLASSIFIER_NORM, BACKBONE + LAST_NORM)] = value
                else:
                    own[BACKBONE + name] = value
            return f'{origin} {family} {_kind(classifier, heads)}', own | classifier | heads
    raise CheckpointError(_unknown(label, state, tuple(FAMILIES)))


def _find_backbone(model: nn.Module) -> tuple[Backbone, bool] | None:
    """Backbone of this package, and whether the model is more than it; None if there is none."""
    candidates: tuple[tuple[bool, Any], ...] = (
        (False, model),
        (True, getattr(model, 'backbone', None)),
    )
    for is_whole, module in candidates:
        if getattr(module, 'family', None) in FAMILIES:
            return module, is_whole
    return None


def _only_prefix(state: StateDict, label: str, family: str) -> str:
    prefixes = find_prefixes(state, family)
    if len(prefixes) > 1 and '' not in prefixes:
        raise CheckpointError(
            f'{label} holds {len(prefixes)} {family} models, below '
            f'{" and ".join(map(repr, prefixes))}: choose one by prefix. The model is unchanged.'
        )
    return prefixes[0] if len(prefixes) == 1 else ''


def _below(state: StateDict, prefix: str, label: str) -> StateDict:
    below = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    if not below:
        first = ', '.join(list(state)[:5])
        raise CheckpointError(f'{label} has no names that begin with {prefix!r}, but {first}')
    return below


def _split(state: StateDict) -> tuple[StateDict, StateDict]:
    """Tensors of the backbone, and all others. A file without a prefix is all backbone."""
    body = {n.removeprefix(BACKBONE): v for n, v in state.items() if n.startswith(BACKBONE)}
    if not body:
        return state, {}
    return body, {n: v for n, v in state.items() if not n.startswith(BACKBONE)}


def _kind(classifier: StateDict, heads: StateDict) -> str:
    if classifier or any(name.startswith(CLASSIFIER_HEAD) for name in heads):
        return 'classifier'
    return 'model' if heads else 'backbone'


def _sort_classifier(fitted: Fitted, heads: StateDict, has_classifier: bool) -> None:
    """Hand a classifier's norm to the backbone and its linear layer to the heads, or drop them."""
    for name, value in fitted.classifier.items():
        if name.startswith(CLASSIFIER_HEAD):
            heads[name] = value
        elif has_classifier:
            fitted.loaded[name.replace(CLASSIFIER_NORM, LAST_NORM)] = value
        else:
            fitted.dropped[name.replace(CLASSIFIER_NORM, LAST_NORM)] = "the classifier's norm"
    if not has_classifier:
        for name in [name for name in fitted.loaded if name.startswith(LAST_NORM)]:
            del fitted.loaded[name]
            fitted.dropped[name] = "the classifier's norm"


def _take_backbone(fitted: Fitted, report: LoadReport) -> StateDict:
    for name, reason in fitted.dropped.items():
        report.dropped[BACKBONE + name] = reason
    for name in fitted.loaded:
        if name in fitted.resized:
            report.resized[BACKBONE + name] = fitted.resized[name]
        else:
            report.loaded.append(BACKBONE + name)
    return {BACKBONE + name: value for name, value in fitted.loaded.items()}


def _why_droppable(
    name: str, value: Tensor, wanted: StateDict, is_whole: bool, has_classifier: bool
) -> str | None:
    """Reason to leave out a tensor that is not of the backbone, if there is one."""
    if name.startswith(CLASSIFIER_HEAD) and not has_classifier:
        return "the classifier's head"
    if not is_whole:
        return 'not of the backbone'
    like = wanted.get(name)
    if like is None or value.ndim == 0 or value.shape == like.shape:
        return None
    if value.shape[1:] == like.shape[1:] and same_kind(value, like):
        # A head's last layer: all but the first dimension agree.
        return f'has other classes: {tuple(value.shape)}, the model {tuple(like.shape)}'
    return None


def _may_be_fresh(name: str, kind: str, report: LoadReport) -> bool:
    if name.startswith(BACKBONE):
        return is_output_norm(name.removeprefix(BACKBONE))
    return name in report.dropped or kind != 'model'


def _with_shapes(name: str, value: Tensor, wanted: StateDict) -> str:
    if name not in wanted:
        return name
    if value.shape != wanted[name].shape:
        return f'{name} {tuple(value.shape)}, which is {tuple(wanted[name].shape)} in the model'
    if value.is_meta:
        return f'{name} on the meta device, without numbers'
    return f'{name} of {value.dtype}, which is {wanted[name].dtype} in the model'


def _misfit(report: LoadReport, backbone: str, unfit: list[str], missing: list[str]) -> str:
    parts = [
        f'{report.source} was taken for a {report.format} file, '
        f'but does not fit the model with {backbone}'
    ]
    for names, fault in ((unfit, 'that the model cannot use'), (missing, 'that it lacks')):
        if names:
            parts.append(f'{len(names)} names {fault}, such as {", ".join(names[:5])}')
    return '; '.join(parts) + '. The model is unchanged.'


def _unknown(label: str, state: StateDict, families: tuple[str, ...]) -> str:
    known = ', '.join(f'{name} ({" or ".join(FAMILIES[name].origins)})' for name in families)
    first = ', '.join(list(state)[:5])
    return f'{label} is no {known} checkpoint: its first names are {first}. The model is unchanged.'
