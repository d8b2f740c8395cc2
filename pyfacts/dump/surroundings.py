"""What surrounds a running dump: signals, and the model's mode."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from .errors import DumpInterrupted


class Signals:
    """Remembers SIGTERM and SIGUSR1 until the dump comes by."""

    def __init__(self) -> None:
        self.received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum

    def check(self, shards_done: int, shards_total: int) -> None:
        """Raises DumpInterrupted if one has come."""
        if self.received is not None:
            raise DumpInterrupted(self.received, shards_done, shards_total)


@contextlib.contextmanager
def caught_signals() -> Iterator[Signals]:
    """Catches the signals in the main thread, where alone that is possible; their handlers come back afterwards.

    One that comes too late to interrupt the body is sent again to whoever handled it before.
    """
    signals = Signals()
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                previous[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if signals.received is not None:
        os.kill(os.getpid(), signals.received)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each one's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
