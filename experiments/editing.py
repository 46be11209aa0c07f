"""Section 4.5 at small scale: fine-tune a model of captioned images on a few thousand image edits.

Claim: after fine-tuning on 8,000 edits (source image, instruction, target image) Transfusion applies the instruction and
leaves the rest unchanged. The paper shows examples without a metric. Here a program reads both from the pixels.

Fine-tuning starts from the weights of "Transfusion L" of `experiments.scaling`. An edit is a scene with one object, an
instruction such as "make it green" or "make it a square", and the scene with that change. Source images have no noise and no
loss.

Reproduced (one seed): 70 % of held-out edits apply the instruction and 85 % keep the object in its place. Without
fine-tuning the model draws an unrelated scene. (4 minutes of one core, in addition to the base run.)

    python -m experiments.editing
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from experiments import lab, multimodal, scaling
from experiments.lab import Claim, Column, Options, Table, Variant, cell_folder, run_command
from transfusion.data.built_in.shapes import COLOURS, SHAPES, Description, Scene, Shapes, caption, render
from transfusion.evaluation.shapes import judge, read_scene
from transfusion.inference.engine import Engine, Request
from transfusion.seeding import derive_seed

NUM_EDITS = 8_421  # 8,000 for training, as in the paper: `prepare` holds out one in twenty
NUM_HELDOUT = 300
MAX_SHIFT = 2.0  # pixels; an object that moved no farther has stayed in place
FINE_TUNING = (
    "--training.steps", "600", "--training.learning-rate", "1e-3", "--training.warmup-steps", "50",
    "--data.sources", "edits",
    "--data.mixture-weights", "1",
)  # fmt: skip


def build_table(preset: str) -> Table:
    data, base = multimodal.folder_name(preset, "edits"), base_variant(preset).arguments
    return Table(
        "editing",
        (
            Variant("without fine-tuning", base, data),
            Variant("fine-tuned on 8,000 edits", (*base, *FINE_TUNING), data),
        ),
        {
            "right": Column("edits correct", ".1%"), "changed": Column("instruction applied", ".1%"),
            "stayed": Column("object in place", ".1%"), "minutes": Column("minutes", ".1f", "lower"),
        },
        (Claim("fine-tuning improves editing", "right", "fine-tuned on 8,000 edits", "without fine-tuning"),),
    )  # fmt: skip


def base_variant(preset: str) -> Variant:
    """The variant that is fine-tuned."""
    return next(variant for variant in scaling.build_table(preset).variants if variant.name == "Transfusion L")


def generate_edits(split: str, count: int) -> Iterator[tuple[Scene, str, Scene]]:
    """Yield (source scene, instruction, target scene). The random numbers of an edit depend only on its index."""
    source = Shapes(level=0, split=split)
    for n in range(count):
        rng = np.random.default_rng(derive_seed("edit", split, n))
        scene = source.scene(n)
        (scene_object,) = scene.objects
        if rng.random() < 0.5:
            (colour,) = rng.choice([name for name in COLOURS if name != scene_object.colour], 1)
            instruction, changed = f"make it {colour}", replace(scene_object, colour=str(colour))
        else:
            (shape,) = rng.choice([name for name in SHAPES if name != scene_object.shape], 1)
            instruction, changed = f"make it a {shape}", replace(scene_object, shape=str(shape))
        yield scene, instruction, Scene(Description((changed,), (1,)), scene.centres)


def write_edits(folder: Path) -> Path:
    """Write the training edits in the format for user data: image files and a JSON Lines file. Return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "edits.jsonl").open("w", encoding="utf-8") as file:
        for n, (before, instruction, after) in enumerate(generate_edits("train", NUM_EDITS)):
            for name, scene in (("before", before), ("after", after)):
                PILImage.fromarray(render(scene)).save(folder / f"{n:05d}-{name}.png")
            line = {"source": f"{n:05d}-before.png", "instruction": instruction, "target": f"{n:05d}-after.png"}
            file.write(json.dumps(line) + "\n")
    return folder / "edits.jsonl"


def measure(engine: Engine) -> dict[str, float]:
    """Shares of held-out edits: fully correct, the instructed attribute changed, the object stayed in place."""
    edits = list(generate_edits("heldout", NUM_HELDOUT))
    requests = [Request((render(before), instruction), 1, seed=n) for n, (before, instruction, _) in enumerate(edits)]
    images = [answer.parts[-1] for (answer,) in engine.generate(requests)]
    judgements = [judge(caption(after), pixels) for (_, _, after), pixels in zip(edits, images, strict=True)]
    stayed = [_has_stayed(pixels, before) for (before, _, _), pixels in zip(edits, images, strict=True)]
    changed = [judgement.colour if instruction.split()[2] in COLOURS else judgement.shape
               for (_, instruction, _), judgement in zip(edits, judgements, strict=True)]  # fmt: skip
    return {
        "right": np.mean([judgement.everything and near for judgement, near in zip(judgements, stayed, strict=True)]).item(),
        "changed": np.mean(changed).item(), "stayed": np.mean(stayed).item(),
    }  # fmt: skip


def _has_stayed(pixels: np.ndarray, before: Scene) -> bool:
    detected = read_scene(pixels)
    if len(detected) != 1:
        return False
    return max(abs(a - b) for a, b in zip(detected[0].centre, before.centres[0], strict=True)) <= MAX_SHIFT


def main(options: Options) -> None:
    """Prepare the edits with the codec and tokenizer of the base run, fine-tune its weights, and measure both variants."""
    base, (before, tuned) = base_variant(options.preset), build_table(options.preset).variants
    lab.check_names(options, (before, tuned))
    missing = [str(seed) for seed in options.seeds if not (cell_folder(options, base, seed) / "measured.json").exists()]
    if missing:
        lab.show_table(options, build_table(options.preset))
        command = f"python -m experiments.scaling --variants 'Transfusion L' --seeds {' '.join(missing)}"
        sys.exit(f"the base runs are missing; first run {command}")
    multimodal.prepare(options)
    selected = [variant for variant in (before, tuned) if not options.variants or variant.name in options.variants]
    data = options.out / tuned.data
    if not (data / "dataset.json").exists():
        path = write_edits(options.out / "edits-files")
        run_command("data", "prepare", path, "--like", multimodal.lab_folder(options, "latents"), "--out", data)
    for seed in options.seeds:
        base_run = cell_folder(options, base, seed)
        for variant in selected:
            if (cell_folder(options, variant, seed) / "measured.json").exists():
                continue
            arguments = (*variant.arguments, "--from", base_run, "--data", data)
            run = base_run if variant is before else lab.train(options, variant, seed, arguments)
            lab.measure_run(options, variant, seed, run, measure)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    if not options.show:
        main(options)
    lab.show_table(options, build_table(options.preset))
