"""Image edits of scenes with one object, as user data and as measured on a run, for the tables of `editing` and
`copies`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from transfusion.data.built_in.shapes import COLOURS, SHAPES, Description, Scene, Shapes, caption, render
from transfusion.evaluation.shapes import judge, read_scene
from transfusion.inference.engine import Engine, Request
from transfusion.seeding import derive_seed

NUM_EDITS = 8_421  # 8,000 for training, as in the paper: `prepare` holds out one in twenty
NUM_HELDOUT = 300
MAX_SHIFT = 2.0  # pixels; an object that moved no farther has stayed in place


def generate_edits(split: str, count: int, seed: int = 0) -> Iterator[tuple[Scene, str, Scene]]:
    """Yield (source scene, instruction, target scene). An edit depends only on its index and the seed."""
    source = Shapes(level=0, split=split, seed=seed)
    for n in range(count):
        rng = np.random.default_rng(derive_seed("edit", split, seed * count + n))
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


def measure_edits(engine: Engine) -> dict[str, float]:
    """What `judge_edits` returns for the run's edits of held-out scenes, other ones for each seed."""
    seed = engine.run.training.seed
    edits = [*generate_edits("heldout", NUM_HELDOUT, seed)]
    requests = [Request((render(before), instruction), 1, seed=seed * NUM_HELDOUT + n)
                for n, (before, instruction, _) in enumerate(edits)]  # fmt: skip
    return judge_edits(edits, [answer.parts[-1] for (answer,) in engine.generate(requests)])


def judge_edits(edits: Sequence[tuple[Scene, str, Scene]], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Shares of the images that were drawn for these edits: fully correct, the instructed attribute changed, the object
    stayed in place."""
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
