"""The world of the tables about images: scenes of `shapes` with one thing each, 32x32 pixels, as latents of 8x8 (principal
components of blocks), cut into 16 patches. All variants read equally many positions in a step.

What is measured is the same for all of them, so that tables share their variants.
"""

from collections.abc import Mapping
from functools import cache

import torch

from experiments.lab import Column, Variant
from transfusion.data.shapes import Shapes
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.scenes import draw_scenes
from transfusion.evaluation.small_network import SmallNetwork
from transfusion.inference.engine import Engine

SCENES = 400  # held-out captions, one drawing each
SEEN = 2_000  # training scenes that the small network for features learns from
LEVEL = 0
SIZES = {  # width, layers, heads, hidden, unet_width
    "S": (64, 3, 2, 176, 32),
    "M": (96, 4, 3, 256, 48),
    "L": (128, 4, 4, 344, 64),
}
COLUMNS = {
    "right": Column(".1%"), "attributes": Column(".1%"), "fid": Column(".2f", "lower"),
    "captions": Column(".1%"), "gap": Column(".1%"), "image_loss": Column(".4f", "lower"),
    "text_loss": Column(".3f", "lower"), "minutes": Column(".1f", "lower"),
}  # fmt: skip


def size(name: str) -> tuple[str, ...]:
    """The network of this size."""
    names = ("width", "layers", "heads", "hidden", "unet-width")
    return tuple(word for pair in zip(names, SIZES[name], strict=True) for word in (f"--model.{pair[0]}", str(pair[1])))


def variant(
    name: str, kind: str = "linear", side: int = 2, of_size: str = "L", *more: str, paper: Mapping[str, float] | None = None
) -> Variant:
    """A run on scenes: patches of this kind and side. A U-Net's convolutions want a smaller rate than linear patches."""
    arguments = (
        "shapes", "--data.level", str(LEVEL), "--data.row-length", "320", "--data.rows", "6",
        "--data.image-first-max-time", "1", *size(of_size), "--model.patches", kind, "--model.patch-size", str(side),
        "--training.steps", "1200", "--training.learning-rate", "4e-3" if kind == "linear" else "2e-3",
        "--training.preview-every", "0", "--generation.sampler", "dpm", "--generation.steps", "20", *more,
    )  # fmt: skip
    return Variant(name, arguments, paper=paper or {})


def measure(engine: Engine) -> dict[str, float]:
    """Drawings as the checker reads them, and beside real ones; captions; how much the model listens."""
    sources = {source.name: source for source in open_raw(engine.run.data, "heldout")}
    source = sources["shapes"]
    judged, shown = draw_scenes(engine, source, SCENES)
    real = [source[n].pair[1] for n in range(SCENES)]
    features = small_network()
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


@cache
def small_network() -> SmallNetwork:
    """What features are of: the same network for all tables, in less than half a minute."""
    scenes = Shapes(LEVEL, split="train")
    captions, pictures = zip(*(scenes[n].pair for n in range(SEEN)), strict=True)
    with torch.random.fork_rng(devices=[]):
        return SmallNetwork("shapes", pictures, captions)
