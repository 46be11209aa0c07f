"""Ctrl-C, SIGTERM and SIGUSR1 (which clusters send before their time is up): they ask training to stop and save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Stoppable(Protocol):
    """Whoever looks at `stop_asked` after every step."""

    stop_asked: bool


@contextmanager
def listening(loop: Stoppable) -> Iterator[None]:
    """While it is open, a signal only asks it to stop after the step it is in; a second one insists."""

    def ask(number, frame):
        if loop.stop_asked:
            raise KeyboardInterrupt
        loop.stop_asked = True

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread: whoever owns it decides
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
