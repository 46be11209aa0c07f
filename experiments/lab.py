"""What every table is made with: variants of runs, each from several seeds, trained, measured, kept, printed and judged.

A cell is a run's folder, runs/WHAT/seed-N, made by commands that anyone could type, with one file more: measured.json. WHAT
is the hash of what is typed and of how its data were made, so tables that hold the same variant share its cells. The same
command again goes on where it stopped. `--variants` and `--seeds` share a table out among processes or machines.
"""

import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from scipy import stats

from transfusion.disk import read_json, write_json
from transfusion.inference.engine import Engine, open_run


@dataclass
class Options:
    """Make a table, or go on with it, and print what is there of it."""

    out: Path = Path("runs/lab")
    """The folder of all tables; variants that several of them hold are trained once."""
    variants: tuple[str, ...] = ()
    """Only these; none: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order of the data and all noise."""
    train: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Options of `transfusion train` for every cell, after those of the table: --train=--training.steps=20"""
    scale: Literal["cpu", "gpu"] = "cpu"
    """Networks and steps for two cores, or for one GPU."""
    show: bool = False
    """Train nothing: print what is there."""
    device: str = "auto"


@dataclass(frozen=True)
class Variant:
    """One row of a table: its name, and what is typed behind `transfusion train` for it.

    `data`: the folder of the lab that it reads, if it reads one. `paper`: what the paper's row says, by column.
    """

    name: str
    arguments: tuple[str, ...]
    data: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """What is measured under this name: how it is written, and which is better."""

    form: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows: the first is better than the second, or with a margin worse by no more than that."""

    says: str
    column: str
    first: str
    second: str
    margin: float = 0.0  # share of the second


@dataclass(frozen=True)
class Table:
    """A table of the paper in miniature."""

    name: str
    variants: Sequence[Variant]
    columns: Mapping[str, Column]
    claims: Sequence[Claim] = ()


NOT_RUN = "not run yet"
DOCS = Path(__file__).parent.parent / "docs"

Measure = Callable[[Engine], Mapping[str, float]]


def options(about: str) -> Options:
    """What was typed behind a table's name."""
    return tyro.cli(Options, description=about)


def transfusion(*arguments: str | Path) -> None:
    """Type a command. What it says goes to the screen; when it fails, so does the table, in the command's own line."""
    print("$ transfusion", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "transfusion", *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def make(asked: Options, table: Table, measure: Measure, prepare: Callable[[Options], None] | None = None) -> None:
    """Fill the cells that were asked for, unless it is only to be shown, and print the table. `prepare` makes what all of
    them read, before the first one."""
    if not asked.show:
        check_names(asked, table.variants)
        if prepare is not None:
            prepare(asked)
        fill(asked, table.variants, measure)
    show(asked, table)


def check_names(asked: Options, variants: Sequence[Variant]) -> None:
    """End with a line when a variant was asked for that is none."""
    unknown = set(asked.variants) - {variant.name for variant in variants}
    if unknown:
        sys.exit(f"there is no variant {min(unknown)!r}; there are {', '.join(repr(one.name) for one in variants)}")


def fill(asked: Options, variants: Sequence[Variant], measure: Measure) -> None:
    """Train and measure every cell that was asked for and is not there yet."""
    check_names(asked, variants)
    for seed in asked.seeds:
        for variant in variants:
            if not asked.variants or variant.name in asked.variants:
                _fill_cell(asked, variant, seed, measure)


def _fill_cell(asked: Options, variant: Variant, seed: int, measure: Measure) -> None:
    data = ("--data", asked.out / variant.data) if variant.data else ()
    if not (cell(asked, variant, seed) / "measured.json").exists():
        measure_run(asked, variant, seed, train(asked, variant, seed, (*variant.arguments, *data)), measure)


def train(asked: Options, variant: Variant, seed: int, words: Sequence[str | Path]) -> Path:
    """The folder of a run that these words train, in the cell of its variant."""
    folder = cell(asked, variant, seed)
    transfusion("train", *words, *asked.train, "--training.seed", str(seed), "--device", asked.device, "--out", folder)
    return folder


def measure_run(asked: Options, variant: Variant, seed: int, run: Path, measure: Measure) -> None:
    """Measure a run for the cell of a variant, whose own it need not be."""
    engine = open_run(run, device=asked.device)
    if engine.opened.step < engine.run.training.steps:
        sys.exit("stopped: the same command goes on from here")
    found = {**measure(engine), **_last_losses(run), "parameters": engine.opened.parameters}
    folder = cell(asked, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    typed = [*variant.arguments, *asked.train]
    write_json(folder / "measured.json", {"arguments": typed, **_where(str(engine.device)), **found})


def _last_losses(folder: Path) -> dict[str, float]:
    """Held out, at the last step, of each source or of the only one; positions read, and the time that training took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    heldout = [line["heldout"] for line in lines if "heldout" in line][-1]
    alone = len(heldout) == 1
    losses = {name if alone else f"{source}_{name}": value for source, of in heldout.items() for name, value in of.items()}
    seen = read_json(max((folder / "checkpoints").glob("*/state.json")))["seen"]
    return {**losses, "positions": seen, "minutes": [line["seconds"] for line in lines if "seconds" in line][-1] / 60}


def _where(device: str) -> dict[str, str | int]:
    """With what, and on what, a cell was made."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device}"
    return {"commit": commit or "unknown", "machine": machine, "threads": torch.get_num_threads()}


def show(asked: Options, table: Table) -> None:
    """Print the table and its verdicts, and write them to NAME.md and NAME.json.

    Per variant and column the mean over its seeds ± their standard deviation; below, what the paper has, where it has it.
    """
    rows = []
    for variant in table.variants:
        found = measured(asked, variant)
        cells = [_mean([one[name] for one in found if name in one], of.form) for name, of in table.columns.items()]
        rows += [[variant.name, str(len(found)), *cells]] if found else []
        if found and variant.paper:
            rows += [["*paper*", "", *(str(variant.paper.get(name, "")) for name in table.columns)]]
    text = markdown(["", "seeds", *table.columns], rows)
    judged = [(claim.says, judge(asked, table, claim)) for claim in table.claims]
    verdicts = [f"- {says}: **{verdict}**" for says, verdict in judged if verdict != NOT_RUN]
    if waiting := len(judged) - len(verdicts):
        verdicts.append(f"- {waiting} claim{'s wait' if waiting > 1 else ' waits'} for rows that are not run yet")
    text += "\n" + "\n".join(verdicts) + "\n" if verdicts else ""
    asked.out.mkdir(parents=True, exist_ok=True)
    path(asked, table, ".md").write_text(text)
    kept = {"cells": {variant.name: measured(asked, variant) for variant in table.variants}, "verdicts": verdicts}
    write_json(path(asked, table, ".json"), {"table": table.name, "scale": asked.scale, **kept})
    print(text, end="")


def path(asked: Options, table: Table, ending: str) -> Path:
    """Where a table is written."""
    return asked.out / f"{table.name}{'' if asked.scale == 'cpu' else f'-{asked.scale}'}{ending}"


def judge(asked: Options, table: Table, claim: Claim) -> str:
    """What became of a claim: "holds", "does not hold", or "within noise" where the difference lies in its own 95 % interval
    (Student's t, with the spread of both rows' seeds). With one seed each there is no verdict.
    """
    column = table.columns[claim.column]
    found = {variant.name: values_of(asked, variant, claim.column) for variant in table.variants}
    first, second = found[claim.first], found[claim.second]
    if not first or not second:
        return NOT_RUN

    def shown(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):{column.form}}"

    freedom = len(first) + len(second) - 2
    if not freedom:
        return f"one seed each ({shown(first)} and {shown(second)}): no verdict"
    squares = sum((len(values) - 1) * statistics.variance(values) for values in (first, second) if len(values) > 1)
    error = stats.t.ppf(0.975, freedom) * math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    ahead = statistics.mean(first) - statistics.mean(second)
    ahead = ahead if column.better == "higher" else -ahead
    ahead += claim.margin * abs(statistics.mean(second))
    verdict = "holds" if ahead > error else "does not hold" if ahead < -error else "within noise"
    return f"{verdict} ({shown(first)} and {shown(second)})"


def values_of(asked: Options, variant: Variant, column: str) -> list[float]:
    """What a variant reached in a column, one number per seed."""
    return [one[column] for one in measured(asked, variant) if column in one]


def measured(asked: Options, variant: Variant) -> list[dict]:
    """What is known of a variant, seed by seed."""
    return list(by_seed(asked, variant).values())


def by_seed(asked: Options, variant: Variant) -> dict[int, dict]:
    """What is known of a variant, and from which seeds."""
    cells = {seed: cell(asked, variant, seed) / "measured.json" for seed in asked.seeds}
    return {seed: read_json(path) for seed, path in cells.items() if path.exists()}


def cell(asked: Options, variant: Variant, seed: int) -> Path:
    """The folder of one run of a variant."""
    words = json.dumps([variant.arguments, variant.data, asked.train])
    return asked.out / "runs" / hashlib.sha256(words.encode()).hexdigest()[:12] / f"seed-{seed}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text."""
    lines = [[name.replace("_", " ") for name in head], ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
