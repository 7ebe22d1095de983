"""What happened to each tensor of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Names are those of a model with our backbone (``backbone.*``), whatever they are in the checkpoint.

    Attributes:
        source: the file, or 'a state dict'.
        format: what the checkpoint was found to be, such as 'published gcvit classifier'.
        loaded: tensors that were copied as they are.
        resized: tensors that were interpolated, with both shapes.
        dropped: tensors of the checkpoint that the model has no use for, with the reason.
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
        """One line: the source, what it is, and how many tensors went each way."""
        return (
            f'{self.source} ({self.format}): {len(self.loaded)} loaded, {len(self.resized)} resized, '
            f'{len(self.dropped)} dropped, {len(self.fresh)} fresh'
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
