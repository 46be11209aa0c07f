"""Section 4.5 at small scale: fine-tune a model of captioned images on a few thousand image edits.

Claim: after fine-tuning on 8,000 edits (source image, instruction, target image) Transfusion applies the instruction and
leaves the rest unchanged. The paper shows examples without a metric. Here a program reads both from the pixels.

Fine-tuning starts from the weights of "Transfusion L" of `experiments.scaling`. An edit is a scene with one object, an
instruction such as "make it green" or "make it a square", and the scene with that change. Source images have no noise and no
loss.

The costs of the fine-tuned row are those of fine-tuning, in addition to those of the base run, which are in the other row.

    python -m experiments.editing
"""

from experiments import lab, multimodal, scaling
from experiments.edits import measure_edits, write_edits
from experiments.lab import Claim, Column, Options, Table, Variant
from experiments.scenes import PRESETS

FINE_TUNING = (
    "--training.steps", "600", "--training.learning-rate", "1e-3", "--training.warmup-steps", "50",
    "--data.sources", "edits",
    "--data.mixture-weights", "1",
)  # fmt: skip


def build_table(preset: str) -> Table:
    data, base = multimodal.data_name(preset, "edits", PRESETS[preset].level), scaling.build_table(preset)
    (large,) = (variant for variant in base.variants if variant.name == "Transfusion L")
    return Table(
        "editing",
        (
            Variant("without fine-tuning", (), data, start=(base, large)),
            Variant("fine-tuned on 8,000 edits", (*large.arguments, *FINE_TUNING), data, start=(base, large)),
        ),
        {
            "right": Column("edits correct", ".1%"), "changed": Column("instruction applied", ".1%"),
            "stayed": Column("object in place", ".1%"),
        },
        measure_edits,
        (Claim("fine-tuning improves editing", "right", "fine-tuned on 8,000 edits", "without fine-tuning"),),
        prepare,
    )  # fmt: skip


def prepare(options: Options) -> None:
    """Prepare the edits with the codec and tokenizer of the base run. Skip what exists."""
    multimodal.prepare_documents(options, "edits", write_edits)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
