"""Write one page with every table that has cells: the claims, the commands, the figures and the verdicts.

    python -m experiments.results

writes docs/results.md (--preset gpu: results-gpu.md), its figures, and docs/results/TABLE.json with all figures of each
cell. Cells that docs/results has need not be in the lab's folder: in a clone the command writes the same page.
"""

import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from experiments import (
    attention,
    continuous,
    copies,
    drawings,
    editing,
    lab,
    multimodal,
    noise,
    patches,
    positions,
    scaling,
    text,
    towers,
)
from experiments.emoji import families
from experiments.judge import OPEN, Evidence
from experiments.lab import DOCS, SEEDS, Options, Preset
from experiments.primary import CLAIMS, Primary, count_cells, find_rows, judge_claims
from experiments.scenes import PRESETS
from transfusion.disk import read_json, write_json

# The last needs npm packages, without which the tables before it are made.
TABLES = (continuous, text, attention, patches, noise, scaling, editing, towers, copies, positions, families)
PAGES = {"cpu": ("results.md", "on two cores"), "gpu": ("results-gpu.md", "on one GPU")}
INTRODUCTION = """# The paper's tables at small scale

The paper's claims, tested {hardware}: synthetic scenes of 32x32 pixels and Python's documentation, in one table pictures of
emoji; models of {smallest:.2f} to {largest:.2f} million parameters.

{claims}
{num_open} of {num_claims} claims are open. A verdict needs {num_seeds} seeds of both rows ({seeds}), made by the same
code. Claims, metrics and seeds were fixed before these runs were made, in `experiments/primary.py`.

- **Effect**: how much better the first row is than the second; above 0 speaks for the claim. For a claim with a margin: how
  much better it is than the second row less the margin.
- **Over seeds** is the 95 % interval of Welch's t-test over runs with other seeds of weights, data order and noise. For each
  seed, images are drawn from other captions and other starting noise, so it covers these too. It does not cover other
  held-out text, which is the same for all runs, nor other data, codecs or learning rates.
- **Over captions** is a bootstrap over distinct captions, of the same runs: it covers other captions, not other trainings.
  Text has none, since the held-out text is only four topics of documentation.
- **Reproduced**: the effect is above 0 after Holm's correction over the {num_claims} claims at 5 %, and its interval over
  captions too. **Partly**: the interval over captions contains 0. **Not**: no difference is shown, or the opposite.
- **Errors of the verdicts**, measured on 5,000 synthetic tables (`python -m experiments.error_rates`): if none of the claims
  is true, any verdict is false in 3.6 % of tables for normal values, 4.0 % for shares of 400 images, 1.9 % for exponential
  values, and 6.2 % if one row has three times the spread of the other, where Welch's test is a little too bold with five
  seeds. A true advantage of 1, 2 or 3 standard deviations over seeds is found in 7, 51 and 97 % of cases if all six claims
  are true, and in 7, 38 and 80 % if one is: "no difference shown" does not mean that there is none.
- All other comparisons on this page have intervals and no verdict. They are not corrected for their number. Their column
  "expected" has what the paper, or the one that the section names, leads one to expect, which is not a result.

Compare rows with each other, not with the paper's numbers. `python -m experiments.tables` makes all missing runs, those of
the claims above first. The command below each table makes its runs (`--seeds`, `--variants` select cells;
`--rerun-stale` trains cells of older code again, which are marked "(N of COMMIT)" beside the number of seeds), and
`python -m experiments.results` writes this page.

- FID uses 48 features of a small network trained to caption these scenes (`transfusion/evaluation/small_network.py`). It
  ranks runs on this data set. It is not comparable with published FID.
- "Images correct" is the share of 400 images, drawn from captions of held-out scenes, in which a program finds everything
  that the caption says; of continuous scenes within the limits that stand at Table 3. "Attributes correct" is the mean of
  that share for count, colour, shape, size and place.
- "Caption exact match" is the share of held-out images whose generated caption equals the reference.
- "Conditioning gap" is the relative increase of the image loss when an image has the caption of another image.
- Images are held out, not captions: there are few captions of one object, and all occur in training. Continuous scenes
  have about 250,000 captions.
- Training FLOPs are 6 x parameters x positions, the paper's estimate; attention and convolutions are not counted exactly,
  and of untied weights those of one side count. Minutes were measured on a shared machine.

{old}All {runs} runs together took {hours:.1f} hours of training, each on one thread and most of them with another run on the
same machine.
"""
OLD = """**Rows of seeds 0, 1 and 2** were made before the claims were fixed. All seeds of these rows share 400 captions and
the starting noise, so their spread is too small. The program that judged their images took some round blobs for circles, in
favour of models that draw blobs; the red frames of their drawings are also of that program. A row of old seeds is replaced
as soon as it has a run of the new ones.

"""


@dataclass
class PageOptions:
    """Write docs/results.md from the cells that exist."""

    out: Path = Path("runs/lab")
    """Folder of the tables' runs. It may be missing."""
    preset: Preset = "cpu"
    """Tables of two CPU cores (cpu) or of one GPU (gpu)."""
    device: str = "auto"
    """Device for measuring the codecs, if their folders are there: auto, cpu, cuda or mps."""


def write_page(options: Options) -> Path:
    """Write the page from the cells that exist, of all seeds; return its path."""
    options = replace(options, seeds=SEEDS)
    (DOCS / "results").mkdir(exist_ok=True)
    sections: list[str] = []
    cells: list[dict] = []
    for module in TABLES:
        table = module.build_table(options.preset)
        lab.restore_cells(options, table)
        rows = [lab.read_cells(options, table, variant).values() for variant in table.variants]
        if not any(rows):
            sections.append(f"{_introduce(module)}\n\nNot run yet: `{_command(module)}`.\n")
            continue
        cells += [cell for row in rows for cell in row]
        lab.show_table(options, table)
        lab.save_cells(options, table, DOCS / "results")
        markdown = lab.table_path(options, table, ".md").read_text(encoding="utf-8")
        sections.append(_format_section(options, module, markdown, [cell for row in rows for cell in row]))
    if not cells:
        sys.exit(f"--out {options.out}: there are no cells of any table; run a table first, e.g. python -m experiments.text")
    name, hardware = PAGES[options.preset]
    runs, sizes = _unique_runs(cells), [cell["parameters"] / 1e6 for cell in cells]
    verdicts = judge_claims(options)
    lines = [_format_claim(options, primary, *it) for primary, it in zip(CLAIMS, verdicts, strict=True)]
    page = INTRODUCTION.format(
        hardware=hardware, smallest=min(sizes), largest=max(sizes), runs=len(runs), hours=_minutes(runs) / 60,
        claims=lab.format_markdown(["claim of the paper", "verdict", "effect, 95 % interval", "command"], lines),
        num_open=sum(verdict == OPEN for verdict, _ in verdicts), num_claims=len(CLAIMS), num_seeds=len(SEEDS),
        seeds=f"{SEEDS[0]} to {SEEDS[-1]}", old=OLD if any(lab.is_old({cell["seed"]: cell}) for cell in cells) else "",
    )  # fmt: skip
    for figure in (drawings.figure_name(options.preset, figure) for figure in drawings.FIGURES):
        if (DOCS / figure).exists():
            page += f"\n![Each row: images for the first held-out captions, not selected. Red frame: wrong]({figure})\n"
    (DOCS / name).write_text("\n".join([page, *sections]), encoding="utf-8")
    return DOCS / name


def _format_claim(options: Options, primary: Primary, verdict: str, evidence: Evidence | None) -> list[str]:
    """The line of a primary claim: what the paper says, the verdict, the effect, and the command that makes its runs."""
    table, claim = primary.find(options.preset)
    rows, column = find_rows(table, claim), table.columns[claim.column]
    effect = "not run yet"
    if (described := lab.describe_claim(options, table, claim)) is not None:
        means, interval = described
        effect = f"{column.title} {means}: {interval}" if means else interval
        if evidence is not None:
            captions = evidence.captions and lab.format_interval(evidence.captions, column)
            effect += f" over seeds, {captions} over captions" if captions else " over seeds"
        effect += " (seeds 0 to 2)" if means and lab.is_old(lab.read_cells(options, table, rows[0])) else ""
    if verdict == OPEN:
        verdict = f"{OPEN}, {count_cells(options, primary)} of {2 * len(SEEDS)} runs"
    words = [_command(primary.module), "--variants", *(repr(row.name) for row in rows), "--seeds", *map(str, SEEDS)]
    return [primary.paper, f"**{verdict}**", effect, f"`{' '.join(words)}`"]


def _unique_runs(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One cell of each run. Tables share runs, and a run can be measured in two ways; its training time in full precision
    identifies it."""
    return [*{(cell["minutes"], cell["positions"], cell["parameters"]): cell for cell in cells}.values()]


def _minutes(cells: Iterable[Mapping[str, Any]]) -> float:
    return sum(cell["minutes"] for cell in cells)


def _introduce(module: ModuleType) -> str:
    """The head of a section: the docstring of its module without the command."""
    title, *paragraphs, _ = module.__doc__.strip().split("\n\n")
    return "\n\n".join([f"## {title.rstrip('.')}", *paragraphs])


def _command(module: ModuleType) -> str:
    return module.__doc__.strip().split("\n\n")[-1].strip()


def describe_codecs(options: Options, module: ModuleType) -> str:
    """What both codecs of a table lose; measured again if they are in the lab's folder. "" if they were never measured, or
    the table has only one."""
    if module is families:
        name, measure, describe = families.CODECS_NAME, families.measure_codecs, families.describe_codecs
    elif module in (continuous, scaling, text, editing, towers, copies):
        level = multimodal.JUDGED_LEVEL if module is continuous else PRESETS[options.preset].level
        name, describe = multimodal.codecs_name(options.preset, level), multimodal.describe_codecs
        measure = partial(multimodal.measure_codecs, level=level)
    else:
        return ""
    path = DOCS / "results" / f"{name}.json"
    if (values := measure(options)) is not None:
        write_json(path, values)
    return describe(read_json(path)) if path.exists() else ""


def _format_section(options: Options, module: ModuleType, table: str, cells: list[dict]) -> str:
    """One table as Markdown: the docstring of its module, the figures, the comparisons and the command."""
    cells = _unique_runs(cells)
    commits = ", ".join(sorted({cell["commit"] for cell in cells}))
    minutes, positions = _minutes(cells), statistics.mean(cell["positions"] for cell in cells)
    machines = "; ".join(sorted({f"{cell['machine']}, threads {cell['threads']}" for cell in cells}))
    runs = f"{len(cells)} run{'s' if len(cells) > 1 else ''} of {positions / 1e6:.1f} million positions"
    source = f"`{_command(module)}`: {runs}, {minutes:.0f} minutes of training; commits {commits}; {machines}."
    parts = [_introduce(module), table, source]
    if quality := describe_codecs(options, module):
        parts.insert(2, quality)
    if module in (continuous, scaling):
        figure, sizes = "", module.build_table(options.preset)
        if scaling.has_several_sizes(options, sizes):
            name = lab.table_path(options, sizes, ".png").name
            scaling.plot(options, sizes, DOCS / name)
            figure = f"\n![Metrics against compute, with fitted power laws]({name})"
        parts.insert(2, scaling.describe_parity(options, sizes) + figure)
    if module is towers:
        parts.insert(2, towers.describe_steps(options))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    options = tyro.cli(PageOptions, description=__doc__)
    print(f"wrote {write_page(Options(options.out, preset=options.preset, device=options.device))}")
