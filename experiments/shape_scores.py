"""The weights of the checker of `shapes`, `SCORES` in evaluation/shapes.py: python -m experiments.shape_scores

A logistic regression on the labels of two readers (docs/results/checker-tuning) and on made objects: real scenes, also
noisy, blurred, shifted, faded, with specks, and as the codec `block_pca` keeps them; and objects without a shape. It prints
the table, and writes Cohen's kappa of the shapes of readers and checker into docs/evaluation.md, out of fold: the drawings
of a run are read with weights that were fitted without that run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from experiments import checker
from experiments.blobs import overlap, sample_blobs
from experiments.distances import draw_rival
from experiments.lab import DOCS, format_markdown
from experiments.page import write_output
from transfusion.data.built_in.shapes import BACKGROUND, CANVAS, SHAPES, render, sample_scene
from transfusion.evaluation.shapes import FEATURES, RIVALS, find_objects, measure

TUNING = DOCS / "results" / "checker-tuning"
WORDS = (*SHAPES, "none")
SHAPED_WEIGHT = 1.5  # of a label with a shape; one without has 1
INVERSE_PENALTY = 10.0  # of the weights of standardised features
SCENES, CODEC_SCENES, BLOCK, COMPONENTS = 60, 100, 4, 6
DEGRADATIONS = ((0, 0, 0), (24, 0, 0), (0, 1.0, 0), (0, 0, 0.5), (12, 0.7, 0.5))  # noise, blur and shift
MAX_OVERLAPS = {"blob": 0.75, "mound": 0.85, "peak": 0.8, "half disc": 1, "star": 1}
# Of an object. Faults that are nearest to a shape have most, so that the readers' labels do not outweigh them.
MADE_WEIGHTS = {"scene": 0.2, "specks": 2.0, "codec": 1.5, "blob": 0.5, "mound": 0.5, "peak": 3.0, "half disc": 0.2,
                "star": 0.2, "rival": 4.0}  # fmt: skip

Row = tuple[np.ndarray, str, float]  # features, shape, weight


def main() -> None:
    made, images = list(make_rows()), checker.read_pictures(TUNING)
    readers = {path.stem[-1]: checker.read_labels(path, len(images)) for path in sorted(TUNING.glob("checker-reader-*.csv"))}
    runs = np.array(json.loads((TUNING / "checker-drawings.json").read_text(encoding="utf-8")))
    read = [checker.read_picture(pixels) for pixels in images]
    features = [[measure(covered) for covered, _ in find_objects(pixels)] for pixels in images]
    rows = [list(label_rows(*it)) for it in zip(read, features, *readers.values(), strict=True)]  # by picture
    scores = fit([*made, *sum(rows, [])])
    for feature, weights in zip(FEATURES, scores, strict=True):
        print(f"    [{', '.join(f'{weight:6.2f}' for weight in weights)}],  # {feature}")
    for run in np.unique(runs):
        fold = fit([*made, *sum((rows[n] for n in np.flatnonzero(runs != run)), [])])
        for n in np.flatnonzero(runs == run):
            read[n] = [it._replace(shape=predict(f, fold)) for it, f in zip(read[n], features[n], strict=True)]
    values = [[f"reader {name} and checker", checker.measure(labels, read)["shape"]] for name, labels in readers.items()]
    text = format_markdown(["Cohen's kappa, out of fold", "shape"], values)
    write_output(DOCS / "evaluation.md", "python -m experiments.shape_scores", text)


def label_rows(read: list, features: Sequence[np.ndarray], *readers: list) -> Iterator[Row]:
    """Each reader's label of each object that the checker finds; an object that a reader does not list has no shape."""
    for labels in readers:
        for label, found in checker.match(labels, read):
            if found is not None:
                shape = label.shape if label else "none"
                index = next(n for n, it in enumerate(read) if it is found)
                yield features[index], shape, 1.0 if shape == "none" else SHAPED_WEIGHT


def make_rows() -> Iterator[Row]:
    """Made objects. All their scenes and seeds are others than those of the tests."""
    rng = np.random.default_rng(0)
    for strengths in DEGRADATIONS:
        yield from scene_rows("scene", range(5000, 5000 + SCENES), partial(checker.degrade, rng=rng), strengths)
    yield from scene_rows("scene", range(6000, 6000 + SCENES), fade, ())
    yield from scene_rows("specks", range(8000, 8000 + 2 * SCENES), partial(add_specks, rng=rng), ())
    yield from scene_rows("codec", range(7000, 7000 + CODEC_SCENES), lossy, fit_codec())
    for kind, max_overlap in MAX_OVERLAPS.items():
        yield from shapeless_rows(kind, sample_blobs(kind, SCENES, max_overlap, seed=9), max_overlap)
    for rival in RIVALS:
        yield from shapeless_rows("rival", (draw_rival(sample_scene(0, 900 + n), rival) for n in range(SCENES)))


def scene_rows(kind: str, seeds: Sequence[int], change: Callable, arguments: tuple) -> Iterator[Row]:
    """The objects of changed scenes. Each has the shape of the nearest one of its scene."""
    for seed in seeds:
        scene = sample_scene(seed % 3, seed)
        for covered, _ in find_objects(change(render(scene), *arguments)):
            y, x = ndimage.center_of_mass(covered)
            distances = [np.hypot(x + 0.5 - at[0], y + 0.5 - at[1]) for at in scene.centres]
            yield measure(covered), scene.objects[int(np.argmin(distances))].shape, MADE_WEIGHTS[kind]


def shapeless_rows(kind: str, images: Iterable[np.ndarray], max_overlap: float = 1) -> Iterator[Row]:
    """The objects of images without a shape. A blob with a narrow neck is read as two, which may be nearly a shape each."""
    for pixels in images:
        for covered, _ in find_objects(pixels):
            if overlap(covered) <= max_overlap:
                yield measure(covered), "none", MADE_WEIGHTS[kind]


def fade(pixels: np.ndarray) -> np.ndarray:
    """Three quarters of the contrast, blurred by 3 x 3 pixels."""
    faded = np.array(BACKGROUND) + 0.75 * (pixels - np.float32(BACKGROUND))
    return ndimage.uniform_filter(faded, (3, 3, 0)).round().astype(np.uint8)


def add_specks(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise, and six specks of one or two pixels of any colour."""
    image = checker.degrade(pixels, 12, 0, 0, rng)
    for y, x in rng.integers(0, CANVAS - 1, (6, 2)):
        image[y, x : x + rng.integers(1, 3)] = rng.integers(0, 256, 3)
    return image


def fit_codec() -> tuple[np.ndarray, np.ndarray]:
    """Mean (48,) and principal components (48, 6) of the blocks of scenes of level 1."""
    blocks = np.concatenate([to_blocks(render(sample_scene(1, 2 * n))) for n in range(600)])  # (blocks, 48)
    centre = blocks.mean(0)
    return centre, np.linalg.eigh((blocks - centre).T @ (blocks - centre))[1][:, -COMPONENTS:]


def to_blocks(pixels: np.ndarray) -> np.ndarray:
    count = CANVAS // BLOCK
    return pixels.reshape(count, BLOCK, count, BLOCK, 3).swapaxes(1, 2).reshape(count**2, -1).astype(np.float32)  # (64, 48)


def lossy(pixels: np.ndarray, centre: np.ndarray, basis: np.ndarray) -> np.ndarray:
    blocks, count = (to_blocks(pixels) - centre) @ basis @ basis.T + centre, CANVAS // BLOCK  # (64, 48)
    image = blocks.reshape(count, count, BLOCK, BLOCK, 3).swapaxes(1, 2).reshape(CANVAS, CANVAS, 3)
    return image.round().clip(0, 255).astype(np.uint8)


def fit(rows: Sequence[Row]) -> np.ndarray:
    """The table of weights (features, 3), relative to "none"."""
    features, shapes, weights = (np.array(column) for column in zip(*rows, strict=True))
    scaler = StandardScaler().fit(features[:, :-1])
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000)
    model.fit(scaler.transform(features[:, :-1]), shapes, sample_weight=weights)
    order = [list(model.classes_).index(word) for word in WORDS]
    slopes, constants = (model.coef_[order] / scaler.scale_).T, model.intercept_[order]  # (10, 4), (4,)
    table = np.concatenate([slopes, [constants - scaler.mean_ @ slopes]])  # (11, 4)
    return (table[:, :3] - table[:, 3:]).round(2)


def predict(features: np.ndarray, scores: np.ndarray) -> str:
    values = features @ scores  # (3,)
    return SHAPES[values.argmax()] if values.max() > 0 else "none"


if __name__ == "__main__":
    main()
