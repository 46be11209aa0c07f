"""Table 6 in miniature: is an image better cut into patches by a linear layer or by the halves of a U-Net, and how finely?

Claim (section 4.2, Tables 6 and 7): U-Net patches draw better than linear ones of any size, and lose less as they grow.
Here: scenes of `shapes` with one thing each, 32x32 pixels, as latents of 8x8 (principal components of blocks), cut into 64
patches (1x1) or 16 (2x2). As in the paper all see equally many positions in a step, so that larger patches see more images.
Linear patches learn at the rate of `shapes`, 4e-3; a U-Net's convolutions want less, 2e-3.

    python -m experiments.patches --out runs/patches
"""

from collections.abc import Mapping

from experiments import lab
from experiments.lab import Variant
from transfusion.data.sources import open_raw
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import Engine

SCENES = 200  # held-out captions, one drawing each
COLUMNS = {
    "everything": ".1%", "shape": ".1%", "count": ".1%", "colour": ".1%", "size": ".1%", "place": ".1%",
    "image_loss": ".4f", "text_loss": ".3f", "minutes": ".1f",
}  # fmt: skip


def variants(sides: tuple[int, int], *data: str) -> list[Variant]:
    """Linear and U-Net, 64 patches and 16, of these sides; `data`: what they read."""
    shared = (
        "shapes", *data, "--data.row-length", "320", "--data.rows", "6", "--training.preview-every", "0",
        "--training.steps", "1200", "--generation.sampler", "dpm", "--generation.steps", "20",
    )  # fmt: skip
    return [
        Variant(
            f"{name}, {patches} patches",
            (*shared, "--model.patches", kind, "--model.patch-size", str(side), "--training.learning-rate", rate),
        )
        for patches, side in zip((64, 16), sides, strict=True)
        for name, kind, rate in (("linear", "linear", "4e-3"), ("U-Net", "unet", "2e-3"))
    ]


def measure(engine: Engine) -> Mapping[str, float]:
    """The share of drawn scenes that are right in everything, and in each thing."""
    (source,) = open_raw(engine.run.data, "heldout")
    return draw_scenes(engine, source, SCENES)[0]


if __name__ == "__main__":
    asked = lab.options(__doc__, "runs/patches")
    rows = variants((1, 2), "--data.level", "0")
    lab.fill(asked, rows, measure)
    lab.show(asked, rows, COLUMNS)
