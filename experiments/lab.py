"""Shared code of all tables: train variants of runs with several seeds, measure them, print the table and its verdicts.

A cell is the folder of one run, runs/KEY/seed-N, made by ordinary `transfusion` commands. It holds one more file,
measured.json. KEY is the hash of the options and of the recipe of the data, so tables with the same variant share its cells.
The same command resumes an interrupted table. `--variants` and `--seeds` split a table among processes or machines.
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
from transfusion.report.record import Record

Preset = Literal["cpu", "gpu"]


@dataclass
class Options:
    """Train and measure the missing cells of a table, then print the table."""

    out: Path = Path("runs/lab")
    """Folder shared by all tables. Variants that several tables contain are trained once."""
    variants: tuple[str, ...] = ()
    """Train only these variants. Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights, the data order and the noise. Each seed is one run."""
    train: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Further options of `transfusion train` for every cell: --train=--training.steps=20"""
    preset: Preset = "cpu"
    """Model sizes and training steps for two CPU cores (cpu) or for one GPU (gpu)."""
    show: bool = False
    """Print the cells that exist. Train nothing."""
    device: str = "auto"
    """Device for training and measuring: auto, cpu, cuda or mps."""


@dataclass(frozen=True)
class Variant:
    """One row of a table: its name, and its arguments to `transfusion train`.

    `data`: the folder of prepared data inside `Options.out`, if any. `paper`: the paper's figures for this row, by column.
    """

    name: str
    arguments: tuple[str, ...]
    data: str = ""
    paper: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One measured quantity: its title in the table, its number format, and which direction is better."""

    title: str
    format: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about two rows: `first` is better than `second`.

    With a margin the claim is non-inferiority: `first` is worse by less than that share of `second`.
    """

    text: str
    column: str
    first: str
    second: str
    margin: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table of the paper at small scale."""

    name: str
    variants: Sequence[Variant]
    columns: Mapping[str, Column]
    claims: Sequence[Claim] = ()


NOT_RUN = "not run yet"
DOCS = Path(__file__).parent.parent / "docs"

Measure = Callable[[Engine], Mapping[str, float]]


def parse_options(description: str) -> Options:
    """The options on the command line of a table."""
    return tyro.cli(Options, description=description)


def run_command(*arguments: str | Path) -> None:
    """Run a `transfusion` command with its output on the terminal. If it fails, exit with its exit code."""
    print("$ transfusion", *arguments, flush=True)
    process = subprocess.run([sys.executable, "-m", "transfusion", *map(str, arguments)])
    if process.returncode:
        sys.exit(process.returncode)


def run_table(
    options: Options, table: Table, measure: Measure, prepare: Callable[[Options], None] | None = None
) -> None:
    """Fill the selected cells (not with --show) and print the table. `prepare` makes the data that all cells share."""
    if not options.show:
        check_names(options, table.variants)
        if prepare is not None:
            prepare(options)
        fill_cells(options, table.variants, measure)
    show_table(options, table)


def check_names(options: Options, variants: Sequence[Variant]) -> None:
    """Exit with one line if `--variants` contains an unknown name."""
    unknown = set(options.variants) - {variant.name for variant in variants}
    if unknown:
        names = ", ".join(repr(variant.name) for variant in variants)
        sys.exit(f"--variants: unknown variant {min(unknown)!r}; use {names}")


def fill_cells(options: Options, variants: Sequence[Variant], measure: Measure) -> None:
    """Train and measure every selected cell that is missing."""
    check_names(options, variants)
    for seed in options.seeds:
        for variant in variants:
            if not options.variants or variant.name in options.variants:
                _fill_cell(options, variant, seed, measure)


def _fill_cell(options: Options, variant: Variant, seed: int, measure: Measure) -> None:
    data = ("--data", options.out / variant.data) if variant.data else ()
    if not (cell_folder(options, variant, seed) / "measured.json").exists():
        measure_run(options, variant, seed, train(options, variant, seed, (*variant.arguments, *data)), measure)


def train(options: Options, variant: Variant, seed: int, arguments: Sequence[str | Path]) -> Path:
    """Train a run with these arguments in the cell of the variant; return its folder."""
    folder = cell_folder(options, variant, seed)
    seed_and_device = "--training.seed", str(seed), "--device", options.device
    run_command("train", *arguments, *options.train, *seed_and_device, "--out", folder)
    return folder


def measure_run(options: Options, variant: Variant, seed: int, run: Path, measure: Measure) -> None:
    """Measure a run and write the result to the cell of the variant. The run may be in another cell."""
    engine = open_run(run, device=options.device)
    if engine.opened.step < engine.run.training.steps:
        sys.exit("training stopped early; run the same command again to resume it")
    values = {**measure(engine), **_read_final_losses(run), "parameters": engine.opened.parameters}
    folder = cell_folder(options, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*variant.arguments, *options.train]
    write_json(folder / "measured.json", {"arguments": arguments, **_describe_machine(str(engine.device)), **values})


def _read_final_losses(folder: Path) -> dict[str, float]:
    """Held-out losses and velocity error at the last step, trained positions, and training time in minutes.

    With several sources the name of each figure starts with its source.
    """
    record = Record.read(folder)
    heldout = {(metric, source): values[-1] for metric in ("text_loss", "image_loss", "velocity_error")
               for source, (_, values) in record.heldout(metric).items()}  # fmt: skip
    sources = {source for _, source in heldout}
    losses = {name if len(sources) == 1 else f"{source}_{name}": value for (name, source), value in heldout.items()}
    positions = read_json(max((folder / "checkpoints").glob("*/state.json")))["num_seen"]
    return {**losses, "positions": positions, "minutes": record.trained[-1]["seconds"] / 60}


def _describe_machine(device: str) -> dict[str, str | int]:
    """Commit, machine and number of threads of a cell."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device}"
    return {"commit": commit or "unknown", "machine": machine, "threads": torch.get_num_threads()}


def show_table(options: Options, table: Table) -> None:
    """Print the table and its verdicts, and write them to NAME.md and NAME.json.

    Each cell shows the mean over seeds ± the standard deviation. The next row shows the paper's figures, if there are any.
    """
    rows = []
    for variant in table.variants:
        cells = read_cells(options, variant)
        means = [
            _format_mean([cell[name] for cell in cells if name in cell], column.format)
            for name, column in table.columns.items()
        ]
        rows += [[variant.name, str(len(cells)), *means]] if cells else []
        if cells and variant.paper:
            rows += [["*paper*", "", *(str(variant.paper.get(name, "")) for name in table.columns)]]
    text = format_markdown(["", "seeds", *(column.title for column in table.columns.values())], rows)
    judged = [(claim.text, judge_claim(options, table, claim)) for claim in table.claims]
    verdicts = [f"- {claim}: **{verdict}**" for claim, verdict in judged if verdict != NOT_RUN]
    if num_missing := len(judged) - len(verdicts):
        verdicts.append(f"- {num_missing} claim{'s' * (num_missing > 1)} without a verdict: rows not run yet")
    text += "\n" + "\n".join(verdicts) + "\n" if verdicts else ""
    options.out.mkdir(parents=True, exist_ok=True)
    table_path(options, table, ".md").write_text(text, encoding="utf-8")
    contents = {"cells": {variant.name: read_cells(options, variant) for variant in table.variants}, "verdicts": verdicts}
    write_json(table_path(options, table, ".json"), {"table": table.name, "preset": options.preset, **contents})
    print(text, end="")


def table_path(options: Options, table: Table, suffix: str) -> Path:
    """The file that a table is written to."""
    return options.out / f"{table.name}{'' if options.preset == 'cpu' else f'-{options.preset}'}{suffix}"


def judge_claim(options: Options, table: Table, claim: Claim) -> str:
    """The verdict on a claim, from a two-sided 95 % t-test over seeds with pooled variance.

    "holds" and "does not hold" are significant differences; "not shown" is neither. One seed per row gives no verdict.
    """
    column = table.columns[claim.column]
    by_name = {variant.name: column_values(options, variant, claim.column) for variant in table.variants}
    first, second = by_name[claim.first], by_name[claim.second]
    if not first or not second:
        return NOT_RUN
    mean_first, mean_second = statistics.mean(first), statistics.mean(second)
    means = f"{mean_first:{column.format}} and {mean_second:{column.format}}"
    degrees = len(first) + len(second) - 2
    if not degrees:
        return f"one seed each ({means}): no verdict"
    squares = sum((len(values) - 1) * statistics.variance(values) for values in (first, second) if len(values) > 1)
    half_width = stats.t.ppf(0.975, degrees) * math.sqrt(squares / degrees * (1 / len(first) + 1 / len(second)))
    advantage = mean_first - mean_second
    advantage = advantage if column.better == "higher" else -advantage
    advantage += claim.margin * abs(mean_second)
    verdict = "holds" if advantage > half_width else "does not hold" if advantage < -half_width else "not shown"
    return f"{verdict} ({means})"


def column_values(options: Options, variant: Variant, column: str) -> list[float]:
    """The values of a variant in one column, one per seed."""
    return [cell[column] for cell in read_cells(options, variant) if column in cell]


def read_cells(options: Options, variant: Variant) -> list[dict]:
    """The measured values of a variant, one dict per seed."""
    return list(read_cells_by_seed(options, variant).values())


def read_cells_by_seed(options: Options, variant: Variant) -> dict[int, dict]:
    """The measured values of a variant by seed."""
    paths = {seed: cell_folder(options, variant, seed) / "measured.json" for seed in options.seeds}
    return {seed: read_json(path) for seed, path in paths.items() if path.exists()}


def cell_folder(options: Options, variant: Variant, seed: int) -> Path:
    """The folder of one run of a variant."""
    key = json.dumps([variant.arguments, variant.data, options.train])
    return options.out / "runs" / hashlib.sha256(key.encode()).hexdigest()[:12] / f"seed-{seed}"


def format_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def _format_mean(values: Sequence[float], number_format: str) -> str:
    if not values:
        return ""
    std = f" ± {statistics.stdev(values):{number_format}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{number_format}}{std}"
