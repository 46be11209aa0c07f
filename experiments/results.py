"""All tables that there are cells of, as one page with what each claims, how it was made and what came out.

    python -m experiments.results

writes docs/results.md (--scale gpu: results-gpu.md), docs/scaling.png and, beside them, docs/results/TABLE.json with every
figure of every cell.
"""

import shutil
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from experiments import attention, both, drawings, editing, lab, noise, patches, scaling, text
from experiments.lab import DOCS, Options, Table
from transfusion.disk import read_json

TABLES = (scaling, text, attention, patches, noise, editing)
PAGES = {"cpu": ("results.md", "on two cores"), "gpu": ("results-gpu.md", "on one GPU")}
ABOVE = """# The paper's tables in miniature

What the paper claims, tried {where}: made scenes of 32x32 pixels and Python's documentation, networks of {smallest:.2f}
to {largest:.2f} million parameters. Absolute numbers mean nothing beside the paper's; what is compared are rows. Negative
results stay in. Every table can be made again, and gone on with, by the command below it (`--seeds`, `--variants`); this
page is what `python -m experiments.results` writes.

FID here is over 48 features of a small network that learnt to read captions off these scenes (see
`transfusion/evaluation/small_network.py`): it ranks runs on these data and is no FID that anybody publishes. "right" is the
share of 400 drawings from captions of held-out pictures in which a program finds all that the caption says, "attributes" the
mean share for count, colour, shape, size and place; "captions" the share of held-out pictures whose caption the model writes
to the letter; "gap" how much worse it predicts a picture behind another picture's caption. (Captions of one thing are few,
and all occur in training: what is held out are pictures.) "minutes" are those of a shared machine. A verdict is Student's at
95 %, with the spread of both rows' seeds; with one seed each there is none. All {runs} runs together took {hours:.1f}
hours of training, each on one thread and most of them beside another.

Claims of each table, and what became of them:

"""
VERDICTS = "holds", "within noise", "does not hold", "one seed each", lab.NOT_RUN


def write(asked: Options) -> Path:
    """The page, from what is there."""
    (DOCS / "results").mkdir(exist_ok=True)
    parts, counts = [], []
    runs: dict[Path, dict] = {}  # those that tables share once
    for module in TABLES:
        table = module.table(asked.scale)
        found = {lab.cell(asked, row, seed): one for row in table.variants for seed, one in lab.by_seed(asked, row).items()}
        if not found:
            continue
        runs |= found
        lab.show(asked, table)
        shutil.copy(lab.path(asked, table, ".json"), DOCS / "results")
        parts.append(_section(asked, module, lab.path(asked, table, ".md").read_text(), [*found.values()]))
        counts.append([_title(module), *_verdicts(asked, table)])
    if not parts:
        sys.exit(f"there is no cell of any table in {asked.out}")
    name, where = PAGES[asked.scale]
    sizes, minutes = ([one[what] for one in runs.values()] for what in ("parameters", "minutes"))
    smallest, largest, hours = min(sizes) / 1e6, max(sizes) / 1e6, sum(minutes) / 60
    above = ABOVE.format(where=where, smallest=smallest, largest=largest, runs=len(runs), hours=hours)
    above += lab.markdown(["", *VERDICTS], counts)
    drawn = drawings.NAMES[asked.scale]
    if (DOCS / drawn).exists():
        above += f"\n![The first held-out captions drawn by each row, none picked; what is wrong is framed]({drawn})\n"
    (DOCS / name).write_text("\n".join([above, *parts]))
    return DOCS / name


def _title(module: ModuleType) -> str:
    return module.__doc__.strip().partition("\n")[0].rstrip(".")


def _verdicts(asked: Options, table: Table) -> list[str]:
    """How many of a table's claims came out each way."""
    found = Counter(lab.judge(asked, table, claim).partition(" (")[0] for claim in table.claims)
    return [str(found[verdict] or "") for verdict in VERDICTS]


def _section(asked: Options, module: ModuleType, table: str, cells: list[dict]) -> str:
    """One table, from the docstring of its file to its verdicts."""
    _, *rest = module.__doc__.strip().split("\n\n")
    command, claim = rest.pop().strip(), "\n\n".join(rest)
    commits = ", ".join(sorted({one["commit"] for one in cells}))
    minutes, positions = sum(one["minutes"] for one in cells), statistics.mean(one["positions"] for one in cells)
    machines = "; ".join(sorted({f"{one['machine']}, threads {one['threads']}" for one in cells}))
    runs = f"{len(cells)} run{'s' if len(cells) > 1 else ''} of {positions / 1e6:.1f} million positions"
    made = f"`{command}`: {runs}, {minutes:.0f} minutes of training; commits {commits}; {machines}."
    lines = [f"## {_title(module)}", claim, table, made]
    if module in (scaling, text, editing) and (quality := both.codec_quality(asked)):
        lines.insert(3, quality)
    if module is scaling:
        picture = ""
        if scaling.is_known(asked):
            name = "scaling.png" if asked.scale == "cpu" else f"scaling-{asked.scale}.png"
            scaling.plot(asked, DOCS / name)
            picture = f"\n![Metrics over compute, with fitted lines]({name})"
        lines.insert(3, scaling.tell(asked) + picture)
    return "\n\n".join(line.strip() for line in lines) + "\n"


if __name__ == "__main__":
    asked = replace(lab.options(__doc__), show=True)
    print(f"wrote {write(asked)}", *(read_json(path)["table"] for path in (DOCS / "results").glob("*.json")))
