"""Shared setup of the tables on images: one object per scene of `shapes`, 32x32 pixels, latents of 8x8 (PCA of pixel
blocks), 16 patches. All variants train on the same number of positions per step.

All tables measure the same quantities, so that they can share variants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from experiments.lab import Column, Measure, Variant
from experiments.measures import measure_scenes

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


def measure(preset: str) -> Measure:
    """The measurements of a run on scenes."""
    return partial(measure_scenes, PRESETS[preset].level)


def format_rate(value: float) -> str:
    """A learning rate as an option: 0.004 -> "4e-3"."""
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"
