"""transfusion plan: what a run will cost, as a table, before it is begun."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from transfusion.cli.runs import named, parse_run
from transfusion.cli.screen import UsageError
from transfusion.config import (
    DataConfig,
    DiffusionConfig,
    FaultToleranceConfig,
    GenerationConfig,
    Machines,
    ModelConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
)  # fmt: skip
from transfusion.disk import check_prepared
from transfusion.runs import NAMES, PAPER, SIZES, named_run

BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
NAME, FIGURE = 30, 14  # columns


@dataclass(frozen=True)
class Asked:
    """What a run will cost: transfusion plan RUN, a named run or a run.json, with any number changed as for `train`.
    Without RUN: the paper's five sizes side by side."""

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig
    fault_tolerance: FaultToleranceConfig
    generation: GenerationConfig
    gpus: int = 1
    """That share the run."""
    gpus_per_machine: int = 8
    """That share one copy of the weights, with hybrid sharding."""
    memory: str = "80GB"
    """Of each GPU, for example 80GB or 40GiB."""
    tflops: float = 989.0
    """Of each GPU at its best; 989: an H100 in bfloat16."""
    mfu: float = 0.4
    """Share of it that the run's FLOPs will reach, counted exactly."""
    batch: str | None = None
    """Positions per step, for example 2M; training.accumulate follows."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""
    tables: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Without RUN: the named run of every row of the paper's Tables 3 to 9, its size, and how its images were drawn."""


class Line(NamedTuple):
    """Of the table. Without a figure: the heading of those that follow."""

    name: str
    figure: str = ""
    remark: str = ""


def plan(arguments: list[str]) -> None:
    """Print what a run costs, or the paper's five."""
    if "--tables" in arguments:
        if {*arguments} - {"--tables", "--json"}:
            raise UsageError("--tables lists the paper's rows: it takes nothing but --json")
        rows = list(_paper())
        return print(json.dumps(rows, indent=2) if "--json" in arguments else "\n".join(_aligned(rows)))
    alone = bool(arguments) and not arguments[0].startswith("-")
    asked = [named("plan", arguments)] if alone else [(named_run(size), arguments) for size in SIZES]
    known = not alone or arguments[0] in NAMES
    read = [_read(run, rest, f"plan {run.name}" if alone else "plan", known) for run, rest in asked]
    from transfusion.plan import plan as plan_of

    try:
        plans = [plan_of(run, machines) for run, machines, _ in read]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if read[0][2].json:
        found = [_values(one) for one in plans]
        print(json.dumps(found[0] if alone else found, indent=2))
    else:
        print(*_table(plans), *_notes(plans, read[0][2]), sep="\n")


def _read(run: Run, arguments: list[str], name: str, known: bool):
    """The run and the machines that were typed, and all else. A named run takes from its data what `train` would."""
    run, asked = parse_run(Asked, name, run, arguments)
    memory = _number(asked.memory, BYTES, "--memory takes a size, for example 80GB or 40GiB")
    batch = None
    if asked.batch is not None:
        batch = _number(asked.batch, COUNTS, "--batch takes a number of positions, for example 2M or 2097152")
    try:
        machines = Machines(asked.gpus, asked.gpus_per_machine, memory, asked.tflops, asked.mfu)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for folder in run.data.prepared if known else ():  # of a run.json all is known, wherever its data lie
        check_prepared(Path(folder))
    if known and (run.data.sources or run.data.prepared):
        from transfusion.data.sources import fit

        encoder = fit(run.data, run.model.patch_size, run.training.seed)
        fitted = {"vocab_size": encoder.vocabulary.size, "latent_channels": encoder.codec.channels}
        run = replace(run, model=replace(run.model, **fitted))
    if batch is not None:
        from transfusion.plan import with_batch

        run = with_batch(run, asked.gpus, batch)
    return run, machines, asked


def _number(text: str, units: dict[str, int], wanted: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    number = round(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if not number:
        raise UsageError(f"{wanted}, not {text!r}")
    return number


def _table(plans: list) -> Iterator[str]:
    """One column for each run; of a run alone with a remark beside each figure."""
    alone, run = len(plans) == 1, plans[0].run
    sharding = f", {run.parallel.shard} sharding" if plans[0].machines.gpus > 1 else ""
    yield f"{run.name + ' on ' if alone else ''}{_counted(plans[0].machines.gpus, 'GPU')}{sharding}"
    if not alone:
        yield " " * NAME + "".join(f"{one.run.name:>{FIGURE}}" for one in plans)
    unit = "MB" if all(one.memory.all - one.memory.own < BYTES["GB"] for one in plans) else "GB"
    for same in zip(*(_lines(one, unit) for one in plans), strict=True):
        name, figure, remark = same[0]
        if figure:
            figures = "".join(f"{line.figure:>{FIGURE}}" for line in same)
            yield f"  {name:{NAME - 2}}{figures}   {remark if alone else ''}".rstrip()
        else:
            yield f"\n{name}"


def _paper() -> Iterator[dict]:
    """The rows of the paper's tables."""
    for row in PAPER:
        yield asdict(row) | {"parameters": _parameters(row.run)}


@cache
def _parameters(name: str) -> int:
    from transfusion.model.transfusion import build_on_meta, count_parameters

    return count_parameters(build_on_meta(named_run(name).model))


def _aligned(rows: list[dict]) -> Iterator[str]:
    yield (f"{'':8} {'row':38} {'transfusion train':20} {'parameters':>14} {'sources':>8} {'batch':>6} {'guidance':>9} "
           f"{'FID over':>9}")  # fmt: skip
    for row in rows:
        guidance, images = row["guidance_scale"] or "", f"{row['fid_images']:,}" if row["fid_images"] else ""
        yield (f"Table {row['table']}  {row['label']:38} {row['run']:20} {row['parameters']:>14,} {row['sources']:>8} "
               f"{row['batch']:>6} "
               f"{guidance:>9} {images:>9}").rstrip()  # fmt: skip


def _lines(one, unit: str) -> list[Line]:
    return [*_of_memory(one, unit), *_of_work(one), *_of_disk(one, unit)]


def _of_memory(one, unit: str) -> list[Line]:
    run, machines, memory = one.run, one.machines, one.memory
    sharing = machines.sharing(run.parallel.shard)
    part = f"fp32, 1/{sharing} of them" if sharing > 1 else "fp32"
    gathered = "bf16: all but blocks, two blocks; their gradients" if sharing > 1 else "bf16: copies of all weights"
    kept = "what goes into each block" if run.parallel.activation_checkpointing else "all kept"
    text = f"the logits of {one.text_positions:,} text positions"
    widest = text if one.logits == memory.backward else "one block" + " again" * run.parallel.activation_checkpointing
    figures = {
        "weights": (memory.weights, part), "gradients": (memory.gradients, part),
        "AdamW's two moments": (memory.moments, part), "moving average": (memory.ema, part),
        "weights gathered for use": (memory.gathered, gathered),
        "activations": (memory.activations, f"{run.data.rows} rows of {run.data.seq_len:,}, {kept}"),
        "backward pass, widest": (memory.backward, f"{widest}, with gradients"),
        "CUDA and NCCL": (memory.own, "roughly"), "all": (memory.all, ""),
    }  # fmt: skip
    patches = f"{run.model.patches} patches, vocabulary {run.model.vocab_size:,}"
    return [
        Line("Parameters"),
        *(Line(name, f"{number:,}") for name, number in one.parameters.items()),
        Line("all", f"{sum(one.parameters.values()):,}", patches),
        Line(f"Memory of each GPU, {unit}"),
        *(Line(name, _size(number, unit), remark) for name, (number, remark) in figures.items()),
        Line(f"fits in {machines.memory / BYTES['GB']:.4g} GB", "yes" if one.fits else "no"),
    ]


def _of_work(one) -> list[Line]:
    run, machines = one.run, one.machines
    return [
        Line("Millions of FLOPs per position, forward and backward"),
        Line("exact", f"{one.flops / 1e6:,.1f}", "pairs that the mask lets through, head on text only"),
        Line("6 N + 12 layers width length", f"{one.usual_flops / 1e6:,.1f}", "the usual convention: every pair counts"),
        Line("Time"),
        Line("MFU, exact FLOPs", f"{machines.mfu:.1%}", f"as given, of {machines.tflops:g} TFLOP/s"),
        Line("MFU, usual FLOPs", f"{one.usual_mfu:.1%}", "the same speed by the other convention"),
        Line("positions per second", _rounded(one.positions_per_second), "of one GPU"),
        Line("... of all GPUs", _rounded(one.positions_per_second * machines.gpus)),
        Line("positions per step", f"{one.positions_per_step:,}", _product(run, machines.gpus)),
        Line("steps", f"{run.training.steps:,}"),
        Line("positions in all, millions", _rounded(one.positions / 1e6)),
        Line("time", _duration(one.seconds)),
    ]


def _of_disk(one, unit: str) -> list[Line]:
    keep = one.run.training.keep_checkpoints
    return [
        Line(f"Disk, {unit}"),
        Line("a checkpoint", _size(one.checkpoint, unit), "weights, average and two moments, fp32"),
        Line(f"with keep {keep}", _size(keep * one.checkpoint, unit), "and one more while it is written"),
    ]


def _notes(plans: list, asked: Asked) -> Iterator[str]:
    """What was assumed, what was not met, what would help."""
    from transfusion.plan import ways_to_fit

    yield ""
    first = plans[0]
    if first.image:
        y, x = first.image
        patches = y * x // first.run.model.patch_size**2
        yield f"Half of a row is taken to be images of {patches} patches ({y}x{x} latents), half text of one document."
    else:
        yield "Rows are taken to be text: they are too short for images."
    if asked.batch is not None:
        wanted = _number(asked.batch, COUNTS, "")
        if wanted != first.positions_per_step:
            yield (f"--batch {wanted:,} is no multiple of {first.positions_per_step // first.run.training.accumulate:,}: "
                   f"the nearest is {first.positions_per_step:,}.")  # fmt: skip
    for one in plans:
        if not one.fits:
            ways = " or ".join(ways_to_fit(one.run, one.machines)) or "no change of rows, recompute or GPUs"
            yield f"{one.run.name} does not fit; it would with {ways}."


def _values(one) -> dict:
    """A plan as JSON: bytes, FLOPs, seconds."""
    names = ("image", "text_positions", "logits", "flops", "usual_flops", "usual_mfu", "fits",
             "positions_per_second", "positions_per_step", "positions", "seconds", "checkpoint")  # fmt: skip
    return {
        "run": one.run.name, "machines": asdict(one.machines),
        "parameters": one.parameters | {"all": sum(one.parameters.values())},
        "memory": asdict(one.memory) | {"all": one.memory.all},
        **{name: getattr(one, name) for name in names},
        "steps": one.run.training.steps,
    }  # fmt: skip


def _product(run: Run, gpus: int) -> str:
    data, times = run.data, run.training.accumulate
    return f"{data.rows} rows x {data.seq_len:,} x accumulate {times} x {_counted(gpus, 'GPU')}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _size(number: float, unit: str) -> str:
    return f"{number / BYTES[unit]:,.2f}"


def _rounded(number: float) -> str:
    """With three digits that say something."""
    return f"{float(f'{number:.3g}'):,.0f}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
