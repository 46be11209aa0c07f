"""transfusion plan: the memory, time and disk that a run needs, as a table; measured on this machine with --device."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import tyro

from transfusion.cli.ignored import refuse
from transfusion.cli.options import as_usage_error
from transfusion.cli.screen import UsageError, nearest
from transfusion.cli.settings import ChosenRun, check_data, config_file, option_names, parse_run, read_run
from transfusion.config import MFU, Machines, Run, Teraflops, TrainingConfig
from transfusion.disk import check_prepared, run_name
from transfusion.fields import PositiveInt
from transfusion.gpus import GPUS
from transfusion.paper import PAPER
from transfusion.runs import SIZES, named_run

BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
NAME_WIDTH, FIGURE_WIDTH = 30, 14  # columns of the table
ASSUMED = "gpus gpus_per_machine gpu memory tflops mfu"  # options that describe the GPUs of an estimate
MICRO_BATCH = "--parallel.micro-batch-size"
GPU_HELP = f"Kind of each GPU, which decides its memory and peak: {', '.join(GPUS)}."


@dataclass(frozen=True)
class PlanOptions:
    """Estimate memory, time and disk of a run: transfusion plan RUN, a recipe or a run.json, with the options of `train`.
    Without --parallel.micro-batch-size it is the largest that fits, up to the run's. Without RUN, the paper's five sizes."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    gpus: PositiveInt = 1
    """Number of GPUs that train the run."""
    gpus_per_machine: PositiveInt = 8
    """Number of GPUs in a machine, which share one copy of the weights with hybrid sharding."""
    gpu: Annotated[str, tyro.conf.arg(help=GPU_HELP)] = "h100"
    memory: str | None = None
    """Memory of each GPU with its unit, for example 80GB or 40GiB; that of --gpu if not set."""
    tflops: Teraflops | None = None
    """Peak TFLOP/s of each GPU in bfloat16, dense; that of --gpu if not set."""
    mfu: MFU = 0.4
    """Share of the peak that the run's exact FLOPs reach."""
    device: str | None = None
    """Measure some steps on this device of this machine instead: auto, cpu, cuda, cuda:1 or mps. It needs the run's data."""
    config: Path | None = None
    """YAML or JSON file with some settings or all, as in `train`; options override it."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""
    tables: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Without RUN, print the recipe, size and generation settings of each row of the paper's Tables 3 to 9."""


class Line(NamedTuple):
    """A line of the table. Without a figure, the heading of the lines below it."""

    name: str
    figure: str = ""
    remark: str = ""


def plan(arguments: list[str]) -> None:
    """Print the plan of a run, or of the paper's five sizes."""
    if "--tables" in arguments:
        if {*arguments} - {"--tables", "--json"}:
            raise UsageError("--tables lists the paper's rows: it takes nothing but --json")
        rows = [asdict(row) | {"parameters": _count_parameters(row.run)} for row in PAPER]
        return print(json.dumps(rows, indent=2) if "--json" in arguments else "\n".join(_align(rows)))
    single = bool(arguments) and (not arguments[0].startswith("-") or config_file(arguments) is not None)
    if not single and "--device" in option_names(arguments):
        raise UsageError("--device measures one run: name it, for example plan small --data DIR --device cpu")
    sizes = () if single else SIZES
    runs = [ChosenRun(named_run(size), arguments, is_recipe=True) for size in sizes] or [read_run("plan", arguments)]
    parsed = [_parse(chosen, f"plan {chosen.run.recipe}" if single else "plan") for chosen in runs]
    names = [run_name(chosen.folder) if chosen.folder else chosen.run.recipe for chosen in runs]
    args, is_free = parsed[0][2], MICRO_BATCH not in option_names(arguments)
    if args.device is not None:
        from transfusion.cli.measure import measure

        plans = [measure(names[0], parsed[0][0], args.device, is_free)]
    else:
        from transfusion.plan import fit_micro_batch
        from transfusion.plan import plan as plan_run

        with as_usage_error(TrainingConfig, "--training."):
            plans = [plan_run(fit_micro_batch(run, machines) if is_free else run, machines) for run, machines, _ in parsed]
    values = [_to_json(name, estimate) for name, estimate in zip(names, plans, strict=True)]
    if single and plans[0].fits:
        values[0]["command"] = _write_command(plans[0], parsed[0][0], arguments, is_new=runs[0].folder is None)
    if args.json:
        return print(json.dumps(values[0] if single else values, indent=2))
    print_plans(names, plans)
    if "command" in values[0]:
        print(f"Train it with:\n  {values[0]['command']}")


def print_plans(names: list[str], plans: list) -> None:
    """Print the plans of runs with these names as a table, one column for each, and notes on them."""
    print(*_table(names, plans), *_notes(names, plans), sep="\n")


def _write_command(estimate, run: Run, arguments: list[str], is_new: bool) -> str:
    """The command that trains `run`, as `plan` was given it by `arguments`, with the micro batch of the plan. `is_new`: it
    does not resume the run of a folder, so that an adapter needs a start."""
    options = {f"--{f.name.replace('_', '-')}": f.type for f in fields(PlanOptions) if f.name not in ("run", "config")}
    words, rest = [], iter(arguments)
    for word in rest:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name not in options:
            words.append(word)
        elif not equals and bool not in get_args(options[name]):
            next(rest)  # its value
    if not run.data.prepared and not run.data.sources:
        words += ["--data", "DIR"]
    if is_new and run.lora.rank is not None:
        words += ["--from", "RUN"]
    if estimate.run.parallel.micro_batch_size != run.parallel.micro_batch_size:
        words += [MICRO_BATCH, str(estimate.rows_per_pass)]
    gpus, per_machine = estimate.machines.gpus, estimate.machines.gpus_per_machine
    machines = next(n for n in range(ceil(gpus / per_machine), gpus + 1) if gpus % n == 0)
    nodes = f"--nnodes {machines} " if machines > 1 else ""
    endpoint = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 " if machines > 1 else ""  # static would need --node-rank
    launcher = f"torchrun {nodes}--nproc-per-node {gpus // machines} {endpoint}-m " if gpus > 1 else ""
    return f"{launcher}transfusion train {shlex.join(words)}"


def _parse(chosen: ChosenRun, command: str) -> tuple[Run, Machines, PlanOptions]:
    """The run, the machines and all options. As in `train`, the data decide the vocabulary and channels of a recipe."""
    before, is_recipe = chosen.run, chosen.is_recipe
    run, args = parse_run(PlanOptions, command, before, chosen.arguments)
    if args.gpu not in GPUS:
        raise UsageError(f"there is no GPU {args.gpu!r}{nearest(args.gpu, GPUS)}; there are {', '.join(GPUS)}")
    memory, tflops = GPUS[args.gpu].memory, GPUS[args.gpu].tflops if args.tflops is None else args.tflops
    if args.memory is not None:
        memory = _number(args.memory, BYTES, "--memory takes a size, for example 80GB or 40GiB")
    machines = Machines(args.gpus, args.gpus_per_machine, memory, tflops, args.mfu)
    given = [f.name for f in fields(args) if f.name in ASSUMED.split() and getattr(args, f.name) != f.default]
    refuse(given, [
        (args.device is not None, ASSUMED, "with --device, which measures the run on this machine"),
        (run.parallel.shard == "full", "gpus_per_machine", "without --parallel.shard hybrid"),
    ])  # fmt: skip
    if run.parallel.cpu_matmul != before.parallel.cpu_matmul and args.device is None:
        raise UsageError("--parallel.cpu-matmul has no effect on a plan for GPUs: add --device cpu")
    if args.device is not None:
        check_data(run)
    for folder in run.data.prepared if is_recipe else ():  # a run.json holds all sizes; its data may be elsewhere
        check_prepared(Path(folder))
    if is_recipe and args.device is None and (run.data.sources or run.data.prepared):
        from transfusion.data.sources import fit

        encoder = fit(run.data, run.model.patch_size, run.training.seed)
        vocabulary, channels = encoder.vocabulary, encoder.codec.channels
        fitted = {"vocab_size": vocabulary.size, "text_vocab_size": vocabulary.text_size, "latent_channels": channels}
        run = replace(run, model=replace(run.model, **fitted))
    return run, machines, args


def _number(text: str, units: dict[str, int], rule: str) -> int:
    """A number with a unit, in the smallest unit. UsageError when it is not one, below 1 or too large."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    number = float(match[1]) * units[match[2]] if match and match[2] in units else 0
    if not 1 <= number < 2**63:
        raise UsageError(f"{rule}, not {text!r}")
    return round(number)


def _table(names: list[str], plans: list) -> Iterator[str]:
    """One column for each run; a single run has a remark beside each figure."""
    single, run, measured = len(plans) == 1, plans[0].run, plans[0].measured
    sharding = f", {run.parallel.shard} sharding" if plans[0].machines.gpus > 1 else ""
    place = f"this machine ({measured.device})" if measured else f"{_count(plans[0].machines.gpus, 'GPU')}{sharding}"
    recipe = f", recipe {run.recipe}" if single and names[0] != run.recipe else ""
    yield f"{names[0] + ' on ' if single else ''}{place}{recipe}"
    if not single:
        yield " " * NAME_WIDTH + "".join(f"{name:>{FIGURE_WIDTH}}" for name in names)
    unit = "MB" if all(estimate.memory.all - estimate.memory.cuda < BYTES["GB"] for estimate in plans) else "GB"
    for lines in zip(*([*_memory_lines(e, unit), *_time_and_disk_lines(e, unit)] for e in plans), strict=True):
        name, figure, remark = lines[0]
        if figure:
            figures = "".join(f"{line.figure:>{FIGURE_WIDTH}}" for line in lines)
            yield f"  {name:{NAME_WIDTH - 2}}{figures}   {remark if single else ''}".rstrip()
        else:
            yield f"\n{name}"


@cache
def _count_parameters(name: str) -> int:
    from transfusion.model.transfusion import build_on_meta, count_parameters

    return count_parameters(build_on_meta(named_run(name).model))


def _align(rows: list[dict]) -> Iterator[str]:
    yield (f"{'':8} {'row':38} {'transfusion train':20} {'parameters':>14} {'sources':>8} {'batch':>6} {'guidance':>9} "
           f"{'FID over':>9}")  # fmt: skip
    for row in rows:
        guidance, images = row["guidance_scale"] or "", f"{row['fid_images']:,}" if row["fid_images"] else ""
        yield (f"Table {row['table']}  {row['label']:38} {row['run']:20} {row['parameters']:>14,} {row['sources']:>8} "
               f"{row['batch_size']:>6} {guidance:>9} {images:>9}").rstrip()  # fmt: skip


def _memory_lines(estimate, unit: str) -> list[Line]:
    run, machines, memory = estimate.run, estimate.machines, estimate.memory
    shards = machines.shard_group_size(run.parallel.shard)
    part = f"fp32, 1/{shards} of them" if shards > 1 else "fp32"
    gathered = "bf16: all but blocks, two blocks; their gradients" if shards > 1 else "bf16: copies of all weights"
    saved = "inputs of blocks only" if run.parallel.activation_checkpointing else "all of them"
    block = "one block, recomputed" if run.parallel.activation_checkpointing else "one block"
    moments = "AdamW's two moments" if run.training.optimizer == "adamw" else "moments of Muon and AdamW"
    largest = "a chunk of the logits" if estimate.loss == memory.backward else block
    figures = {
        "weights": (memory.weights, part), "gradients": (memory.gradients, part),
        moments: (memory.moments, part), "moving average": (memory.ema, part),
        "weights gathered for use": (memory.gathered, gathered),
        "activations": (memory.activations, f"{estimate.rows_per_pass} rows of {run.data.seq_len:,}, {saved}"),
        "backward pass, largest": (memory.backward, f"{largest}, with gradients"),
        "CUDA and NCCL": (memory.cuda, "approximate"), "all": (memory.all, ""),
    }  # fmt: skip
    peak = [Line("peak of the measured steps", _size(estimate.measured.peak_memory, unit),
                 "resident, with Python and PyTorch" if machines.device == "cpu" else "allocated by PyTorch")
            ] if estimate.measured else []  # fmt: skip
    patches = f"{run.model.patches} patches, vocabulary {run.model.vocab_size:,}"
    return [
        Line("Parameters"),
        *(Line(name, f"{number:,}") for name, number in estimate.parameters.items()),
        Line("all", f"{sum(estimate.parameters.values()):,}", patches),
        *([Line("trained", f"{estimate.trained:,}")] if estimate.trained < sum(estimate.parameters.values()) else ()),
        Line(f"Memory, {unit}" if estimate.measured else f"Memory of each GPU, {unit}"),
        *(Line(name, _size(number, unit), remark) for name, (number, remark) in figures.items()
          if number or machines.device == "cuda"),
        *peak,
        Line(f"fits in {machines.memory / BYTES['GB']:.4g} GB", "yes" if estimate.fits else "no"),
        *_generation_lines(estimate, unit),
    ]


def _time_and_disk_lines(estimate, unit: str) -> list[Line]:
    run, machines, keep = estimate.run, estimate.machines, estimate.run.training.keep_checkpoints
    batch_size = run.training.batch_size
    saved = "weights" if run.lora.rank is None else "the adapter alone: weights"
    passes = _count(ceil(batch_size / machines.gpus / estimate.rows_per_pass), "pass", "passes")
    return [
        Line("Millions of FLOPs per position, forward and backward"),
        Line("exact", f"{estimate.flops / 1e6:,.1f}", "attention pairs of the mask, head on text only"),
        Line("6 N + 12 layers width length", f"{estimate.usual_flops / 1e6:,.1f}", "usual convention: all attention pairs"),
        *(_measured_lines(estimate) if estimate.measured else _assumed_lines(estimate)),
        Line("positions per step", f"{estimate.positions_per_step:,}", f"{batch_size:,} rows x {run.data.seq_len:,}"),
        *([Line("of these, noisy copies", f"{estimate.copies:.1%}", "at most: data with fewer copies have more documents")]
          if run.data.clean_copies else []),
        Line("rows per forward pass", f"{estimate.rows_per_pass:,}", f"{passes} of each process in a step"),
        Line("steps", f"{run.training.steps:,}"),
        Line("positions in all, millions", _rounded(estimate.positions / 1e6)),
        Line("time of the whole run", _duration(estimate.seconds), "without checkpoints, which are saved during training"),
        Line(f"Disk, {unit}"),
        Line("a checkpoint", _size(estimate.checkpoint, unit), f"{saved}, average and moments, fp32"),
        Line(f"{_count(keep, 'checkpoint')} kept", _size(keep * estimate.checkpoint, unit), "one more while writing"),
    ]


def _generation_lines(estimate, unit: str) -> Iterator[Line]:
    from transfusion.plan import NUM_SEQUENCES

    uses = {"float32": "CPU, MPS", "bfloat16": "CUDA", "float16": "other software"}
    yield Line(f"Memory for generation, {unit}: {NUM_SEQUENCES} sequences of {estimate.run.data.seq_len:,}, without codec")
    for precision, memory in estimate.generation.items():
        parts = f"weights {_size(memory.weights, unit)}, keys and values {_size(memory.cache, unit)}"
        yield Line(f"in {precision}", _size(memory.all, unit), f"{parts}: {uses[precision]}")
    yield Line("of it, latents of one image", f"{memory.latents / 1e6:.3f} MB")


def _assumed_lines(estimate) -> list[Line]:
    machines, speed = estimate.machines, estimate.positions_per_second
    return [
        Line("Time"),
        Line("MFU, exact FLOPs", f"{machines.mfu:.1%}", f"assumed, of {machines.tflops:g} TFLOP/s"),
        Line("MFU, usual FLOPs", f"{estimate.usual_mfu:.1%}", "the same speed in the other convention"),
        Line("positions per second", _rounded(speed), "of one GPU"),
        Line("... of all GPUs", _rounded(speed * machines.gpus)),
    ]


def _measured_lines(estimate) -> list[Line]:
    measured, speed = estimate.measured, estimate.positions_per_second
    return [
        Line("Time, measured"),
        Line("a step", f"{measured.step:.3g} seconds", f"median of {_count(measured.steps, 'step')}, after a warm-up"),
        Line("positions per second", _rounded(speed)),
        Line("TFLOP/s, exact FLOPs", f"{speed * estimate.flops / 1e12:.3g}"),
        Line("held-out evaluations", f"{measured.evaluations:,} x {measured.evaluation:.3g} s"),
        Line("previews", f"{measured.previews:,} x {measured.preview:.3g} s"),
    ]


def _notes(names: list[str], plans: list) -> Iterator[str]:
    """The assumptions, and changes that make a run fit."""
    from transfusion.plan import ways_to_fit

    yield ""
    first = plans[0]
    if first.image:
        y, x = first.image
        patches = y * x // first.run.model.patch_size**2
        copies = ", each with a noisy copy" if first.run.data.clean_copies else ""
        yield (f"Assumed: half of a row is images of {patches} patches ({y}x{x} latents){copies}, half is text of one "
               "document.")  # fmt: skip
    else:
        yield "Assumed: rows are text, because they are too short for images."
    for name, estimate in zip(names, plans, strict=True):
        if not estimate.fits:
            ways = [*ways_to_fit(estimate.run, estimate.machines)] or ["no micro batch, checkpointing or number of GPUs"]
            yield "\n  or ".join([f"{name} does not fit; it would with {ways[0]}", *ways[1:]])


def _to_json(name: str, estimate) -> dict:
    """A plan as JSON: bytes, FLOPs, seconds."""
    measured = asdict(estimate.measured) if estimate.measured else None
    figures = ("image", "rows_per_pass", "text_positions", "loss", "flops", "usual_flops", "usual_mfu", "copies", "fits",
             "positions_per_second", "positions_per_step", "positions", "seconds", "checkpoint")  # fmt: skip
    return {
        "run": name, "recipe": estimate.run.recipe, "machines": asdict(estimate.machines),
        "parameters": estimate.parameters | {"all": sum(estimate.parameters.values()), "trained": estimate.trained},
        "memory": asdict(estimate.memory) | {"all": estimate.memory.all},
        "generation": {name: asdict(memory) | {"all": memory.all} for name, memory in estimate.generation.items()},
        "measured": measured,
        **{figure: getattr(estimate, figure) for figure in figures},
        "steps": estimate.run.training.steps,
    }  # fmt: skip


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _size(number: float, unit: str) -> str:
    return f"{number / BYTES[unit]:,.2f}"


def _rounded(number: float) -> str:
    """Rounded to three significant digits."""
    return f"{number:.3g}" if number < 99.95 else f"{float(f'{number:.3g}'):,.0f}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
