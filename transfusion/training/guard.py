"""Skips updates with non-finite values or gradient spikes, and ends a process that hangs."""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from transfusion.config import FaultToleranceConfig
from transfusion.disk import write_json
from transfusion.parallel import Ranks

NORM_HISTORY = 128  # gradient norms that spikes are compared with
MIN_NORM_HISTORY = 32  # fewer norms do not define a spike


class TrainingError(ValueError):
    """Training cannot continue; the message is one line."""


class Guard:
    """Decides on the device whether an update is applied, so that no step waits for the numbers of the one before."""

    def __init__(self, config: FaultToleranceConfig, folder: Path, ranks: Ranks, device: torch.device):
        self.config, self.folder, self.ranks, self.device = config, folder, ranks, device
        self.load_state([], 0)

    def load_state(self, grad_norms: Sequence[float], num_skips: int) -> None:
        """Set the gradient norms of the last applied updates, and the number of consecutive rejected ones."""
        history = [math.nan] * NORM_HISTORY + list(grad_norms)
        self.norms = torch.tensor(history[-NORM_HISTORY:], device=self.device)  # (NORM_HISTORY,) NaN: no update yet
        self.num_skips = torch.tensor(num_skips, device=self.device)  # ()

    @property
    def state(self) -> tuple[list[float], int]:
        """The arguments of `load_state`, for checkpoints."""
        return self.norms[~self.norms.isnan()].tolist(), int(self.num_skips)

    def judge(self, numbers: Tensor) -> Tensor:
        """The verdict (3,) on an update, from its gradient norm and its losses (n,), which are equal on all ranks: the
        number of consecutive rejected updates, 0 when this one is applied; mean and standard deviation of the history.

        After more than `skip_nonfinite` rejected updates it applies none, because the error is raised one step later.
        """
        norm, known = numbers[0], ~self.norms.isnan()
        mean = self.norms.where(known, 0).sum() / known.sum()
        std = ((self.norms - mean).square().where(known, 0).sum() / known.sum()).sqrt()
        applied = numbers.isfinite().all() & (self.num_skips <= self.config.skip_nonfinite)
        if self.config.skip_spikes_above is not None:
            applied &= (known.sum() < MIN_NORM_HISTORY) | (norm <= mean + self.config.skip_spikes_above * std)
        self.norms = torch.cat([self.norms[1:], norm[None]]).where(applied, self.norms)
        self.num_skips = (self.num_skips + 1).where(~applied, 0)
        return torch.stack([self.num_skips, mean, std])

    def report(self, step: int, verdict: Sequence[float], norm: float, losses: dict[str, float], batch: dict) -> str:
        """Report a rejected update of this step, counted from 1: the reason, or "" when the update was applied. All ranks
        must call it with the same numbers.

        It writes faults/step-NNNNNN.json: the reason, and every rank's `batch`, a description of it. TrainingError after
        more than `skip_nonfinite` consecutive rejected updates.
        """
        num_skips, mean, std = verdict
        if not num_skips:
            return ""
        not_finite = [name for name, value in (losses | {"gradient": norm}).items() if not math.isfinite(value)]
        if not_finite:
            reason = f"the {not_finite[0].replace('_', ' ')} is not finite"
        else:
            reason = f"the gradient norm {norm:.3g} is a spike (mean {mean:.3g}, standard deviation {std:.2g})"
        path = self.folder / "faults" / f"step-{step:06d}.json"
        values = losses | {"gradient_norm": norm}
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        batches = self.ranks.gather(batch)
        if self.ranks.is_main:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": step, "reason": reason, **numbers, "batches": batches})
        if num_skips > self.config.skip_nonfinite:
            raise TrainingError(
                f"step {step}: {reason}, so the update was not applied; {path} lists the documents of the batch, and the "
                "last checkpoint is intact. Try a lower training.learning_rate, or fault_tolerance.skip_nonfinite N to skip "
                "up to N consecutive updates"
            )
        return reason


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Yields `reset_watchdog()`, to be called after each part of the work: a step, a file of a checkpoint, a batch of an
    evaluation, a denoising step of a preview. Any thread may call it. 0 seconds disables the watchdog.

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
                with path.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                line = f"transfusion: training made no progress for {seconds:g} s; {path} has the stacks of all threads"
                print(line, file=sys.stderr, flush=True)
                os._exit(1)

    if seconds:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield reset_watchdog
    finally:
        stopped.set()
