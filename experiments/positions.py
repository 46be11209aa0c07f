"""Positions of patches in one or two dimensions, at small scale.

Not in the paper, whose patches are numbered along the sequence. Most systems since have rotary positions of rows and columns
(`model.image_rope` 2d). Both rows have linear patches, 64 of them; they differ in nothing else, and have equal parameters.
"1d" is "linear, 64 patches" of Tables 6 and 7.

    python -m experiments.positions
"""

from experiments import lab
from experiments.lab import Claim, Table
from experiments.scenes import COLUMNS, make_variant, measure

COMPARED = "right", "fid", "captions", "image_loss", "text_loss"  # columns


def build_table(preset: str) -> Table:
    return Table(
        "positions",
        (
            make_variant(preset, "1d", "linear", 1),
            make_variant(preset, "2d", "linear", 1, "L", "--model.image-rope", "2d"),
        ),
        COLUMNS,
        measure(preset),
        tuple(Claim(f"2d is better than 1d, by {COLUMNS[name].title}", name, "2d", "1d") for name in COMPARED),
    )  # fmt: skip


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
