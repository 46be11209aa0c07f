"""Ctrl-C, SIGTERM and SIGUSR1 stop training after the current step. Clusters send SIGUSR1 before a job's time ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Stoppable(Protocol):
    """Checks `stop_requested` after every step."""

    stop_requested: bool


@contextmanager
def stop_on_signal(loop: Stoppable) -> Iterator[None]:
    """While open, the first signal sets `stop_requested`, the second raises KeyboardInterrupt."""

    def request_stop(number, frame):
        if loop.stop_requested:
            raise KeyboardInterrupt
        loop.stop_requested = True

    previous_handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        try:
            previous_handlers[number] = signal.signal(number, request_stop)
        except ValueError:  # only the main thread can set handlers
            break
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
