"""Compare samplers by accuracy and time: how few steps match the paper's 250 steps of DDPM?

Claim (DPM-Solver++, arXiv 2211.01095): about 20 steps of a second-order solver equal hundreds of first-order steps.
Here: a trained run of `shapes`, with the same held-out captions, seeds and guidance for every sampler.

    python -m experiments.samplers runs/shapes
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from experiments.lab import format_markdown
from experiments.scenes import ATTRIBUTES
from transfusion.data.sources import open_raw
from transfusion.disk import OpenError
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import open_run

SAMPLERS = (
    ("ddpm", 250), ("ddpm", 50), ("ddpm", 20), ("ddim", 50), ("ddim", 20), ("dpm", 20), ("dpm", 10), ("dpm", 5),
    ("dpm-sde", 50), ("dpm-sde", 20), ("dpm-sde", 10),
)  # fmt: skip
COLUMNS = ("everything", *ATTRIBUTES)


@dataclass
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of a run trained on `shapes`."""
    scenes: int = 200
    """Number of held-out captions. One image is drawn for each."""
    device: str = "auto"
    """Device for drawing: auto, cpu, cuda or mps."""


def main(options: Options) -> None:
    """Draw with each sampler, print the table, and write it to samplers.md in the run's folder."""
    try:
        engine, rows = open_run(options.run, device=options.device), []
    except OpenError as error:
        sys.exit(str(error))
    source = next((source for source in open_raw(engine.run.data, "heldout") if source.name == "shapes"), None)
    if source is None or engine.uses_image_codes:
        sys.exit(f"{options.run}: not a diffusion run on `shapes`; train one with `transfusion train shapes`")
    for sampler, steps in SAMPLERS:
        engine.run = replace(engine.run, generation=replace(engine.run.generation, sampler=sampler, steps=steps))
        start = time.monotonic()
        accuracy, _ = draw_scenes(engine, source, options.scenes)
        seconds = time.monotonic() - start
        rows.append([f"{sampler}, {steps} steps", *(f"{accuracy[name]:.1%}" for name in COLUMNS), f"{seconds:.0f}"])
        print(*rows[-1], sep="  ", flush=True)
    table = format_markdown(["", "all correct", *ATTRIBUTES, "seconds"], rows)
    (options.run / "samplers.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
