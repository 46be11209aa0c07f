"""Shared code of all tables: train variants of runs with several seeds, measure them, print the table and its verdicts.

A cell is the folder of one run, runs/WORDS-CODE/seed-N, made by ordinary `transfusion` commands. It holds one more file,
measured.json. WORDS is the hash of the options and of the recipe of the data, so tables with the same variant share its
cells. CODE is the hash of the code that trains and measures, see `code_hash`. A cell of older code is shown, marked with its
commit, and not made again without `--rerun-stale`. The same command resumes an interrupted table. `--variants` and `--seeds`
split a table among processes or machines.
"""

import hashlib
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from scipy import stats

from experiments.code_hash import check_code, hash_code
from experiments.measures import final_losses
from transfusion.cli import runs
from transfusion.cli.screen import UsageError
from transfusion.cli.settings import option_names
from transfusion.disk import read_json, write_json
from transfusion.inference.engine import Engine, open_run

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
    rerun_stale: bool = False
    """Train the cells of older code again. Without it they are shown, marked with their commit."""
    device: str = "auto"
    """Device for training and measuring: auto, cpu, cuda or mps."""


@dataclass(frozen=True)
class Variant:
    """One row of a table: its name, and its arguments to `transfusion train`.

    `data`: the name of its prepared data, if any, see `data_folder`. `paper`: the paper's figures for this row, by column.
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


Measure = Callable[[Engine], Mapping[str, float]]


@dataclass(frozen=True)
class Table:
    """A table of the paper at small scale. `measure` makes the values of a cell from its run; `prepare` the data of all."""

    name: str
    variants: Sequence[Variant]
    columns: Mapping[str, Column]
    measure: Measure
    claims: Sequence[Claim] = ()
    prepare: Callable[[Options], None] | None = None

    def code(self, variant: Variant) -> tuple[str, ...]:
        """The modules that train a variant, measure it, and prepare its data."""
        measure = getattr(self.measure, "func", self.measure)  # without its first argument, the level of `shapes`
        measures = (sys.modules[function.__module__].__spec__.name for function in (final_losses, measure))
        return "transfusion.cli.runs", *measures, *([PREPARING] if variant.data else [])


PREPARING = "transfusion.cli.data"  # the module of `data prepare` and `data fit-codec`
MEASURED = "measured.json"
STALE = (
    "“(N of COMMIT)”: N of the seeds are of that commit, and the code that trains or measures has changed since. "
    "`--rerun-stale` trains them again."
)
NOT_RUN = "not run yet"
DOCS = Path(__file__).parent.parent / "docs"


def parse_options(description: str) -> Options:
    """The options on the command line of a table."""
    return tyro.cli(Options, description=description)


def run_command(*arguments: str | Path) -> None:
    """Run a `transfusion` command with its output on the terminal. If it fails, exit with its exit code."""
    print("$ transfusion", *arguments, flush=True)
    process = subprocess.run([sys.executable, "-m", "transfusion", *map(str, arguments)])
    if process.returncode:
        sys.exit(process.returncode)


def run_table(options: Options, table: Table) -> None:
    """Fill the selected cells (not with --show) and print the table."""
    if not options.show:
        fill_cells(options, table)
    show_table(options, table)


def fill_cells(options: Options, table: Table) -> None:
    """Train and measure every selected cell that is due. Nothing is trained before the whole table has been checked."""
    check_table(options, table)
    due = list(cells_due(options, table))
    if due and table.prepare is not None:
        table.prepare(options)
    for variant, seed in {variant.name: (variant, seed) for variant, seed in due}.values():
        check_cell(options, table, variant, seed, "--dry-run")
    for variant, seed in due:
        measure_run(options, table, variant, seed, train(options, table, variant, seed))


def check_table(options: Options, table: Table) -> None:
    """Exit with one line if a name, a seed or an option of the table is wrong."""
    names = [variant.name for variant in table.variants]
    for kind, values in (("variant", names), ("seed", options.seeds)):
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            sys.exit(f"{table.name}: {kind} {repeated[0]!r} is given twice; give each {kind} once")
    if unknown := set(options.variants) - {*names}:
        sys.exit(f"--variants: unknown variant {min(unknown)!r}; use {', '.join(map(repr, names))}")
    for claim in table.claims:
        for kind, name, known in (("variant", claim.first, names), ("variant", claim.second, names),
                                  ("column", claim.column, table.columns)):  # fmt: skip
            if name not in known:
                sys.exit(f"{table.name}: claim {claim.text!r}: unknown {kind} {name!r}; use {', '.join(map(repr, known))}")
    for variant in table.variants:
        if given := option_names([*variant.arguments, *options.train]) & {"--training.seed", "--device", "--out"}:
            use = "use --seeds, --device or --out"
            sys.exit(f"{table.name}: variant {variant.name!r}: {min(given)} is set for each cell; {use}")
        for seed in options.seeds:
            check_cell(options, table, variant, seed, "--print-config")


def check_cell(options: Options, table: Table, variant: Variant, seed: int, *more: str | Path) -> None:
    """Exit with one line if `transfusion train` refuses the arguments of a cell and `more`: `--print-config` checks all
    settings, `--dry-run` takes a step of a small copy on the data."""
    try:
        with redirect_stdout(io.StringIO()):
            runs.train([*map(str, (*train_arguments(options, variant, seed), *more))])
    except (UsageError, ValueError, OSError) as error:
        sys.exit(f"{table.name}: variant {variant.name!r}: {error}")


def cells_due(options: Options, table: Table) -> Iterator[tuple[Variant, int]]:
    """The selected cells that are to be made: the missing ones, and with --rerun-stale those of older code."""
    for seed in options.seeds:
        for variant in table.variants:
            if options.variants and variant.name not in options.variants:
                continue
            folder = find_cell(options, table, variant, seed)
            is_stale = folder != cell_folder(options, table, variant, seed)
            if folder is None or (is_stale and options.rerun_stale):
                yield variant, seed


def train_arguments(options: Options, variant: Variant, seed: int) -> list[str | Path]:
    """The arguments of `transfusion train` for a cell, without its folder."""
    data = ["--data", data_folder(options, variant.data)] if variant.data else []
    return [*variant.arguments, *data, *options.train, "--training.seed", str(seed), "--device", options.device]


def train(options: Options, table: Table, variant: Variant, seed: int, *more: str | Path) -> Path:
    """Train the run of a cell, with `more` arguments; return its folder."""
    check_code(*table.code(variant))
    folder = cell_folder(options, table, variant, seed)
    run_command("train", *train_arguments(options, variant, seed), *more, "--out", folder)
    return folder


def measure_run(options: Options, table: Table, variant: Variant, seed: int, run: Path) -> None:
    """Measure a run and write the result to the cell of the variant. The run may be in another cell."""
    engine = open_run(run, device=options.device)
    if engine.opened.step < engine.run.training.steps:
        sys.exit("training stopped early; run the same command again to resume it")
    values = {**table.measure(engine), **final_losses(run), "parameters": engine.opened.parameters}
    check_code(*table.code(variant))
    folder = cell_folder(options, table, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    cell = {"arguments": [*variant.arguments, *options.train], "code": hash_code(*table.code(variant))}
    write_json(folder / MEASURED, cell | _describe_machine(str(engine.device)) | values)


def _describe_machine(device: str) -> dict[str, str | int]:
    """Commit, machine and number of threads of a cell."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+changes"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device}"
    return {"commit": commit or "unknown", "machine": machine, "threads": torch.get_num_threads()}


def show_table(options: Options, table: Table) -> None:
    """Print the table and its verdicts, and write them to NAME.md and NAME.json.

    Each cell shows the mean over seeds ± the standard deviation. The next row shows the paper's figures, if there are any.
    The number of seeds is followed by the commits of the cells of older code.
    """
    rows, marks = [], []
    for variant in table.variants:
        cells = read_cells(options, table, variant).values()
        means = [
            _format_mean([cell[name] for cell in cells if name in cell], column.format)
            for name, column in table.columns.items()
        ]
        marks.append(mark_stale(table, variant, cells))
        rows += [[variant.name, f"{len(cells)}{marks[-1]}", *means]] if cells else []
        if cells and variant.paper:
            rows += [["*paper*", "", *(str(variant.paper.get(name, "")) for name in table.columns)]]
    text = format_markdown(["", "seeds", *(column.title for column in table.columns.values())], rows)
    if any(marks):
        text += f"\n{STALE}\n"
    judged = [(claim.text, judge_claim(options, table, claim)) for claim in table.claims]
    verdicts = [f"- {claim}: **{verdict}**" for claim, verdict in judged if verdict != NOT_RUN]
    if num_missing := len(judged) - len(verdicts):
        verdicts.append(f"- {num_missing} claim{'s' * (num_missing > 1)} without a verdict: rows not run yet")
    text += "\n" + "\n".join(verdicts) + "\n" if verdicts else ""
    options.out.mkdir(parents=True, exist_ok=True)
    table_path(options, table, ".md").write_text(text, encoding="utf-8")
    cells = {variant.name: [*read_cells(options, table, variant).values()] for variant in table.variants}
    contents = {"table": table.name, "preset": options.preset, "cells": cells, "verdicts": verdicts}
    write_json(table_path(options, table, ".json"), contents)
    print(text, end="")


def mark_stale(table: Table, variant: Variant, cells: Iterable[Mapping[str, Any]]) -> str:
    """The commits of the cells of older code, as in " (2 of abc1234, 1 of def5678)"; "" if there are none."""
    commits = Counter(cell["commit"] for cell in cells if cell.get("code") != hash_code(*table.code(variant)))
    return f" ({', '.join(f'{count} of {commit}' for commit, count in commits.items())})" if commits else ""


def table_path(options: Options, table: Table, suffix: str) -> Path:
    """The file that a table is written to."""
    return options.out / f"{table.name}{'' if options.preset == 'cpu' else f'-{options.preset}'}{suffix}"


def judge_claim(options: Options, table: Table, claim: Claim) -> str:
    """The verdict on a claim, from a two-sided 95 % t-test over seeds with pooled variance.

    "holds" and "does not hold" are significant differences; "not shown" is neither. One seed per row gives no verdict.
    """
    column = table.columns[claim.column]
    by_name = {variant.name: read_cells(options, table, variant).values() for variant in table.variants}
    first, second = ([cell[claim.column] for cell in by_name[name] if claim.column in cell]
                     for name in (claim.first, claim.second))  # fmt: skip
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


def read_cells(options: Options, table: Table, variant: Variant) -> dict[int, dict]:
    """The measured values of a variant by seed, those of older code included."""
    folders = {seed: find_cell(options, table, variant, seed) for seed in options.seeds}
    return {seed: read_json(folder / MEASURED) for seed, folder in folders.items() if folder is not None}


def find_cell(options: Options, table: Table, variant: Variant, seed: int) -> Path | None:
    """The folder of a measured cell: of this code, or else the newest of older code. None if there is none."""
    current = cell_folder(options, table, variant, seed)
    folders = [path.parent for path in options.out.glob(f"runs/{_hash_words(options, variant)}*/seed-{seed}/{MEASURED}")]
    return max(folders, key=lambda path: (path == current, (path / MEASURED).stat().st_mtime), default=None)


def cell_folder(options: Options, table: Table, variant: Variant, seed: int) -> Path:
    """The folder of one run of a variant, of this code."""
    return options.out / "runs" / f"{_hash_words(options, variant)}-{hash_code(*table.code(variant))}" / f"seed-{seed}"


def data_folder(options: Options, name: str) -> Path:
    """The folder of prepared data or of a codec that tables share, of this code."""
    return options.out / f"{name}-{hash_code(PREPARING)}"


def _hash_words(options: Options, variant: Variant) -> str:
    key = json.dumps([variant.arguments, variant.data, options.train])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def format_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def _format_mean(values: Sequence[float], number_format: str) -> str:
    if not values:
        return ""
    std = f" ± {statistics.stdev(values):{number_format}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{number_format}}{std}"
