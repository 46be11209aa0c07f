"""Tables 6 and 7 in miniature: how are images best cut into patches, how finely, and at which size of model?

Claim (section 4.3.2): patches by the halves of a U-Net draw better than by a linear layer, at any size of patch or model. As
in the paper all see equally many positions in a step, so that larger patches see more images.

By the checker it comes out at every size of patch and model, most of all at S (45 % of scenes right, 11 % with linear
patches; one seed there, three at 16 patches of L); by FID at 16 patches of L, hardly at M, and at S and other patches linear
ones are ahead. 16 patches are better than 64 and than 4 for both. (A run takes 7 to 16 minutes with linear patches and 11 to
22 with a U-Net, beside another.)

    python -m experiments.patches
"""

from functools import partial

from experiments import lab
from experiments.lab import Claim, Table
from experiments.scenes import COLUMNS, measure, variant


def table(scale: str) -> Table:
    return Table(
        "patches",
        (
            variant(scale, "linear, 64 patches", "linear", 1, paper={"fid": 21.0}),
            variant(scale, "linear, 16 patches", paper={"fid": 20.3}),
            variant(scale, "linear, 4 patches", "linear", 4, paper={"fid": 25.6}),
            variant(scale, "U-Net, 64 patches", "unet", 1),
            variant(scale, "U-Net, 16 patches", "unet", paper={"fid": 16.7}),
            variant(scale, "U-Net, 4 patches", "unet", 4, paper={"fid": 16.0}),
            variant(scale, "linear, 16 patches, S", "linear", 2, "S", paper={"fid": 37.6}),
            variant(scale, "U-Net, 16 patches, S", "unet", 2, "S", paper={"fid": 18.8}),
            variant(scale, "linear, 16 patches, M", "linear", 2, "M", paper={"fid": 21.5}),
            variant(scale, "U-Net, 16 patches, M", "unet", 2, "M", paper={"fid": 18.1}),
        ),
        COLUMNS,
        (
            *(Claim(f"a U-Net beats linear patches, by {judge}, {rest}", column, f"U-Net, {rest}", f"linear, {rest}")
              for rest in ("64 patches", "16 patches", "4 patches", "16 patches, S", "16 patches, M")
              for column, judge in (("fid", "FID"), ("right", "the checker"))),
            Claim("a U-Net at 16 patches draws as well as at 64, to 15 %", "right", "U-Net, 16 patches", "U-Net, 64 patches",
                  margin=0.15),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    asked = lab.options(__doc__)
    lab.make(asked, table(asked.scale), partial(measure, asked.scale))
