"""Does the checker of `shapes` agree with readers? 200 drawings of models, labelled by two, who see no run and no caption.

    python -m experiments.checker draw RUN...
    python -m experiments.checker sheets
    python -m experiments.checker compare
    python -m experiments.checker limits

`draw` writes docs/results/checker-drawings.png: shuffled drawings of held-out captions, as many of each run, and the sources
to checker-drawings.json. `sheets` writes contact sheets of it, a legend and an empty form to runs/checker-sheets. A reader
fills the form, one line for each object, and stores it as docs/results/checker-reader-NAME.csv, with one letter for NAME.
`compare` writes the agreement of the readers with each other and with the checker into docs/evaluation.md. `limits` writes
which shapes the checker reads in random objects without one, and how many scenes it reads with noise, blur and shifts.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from experiments.blobs import KINDS, sample_blobs
from experiments.lab import DOCS, format_markdown
from experiments.page import write_output
from experiments.readers import write_sheets
from transfusion.data.built_in.shapes import (
    BACKGROUND,
    BOXES,
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    Shapes,
    caption,
    coverage,
    render,
    sample_scene,
)
from transfusion.evaluation.scenes import draw_captions, judge_scenes
from transfusion.evaluation.shapes import MIN_AREA, UNCLEAR, read_scene
from transfusion.inference.engine import open_run

COUNT, PER_ROW, SIDE = 200, 20, 160
NUM_BLOBS = 273  # of each kind
DEGRADATIONS = (
    (0, 0, 0), (24, 0, 0), (32, 0, 0), (40, 0, 0), (0, 1.0, 0), (0, 1.3, 0), (0, 1.6, 0), (0, 0, 0.5), (12, 0.7, 0.5),
)  # fmt: skip
ABSENT = "absent"  # the shape of an object that only the other one lists
SHAPE_WORDS = (*SHAPES, "none", ABSENT)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Options:
    action: tyro.conf.Positional[Literal["draw", "sheets", "compare", "limits"]]
    """Draw the pictures, write the sheets, compare the labels, or measure the checker's limits."""
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs on `shapes`, for draw."""
    out: Path = DOCS / "results"
    """Folder of the pictures and the labels."""
    sheets: Path = Path("runs/checker-sheets")
    """Folder of the sheets."""


class Label(NamedTuple):
    """One object as a reader or the checker sees it. `size` is "none" if it is neither, as for an object without a shape."""

    colour: str
    size: str
    shape: str
    place: str


Labels = list[list[Label]]  # by picture


def main(options: Options) -> None:
    match options.action:
        case "draw":
            draw_pictures(options.runs, options.out)
        case "sheets":
            images = read_pictures(options.out)
            write_sheets(images, [str(n) for n in range(1, len(images) + 1)], options.sheets, SIDE, thirds=True)
            write_legend(options.sheets / "legend.png")
            lines = [",".join(["number", *Label._fields]), *(f"{n},,,," for n in range(1, len(images) + 1))]
            (options.sheets / "form.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        case "compare":
            write_output(DOCS / "evaluation.md", "python -m experiments.checker compare", compare(options.out))
        case "limits":
            write_output(DOCS / "evaluation.md", "python -m experiments.checker limits", measure_limits())


def draw_pictures(runs: Sequence[str], out: Path) -> None:
    """As many drawings of each run, of other captions each, shuffled."""
    images, sources = [], []
    for number, run in enumerate(runs):
        engine, count = open_run(run), COUNT * (number + 1) // len(runs) - COUNT * number // len(runs)
        scenes = Shapes(engine.run.data.shapes.level, split="heldout")
        captions = [scenes[COUNT * number + n].pair[0] for n in range(count)]
        images += draw_captions(engine, captions, seed=COUNT * number)
        sources += [run] * count
    order = np.random.default_rng(0).permutation(len(images))
    write_pictures([images[n] for n in order], [sources[n] for n in order], out)


def write_pictures(images: Sequence[np.ndarray], sources: Sequence[str], out: Path) -> None:
    """Pictures (32, 32, 3) uint8 in rows of twenty, and the source of each."""
    rows = [np.concatenate(images[first : first + PER_ROW], 1) for first in range(0, len(images), PER_ROW)]
    Image.fromarray(np.concatenate(rows)).save(out / "checker-drawings.png", optimize=True)
    (out / "checker-drawings.json").write_text(json.dumps(list(sources), indent=0) + "\n", encoding="utf-8")


def read_pictures(out: Path) -> list[np.ndarray]:
    """The pictures (32, 32, 3) uint8 in their order."""
    pixels = np.array(Image.open(out / "checker-drawings.png").convert("RGB"))
    rows = pixels.reshape(-1, CANVAS, PER_ROW, CANVAS, 3).swapaxes(1, 2)  # (rows, 20, Y, X, 3)
    return list(rows.reshape(-1, CANVAS, CANVAS, 3))


def write_legend(path: Path) -> None:
    """The six valid objects, and the smallest spot that counts as an object."""
    boxes = [(shape, BOXES[size, shape]) for size in SIZES for shape in SHAPES] + [("square", (MIN_AREA**0.5,) * 2)]
    offset = np.subtract(COLOURS["cyan"], BACKGROUND)
    images = [BACKGROUND + coverage(shape, box, (16, 16))[..., None] * offset for shape, box in boxes]
    pixels = np.concatenate(images, 1).round().astype(np.uint8)
    Image.fromarray(pixels).resize((len(boxes) * SIDE, SIDE), Image.Resampling.BICUBIC).save(path, optimize=True)


def compare(out: Path) -> str:
    """Tables of the agreement of all pairs of readers and checker, as Markdown."""
    images = read_pictures(out)
    labels = {f"reader {path.stem[-1]}": read_labels(path, len(images)) for path in sorted(out.glob("checker-reader-*.csv"))}
    labels["checker"] = [read_picture(pixels) for pixels in images]
    pairs = [(first, second, measure(labels[first], labels[second])) for first, second in combinations(labels, 2)]
    names = list(pairs[0][2])
    text = format_markdown(["Cohen's kappa", *names],
                           [[f"{first} and {second}", *values.values()] for first, second, values in pairs])  # fmt: skip
    for reader in list(labels)[:-1]:
        matrix = confusion_matrix(*shapes_of(labels[reader], labels["checker"]), labels=SHAPE_WORDS)
        rows = [[word, *map(str, row)] for word, row in zip(SHAPE_WORDS, matrix, strict=True)]
        text += "\n" + format_markdown([f"{reader} (rows), checker (columns)", *SHAPE_WORDS], rows)
    return text


def read_labels(path: Path, count: int) -> Labels:
    """The labels of `count` pictures. ValueError with the line of a word that is not allowed."""
    labels: Labels = [[] for _ in range(count)]
    allowed = {"colour": tuple(COLOURS), "size": (*SIZES, "none"), "shape": (*SHAPES, "none"), "place": PLACES}
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            if not row["colour"]:
                continue  # a picture without an object
            for name, words in allowed.items():
                if row[name] not in words:
                    raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}; use one of {', '.join(words)}")
            labels[int(row["number"]) - 1].append(Label(*(row[name] for name in Label._fields)))
    return labels


def read_picture(pixels: np.ndarray) -> list[Label]:
    """What the checker reads."""
    labels = []
    for detected in read_scene(pixels):
        item, (x, y) = detected.object, detected.centre
        column, row = (min(max(int(3 * at / CANVAS), 0), 2) for at in (x, y))
        shape, size = ("none" if word == UNCLEAR else word for word in (item.shape, item.size))
        labels.append(Label(item.colour, "none" if shape == "none" else size, shape, PLACES[3 * row + column]))
    return labels


def match(first: Sequence[Label], second: Sequence[Label]) -> list[tuple[Label | None, Label | None]]:
    """Pairs of the same object: nearest places, then equal colours. Objects more than one place apart are not the same."""
    steps = np.array([[_steps(a.place, b.place) for b in second] for a in first]).reshape(len(first), len(second))
    differ = np.array([[a.colour != b.colour for b in second] for a in first]).reshape(len(first), len(second))
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(2 * steps + differ), strict=True) if steps[i, j] <= 1]
    alone = [(a, None) for i, a in enumerate(first) if i not in {i for i, _ in pairs}]
    alone += [(None, b) for j, b in enumerate(second) if j not in {j for _, j in pairs}]
    return [(first[i], second[j]) for i, j in pairs] + alone


def _steps(a: str, b: str) -> int:
    (row, column), (other_row, other_column) = divmod(PLACES.index(a), 3), divmod(PLACES.index(b), 3)
    return max(abs(row - other_row), abs(column - other_column))


def measure(first: Labels, second: Labels) -> dict[str, str]:
    """Cohen's kappa of each attribute, and the shares of equal shapes and of equal pictures.

    Shape: of all objects that either lists. Colour and place: of objects that both list. Size: of those with a shape for
    both. A picture is equal if all its objects match with the same colour, shape and size.
    """
    pairs = [match(a, b) for a, b in zip(first, second, strict=True)]
    both = [(a, b) for picture in pairs for a, b in picture if a and b]
    shaped = [(a, b) for a, b in both if "none" not in (a.shape, b.shape)]
    shapes = shapes_of(first, second)
    equal = [all(a and b and a[:3] == b[:3] for a, b in picture) for picture in pairs]
    return {
        "shape": f"{cohen_kappa_score(*shapes):.2f}", "colour": _kappa(both, "colour"), "size": _kappa(shaped, "size"),
        "place": _kappa(both, "place"), "equal shapes": f"{np.mean(np.equal(*shapes)):.1%}",
        "equal pictures": f"{np.mean(equal):.1%}", "objects": str(len(shapes[0])),
    }  # fmt: skip


def shapes_of(first: Labels, second: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The shapes of all objects in both lists; of an object that only one lists, the other's shape is "absent"."""
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in match(a, b)]
    words = [[label.shape if label else ABSENT for label in side] for side in zip(*pairs, strict=True)]
    return np.array(words[0]), np.array(words[1])


def _kappa(pairs: Sequence[tuple[Label, Label]], name: str) -> str:
    return f"{cohen_kappa_score(*([getattr(label, name) for label in side] for side in zip(*pairs, strict=True))):.2f}"


def measure_limits() -> str:
    """Two tables as Markdown: objects without a shape, and degraded scenes of all levels."""
    rows = []
    for kind, max_overlap in product(KINDS, (1, 0.8)):
        images = sample_blobs(kind, NUM_BLOBS, max_overlap)
        read = Counter(detected.object.shape for pixels in images for detected in read_scene(pixels))
        name = kind if max_overlap == 1 else f"{kind}, overlap at most {max_overlap}"
        rows.append([name, *(f"{read[shape] / read.total():.1%}" for shape in (*SHAPES, UNCLEAR))])
    text = format_markdown(["objects without a shape, read as", *SHAPES, "none"], rows)
    scenes, rng = [sample_scene(n % 3, n) for n in range(COUNT)], np.random.default_rng(0)
    captions, rows = [caption(scene) for scene in scenes], []
    for strengths in DEGRADATIONS:
        images = [degrade(render(scene), *strengths, rng) for scene in scenes]
        rows.append([*map(str, strengths), f"{judge_scenes(captions, images)[0]['everything']:.1%}"])
    return text + "\n" + format_markdown(["noise (of 255)", "blur (pixels)", "shift (pixels)", "scenes read"], rows)


def degrade(pixels: np.ndarray, noise: float, blur: float, shift: float, rng: np.random.Generator) -> np.ndarray:
    """An image (Y, X, 3) uint8 blurred by a Gaussian, shifted down and right with linear interpolation, and made noisy; blur
    and noise are standard deviations."""
    blurred = ndimage.gaussian_filter(pixels.astype(float), (blur, blur, 0))
    image = ndimage.shift(blurred, (shift, shift, 0), order=1, mode="nearest")
    return (image + rng.normal(0, noise, image.shape)).round().clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
