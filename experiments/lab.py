"""What every table is made with: variants of one run, each from several seeds, trained, measured, kept and printed.

A cell is a run's folder, TABLE/VARIANT/seed-N, made by commands that anyone could type, with one file more: measured.json.
The same command again goes on where it stopped. `--variants` and `--seeds` share a table out among processes or machines.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from transfusion.disk import read_json, write_json
from transfusion.inference.engine import Engine, open_run


@dataclass
class Options:
    """Make a table, or go on with it, and print what is there of it."""

    out: Path
    """The folder of the table."""
    variants: tuple[str, ...] = ()
    """Only these; none: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order of the data and all noise."""
    train: tuple[str, ...] = ()
    """Options of `transfusion train` for every cell, after those of the table: --train=--training.steps=20"""
    device: str = "auto"


@dataclass(frozen=True)
class Variant:
    """One row of a table: its name, and what is typed behind `transfusion train` for it."""

    name: str
    arguments: tuple[str, ...]

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


Measure = Callable[[Engine], Mapping[str, float]]


def options(about: str, out: str) -> Options:
    """What was typed behind a table's name."""
    return tyro.cli(Options, default=Options(Path(out)), description=about)


def transfusion(*arguments: str | Path) -> None:
    """Type a command. What it says goes to the screen; when it fails, so does the table, in the command's own line."""
    print("$ transfusion", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "transfusion", *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def fill(asked: Options, variants: Sequence[Variant], measure: Measure) -> None:
    """Train and measure every cell that was asked for and is not there yet."""
    unknown = set(asked.variants) - {variant.name for variant in variants}
    if unknown:
        sys.exit(f"there is no variant {min(unknown)!r}; there are {', '.join(repr(one.name) for one in variants)}")
    for seed in asked.seeds:
        for variant in variants:
            if not asked.variants or variant.name in asked.variants:
                _fill_cell(asked, variant, seed, measure)


def _fill_cell(asked: Options, variant: Variant, seed: int, measure: Measure) -> None:
    folder, arguments = _cell(asked, variant, seed), [*variant.arguments, *asked.train]
    if (folder / "measured.json").exists():
        if read_json(folder / "measured.json").get("arguments", arguments) != arguments:
            sys.exit(f"{folder} was made with other settings: give another --out")
        return
    transfusion("train", *arguments, "--training.seed", str(seed), "--device", asked.device, "--out", folder)
    engine = open_run(folder, device=asked.device)
    if engine.opened.step < engine.run.training.steps:
        sys.exit("stopped: the same command goes on from here")
    write_json(folder / "measured.json", {"arguments": arguments, **measure(engine), **_last_losses(folder)})


def _last_losses(folder: Path) -> dict[str, float]:
    """Held out, at the last step, and the time that training took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (losses,) = [line["heldout"] for line in lines if "heldout" in line][-1].values()
    return {**losses, "minutes": [line["seconds"] for line in lines if "seconds" in line][-1] / 60}


def show(asked: Options, variants: Sequence[Variant], columns: Mapping[str, str]) -> None:
    """Print the table and write it to table.md: per variant and column the mean over its seeds ± their standard deviation.

    `columns`: what is measured -> how it is written, for example {"image_loss": ".3f"}.
    """
    rows = []
    for variant in variants:
        found = measured(asked, variant)
        cells = [_mean([one[name] for one in found], form) for name, form in columns.items()] if found else []
        rows += [[variant.name, str(len(found)), *cells]] if found else []
    table = markdown(["", "seeds", *columns], rows)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.md").write_text(table)
    print(table, end="")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text."""
    lines = [[name.replace("_", " ") for name in head], ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured(asked: Options, variant: Variant) -> list[dict]:
    """What is known of a variant, by seed."""
    cells = (_cell(asked, variant, seed) / "measured.json" for seed in asked.seeds)
    return [read_json(path) for path in cells if path.exists()]


def _cell(asked: Options, variant: Variant, seed: int) -> Path:
    return asked.out / variant.folder / f"seed-{seed}"


def _mean(values: Sequence[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
