"""What a signal that ends the program does: at once, or once the program has cleaned up.

A library that is interrupted while it is imported raises anything, or dies. So a signal ends the program on the spot
while there is nothing to clean up, imports above all, and raises KeyboardInterrupt only inside :func:`cleaned_up`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["cleaned_up", "handle_signals", "received_signal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _State:
    """Whether there is something to clean up, and the signal that came meanwhile."""

    cleans_up: bool = False
    received: int | None = None


_STATE = _State()


def handle_signals() -> None:
    """Take over the signals that would end the program; those that are ignored (nohup) stay so."""
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    if _STATE.cleans_up:
        _STATE.received = number
        raise KeyboardInterrupt(number)
    os.write(2, b"Aborted\n")
    os._exit(128 + number)


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Have a signal raise KeyboardInterrupt here, so that what is half-written goes and workers are stopped."""
    _STATE.cleans_up = True
    try:
        yield
    finally:
        _STATE.cleans_up = False


def received_signal() -> int | None:
    """Return the signal that was raised as KeyboardInterrupt, whatever became of that on its way, or None."""
    return _STATE.received
