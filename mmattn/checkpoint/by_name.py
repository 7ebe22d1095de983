"""Loading a checkpoint into a model with another backbone, such as Swin, by the model's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from .errors import CheckpointError
from .files import read_state_dict
from .fit import same_kind
from .report import LoadReport


def load_by_name(
    model: nn.Module, source: str | Path | Mapping, strict: bool = True, prefix: str | None = None
) -> LoadReport:
    """Load weights whose names are the model's, as trainings write them.

    Args:
        model: any model.
        source: as for :func:`mmattn.checkpoint.load_checkpoint`.
        strict: raise at names that only the source or only the model has, instead of reporting
            them.
        prefix: take only names that begin so, without it.

    Raises:
        CheckpointError: the source cannot be read, or does not fit; the model is unchanged.
        FileNotFoundError: there is no such file.
        TypeError: source is neither a path nor a mapping.
    """
    state, label = read_state_dict(source)
    if prefix:
        prefix = prefix.rstrip('.') + '.'  # as mmengine
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    name, wanted = type(model).__name__, model.state_dict()
    unfit = [n for n, value in state.items() if n in wanted and not same_kind(value, wanted[n])]
    if unfit:
        raise CheckpointError(
            f'{label} does not fit the {name}: {", ".join(unfit[:5])} are of another dtype'
        )
    before = {n: value.clone() for n, value in wanted.items()}
    try:
        # Other backbones rename and resize in it, too.
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes
        model.load_state_dict(before)
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'{label} does not fit the {name}: {reason}') from error
    if strict and (missing or unexpected):
        faults = [
            f'{verb} {len(names)} names {whose}, such as {", ".join(names[:5])}'
            for verb, names, whose in (
                ('has', unexpected, 'that the model cannot use'),
                ('lacks', missing, 'of the model'),
            )
            if names
        ]
        model.load_state_dict(before)
        raise CheckpointError(f'{label} does not fit the {name}: it {" and ".join(faults)}')
    report = LoadReport(label, f"names of the {name}'s layers", fresh=missing)
    report.loaded = [n for n in state if n not in unexpected]
    report.dropped = dict.fromkeys(unexpected, 'not of the model')
    return report
