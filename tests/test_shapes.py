"""The data set `shapes` and its checker: captions, scenes, rendered images, and detection of wrong images."""

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import combinations, count, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.blobs import overlap, sample_blobs
from experiments.checker import degrade
from experiments.distances import draw_rival
from tests.profile import THOROUGH, examples
from transfusion.data.built_in.shapes import (
    BACKGROUND,
    BOXES,
    CANVAS,
    COLOURS,
    GAP,
    MARGIN,
    RELATIONS,
    SHAPES,
    SIZES,
    Description,
    Scene,
    SceneObject,
    Shapes,
    _pixels_near,
    caption,
    coverage,
    parse,
    render,
    sample_scene,
)
from transfusion.evaluation.scenes import draw_scenes
from transfusion.evaluation.shapes import RIVALS, find_objects, judge, read_scene

MANY, SOME = (1000, 500) if THOROUGH else (300, 150)  # scenes
PARTS = ("count", "colour", "shape", "size", "place")
levels = st.sampled_from((1, 2))
seeds = st.integers(0, 2**48)


# Captions


@given(levels, seeds)
@examples(200)
def test_parse_inverts_caption(level, seed):
    scene = sample_scene(level, seed)
    assert parse(caption(scene)) == scene.description
    assert caption(parse(caption(scene))) == caption(scene)


def test_level_1_has_2556_captions_and_each_has_one_meaning():
    objects = [SceneObject(*words) for words in product(SIZES, COLOURS, SHAPES)]
    singles = [Description((item,), (1,)) for item in objects]
    pairs = [Description((first, second), (1, 1), (relation,))
             for first, second, relation in product(objects, objects, RELATIONS) if first != second]  # fmt: skip
    captions = [caption(description) for description in singles + pairs]
    assert len(set(captions)) == len(captions) == 2556
    assert [parse(text) for text in captions] == singles + pairs


def test_captions_are_english():
    captions = [caption(sample_scene(2, seed)) for seed in range(400)]
    for text in ("a large red circle", "three small red circles",
                 "a small cyan square left of a large red circle",
                 "a large red circle above two small blue squares",
                 "a small red circle above a large cyan square left of a small blue circle"):  # fmt: skip
        assert caption(parse(text)) == text
    assert all(text.startswith(("a ", "two ", "three ", "four ")) for text in captions)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a red circle", "a large red circles", "two large red circle", "A large red circle",
     "a large red circle ", "a large red circle\n", "a large red circle below a small red square",
     "a large red circle above", "above a large red circle", "a large pink circle", "five small red circles",
     "a large red circle above above a small blue square",
     "four small red circles above a small blue square"],
)  # fmt: skip
def test_other_strings_are_not_captions(text):
    assert parse(text) is None
    with pytest.raises(ValueError, match="not a caption"):
        judge(text, np.zeros((32, 32, 3), np.uint8))


# Scenes


@given(levels, seeds)
@examples(200)
def test_objects_have_gaps_and_clear_relations(level, seed):
    scene = sample_scene(level, seed)
    assert has_gaps(scene)
    half = np.array([BOXES[item.size, item.shape] for item in scene.objects]) / 2  # (K, 2)
    centres = np.array(scene.centres)  # (K, 2)
    groups = scene.description.groups
    for relation, before, after in zip(scene.description.relations, groups, groups[1:], strict=False):
        axis = 1 if relation == "above" else 0
        begin = (centres[after] - half[after])[:, axis].min()
        assert (centres[before] + half[before])[:, axis].max() + GAP <= begin
        offset = abs(centres[after].mean(0) - centres[before].mean(0))
        assert offset[axis] >= 2 * offset[1 - axis]


def test_every_shape_and_size_occurs_next_to_every_other():
    kinds = list(product(SIZES, SHAPES))
    missing = set(product(kinds, kinds, RELATIONS))
    for seed in range(3000):
        scene = sample_scene(1, seed)
        if len(scene.objects) == 2:
            pair = [(item.size, item.shape) for item in scene.objects]
            missing.discard((*pair, *scene.description.relations))
    assert not missing


# The checker


def test_checker_reads_many_scenes_exactly():
    """The caption, and every object's size, colour, shape, position and box; all levels, both canvas sizes in turn."""
    for n in range(MANY):
        scene = sample_scene(n % 3, n)
        pixels = render(scene, (32, 64)[n % 2])
        assert judge(caption(scene), pixels).everything, caption(scene)
        remaining = list(zip(scene.objects, scene.centres, strict=True))
        for detected in read_scene(pixels):
            item, centre = min(remaining, key=lambda pair: np.hypot(*np.subtract(pair[1], detected.centre)))
            remaining.remove((item, centre))
            assert detected.object == item
            assert np.hypot(*np.subtract(centre, detected.centre)) < 0.25
            np.testing.assert_allclose(detected.box, BOXES[item.size, item.shape], rtol=0.04)
        assert not remaining


def test_checker_rejects_scenes_with_one_change():
    """A colour, shape, size, count or place is changed, at every level that has it. Only that part is wrong, except that
    a missing object may make other parts wrong too."""
    rejected = Counter()
    for n in range(MANY):
        part = PARTS[n % len(PARTS)]
        level = 1 + n // 5 % 2 if part == "place" else n // 5 % 3  # a single object may be anywhere
        scene, other = next(
            (scene, other)
            for seed in count(1000 * n)
            if (other := change_scene(scene := sample_scene(level, seed), part, np.random.default_rng(seed)))
        )
        wrong = wrong_parts(scene.description, render(other))
        missing = len(other.objects) < len(scene.objects)
        assert part in wrong if missing else wrong == {part}, (caption(scene), part, wrong)
        rejected[part] += 1
    assert rejected == dict.fromkeys(PARTS, MANY // len(PARTS))


def change_scene(scene: Scene, part: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one part changed. None when the scene does not have this part, or objects are too close."""
    objects, centres = list(scene.objects), list(scene.centres)
    k = int(rng.integers(len(objects)))
    match part:
        case "colour" | "shape" | "size":
            words = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES}[part]
            others = [word for word in words if word != getattr(objects[k], part)]
            objects[k] = replace(objects[k], **{part: others[rng.integers(len(others))]})
        case "count" if len(objects) > 1 and rng.integers(2):
            del objects[k], centres[k]
        case "count":
            objects.append(objects[k])
            centres.append(tuple(float(x) for x in rng.integers(4 * 4, 28 * 4, 2) / 4))
        case "place" if not scene.description.relations:
            return None
        case "place" if rng.integers(2):  # mirrored: above becomes below
            axis = int(scene.description.relations[0] == "above")
            centres = [tuple(CANVAS - x if n == axis else x for n, x in enumerate(centre)) for centre in centres]
        case "place":  # transposed: above becomes left of
            centres = [centre[::-1] for centre in centres]
    other = Scene(Description(tuple(objects), (1,) * len(objects)), tuple(centres))
    return other if has_gaps(other) else None


def has_gaps(scene: Scene) -> bool:
    """Whether the objects have the minimum distances to each other and to the border."""
    half = np.array([BOXES[item.size, item.shape] for item in scene.objects]) / 2  # (K, 2)
    centres = np.array(scene.centres)  # (K, 2)
    is_inside = (centres - half >= MARGIN).all() and (centres + half <= CANVAS - MARGIN).all()
    return bool(is_inside) and all(
        (abs(centres[i] - centres[j]) - half[i] - half[j]).max() >= GAP for i, j in combinations(range(len(half)), 2)
    )


@pytest.mark.parametrize("level", [1, 2])
def test_checker_tolerates_noise_and_specks(level):
    rng = np.random.default_rng(0)

    def add_noise(image):
        image = image + rng.normal(0, 12, image.shape)
        for y, x in rng.integers(0, 31, (6, 2)):  # specks of one or two pixels, of any colour
            image[y, x : x + rng.integers(1, 3)] = rng.integers(0, 256, 3)
        return image.round().clip(0, 255).astype(np.uint8)

    scenes = [sample_scene(level, seed) for seed in range(SOME)]
    assert correct_shares(scenes, [add_noise(render(scene)) for scene in scenes])["everything"] >= 0.99


@pytest.mark.parametrize(("level", "share"), [(1, 0.98), (2, 0.95)])
def test_checker_tolerates_block_pca_with_six_components(level, share):
    """The best possible result of a model with that codec."""

    def to_blocks(images):  # (N, 32, 32, 3) -> (N, 8, 8, 48)
        blocks = np.stack(images).reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(-1, 8, 8, 48).astype(np.float32)

    fitted = to_blocks([render(sample_scene(level, 2 * seed)) for seed in range(4 * SOME)])
    centre = fitted.mean((0, 1, 2))
    flat = (fitted - centre).reshape(-1, 48)  # (blocks, 48)
    basis = np.linalg.eigh(flat.T @ flat)[1][:, -6:]  # (48, 6)
    scenes = [sample_scene(level, 2 * seed + 1) for seed in range(SOME)]
    lossy = (to_blocks([render(scene) for scene in scenes]) - centre) @ basis @ basis.T + centre
    lossy = lossy.reshape(-1, 8, 8, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 3)
    shares = correct_shares(scenes, lossy.round().clip(0, 255).astype(np.uint8))
    assert shares["everything"] >= share, shares


def test_checker_tolerates_low_contrast_and_blur():
    scenes = [sample_scene(1, seed) for seed in range(200)]
    low_contrast = [(np.array(BACKGROUND) + 0.75 * (render(scene) - np.float32(BACKGROUND))) for scene in scenes]
    shifts = list(product((-1, 0, 1), repeat=2))
    blurred = [sum(np.roll(image, shift, (0, 1)) for shift in shifts) / 9 for image in low_contrast]
    for images in (low_contrast, blurred):
        shares = correct_shares(scenes, [image.round().astype(np.uint8) for image in images])
        assert shares["everything"] >= 0.99


@pytest.mark.parametrize(
    ("kind", "max_overlap"), [("blob", 0.75), ("mound", 0.85), ("peak", 0.8), ("half disc", 1), ("star", 1)]
)
def test_blobs_mounds_peaks_half_discs_and_stars_have_no_shape(kind, max_overlap):
    images = list(sample_blobs(kind, 400 if THOROUGH else 20 if kind == "blob" else 100, max_overlap))
    shapes = [detected.object.shape for image in images
              for detected, (covered, _) in zip(read_scene(image), find_objects(image), strict=True)
              if overlap(covered) <= max_overlap]  # a blob with a narrow neck is two, which may be nearly a shape each
    assert len(shapes) >= 0.95 * len(images)
    assert shapes.count("unclear") >= 0.99 * len(shapes), Counter(shapes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_specks_near_an_object_are_no_part_of_it(shape, size):
    """One or two pixels of the object's colour, two pixels beside its box."""
    box, offset = BOXES[size, shape], np.subtract(COLOURS["green"], BACKGROUND)
    pixels = (BACKGROUND + coverage(shape, box, (16, 16))[..., None] * offset).round().astype(np.uint8)
    (expected,) = read_scene(pixels)
    base = int(16 + box[1] / 2) - 1  # of the widest row of a triangle
    for x, width in product((int(16 - box[0] / 2) - 3, int(np.ceil(16 + box[0] / 2)) + 2), (1, 2)):
        speckled = pixels.copy()
        speckled[base, x : x + width] = COLOURS["green"]
        ((covered, _),) = find_objects(speckled)
        assert covered[base, x] == 0
        assert read_scene(speckled) == [expected]


@pytest.mark.parametrize("shape", SHAPES)
def test_spots_have_no_shape_and_smaller_ones_are_ignored(shape):
    unit, offset = coverage(shape, (8, 8), (16, 16)).sum() / 64, np.subtract(COLOURS["cyan"], BACKGROUND)
    for area, shapes in ((50, [shape]), (18, ["unclear"]), (7, [])):
        side = np.sqrt(area / unit)
        pixels = (BACKGROUND + coverage(shape, (side, side), (16, 16))[..., None] * offset).round().astype(np.uint8)
        assert [detected.object.shape for detected in read_scene(pixels)] == shapes


@pytest.mark.parametrize("rival", RIVALS)
def test_arches_and_mounds_of_an_objects_area_have_no_shape(rival):
    images = [draw_rival(sample_scene(0, seed), rival) for seed in range(SOME // 2)]
    shapes = Counter(detected.object.shape for image in images for detected in read_scene(image))
    assert shapes == {"unclear": len(images)}


@pytest.mark.parametrize(
    ("noise", "blur", "shift"), [(24, 0, 0), (0, 1.0, 0), (0, 0, 0.5), (12, 0.7, 0.5)]
)
def test_checker_reads_noisy_blurred_and_shifted_scenes(noise, blur, shift):
    scenes, rng = [sample_scene(n % 3, n) for n in range(SOME)], np.random.default_rng(0)
    images = [degrade(render(scene), noise, blur, shift, rng) for scene in scenes]
    assert correct_shares(scenes, images)["everything"] >= 0.98


@given(levels, seeds, st.data())
@examples(150)
def test_one_wrong_word_gives_one_wrong_part(level, seed, data):
    scene = sample_scene(level, seed)
    description, pixels = scene.description, render(scene)
    g = data.draw(st.integers(0, len(description.kinds) - 1))
    for part, words in (("colour", tuple(COLOURS)), ("shape", SHAPES), ("size", SIZES)):
        word = data.draw(st.sampled_from([word for word in words if word != getattr(description.kinds[g], part)]))
        kinds = (*description.kinds[:g], replace(description.kinds[g], **{part: word}), *description.kinds[g + 1 :])
        assert wrong_parts(replace(description, kinds=kinds), pixels) == {part}
    if description.relations:
        r = data.draw(st.integers(0, len(description.relations) - 1))
        other = RELATIONS[1 - RELATIONS.index(description.relations[r])]
        swapped = (*description.relations[:r], other, *description.relations[r + 1 :])
        assert wrong_parts(replace(description, relations=swapped), pixels) == {"place"}
        reverse = Description(description.kinds[::-1], description.counts[::-1], description.relations[::-1])
        assert wrong_parts(reverse, pixels) == {"place"}


@given(seeds)
@examples(40)
def test_exactly_one_caption_is_true(seed):
    scene = sample_scene(2, seed)
    description, pixels = scene.description, render(scene)
    true_descriptions = set()
    for order in permutations(range(len(description.kinds))):
        for relations in product(RELATIONS, repeat=len(order) - 1):
            kinds, counts = tuple(description.kinds[g] for g in order), tuple(description.counts[g] for g in order)
            other = Description(kinds, counts, relations)
            if judge(other, pixels).everything:
                true_descriptions.add(other)
    assert true_descriptions == {description}


@given(levels, seeds)
@examples(100)
def test_extra_and_missing_objects_are_detected(level, seed):
    scene = sample_scene(level, seed)
    description = scene.description
    if len(description.kinds) > 1:
        first = Description(description.kinds[:1], description.counts[:1])
        assert wrong_parts(first, render(scene)) == {"count"}  # the other objects are extra
        half = replace(scene, description=first, centres=scene.centres[: description.counts[0]])
        assert {"count", "place"} <= wrong_parts(description, render(half))  # the other objects are missing
    elif description.counts[0] > 1:
        assert wrong_parts(replace(description, counts=(description.counts[0] - 1,)), render(scene)) == {"count"}
        assert "count" in wrong_parts(description, render(replace(scene, description=replace(description, counts=(1,)),
                                                           centres=scene.centres[:1])))  # fmt: skip


@given(levels, seeds)
@examples(100)
def test_half_erased_images_are_rejected(level, seed):
    scene = sample_scene(level, seed)
    text, pixels = caption(scene), render(scene)
    right, low = (round(max(centre[axis] for centre in scene.centres)) for axis in (0, 1))
    for erased in (np.s_[:, right:], np.s_[low:, :], np.s_[:, :16] if right <= 16 else np.s_[:, 16:]):
        image = pixels.copy()
        image[erased] = BACKGROUND
        if (image != pixels).any():  # half the canvas may be empty
            assert not judge(text, image).everything


@pytest.mark.parametrize("size", [32, 64])
def test_images_without_objects_are_rejected(size):
    rng = np.random.default_rng(0)
    blank = np.full((size, size, 3), BACKGROUND, np.uint8)
    images = [blank, np.zeros_like(blank), np.full_like(blank, 255), np.full_like(blank, COLOURS["red"])]
    images += [rng.integers(0, 256, blank.shape, np.uint8) for _ in range(10)]
    images += [(blank + rng.normal(0, 60, blank.shape)).clip(0, 255).astype(np.uint8) for _ in range(10)]
    for seed, image in enumerate(images):
        assert not judge(caption(sample_scene(1 + seed % 2, seed)), image).everything
    assert wrong_parts(parse("a large red circle"), blank) == {"count", "colour", "shape", "size"}
    assert read_scene(blank) == []


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1), (32, 16, 3)])
def test_arrays_of_another_shape_or_type_are_an_error(shape):
    for pixels in (np.zeros(shape, np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="a scene must be"):
            read_scene(pixels)


# The source


def test_source_gives_pairs_and_is_deterministic():
    source, again = Shapes(level=2, size=64, seed=3), Shapes(level=2, size=64, seed=3)
    for i in (999_999, 0, 7):
        text, image = source[i].segments
        assert (source[i].id, source[i].pairs, text.loss, image.loss) == (i, True, True, True)
        assert (image.pixels.shape, image.pixels.dtype) == ((64, 64, 3), np.uint8)
        assert parse(text.text) == source.scene(i).description
        assert text == again[i].segments[0]
        assert (image.pixels == again[i].segments[1].pixels).all()


def test_splits_share_no_image_for_any_seed_and_level():
    images = {}
    for split, seed, level in product(("train", "heldout"), (0, 1), (1, 2)):
        source = Shapes(level=level, split=split, seed=seed)
        for i in range(150):
            images.setdefault(split, set()).add(source[i].segments[1].pixels.tobytes())
    assert len(images["train"]) == len(images["heldout"]) == 600
    assert not images["train"] & images["heldout"]


@given(levels, seeds)
@examples(100)
def test_odd_seeds_have_a_separate_grid(level, seed):
    """So a held-out image is never a training image: even and odd seeds have different eighths of a pixel."""
    eighths = np.array(sample_scene(level, seed).centres) * 8
    assert (eighths % 2 == seed % 2).all()


def test_lengths_and_index_errors():
    assert (len(Shapes()), len(Shapes(split="heldout"))) == (1_000_000, 2_000)
    for i in (-1, 2_000):
        with pytest.raises(IndexError):
            Shapes(split="heldout")[i]
    for invalid in ({"level": 3}, {"split": "test"}, {"seed": -1}, {"size": 0}):
        with pytest.raises(ValueError, match="shapes does not support"):
            Shapes(**invalid)
    with pytest.raises(ValueError, match="no level 3"):
        sample_scene(3, 0)


def correct_shares(scenes, images):
    judgements = [judge(scene.description, image) for scene, image in zip(scenes, images, strict=True)]
    return {part: np.mean([getattr(judgement, part) for judgement in judgements]) for part in ("everything", *PARTS)}


def wrong_parts(description, pixels):
    judgement = judge(description, pixels)
    return {part for part in PARTS if not getattr(judgement, part)}


def test_draw_scenes_uses_each_heldout_scene_once():
    """A fake engine returns the image of the first scene for every request."""
    source = Shapes(split="heldout")
    documents = [source[n] for n in range(3)]
    image = documents[0].segments[1].pixels

    class FakeEngine:
        def generate(self, requests):
            return [[SimpleNamespace(parts=[image])] for _ in requests]

    values, shown = draw_scenes(FakeEngine(), documents, 200)
    assert (values["count_drawn"], len(shown)) == (3, 3)
    assert shown[0][2] and values["everything"] == sum(right for _, _, right in shown) / 3


# The same scenes for ever: runs are resumed, and published figures repeated


HASHES = {  # of captions, centres and images of 150 seeds, by level and size
    (0, 32): "f1c07001a47eee41", (1, 32): "792ff51484b3412e",
    (2, 32): "3b4db1a6bb3e2bdd", (2, 17): "4bdfdac14383fdb4", (1, 64): "863877fb7493b8d0",
}  # fmt: skip


@pytest.mark.parametrize(("level", "size"), HASHES)
def test_scenes_never_change(level, size):
    digest = sha256()
    for seed in (*range(140), *range(2**48, 2**48 + 10)):
        scene = sample_scene(level, seed)
        digest.update(f"{caption(scene)} {scene.centres}".encode() + render(scene, size).tobytes())
    assert digest.hexdigest()[:16] == HASHES[level, size]


boxes = st.sampled_from([(shape, box) for (_, shape), box in BOXES.items()])


@given(boxes, st.floats(6, 26), st.floats(6, 26), st.integers(1, 70))
@examples(300)
def test_only_pixels_near_an_object_are_drawn(kind, x, y, size):
    """`render` computes the coverage near each object: elsewhere it is zero."""
    box, mask = kind[1], coverage(*kind, (x, y), size)
    rows, columns = _pixels_near(y, box[1], size), _pixels_near(x, box[0], size)
    total = mask.sum()
    mask[rows, columns] = 0
    assert total > 0 and not mask.any()
