"""Drawn digits: how many a classifier recognises, and whether they are copies of training scans."""

import numpy as np

from transfusion.data.built_in.digits import NAMES, load_scans
from transfusion.inference.engine import Engine, Request

IMAGES_PER_NAME = 20
SIDE = 8  # pixels


def draw_digits(engine: Engine, seed: int = 0) -> tuple[dict, np.ndarray]:
    """20 drawings of each digit's name with the run's defaults: the scores, and the drawings (10, 20, 8, 8) uint8. The
    classifier is an SVM trained on the real scans. Distances are medians of the Euclidean distance over the 64 pixels in [0,
    1] to the nearest of the 1,500 training scans: about 0 for copies; compare with real held-out scans."""
    from sklearn.svm import SVC

    train, labels = load_scans("train")
    heldout, heldout_labels = load_scans("heldout")
    classifier = SVC().fit(_features(train), labels)
    answers = engine.generate([Request(parts=(name,), num_images=IMAGES_PER_NAME, seed=seed) for name in NAMES])
    drawn = np.stack([answer.parts[0][..., 0] for draws in answers for answer in draws])  # (200, 8, 8)
    right = classifier.predict(_features(drawn)) == np.repeat(np.arange(10), IMAGES_PER_NAME)
    values = {
        "recognised": float(right.mean()), "count": len(drawn),
        "per_name": {name: float(right[n * IMAGES_PER_NAME :][:IMAGES_PER_NAME].mean()) for n, name in enumerate(NAMES)},
        "classifier_on_heldout_scans": float((classifier.predict(_features(heldout)) == heldout_labels).mean()),
        "nearest_training_scan": median_nearest_distance(drawn, train),
        "nearest_training_scan_of_heldout": median_nearest_distance(heldout, train),
    }  # fmt: skip
    return values, drawn.reshape(10, IMAGES_PER_NAME, 8, 8)


def median_nearest_distance(images: np.ndarray, references: np.ndarray) -> float:
    """The median distance from an image to its nearest reference."""
    a, b = (pixels.reshape(len(pixels), 64) / 255 for pixels in (images, references))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return float(np.median(np.sqrt(squared.clip(0).min(1))))


def _features(pixels: np.ndarray) -> np.ndarray:
    """(n, 64) in [-1, 1]: the scans' original integers 0 to 16, divided by 8, minus 1."""
    return (pixels.reshape(len(pixels), 64) * (16 / 255)).round() / 8 - 1
