"""transfusion demo | train | generate | evaluate | report: runs, begun and used."""

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from textwrap import fill
from typing import Annotated, Literal

import tyro

from transfusion.cli.evaluate import measure
from transfusion.cli.screen import Device, UsageError, check_there, nearest, parse, say
from transfusion.config import (
    BUILT_IN,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FaultToleranceConfig,
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
    from_json,
    parse_size,
    to_json,
)  # fmt: skip
from transfusion.disk import RUN, check_prepared, check_run, find_folder, read_json
from transfusion.runs import NAMES, named_run

HELDOUT = 256  # documents of each source for the held-out losses


@dataclass(frozen=True)
class Train:
    """Train a run. The same command again goes on where it stopped, bit for bit; Ctrl-C saves first."""

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig
    fault_tolerance: FaultToleranceConfig
    generation: GenerationConfig
    out: Path = Path()
    """The run's folder."""
    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Begin with the weights of another run, or of an exported one (a folder, or owner/name on the hub), and with its
    tokenizer, codec and ids: data of one's own must be prepared --like it."""
    init_from: str | None = None
    """Begin with a language model: a folder with config.json, safetensors and tokenizer.json of the Llama architecture. It
    decides the width, layers, heads and so on; its vocabulary grows by what images need."""
    device: Device = "auto"


@dataclass(frozen=True)
class Demo:
    """Train the run `digits`, measure it and write its report: real scans, no download, five minutes on two cores."""

    out: Path = Path("runs/digits")
    """The run's folder."""
    device: Device = "auto"


@dataclass(frozen=True)
class Generate:
    """Write and draw with a run. Text and pictures come out in the order in which the model makes them."""

    run: tyro.conf.Positional[Path]
    """The run's folder, or an exported one, or owner/name on the hub."""
    parts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The prompt, in order: text, or @picture.png (write @@ for text that begins with @)."""
    num_images: int | None = None
    """Draw this many images, each from the prompt alone; without it the model writes and draws until it is done."""
    size: str | None = None
    """Width x height of the images in pixels, for example 32x32; one that the run knows."""
    sampler: Literal["ddpm", "ddim", "dpm", "dpm-sde", "euler", "heun"] | None = None
    """How noise becomes an image; the run has a default for this and all that follows. dpm and dpm-sde need the fewest
    steps; euler and heun are for runs on the straight path."""
    steps: int | None = None
    """Denoising steps per image. heun takes twice the time for each."""
    shift: float | None = None
    """Above 1: more of the steps are spent where there is much noise."""
    guidance_scale: float | None = None
    """How hard images are pushed towards the prompt; 1: not at all."""
    guidance_interval: tuple[float, float] | None = None
    """From which to which t (0: clean, 1: noise) they are pushed, for example 0.1 0.8; elsewhere a step costs half."""
    guidance_rescale: float | None = None
    """0 to 1: how far the contrast that pushing exaggerates is taken back."""
    image_guidance_scale: float | None = None
    """For prompts that hold a picture: how hard the images are pushed towards it, while guidance-scale pushes them towards
    the text. Without it guidance-scale pushes them towards both at once."""
    temperature: float | None = None
    """Of the text; 0: always the likeliest token."""
    top_p: float | None = None
    """Sample text only from the likeliest tokens that together have this probability."""
    max_tokens: int | None = None
    """Most tokens that one answer may add."""
    seed: int = 0
    out: Path = Path("out")
    """The folder for 000.png ... and output.json."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the last ones."""
    device: Device = "auto"


@dataclass(frozen=True)
class OnRun:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    device: Device = "auto"


def demo(arguments: list[str]) -> None:
    """From nothing to a report."""
    asked = parse(Demo, "demo", arguments)
    if train_run(named_run("digits"), asked.out, asked.device):
        measure(asked.out, EvaluationConfig(), asked.device)
        _report(asked.out, asked.device)


def train(arguments: list[str]) -> None:
    """Begin a run, or go on with it."""
    run, rest = named("train", arguments)
    run, asked = parse_run(Train, f"train {run.name}", run, rest, out=Path("runs") / run.name)
    starts = [(kind, place) for kind, place in (("run", asked.start), ("llama", asked.init_from)) if place is not None]
    if len(starts) > 1:
        raise UsageError("a run begins with one thing: --from or --init-from, not both")
    _check_places(run, asked)
    train_run(run, asked.out, asked.device, *starts)


def _check_places(run: Run, asked: Train) -> None:
    """Data that are not there, and what a new run is to begin with, are refused before anything heavy is imported."""
    for folder in run.data.prepared:
        check_prepared(Path(folder))
    for name in run.data.sources if not run.data.prepared else ():
        if name not in BUILT_IN:
            raise ValueError(f"there is no source {name!r}{nearest(name, BUILT_IN)}; there are {', '.join(BUILT_IN)}")
    if not run.data.prepared and not run.data.sources:
        raise ValueError("this run has no data of its own: give it some, --data DIR (from transfusion data prepare) or for "
                         "example --data.sources shapes")  # fmt: skip
    if (asked.out / RUN).exists():
        return  # what it began with is needed no longer
    check_there(asked.init_from)
    if asked.start is not None:
        check_run(find_folder(asked.start))


def parse_run(kind: type, name: str, run: Run, arguments: list[str], **own):
    """The run with every number of it that was typed, and what was typed: a `kind`, which has the parts of a run as fields,
    and `own` as other defaults."""
    arguments = ["--data.prepared" if word == "--data" else word for word in arguments]
    if "--data.prepared" in arguments:  # whatever the named run reads
        run = replace(run, data=replace(run.data, sources=(), mixture_weights=()))
    parts = {f.name: getattr(run, f.name) for f in fields(Run) if f.name != "name"}
    asked = parse(kind, name, arguments, kind(**parts, **own))
    return replace(run, **{part: getattr(asked, part) for part in parts}), asked


def train_run(run: Run, folder: Path, device: str, start: tuple[str, str] | None = None) -> bool:
    """Begin a run, or go on with it, on all processes that torchrun started. False when a signal stopped it.

    `start`: what kind of thing it begins with ("run" or "llama"), and where that is.
    """
    from transfusion.data.loader import Loader, heldout_batches
    from transfusion.data.sources import name_sources, open_raw, open_sources
    from transfusion.parallel import Ranks, pick_device
    from transfusion.training.trainer import Trainer

    chosen = pick_device(device)
    with Ranks.of_torchrun(chosen) as ranks:
        run = replace(run, data=name_sources(run.data))
        begun = _begin(run, folder, start) if ranks.is_main else None
        ranks.barrier()
        run, encoder = begun or _begin(run, folder, start)
        loader = Loader(open_sources(run.data, "train"), encoder, ranks.rank, ranks.world)
        heldout = {one.name: heldout_batches(one, encoder, HELDOUT) for one in open_sources(run.data, "heldout")}
        look = _previewer(folder, open_raw(run.data, "heldout"), chosen, ranks)
        trainer = Trainer(run, folder, loader, heldout, chosen, ranks, look, _first_weights(run, folder, ranks))
        trainer.loop.restore(say)
        where = f"{ranks.world} processes ({chosen.type})" if ranks.world > 1 else str(chosen)
        tell = say if ranks.is_main else lambda line: None
        if trainer.loop.progress.step >= run.training.steps:
            tell(f"{folder} is trained to its last step, {run.training.steps}")
            return True
        tell(f"training {run.name} on {where}, into {folder}")
        return trainer.train()


def generate(arguments: list[str]) -> None:
    """Write and draw; parts go to the screen and to the folder as they come."""
    asked = parse(Generate, "generate", arguments)
    if not asked.parts and asked.num_images is None:
        raise UsageError("the prompt is empty: give text or @image.png, or --num-images N")
    chosen = {f.name: getattr(asked, f.name) for f in fields(GenerationConfig) if getattr(asked, f.name, None) is not None}
    try:  # what is wrong whatever the run is, is said before the run is opened
        GenerationConfig(**chosen)
        size = None if asked.size is None else parse_size(asked.size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    folder = check_run(find_folder(asked.run))
    parts = tuple(map(_part, asked.parts))

    from transfusion.inference.engine import Request, open_run

    engine = open_run(folder, asked.weights, asked.device)
    try:
        number = engine.submit(Request(parts, asked.num_images, asked.seed, engine.generation(**chosen), size))
    except ValueError as error:
        raise UsageError(str(error)) from None
    _follow(engine, number, asked)


def _part(typed: str):
    """Of a prompt: the picture in a file, or text."""
    if not typed.startswith("@") or typed.startswith("@@"):
        return typed.removeprefix("@")
    from transfusion.codecs.pictures import read_picture

    return read_picture(Path(typed[1:]))


def report(arguments: list[str]) -> None:
    """Show a run as one page."""
    asked = parse(OnRun, "report", arguments)
    _report(check_run(asked.run), asked.device)


def _report(folder: Path, device: str) -> None:
    from transfusion.inference.engine import open_run
    from transfusion.report import write_report

    say(f"wrote {write_report(folder, open_run(folder, device=device))}")


def _begin(run: Run, folder: Path, asked: tuple[str, str] | None):
    """The run and its encoder: those of the folder if it holds the same run already, else new ones, written there."""
    from transfusion.checkpoint.open import describe_run
    from transfusion.checkpoint.save import create_run_folder
    from transfusion.checkpoint.start import OtherRunStart, describe_start, open_start, resolve_source
    from transfusion.data.loader import Encoder, contains_edits, element_weights
    from transfusion.data.sources import fingerprint, fit, open_sources, reuse

    if (folder / RUN).exists():
        known = describe_run(folder)
        _refuse_changes(known.run, run, folder, known.notes.get("start"), asked)
        if known.notes.get("prepared") != fingerprint(run.data):
            places = " and ".join(run.data.prepared)
            raise UsageError(f"{places} does not hold the data that {folder} began with: give another --out")
        run = replace(known.run, data=run.data, parallel=run.parallel, fault_tolerance=run.fault_tolerance)
        return run, Encoder(known.tokenizer, known.codec, known.vocabulary, run.data, run.training.seed)
    start = None if asked is None else open_start(*asked)
    if isinstance(start, OtherRunStart):
        given = start.description
        encoder = reuse(run.data, given.tokenizer, given.codec, given.vocabulary, run.training.seed)
    else:
        if not run.data.prepared:
            say(f"fitting the {'codec' if start else 'tokenizer and the codec'} of {run.name}")
        encoder = fit(run.data, run.model.patch_size, run.training.seed, start and start.tokenizer)
    if (encoder.vocabulary.num_image_codes > 0) != (run.model.patches == "codes"):
        wanted = "codes" if encoder.vocabulary.num_image_codes else "linear or unet"
        raise UsageError(f"the images of these data are {encoder.codec.kind}: they need --model.patches {wanted}")
    fitted = {"vocab_size": encoder.vocabulary.size, "latent_channels": encoder.codec.channels}
    model = replace(run.model, **fitted)
    run = replace(run, model=start.adapt_config(model) if start else model)
    sources = open_sources(run.data, "train")
    notes = {source.name: source.describe() for source in sources if hasattr(source, "describe")}
    weights = element_weights(sources, encoder)
    notes["element_weights"] = {source.name: weight for source, weight in zip(sources, weights, strict=True)}
    notes["edits"] = any(map(contains_edits, sources))
    notes |= {"prepared": fingerprint(run.data)} if run.data.prepared else {}
    notes |= {"start": describe_start(start, resolve_source(*asked))} if start else {}
    create_run_folder(folder, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, notes)
    return run, encoder


def _first_weights(run: Run, folder: Path, ranks):
    """What fills in the weights that a run begins with, as its run.json says; None: its seed, or its checkpoint."""
    from transfusion.checkpoint.open import describe_run
    from transfusion.checkpoint.save import list_checkpoints
    from transfusion.checkpoint.start import reopen_start

    note = describe_run(folder).notes.get("start")
    if note is None or list_checkpoints(folder):
        return None
    start = reopen_start(note, folder)
    return lambda model: start.fill(model, run.training.seed, ranks)


def _refuse_changes(
    known: Run, asked: Run, folder: Path, began: dict | None, start: tuple[str, str] | None
) -> None:
    """A run goes on as it began, or not at all. What its data and its start decided (vocabulary, channels) is no change,
    nor where prepared data lie (they are told by their content), nor how the work is laid out or what is done when it fails.
    """
    from transfusion.checkpoint.start import fixed_model_fields, resolve_source

    if start and (not began or (began["kind"], began["place"]) != (start[0], resolve_source(*start))):
        beginning = f"with {began['place']}" if began else "anew"
        raise UsageError(f"{folder} began {beginning}, not with {start[1]}: give another --out")
    known = replace(known, parallel=asked.parallel, fault_tolerance=asked.fault_tolerance)
    fitted = {name: getattr(known.model, name) for name in fixed_model_fields(began)}
    asked = replace(asked, model=replace(asked.model, **fitted))
    if known.data.prepared and asked.data.prepared:
        known = replace(known, data=replace(known.data, prepared=asked.data.prepared))
    before, after = to_json(known), to_json(asked)
    if before["name"] != after["name"]:
        raise UsageError(f"{folder} holds the run {before['name']}, not {after['name']}: give another --out")
    changed = [
        f"{part}.{name} is {before[part][name]} there, {value} here"
        for part, values in after.items() if isinstance(values, dict)
        for name, value in values.items() if value != before[part][name]
    ]  # fmt: skip
    if changed:
        raise UsageError(f"{folder} began with other settings ({'; '.join(changed)}): give another --out")


def _previewer(folder: Path, heldout: list, device, ranks):
    """Draws the captions of some held-out pairs with the averaged weights, into samples/step-NNNNNN.png.

    Every rank draws, since each holds a part of the weights; the first keeps the pictures.
    """
    from transfusion.checkpoint.open import OpenedRun, describe_run
    from transfusion.codecs.pictures import contact_sheet
    from transfusion.inference.engine import Engine, Request

    captioned = [source for source in heldout if source[0].pairs]
    if not captioned:
        return None
    firsts = (captioned[0][n].segments[0].text for n in range(min(256, len(captioned[0]))))
    captions = list(dict.fromkeys(firsts))[:10]
    known = describe_run(folder)

    def preview(model, step: int) -> None:
        engine = Engine(OpenedRun(**vars(known), model=model, step=step, device=device))
        answers = engine.generate([Request(parts=(caption,), num_images=2) for caption in captions])
        pictures = [draws[n].parts[0] for n in range(2) for draws in answers]
        if not ranks.is_main:
            return
        (folder / "samples").mkdir(exist_ok=True)
        contact_sheet(pictures, columns=len(captions)).save(folder / "samples" / f"step-{step:06d}.png")

    return preview


def _follow(engine, number: int, asked: Generate) -> None:
    """Run the engine to the end of one request, showing what comes, then write output.json."""
    from PIL import Image as Picture
    from rich.console import Console

    from transfusion.inference.engine import Draw, FinishEvent, ImageEvent, TokenEvent

    asked.out.mkdir(parents=True, exist_ok=True)
    answers = [{"sample": draw, "parts": [], "reason": ""} for draw in range(asked.num_images or 1)]
    alone, files = len(answers) == 1, 0
    with Console(stderr=True).status("drawing") as status:
        while engine.sequences:
            for event in engine.step():
                parts = answers[event.sample_index]["parts"]
                if isinstance(event, TokenEvent) and event.text:
                    if not parts or "text" not in parts[-1]:
                        parts.append({"text": ""})
                    parts[-1]["text"] += event.text
                elif isinstance(event, ImageEvent):
                    name, files = f"{files:03d}.png", files + 1
                    Picture.fromarray(event.pixels.squeeze()).save(asked.out / name)
                    parts.append({"image": name})
                elif isinstance(event, FinishEvent):
                    answers[event.sample_index]["reason"] = event.reason
            steps = [one.phase.image.step for one in engine.sequences if isinstance(one.phase, Draw)]
            status.update(f"drawing: step {min(steps)}" if steps else "writing")
    output = {"run": str(asked.run), "prompt": list(asked.parts), "seed": asked.seed, "answers": answers}
    (asked.out / "output.json").write_text(json.dumps(output, indent=2, ensure_ascii=False) + "\n")
    for answer in answers:
        shown = [part.get("text") or f"[{asked.out / part['image']}]" for part in answer["parts"]]
        print("" if alone else f"{answer['sample']}: ", *shown, sep="")


def named(verb: str, arguments: list[str]) -> tuple[Run, list[str]]:
    """The run that comes first behind the verb, by name or from a run.json, and the options that follow."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = fill(", ".join(NAMES), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        print(f"usage: transfusion {verb} RUN [options]\n\nRUN is the path of a run.json, or one of\n{names}\n\n"
              f"transfusion {verb} RUN --help lists every option with the run's own defaults.")  # fmt: skip
        sys.exit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name in NAMES:
        return named_run(name), rest
    path = Path(name) / RUN if Path(name).is_dir() else Path(name)
    if path.suffix != ".json":
        raise UsageError(f"there is no run {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    values = read_json(path)
    return from_json(Run, values.get("run", values)), rest
