"""Tables 6 and 7 at small scale: linear or U-Net patches, by patch size and model size.

Claim (section 4.3.2): U-Net patches give better images than linear patches at every patch size and model size. As in the
paper all variants train on the same number of positions per step, so larger patches train on more images.

Partly reproduced. By images correct the U-Net is better at every patch size and model size, most of all at S (45 % of scenes
correct against 11 % with linear patches; one seed there, three at 16 patches of L). By FID it is better at 16 patches of L
and slightly better at M; linear patches are better at S and at other patch sizes. 16 patches are better than 64 and than 4
for both. (A run takes 7 to 16 minutes with linear patches and 11 to 22 with a U-Net, with another run on the same machine.)

    python -m experiments.patches
"""

from experiments import lab
from experiments.lab import Claim, Table
from experiments.scenes import COLUMNS, make_variant, measure


def build_table(preset: str) -> Table:
    return Table(
        "patches",
        (
            make_variant(preset, "linear, 64 patches", "linear", 1, paper={"fid": 21.0}),
            make_variant(preset, "linear, 16 patches", paper={"fid": 20.3}),
            make_variant(preset, "linear, 4 patches", "linear", 4, paper={"fid": 25.6}),
            make_variant(preset, "U-Net, 64 patches", "unet", 1),
            make_variant(preset, "U-Net, 16 patches", "unet", paper={"fid": 16.7}),
            make_variant(preset, "U-Net, 4 patches", "unet", 4, paper={"fid": 16.0}),
            make_variant(preset, "linear, 16 patches, S", "linear", 2, "S", paper={"fid": 37.6}),
            make_variant(preset, "U-Net, 16 patches, S", "unet", 2, "S", paper={"fid": 18.8}),
            make_variant(preset, "linear, 16 patches, M", "linear", 2, "M", paper={"fid": 21.5}),
            make_variant(preset, "U-Net, 16 patches, M", "unet", 2, "M", paper={"fid": 18.1}),
        ),
        COLUMNS,
        measure(preset),
        (
            *(Claim(f"a U-Net is better than linear patches, by {COLUMNS[column].title}, {setting}", column,
                    f"U-Net, {setting}", f"linear, {setting}")
              for setting in ("64 patches", "16 patches", "4 patches", "16 patches, S", "16 patches, M")
              for column in ("fid", "right")),
            Claim("a U-Net with 16 patches is non-inferior to one with 64, by images correct within 15 %", "right",
                  "U-Net, 16 patches", "U-Net, 64 patches", margin=0.15),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
