"""The training loop of models and codecs: load the next batch ahead, step, evaluate, save; stop on a signal and resume."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transfusion.checkpoint.open import restore_newest
from transfusion.checkpoint.save import Saver
from transfusion.config import FaultToleranceConfig
from transfusion.parallel import Ranks
from transfusion.training.guard import Guard, TrainingError, watchdog
from transfusion.training.metrics import MetricsWriter, ProgressBar
from transfusion.training.signals import stop_on_signal


class LoopConfig(Protocol):
    """The fields of a training config that the loop uses."""

    steps: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclass
class Progress:
    """The training state that is not a tensor; state.json of a checkpoint holds it."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    num_seen: int = 0  # positions or images, over all ranks
    loader_state: Any = None  # of the task's loader, before the next batch
    grad_norms: list[float] = field(default_factory=list)  # of the guard
    num_consecutive_skips: int = 0  # consecutive updates that were rejected


class Task(Protocol):
    """What differs between training a model and training a codec."""

    unit: str  # what `num_seen` counts, in the plural

    def batches(self, loader_state: Any) -> Iterator[tuple[Any, Any]]:
        """An endless iterator of a step's batch and the loader state after it. It runs in a separate thread."""

    def count(self, batch: Any) -> tuple[int, ...]:
        """Counts of this rank's batch, the last one in the task's unit; `step` gets their sums over all ranks."""

    def step(self, number: int, batch: Any, counts: list[int], guard: Guard) -> Callable[[], dict[str, float]]:
        """Queue one step, counted from 0; apply the update if the guard accepts it. Returns a function that waits for the
        step, reports a rejected update to the guard and returns the metrics."""

    def describe(self, values: dict[str, float]) -> str:
        """The most important metrics, as short text."""

    def evaluate_heldout(self, reset_watchdog: Callable[[], None]) -> tuple[dict, str]:
        """Metrics on held-out data, as values and as text. It calls `reset_watchdog` after each batch."""

    def preview(self, step: int, reset_watchdog: Callable[[], None]) -> None:
        """Write samples of the current model. It calls `reset_watchdog` after each denoising step."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a checkpoint saves and restores, by part and name."""


class QueuedStep(NamedTuple):
    """A step whose numbers have not been read, and the training state after it."""

    number: int  # counted from 1
    read: Callable[[], dict[str, float]]
    loader_state: Any
    num_new: int  # positions or images
    seconds: float  # of training until it was queued


class Loop:
    """Trains a task in a run's folder. All ranks run it; rank 0 writes the shared files."""

    def __init__(
        self, task: Task, config: LoopConfig, fault_tolerance: FaultToleranceConfig, folder: Path, ranks: Ranks,
        device: torch.device, preview_every: int = 0,
    ):  # fmt: skip
        self.task, self.config, self.folder, self.ranks = task, config, folder, ranks
        self.watchdog_seconds, self.preview_every = fault_tolerance.watchdog, preview_every
        self.progress = Progress()
        self.guard = Guard(fault_tolerance, folder, ranks, device)
        self.stop_requested = False
        self.last_logged = 0.0, 0  # seconds and num_seen

    def restore(self, report: Callable[[str], None]) -> None:
        """Restore the newest intact checkpoint of the folder, if there is one. Rank 0 calls `report` with one line."""
        restored = restore_newest(self.folder, self.task.tensors(), self.ranks, report)
        if restored:
            self.load_state(restored[1])
            if self.ranks.is_main:
                report(f"resuming from {restored[0]}")

    def load_state(self, state: dict) -> None:
        """Set the progress from a checkpoint's state.json. TrainingError when the fields are another version's."""
        try:
            self.progress = Progress(**state)
        except TypeError:
            raise TrainingError(
                "the checkpoint was written by another version of transfusion: resume with that version, or start a new run"
            ) from None
        self.guard.load_state(self.progress.grad_norms, self.progress.num_consecutive_skips)
        self.last_logged = self.progress.seconds, self.progress.num_seen

    def run(self) -> bool:
        """Train to the last step: True; or until a signal: False. In both cases a checkpoint is saved.

        The numbers of a step are read after the next one has been queued, so a GPU never waits for the CPU. Before an
        evaluation, a preview or a checkpoint they are read at once.
        """
        config, progress = self.config, self.progress
        metrics = MetricsWriter(self.folder / "metrics.jsonl", progress.step, self.ranks.is_main)
        progress_bar = ProgressBar(config.steps, progress.step, self.ranks.is_main)
        with (
            watchdog(self.watchdog_seconds, self.folder, self.ranks.rank) as reset_watchdog, stop_on_signal(self),
            progress_bar, Saver(self.folder, config.keep_checkpoints, self.ranks, reset_watchdog) as saver,
            ThreadPoolExecutor(1) as prefetcher, self.ranks.catching_peer_failure(),
        ):  # fmt: skip
            batches = self.task.batches(progress.loader_state)
            next_batch = prefetcher.submit(next, batches)
            if progress.step == 0:
                self._evaluate_and_preview(metrics, progress_bar, reset_watchdog)
            number, queued, start = progress.step, deque(), time.monotonic() - progress.seconds
            while number < config.steps:
                reset_watchdog()
                batch, loader_state = next_batch.result()
                *counts, num_stops = map(round, self.ranks.sum(*self.task.count(batch), self.stop_requested))
                if num_stops:
                    break
                next_batch = prefetcher.submit(next, batches)
                read = self.task.step(number, batch, counts, self.guard)
                number += 1
                queued.append(QueuedStep(number, read, loader_state, counts[-1], time.monotonic() - start))
                if not self._is_due(number):
                    self._finish(queued, 1, metrics, progress_bar)
                    continue
                self._finish(queued, 0, metrics, progress_bar)
                pause = time.monotonic()
                self._evaluate_and_preview(metrics, progress_bar, reset_watchdog)
                if number % config.checkpoint_every == 0 or number == config.steps:
                    self._save(saver)
                start += time.monotonic() - pause
            self._finish(queued, 0, metrics, progress_bar)
            if progress.step < config.steps:
                self._save(saver)
                saver.finish()
                progress_bar.print_line(f"stopped at step {progress.step} and saved: the same command resumes from here")
        return progress.step >= config.steps

    def _is_due(self, step: int) -> bool:
        """Is there an evaluation, a preview or a checkpoint after this step?"""
        every = self.config.validate_every, self.config.checkpoint_every, self.preview_every
        return step == self.config.steps or any(step % n == 0 for n in every if n)

    def _finish(self, queued: deque[QueuedStep], keep: int, metrics: MetricsWriter, progress_bar: ProgressBar) -> None:
        """Read the numbers of all queued steps but the last `keep`, and log them."""
        progress = self.progress
        while len(queued) > keep:
            step = queued.popleft()
            values = step.read()
            progress.step, progress.loader_state, progress.seconds = step.number, step.loader_state, step.seconds
            progress.num_seen += step.num_new
            self._log(metrics, progress_bar, values)

    def _save(self, saver: Saver) -> None:
        self.progress.grad_norms, self.progress.num_consecutive_skips = self.guard.state
        saver.save(self.progress.step, self.task.tensors(), asdict(self.progress))

    def _log(self, metrics: MetricsWriter, progress_bar: ProgressBar, values: dict[str, float]) -> None:
        progress, unit = self.progress, self.task.unit
        if progress.step % self.config.log_every and progress.step != self.config.steps:
            return
        speed = (progress.num_seen - self.last_logged[1]) / (progress.seconds - self.last_logged[0])
        self.last_logged = progress.seconds, progress.num_seen
        metrics.write(progress.step, **values, **{f"{unit}_per_second": round(speed, 1)}, seconds=progress.seconds)
        progress_bar.update(progress.step, f"{self.task.describe(values)}  {speed:,.0f} {unit}/s")

    def _evaluate_and_preview(
        self, metrics: MetricsWriter, progress_bar: ProgressBar, reset_watchdog: Callable[[], None]
    ) -> None:
        """Evaluate every `validate_every` steps and preview every `preview_every` steps; do both at the last step."""
        step = self.progress.step
        is_last = step == self.config.steps
        if step % self.config.validate_every == 0 or is_last:
            values, text = self.task.evaluate_heldout(reset_watchdog)
            metrics.write(step, heldout=values)
            progress_bar.print_line(f"step {step}  held out  {text}")
        if self.preview_every and (step % self.preview_every == 0 or is_last):
            self.task.preview(step, reset_watchdog)
