"""Table 5 in miniature: should the patches of an image see each other, or only the ones before?

Claim (section 4.3.1): with linear patches attention in both directions is much better than causal (FID 20.3 against 61.3 at
0.76B); with a U-Net, whose convolutions see both ways already, hardly.

It comes out: with linear patches the causal run draws a third as many scenes right as the other, and at more than twice the
FID; with a U-Net they are alike, and better than either. (A run takes 5 minutes of one core with linear patches, 14 with a
U-Net, and two more to be measured.)

    python -m experiments.attention
"""

from functools import partial

from experiments import lab
from experiments.lab import Claim, Table
from experiments.scenes import COLUMNS, measure, variant

CAUSAL = "--model.image-attention", "causal"


def table(scale: str) -> Table:
    return Table(
        "attention",
        (
            variant(scale, "linear, causal", "linear", 2, "L", *CAUSAL, paper={"fid": 61.3}),
            variant(scale, "linear, bidirectional", paper={"fid": 20.3}),
            variant(scale, "U-Net, causal", "unet", 2, "L", *CAUSAL, paper={"fid": 16.8}),
            variant(scale, "U-Net, bidirectional", "unet", paper={"fid": 16.7}),
        ),
        COLUMNS,
        (
            Claim("bidirectional beats causal for linear patches, by FID", "fid", "linear, bidirectional", "linear, causal"),
            Claim("bidirectional beats causal for linear patches, by the checker", "right", "linear, bidirectional",
                  "linear, causal"),
            Claim("bidirectional beats causal for a U-Net, by FID", "fid", "U-Net, bidirectional", "U-Net, causal"),
            Claim("a U-Net beats linear patches, by FID", "fid", "U-Net, bidirectional", "linear, bidirectional"),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    asked = lab.options(__doc__)
    lab.make(asked, table(asked.scale), partial(measure, asked.scale))
