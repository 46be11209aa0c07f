"""Write one page with every table that has cells: the claims, the commands, the figures and the verdicts.

    python -m experiments.results

writes docs/results.md (--preset gpu: results-gpu.md), docs/scaling.png, and docs/results/TABLE.json with all figures of each
cell.
"""

import shutil
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from experiments import attention, drawings, editing, lab, multimodal, noise, patches, scaling, text
from experiments.lab import DOCS, Options, Table
from transfusion.disk import read_json

TABLES = (scaling, text, attention, patches, noise, editing)
PAGES = {"cpu": ("results.md", "on two cores"), "gpu": ("results-gpu.md", "on one GPU")}
INTRODUCTION = """# The paper's tables at small scale

The paper's claims, tested {hardware}: synthetic scenes of 32x32 pixels and Python's documentation, models of {smallest:.2f}
to {largest:.2f} million parameters. Compare rows with each other, not with the paper's numbers. Negative results are
included. The command below each table makes it or resumes it (`--seeds`, `--variants` select cells; `--rerun-stale` trains
cells of older code again).
`python -m experiments.results` writes this page.

- FID uses 48 features of a small network trained to caption these scenes (`transfusion/evaluation/small_network.py`). It
  ranks runs on this data set. It is not comparable with published FID.
- "Images correct" is the share of 400 images, drawn from captions of held-out scenes, in which a program finds everything
  that the caption says. "Attributes correct" is the mean of that share for count, colour, shape, size and place.
- "Caption exact match" is the share of held-out images whose generated caption equals the reference.
- "Conditioning gap" is the relative increase of the image loss when an image has the caption of another image.
- Images are held out, not captions: there are few captions of one object, and all occur in training.
- Minutes were measured on a shared machine.

Verdicts use a two-sided 95 % t-test over seeds, with the pooled variance of both rows. "Not shown" means that the difference
is not significant. Rows with one seed each have no verdict. All {runs} runs together took {hours:.1f} hours of training,
each on one thread and most of them with another run on the same machine.

Number of claims by verdict:

"""
VERDICTS = "holds", "not shown", "does not hold", "one seed each", lab.NOT_RUN


def write_page(options: Options) -> Path:
    """Write the page from the cells that exist; return its path."""
    (DOCS / "results").mkdir(exist_ok=True)
    sections, counts = [], []
    cells: dict[Path, dict] = {}  # by folder: cells that tables share count once
    for module in TABLES:
        table = module.build_table(options.preset)
        table_cells = {
            lab.find_cell(options, table, variant, seed): cell
            for variant in table.variants for seed, cell in lab.read_cells(options, table, variant).items()
        }  # fmt: skip
        if not table_cells:
            continue
        cells |= table_cells
        lab.show_table(options, table)
        shutil.copy(lab.table_path(options, table, ".json"), DOCS / "results")
        markdown = lab.table_path(options, table, ".md").read_text(encoding="utf-8")
        sections.append(_format_section(options, module, markdown, [*table_cells.values()]))
        counts.append([_title(module), *_count_verdicts(options, table)])
    if not sections:
        sys.exit(f"--out {options.out}: there are no cells of any table; run a table first, e.g. python -m experiments.text")
    name, hardware = PAGES[options.preset]
    sizes, minutes = ([cell[key] for cell in cells.values()] for key in ("parameters", "minutes"))
    smallest, largest, hours = min(sizes) / 1e6, max(sizes) / 1e6, sum(minutes) / 60
    page = INTRODUCTION.format(hardware=hardware, smallest=smallest, largest=largest, runs=len(cells), hours=hours)
    page += lab.format_markdown(["", *VERDICTS], counts)
    if (DOCS / drawings.NAMES[options.preset]).exists():
        caption = "Each row: images for the first held-out captions, not selected. Red frame: wrong"
        page += f"\n![{caption}]({drawings.NAMES[options.preset]})\n"
    (DOCS / name).write_text("\n".join([page, *sections]), encoding="utf-8")
    return DOCS / name


def _title(module: ModuleType) -> str:
    return module.__doc__.strip().partition("\n")[0].rstrip(".")


def _count_verdicts(options: Options, table: Table) -> list[str]:
    """The number of a table's claims for each verdict; empty for 0."""
    counts = Counter(lab.judge_claim(options, table, claim).partition(" (")[0] for claim in table.claims)
    return [str(counts[verdict] or "") for verdict in VERDICTS]


def _format_section(options: Options, module: ModuleType, table: str, cells: list[dict]) -> str:
    """One table as Markdown: the docstring of its module, the figures, the verdicts and the command."""
    _, *paragraphs = module.__doc__.strip().split("\n\n")
    command, introduction = paragraphs.pop().strip(), "\n\n".join(paragraphs)
    commits = ", ".join(sorted({cell["commit"] for cell in cells}))
    minutes, positions = sum(cell["minutes"] for cell in cells), statistics.mean(cell["positions"] for cell in cells)
    machines = "; ".join(sorted({f"{cell['machine']}, threads {cell['threads']}" for cell in cells}))
    runs = f"{len(cells)} run{'s' if len(cells) > 1 else ''} of {positions / 1e6:.1f} million positions"
    source = f"`{command}`: {runs}, {minutes:.0f} minutes of training; commits {commits}; {machines}."
    parts = [f"## {_title(module)}", introduction, table, source]
    if module in (scaling, text, editing) and (quality := multimodal.describe_codecs(options)):
        parts.insert(3, quality)
    if module is scaling:
        figure = ""
        if scaling.has_several_sizes(options):
            name = "scaling.png" if options.preset == "cpu" else f"scaling-{options.preset}.png"
            scaling.plot(options, DOCS / name)
            figure = f"\n![Metrics against compute, with fitted power laws]({name})"
        parts.insert(3, scaling.describe_parity(options) + figure)
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    options = replace(lab.parse_options(__doc__), show=True)
    print(f"wrote {write_page(options)}", *(read_json(path)["table"] for path in (DOCS / "results").glob("*.json")))
