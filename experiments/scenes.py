"""Shared setup of the tables on images: one object per scene of `shapes`, 32x32 pixels, latents of 8x8 (PCA of pixel
blocks), 16 patches. All variants train on the same number of positions per step.

All tables measure the same quantities, so that they can share variants.
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
from transfusion.evaluation.small_network import SmallFeatureNetwork
from transfusion.inference.engine import Engine

NUM_SCENES = 400  # held-out captions; one image is drawn for each
NUM_TRAINING_SCENES = 2_000  # for the small network that computes features
SIZES = ("S", "M", "L")


@dataclass(frozen=True)
class Preset:
    """Model sizes and training of all tables, for two CPU cores or for one GPU."""

    level: int  # of `shapes`
    sizes: Mapping[str, tuple[int, int, int, int, int]]  # width, layers, heads, intermediate_size, unet_width
    rows: int  # per step, of 320 positions each
    steps: int
    learning_rate: float  # for linear patches; a U-Net uses half of it


PRESETS = {
    "cpu": Preset(0, {"S": (64, 3, 2, 176, 32), "M": (96, 4, 3, 256, 48), "L": (128, 4, 4, 344, 64)}, 6, 1_200, 4e-3),
    "gpu": Preset(1, {"S": (256, 8, 4, 704, 128), "M": (384, 10, 6, 1024, 192), "L": (512, 12, 8, 1408, 256)}, 60, 5_000,
                  1e-3),
}  # fmt: skip
ATTRIBUTES = "count", "colour", "shape", "size", "place"
COLUMNS = {
    "right": Column("images correct", ".1%"), "attributes": Column("attributes correct", ".1%"),
    "fid": Column("FID", ".2f", "lower"), "captions": Column("caption exact match", ".1%"),
    "gap": Column("conditioning gap", ".1%"), "image_loss": Column("image loss", ".4f", "lower"),
    "text_loss": Column("text loss", ".3f", "lower"), "minutes": Column("minutes", ".1f", "lower"),
}  # fmt: skip


def model_options(preset: str, size: str) -> tuple[str, ...]:
    """The options of `transfusion train` for a model size."""
    names = ("width", "layers", "heads", "intermediate-size", "unet-width")
    numbers = zip(names, PRESETS[preset].sizes[size], strict=True)
    return tuple(argument for name, number in numbers for argument in (f"--model.{name}", str(number)))


def make_variant(
    preset: str, name: str, patches: str = "linear", patch_size: int = 2, size: str = "L", *more: str,
    paper: Mapping[str, float | str] | None = None,
) -> Variant:  # fmt: skip
    """A run on scenes. `patches` is "linear" or "unet"; `more` are further options of `transfusion train`."""
    numbers = PRESETS[preset]
    learning_rate = numbers.learning_rate if patches == "linear" else numbers.learning_rate / 2
    arguments = (
        "shapes", "--data.shapes.level", str(numbers.level), "--data.seq-len", "320",
        "--training.batch-size", str(numbers.rows), "--data.image-first-max-t", "1", *model_options(preset, size),
        "--model.patches", patches, "--model.patch-size", str(patch_size),
        "--training.steps", str(numbers.steps), "--training.learning-rate", format_rate(learning_rate),
        "--training.preview-every", "0", "--generation.sampler", "dpm", "--generation.steps", "20", *more,
    )  # fmt: skip
    return Variant(name, arguments, paper=paper or {})


def measure(preset: str, engine: Engine) -> dict[str, float]:
    """Accuracy of drawn scenes, image metrics against real scenes, caption accuracy and the conditioning gap.

    Real scenes are the rendered pixels, without the run's codec.
    """
    source = Shapes(PRESETS[preset].level, split="heldout")
    accuracy, drawn = draw_scenes(engine, source, NUM_SCENES)
    real = [source[n].pair[1] for n in range(NUM_SCENES)]
    features = small_network(PRESETS[preset].level)
    scores = image_scores(features(real), features([pixels for _, pixels, _ in drawn]))
    captions = caption_heldout(engine, source, NUM_SCENES)
    attributes = [accuracy[name] for name in ATTRIBUTES]
    return {
        "right": accuracy["everything"], "attributes": sum(attributes) / len(attributes),
        **{name: accuracy[name] for name in ATTRIBUTES},
        **{name: scores[name] for name in ("fid", "kid", "precision", "recall", "density", "coverage")},
        "captions": captions["exact"], "cider": captions.get("cider", float("nan")),
        "gap": conditioning_gap(engine, source, NUM_SCENES)["gap"],
    }  # fmt: skip


def format_rate(value: float) -> str:
    """A learning rate as an option: 0.004 -> "4e-3"."""
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


@cache
def small_network(level: int) -> SmallFeatureNetwork:
    """Train the feature network: the same for all tables of a preset, in less than half a minute."""
    scenes = Shapes(level, split="train")
    captions, images = zip(*(scenes[n].pair for n in range(NUM_TRAINING_SCENES)), strict=True)
    with torch.random.fork_rng(devices=[]):
        return SmallFeatureNetwork("shapes", images, captions)
