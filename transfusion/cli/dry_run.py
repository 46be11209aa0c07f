"""train --dry-run: the plan of a run, and a step of a small copy of its model on its data."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from transfusion.cli.measure import compare_memory, plan_here, take_step
from transfusion.cli.plan import print_plans
from transfusion.cli.run_folder import RunFolder, Start
from transfusion.cli.screen import print_status
from transfusion.config import Machines, Run
from transfusion.data.loader import Loader, heldout_batches
from transfusion.data.sources import name_sources, open_sources
from transfusion.disk import run_name
from transfusion.parallel import pick_device
from transfusion.plan import plan
from transfusion.training.trainer import Trainer

WIDTH, DOCUMENTS = 64, 64  # of the copy; documents that its rows are packed from


def dry_run(run: Run, path: Path, device: str, start: Start | None) -> None:
    """Print the plan of a run, and take one step of a copy with one layer of width 64 on its data. Nothing is written.
    UsageError or ValueError for what would stop the run at its start."""
    if int(os.environ.get("RANK", 0)):
        return  # one process of torchrun is enough
    torch_device = pick_device(device)
    folder = RunFolder.draft(replace(run, data=name_sources(run.data)), path, start)
    here, losses = plan_here(folder.run, torch_device), _step_of_copy(folder, torch_device)
    memory = here.machines.memory if torch_device.type == "cuda" else Machines.memory
    print_plans([run_name(path)], [plan(folder.run, replace(here.machines, memory=memory, device="cuda"))])
    print(f"On this machine ({torch_device}) it {compare_memory(here)}.")
    print_status(f"one step of a copy with one layer of width {WIDTH}: {losses}; nothing was written")


def _step_of_copy(folder: RunFolder, device: torch.device) -> str:
    """One step and one evaluation of a small copy of the model. Returns its losses as text."""
    run = shrink(folder.run)
    encoder = replace(folder.encoder, config=run.data)
    heldout = {source.name: heldout_batches(source, encoder, DOCUMENTS, 1) for source in open_sources(run.data, "heldout")}
    with TemporaryDirectory() as faults:
        trainer = Trainer(run, Path(faults), Loader(open_sources(run.data, "train"), encoder, 1), heldout, device)
        micro_batches, _ = next(trainer.batches(None))
        losses = take_step(trainer, 0, micro_batches, f" in a copy with one layer of width {WIDTH}")
        trainer.evaluate_heldout(reset_watchdog=lambda: None)
    return trainer.describe(losses)


def shrink(run: Run) -> Run:
    """The run with one layer of width 64, and one row in a batch."""
    return replace(
        run,
        model=replace(run.model, width=WIDTH, layers=1, heads=1, kv_heads=None, head_dim=None, intermediate_size=None,
                      unet_width=None),
        data=replace(run.data, shuffle_block=DOCUMENTS), training=replace(run.training, batch_size=1),
        parallel=replace(run.parallel, shard="full", compile=False),
    )  # fmt: skip
