"""Make all runs of docs/results.md that are missing: those of the primary claims first, in their order, then one, two and
three seeds of the other rows.

    python -m experiments.tables

Every cell is written to docs/results as soon as it is measured, to be committed; the page is written at the end. The same
command resumes after Ctrl-C, also in another clone: cells in docs/results are not made again. The runs of a claim must be of
one code, so let it not change meanwhile, or make them again with `--rerun-stale`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from experiments import lab, results
from experiments.lab import DOCS, SEEDS, Preset, Table, Variant
from experiments.primary import CLAIMS, find_rows


@dataclass
class Options:
    """Make all missing runs of the page, the primary claims first."""

    out: Path = Path("runs/lab")
    """Folder shared by all tables."""
    preset: Preset = "cpu"
    """Model sizes and training steps for two CPU cores (cpu) or for one GPU (gpu)."""
    only_claims: bool = False
    """Only the runs of the primary claims."""
    rerun_stale: bool = False
    """Train the cells of older code again, except those of seeds 0 to 2."""
    device: str = "auto"
    """Device for training and measuring: auto, cpu, cuda or mps."""


def list_cells(options: Options) -> Iterator[tuple[Table, Variant, int]]:
    """All cells of the page in the order in which they are made. Cells that tables share are repeated."""
    for primary in CLAIMS:
        table, claim = primary.find(options.preset)
        yield from ((table, row, seed) for seed in SEEDS for row in find_rows(table, claim))
    if not options.only_claims:
        for seed in lab.Options().seeds:
            for module in results.TABLES:
                table = module.build_table(options.preset)
                yield from ((table, row, seed) for row in table.variants)


def main(options: Options) -> None:
    common = lab.Options(options.out, preset=options.preset, rerun_stale=options.rerun_stale, device=options.device)
    for module in results.TABLES:
        lab.restore_cells(common, module.build_table(options.preset))
    (DOCS / "results").mkdir(exist_ok=True)
    for table, row, seed in list_cells(options):
        selected = replace(common, variants=(row.name,), seeds=(seed,))
        if [*lab.cells_due(selected, table)]:
            lab.fill_cells(selected, table)
            lab.save_cells(replace(common, seeds=SEEDS), table, DOCS / "results")
    print(f"wrote {results.write_page(common)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
