"""Progress of a download, on stderr."""

from __future__ import annotations

import sys
from time import monotonic

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 15.0
_BAR = 30


class Progress:
    """A bar in a terminal, or else a line now and then.

    Args:
        size: bytes to come; None: unknown.
    """

    def __init__(self, size: int | None):
        self.size = size
        self.is_terminal = sys.stderr.isatty()
        self.interval = _TERMINAL_SECONDS if self.is_terminal else _LOG_SECONDS
        self.start = monotonic()
        self.next = self.start + self.interval

    def show(self, received: int) -> None:
        """Print how many bytes have come, if it is time to."""
        if monotonic() >= self.next:
            self._print(received)
            self.next = monotonic() + self.interval

    def end(self, received: int) -> None:
        """Print the last state, and end the line of the bar."""
        self._print(received)
        if self.is_terminal:
            print(file=sys.stderr)

    def _print(self, received: int) -> None:
        speed = received / 1e6 / max(monotonic() - self.start, 1e-3)
        text = f'{received / 1e6:.1f} MB, {speed:.1f} MB/s'
        if self.size:
            part = received / self.size
            text = f'{part:4.0%} of {self.size / 1e6:.1f} MB, {speed:.1f} MB/s'
            if self.is_terminal:
                done = int(part * _BAR)
                text = f'[{"#" * done}{"." * (_BAR - done)}] {text}'
        end = '\r' if self.is_terminal else '\n'
        print(f'  {text}', end=end, file=sys.stderr, flush=True)
