"""The command line: transfusion demo | train | generate | evaluate | report."""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from transfusion.config import (
    NAMES,
    DataConfig,
    DiffusionConfig,
    GenerationConfig,
    ModelConfig,
    Run,
    TrainingConfig,
    from_json,
    named_run,
    to_json,
)  # fmt: skip

VERBS = {
    "demo": "train on real handwritten digits, measure, and write a report: five minutes on a laptop",
    "train": "train a named run or a run.json; the same command again goes on where it stopped",
    "generate": "write and draw from a prompt of text and pictures",
    "evaluate": "measure a run and write results.json",
    "report": "show a run as one page, report.html",
}
HELDOUT = 256  # documents of each source for the held-out losses
Device = Annotated[str, tyro.conf.arg(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")]


class UsageError(ValueError):
    """What was typed cannot be done; the message says why in one line."""


@dataclass(frozen=True)
class Train:
    """Train a run. The same command again goes on where it stopped, bit for bit; Ctrl-C saves first."""

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    training: TrainingConfig
    generation: GenerationConfig
    out: Path = Path()
    """The run's folder."""
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
    """The run's folder."""
    parts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The prompt, in order: text, or @picture.png (write @@ for text that begins with @)."""
    num_images: int | None = None
    """Draw this many images, each from the prompt alone; without it the model writes and draws until it is done."""
    size: str | None = None
    """Width x height of the images in pixels, for example 32x32; one that the run knows."""
    sampler: Literal["ddpm", "ddim", "euler"] | None = None
    """How noise becomes an image; the run has a default for this and all that follows."""
    steps: int | None = None
    """Denoising steps per image."""
    guidance_scale: float | None = None
    """How hard images are pushed towards the prompt; 1: not at all."""
    temperature: float | None = None
    """Of the text; 0: always the likeliest token."""
    top_p: float | None = None
    """Sample text only from the likeliest tokens that together have this probability."""
    max_tokens: int | None = None
    """Most tokens that one answer may add."""
    seed: int = 0
    out: Path = Path("out")
    """The folder for 000.png ... and output.json."""
    weights: Literal["average", "raw"] = "average"
    """The moving average of the weights, or the last ones."""
    device: Device = "auto"


@dataclass(frozen=True)
class OnRun:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    device: Device = "auto"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what was typed and exit: 0 done, 1 failed, 2 not understood."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        sys.exit(0 if arguments else 2)
    try:
        _dispatch(arguments[0], arguments[1:])
    except UsageError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:  # what our own files raise says what is wrong in one line
        _fail(error, 1)


def _dispatch(verb: str, rest: list[str]) -> None:
    match verb:
        case "demo":
            demo(_parse(Demo, verb, rest))
        case "train":
            run, rest = _named(rest)
            parts = {f.name: getattr(run, f.name) for f in fields(Run) if f.name != "name"}
            asked = _parse(Train, f"train {run.name}", rest, Train(**parts, out=Path("runs") / run.name))
            run = replace(run, **{name: getattr(asked, name) for name in parts})
            train(run, asked.out, asked.device)
        case "generate":
            generate(_parse(Generate, verb, rest))
        case "evaluate":
            evaluate(_parse(OnRun, verb, rest))
        case "report":
            report(_parse(OnRun, verb, rest))
        case _:
            raise UsageError(f"there is no command {verb!r}{_nearest(verb, VERBS)}; there are {', '.join(VERBS)}")


def demo(asked: Demo) -> None:
    """From nothing to a report."""
    if train(named_run("digits"), asked.out, asked.device):
        evaluate(OnRun(asked.out, asked.device))
        report(OnRun(asked.out, asked.device))


def train(run: Run, folder: Path, device: str) -> bool:
    """Begin a run, or go on with it. False when a signal stopped it."""
    from transfusion.checkpoint.open import fill, newest, verify
    from transfusion.checkpoint.save import list_checkpoints
    from transfusion.data.loader import Loader, heldout_batches
    from transfusion.data.prepare import open_sources
    from transfusion.disk import read_json
    from transfusion.parallel import pick_device
    from transfusion.training.trainer import Trainer

    chosen = pick_device(device)
    sources, heldout = (open_sources(run.data, split) for split in ("train", "heldout"))
    run, encoder = _begin(run, folder, sources)
    loader = Loader(sources, encoder)
    batches = {source.name: heldout_batches(source, encoder, HELDOUT) for source in heldout}
    trainer = Trainer(run, folder, loader, batches, chosen, _previewer(folder, heldout, chosen))
    if list_checkpoints(folder):
        found = newest(folder)
        verify(found)
        fill(found, trainer.tensors())
        trainer.resume(read_json(found / "state.json"))
        _say(f"going on from {found}")
    if trainer.progress.step >= run.training.steps:
        _say(f"{folder} is trained to its last step, {run.training.steps}")
        return True
    _say(f"training {run.name} on {chosen}, into {folder}")
    return trainer.train()


def generate(asked: Generate) -> None:
    """Write and draw; parts go to the screen and to the folder as they come."""
    from transfusion.codecs.pictures import read_picture
    from transfusion.inference.engine import Request, open_run

    if not asked.parts and asked.num_images is None:
        raise UsageError("nothing to go on: give a part (text or @picture.png), or --num-images N")
    parts = tuple(
        read_picture(Path(part[1:])) if part.startswith("@") and not part.startswith("@@") else part.removeprefix("@")
        for part in asked.parts
    )
    names = [f.name for f in fields(GenerationConfig) if getattr(asked, f.name, None) is not None]
    engine = open_run(asked.run, asked.weights, asked.device)
    try:
        generation = replace(engine.run.generation, **{name: getattr(asked, name) for name in names})
        number = engine.submit(Request(parts, asked.num_images, asked.seed, generation, _size(asked.size)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    _follow(engine, number, asked)


def evaluate(asked: OnRun) -> None:
    """Measure a run; the figures go to the screen and to results.json."""
    from transfusion.evaluation.suite import evaluate
    from transfusion.inference.engine import open_run

    evaluate(open_run(asked.run, device=asked.device), asked.run, _say)
    _say(f"wrote {asked.run / 'results.json'}")


def report(asked: OnRun) -> None:
    """Show a run as one page."""
    from transfusion.inference.engine import open_run
    from transfusion.report import write_report

    _say(f"wrote {write_report(asked.run, open_run(asked.run, device=asked.device))}")


def _begin(run: Run, folder: Path, sources: list):
    """The run and its encoder: those of the folder if it holds the same run already, else new ones, written there."""
    from transfusion.checkpoint.open import describe
    from transfusion.checkpoint.save import begin
    from transfusion.data.loader import Encoder
    from transfusion.data.prepare import fit

    if (folder / "run.json").exists():
        known = describe(folder)
        _refuse_changes(known.run, run, folder)
        seed = known.run.training.seed
        return known.run, Encoder(known.tokenizer, known.codec, known.vocabulary, known.run.data, seed)
    _say(f"fitting the tokenizer and the codec of {run.name}")
    encoder = fit(run.data, run.model.patch_size, run.training.seed)
    fitted = {"vocabulary": encoder.vocabulary.size, "latent_channels": encoder.codec.channels}
    run = replace(run, model=replace(run.model, **fitted))
    notes = {source.name: source.describe() for source in sources if hasattr(source, "describe")}
    begin(folder, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, notes)
    return run, encoder


def _refuse_changes(known: Run, asked: Run, folder: Path) -> None:
    """A run goes on as it began, or not at all; what its data decided (vocabulary, channels) is no change."""
    fitted = {"vocabulary": known.model.vocabulary, "latent_channels": known.model.latent_channels}
    before, after = to_json(known), to_json(replace(asked, model=replace(asked.model, **fitted)))
    if before["name"] != after["name"]:
        raise UsageError(f"{folder} holds the run {before['name']}, not {after['name']}: give another --out")
    changed = [
        f"{part}.{name} is {before[part][name]} there, {value} here"
        for part, values in after.items() if isinstance(values, dict)
        for name, value in values.items() if value != before[part][name]
    ]  # fmt: skip
    if changed:
        raise UsageError(f"{folder} began with other settings ({'; '.join(changed)}): give another --out")


def _previewer(folder: Path, heldout: list, device):
    """Draws the captions of some held-out pairs with the averaged weights, into samples/step-NNNNNN.png."""
    from transfusion.checkpoint.open import Opened, describe
    from transfusion.codecs.pictures import contact_sheet
    from transfusion.inference.engine import Engine, Request

    captioned = [source for source in heldout if source[0].pairs]
    if not captioned:
        return None
    firsts = (captioned[0][n].segments[0].text for n in range(min(256, len(captioned[0]))))
    captions = list(dict.fromkeys(firsts))[:10]
    known = describe(folder)

    def preview(model, step: int) -> None:
        engine = Engine(Opened(**vars(known), model=model, step=step, device=device))
        answers = engine.generate([Request(parts=(caption,), num_images=2) for caption in captions])
        pictures = [draws[n].parts[0] for n in range(2) for draws in answers]
        (folder / "samples").mkdir(exist_ok=True)
        contact_sheet(pictures, columns=len(captions)).save(folder / "samples" / f"step-{step:06d}.png")

    return preview


def _follow(engine, number: int, asked: Generate) -> None:
    """Run the engine to the end of one request, showing what comes, then write output.json."""
    from PIL import Image as Picture
    from rich.console import Console

    from transfusion.inference.engine import Drawn, Finished, Written

    asked.out.mkdir(parents=True, exist_ok=True)
    answers = [{"draw": draw, "parts": [], "reason": ""} for draw in range(asked.num_images or 1)]
    alone, files = len(answers) == 1, 0
    with Console(stderr=True).status("drawing") as status:
        while engine.rows:
            for event in engine.step():
                parts = answers[event.draw]["parts"]
                if isinstance(event, Written) and event.text:
                    if not parts or "text" not in parts[-1]:
                        parts.append({"text": ""})
                    parts[-1]["text"] += event.text
                elif isinstance(event, Drawn):
                    name, files = f"{files:03d}.png", files + 1
                    Picture.fromarray(event.pixels.squeeze()).save(asked.out / name)
                    parts.append({"image": name})
                elif isinstance(event, Finished):
                    answers[event.draw]["reason"] = event.reason
            steps = [row.drawing.step for row in engine.rows if row.drawing]
            status.update(f"drawing: step {min(steps)}" if steps else "writing")
    output = {"run": str(asked.run), "prompt": list(asked.parts), "seed": asked.seed, "answers": answers}
    (asked.out / "output.json").write_text(json.dumps(output, indent=2, ensure_ascii=False) + "\n")
    for answer in answers:
        shown = [part.get("text") or f"[{asked.out / part['image']}]" for part in answer["parts"]]
        print("" if alone else f"{answer['draw']}: ", *shown, sep="")


def _parse(kind: type, name: str, arguments: list[str], default=tyro.MISSING_NONPROP):
    return tyro.cli(kind, default=default, args=arguments, prog=f"transfusion {name}")


def _named(arguments: list[str]) -> tuple[Run, list[str]]:
    """The run that `train` begins with, by name or from a run.json, and the options that follow."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: transfusion train RUN [options]\n\nRUN is one of {', '.join(NAMES)}, or the path of a run.json.\n"
              "transfusion train RUN --help lists every option with the run's own defaults.")  # fmt: skip
        sys.exit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name in NAMES:
        return named_run(name), rest
    path = Path(name) / "run.json" if Path(name).is_dir() else Path(name)
    if path.suffix != ".json":
        raise UsageError(f"there is no run {name!r}{_nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    from transfusion.disk import read_json

    values = read_json(path)
    return from_json(Run, values.get("run", values)), rest


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size takes width x height, for example 32x32, not {text!r}")
    return int(width), int(height)


def _nearest(word: str, known) -> str:
    found = difflib.get_close_matches(word, known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _print_help() -> None:
    print("usage: transfusion COMMAND ...\n\nOne transformer that reads, writes and draws.\n")
    for verb, what in VERBS.items():
        print(f"  {verb:10}{what}")
    print("\ntransfusion COMMAND --help says more.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(error: Exception, code: int) -> None:
    _say(f"transfusion: {error}")
    sys.exit(code)
