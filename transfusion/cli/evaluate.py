"""transfusion evaluate: measure a run, or repeat a measurement and compare the figures."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.ignored import check_evaluate
from transfusion.cli.options import RUN_HELP, Device, parse
from transfusion.cli.screen import UsageError, check_exists, print_status, progress
from transfusion.config import QUICK, TASKS, EvaluationConfig
from transfusion.disk import check_prepared, check_run, find_folder, read_json


@dataclass(frozen=True)
class Evaluate:
    __doc__ = "Measure a run; the figures are printed and written to results.json. The tasks are:\n" + "".join(
        f"\n- {name}: {text}{' (default)' if name in QUICK else ''}" for name, text in TASKS.items()
    )

    run: Annotated[
        Path | None, tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN", help=f"{RUN_HELP} With --from, the folder of that results.json if not set."),
    ] = None  # fmt: skip
    out: Path | None = None
    """Folder of results.json; the run's own folder if not set, and out/RUN for a model in the package or on the hub."""
    results: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A results.json whose measurement is repeated with the same settings and compared figure by figure."""
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    device: Device = "auto"


def evaluate(arguments: list[str]) -> None:
    """Measure a run, or repeat a measurement."""
    args = parse(Evaluate, "evaluate", arguments)
    config = args.config
    if args.run is None and args.results is None:
        raise UsageError("name a run's folder, or --from the results.json of one")
    if args.results is not None and (args.out is not None or replace(config, data=None) != EvaluationConfig()):
        raise UsageError("--from repeats its results.json: name nothing else but RUN, --data and --device")
    check_evaluate(config, config.tasks or QUICK)
    check_exists(config.questions, config.prompts, config.coco, config.pictures)
    for folder in config.data or ():
        check_prepared(Path(folder))
    folder = check_run(find_folder(args.run or args.results.parent))
    if args.results is None:
        is_local = folder == args.run
        return measure(folder, args.out or (folder if is_local else Path("out") / args.run), config, args.device)
    read_json(args.results)
    _repeat(folder, args.results, config.data, args.device)


def measure(folder: Path, out: Path, config: EvaluationConfig, device: str) -> None:
    """Measure a run and write results.json into the folder `out`."""
    from transfusion.evaluation.results import NAME, evaluate
    from transfusion.inference.engine import open_run

    engine = open_run(folder, device=device)
    with progress("evaluate") as on_progress:
        evaluate(engine, folder, config, print_status, out, on_progress)
    print_status(f"wrote {out / NAME}")


def _repeat(folder: Path, path: Path, data: tuple[str, ...] | None, device: str) -> None:
    """Repeat a measurement and print every figure that differs; exit code 1 when one does."""
    from transfusion.evaluation.results import repeat
    from transfusion.inference.engine import open_run

    engine = open_run(folder, device=device)
    with progress("evaluate") as on_progress:
        differences, reasons = repeat(engine, folder, path, data, print_status, on_progress)
    print_status(f"{path}: " + (f"{len(differences)} figures differ" if differences else "all figures agree"))
    for line in differences:
        print_status(f"  {line}")
    for line in reasons if differences else ():
        print_status(f"  different this time: {line}")
    if differences:
        sys.exit(1)
