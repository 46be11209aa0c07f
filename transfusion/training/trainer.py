"""The loop: read, noise, predict, step; hold out, save, and go on exactly where it stopped."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from transfusion import objective
from transfusion.checkpoint.save import save
from transfusion.config import Run
from transfusion.data.loader import Loader, Place
from transfusion.model.transfusion import Transfusion, build
from transfusion.objective import Draw
from transfusion.parallel import lower_precision
from transfusion.sequence import Batch
from transfusion.training.metrics import Metrics, Screen
from transfusion.training.optimizer import build_optimizer, learning_rate, optimizer_tensors, update_average
from transfusion.training.signals import listening

GRID = 10  # held-out times per walk from clean to noise


class TrainingError(ValueError):
    """Training cannot go on; the message says why in one line."""


@dataclass
class Progress:
    """How far a run is: all that is not a tensor."""

    step: int = 0
    place: Place = Place()
    seconds: float = 0.0  # spent training, over all its sessions
    positions: int = 0  # read so far, padding not counted


class Trainer:
    """One run on one device. `preview(model, step)` may look at the averaged model; it cannot change what is learnt."""

    def __init__(
        self, run: Run, folder: Path, loader: Loader, heldout: dict[str, list[Batch]], device: torch.device,
        preview: Callable[[Transfusion, int], None] | None = None,
    ):  # fmt: skip
        self.run, self.folder, self.loader, self.heldout, self.device = run, folder, loader, heldout, device
        self.preview = preview
        self.model = build(run.model, run.training.seed, device)
        self.average = build(run.model, run.training.seed, device).requires_grad_(False)
        self.optimizer = build_optimizer(self.model, run.training)
        self.progress = Progress()
        self.stop_asked = False

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything that a checkpoint stores or fills in, by part and name."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def train(self) -> bool:
        """Up to the last step. False when a signal stopped it before; it is saved either way."""
        config, progress = self.run.training, self.progress
        metrics = Metrics(self.folder / "metrics.jsonl", progress.step)
        with listening(self), Screen(config.steps, progress.step) as screen, ThreadPoolExecutor(1) as ahead:
            reading = self._read()
            coming = ahead.submit(next, reading)
            if progress.step == 0:
                self._look(metrics, screen)
            shown = replace(progress)
            while progress.step < config.steps and not self.stop_asked:
                begun = time.monotonic()
                parts, place = coming.result()
                coming = ahead.submit(next, reading)
                values = self._step(parts)
                progress.step += 1
                progress.place = place
                progress.positions += sum(batch.positions for batch, _ in parts)
                progress.seconds += time.monotonic() - begun
                if progress.step % config.log_every == 0 or progress.step == config.steps:
                    speed = (progress.positions - shown.positions) / (progress.seconds - shown.seconds)
                    shown = replace(progress)
                    metrics.write(progress.step, **values, positions_per_second=round(speed), seconds=progress.seconds)
                    losses = f"text {values['text_loss']:.3f}  image {values['image_loss']:.3f}"
                    screen.show(progress.step, f"{losses}  {speed:,.0f} positions/s")
                self._look(metrics, screen)
                if progress.step % config.checkpoint_every == 0 and progress.step < config.steps:
                    self.save()
            self.save()
            if self.stop_asked:
                screen.say(f"stopped at step {progress.step} and saved: the same command goes on from here")
        return progress.step >= config.steps

    def save(self) -> Path:
        """A checkpoint of this moment."""
        state = asdict(self.progress)
        return save(self.folder, self.progress.step, self.tensors(), state, self.run.training.keep)

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint whose tensors have been filled in."""
        self.progress = Progress(**{**state, "place": Place(**state["place"])})

    def _read(self) -> Iterator[tuple[list[tuple[Batch, list[Draw]]], Place]]:
        """The micro-batches of each step with their noise, drawn on the CPU while the step before runs."""
        batches = self.loader.batches(self.progress.place)
        while True:
            parts = []
            for _ in range(self.run.training.accumulate):
                batch, place = next(batches)
                draws = objective.draw(batch, self.run.diffusion)
                parts.append((batch, draws))
            yield parts, place

    def _step(self, parts: list[tuple[Batch, list[Draw]]]) -> dict[str, float]:
        """One update. Losses are divided by the counts of the whole step, so that cutting it up changes nothing."""
        config, diffusion = self.run.training, self.run.diffusion
        text_count = sum(batch.text_count for batch, _ in parts)
        image_count = sum(batch.image_count for batch, _ in parts)
        rate = learning_rate(self.progress.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        text = image = 0.0
        for batch, draws in parts:
            with lower_precision(self.device):
                losses = objective.losses(
                    self.model, batch.to(self.device), draws, diffusion, self.run.model.z_loss
                )
            objective.total(losses, text_count, image_count, config.image_weight).backward()
            text, image = text + losses.text_sum.detach(), image + losses.image_sum.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {self.progress.step + 1}: the gradient is not finite, so the step was not taken; "
                "the last checkpoint is whole. A lower training.learning_rate may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.model, self.progress.step, config.average)
        return {
            "text_loss": float(text) / max(1, text_count),
            "image_loss": float(image) / max(1, image_count),
            "gradient_norm": norm,
            "learning_rate": rate,
        }

    def _look(self, metrics: Metrics, screen: Screen) -> None:
        """Held-out losses and drawings, when it is time. Both use the averaged weights."""
        config, step = self.run.training, self.progress.step
        if step % config.validate_every == 0 or step == config.steps:
            values = {source: self.hold_out(batches) for source, batches in self.heldout.items()}
            metrics.write(step, heldout=values)
            described = ["  ".join([f"{source}: text {v['text_loss']:.3f}", *([f"image {v['image_loss']:.3f}"]
                         if "image_loss" in v else [])]) for source, v in values.items()]  # fmt: skip
            screen.say(f"step {step}  held out  " + "   ".join(described))
        if self.preview and config.preview_every and (step % config.preview_every == 0 or step == config.steps):
            self.preview(self.average, step)

    @torch.no_grad()
    def hold_out(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses of the averaged weights on fixed noise and a fixed grid of t."""
        text = image = 0.0
        for batch in batches:
            draws = objective.draw_on_grid(batch, GRID)
            with lower_precision(self.device):
                losses = objective.losses(self.average, batch.to(self.device), draws, self.run.diffusion)
            text, image = text + float(losses.text_sum), image + float(losses.image_sum)
        text_count, image_count = sum(b.text_count for b in batches), sum(b.image_count for b in batches)
        values = {"text_loss": text / max(1, text_count)}
        return values | ({"image_loss": image / image_count} if image_count else {})
