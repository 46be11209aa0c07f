"""Compare samplers by accuracy and time: how few steps match the paper's 250 steps of DDPM?

Claim (DPM-Solver++, arXiv 2211.01095): about 20 steps of a second-order solver equal hundreds of first-order steps.
Here: trained runs of `digits` or of `shapes`, with the same prompts, seeds and guidance for every sampler.

    python -m experiments.samplers runs/digits-0 runs/digits-1 runs/digits-2
    python -m experiments.samplers runs/shapes

The last column is the difference from the first row in percentage points, with the 95 % interval of a difference of two
shares: a sampler is as good within noise if the interval contains 0.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from experiments.lab import format_markdown
from experiments.measures import ATTRIBUTES
from transfusion.data.sources import open_raw
from transfusion.disk import OpenError
from transfusion.evaluation.digits import draw_digits
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import Engine, open_run

SAMPLERS = (
    ("ddpm", 250), ("ddpm", 50), ("ddpm", 20), ("ddim", 50), ("ddim", 20), ("dpm", 20), ("dpm", 10), ("dpm", 5),
    ("dpm-sde", 50), ("dpm-sde", 20), ("dpm-sde", 10),
)  # fmt: skip
NUM_IMAGES = 200  # of a round
Z = 1.96  # of a 95 % interval


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs trained on `digits`, or on `shapes`."""
    rounds: int = 1
    """Rounds of 200 images that each run draws with each sampler, with other seeds in each round."""
    samplers: tuple[str, ...] = tuple(f"{name}-{steps}" for name, steps in SAMPLERS)
    """Samplers with their steps, for example ddpm-250 dpm-sde-20. The first is the one that others are compared with."""
    device: str = "auto"
    """Device for drawing: auto, cpu, cuda or mps."""


def main(options: Options) -> None:
    """Draw with each sampler, print the table, and write it to samplers.md in the first run's folder."""
    try:
        engines = [open_run(run, device=options.device) for run in options.runs]
    except OpenError as error:
        sys.exit(str(error))
    sources = {find_source(engine) for engine in engines}
    if len(sources) != 1 or None in sources:
        names = ", ".join(map(str, options.runs))
        sys.exit(f"{names}: not diffusion runs on `digits`, or on `shapes`; train one with `transfusion train shapes`")
    rows, shares, count = [], [], NUM_IMAGES * options.rounds * len(engines)
    for label in options.samplers:
        sampler, _, steps = label.rpartition("-")
        start = time.monotonic()
        scores = [measure_run(engine, *sources, sampler, int(steps), options.rounds) for engine in engines]
        seconds = time.monotonic() - start
        shares.append(statistics.mean(next(iter(score.values())) for score in scores))
        cells = [format_mean([score[title] for score in scores], title) for title in scores[0]]
        rows.append([f"{sampler}, {steps} steps", *cells, f"{seconds:.0f}", format_difference(shares[-1], shares[0], count)])
        print(*rows[-1], sep="  ", flush=True)
    table = format_markdown(["", *scores[0], "seconds", f"difference from {rows[0][0]}"], rows)
    (options.runs[0] / "samplers.md").write_text(table, encoding="utf-8")
    print(table, end="")


def find_source(engine: Engine) -> str | None:
    """The source of the run whose drawings can be checked, if it draws by diffusion."""
    names = {source.name for source in open_raw(engine.run.data, "heldout")}
    return None if engine.uses_image_codes else next((name for name in ("digits", "shapes") if name in names), None)


def measure_run(engine: Engine, source: str, sampler: str, steps: int, rounds: int) -> dict[str, float]:
    """The scores of a run's drawings, by title; the first is the share of correct ones."""
    engine.run = replace(engine.run, generation=engine.make_generation_config(sampler=sampler, steps=steps))
    scores = []
    for number in range(rounds):
        if source == "digits":
            values, _ = draw_digits(engine, seed=number)
            scores.append({"recognised": values["recognised"], "nearest training scan": values["nearest_training_scan"]})
        else:
            scenes = next(scenes for scenes in open_raw(engine.run.data, "heldout") if scenes.name == "shapes")
            values, _ = draw_scenes(engine, scenes, NUM_IMAGES, seed=NUM_IMAGES * number)
            scores.append({"all correct": values["everything"]} | {name: values[name] for name in ATTRIBUTES})
    return {title: statistics.mean(score[title] for score in scores) for title in scores[0]}


def format_mean(values: Sequence[float], title: str) -> str:
    """The mean over runs ± the standard deviation: a share, or a distance."""
    number_format = ".2f" if "nearest" in title else ".1%"
    std = f" ± {statistics.stdev(values):{number_format}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{number_format}}{std}"


def format_difference(share: float, reference: float, count: int) -> str:
    """The difference of two shares of `count` images each, and its 95 % interval, in percentage points."""
    half_width = Z * math.sqrt((share * (1 - share) + reference * (1 - reference)) / count)
    return f"{100 * (share - reference):+.1f} ± {100 * half_width:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
