"""Signals that stop training. Clusters send SIGUSR1 or SIGTERM before a job's time ends, a closed terminal sends SIGHUP."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stoppable(Protocol):
    """Checks `stop_requested` after every step."""

    stop_requested: bool


@contextmanager
def stop_on_signal(loop: Stoppable) -> Iterator[None]:
    """While open, a signal sets `stop_requested`, and a second Ctrl-C raises KeyboardInterrupt.

    Other signals may come twice: a scheduler signals torchrun and its processes, and torchrun passes the signal on to them.
    """
    num_interrupts = 0

    def request_stop(number, frame):
        nonlocal num_interrupts
        num_interrupts += number == signal.SIGINT
        if num_interrupts > 1:
            raise KeyboardInterrupt
        loop.stop_requested = True

    with _handle_signals(request_stop):
        yield


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """While open, a signal ends the process with `exit_stopped`: before training there is nothing to save."""
    with _handle_signals(lambda number, frame: exit_stopped()):
        yield


def exit_stopped() -> None:
    """Exit as a run that a signal stopped: with 75, "temporary failure" in sysexits.h, so that a scheduler can start it
    again. Under torchrun with 0, because torchrun restarts all processes after any other code.

    Signals are ignored from now on: one that is repeated while the process ends would replace the code.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0 if is_under_torchrun() else os.EX_TEMPFAIL)


def is_under_torchrun() -> bool:
    """Was this process started by torchrun?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def _handle_signals(handler: Callable) -> Iterator[None]:
    """Set a handler. A signal that was ignored at the start, as nohup ignores SIGHUP, stays ignored, except under torchrun:
    it does not ignore the signal, passes it on, and kills processes that do not end."""
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number, frame):
        if number == signal.SIGHUP:
            _leave_terminals(terminals)
        handler(number, frame)

    previous_handlers = {}
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN and not is_under_torchrun():
            continue
        try:
            previous_handlers[number] = signal.signal(number, handle)
        except ValueError:  # only the main thread can set handlers
            break
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            if signal.getsignal(number) is handle:  # not after exit_stopped
                signal.signal(number, previous)


def _leave_terminals(terminals: list[int]) -> None:
    """Write to nowhere instead of a terminal that was closed: every write to it would be an OSError."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
