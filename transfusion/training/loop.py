"""The loop that every training shares: read ahead, step, look, save; stop when asked, and go on exactly where it stopped."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from transfusion.checkpoint.open import restore_newest
from transfusion.checkpoint.save import Saver
from transfusion.config import FaultToleranceConfig
from transfusion.parallel import Ranks
from transfusion.training.guard import Guard, TrainingError, watchdog
from transfusion.training.metrics import Metrics, ProgressBar
from transfusion.training.signals import listening


class LoopConfig(Protocol):
    """The numbers of a training config that the loop reads."""

    steps: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclass
class Progress:
    """How far a training is: all that is not a tensor. The next step's batch is read from `place` on."""

    step: int = 0
    seconds: float = 0.0  # spent training, over all its sessions
    seen: int = 0  # positions or pictures, over all ranks
    loader_state: Any = None  # in the data, as the task has it
    norms: list[float] = field(default_factory=list)  # what the guard remembers
    skipped: int = 0


class Task(Protocol):
    """What is trained: what differs between a model and a codec."""

    seen_in: str  # what `seen` counts, in the plural

    def read(self, place: Any) -> Iterator[tuple[Any, Any]]:
        """From a place on without end: what a step needs, and the place behind it. Runs in a thread of its own."""

    def step(self, number: int, read: Any, allows: Callable[..., bool]) -> tuple[dict[str, float], int]:
        """One update, the `number`-th from 0 on, applied if the guard allows it: its values, and how much was seen."""

    def describe(self, values: dict[str, float]) -> str:
        """The values that a person wants to follow, in a few words."""

    def evaluate_heldout(self) -> tuple[dict, str]:
        """How good it is on what was held out, as values and in words."""

    def preview(self, step: int) -> None:
        """A look at what it makes."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint stores or fills in, by part and name."""


class Loop:
    """Trains a task in a run's folder, on all ranks alike; rank 0 writes what is written once."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        fault_tolerance: FaultToleranceConfig,
        folder: Path,
        ranks: Ranks,
        preview_every: int = 0,
    ):
        self.task, self.config, self.folder, self.ranks = task, config, folder, ranks
        self.watchdog, self.preview_every = fault_tolerance.watchdog, preview_every
        self.progress = Progress()
        self.guard = Guard(fault_tolerance, folder, ranks)
        self.stop_asked = False
        self.shown = 0.0, 0  # seconds and seen, when the screen last told a speed

    def restore(self, say: Callable[[str], None]) -> None:
        """From the newest whole checkpoint of the folder, if there is any; `say` is told, on rank 0."""
        found = restore_newest(self.folder, self.task.tensors(), self.ranks, say)
        if found:
            self.load_state(found[1])
            if self.ranks.is_main:
                say(f"going on from {found[0]}")

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint whose tensors have been filled in."""
        try:
            self.progress = Progress(**state)
        except TypeError:
            said = "the checkpoint is another version's of transfusion: go on with that one, or begin anew"
            raise TrainingError(said) from None
        self.guard.norms, self.guard.skipped = list(self.progress.norms), self.progress.skipped
        self.shown = self.progress.seconds, self.progress.seen

    def run(self) -> bool:
        """Up to the last step. False when a signal stopped it before; it is saved either way."""
        config, progress = self.config, self.progress
        metrics = Metrics(self.folder / "metrics.jsonl", progress.step, self.ranks.is_main)
        screen = ProgressBar(config.steps, progress.step, self.ranks.is_main)
        with (
            watchdog(self.watchdog, self.folder, self.ranks.rank) as alive, listening(self), screen,
            Saver(self.folder, config.keep_checkpoints, self.ranks) as saver, ThreadPoolExecutor(1) as ahead,
        ):  # fmt: skip
            reading = self.task.read(progress.loader_state)
            coming = ahead.submit(next, reading)
            if progress.step == 0:
                self._evaluate_and_preview(metrics, screen)
            while progress.step < config.steps and not self.ranks.any(self.stop_asked):
                alive()
                begun = time.monotonic()
                read, place = coming.result()
                coming = ahead.submit(next, reading)
                with self.ranks.catching_peer_failure():
                    values, seen = self.task.step(progress.step, read, self.guard.accepts_update)
                progress.step, progress.loader_state, progress.seen = progress.step + 1, place, progress.seen + seen
                progress.seconds += time.monotonic() - begun
                self._log(metrics, screen, values)
                self._evaluate_and_preview(metrics, screen)
                if progress.step % config.checkpoint_every == 0 or progress.step == config.steps:
                    self._save(saver)
            if progress.step < config.steps:
                self._save(saver)
                saver.finish()
                screen.say(f"stopped at step {progress.step} and saved: the same command goes on from here")
        return progress.step >= config.steps

    def _save(self, saver: Saver) -> None:
        self.progress.norms, self.progress.skipped = self.guard.norms, self.guard.skipped
        saver.save(self.progress.step, self.task.tensors(), asdict(self.progress))

    def _log(self, metrics: Metrics, screen: ProgressBar, values: dict[str, float]) -> None:
        progress, config = self.progress, self.config
        if progress.step % config.log_every and progress.step != config.steps:
            return
        speed, what = (progress.seen - self.shown[1]) / (progress.seconds - self.shown[0]), self.task.seen_in
        self.shown = progress.seconds, progress.seen
        metrics.write(progress.step, **values, **{f"{what}_per_second": round(speed, 1)}, seconds=progress.seconds)
        screen.show(progress.step, f"{self.task.describe(values)}  {speed:,.0f} {what}/s")

    def _evaluate_and_preview(self, metrics: Metrics, screen: ProgressBar) -> None:
        """What was held out, and a preview, when it is time."""
        step = self.progress.step
        last = step == self.config.steps
        if step % self.config.validate_every == 0 or last:
            values, words = self.task.evaluate_heldout()
            metrics.write(step, heldout=values)
            screen.say(f"step {step}  held out  {words}")
        if self.preview_every and (step % self.preview_every == 0 or last):
            self.task.preview(step)
