"""Trains a model: reads, adds noise, predicts, steps; on one process, or on many that share every weight (section 4.1)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from transfusion import objective
from transfusion.config import Run
from transfusion.data.loader import Loader, LoaderState
from transfusion.model.transfusion import Transfusion, build_on_meta, init_weights
from transfusion.objective import NoiseSample
from transfusion.parallel import SINGLE_PROCESS, Ranks, lower_precision, parallelize
from transfusion.sequence import Batch
from transfusion.training.loop import Loop
from transfusion.training.optimizer import build_optimizer, freeze, learning_rate, optimizer_tensors, update_ema

GRID = 10  # held-out times per walk from clean to noise

Read = list[tuple[Batch, list[NoiseSample]]]  # the micro-batches of a step, each with its noise


class Trainer:
    """One run. `look(model, step)` may look at the averaged model; it cannot change what is learnt. All ranks call it.

    `start(model)` fills in the first weights, of each rank its part; without it they are those of the run's seed.
    """

    seen_in = "positions"

    def __init__(
        self, run: Run, folder: Path, loader: Loader, heldout: dict[str, list[Batch]], device: torch.device,
        ranks: Ranks = SINGLE_PROCESS, look: Callable[[Transfusion, int], None] | None = None,
        start: Callable[[Transfusion], None] | None = None,
    ):  # fmt: skip
        self.run, self.loader, self.heldout, self.device = run, loader, heldout, device
        self.ranks, self.on_preview, self.init_from = ranks, look, start
        self.mesh = ranks.mesh(device.type, run.parallel.shard) if ranks.world > 1 else None
        compiled = device.type == "cuda" if run.parallel.compile is None else run.parallel.compile
        self.model = self._build(compiled)
        self.model.transformer.activation_checkpointing = run.parallel.activation_checkpointing
        self.ema = self._build(compiled=False, like=self.model).requires_grad_(False)
        freeze(self.model, run.training.lr_scales)
        self.optimizer = build_optimizer(self.model, run.training, run.training.lr_scales)
        self.loop = Loop(self, run.training, run.fault_tolerance, folder, ranks, run.training.preview_every if look else 0)

    def _build(self, compiled: bool, like: Transfusion | None = None) -> Transfusion:
        """The first weights or those of another, each rank's part of them: no rank ever holds the whole."""
        model = build_on_meta(self.run.model)
        parallelize(model, model.transformer.blocks, self.device, self.mesh, compiled, ("forward_cached",))
        model.to_empty(device=self.device)
        if like is None and self.init_from is not None:
            self.init_from(model)
        elif like is None:
            init_weights(model, self.run.training.seed)
        else:
            with torch.no_grad():
                for mine, other in zip(model.parameters(), like.parameters(), strict=True):
                    mine.copy_(other)
        return model

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint stores or fills in, by part and name."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def train(self) -> bool:
        """Up to the last step. False when a signal stopped it before; it is saved either way."""
        return self.loop.run()

    def read(self, place: list[int] | None) -> Iterator[tuple[Read, list[int]]]:
        """The micro-batches of each step with their noise, drawn on the CPU while the step before runs."""
        batches = self.loader.batches(LoaderState(*place or ()))
        while True:
            parts = []
            for _ in range(self.run.training.accumulate):
                batch, after = next(batches)
                parts.append((batch, objective.sample_noise(batch, self.run.diffusion)))
            yield parts, [after.block, after.row]

    def step(self, number: int, read: Read, allows: Callable[..., bool]) -> tuple[dict[str, float], int]:
        """One update. Losses are divided by the counts of the whole step on all ranks: cutting it up changes nothing."""
        config = self.run.training
        counted = zip(*[(*objective.loss_counts(batch), batch.positions) for batch, _ in read], strict=True)
        *counts, positions = map(round, self.ranks.sum(*map(sum, counted)))
        rate = learning_rate(number, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        sums = self.ranks.sum(*self._backward(read, *counts[:2]).tolist())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        norm = (norm.full_tensor() if self.ranks.world > 1 else norm).item()
        values = objective.mean_losses(sums, counts)
        if allows(number + 1, norm, values, lambda: self._describe_batch(read)):
            self.optimizer.step()
            update_ema(self.ema, self.model, number, config.ema_decay)
        self.optimizer.zero_grad()
        return {**values, "gradient_norm": norm, "learning_rate": rate}, positions

    def _backward(self, read: Read, text_count: int, image_count: int) -> Tensor:
        """Gradients of this rank's share of the loss; the sums of its losses, (3,)."""
        sums = torch.zeros(3, device=self.device)
        for batch, draws in read:
            with lower_precision(self.device):
                losses = objective.compute_losses(
                    self.model, batch.to(self.device), draws, self.run.diffusion, self.run.model.z_loss
                )
            objective.total_loss(losses, text_count, image_count, self.run.training.image_weight).backward()
            sums = sums + losses.sums
        return sums

    def _describe_batch(self, read: Read) -> dict:
        """What this rank read in a step, by source and number: for a look at what went wrong."""
        return {"rank": self.ranks.rank, "rows": [row for batch, _ in read for row in batch.documents]}

    def describe(self, values: dict[str, float]) -> str:
        return "  ".join(f"{name} {values[f'{name}_loss']:.3f}" for name in ("text", "image") if f"{name}_loss" in values)

    @torch.no_grad()
    def evaluate_heldout(self) -> tuple[dict, str]:
        """Mean losses of the averaged weights, by source, on fixed noise and a fixed grid of t."""
        values = {source: self._evaluate_source(batches) for source, batches in self.heldout.items()}
        return values, "   ".join(f"{source}: {self.describe(found)}" for source, found in values.items())

    def _evaluate_source(self, batches: list[Batch]) -> dict[str, float]:
        """Each rank takes every so many-th batch. One that has none left goes along: weights are gathered by all at once."""
        sums = torch.zeros(3, dtype=torch.float64)
        for first in range(0, len(batches), self.ranks.world):
            number = first + self.ranks.rank
            batch = batches[min(number, len(batches) - 1)]
            draws = objective.sample_noise_on_grid(batch, GRID)
            with lower_precision(self.device):
                losses = objective.compute_losses(self.ema, batch.to(self.device), draws, self.run.diffusion)
            if number < len(batches):
                sums += losses.sums.cpu()
        counts = [sum(counted) for counted in zip(*map(objective.loss_counts, batches), strict=True)]
        return objective.mean_losses(self.ranks.sum(*sums.tolist()), counts)

    def preview(self, step: int) -> None:
        """Lets whoever wants to look at the averaged model."""
        self.on_preview(self.ema, step)
