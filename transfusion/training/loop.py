"""The training loop of models and codecs: load the next batch ahead, step, evaluate, save; stop on a signal and resume."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transfusion.checkpoint.read import check_adapter, restore_newest
from transfusion.checkpoint.save import Saver
from transfusion.config import FaultToleranceConfig, LoggerName
from transfusion.parallel import Ranks
from transfusion.training.guard import Guard, TrainingError, watchdog
from transfusion.training.loggers import open_loggers
from transfusion.training.metrics import MetricsWriter, peak_memory
from transfusion.training.progress_bar import ProgressBar
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
    base_sha256: str | None = None  # of the weights that an adapter is trained on


class Task(Protocol):
    """What differs between training a model and training a codec."""

    unit: str  # what `num_seen` counts, in the plural
    settings: dict[str, Any]  # all settings, for loggers

    def batches(self, loader_state: Any) -> Iterator[tuple[Any, Any]]:
        """An endless iterator of a step's batch and the loader state after it. It runs in a separate thread."""

    def count(self, batch: Any) -> tuple[int, ...]:
        """Counts of this rank's batch, the last one in the task's unit; `step` gets their sums over all ranks."""

    def step(self, number: int, batch: Any, counts: list[int], guard: Guard) -> Callable[[], dict[str, float]]:
        """Queue one step, counted from 0; apply the update if the guard accepts it. Returns a function that waits for the
        step, reports a rejected update to the guard and returns the metrics, with an event for a rejected update."""

    def measure_speed(self, counts: Sequence[float], seconds: float) -> dict[str, float]:
        """Metrics of the speed of this many `counts` in this time; the first one is `UNIT_per_second`."""

    def describe(self, values: dict[str, float]) -> str:
        """The most important metrics, as short text."""

    def evaluate_heldout(self, reset_watchdog: Callable[[], None]) -> tuple[dict, str]:
        """Metrics on held-out data, as values by name and as text. It calls `reset_watchdog` after each batch."""

    def preview(self, step: int, reset_watchdog: Callable[[], None]) -> None:
        """Write samples of the current model. It calls `reset_watchdog` after each denoising step."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a checkpoint saves and restores, by part and name."""


class QueuedStep(NamedTuple):
    """A step whose numbers have not been read, and the training state after it."""

    number: int  # counted from 1
    read: Callable[[], dict[str, float]]
    loader_state: Any
    counts: list[int]  # of the task, over all ranks
    seconds: float  # of training until it was queued


class PartTimes:
    """Seconds in the parts of the loop since they were last taken, on this rank."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """Metrics: the seconds of each part, and the share of them in which the step waited for its data."""
        parts, self.seconds = self.seconds, {}
        share = parts.get("data", 0.0) / (sum(parts.values()) or 1)
        return {"data_wait_share": share, **{f"seconds/{name}": value for name, value in parts.items()}}


class Loop:
    """Trains a task in a run's folder. All ranks run it; rank 0 writes the shared files and the `loggers`."""

    def __init__(
        self, task: Task, config: LoopConfig, fault_tolerance: FaultToleranceConfig, folder: Path, ranks: Ranks,
        device: torch.device, preview_every: int = 0, loggers: Sequence[LoggerName] = (), base_sha256: str | None = None,
    ):  # fmt: skip
        self.task, self.config, self.folder, self.ranks, self.device = task, config, folder, ranks, device
        self.watchdog_seconds, self.preview_every = fault_tolerance.watchdog, preview_every
        self.progress = Progress(base_sha256=base_sha256)
        self.guard = Guard(fault_tolerance, folder, ranks, device)
        self.stop_requested = False
        self.loggers, self.times = loggers, PartTimes()
        self._start_window()

    def restore(self, report: Callable[[str], None]) -> None:
        """Restore the newest intact checkpoint of the folder, if there is one. Rank 0 calls `report` with one line."""
        restored = restore_newest(self.folder, self.task.tensors(), self.ranks, report)
        if restored:
            check_adapter(*restored, self.progress.base_sha256)
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
        self._start_window()

    def run(self) -> bool:
        """Train to the last step: True; or until a signal: False. In both cases a checkpoint is saved.

        The numbers of a step are read after the next one has been queued, so a GPU never waits for the CPU. Before an
        evaluation, a preview or a checkpoint they are read at once.
        """
        config, progress = self.config, self.progress
        loggers = open_loggers(self.loggers, self.folder, progress.step, self.task.settings) if self.ranks.is_main else ()
        progress_bar = ProgressBar(config.steps, progress.step, self.ranks.is_main)
        with (
            MetricsWriter(self.folder / "metrics.jsonl", progress.step, self.ranks.is_main, loggers) as metrics,
            watchdog(self.watchdog_seconds, self.folder, self.ranks.rank) as reset_watchdog, stop_on_signal(self),
            progress_bar, Saver(self.folder, config.keep_checkpoints, self.ranks, reset_watchdog) as saver,
            ThreadPoolExecutor(1) as prefetcher, self.ranks.catching_peer_failure(),
        ):  # fmt: skip
            metrics.write(progress.step, event="resume" if progress.step else "start")
            batches = self.task.batches(progress.loader_state)
            next_batch = prefetcher.submit(next, batches)
            if progress.step == 0:
                self._evaluate_and_preview(metrics, progress_bar, reset_watchdog)
            number, queued, start = progress.step, deque(), time.monotonic() - progress.seconds
            while number < config.steps:
                reset_watchdog()
                with self.times.part("data"):
                    batch, loader_state = next_batch.result()
                with self.times.part("ranks"):
                    *counts, num_stops = map(round, self.ranks.sum(*self.task.count(batch), self.stop_requested))
                if num_stops:
                    break
                next_batch = prefetcher.submit(next, batches)
                with self.times.part("step"):
                    read = self.task.step(number, batch, counts, self.guard)
                number += 1
                queued.append(QueuedStep(number, read, loader_state, counts, time.monotonic() - start))
                if not self._is_due(number):
                    self._finish(queued, 1, metrics, progress_bar)
                    continue
                self._finish(queued, 0, metrics, progress_bar)
                pause = time.monotonic()
                self._evaluate_and_preview(metrics, progress_bar, reset_watchdog)
                if number % config.checkpoint_every == 0 or number == config.steps:
                    with _timed_event(metrics, number, "checkpoint"):
                        self._save(saver)
                start += time.monotonic() - pause
            self._finish(queued, 0, metrics, progress_bar)
            if progress.step < config.steps:
                self._save(saver)
                saver.finish()
                metrics.write(progress.step, event="stop")
                progress_bar.print_line(f"stopped at step {progress.step} and saved: the same command resumes from here")
            else:
                metrics.write(progress.step, event="finish")
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
            with self.times.part("device"):
                values = step.read()
            progress.step, progress.loader_state, progress.seconds = step.number, step.loader_state, step.seconds
            progress.num_seen += step.counts[-1]
            counts = self.window_counts or [0] * len(step.counts)
            self.window_counts = [before + new for before, new in zip(counts, step.counts, strict=True)]
            self._log(metrics, progress_bar, values)

    def _save(self, saver: Saver) -> None:
        self.progress.grad_norms, self.progress.num_consecutive_skips = self.guard.state
        saver.save(self.progress.step, self.task.tensors(), asdict(self.progress))

    def _start_window(self) -> None:
        """Speed is measured from here to the next line of metrics."""
        self.window_start, self.window_counts = self.progress.seconds, None

    def _log(self, metrics: MetricsWriter, progress_bar: ProgressBar, values: dict[str, float]) -> None:
        """Move the progress bar. Every `log_every` steps, at the last one and after a rejected update also write a line."""
        progress, unit = self.progress, self.task.unit
        speed = self.task.measure_speed(self.window_counts, max(progress.seconds - self.window_start, 1e-9))
        progress_bar.update(progress.step, self.task.describe(values), f"{speed[f'{unit}_per_second']:,.0f} {unit}/s")
        if progress.step % self.config.log_every and progress.step != self.config.steps and "event" not in values:
            return
        cost = {**speed, "peak_memory_bytes": peak_memory(self.device), **self.times.take()}
        metrics.write(progress.step, **values, **cost, seconds=progress.seconds)
        self._start_window()

    def _evaluate_and_preview(
        self, metrics: MetricsWriter, progress_bar: ProgressBar, reset_watchdog: Callable[[], None]
    ) -> None:
        """Evaluate every `validate_every` steps and preview every `preview_every` steps; do both at the last step."""
        step = self.progress.step
        is_last = step == self.config.steps
        if step % self.config.validate_every == 0 or is_last:
            start = time.monotonic()
            values, text = self.task.evaluate_heldout(reset_watchdog)
            seconds = {"seconds/heldout": time.monotonic() - start}
            metrics.write(step, **{f"heldout_{name}": value for name, value in values.items()}, **seconds)
            progress_bar.print_line(f"step {step}  held out  {text}")
        if self.preview_every and (step % self.preview_every == 0 or is_last):
            with _timed_event(metrics, step, "preview"):
                self.task.preview(step, reset_watchdog)


@contextmanager
def _timed_event(metrics: MetricsWriter, step: int, name: str) -> Iterator[None]:
    """A line for an event that took time."""
    start = time.monotonic()
    yield
    metrics.write(step, event=name, **{f"seconds/{name}": time.monotonic() - start})
