"""plan --device: the time and memory of a run on this machine, measured on a few of its steps. Nothing is kept."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from transfusion.cli import runs
from transfusion.cli.dry_run import check_memory, plan_here, take_step
from transfusion.cli.preview import previewer
from transfusion.cli.run_folder import RunFolder
from transfusion.cli.screen import print_status
from transfusion.config import Run
from transfusion.data.loader import Loader, heldout_batches
from transfusion.data.sources import name_sources, open_raw, open_sources
from transfusion.parallel import SINGLE_PROCESS, keep_freed_memory, pick_device
from transfusion.plan import Measurement, Plan
from transfusion.training.metrics import peak_memory
from transfusion.training.trainer import Trainer

WARM_UP, MAX_STEPS, MAX_SECONDS = 2, 10, 60.0  # steps before the measurement, and in it; its time limit
PREVIEW_STEPS = 4  # denoising steps of the measured preview


def measure(run: Run, device: str) -> Plan:
    """The plan of a run on this machine, with the times of its parts. UsageError when it does not fit into the memory."""
    torch_device = pick_device(device)
    with TemporaryDirectory() as temporary:
        folder = RunFolder.draft(replace(run, data=name_sources(run.data)), Path(temporary), None)
        check_memory(folder.run, torch_device)
        keep_freed_memory(torch_device)
        print_status(f"measuring {run.name} on {torch_device}")
        measured = _measure(folder, torch_device)
    return replace(plan_here(folder.run, torch_device), measured=measured)


def _measure(folder: RunFolder, device: torch.device) -> Measurement:
    run, encoder = folder.run, folder.encoder
    heldout = {source.name: heldout_batches(source, encoder, runs.HELDOUT) for source in open_sources(run.data, "heldout")}
    first = {name: batches[:1] for name, batches in heldout.items() if batches}
    one_pass = replace(run, training=replace(run.training, accumulate=1))
    loader = Loader(open_sources(run.data, "train"), encoder)
    preview_steps = min(PREVIEW_STEPS, run.generation.steps)
    brief = replace(run, generation=replace(run.generation, steps=preview_steps))
    shortened = replace(folder, description=replace(folder.description, run=brief))
    preview = previewer(shortened, open_raw(run.data, "heldout"), device, SINGLE_PROCESS)
    trainer = Trainer(one_pass, folder.path, loader, first, device, on_preview=preview)
    seconds = _time_steps(trainer)
    evaluation = _time(lambda: trainer.evaluate_heldout(reset_watchdog=lambda: None)) / max(1, len(first))
    draws = preview is not None and run.training.preview_every > 0
    drawing = _time(lambda: trainer.preview(0, reset_watchdog=lambda: None)) if draws else 0.0
    is_diffusion = run.model.patches != "codes"
    return Measurement(
        device=str(device), steps=len(seconds), step=median(seconds) * run.training.accumulate,
        evaluation=evaluation * sum(map(len, heldout.values())), evaluations=_count(run, run.training.validate_every),
        preview=drawing * (run.generation.steps / preview_steps if is_diffusion else 1),
        previews=_count(run, run.training.preview_every) if draws else 0, peak_memory=peak_memory(device),
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


def _time(work: Callable[[], object]) -> float:
    start = monotonic()
    work()
    return monotonic() - start


def _count(run: Run, every: int) -> int:
    """How often a run does what it does at its start, every so many steps, and at its end."""
    return 1 + run.training.steps // every + (run.training.steps % every > 0)
