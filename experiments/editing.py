"""Section 4.5 at small scale: fine-tune a model of captioned images on a few thousand image edits.

Claim: after fine-tuning on 8,000 edits (source image, instruction, target image) Transfusion applies the instruction and
leaves the rest unchanged. The paper shows examples without a metric. Here a program reads both from the pixels.

Fine-tuning starts from the weights of "Transfusion L" of `experiments.scaling`. An edit is a scene with one object, an
instruction such as "make it green" or "make it a square", and the scene with that change. Source images have no noise and no
loss.

The costs of the fine-tuned row are those of fine-tuning, in addition to those of the base run, which are in the other row.

    python -m experiments.editing
"""

import sys

from experiments import lab, multimodal, scaling
from experiments.edits import measure_edits, write_edits
from experiments.lab import Claim, Column, Options, Table, Variant, run_command
from experiments.scenes import PRESETS

FINE_TUNING = (
    "--training.steps", "600", "--training.learning-rate", "1e-3", "--training.warmup-steps", "50",
    "--data.sources", "edits",
    "--data.mixture-weights", "1",
)  # fmt: skip


def build_table(preset: str) -> Table:
    data, base = multimodal.data_name(preset, "edits", PRESETS[preset].level), base_variant(preset).arguments
    return Table(
        "editing",
        (
            Variant("without fine-tuning", base, data),
            Variant("fine-tuned on 8,000 edits", (*base, *FINE_TUNING), data),
        ),
        {
            "right": Column("edits correct", ".1%"), "changed": Column("instruction applied", ".1%"),
            "stayed": Column("object in place", ".1%"),
        },
        measure_edits,
        (Claim("fine-tuning improves editing", "right", "fine-tuned on 8,000 edits", "without fine-tuning"),),
    )  # fmt: skip


def base_variant(preset: str) -> Variant:
    """The variant that is fine-tuned."""
    return next(variant for variant in scaling.build_table(preset).variants if variant.name == "Transfusion L")


def main(options: Options) -> None:
    """Prepare the edits with the codec and tokenizer of the base run, fine-tune its weights, and measure both variants."""
    table, base_table, base = build_table(options.preset), scaling.build_table(options.preset), base_variant(options.preset)
    lab.check_table(options, table)
    due, (_, tuned) = list(lab.cells_due(options, table)), table.variants
    runs = {seed: lab.cell_folder(options, base_table, base, seed) for _, seed in due}
    missing = [str(seed) for seed, run in runs.items() if not (run / lab.MEASURED).exists()]
    if missing:
        lab.show_table(options, table)
        command = f"python -m experiments.scaling --variants 'Transfusion L' --rerun-stale --seeds {' '.join(missing)}"
        sys.exit(f"the base runs are missing; first run {command}")
    for seed, run in runs.items():
        if not (run / "checkpoints").exists():  # measured in another clone
            lab.train(options, base_table, base, seed)
    data = lab.data_folder(options, tuned.data)
    if due and not (data / "dataset.json").exists():
        level = PRESETS[options.preset].level
        multimodal.prepare(level, options)
        path = write_edits(options.out / "edits-files")
        run_command("data", "prepare", path, "--like", multimodal.lab_folder(options, "latents", level), "--out", data)
    for variant, seed in due:
        is_trained = variant is tuned
        run = lab.train(options, table, variant, seed, "--from", runs[seed]) if is_trained else runs[seed]
        lab.measure_run(options, table, variant, seed, run)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    if not options.show:
        main(options)
    lab.show_table(options, build_table(options.preset))
