"""transfusion compare: one page about several runs."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from transfusion.cli.options import parse
from transfusion.cli.screen import UsageError, print_status
from transfusion.disk import RUN, OpenError


@dataclass(frozen=True)
class Compare:
    """Write one page about several runs: their curves in the same plots, the settings that differ, and their figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of two or more runs."""
    out: Path = Path("compare.html")
    """File of the page."""


def compare(arguments: list[str]) -> None:
    """Write the page about the runs."""
    args = parse(Compare, "compare", arguments)
    if len({folder.resolve() for folder in args.runs}) < max(2, len(args.runs)):
        raise UsageError("compare needs two or more different runs: transfusion compare runs/a runs/b")
    for folder in args.runs:
        if not (folder / RUN).is_file():
            raise OpenError(f"{folder} is not the folder of a run: it has no {RUN}")

    from transfusion.report.compare import write_comparison

    print_status(f"wrote {write_comparison(args.runs, args.out)}")
