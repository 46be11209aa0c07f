"""Muon beside AdamW, on `digits` and `shapes`, with the same number of steps. Not in the paper, which uses AdamW.

Claim (2502.16982): with updates of AdamW's size, Muon needs about half of AdamW's training FLOPs for the same loss, with
AdamW's learning rate and weight decay. Here both use the learning rate of the run, which was chosen for AdamW.

    python -m experiments.optimizers
"""

from functools import partial

from experiments import lab
from experiments.lab import Claim, Column, Table, Variant
from experiments.measures import measure_captions

LOSSES = {  # run -> held-out losses by the names in its cells, and their titles
    "digits": {"digits_text_loss": "caption loss", "digits_image_loss": "image loss", "topics_text_loss": "text loss"},
    "shapes": {"text_loss": "caption loss", "image_loss": "image loss"},
}  # fmt: skip


def build_table(run: str) -> Table:
    columns = {
        **{name: Column(title, ".4f", "lower") for name, title in LOSSES[run].items()},
        "captions": Column("caption exact match", ".1%"), "minutes": Column("minutes", ".1f", "lower"),
    }  # fmt: skip
    arguments = run, "--training.preview-every", "0"
    return Table(
        f"optimizers-{run}",
        (Variant("AdamW", arguments), Variant("Muon", (*arguments, "--training.optimizer", "muon"))),
        columns,
        partial(measure_captions, run),
        [
            Claim(f"Muon is better than AdamW on {run}, by {columns[name].title}", name, "Muon", "AdamW")
            for name in columns if name != "minutes"
        ],
    )  # fmt: skip


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    for run in LOSSES:
        lab.run_table(options, build_table(run))
