"""transfusion evaluate: measure a run, or measure again what was measured and see whether it agrees."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.screen import Device, UsageError, check_there, parse, say
from transfusion.config import QUICK, TASKS, EvaluationConfig, GenerationConfig
from transfusion.disk import check_prepared, check_run, read_json

WANTED = f"What to measure; without it what the run supports of {', '.join(QUICK)}. " + " ".join(
    f"{name}: {what}." for name, what in TASKS.items()
)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run; the figures go to the screen and to its results.json."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder."""
    tasks: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TASK...", help=WANTED)] = None
    again: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A results.json: measure what it holds once more, as it says, and tell whether the figures agree."""
    data: tuple[str, ...] | None = None
    """Prepared data to measure on, if not the run's own (where those lie now, or others prepared --like it)."""
    count: int = 200
    """Held-out documents of each source that are captioned, drawn and read."""
    seed: int = 0
    sampler: str | None = None
    """Of drawings; without these three the run's own."""
    steps: int | None = None
    guidance_scale: float | None = None
    features: str | None = None
    """Of images and coco-images: Inception's weights (a .safetensors or .pth file), or a vision model of transformers (a
    folder, or owner/name); without it a small network is trained on the run's data: no published FID."""
    clip: str | None = None
    """Of clip, coco-images and geneval: a CLIP model, a folder or owner/name."""
    detector: str | None = None
    """Of geneval: a model of transformers that segments instances of COCO's 80 kinds, a folder or owner/name; with --clip,
    which tells colours. Published figures: Mask2Former with Swin-S, CLIP ViT-L/14."""
    prompts: str | None = None
    """Of geneval with --detector: a file like GenEval's evaluation_metadata.jsonl, instead of its 553 prompts."""
    questions: str | None = None
    """Of the task choice: a file of JSON lines, {"context": ..., "choices": [...], "answer": 0}; without it, how held-out
    texts go on."""
    coco: str | None = None
    """Of coco and coco-images: Karpathy's dataset_coco.json (its test split; all: --count 5000), or COCO's annotations."""
    pictures: str | None = None
    """Of coco and coco-images: the folder from which its paths count, if not that of the file."""
    device: Device = "auto"


def evaluate(arguments: list[str]) -> None:
    """Measure a run, or do so again."""
    asked = parse(Evaluate, "evaluate", arguments)
    if asked.run is None and asked.again is None:
        raise UsageError("name a run's folder, or --from the results.json of one")
    if asked.again is not None:
        if replace(asked, run=None, again=None, data=None, device="auto") != Evaluate():
            raise UsageError("--from says what is measured and how: name nothing else but the run, --data and --device")
        read_json(asked.again)
        check_run(asked.run or asked.again.parent)
        _check_data(asked.data)
        return _again(asked.run or asked.again.parent, asked.again, asked.data, asked.device)
    try:
        config = EvaluationConfig(**{f.name: getattr(asked, f.name) for f in fields(EvaluationConfig)})
        names = ("sampler", "steps", "guidance_scale")
        GenerationConfig(**{name: getattr(asked, name) for name in names if getattr(asked, name) is not None})
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_there(asked.questions, asked.prompts, asked.coco, asked.pictures)
    _check_data(asked.data)
    measure(check_run(asked.run), config, asked.device)


def _check_data(folders: tuple[str, ...] | None) -> None:
    for folder in folders or ():
        check_prepared(Path(folder))


def measure(folder: Path, asked: EvaluationConfig, device: str) -> None:
    """Measure a run into its results.json."""
    from transfusion.evaluation.results import NAME, evaluate
    from transfusion.inference.engine import open_run

    evaluate(open_run(folder, device=device), folder, asked, say)
    say(f"wrote {folder / NAME}")


def _again(folder: Path, path: Path, data: tuple[str, ...] | None, device: str) -> None:
    """Figure by figure; exit code 1 when one differs."""
    from transfusion.evaluation.results import repeat
    from transfusion.inference.engine import open_run

    found, why = repeat(open_run(folder, device=device), folder, path, data, say)
    say(f"{path}: " + ("all figures agree" if not found else f"{len(found)} figures differ"))
    for line in found:
        say(f"  {line}")
    for line in why if found else ():
        say(f"  not as it was: {line}")
    if found:
        sys.exit(1)
