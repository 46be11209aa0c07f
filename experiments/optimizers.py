"""Muon beside AdamW, on `digits` and `shapes`, with the same number of steps. Not in the paper, which uses AdamW.

Claim (2502.16982): with updates of AdamW's size, Muon needs about half of AdamW's training FLOPs for the same loss, with
AdamW's learning rate and weight decay. Here both use the learning rate of the run, which was chosen for AdamW.

    python -m experiments.optimizers
"""

from experiments import lab
from experiments.lab import Claim, Column, Table, Variant
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.inference.engine import Engine

NUM_CAPTIONS = 400
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
        [
            Claim(f"Muon is better than AdamW on {run}, by {columns[name].title}", name, "Muon", "AdamW")
            for name in columns if name != "minutes"
        ],
    )  # fmt: skip


def measure(engine: Engine) -> dict[str, float]:
    """Accuracy of greedy captions of held-out images."""
    source = next(source for source in open_raw(engine.run.data, "heldout") if source.name in LOSSES)
    return {"captions": caption_heldout(engine, source, NUM_CAPTIONS)["exact"]}


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    for run in LOSSES:
        lab.run_table(options, build_table(run), measure)
