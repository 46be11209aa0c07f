"""python -m benchmarks: measure speed part by part, print one table and write one JSON file."""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from benchmarks import attention, before, codec, compare, decoding, drawing, loading, loss, sampling, training
from benchmarks.timing import TABLE_HEAD, Setting, describe_machine, load_average
from transfusion.disk import write_json
from transfusion.parallel import keep_freed_memory, pick_device

Part = Literal["training", "attention", "loss", "decoding", "sampling", "drawing", "loading", "codec", "compare"]
MODULES = training, attention, loss, decoding, sampling, drawing, loading, codec, compare
PARTS = dict(zip(get_args(Part), MODULES, strict=True))


@dataclass
class Options:
    """Measure speed, as ratios between alternatives that are timed alternately in one call."""

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = ()
    """Parts to measure. Default: all except compare."""
    device: str = "auto"
    """Device to measure: auto, cpu, cuda or mps."""
    json: Path = Path("runs/benchmarks.json")
    """File for all figures and the description of the machine."""
    quick: bool = False
    """Run every part with minimal work, as a test. The figures are meaningless."""
    compare: bool = False
    """Also compare with transfusion-pytorch 0.20.0, which is installed in a separate environment."""
    peer_python: Path | None = None
    """Python of that environment. Default: .venv-peer, which is created if it is missing."""
    world: int = 64
    """Number of processes, of which the part loading measures one."""
    before: str | None = None
    """A commit to measure too, in processes that take turns with this checkout's: the ratios are to its figures."""


def main(options: Options) -> None:
    """Print and write every figure as soon as it is measured, so that an interruption loses nothing."""
    setting = Setting(pick_device(options.device), options.quick, options.peer_python, options.world)
    keep_freed_memory(setting.device)  # as `transfusion train`
    selected = [part for part in PARTS if part in options.parts or (part == "compare" and options.compare)]
    if not options.parts:
        selected = [part for part in PARTS if part != "compare" or options.compare]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    start, machine = time.monotonic(), describe_machine(setting)
    figures = {part: [] for part in selected}
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    print(f"{machine['commit']} on {machine['device']}, {machine['threads']} threads of {machine['processor']}")
    quick = ", QUICK: the figures are meaningless" * setting.quick
    print(f"{versions}, load {machine['load_at_start'][0]}{quick}\n\n{TABLE_HEAD}")
    for part in selected:
        print(part)
        measured = before.measure(part, options.before, setting) if options.before else PARTS[part].measure(setting)
        for figure in measured:
            figures[part].append(asdict(figure))
            print(figure.format(), flush=True)
            write_json(options.json, machine | {
                "load_at_end": load_average(), "seconds": round(time.monotonic() - start, 1), "parts": figures,
            })  # fmt: skip
    print(f"\nload at the end {load_average()[0]}; all figures are in {options.json}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m benchmarks"))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
