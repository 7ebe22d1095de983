"""Report on each tensor of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Fate of each tensor of a checkpoint, by the names of a model with our backbone.

    Attributes:
        source: the file, or 'a state dict'.
        format: origin, family and kind, such as 'published gcvit classifier'.
        loaded: tensors that were copied unchanged.
        resized: tensors that were interpolated, with both shapes.
        dropped: tensors of the checkpoint that were not used, with the reason.
        fresh: tensors of the model that the checkpoint does not have; they keep their values.
        other_sets: containers of the checkpoint's other weights: 'raw' as trained, 'ema' averaged.
    """

    source: str
    format: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    other_sets: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line: source, format, and the number of tensors loaded, resized, dropped, fresh.

        Another set of weights in the file is named, with the command that takes it out.
        """
        others = ''.join(
            f"; the file's {kind} weights ({name}) were not taken: "
            f'tools/model_converters/publish_model.py FILE --weights {kind} writes them to a file'
            for kind, name in self.other_sets.items()
        )
        return (
            f'{self.source} ({self.format}): {len(self.loaded)} loaded, '
            f'{len(self.resized)} resized, {len(self.dropped)} dropped, {len(self.fresh)} fresh'
            f'{others}'
        )

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [
            f'  resized {name}: {before} -> {after}'
            for name, (before, after) in self.resized.items()
        ]
        lines += [f'  dropped {name}: {reason}' for name, reason in self.dropped.items()]
        lines += [f'  fresh   {name}' for name in self.fresh]
        return '\n'.join(lines)
