"""The error of everything that reads checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found or read, has no known format, or does not fit the model."""
