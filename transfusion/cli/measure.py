"""A run on this machine: whether it fits into the memory, and for plan --device the times of its parts, measured."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from transfusion.cli.options import as_usage_error
from transfusion.cli.preview import previewer
from transfusion.cli.run_folder import RunFolder
from transfusion.cli.screen import UsageError, print_status
from transfusion.config import Machines, Run, TrainingConfig
from transfusion.data.loader import Loader
from transfusion.data.sources import name_sources, open_raw, open_sources
from transfusion.model.flops import find_peak_tflops
from transfusion.parallel import SINGLE_PROCESS, device_memory, keep_freed_memory, pick_device, rows_per_pass
from transfusion.plan import Measurement, Plan, fit_micro_batch, plan, ways_to_fit
from transfusion.training.guard import TrainingError
from transfusion.training.metrics import peak_memory
from transfusion.training.trainer import MicroBatches, Trainer

WARM_UP, MAX_STEPS, MAX_SECONDS = 2, 10, 60.0  # steps before the measurement, and in it; its time limit
PREVIEW_STEPS = 4  # denoising steps of the measured preview


def check_memory(name: str, run: Run, device: torch.device) -> None:
    """UsageError when the run of this name needs more memory than this device has."""
    estimate = plan_here(run, device)
    if not estimate.fits:
        ways = [way for way in ways_to_fit(estimate.run, estimate.machines) if "--gpus" not in way]
        ways += ["more GPUs with torchrun"] if device.type == "cuda" else []
        raise UsageError(f"{name} {compare_memory(estimate)}: use {' or '.join(ways) or 'a smaller run'}")


def plan_here(run: Run, device: torch.device) -> Plan:
    """The plan of the run on this device and the other ones that torchrun uses. UsageError when its batch or its sharding
    does not suit their number."""
    world, per_machine = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    is_cuda = device.type == "cuda"
    if run.parallel.compile is None:
        run = replace(run, parallel=replace(run.parallel, compile=is_cuda))
    memory = device_memory(device) // (1 if is_cuda else per_machine)
    with as_usage_error(TrainingConfig, "--training."):
        tflops = find_peak_tflops(device) or Machines.tflops
        return plan(run, Machines(world, per_machine, memory, tflops, device="cuda" if is_cuda else "cpu"))


def compare_memory(estimate: Plan) -> str:
    needed, there = (number / 1e9 for number in (estimate.memory.all, estimate.machines.memory))
    return f"needs {needed:,.1f} GB of memory for each process, and there are {there:,.1f} GB"


def measure(name: str, run: Run, device: str, chooses_micro_batch: bool) -> Plan:
    """The plan of the run of this name on this machine, with the times of its parts; nothing is kept.
    `chooses_micro_batch`: take a smaller one if that of the run does not fit. UsageError when none fits."""
    torch_device = pick_device(device)
    with TemporaryDirectory() as temporary:
        folder = RunFolder.draft(replace(run, data=name_sources(run.data)), Path(temporary), None)
        if chooses_micro_batch:
            fitting = fit_micro_batch(folder.run, plan_here(folder.run, torch_device).machines)
            folder = folder.with_run(fitting)
        check_memory(name, folder.run, torch_device)
        keep_freed_memory(torch_device)
        print_status(f"measuring {name} on {torch_device}")
        measured = _measure(folder, torch_device)
    return replace(plan_here(folder.run, torch_device), measured=measured)


def _measure(folder: RunFolder, device: torch.device) -> Measurement:
    """Steps of one forward pass, one held-out batch of each source, and a short preview; scaled to those of the run."""
    run, rows = folder.run, rows_per_pass(folder.run, 1)
    heldout = folder.heldout_batches(rows)
    first = {name: batches[:1] for name, batches in heldout.items() if batches}
    preview_steps = min(PREVIEW_STEPS, run.generation.steps)
    short = folder.with_run(replace(run, generation=replace(run.generation, steps=preview_steps)))
    preview = previewer(short, open_raw(run.data, "heldout"), device, SINGLE_PROCESS)
    one_pass = replace(run, training=replace(run.training, batch_size=rows))
    loader = Loader(open_sources(run.data, "train"), folder.encoder, rows)
    trainer = Trainer(one_pass, folder.path, loader, first, device, on_preview=preview)
    seconds = _time_steps(trainer)
    evaluation = _time(lambda: trainer.evaluate_heldout(reset_watchdog=lambda: None)) / max(1, len(first))
    draws = preview is not None and run.training.preview_every > 0
    drawing = _time(lambda: trainer.preview(0, reset_watchdog=lambda: None)) if draws else 0.0
    scale = 1 if run.model.patches == "codes" else run.generation.steps / preview_steps
    return Measurement(
        device=str(device), steps=len(seconds), step=median(seconds) * run.training.batch_size / rows,
        evaluation=evaluation * sum(map(len, heldout.values())), evaluations=_count(run, run.training.validate_every),
        preview=drawing * scale, previews=_count(run, run.training.preview_every) if draws else 0,
        peak_memory=peak_memory(device),
    )  # fmt: skip


def _time_steps(trainer: Trainer) -> list[float]:
    """Seconds of each step after the warm-up. As in training, the next batch is loaded during a step."""
    seconds: list[float] = []
    batches, number = trainer.batches(None), 0
    with ThreadPoolExecutor(1) as prefetcher:
        next_batch = prefetcher.submit(next, batches)
        while number <= WARM_UP or (number < WARM_UP + MAX_STEPS and sum(seconds[WARM_UP:]) < MAX_SECONDS):
            start = monotonic()
            micro_batches, _ = next_batch.result()
            next_batch = prefetcher.submit(next, batches)
            take_step(trainer, number, micro_batches)
            seconds.append(monotonic() - start)
            number += 1
    return seconds[WARM_UP:]


def take_step(trainer: Trainer, number: int, micro_batches: MicroBatches, place: str = "") -> dict[str, float]:
    """The metrics of one step on one process. UsageError when it is not finite; its file of faults is not kept."""
    try:
        return trainer.step(number, micro_batches, trainer.count(micro_batches), trainer.loop.guard)()
    except TrainingError as error:
        reason = str(error).partition(",")[0]
        raise UsageError(f"{reason}{place}: use smaller training settings") from None


def _time(work: Callable[[], object]) -> float:
    start = monotonic()
    work()
    return monotonic() - start


def _count(run: Run, every: int) -> int:
    """How often a run does what it does at its start, every so many steps, and at its end."""
    return 1 + run.training.steps // every + (run.training.steps % every > 0)
