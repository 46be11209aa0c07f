"""Skips updates with non-finite values or gradient spikes, and ends a process whose step hangs."""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transfusion.config import FaultToleranceConfig
from transfusion.disk import write_json
from transfusion.parallel import Ranks

NORM_HISTORY = 128  # gradient norms that spikes are compared with
MIN_NORM_HISTORY = 32  # fewer norms do not define a spike


class TrainingError(ValueError):
    """Training cannot continue; the message is one line."""


class Guard:
    """Decides whether an update is applied. Checkpoints store `grad_norms` and `num_consecutive_skips`."""

    def __init__(self, config: FaultToleranceConfig, folder: Path, ranks: Ranks):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.grad_norms: list[float] = []  # of the last applied updates
        self.num_consecutive_skips = 0  # consecutive updates

    def accepts_update(self, step: int, grad_norm: float, values: dict[str, float], batch: Callable[[], dict]) -> bool:
        """Whether to apply the update of this step, counted from 1. All ranks must call it with the same numbers.

        A rejected update writes faults/step-NNNNNN.json: the reason, and every rank's batch, as `batch` describes it.
        TrainingError after more than `skip_nonfinite` consecutive rejected updates.
        """
        reason = self._reason_to_skip(grad_norm, values)
        if reason is None:
            self.grad_norms, self.num_consecutive_skips = [*self.grad_norms, grad_norm][-NORM_HISTORY:], 0
            return True
        self.num_consecutive_skips += 1
        path = self.folder / "faults" / f"step-{step:06d}.json"
        values = values | {"gradient_norm": grad_norm}
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        batches = self.ranks.gather(batch())
        if self.ranks.is_main:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": step, "reason": reason, **numbers, "batches": batches})
        if self.num_consecutive_skips > self.config.skip_nonfinite:
            raise TrainingError(
                f"step {step}: {reason}, so the update was not applied; {path} lists the documents of the batch, and the "
                "last checkpoint is intact. Try a lower training.learning_rate, or fault_tolerance.skip_nonfinite N to skip "
                "up to N consecutive updates"
            )
        return False

    def _reason_to_skip(self, grad_norm: float, values: dict[str, float]) -> str | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name.replace('_', ' ')} is not finite"
        if not math.isfinite(grad_norm):
            return "the gradient is not finite"
        if self.config.skip_spikes_above is None or len(self.grad_norms) < MIN_NORM_HISTORY:
            return None
        mean, std = statistics.mean(self.grad_norms), statistics.pstdev(self.grad_norms)
        if grad_norm <= mean + self.config.skip_spikes_above * std:
            return None
        return f"the gradient norm {grad_norm:.3g} is a spike (mean {mean:.3g}, standard deviation {std:.2g})"


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Yields `reset_watchdog()`, to be called at every step; 0 seconds disables the watchdog.

    When `seconds` pass without a call, the stacks of all threads go to faults/stacks-rank-N.txt and the process exits with
    code 1, so that torchrun can restart all processes.
    """
    last_call, stopped = time.monotonic(), threading.Event()

    def reset_watchdog() -> None:
        nonlocal last_call
        last_call = time.monotonic()

    def watch() -> None:
        while not stopped.wait(seconds / 10):
            if time.monotonic() - last_call > seconds:
                path = folder / "faults" / f"stacks-rank-{rank}.txt"
                path.parent.mkdir(exist_ok=True)
                with path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                line = f"transfusion: no step has ended for {seconds:g} s; {path} has the stacks of all threads"
                print(line, file=sys.stderr, flush=True)
                os._exit(1)

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield reset_watchdog
    finally:
        stopped.set()
