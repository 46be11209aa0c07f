"""What stands between a bad step and the weights: numbers that are not finite, spikes, and steps that never end."""

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

REMEMBERED = 128  # gradient norms, for what is usual
ENOUGH = 32  # of them before any can be called a spike


class TrainingError(ValueError):
    """Training cannot go on; the message says why in one line."""


class Guard:
    """Judges each update before it is applied. `norms` and `skipped` go into checkpoints: what is usual stays so."""

    def __init__(self, config: FaultToleranceConfig, folder: Path, ranks: Ranks):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.norms: list[float] = []  # of the last updates that were applied
        self.skipped = 0  # in a row

    def accepts_update(self, step: int, norm: float, values: dict[str, float], batch: Callable[[], dict]) -> bool:
        """Is the update of this step (counted from 1) to be applied? All ranks must ask with the same numbers.

        If not, faults/step-NNNNNN.json says why, and what each rank read (`batch`). TrainingError when there were more than
        `skip` in a row.
        """
        reason = self._reason(norm, values)
        if reason is None:
            self.norms, self.skipped = [*self.norms, norm][-REMEMBERED:], 0
            return True
        self.skipped += 1
        path = self.folder / "faults" / f"step-{step:06d}.json"
        values = values | {"gradient_norm": norm}
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        read = self.ranks.gather(batch())
        if self.ranks.is_main:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": step, "reason": reason, **numbers, "read": read})
        if self.skipped > self.config.skip_nonfinite:
            raise TrainingError(
                f"step {step}: {reason}, so the step was not taken; {path} says what was read, and the last checkpoint is "
                "whole. A lower training.learning_rate may help, or fault_tolerance.skip_nonfinite N, which skips up to N "
                "such steps in a row"
            )
        return False

    def _reason(self, norm: float, values: dict[str, float]) -> str | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name.replace('_', ' ')} is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self.config.skip_spikes_above is None or len(self.norms) < ENOUGH:
            return None
        usual, deviation = statistics.mean(self.norms), statistics.pstdev(self.norms)
        if norm <= usual + self.config.skip_spikes_above * deviation:
            return None
        return f"the gradient's norm is {norm:.3g}, a spike (usual: {usual:.3g}, deviation {deviation:.2g})"


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Gives `alive()`: if it is not called again for so long, every thread's stack goes to faults/stacks-rank-N.txt and the
    process ends with exit code 1, so that torchrun can start all of them anew. 0 seconds: nobody watches.
    """
    last, over = time.monotonic(), threading.Event()

    def alive() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not over.wait(seconds / 10):
            if time.monotonic() - last > seconds:
                path = folder / "faults" / f"stacks-rank-{rank}.txt"
                path.parent.mkdir(exist_ok=True)
                with path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                line = f"transfusion: no step has ended for {seconds:g} s; {path} says where it hangs"
                print(line, file=sys.stderr, flush=True)
                os._exit(1)

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield alive
    finally:
        over.set()
