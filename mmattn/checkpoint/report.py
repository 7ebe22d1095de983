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
    """

    source: str
    format: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line: source, format, and the number of tensors loaded, resized, dropped, fresh."""
        return (
            f'{self.source} ({self.format}): {len(self.loaded)} loaded, '
            f'{len(self.resized)} resized, {len(self.dropped)} dropped, {len(self.fresh)} fresh'
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
