"""Table 6 in miniature: is an image better cut into patches by a linear layer or by the halves of a U-Net, and how finely?

Claim (section 4.2, Tables 6 and 7): U-Net patches draw better than linear ones of any size, and lose less as they grow.
Here: scenes of `shapes` with one thing each, 64x64 pixels, through an autoencoder trained on scenes (f = 4: latents of
16x16), cut into 64 patches (2x2) or 16 (4x4). As in the paper all see equally many positions in a step, so that larger
patches see more images. Linear patches learn at the rate of `shapes`, 4e-3; at that rate a U-Net learns to denoise in these
steps but not what captions say, so it has 1.5e-3.

    python -m experiments.patches --out runs/patches
"""

from collections.abc import Mapping
from pathlib import Path

from experiments import lab
from experiments.lab import Variant, transfusion
from transfusion.data.sources import open_raw
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import Engine

SIDE = 64  # pixels
PICTURES = 20_000  # for the autoencoder
DOCUMENTS = 40_000  # for the transformer
SCENES = 200  # held-out captions, one drawing each
COLUMNS = {
    "everything": ".1%", "shape": ".1%", "count": ".1%", "colour": ".1%", "size": ".1%", "place": ".1%",
    "image_loss": ".4f", "text_loss": ".3f", "minutes": ".1f",
}  # fmt: skip


def variants(data: Path) -> list[Variant]:
    """U-Net and linear, 64 patches and 16."""
    shared = (
        "shapes", "--data", str(data), "--data.row-length", "320", "--data.rows", "6", "--training.preview-every", "0",
        "--training.steps", "1500", "--generation.sampler", "dpm", "--generation.steps", "20",
    )  # fmt: skip
    return [
        Variant(
            f"{name}, {patches} patches",
            (*shared, "--model.patches", kind, "--model.patch-size", str(side), "--training.learning-rate", rate),
        )
        for patches, side in ((64, 2), (16, 4))
        for name, kind, rate in (("linear", "linear", "4e-3"), ("U-Net", "unet", "1.5e-3"))
    ]


def prepare(out: Path) -> Path:
    """The autoencoder and what it makes of the scenes; where that is there already, a look."""
    size = f"{SIDE}x{SIDE}"
    world = ("shapes", "--shapes-size", str(SIDE))
    if not (out / "codec" / "reconstructions.html").exists():
        transfusion("data", "fit-codec", "small", *world, "--size", size, "--most", str(PICTURES), "--out", out / "codec")
    transfusion("data", "prepare", *world, "--shapes-level", "0", "--sizes", size, "--limit", str(DOCUMENTS),
                "--codec", out / "codec", "--out", out / "data")  # fmt: skip
    return out / "data"


def measure(engine: Engine) -> Mapping[str, float]:
    """The share of drawn scenes that are right in everything, and in each thing."""
    (source,) = open_raw(engine.run.data, "heldout")
    return draw_scenes(engine, source, SCENES)[0]


if __name__ == "__main__":
    asked = lab.options(__doc__, "runs/patches")
    rows = variants(prepare(asked.out))
    lab.fill(asked, rows, measure)
    lab.show(asked, rows, COLUMNS)
