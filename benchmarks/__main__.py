"""python -m benchmarks: measures speed part by part, prints one table and writes one JSON."""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from benchmarks import attention, codec, compare, decoding, drawing, loading, training
from benchmarks.measuring import HEAD, Setting, load, machine
from transfusion.disk import write_json
from transfusion.parallel import pick_device

Part = Literal["training", "attention", "decoding", "drawing", "loading", "codec", "compare"]
PARTS = dict(zip(get_args(Part), (training, attention, decoding, drawing, loading, codec, compare), strict=True))


@dataclass
class Options:
    """How fast all of it is, as ratios measured side by side in one call."""

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = ()
    """What to measure; nothing said: all but compare."""
    device: str = "auto"
    json: Path = Path("runs/benchmarks.json")
    """Where all figures go, with what they belong to."""
    quick: bool = False
    """The least work that still does everything: its figures mean nothing."""
    compare: bool = False
    """Beside transfusion-pytorch 0.20.0 too, in an environment of its own."""
    peer_python: Path | None = None
    """Of that environment; None: of .venv-peer, which is made where it is missing."""


def main(options: Options) -> None:
    """Every figure is printed and written as soon as it is known: what there is outlives an interruption."""
    setting = Setting(pick_device(options.device), options.quick, options.peer_python)
    chosen = [part for part in PARTS if part in options.parts or (part == "compare" and options.compare)]
    if not options.parts:
        chosen = [part for part in PARTS if part != "compare" or options.compare]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    begun, about = time.monotonic(), machine(setting)
    found = {part: [] for part in chosen}
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(f"{about['commit']} on {about['device']}, {about['threads']} threads of {about['processor']}")
    print(f"{versions}, load {about['load_at_start'][0]}{', QUICK: the figures mean nothing' * setting.quick}\n\n{HEAD}")
    for part in chosen:
        print(part)
        for figure in PARTS[part].measure(setting):
            found[part].append(asdict(figure))
            print(figure.line(), flush=True)
            write_json(options.json, about | {
                "load_at_end": load(), "seconds": round(time.monotonic() - begun, 1), "parts": found,
            })  # fmt: skip
    print(f"\nload at the end {load()[0]}; all of it is in {options.json}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m benchmarks"))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
