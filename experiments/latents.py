"""The table of patches at 64x64 pixels, through an autoencoder that was trained on the same world: latents of 16x16, f = 4.

Claim: as in experiments/patches.py, whose variants these are; patches of 2x2 and 4x4 latent pixels, of 32 and 128 numbers.

    python -m experiments.latents --out runs/latents
"""

from pathlib import Path

from experiments import lab
from experiments.lab import transfusion
from experiments.patches import COLUMNS, measure, variants

SIZE = "64x64"
WORLD = ("shapes", "--shapes-size", "64")
PICTURES, DOCUMENTS = "20000", "40000"  # for the autoencoder, for the transformer


def prepare(out: Path) -> Path:
    """The autoencoder and what it makes of the scenes; where that is there already, a look."""
    codec, data = out / "codec", out / "data"
    if not (codec / "reconstructions.html").exists():
        transfusion("data", "fit-codec", "small", *WORLD, "--size", SIZE, "--most", PICTURES,
                    "--out", codec)  # fmt: skip
    one = ("--shapes-level", "0", "--limit", DOCUMENTS)
    transfusion("data", "prepare", *WORLD, *one, "--sizes", SIZE, "--codec", codec, "--out", data)
    return data


if __name__ == "__main__":
    asked = lab.options(__doc__, "runs/latents")
    rows = variants((2, 4), "--data", str(prepare(asked.out)))
    lab.fill(asked, rows, measure)
    lab.show(asked, rows, COLUMNS)
