"""GenEval: the published prompts to the byte, the published rules by hand, and its six questions about `shapes`."""

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
    PER_PROMPT,
    Detection,
    Prompt,
    Requirement,
    draw_geneval,
    is_right,
    relations,
)
from transfusion.evaluation.geneval_prompts import published_prompts, read_prompts
from transfusion.evaluation.geneval_shapes import find_things, shapes_prompts

# The prompts


def test_the_553_published_prompts_are_drawn_again():
    """Numbers of each category as in the paper's repository; that all is right to the byte, a SHA-256 says."""
    prompts = published_prompts()
    assert Counter(prompt.category for prompt in prompts) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert [prompts[n].text for n in (0, 179, 353, 530)] == [
        "a photo of a bench", "a photo of two clocks", "a photo of a dog right of a teddy bear",
        "a photo of a purple suitcase and an orange pizza",
    ]  # fmt: skip
    assert prompts[179].unwanted == (Requirement("clock", 3),)
    assert prompts[353].wanted == (Requirement("teddy bear", 1), Requirement("dog", 1, relation="right of", other=0))
    assert prompts[530].wanted == (Requirement("suitcase", 1, "purple"), Requirement("pizza", 1, "orange"))


def test_another_numpy_that_draws_otherwise_is_told(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    with pytest.raises(ValueError, match="--prompts takes its evaluation_metadata.jsonl"):
        published_prompts()


LINE = {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
        "exclude": [{"class": "cat", "count": 2}], "prompt": "a dog above a cat"}  # fmt: skip


def test_a_file_of_prompts_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    wanted = Requirement("cat", 1), Requirement("dog", 1, relation="above", other=0)
    assert read_prompts(path) == [Prompt("position", "a dog above a cat", wanted, (Requirement("cat", 2),))]


@pytest.mark.parametrize("wrong", [
    "", "{", "[]", "3", json.dumps(LINE | {"tag": "smell"}), json.dumps(LINE | {"include": []}),
    json.dumps({key: value for key, value in LINE.items() if key != "prompt"}),
    json.dumps(LINE | {"include": [{"class": "cat"}]}),
    json.dumps(LINE | {"include": LINE["include"][1:]}),  # above what?
    json.dumps(LINE).replace("above", "behind"), json.dumps(LINE).replace('"count": 1', '"count": "some"'),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, wrong):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + wrong + "\n")
    with pytest.raises(ValueError, match="prompts.jsonl, line 2 is not a prompt"):
        read_prompts(path)


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation_metadata.jsonl\) from .*nowhere.jsonl: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")


# The rules


def at(name, x, y, score=0.95, colour=None, side=10.0) -> Detection:
    return Detection(name, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), score, colour)


CAT, DOG = Requirement("cat", 1), Requirement("dog", 1)


@pytest.mark.parametrize(("prompt", "found", "right"), [
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0, 0.31)], True),
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0, 0.3)], False),  # surer than 0.3, not as sure
    (Prompt("single_object", "", (CAT,)), [at("cat", 0, 0), at("cat", 9, 9), at("dog", 5, 5)], True),  # more is no fault
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
    # only the surest one is asked for its colour
    (Prompt("colors", "", (Requirement("cat", 1, "red"),)),
     [at("cat", 0, 0, 0.5, "red"), at("cat", 9, 9, 0.6, "blue")], False),
    (Prompt("colors", "", (Requirement("cat", 1, "red"),)),
     [at("cat", 0, 0, 0.7, "red"), at("cat", 9, 9, 0.6, "blue")], True),
    (Prompt("color_attr", "", (Requirement("cat", 1, "red"), Requirement("dog", 1, "blue"))),
     [at("cat", 0, 0, colour="red"), at("dog", 0, 0, colour="blue")], True),
    (Prompt("color_attr", "", (Requirement("cat", 1, "red"), Requirement("dog", 1, "blue"))),
     [at("cat", 0, 0, colour="blue"), at("dog", 0, 0, colour="red")], False),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", other=0))),
     [at("cat", 0, 20), at("dog", 0, 0)], True),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", other=0))),
     [at("cat", 0, 0), at("dog", 0, 20)], False),
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", other=0))),
     [at("dog", 0, 0)], False),
    # the surest dog counts, wherever the others are
    (Prompt("position", "", (CAT, Requirement("dog", 1, relation="above", other=0))),
     [at("cat", 0, 20), at("dog", 0, 0, 0.8), at("dog", 0, 40, 0.9)], False),
])  # fmt: skip
def test_the_rules_by_hand(prompt, found, right):
    assert is_right(prompt, found) is right
    assert is_right(prompt, found[::-1]) is right


def test_a_relation_is_more_than_half_of_the_way_beyond_a_tenth_of_both_boxes():
    here = at("cat", 0, 0)  # boxes of 10: what is within 2 is not beside it
    assert relations(here, here) == set()
    assert relations(at("dog", 2, -2), here) == set()
    assert relations(at("dog", 5, 0), here) == {"right of"}  # (5 - 2) / 5 > 0.5
    assert relations(at("dog", 4, 0), here) == set()  # (4 - 2) / 4 = 0.5
    assert relations(at("dog", -30, 0), here) == {"left of"}
    assert relations(at("dog", 0, -30), here) == {"above"}
    assert relations(at("dog", 30, 30), here) == {"right of", "below"}
    assert relations(at("dog", 30, 15), here) == {"right of"}  # (15 - 2) / 33.5 < 0.5


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
boxes = st.tuples(*[st.integers(-50, 50)] * 4).map(
    lambda v: Detection("", (v[0], v[1], v[0] + abs(v[2]), v[1] + abs(v[3])), 1)
)


@given(boxes, boxes)
def test_relations_turn_with_the_pair_and_with_the_picture(one, other):
    found = relations(one, other)
    assert relations(other, one) == {OPPOSITE[name] for name in found}
    turned = [replace(it, box=(it.box[1], it.box[0], it.box[3], it.box[2])) for it in (one, other)]
    aside = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
    assert relations(*turned) == {aside[name] for name in found}


# Drawn, and judged


class Draws:
    """A stand-in for an engine: of each caption so many of its pictures, then nothing but ground."""

    def __init__(self, scenes, good: int):
        self.scenes, self.good = {caption(scene): scene for scene in scenes}, good
        self.seeds = []

    def generate(self, requests):
        answers = []
        for request in requests:
            self.seeds.append(request.seed)
            picture = render(self.scenes[request.parts[0]])
            blank = np.full_like(picture, 24)
            answers.append([SimpleNamespace(parts=[picture if n < self.good else blank]) for n in range(request.num_images)])
        return answers


def test_all_six_questions_are_right_of_true_pictures_and_shares_are_means_over_categories():
    source = Shapes(level=2, split="heldout")
    scenes = [source.scene(n) for n in range(400)]
    prompts = shapes_prompts(map(caption, scenes), each=6)
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 6)
    engine = Draws(scenes, good=3)
    values, shown = draw_geneval(engine, prompts, find_things, seed=5)
    assert values == dict.fromkeys((*CATEGORIES, "overall"), 0.75) | {"count_drawn": 36 * PER_PROMPT}
    assert [text for text, _, _ in shown] == [prompt.text for prompt in prompts]
    assert all(right for _, _, right in shown)
    assert engine.seeds == [5 + n for n in range(36)]
    few = prompts[:6] + prompts[6:7]  # six of one category, one of another that no picture is right of
    nothing = [replace(few[-1], wanted=(Requirement("house", 1),))]
    assert draw_geneval(engine, few[:-1] + nothing, find_things)[0]["overall"] == 0.375


def test_without_a_prompt_there_is_nothing_to_say():
    with pytest.raises(ValueError, match="at least one prompt"):
        draw_geneval(Draws([], 1), [], find_things)


@pytest.mark.parametrize(("level", "asked"), [
    (0, {"single_object", "colors"}), (1, set(CATEGORIES) - {"counting"}), (2, set(CATEGORIES)),
])  # fmt: skip
def test_of_a_level_what_it_has_is_asked(level, asked):
    source = Shapes(level=level, split="heldout")
    prompts = shapes_prompts((caption(source.scene(n)) for n in range(300)), each=3)
    assert {prompt.category for prompt in prompts} == asked
    assert len({(prompt.category, prompt.text) for prompt in prompts}) == len(prompts)


def test_other_texts_are_no_captions_of_shapes():
    with pytest.raises(ValueError, match="not a caption of the world shapes: 'a house'"):
        shapes_prompts(["a house"], each=1)


@pytest.mark.parametrize(("said", "drawn", "category"), [
    ("a large red circle", "a large red square", "single_object"),
    ("a large red circle", "a large blue circle", "colors"),
    ("three small red circles", "two small red circles", "counting"),
    ("two small red circles", "three small red circles", "counting"),
    ("a small red circle above a small blue square", "a small red circle", "two_object"),
    ("a small red circle above a small blue square", "a small blue square above a small red circle", "position"),
    ("a small red circle above a small blue square", "a small red circle left of a small blue square", "position"),
    ("a small red circle above a small blue square", "a small blue circle above a small red square", "color_attr"),
])  # fmt: skip
def test_each_question_finds_its_own_fault(said, drawn, category):
    (prompt,) = (prompt for prompt in shapes_prompts([said], each=1) if prompt.category == category)
    assert is_right(prompt, find_things(picture_of(said)))
    assert not is_right(prompt, find_things(picture_of(drawn)))


def test_what_is_not_asked_for_does_not_count():
    """A size in no question, a colour in none but its own two."""
    (single, colors) = shapes_prompts(["a large red circle"], each=1)
    assert is_right(single, find_things(picture_of("a small blue circle")))
    assert is_right(colors, find_things(picture_of("a small red circle")))


@cache
def picture_of(text: str) -> np.ndarray:
    """Some picture that the caption is true of: that of a scene of its form, in its colours."""
    described = parse(text)
    scenes = (sample_scene(1 if max(described.counts) == 1 else 2, seed) for seed in count())
    scene = next(scene for scene in scenes if form(scene.description) == form(described))
    return render(replace(scene, description=described))


def form(described: Description) -> tuple:
    """All of a description but its colours."""
    return described.counts, described.relations, [(kind.size, kind.shape) for kind in described.kinds]
