"""Trains a model on one process, or on many that shard all weights (section 4.1)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from transfusion import objective
from transfusion.config import Run, to_json
from transfusion.data.loader import Loader, LoaderState
from transfusion.model.flops import count_training_flops, count_usual_flops, find_peak_tflops
from transfusion.model.lora import add_adapters, is_trained, plain_name
from transfusion.model.transfusion import Transfusion, build_on_meta, init_weights
from transfusion.objective import NoiseSample
from transfusion.parallel import (
    SINGLE_PROCESS,
    Ranks,
    fast_matmul,
    lower_precision,
    parallelize,
    precision,
    read_later,
    rows_per_pass,
)  # fmt: skip
from transfusion.sequence import Batch, Row, collate
from transfusion.training.guard import Guard
from transfusion.training.loop import Loop
from transfusion.training.optimizer import (
    build_optimizer,
    freeze,
    get_learning_rate,
    optimizer_tensors,
    update_ema,
    update_weights,
)  # fmt: skip

HELDOUT_GRID = 10  # values of t of the held-out figures: 0.05, 0.15, ..., 0.95

MicroBatches = list[tuple[Batch, list[NoiseSample]]]  # of one step, each with its noise


class Trainer:
    """Trains one run.

    All ranks call both functions. `on_preview(ema, step, reset_watchdog)` may use the averaged model; it cannot change the
    training. `init_from(model)` sets this rank's part of the initial weights; without it the run's seed decides them.
    `base_sha256` is that of the initial weights of a run with an adapter, whose checkpoints do not hold them.
    """

    unit = "positions"

    def __init__(
        self, run: Run, folder: Path, loader: Loader, heldout: dict[str, list[Batch]], device: torch.device,
        ranks: Ranks = SINGLE_PROCESS, on_preview: Callable[[Transfusion, int, Callable[[], None]], None] | None = None,
        init_from: Callable[[Transfusion], None] | None = None, base_sha256: str | None = None,
    ):  # fmt: skip
        self.run, self.loader, self.heldout, self.device = run, loader, heldout, device
        self.ranks, self.on_preview, self.init_from = ranks, on_preview, init_from
        self.settings, self.sources = to_json(run), run.data.sources
        self.rows_per_pass = rows_per_pass(run, ranks.world)
        self.mesh = ranks.mesh(device.type, run.parallel.shard) if ranks.world > 1 else None
        precision(device, run.parallel.cpu_matmul)  # ValueError when this CPU does not support it
        compiled = device.type == "cuda" if run.parallel.compile is None else run.parallel.compile
        self.model = self._build(compiled)
        self.model.transformer.activation_checkpointing = run.parallel.activation_checkpointing
        freeze(self.model, run.training.lr_scales, run.lora)
        self.ema = self._build(compiled=False, source=self.model).requires_grad_(False)
        self.optimizer = build_optimizer(self.model, run.training, run.training.lr_scales, run.training.optimizer)
        self.usual_flops = count_usual_flops(run.model, run.data.seq_len)
        preview_every = run.training.preview_every if on_preview else 0
        self.loop = Loop(
            self, run.training, run.fault_tolerance, folder, ranks, device, preview_every, run.training.log, base_sha256
        )

    def _build(self, compiled: bool, source: Transfusion | None = None) -> Transfusion:
        """A model with the first weights, or one whose trained weights are copies of the `source`'s, and whose frozen ones
        are the source's own. Each rank only ever allocates its part."""
        model = build_on_meta(self.run.model)
        if self.run.lora.rank is not None:
            add_adapters(model, self.run.lora)
        parallelize(
            model, model.transformer.blocks, self.device, self.mesh, compiled, ("forward_cached",), trained=source is None,
            dynamic=False if self.run.model.untied == "none" else None,
        )  # fmt: skip
        if source is not None:
            for name, value in source.named_parameters():
                copy = nn.Parameter(value.detach().clone()) if value.requires_grad else value
                setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], copy)
            return model
        model.to_empty(device=self.device)
        if self.init_from is not None:
            self.init_from(model)
        else:
            init_weights(model, self.run.training.seed)
        return model

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a checkpoint saves and restores, by part and name. Of a run with an adapter it has that alone."""
        return {
            "model": self._saved_weights(self.model),
            "ema": self._saved_weights(self.ema),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def _saved_weights(self, model: Transfusion) -> dict[str, Tensor]:
        lora, weights = self.run.lora, model.state_dict()
        if lora.rank is None:
            return weights
        return {plain_name(name): tensor for name, tensor in weights.items() if is_trained(plain_name(name), lora)}

    def train(self) -> bool:
        """Train to the last step: True; or until a signal: False. In both cases a checkpoint is saved."""
        return self.loop.run()

    def batches(self, loader_state: list[int] | None) -> Iterator[tuple[MicroBatches, list[int]]]:
        """The micro-batches of each step with their noise, sampled on the CPU during the step before. The last one of a step
        is smaller when their size does not divide this rank's rows."""
        for rows, state in self.loader.batches(LoaderState(*loader_state or ())):
            parts = (rows[first : first + self.rows_per_pass] for first in range(0, len(rows), self.rows_per_pass))
            yield [self._with_noise(self._collate(part)) for part in parts], [state.block, state.row]

    def _collate(self, rows: list[Row]) -> Batch:
        return collate(rows, self.run.data.seq_len, self.loader.vocabulary)

    def _with_noise(self, batch: Batch) -> tuple[Batch, list[NoiseSample]]:
        noise_samples = objective.sample_noise(batch, self.run.diffusion)
        if self.device.type == "cuda":
            return batch.pin_memory(), [sample.pin_memory() for sample in noise_samples]
        return batch, noise_samples

    def count(self, micro_batches: MicroBatches) -> tuple[int, ...]:
        """Of this rank: positions with text loss, images with denoising loss and codes, in all and then of each source;
        FLOPs; positions in all."""
        return tuple(map(sum, zip(*[self._count(batch) for batch, _ in micro_batches], strict=True)))

    def _count(self, batch: Batch) -> tuple[int, ...]:
        has_loss = [group.loss.double() for group in batch.groups]
        tokens = torch.ones(batch.text_count, dtype=torch.float64)
        by_source = objective.sum_by_source(batch, tokens, has_loss, self.sources).flatten().long().tolist()
        flops = count_training_flops(batch, self.run.model)
        return *objective.loss_counts(batch), *by_source, flops, batch.positions

    def measure_speed(self, counts: Sequence[float], seconds: float) -> dict[str, float]:
        """Positions and FLOPs per second of all ranks, FLOPs also in the usual convention; on a GPU whose peak is known also
        their shares of it (MFU)."""
        *_, flops, positions = counts
        tflops = {"exact": flops / seconds / 1e12, "usual": positions * self.usual_flops / seconds / 1e12}
        values = {f"{self.unit}_per_second": round(positions / seconds, 1)}
        values |= {f"tflops_{convention}": value for convention, value in tflops.items()}
        if peak := find_peak_tflops(self.device):
            values |= {f"mfu_{convention}": value / (peak * self.ranks.world) for convention, value in tflops.items()}
        return values

    def step(
        self, number: int, micro_batches: MicroBatches, counts: Sequence[int], guard: Guard
    ) -> Callable[[], dict[str, float]]:
        """One update. Losses are divided by the counts of the whole step: its split into batches and ranks has no effect."""
        config, loss_counts, counts_by_source = self.run.training, counts[:3], counts[3 : 3 + 3 * len(self.sources)]
        learning_rate = get_learning_rate(number, config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        all_sums = self.ranks.sum_on_device(self._backward(micro_batches, *loss_counts[:2]))
        sums, sums_by_source = all_sums[:3], all_sums[3:]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if self.ranks.world > 1 else norm
        numbers = torch.cat([norm[None], sums])
        verdict = guard.judge(numbers)
        update_weights(self.optimizer, verdict[0] == 0)
        update_ema(self.ema, self.model, number, config.ema_decay, verdict[0] == 0)
        self.optimizer.zero_grad()
        read_numbers = read_later(torch.cat([verdict, numbers, sums_by_source]))

        def read() -> dict[str, float]:
            values = read_numbers()
            verdict, grad_norm, sums, sums_by_source = values[:3], values[3], values[4:7], values[7:]
            losses = objective.mean_losses(sums, loss_counts)
            reason = guard.report(number + 1, verdict, grad_norm, losses, self._describe_batch(micro_batches))
            losses |= self._losses_by_source(sums_by_source, counts_by_source)
            event = {"event": "skip", "reason": reason} if reason else {}
            return {**losses, "gradient_norm": grad_norm, "learning_rate": learning_rate, **event}

        return read

    def _backward(self, micro_batches: MicroBatches, text_count: int, image_count: int) -> Tensor:
        """Add up the gradients of this rank's share of the loss. Returns the sums of its losses, in all and then of each
        source, (3 + 3 S,)."""
        sums = torch.zeros(3 + 3 * len(self.sources), device=self.device)
        for number, (batch, noise_samples) in enumerate(micro_batches, 1):
            if self.mesh is not None:
                # Hybrid: machines add up their gradients once. Within a machine every micro-batch is reduced, because
                # gradients of whole weights would not fit.
                self.model.set_requires_all_reduce(number == len(micro_batches))
            with fast_matmul(self.device, self.run.parallel.cpu_matmul):
                with lower_precision(self.device, self.run.parallel.cpu_matmul):
                    losses = objective.compute_losses(
                        self.model, batch.to(self.device), noise_samples, self.run.diffusion, self.run.model.z_loss
                    )
                objective.total_loss(losses, text_count, image_count, self.run.training.image_weight).backward()
            by_source = objective.sum_by_source(batch, losses.tokens, losses.images, self.sources)
            sums = sums + torch.cat([losses.sums, by_source.flatten()])
        return sums

    def _losses_by_source(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
        """Mean losses, as "text_loss/SOURCE", of the sources that this step has."""
        parts = {name: (sums[3 * n : 3 * n + 3], counts[3 * n : 3 * n + 3]) for n, name in enumerate(self.sources)}
        return {
            f"{loss}/{name}": value
            for name, (sums, counts) in parts.items() if any(counts)
            for loss, value in objective.mean_losses(sums, counts).items()
        }  # fmt: skip

    def _describe_batch(self, micro_batches: MicroBatches) -> dict:
        """The documents of this rank's rows, by source and number, for the fault file."""
        return {"rank": self.ranks.rank, "rows": [row for batch, _ in micro_batches for row in batch.documents]}

    def describe(self, values: dict[str, float]) -> str:
        return "  ".join(f"{name} {values[f'{name}_loss']:.3f}" for name in ("text", "image") if f"{name}_loss" in values)

    @torch.no_grad()
    def evaluate_heldout(self, reset_watchdog: Callable[[], None]) -> tuple[dict, str]:
        """Mean losses of the averaged weights, as "text_loss/SOURCE", with fixed noise and t; the velocity errors of images,
        at each t of the grid, and their mean."""
        values, texts = {}, []
        for source, batches in self.heldout.items():
            losses, errors = self._evaluate_source(batches, reset_watchdog)
            texts.append(f"{source}: {self.describe(losses)}")
            values |= {f"{loss}/{source}": value for loss, value in losses.items()}
            if errors:
                values[f"velocity_error/{source}"] = fmean(errors.values())
                values |= {f"velocity_error_by_t/{source}/t{t:.2f}": error for t, error in errors.items()}
        return values, "   ".join(texts)

    def _evaluate_source(
        self, batches: list[Batch], reset_watchdog: Callable[[], None]
    ) -> tuple[dict[str, float], dict[float, float]]:
        """Mean losses, and the mean velocity error at each t that an image has. Rank r takes batches r, r + world, ...
        Without one it repeats the last, uncounted: all must gather weights."""
        sums = torch.zeros(3 + 2 * HELDOUT_GRID, dtype=torch.float64)  # losses, velocity errors, numbers of images
        for first in range(0, len(batches), self.ranks.world):
            index = first + self.ranks.rank
            batch = batches[min(index, len(batches) - 1)]
            noise_samples = objective.sample_noise_on_grid(batch, HELDOUT_GRID)
            with lower_precision(self.device, self.run.parallel.cpu_matmul):
                losses = objective.compute_losses(self.ema, batch.to(self.device), noise_samples, self.run.diffusion)
            if index < len(batches):
                by_t = objective.velocity_errors_by_t(
                    batch, noise_samples, losses.predictions, self.run.diffusion, HELDOUT_GRID
                )
                sums += torch.cat([losses.sums.cpu(), by_t.flatten()])
            reset_watchdog()
        counts = [sum(values) for values in zip(*map(objective.loss_counts, batches), strict=True)]
        all_sums = self.ranks.sum(*sums.tolist())
        errors, numbers = all_sums[3:-HELDOUT_GRID], all_sums[-HELDOUT_GRID:]
        mean_errors = {(n + 0.5) / HELDOUT_GRID: errors[n] / numbers[n] for n in range(HELDOUT_GRID) if numbers[n]}
        return objective.mean_losses(all_sums[:3], counts), mean_errors

    def preview(self, step: int, reset_watchdog: Callable[[], None]) -> None:
        """Call `on_preview` with the averaged model."""
        self.on_preview(self.ema, step, reset_watchdog)
