"""Checks before a run starts: its memory, and with --dry-run a step of a small copy of its model on its data."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from transfusion.cli.options import as_usage_error
from transfusion.cli.plan import print_plans
from transfusion.cli.run_folder import RunFolder, Start
from transfusion.cli.screen import UsageError, print_status
from transfusion.config import Machines, Run, TrainingConfig
from transfusion.data.loader import Loader, heldout_batches
from transfusion.data.sources import name_sources, open_sources
from transfusion.parallel import device_memory, pick_device
from transfusion.plan import Plan, plan, ways_to_fit
from transfusion.training.guard import TrainingError
from transfusion.training.trainer import Trainer

WIDTH, DOCUMENTS = 64, 64  # of the copy; documents that its rows are packed from


def check_memory(run: Run, device: torch.device) -> None:
    """UsageError when the run needs more memory than this device has."""
    estimate = plan_here(run, device)
    if not estimate.fits:
        ways = [way for way in ways_to_fit(estimate.run, estimate.machines) if "--gpus" not in way]
        ways += ["more GPUs with torchrun"] if device.type == "cuda" else []
        raise UsageError(f"{run.recipe} {_compare(estimate)}: use {' or '.join(ways) or 'a smaller run'}")


def plan_here(run: Run, device: torch.device) -> Plan:
    """The plan of the run on this device and the other ones that torchrun uses. UsageError when its batch or its sharding
    does not suit their number."""
    world, per_machine = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    is_cuda = device.type == "cuda"
    if run.parallel.compile is None:
        run = replace(run, parallel=replace(run.parallel, compile=is_cuda))
    memory = device_memory(device) // (1 if is_cuda else per_machine)
    with as_usage_error(TrainingConfig, "--training."):
        return plan(run, Machines(world, per_machine, memory, device="cuda" if is_cuda else "cpu"))


def _compare(estimate: Plan) -> str:
    needed, there = (number / 1e9 for number in (estimate.memory.all, estimate.machines.memory))
    return f"needs {needed:,.1f} GB of memory for each process, and there are {there:,.1f} GB"


def dry_run(run: Run, path: Path, device: str, start: Start | None) -> None:
    """Print the plan of a run, and take one step of a copy with one layer of width 64 on its data. Nothing is written.
    UsageError or ValueError for what would stop the run at its start."""
    if int(os.environ.get("RANK", 0)):
        return  # one process of torchrun is enough
    torch_device = pick_device(device)
    folder = RunFolder.draft(replace(run, data=name_sources(run.data)), path, start)
    here, losses = plan_here(folder.run, torch_device), _step_of_copy(folder, torch_device)
    memory = here.machines.memory if torch_device.type == "cuda" else Machines.memory
    print_plans([plan(folder.run, Machines(here.machines.gpus, here.machines.gpus_per_machine, memory))])
    print(f"On this machine ({torch_device}) it {_compare(here)}.")
    print_status(f"one step of a copy with one layer of width {WIDTH}: {losses}; nothing was written")


def _step_of_copy(folder: RunFolder, device: torch.device) -> str:
    """One step and one evaluation of a small copy of the model. Returns its losses as text."""
    run = shrink(folder.run)
    encoder = replace(folder.encoder, config=run.data)
    heldout = {source.name: heldout_batches(source, encoder, DOCUMENTS, 1) for source in open_sources(run.data, "heldout")}
    with TemporaryDirectory() as faults:
        trainer = Trainer(run, Path(faults), Loader(open_sources(run.data, "train"), encoder, 1), heldout, device)
        micro_batches, _ = next(trainer.batches(None))
        try:
            losses = trainer.step(0, micro_batches, trainer.count(micro_batches), trainer.loop.guard)()
        except TrainingError as error:  # its file of faults is not kept
            reason = str(error).partition(",")[0]
            raise UsageError(f"{reason} in a copy with one layer of width {WIDTH}: use smaller training settings") from None
        trainer.evaluate_heldout(reset_watchdog=lambda: None)
    return trainer.describe(losses)


def shrink(run: Run) -> Run:
    """The run with one layer of width 64, and one row in a batch."""
    return replace(
        run,
        model=replace(run.model, width=WIDTH, layers=1, heads=1, kv_heads=None, head_dim=None, intermediate_size=None,
                      unet_width=None),
        data=replace(run.data, shuffle_block=DOCUMENTS, workers=1), training=replace(run.training, batch_size=1),
        parallel=replace(run.parallel, shard="full", compile=False),
    )  # fmt: skip
