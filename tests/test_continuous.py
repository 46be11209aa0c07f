"""Level 3 of `shapes` and its reader: captions of numbers, shaded objects, and what is read back from pixels."""

import colorsys
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tests.profile import THOROUGH, examples
from tests.test_cli import command
from tests.test_suite import SHAPES as TRAIN
from transfusion.data.built_in.continuous import (
    EDGES,
    MARGIN,
    SIZES,
    ContinuousObject,
    ContinuousScene,
    caption,
    colour,
    parse,
    render,
    sample,
)
from transfusion.data.built_in.outlines import CANVAS, SHAPES
from transfusion.data.built_in.shapes import Shapes
from transfusion.disk import read_json
from transfusion.evaluation import suite
from transfusion.evaluation.continuous import (
    MAX_HUE_ERROR,
    MAX_PLACE_ERROR,
    MAX_SIZE_ERROR,
    Errors,
    judge,
    judge_caption,
    mean_errors,
    measure_errors,
    read_objects,
)
from transfusion.evaluation.geneval import Requirement, is_right
from transfusion.evaluation.geneval_shapes import choose_detector, shapes_prompts
from transfusion.evaluation.scenes import caption_scenes, draw_scenes
from transfusion.evaluation.shapes import UNCLEAR

MANY = 400 if THOROUGH else 24  # scenes that are read; one takes 10 ms
PARTS = "count", "colour", "shape", "size", "place"
seeds = st.integers(0, 2**48)


# Captions


@given(seeds)
@examples(200)
def test_caption_has_the_rounded_numbers(seed):
    item = sample(seed).object
    meaning = parse(caption(item))
    errors = measure_errors(item, meaning)
    assert meaning.shape == item.shape and errors.hue <= 5 and errors.size <= 0.5
    assert max(abs(a - b) for a, b in zip(item.centre, meaning.centre, strict=True)) <= 0.5
    assert caption(meaning) == caption(item)


def test_hues_of_a_caption_are_on_a_circle():
    item = ContinuousObject("circle", 357.0, 9.2, (8.4, 20.6))
    assert caption(item) == "a circle of hue 0, size 9, at 8 21"
    assert measure_errors(item, parse(caption(item))).hue == 3


@pytest.mark.parametrize("text", [
    "", "a large red circle", "a circle of hue 360, size 12, at 9 9", "a circle of hue 07, size 12, at 9 9",
    "a star of hue 70, size 12, at 9 9", "a circle of hue 70, size 12, at 9", "a circle of hue 70, size 12, at 9 9 ",
    "a circle of hue 70, size 12, at 9 9\n", "A circle of hue 70, size 12, at 9 9", "a circle of hue -70, size 12, at 9 9",
    "a circle of hue ７0, size 12, at 9 9", "a circle of hue 70, size 12.5, at 9 9", "a circle of hue 70, size 12, at 9 100",
])  # fmt: skip
def test_other_strings_are_not_captions(text):
    assert parse(text) is None
    with pytest.raises(ValueError, match="not a caption of level 3"):
        judge(text, np.zeros((32, 32, 3), np.uint8))


# Scenes


@given(seeds)
@examples(150)
def test_objects_have_one_hue_and_stay_off_the_border(seed):
    scene = sample(seed)
    item, pixels = scene.object, render(scene).astype(int)
    assert SIZES[0] <= item.size <= SIZES[1] and EDGES[0] <= scene.edge <= EDGES[1] and 0 <= item.hue < 360
    assert all(MARGIN <= side <= CANVAS - MARGIN for c in item.centre for side in (c - item.size / 2, c + item.size / 2))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == border[:, :1]).all()  # grey
    vivid = pixels[np.ptp(pixels, -1) >= 60]
    assert len(vivid) >= 20 and pixels.max() < 255  # the brightest light is not clipped
    hues = np.array([360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in vivid])
    assert np.abs((hues - item.hue + 180) % 360 - 180).max() <= 2  # pixels are rounded


def test_numbers_are_uniform_and_continuous():
    scenes = [sample(seed) for seed in range(2000)]
    items = [scene.object for scene in scenes]
    assert len({it.hue for it in items}) == len({it.size for it in items}) == len({it.centre for it in items}) == 2000
    assert np.histogram([it.hue for it in items], 12, (0, 360))[0].min() > 110  # of 167
    assert np.histogram([it.size for it in items], 7, SIZES)[0].min() > 220  # of 286
    assert min(sum(it.shape == shape for it in items) for shape in SHAPES) > 600
    assert np.abs(np.mean([scene.light for scene in scenes], 0)).max() < 0.02


def test_scenes_never_change():
    """Runs are resumed, and published figures repeated."""
    digest = sha256()
    for seed in (*range(60), *range(2**48, 2**48 + 4)):
        scene = sample(seed)
        digest.update(f"{caption(scene.object)} {scene}".encode() + render(scene, 32 + seed % 17).tobytes())
    assert digest.hexdigest()[:16] == "b5c7d731ffe5f8d5"


@pytest.mark.parametrize("size", [17, 48, 64])
def test_images_of_other_sizes_show_the_same(size):
    """The mean over blocks of a fine image is the coarse image."""
    for seed in range(5):
        scene = replace(sample(seed), edge=2.5)  # wider than a pixel
        fine = render(scene, 4 * size).reshape(size, 4, size, 4, 3).mean((1, 3))
        assert np.abs(fine - render(scene, size)).mean() < 0.8


def test_source_of_level_3_gives_pairs_and_is_deterministic():
    source, again = Shapes(level=3, size=48, seed=3), Shapes(level=3, size=48, seed=3)
    for i in (999_999, 0, 7):
        text, image = source[i].segments
        assert (source[i].id, source[i].pairs, text.loss, image.loss) == (i, True, True, True)
        assert text.text == caption(source.scene(i).object) and image.pixels.shape == (48, 48, 3)
        assert text == again[i].segments[0] and (image.pixels == again[i].segments[1].pixels).all()
    train, heldout = ({Shapes(level=3, split=split, seed=seed)[i].pair[1].tobytes() for seed in (0, 1) for i in range(100)}
                      for split in ("train", "heldout"))  # fmt: skip
    assert len(train) == len(heldout) == 200 and not train & heldout


# The reader


def read_one(pixels: np.ndarray) -> ContinuousObject:
    (reading,) = read_objects(pixels)
    return reading.object


def largest_errors(change, size: int = 32, shift: tuple[float, float] = (0, 0)) -> tuple[Errors, int]:
    """Of many changed images: the largest errors, and how many shapes are not clear. None is another one than drawn."""
    errors, unclear = [], 0
    for seed in range(MANY):
        scene = sample(seed)
        found = read_one(change(render(scene, size).astype(np.float32), np.random.default_rng(seed)).round().clip(0, 255)
                         .astype(np.uint8))  # fmt: skip
        moved = replace(scene.object, centre=tuple(a + b for a, b in zip(scene.object.centre, shift, strict=True)))
        errors.append(measure_errors(moved, found))
        assert found.shape in (scene.object.shape, UNCLEAR), (seed, found.shape)
        unclear += found.shape == UNCLEAR
    return Errors(*(max(getattr(it, name) for it in errors) for name in ("hue", "place", "size"))), unclear


@pytest.mark.parametrize("size", [32, 64])
def test_clean_scenes_are_read_exactly(size):
    errors, unclear = largest_errors(lambda image, rng: image, size)
    assert unclear == 0 and errors.hue < 0.5 and errors.place < 0.1 and errors.size < 0.1


@pytest.mark.parametrize("change", [
    lambda image, rng: image + rng.normal(0, 12, image.shape),
    lambda image, rng: ndimage.gaussian_filter(image, (0.8, 0.8, 0)),
    lambda image, rng: 40 + 0.6 * (image - 40),
    lambda image, rng: ndimage.gaussian_filter(60 + 0.7 * (image - 40), (0.5, 0.5, 0)) + rng.normal(0, 6, image.shape),
], ids=["noise", "blur", "faded", "all"])  # fmt: skip
def test_reader_tolerates(change):
    errors, unclear = largest_errors(change)
    assert unclear <= 0.03 * MANY and errors.hue < 5 and errors.place < 0.5 and errors.size < 0.6


@pytest.mark.parametrize("change", [
    lambda image, rng: image + rng.normal(0, 32, image.shape),
    lambda image, rng: ndimage.gaussian_filter(image, (1.7, 1.7, 0)),
], ids=["noise", "blur"])  # fmt: skip
def test_beyond_its_limits_shapes_become_unclear_and_not_others(change):
    _, unclear = largest_errors(change)  # which asserts that none is another shape
    assert unclear > 0.15 * MANY


def test_a_shifted_object_is_read_where_it_is():
    x, y = shift = -1.5, 0.6
    errors, unclear = largest_errors(lambda image, _: ndimage.shift(image, (y, x, 0), order=1, mode="nearest"), shift=shift)
    assert errors.place < 0.2 and errors.hue < 1 and unclear <= 0.03 * MANY


@given(seeds, st.data())
@examples(100)
def test_one_wrong_number_gives_one_wrong_part(seed, data):
    """A number of the caption is changed beyond its limit, and within it."""
    scene = sample(seed)
    item, pixels = scene.object, render(scene)
    assert judge(caption(item), pixels)[0].everything
    far, near = data.draw(st.sampled_from((-1, 1))), data.draw(st.sampled_from((-1, 1)))
    within = {
        "colour": lambda by: replace(item, hue=(item.hue + by * (MAX_HUE_ERROR - 6)) % 360),
        "size": lambda by: replace(item, size=item.size + by * (MAX_SIZE_ERROR - 0.6)),
        "place": lambda by: replace(item, centre=(item.centre[0], item.centre[1] + by * (MAX_PLACE_ERROR - 0.8))),
        "shape": lambda by: item,
    }  # fmt: skip
    beyond = {
        "colour": lambda by: replace(item, hue=(item.hue + by * (MAX_HUE_ERROR + 6)) % 360),
        "size": lambda by: replace(item, size=item.size + by * (MAX_SIZE_ERROR + 0.6)),
        "place": lambda by: replace(item, centre=(item.centre[0], item.centre[1] + by * (MAX_PLACE_ERROR + 0.6))),
        "shape": lambda by: replace(item, shape=SHAPES[SHAPES.index(item.shape) - 1]),
    }  # fmt: skip
    part = data.draw(st.sampled_from(sorted(beyond)))
    assert wrong_parts(caption(beyond[part](far)), pixels) == {part}
    assert not wrong_parts(caption(within[part](near)), pixels)


def wrong_parts(text: str, pixels: np.ndarray) -> set[str]:
    judgement, _ = judge(text, pixels)
    return {part for part in PARTS if not getattr(judgement, part)}


SAMPLES = 8  # per pixel and axis
X, Y = np.meshgrid(*[(np.arange(CANVAS * SAMPLES) + 0.5) / SAMPLES - CANVAS / 2] * 2)
RADIUS, ANGLE = np.hypot(X, Y), np.arctan2(Y, X)
NO_SHAPES = {
    "ellipse": (X / 8) ** 2 + (Y / 6) ** 2 < 1, "bar": (abs(X) < 2) & (abs(Y) < 9),
    "rectangle": (abs(X) < 7.3) & (abs(Y) < 5.8), "diamond": abs(X) + abs(Y) < 8,
    "half disc": (RADIUS < 7) & (Y < 0), "three quarters": (RADIUS < 7) & ((X < 0) | (Y < 0)),
    "ring": (RADIUS < 7) & (RADIUS > 3), "cross": (np.minimum(abs(X), abs(Y)) < 2.2) & (RADIUS < 7),
    "star": RADIUS < 6 + 2.5 * np.cos(5 * ANGLE), "triangle upside down": (Y > -6) & (Y < 6) & (abs(X) < (6 - Y) / 2),
    "right triangle": (X > -6) & (Y < 6) & (Y > X), "drop": RADIUS < 6 + 2 * np.cos(ANGLE) + np.cos(2 * ANGLE),
    "mound": (Y < 4) & (Y > -4 + X**2 / 8),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_SHAPES)
def test_other_objects_have_no_shape(kind):
    """Of two sizes and turned by a quarter, as sharp as a drawing can be and soft. Place and hue are read all the same."""
    covered = NO_SHAPES[kind].reshape(CANVAS, SAMPLES, CANVAS, SAMPLES).mean((1, 3))[..., None]
    for hue, edge in ((20, 0), (200, 0.7)):
        pixels = np.float32(ndimage.gaussian_filter(50 + covered * (colour(hue) - 50), (edge, edge, 0)))
        found = read_one(pixels.round().astype(np.uint8))
        assert found.shape == UNCLEAR and abs(found.hue - hue) < 1 and max(abs(c - 16) for c in found.centre) < 4


def test_images_without_an_object_are_wrong_in_everything():
    rng, blank = np.random.default_rng(0), np.full((32, 32, 3), 50, np.uint8)
    images = [blank, 0 * blank, 255 - 0 * blank, np.uint8(np.mgrid[:32, :32][0][..., None] * [6, 6, 6]),
              rng.normal(50, 25, blank.shape).clip(0, 255).astype(np.uint8)]  # fmt: skip
    disc = np.uint8(np.where(RADIUS[::SAMPLES, ::SAMPLES, None] < 6, 200, blank))  # grey
    text = caption(sample(0).object)
    for pixels in (*images, disc):
        judgement, errors = judge(text, pixels)
        assert read_objects(pixels) == [] and np.isnan([errors.hue, errors.place, errors.size]).all()
        assert not any(getattr(judgement, part) for part in PARTS)
    assert wrong_parts(text, np.full((32, 32, 3), colour(100), np.uint8)) >= {"size"}
    static = rng.integers(0, 256, blank.shape, np.uint8)
    assert not any(judge(caption(sample(n).object), static)[0].everything for n in range(4))


def test_a_second_object_is_counted_and_two_hues_are_none():
    first, second = (ContinuousScene(ContinuousObject("circle", hue, size, (x, 16)), 1, (0, 0), 50, (0, 0))
                     for hue, size, x in ((0, 12, 8), (120, 10, 24)))  # fmt: skip
    both = np.where(np.arange(32)[:, None] < 16, render(first), render(second))
    assert [round(reading.object.hue / 10) % 36 for reading in read_objects(both)] == [0, 12]
    assert wrong_parts(caption(first.object), both) == {"count"}
    for hue in (90, 180):
        two = np.where(np.arange(32)[:, None] < 8, render(first),
                       render(replace(first, object=replace(first.object, hue=hue))))  # fmt: skip
        assert wrong_parts(caption(first.object), two) & {"colour", "count"}
    speck = render(first)
    speck[28:31, 28:31] = colour(120)
    assert not wrong_parts(caption(first.object), speck)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1), (32, 16, 3)])
def test_arrays_of_another_shape_or_type_are_an_error(shape):
    for pixels in (np.zeros(shape, np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="a scene must be"):
            read_objects(pixels)


# Evaluation


def test_captions_are_judged_within_the_same_limits():
    reference = "a circle of hue 10, size 12, at 20 9"
    assert judge_caption(reference, "a circle of hue 350, size 11, at 21 10") == (True, Errors(20, 2**0.5, 1))
    for prediction in (
        "a circle of hue 340, size 12, at 20 9", "a circle of hue 10, size 14, at 20 9",
        "a circle of hue 10, size 12, at 22 11", "a square of hue 10, size 12, at 20 9", "a circle", "",
    ):  # fmt: skip
        assert not judge_caption(reference, prediction)[0]
    nothing = Errors(np.nan, np.nan, np.nan)
    assert mean_errors([Errors(10, 1, 2), nothing, Errors(np.nan, 2, 3)]) == {
        "hue_error": 10, "place_error": 1.5, "size_error": 2.5}  # fmt: skip
    assert mean_errors([nothing]) == mean_errors([]) == {}


class FakeEngine:
    """Draws the scene of each prompt, except the first, which is blank."""

    def __init__(self, scenes: list[ContinuousScene]):
        self.scenes = {caption(scene.object): scene for scene in scenes}

    def generate(self, requests):
        images = [render(self.scenes[request.parts[0]]) for request in requests]
        return [[SimpleNamespace(parts=[image if n else 0 * image])] for n, image in enumerate(images)]


def test_drawings_are_judged_and_their_errors_averaged():
    source = Shapes(level=3, split="heldout")
    engine = FakeEngine([source.scene(n) for n in range(20)])
    values, shown = draw_scenes(engine, [source[n] for n in range(20)], 20)
    assert values["everything"] == values["count"] == 0.95 and [right for *_, right in shown] == [False] + [True] * 19
    assert 1 < values["hue_error"] < 4 and 0.2 < values["place_error"] < 0.6 and 0.1 < values["size_error"] < 0.4  # rounding


def test_geneval_has_single_objects():
    source = Shapes(level=3, split="heldout")
    prompts = shapes_prompts((source[n].pair[0] for n in range(30)), count=20)
    assert [prompt.category for prompt in prompts] == ["single_object"] * 20
    detect = choose_detector(prompts)
    for n, prompt in enumerate(prompts[:8]):
        item = source.scene(n).object
        assert prompt.include == (Requirement(item.shape, 1),)
        (found,) = detect(render(source.scene(n)))
        centre = (found.box[0] + found.box[2]) / 2, (found.box[1] + found.box[3]) / 2
        assert np.hypot(*np.subtract(centre, item.centre)) < 0.1
        other = replace(source.scene(n), object=replace(item, shape=SHAPES[SHAPES.index(item.shape) - 1]))
        assert is_right(prompt, [found]) and not is_right(prompt, detect(render(other)))


def test_a_run_on_level_3_is_trained_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "PROMPTS_PER_CATEGORY", 1)
    command("train", *TRAIN, "--data.shapes.level", "3", "--out", tmp_path / "run")
    command("evaluate", tmp_path / "run", "--count", "20", "--tasks", "captions", "drawings", "geneval")
    results = read_json(tmp_path / "run" / "results.json")["shapes"]
    assert 0 <= results["captions"]["within_limits"] <= 1 and results["captions"]["count"] == 20
    assert results["drawings"]["count_drawn"] == 20 and results["geneval"].keys() >= {"single_object", "overall"}


def test_caption_scenes_adds_figures_for_level_3_only(monkeypatch):
    def answer(reference, prediction):
        return {"answers": [{"reference": reference, "prediction": prediction}], "exact": 0.0}

    for answers, added in ((answer("a large red circle", "a large red square"), set()),
                           (answer("a circle of hue 10, size 12, at 20 9", "a circle of hue 20, size 12, at 20 9"),
                            {"within_limits", "hue_error", "place_error", "size_error"})):  # fmt: skip
        monkeypatch.setattr("transfusion.evaluation.scenes.caption_heldout", lambda *args, it=answers: it)
        values = caption_scenes(None, None, 1)
        assert values.keys() - answers.keys() == added
        assert not added or (values["within_limits"], values["hue_error"]) == (1, 10)
