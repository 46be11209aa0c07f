"""Shared code of all tables: train variants of runs with several seeds, measure them, print the table and its comparisons.

A cell is the folder of one run, runs/WORDS-CODE/seed-N, made by ordinary `transfusion` commands. It holds one more file,
measured.json. WORDS is the hash of the options and of the recipe of the data, so tables with the same variant share its
cells. CODE is the hash of the code that trains and measures, see `code_hash`. A cell of older code is shown, marked with its
commit, and not made again without `--rerun-stale`. The same command resumes an interrupted table. `--variants` and `--seeds`
split a table among processes or machines.

The cells of the published page are in docs/results, one file for each table: a clone has them without the runs.
"""

import hashlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from experiments.code_hash import check_code, hash_code
from experiments.judge import Evidence, Interval, compare
from experiments.measures import final_losses
from transfusion.cli import runs
from transfusion.cli.screen import UsageError
from transfusion.cli.settings import option_names
from transfusion.config import ModelConfig
from transfusion.disk import read_json, write_json
from transfusion.inference.engine import Engine, open_run
from transfusion.model.transfusion import build_on_meta, count_parameters

Preset = Literal["cpu", "gpu"]
SEEDS = 10, 11, 12, 13, 14  # of the rows of primary claims; other rows have the first three
OLD_SEEDS = 0, 1, 2  # of the cells that were made before the primary claims were fixed


@dataclass
class Options:
    """Train and measure the missing cells of a table, then print the table."""

    out: Path = Path("runs/lab")
    """Folder shared by all tables. Variants that several tables contain are trained once."""
    variants: tuple[str, ...] = ()
    """Train only these variants. Default: all."""
    seeds: tuple[int, ...] = SEEDS[:3]
    """Seeds of the weights, the data order, the noise, and the captions that are drawn. Each seed is one run."""
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
    `start`: the table and the row whose run of the same seed it begins from; without arguments it is that run itself.
    """

    name: str
    arguments: tuple[str, ...]
    data: str = ""
    paper: Mapping[str, float | str] = field(default_factory=dict)
    start: "tuple[Table, Variant] | None" = None

    def describe(self) -> dict[str, Any]:
        """What decides its runs besides their seed, as in a cell."""
        start = self.start and self.start[1].describe()
        return {"arguments": [*self.arguments], "data": self.data} | ({"start": start} if start else {})


@dataclass(frozen=True)
class Column:
    """One measured quantity: its title in the table, its number format, and which direction is better."""

    title: str
    format: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Claim:
    """A statement about two rows: `first` is better than `second`. `primary.CLAIMS` selects the six that are judged.

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
    """A table of the paper at small scale. `measure` makes the values of a cell from its run; `prepare` the data of all, and
    of the runs that they begin from."""

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
COSTS = {
    "parameters": Column("parameters", ",.0f"), "flops": Column("training FLOPs", ".2e"),
    "minutes": Column("minutes", ".1f", "lower"),
}  # of every table  # fmt: skip
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
    # A run that begins from another can be checked only when that one is trained; here the other one is.
    first = [(variant.start[1] if variant.start else variant, seed) for variant, seed in due]
    for variant, seed in {variant.name: (variant, seed) for variant, seed in first}.values():
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
        for seed in options.seeds if variant.arguments else ():
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
    start = ["--from", cell_folder(options, *variant.start, seed)] if variant.start else []
    return [*variant.arguments, *data, *start, *options.train, "--training.seed", str(seed), "--device", options.device]


def train(options: Options, table: Table, variant: Variant, seed: int) -> Path:
    """Train the run of a cell, and before it the one that it begins from; return its folder."""
    if variant.start is not None:
        first = train(options, *variant.start, seed)
        if not variant.arguments:
            return first
    check_code(*table.code(variant))
    folder = cell_folder(options, table, variant, seed)
    run_command("train", *train_arguments(options, variant, seed), "--out", folder)
    return folder


def measure_run(options: Options, table: Table, variant: Variant, seed: int, run: Path) -> None:
    """Measure a run and write the result to the cell of the variant. The run may be in another cell."""
    engine = open_run(run, device=options.device)
    if engine.opened.step < engine.run.training.steps:
        sys.exit("training stopped early; run the same command again to resume it")
    values = {**table.measure(engine), **final_losses(run), "parameters": engine.opened.parameters}
    # As in the paper. For frozen weights it is too many: they have no gradient.
    values["flops"] = 6 * count_used_parameters(engine.run.model) * values["positions"]
    check_code(*table.code(variant))
    folder = cell_folder(options, table, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = {"seed": seed, **replace(variant, arguments=(*variant.arguments, *options.train)).describe()}
    cell = words | {"code": hash_code(*table.code(variant))}
    write_json(folder / MEASURED, cell | describe_machine(str(engine.device)) | values)


def count_used_parameters(model: ModelConfig) -> int:
    """The parameters that a position uses: of untied weights, those of one side."""
    return count_parameters(build_on_meta(replace(model, untied="none")))


def describe_machine(device: str) -> dict[str, str | int]:
    """Commit, machine and number of threads of a cell."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device}"
    return {"commit": describe_commit(DOCS.parent), "machine": machine, "threads": torch.get_num_threads()}


def describe_commit(repository: Path) -> str:
    """Its short hash, with "+changes" if the code differs from it. The docs may: a table writes its cells there."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True).stdout.strip()

    changes = "+changes" * bool(git("status", "--porcelain", "--", "transfusion", "experiments"))
    return f"{git('log', '-1', '--format=%h') or 'unknown'}{changes}"


def show_table(options: Options, table: Table) -> None:
    """Print the table and its comparisons, and write them to NAME.md and the cells to NAME.json.

    Each cell shows the mean over seeds ± the standard deviation. The next row shows the paper's figures, if there are any.
    The number of seeds is followed by the commits of the cells of older code.
    """
    rows, marks = [], []
    for variant in table.variants:
        cells = read_cells(options, table, variant).values()
        means = [_format_mean([cell[name] for cell in cells if name in cell], column.format)
                 for name, column in table.columns.items()]  # fmt: skip
        costs = [f"{statistics.mean(cell[name] for cell in cells):{column.format}}" if cells else ""
                 for name, column in COSTS.items()]  # fmt: skip
        marks.append(mark_stale(table, variant, cells))
        rows += [[variant.name, f"{len(cells)}{marks[-1]}", *means, *costs]] if cells else []
        if cells and variant.paper:
            rows += [["*paper*", "", *(str(variant.paper.get(name, "")) for name in (*table.columns, *COSTS))]]
    text = format_markdown(["", "seeds", *(column.title for column in (*table.columns.values(), *COSTS.values()))], rows)
    if any(marks):
        text += f"\n{STALE}\n"
    lines = [[claim.text, *it] for claim in table.claims if (it := describe_claim(options, table, claim)) is not None]
    if lines:
        text += "\n" + format_markdown(["expected", "means", "advantage, 95 % interval"], lines)
    if num_missing := len(table.claims) - len(lines):
        text += f"\n{num_missing} comparison{'s' * (num_missing > 1)} without a figure: rows not run yet\n"
    options.out.mkdir(parents=True, exist_ok=True)
    table_path(options, table, ".md").write_text(text, encoding="utf-8")
    save_cells(options, table, options.out)
    print(text, end="")


def describe_claim(options: Options, table: Table, claim: Claim) -> tuple[str, str] | None:
    """The means of both rows ("" if they are of different code) and the advantage of the first with its interval over seeds;
    None if a row is not run yet."""
    rows, column = _claim_cells(options, table, claim), table.columns[claim.column]
    if not all(rows):
        return None
    if _count_codes(rows) > 1:  # which may have measured them differently
        return "", "runs of different code: not compared"
    means = " and ".join(f"{statistics.mean(cell[claim.column] for cell in row.values()):{column.format}}" for row in rows)
    evidence = compare_rows(options, table, claim)
    if evidence is None:
        return means, "one seed: no interval"
    return means, format_interval(evidence.seeds, column)


def compare_rows(options: Options, table: Table, claim: Claim) -> Evidence | None:
    """The evidence of all seeds of both rows. None if a row has fewer than two, or if the cells are not of one code, which
    may have measured them differently."""
    rows = _claim_cells(options, table, claim)
    if min(map(len, rows)) < 2 or _count_codes(rows) > 1:
        return None
    values, counts = ([[cell[name] for cell in row.values() if name in cell] for row in rows]
                      for name in (claim.column, f"{claim.column}_by_caption"))  # fmt: skip
    return compare(*values, table.columns[claim.column].better, claim.margin, *counts)


def is_old(cells: Mapping[int, dict]) -> bool:
    """True if all cells of a row are of OLD_SEEDS."""
    return cells.keys() <= {*OLD_SEEDS}


def _count_codes(rows: Sequence[Mapping[int, dict]]) -> int:
    """The number of hashes of code among these cells; the oldest cells have none, which counts as one."""
    return len({cell.get("code") for row in rows for cell in row.values()})


def _claim_cells(options: Options, table: Table, claim: Claim) -> list[dict[int, dict]]:
    """The cells of both rows by seed."""
    by_name = {variant.name: variant for variant in table.variants}
    cells = [read_cells(options, table, by_name[name]) for name in (claim.first, claim.second)]
    return [{seed: cell for seed, cell in row.items() if claim.column in cell} for row in cells]


def format_interval(interval: Interval, column: Column) -> str:
    """As in "+0.064 [+0.040, +0.088]"; shares in percentage points."""
    is_share = column.format.endswith("%")
    values = [100 * value if is_share else value for value in (interval.estimate, interval.low, interval.high)]
    estimate, low, high = (f"{value:+{column.format.replace('%', 'f')}}" for value in values)
    return f"{estimate} [{low}, {high}]{' points' * is_share}"


def save_cells(options: Options, table: Table, folder: Path) -> None:
    """Write all cells of a table that it shows to one file of this folder."""
    cells = {variant.name: [*read_cells(options, table, variant).values()] for variant in table.variants}
    contents = {"table": table.name, "preset": options.preset, "cells": cells}
    write_json(folder / table_path(options, table, ".json").name, contents)


def restore_cells(options: Options, table: Table) -> None:
    """Write the cells of docs/results to the lab's folder where it has none, so that they are shown, and not made again. Not
    those with other settings than the table's."""
    path = DOCS / "results" / table_path(options, table, ".json").name
    contents = read_json(path)["cells"] if path.exists() and not options.train else {}
    for variant in table.variants:
        for cell in contents.get(variant.name, []):
            words = variant.describe()
            is_same = words == {name: cell[name] for name in ("arguments", "data", "start") if name in cell}
            if is_same and find_cell(options, table, variant, cell["seed"]) is None:
                name = "-".join([_hash_words(options, variant), *([cell["code"]] if "code" in cell else [])])
                folder = options.out / "runs" / name / f"seed-{cell['seed']}"
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / MEASURED, cell)


def mark_stale(table: Table, variant: Variant, cells: Iterable[Mapping[str, Any]]) -> str:
    """The commits of the cells of older code, as in " (2 of abc1234, 1 of def5678)"; "" if there are none."""
    commits = Counter(cell["commit"] for cell in cells if cell.get("code") != hash_code(*table.code(variant)))
    return f" ({', '.join(f'{count} of {commit}' for commit, count in commits.items())})" if commits else ""


def table_path(options: Options, table: Table, suffix: str) -> Path:
    """The file that a table is written to."""
    return options.out / f"{table.name}{'' if options.preset == 'cpu' else f'-{options.preset}'}{suffix}"


def read_cells(options: Options, table: Table, variant: Variant) -> dict[int, dict]:
    """The measured values of a variant by seed, those of older code included. If there are none, those of OLD_SEEDS."""
    for seeds in (options.seeds, OLD_SEEDS):
        folders = {seed: find_cell(options, table, variant, seed) for seed in seeds}
        if cells := {seed: read_json(folder / MEASURED) for seed, folder in folders.items() if folder is not None}:
            return cells
    return {}


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
    start = [_hash_words(options, variant.start[1])] if variant.start else []
    key = json.dumps([variant.arguments, variant.data, options.train, *start])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def format_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def _format_mean(values: Sequence[float], number_format: str) -> str:
    if not values:
        return ""
    std = f" ± {statistics.stdev(values):{number_format}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{number_format}}{std}"
