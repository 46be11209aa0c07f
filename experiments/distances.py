"""How feature distances and the checker of `shapes` respond to known faults of real scenes.

    python -m experiments.distances

400 held-out scenes are changed by one fault at each strength and compared with 400 other held-out scenes by the features of
the tables (`measures.small_network`). The table goes into docs/evaluation.md.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from experiments.lab import DOCS, format_markdown
from experiments.measures import NUM_SCENES, small_network
from experiments.page import write_output
from experiments.scenes import PRESETS
from transfusion.data.built_in.shapes import (
    BACKGROUND,
    BOXES,
    CANVAS,
    COLOURS,
    SHAPES,
    Description,
    Scene,
    Shapes,
    caption,
    coverage,
    render,
)
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.scenes import judge_scenes
from transfusion.evaluation.shapes import RIVALS, profile_coverage

BLURS = 0.5, 0.75, 1.0, 1.5, 2.0  # standard deviation in pixels
SHARES = 0.1, 0.2, 0.4, 1.0  # of the scenes
NOISES = 8.0, 16.0, 32.0  # standard deviation, of 255


def main() -> None:
    level = PRESETS["cpu"].level
    source, features = Shapes(level, split="heldout"), small_network(level)
    real = features([source[n].pair[1] for n in range(NUM_SCENES)])
    scenes = [source.scene(NUM_SCENES + n) for n in range(NUM_SCENES)]
    rows = []
    for name, images in change_scenes(scenes).items():
        scores = image_scores(real, features(images))
        right = judge_scenes([caption(scene) for scene in scenes], images)[0]["everything"]
        figures = f"{scores['fid']:.2f}", f"{scores['kid']:.3f}", f"{scores['precision']:.2f}", f"{scores['recall']:.2f}"
        rows.append([name, *figures, f"{right:.0%}"])
    table = format_markdown(["", "FID", "KID", "precision", "recall", "images correct"], rows)
    write_output(DOCS / "evaluation.md", "python -m experiments.distances", table)


def change_scenes(scenes: Sequence[Scene]) -> dict[str, list[np.ndarray]]:
    """The images (32, 32, 3) uint8 of the scenes with each fault, by its name."""
    images = [render(scene) for scene in scenes]
    faults = {
        "another shape": [render(change_shape(scene)) for scene in scenes],
        "an arch as shape": [draw_rival(scene, "arch") for scene in scenes],
        "no object": [np.full_like(image, BACKGROUND) for image in images],
    }
    rng = np.random.default_rng(0)
    order = rng.permutation(len(scenes))
    changed = {"none": images}
    for sigma in BLURS:
        changed[f"blur, {sigma} pixels"] = [ndimage.gaussian_filter(image, (sigma, sigma, 0)) for image in images]
    for std in NOISES:
        noisy = [image + rng.normal(0, std, image.shape) for image in images]
        changed[f"noise, {std:.0f} of 255"] = [image.round().clip(0, 255).astype(np.uint8) for image in noisy]
    for name, faulty in faults.items():
        for share in SHARES:
            chosen = set(order[: round(share * len(scenes))].tolist())
            changed[f"{name}, {share:.0%} of scenes"] = [
                faulty[n] if n in chosen else image for n, image in enumerate(images)
            ]
    return changed


def change_shape(scene: Scene) -> Scene:
    """The scene with the next shape in place of its first."""
    first, *others = scene.objects
    shape = SHAPES[(SHAPES.index(first.shape) + 1) % len(SHAPES)]
    objects = replace(first, shape=shape), *others
    return Scene(Description(objects, (1,) * len(objects)), scene.centres)


def draw_rival(scene: Scene, rival: str) -> np.ndarray:
    """The image of an arch or a mound of the area, the centre of mass and the colour of the scene's only object."""
    (item,), (centre,) = scene.objects, scene.centres
    box = BOXES[item.size, item.shape]
    ideal = coverage(item.shape, box, centre)  # (Y, X)
    at = np.arange(CANVAS) + 0.5
    x, y = (np.average(at, weights=ideal.sum(axis)) for axis in (0, 1))
    side = float(np.sqrt(ideal.sum() / RIVALS[rival]((np.arange(64) + 0.5) / 64).mean()))
    mask = profile_coverage(RIVALS[rival], (side, side), (x, y), CANVAS)  # (Y, X)
    return (BACKGROUND + mask[..., None] * np.subtract(COLOURS[item.colour], BACKGROUND)).round().astype(np.uint8)


if __name__ == "__main__":
    main()
