"""GenEval: the published prompts byte for byte, the published rules by hand, and the six categories on `shapes`."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.data.built_in.shapes import Description, Shapes, caption, parse, render, sample_scene
from transfusion.evaluation import geneval_prompts
from transfusion.evaluation.geneval import (
    CATEGORIES,
    IMAGES_PER_PROMPT,
    Detection,
    Prompt,
    Requirement,
    draw_geneval,
    is_right,
    relative_positions,
)
from transfusion.evaluation.geneval_prompts import published_prompts, read_prompts
from transfusion.evaluation.geneval_shapes import detect_objects, shapes_prompts

# The prompts


def test_the_553_published_prompts_are_generated():
    """Counts by category as in the paper's repository; the code compares the SHA-256 of the whole file."""
    prompts = published_prompts()
    assert Counter(prompt.category for prompt in prompts) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert [prompts[n].text for n in (0, 179, 353, 530)] == [
        "a photo of a bench", "a photo of two clocks", "a photo of a dog right of a teddy bear",
        "a photo of a purple suitcase and an orange pizza",
    ]  # fmt: skip
    assert prompts[179].exclude == (Requirement("clock", 3),)
    assert prompts[353].include == (Requirement("teddy bear", 1), Requirement("dog", 1, relation="right of", relative_to=0))
    assert prompts[530].include == (Requirement("suitcase", 1, "purple"), Requirement("pizza", 1, "orange"))


def test_other_generated_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    with pytest.raises(ValueError, match="give its evaluation_metadata.jsonl with --prompts"):
        published_prompts()


LINE = {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
        "exclude": [{"class": "cat", "count": 2}], "prompt": "a dog above a cat"}  # fmt: skip


def test_prompts_are_read_from_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    include = Requirement("cat", 1), Requirement("dog", 1, relation="above", relative_to=0)
    assert read_prompts(path) == [Prompt("position", "a dog above a cat", include, (Requirement("cat", 2),))]


@pytest.mark.parametrize("wrong", [
    "", "{", "[]", "3", json.dumps(LINE | {"tag": "smell"}), json.dumps(LINE | {"include": []}),
    json.dumps({key: value for key, value in LINE.items() if key != "prompt"}),
    json.dumps(LINE | {"include": [{"class": "cat"}]}),
    json.dumps(LINE | {"include": LINE["include"][1:]}),  # refers to an entry that does not exist
    json.dumps(LINE).replace("above", "behind"), json.dumps(LINE).replace('"count": 1', '"count": "some"'),
])  # fmt: skip
def test_wrong_line_is_named(tmp_path, wrong):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + wrong + "\n")
    with pytest.raises(ValueError, match="prompts.jsonl, line 2 is not a prompt"):
        read_prompts(path)


def test_missing_prompts_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation_metadata.jsonl\) from .*nowhere.jsonl: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")


# The rules


def at(name, x, y, score=0.95, colour=None, side=10.0) -> Detection:
    return Detection(name, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), score, colour)


CAT, DOG = Requirement("cat", 1), Requirement("dog", 1)


@pytest.mark.parametrize(("prompt", "detections", "right"), [
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0, 0.31)], True),
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0, 0.3)], False),  # the score must exceed 0.3
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0), at("cat", 9, 9), at("dog", 5, 5)], True),  # extras are fine
    (Prompt("single_object", "", (CAT,)), [at("dog", 0, 0)], False),
    (Prompt("two_object", "", (CAT, DOG)), [at("dog", 0, 0), at("cat", 0, 0)], True),
    (Prompt("two_object", "", (CAT, DOG)), [at("dog", 0, 0), at("dog", 9, 9)], False),
    (Prompt("counting", "", (Requirement("cat", 2),), (Requirement("cat", 3),)),
     [at("cat", 0, 0), at("cat", 9, 9)], True),
    (Prompt("counting", "", (Requirement("cat", 2),), (Requirement("cat", 3),)),
     [at("cat", 0, 0)] * 3, False),
    (Prompt("counting", "", (Requirement("cat", 2),), (Requirement("cat", 3),)),
     [at("cat", 0, 0), at("cat", 9, 9, 0.9)], False),
    (Prompt("counting", "", (Requirement("cat", 2),), (Requirement("cat", 3),)),
     [at("cat", 0, 0)] * 2 + [at("cat", 0, 0, 0.8)], True),
    (Prompt("colors", "", (Requirement("cat", 1, "red"),)),
     [at("cat", 0, 0, 0.5, "red")], True),
    # only the colour of the highest score counts
    (Prompt("colors", "", (Requirement("cat", 1, "red"),)),
     [at("cat", 0, 0, 0.5, "red"), at("cat", 9, 9, 0.6, "blue")], False),
    (Prompt("colors", "", (Requirement("cat", 1, "red"),)),
     [at("cat", 0, 0, 0.7, "red"), at("cat", 9, 9, 0.6, "blue")], True),
    (Prompt("color_attr", "", (Requirement("cat", 1, "red"), Requirement("dog", 1, "blue"))),
     [at("cat", 0, 0, colour="red"), at("dog", 0, 0, colour="blue")], True),
    (Prompt("color_attr", "", (Requirement("cat", 1, "red"), Requirement("dog", 1, "blue"))),
     [at("cat", 0, 0, colour="blue"), at("dog", 0, 0, colour="red")], False),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", relative_to=0))),
     [at("cat", 0, 20), at("dog", 0, 0)], True),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", relative_to=0))),
     [at("cat", 0, 0), at("dog", 0, 20)], False),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", relative_to=0))),
     [at("dog", 0, 0)], False),
    # the dog with the highest score counts
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", relative_to=0))),
     [at("cat", 0, 20), at("dog", 0, 0, 0.8), at("dog", 0, 40, 0.9)], False),
])  # fmt: skip
def test_rules_by_hand(prompt, detections, right):
    assert is_right(prompt, detections) is right
    assert is_right(prompt, detections[::-1]) is right


def test_relation_needs_half_of_the_offset_beyond_a_tenth_of_both_boxes():
    cat = at("cat", 0, 0)  # boxes of 10: an offset up to 2 gives no relation
    assert relative_positions(cat, cat) == set()
    assert relative_positions(at("dog", 2, -2), cat) == set()
    assert relative_positions(at("dog", 5, 0), cat) == {"right of"}  # (5 - 2) / 5 > 0.5
    assert relative_positions(at("dog", 4, 0), cat) == set()  # (4 - 2) / 4 = 0.5
    assert relative_positions(at("dog", -30, 0), cat) == {"left of"}
    assert relative_positions(at("dog", 0, -30), cat) == {"above"}
    assert relative_positions(at("dog", 30, 30), cat) == {"right of", "below"}
    assert relative_positions(at("dog", 30, 15), cat) == {"right of"}  # (15 - 2) / 33.5 < 0.5


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
boxes = st.tuples(*[st.integers(-50, 50)] * 4).map(
    lambda v: Detection("", (v[0], v[1], v[0] + abs(v[2]), v[1] + abs(v[3])), 1)
)


@given(boxes, boxes)
def test_relations_follow_a_swap_and_a_transposition(a, b):
    positions = relative_positions(a, b)
    assert relative_positions(b, a) == {OPPOSITE[name] for name in positions}
    transposed = [replace(item, box=(item.box[1], item.box[0], item.box[3], item.box[2])) for item in (a, b)]
    transpose = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
    assert relative_positions(*transposed) == {transpose[name] for name in positions}


# Drawn images


class FakeEngine:
    """For each caption, `num_correct` right images, then images of the background only."""

    def __init__(self, scenes, num_correct: int):
        self.scenes, self.num_correct = {caption(scene): scene for scene in scenes}, num_correct
        self.seeds = []

    def generate(self, requests):
        answers = []
        for request in requests:
            self.seeds.append(request.seed)
            image = render(self.scenes[request.parts[0]])
            blank = np.full_like(image, 24)
            images = [image if n < self.num_correct else blank for n in range(request.num_images)]
            answers.append([SimpleNamespace(parts=[pixels]) for pixels in images])
        return answers


def test_overall_is_the_mean_over_categories():
    source = Shapes(level=2, split="heldout")
    scenes = [source.scene(n) for n in range(400)]
    prompts = shapes_prompts(map(caption, scenes), count=6)
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 6)
    engine = FakeEngine(scenes, num_correct=3)
    values, shown = draw_geneval(engine, prompts, detect_objects, seed=5)
    assert values == dict.fromkeys((*CATEGORIES, "overall"), 0.75) | {"count_drawn": 36 * IMAGES_PER_PROMPT}
    assert [text for text, _, _ in shown] == [prompt.text for prompt in prompts]
    assert all(right for _, _, right in shown)
    assert engine.seeds == [5 + n for n in range(36)]
    few = prompts[:6] + prompts[6:7]  # six of one category, one of another
    impossible = [replace(few[-1], include=(Requirement("house", 1),))]
    assert draw_geneval(engine, few[:-1] + impossible, detect_objects)[0]["overall"] == 0.375


def test_no_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        draw_geneval(FakeEngine([], 1), [], detect_objects)


@pytest.mark.parametrize(("level", "categories"), [
    (0, {"single_object", "colors"}), (1, set(CATEGORIES) - {"counting"}), (2, set(CATEGORIES)),
])  # fmt: skip
def test_level_determines_the_categories(level, categories):
    source = Shapes(level=level, split="heldout")
    prompts = shapes_prompts((caption(source.scene(n)) for n in range(300)), count=3)
    assert {prompt.category for prompt in prompts} == categories
    assert len({(prompt.category, prompt.text) for prompt in prompts}) == len(prompts)


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="not a caption of the data set shapes: 'a house'"):
        shapes_prompts(["a house"], count=1)


@pytest.mark.parametrize(("text", "drawn", "category"), [
    ("a large red circle", "a large red square", "single_object"),
    ("a large red circle", "a large blue circle", "colors"),
    ("three small red circles", "two small red circles", "counting"),
    ("two small red circles", "three small red circles", "counting"),
    ("a small red circle above a small blue square", "a small red circle", "two_object"),
    ("a small red circle above a small blue square", "a small blue square above a small red circle", "position"),
    ("a small red circle above a small blue square", "a small red circle left of a small blue square", "position"),
    ("a small red circle above a small blue square", "a small blue circle above a small red square", "color_attr"),
])  # fmt: skip
def test_each_category_detects_its_errors(text, drawn, category):
    (prompt,) = (prompt for prompt in shapes_prompts([text], count=1) if prompt.category == category)
    assert is_right(prompt, detect_objects(image_of(text)))
    assert not is_right(prompt, detect_objects(image_of(drawn)))


def test_other_attributes_do_not_count():
    """The size counts in no category, the colour only in colors and color_attr."""
    (single, colors) = shapes_prompts(["a large red circle"], count=1)
    assert is_right(single, detect_objects(image_of("a small blue circle")))
    assert is_right(colors, detect_objects(image_of("a small red circle")))


@cache
def image_of(text: str) -> np.ndarray:
    """An image that matches the caption: a random scene of the same form, with its colours."""
    description = parse(text)
    scenes = (sample_scene(1 if max(description.counts) == 1 else 2, seed) for seed in count())
    scene = next(scene for scene in scenes if form(scene.description) == form(description))
    return render(replace(scene, description=description))


def form(description: Description) -> tuple:
    """A description without its colours."""
    return description.counts, description.relations, [(kind.size, kind.shape) for kind in description.kinds]
