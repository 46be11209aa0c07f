"""transfusion demo | train | generate | report: start runs and use them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from transfusion.cli.evaluate import measure
from transfusion.cli.ignored import check_generate, check_train, warn_about_warmup
from transfusion.cli.options import Device, Overrides, RunArgument, as_usage_error, parse
from transfusion.cli.screen import UsageError, check_exists, print_status, progress
from transfusion.cli.settings import check_data, option_names, parse_run, read_run, to_yaml
from transfusion.config import EvaluationConfig, GenerationConfig, Run, parse_size
from transfusion.disk import RUN, check_run, find_folder, is_exported, read_json, run_name
from transfusion.fields import Range, Seed
from transfusion.runs import named_run
from transfusion.training.loggers import check_loggers

NumImages = Annotated[int, Range(at_least=1, limit=10_000)]


@dataclass(frozen=True)
class Train:
    """Train a run. The same command resumes it, bit for bit, and so does `train FOLDER`; Ctrl-C saves a checkpoint first."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    out: Path = Path()
    """Folder of the run."""
    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start from another run, exported run or model in the package, as named in generate; prepare your data --like it."""
    init_from: str | None = None
    """Start from a language model (Llama, Mistral, Qwen2 or Qwen3), a folder or a name on the hub; it decides all sizes."""
    device: Device = "auto"
    config: Path | None = None
    """YAML or JSON file with some settings or all, such as --print-config prints; options override it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all settings as YAML, and do nothing else."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan after one step of a copy with one layer of width 64 on the data, and write nothing."""


@dataclass(frozen=True)
class Demo:
    """Train the recipe `digits`, measure it and write its report: real scans, no download, ten minutes on two cores."""

    out: Path = Path("runs/digits")
    """Folder of the run."""
    device: Device = "auto"


class GenerationOverrides(Overrides, GenerationConfig):
    """The options of `generate` that replace settings of the run."""


@dataclass(frozen=True)
class Generate:
    """Generate text and images with a run, in the order in which the model produces them."""

    run: RunArgument
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Text and images in order, an image as @picture.png; write @@ for text that begins with @."""
    negative_prompt: str | None = None
    """Text that takes the place of the empty prompt in classifier-free guidance: what the images shall not show."""
    num_images: NumImages | None = None
    """Number of images to draw, each from the whole prompt; if not set, the model decides what follows the prompt."""
    size: str | None = None
    """WIDTHxHEIGHT of the images in pixels, one of the run's sizes, for example 32x32; the run's first size if not set."""
    generation: Annotated[GenerationOverrides, tyro.conf.arg(name="")] = field(default_factory=GenerationOverrides)
    seed: Seed = 0
    """Seed of the random numbers."""
    out: Path = Path("out")
    """Folder for output.json and the images 000.png, 001.png and so on; images of earlier calls are kept."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove the numbered images and output.json of earlier calls from the folder."""
    weights: Literal["ema", "raw"] = "ema"
    """Moving average of the weights, or the last weights."""
    device: Device = "auto"


@dataclass(frozen=True)
class Report:
    """Write a run's report.html: its losses, evaluation results and generated examples on one page."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, not an exported one: the report shows the losses of training."""
    device: Device = "auto"


def demo(arguments: list[str]) -> None:
    """Train, evaluate and report the recipe `digits`."""
    args = parse(Demo, "demo", arguments)
    _train_or_exit(named_run("digits"), args.out, args.device)
    measure(args.out, args.out, EvaluationConfig(), args.device)
    _write_report(args.out, args.device)


def train(arguments: list[str]) -> None:
    """Start a run or resume it."""
    chosen = read_run("train", arguments)
    before, folder = chosen.run, chosen.folder
    resumes, out = folder is not None and not option_names(arguments) & {"--out"}, folder or Path("runs") / before.recipe
    run, args = parse_run(Train, f"train {before.recipe}", before, chosen.arguments, resumes, out=out)
    sources = {"run": args.start, "language_model": args.init_from}
    starts = [(kind, source) for kind, source in sources.items() if source is not None]
    if len(starts) > 1:
        raise UsageError("a run starts from one source: give --from or --init-from, not both")
    if resumes and not starts and (note := read_json(folder / RUN).get("notes", {}).get("start")):
        starts = [(note["kind"], note["place"])]
    if run.lora.rank is not None and not starts:
        raise UsageError("--lora.rank needs --from or --init-from: the weights that are not trained are those of a start")
    if not args.print_config:  # it needs no data
        _check_inputs(run, args)
    check_train(before, run, starts[0][0] if starts else None)
    if args.print_config:
        return print(to_yaml(run), end="")
    if args.dry_run:
        from transfusion.cli.dry_run import dry_run

        return dry_run(run, args.out, args.device, *starts or [None])
    _train_or_exit(run, args.out, args.device, *starts)


def _train_or_exit(run: Run, path: Path, device: str, *start: tuple[str, str]) -> None:
    """Train to the last step. If a signal stops it, exit with the code of a stopped run."""
    from transfusion.training.signals import exit_on_signal, exit_stopped

    with exit_on_signal():  # also while packages are imported, and after the run is saved
        if not train_run(run, path, device, *start):
            exit_stopped()


def _check_inputs(run: Run, args: Train) -> None:
    """An error for missing packages or data, or for a missing start of a new run, before the run is created."""
    check_loggers(run.training.log)
    if run.lora.rank is not None:
        from transfusion.model.lora import check_peft

        check_peft()
    check_data(run)
    if (args.out / RUN).exists():
        return  # a resumed run does not read its start
    if args.init_from is not None:
        check_exists(find_folder(args.init_from))
    if args.start is not None:
        check_run(find_folder(args.start))


def train_run(run: Run, path: Path, device: str, start: tuple[str, str] | None = None) -> bool:
    """Start or resume a run on all processes of torchrun. False when a signal stopped it.

    `start`: "run" or "language_model", and its folder or name on the hub; see RunFolder.
    """
    from transfusion.cli.measure import check_memory
    from transfusion.cli.preview import previewer
    from transfusion.cli.run_folder import RunFolder
    from transfusion.data.loader import Loader
    from transfusion.data.sources import name_sources, open_raw, open_sources
    from transfusion.parallel import Ranks, keep_freed_memory, pick_device, rows_per_pass
    from transfusion.training.lock import TrainingLock
    from transfusion.training.trainer import Trainer

    torch_device = pick_device(device)
    keep_freed_memory(torch_device)
    with Ranks.of_torchrun(torch_device) as ranks, TrainingLock(path, ranks) as lock:
        if ranks.is_main:
            folder = RunFolder.draft(replace(run, data=name_sources(run.data)), path, start)
            check_memory(run_name(path), folder.run, torch_device)
            folder.write()
        ranks.barrier()
        folder = RunFolder.open(path)
        run, encoder = folder.run, folder.encoder
        loader = Loader(open_sources(run.data, "train"), encoder, run.training.batch_size, ranks.rank, ranks.world)
        heldout = folder.heldout_batches(rows_per_pass(run, ranks.world))
        preview = previewer(folder, open_raw(run.data, "heldout"), torch_device, ranks)
        first_weights = folder.first_weights(ranks)
        trainer = Trainer(run, path, loader, heldout, torch_device, ranks, preview, first_weights, folder.base_sha256)
        trainer.loop.restore(print_status)
        devices = f"{ranks.world} processes ({torch_device.type})" if ranks.world > 1 else str(torch_device)
        report_line = print_status if ranks.is_main else lambda line: None
        if trainer.loop.progress.step >= run.training.steps:
            report_line(f"{path} is trained to its last step, {run.training.steps}; a larger --training.steps resumes it")
            return lock.end(finished=True)
        report_line(f"training {path} on {devices}, recipe {run.recipe}")
        warn_about_warmup(run.training, report_line)
        lock.begin()
        return lock.end(trainer.train())


def generate(arguments: list[str]) -> None:
    """Generate; text and images are printed and saved as they are produced."""
    args = parse(Generate, "generate", arguments)
    if not args.prompt and args.num_images is None:
        raise UsageError("the prompt is empty: give text or @image.png, or --num-images N")
    with as_usage_error(Generate):
        size = None if args.size is None else parse_size(args.size)
    folder = check_run(find_folder(args.run))
    parts = tuple(map(_read_part, args.prompt))

    from transfusion.inference.engine import Request, open_run

    engine = open_run(folder, args.weights, args.device)
    with as_usage_error(Generate):
        has_pictures = any(not isinstance(part, str) for part in parts)
        check_generate(engine, args.num_images, size, has_pictures, args.generation)
        generation = engine.make_generation_config(**args.generation)
        engine.submit(Request(parts, args.num_images, args.seed, generation, size, negative_prompt=args.negative_prompt))
    _print_answers(engine, args)


def _read_part(word: str):
    """A part of the prompt: the image in a file, or text."""
    if not word.startswith("@") or word.startswith("@@"):
        return word.removeprefix("@")
    from transfusion.codecs.pictures import read_picture

    return read_picture(Path(word[1:]))


def report(arguments: list[str]) -> None:
    """Write the report of a run."""
    args = parse(Report, "report", arguments)
    run = check_run(find_folder(args.run))
    if is_exported(run):
        raise ValueError(f"{args.run} is an exported run, without the losses of training: give the folder of the run itself")
    _write_report(run, args.device)


def _write_report(folder: Path, device: str) -> None:
    from transfusion.inference.engine import open_run
    from transfusion.report.write import write_report

    engine = open_run(folder, device=device)
    with progress("report") as on_progress:
        path = write_report(folder, engine, on_progress)
    print_status(f"wrote {path}")


def _print_answers(engine, args: Generate) -> None:
    """Run the engine until its request is complete, save the images, add to output.json and print the answers."""
    from rich.console import Console

    from transfusion.cli.output import OutputFolder
    from transfusion.inference.answer import Answer
    from transfusion.inference.engine import Draw
    from transfusion.inference.request import FinishEvent, ImageEvent

    output = OutputFolder(args.out, args.overwrite)
    answers = [Answer() for _ in range(args.num_images or 1)]
    names, errors = [[] for _ in answers], []  # of each answer's images; messages of failed samples
    with Console(stderr=True).status("drawing") as status:
        while engine.sequences:
            for event in engine.step():
                answers[event.sample_index].add(event)
                if isinstance(event, ImageEvent):
                    names[event.sample_index].append(output.save(event.pixels))
                elif isinstance(event, FinishEvent) and event.reason == "error":
                    errors.append(event.message)
            steps = [state.phase.image.step for state in engine.sequences if isinstance(state.phase, Draw)]
            status.update(f"drawing: step {min(steps)}" if steps else "writing")
    parts = [[{"text": part} if isinstance(part, str) else {"image": images.pop(0)} for part in answer.parts]
             for answer, images in zip(answers, names, strict=True)]  # fmt: skip
    output.add({
        "run": str(args.run), "prompt": list(args.prompt), "negative_prompt": args.negative_prompt, "seed": args.seed,
        "options": args.generation, "answers": [
            {"sample": n, "parts": parts[n], "reason": answer.reason} for n, answer in enumerate(answers)
        ],
    })  # fmt: skip
    for n in range(len(answers)):
        texts = [part.get("text") or f"[{args.out / part['image']}]" for part in parts[n]]
        print(f"{n}: " if len(answers) > 1 else "", *texts, sep="")
    if errors:
        raise ValueError(f"{len(errors)} of {len(answers)} samples failed: {errors[0]}")
