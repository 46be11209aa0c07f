"""How few steps draw as well as the paper's 250 of DDPM?

Claim (DPM-Solver++, 2211.01095): about 20 steps of a second-order solver are as good as hundreds of first-order ones.
Here: a trained run of `shapes`, the same held-out captions, seeds and guidance for every sampler.

    python -m experiments.samplers runs/shapes
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from experiments.lab import markdown
from transfusion.data.sources import open_raw
from transfusion.disk import OpenError
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import open_run

SAMPLERS = (
    ("ddpm", 250), ("ddpm", 50), ("ddpm", 20), ("ddim", 50), ("ddim", 20), ("dpm", 20), ("dpm", 10), ("dpm", 5),
    ("dpm-sde", 50), ("dpm-sde", 20), ("dpm-sde", 10),
)  # fmt: skip
COLUMNS = ("everything", "count", "colour", "shape", "size", "place")


@dataclass
class Options:
    run: tyro.conf.Positional[Path]
    """The folder of a run that has learnt `shapes`."""
    scenes: int = 200
    """Held-out captions, one drawing each."""
    device: str = "auto"


def main(asked: Options) -> None:
    """Draw with each sampler, print the table, and write it to samplers.md in the run's folder."""
    try:
        engine, rows = open_run(asked.run, device=asked.device), []
    except OpenError as error:
        sys.exit(str(error))
    source = next((one for one in open_raw(engine.run.data, "heldout") if one.name == "shapes"), None)
    if source is None or engine.draws_codes:
        sys.exit(f"{asked.run} has not learnt to draw shapes out of noise")
    for sampler, steps in SAMPLERS:
        engine.run = replace(engine.run, generation=replace(engine.run.generation, sampler=sampler, steps=steps))
        begun = time.monotonic()
        values, _ = draw_scenes(engine, source, asked.scenes)
        seconds = time.monotonic() - begun
        rows.append([f"{sampler}, {steps} steps", *(f"{values[name]:.1%}" for name in COLUMNS), f"{seconds:.0f}"])
        print(*rows[-1], sep="  ", flush=True)
    table = markdown(["", *COLUMNS, "seconds"], rows)
    (asked.run / "samplers.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
