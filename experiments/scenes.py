"""The world of the tables about images: scenes of `shapes` with one thing each, 32x32 pixels, as latents of 8x8 (principal
components of blocks), cut into 16 patches. All variants read equally many positions in a step.

What is measured is the same for all of them, so that tables share their variants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from experiments.lab import Column, Variant
from transfusion.data.built_in.shapes import Shapes
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.scenes import draw_scenes
from transfusion.evaluation.small_network import SmallNetwork
from transfusion.inference.engine import Engine

SCENES = 400  # held-out captions, one drawing each
SEEN = 2_000  # training scenes that the small network for features learns from
SIZES = ("S", "M", "L")


@dataclass(frozen=True)
class Scale:
    """How large the miniatures are: for two cores, or for one GPU."""

    level: int  # of `shapes`
    sizes: Mapping[str, tuple[int, int, int, int, int]]  # width, layers, heads, hidden, unet_width
    rows: int  # of 320 positions
    steps: int
    rate: float  # of linear patches; a U-Net's convolutions want half of it


SCALES = {
    "cpu": Scale(0, {"S": (64, 3, 2, 176, 32), "M": (96, 4, 3, 256, 48), "L": (128, 4, 4, 344, 64)}, 6, 1_200, 4e-3),
    "gpu": Scale(1, {"S": (256, 8, 4, 704, 128), "M": (384, 10, 6, 1024, 192), "L": (512, 12, 8, 1408, 256)}, 60, 5_000,
                 1e-3),
}
COLUMNS = {
    "right": Column(".1%"), "attributes": Column(".1%"), "fid": Column(".2f", "lower"),
    "captions": Column(".1%"), "gap": Column(".1%"), "image_loss": Column(".4f", "lower"),
    "text_loss": Column(".3f", "lower"), "minutes": Column(".1f", "lower"),
}  # fmt: skip


def size(scale: str, name: str) -> tuple[str, ...]:
    """The network of this size."""
    names = ("width", "layers", "heads", "intermediate_size", "unet-width")
    found = zip(names, SCALES[scale].sizes[name], strict=True)
    return tuple(word for field, value in found for word in (f"--model.{field}", str(value)))


def variant(
    scale: str, name: str, kind: str = "linear", side: int = 2, of_size: str = "L", *more: str,
    paper: Mapping[str, float] | None = None,
) -> Variant:  # fmt: skip
    """A run on scenes: patches of this kind and side."""
    of = SCALES[scale]
    arguments = (
        "shapes", "--data.shapes.level", str(of.level), "--data.seq-len", "320", "--data.rows", str(of.rows),
        "--data.image-first-max-t", "1", *size(scale, of_size), "--model.patches", kind, "--model.patch-size", str(side),
        "--training.steps", str(of.steps), "--training.learning-rate", rate(of.rate if kind == "linear" else of.rate / 2),
        "--training.preview-every", "0", "--generation.sampler", "dpm", "--generation.steps", "20", *more,
    )  # fmt: skip
    return Variant(name, arguments, paper=paper or {})


def measure(scale: str, engine: Engine) -> dict[str, float]:
    """Drawings as the checker reads them, and beside real ones; captions; how much the model listens.

    Pictures are as they were rendered, whatever the run's codec makes of them.
    """
    source = Shapes(SCALES[scale].level, split="heldout")
    judged, shown = draw_scenes(engine, source, SCENES)
    real = [source[n].pair[1] for n in range(SCENES)]
    features = small_network(SCALES[scale].level)
    beside = image_scores(features(real), features([pixels for _, pixels, _ in shown]))
    captions = caption_heldout(engine, source, SCENES)
    attributes = [judged[name] for name in ("count", "colour", "shape", "size", "place")]
    return {
        "right": judged["everything"], "attributes": sum(attributes) / len(attributes),
        **{name: judged[name] for name in ("count", "colour", "shape", "size", "place")},
        **{name: beside[name] for name in ("fid", "kid", "precision", "recall", "density", "coverage")},
        "captions": captions["exact"], "cider": captions.get("cider", float("nan")),
        "gap": conditioning_gap(engine, source, SCENES)["gap"],
    }  # fmt: skip


def rate(value: float) -> str:
    """0.004 -> "4e-3"."""
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


@cache
def small_network(level: int) -> SmallNetwork:
    """What features are of: the same network for all tables of a scale, in less than half a minute."""
    scenes = Shapes(level, split="train")
    captions, pictures = zip(*(scenes[n].pair for n in range(SEEN)), strict=True)
    with torch.random.fork_rng(devices=[]):
        return SmallNetwork("shapes", pictures, captions)
