"""Requests are checked where they are made and where they are submitted; answers have a short repr."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.test_engine import assert_no_slot_is_lost, assert_same_answers, run_to_end
from tests.tiny import build_engine, picture
from transfusion.config import GenerationConfig
from transfusion.inference.answer import Answer, Answers
from transfusion.inference.request import Request
from transfusion.seeding import derive_seed, uniform_from
from transfusion.sequence import Text

some = examples(1000, quick=150)
few = examples(25, quick=8)

HUGE = 10**30
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, HUGE, 1.0, 1.5, math.nan, math.inf, 1j, "", "a", "4x4", "a\nb", b"a", "\ud800", "\0",
    [], [4], [4, 4], (4, 4), ("4", 4), {}, {"steps": 3}, set(), object(), int, np.int64(2), np.uint8(3), np.float32(1),
    np.bool(True), np.array(3), np.array([4, 4]), picture((4, 4), 0), picture((4, 4), 0)[0], np.zeros((0, 0, 3), np.uint8),
    Text(()), Text((1, 2)), Text((HUGE,)), Text((-1,)), Text((1.5,)), Text("ab"), Text(None), Text(np.array([1, 2])),
    (Text((1,)), "a"), (None,),
    ("a", 3), [picture((4, 4), 0)], GenerationConfig(steps=2, max_tokens=3), GenerationConfig(sampler="euler"),
]  # fmt: skip
FIELDS = list(Request.__dataclass_fields__)


@some
@given(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(ODD_VALUES), max_size=3))
def test_any_field_is_taken_or_refused_in_one_line(fields):
    fields = {"parts": "a", "generation": GenerationConfig("ddim", steps=2, max_tokens=3)} | fields
    if fields.get("num_images") is HUGE:
        return  # the user's own: there is no largest number
    engine = build_engine()
    try:
        engine.submit(Request(**fields))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 200
        assert not engine.sequences
    else:
        run_to_end(engine)
    assert_no_slot_is_lost(engine)


@pytest.mark.parametrize("field", FIELDS)
def test_every_odd_value_of_a_field_is_taken_or_refused(field):
    engine = build_engine()
    for value in ODD_VALUES:
        if field == "num_images" and value is HUGE:
            continue
        fields = {"parts": "a", "generation": GenerationConfig("ddim", steps=1, max_tokens=1), field: value}
        for num_images in (fields.get("num_images"), 1):
            try:
                engine.submit(Request(**fields | {"num_images": num_images}))
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
        run_to_end(engine)


@pytest.mark.parametrize("fields", [{"parts": "a\ud800"}, {"negative_prompt": "\udcff"}])
def test_text_that_is_not_unicode_is_one_line(fields):
    """A shell passes bytes that are not UTF-8 as lone surrogates."""
    with pytest.raises(ValueError, match=r"^'.*\\ud.*' is not valid Unicode \(it has a lone surrogate\)$"):
        build_engine().submit(Request(**{"parts": "a", "num_images": 1} | fields))


@pytest.mark.parametrize(("fields", "message"), [
    ({"generation": {}}, r"generation must be a GenerationConfig \(engine.make_generation_config.* makes one\), not {}"),
    ({"parts": 3}, "parts must be texts and pictures, not 3"), ({"parts": ("a", 3)}, "parts must be texts and pictures"),
    ({"parts": Text((1.5,))}, "the tokens of a Text must be whole numbers"), ({"parts": Text(None)}, "the tokens of a Text"),
    ({"num_images": 0}, "num_images must be at least 1, not 0"), ({"num_images": "2"}, "num_images must be a whole number"),
    ({"num_images": True}, "num_images must be a whole number, not True"), ({"seed": 1.0}, "seed must be a whole number"),
    ({"seed": None}, "seed must be a whole number, not None"), ({"size": "4x4"}, r"size must be \(width, height\)"),
    ({"size": (4, 4.5)}, "size must be a whole number, not 4.5"), ({"size": 4}, r"size must be \(width, height\)"),
    ({"preview_every": -1}, "preview_every must be at least 0"), ({"logprobs": -1}, "logprobs must be at least 0"),
    ({"allow_images": None}, "allow_images must be True or False, not None"), ({"prompt_logprobs": 1}, "True or False"),
    ({"negative_prompt": ("a",)}, "negative_prompt must be a text"),
    ({"size": (4, 4)}, "size has no effect without num_images"),
    ({"num_images": 1, "allow_images": False}, "allow_images is False, and num_images asks for images"),
])  # fmt: skip
def test_wrong_types_are_refused_where_the_request_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"parts": "a"} | fields)


def test_one_text_or_picture_is_one_part():
    for part in ("three", Text((1, 2)), picture((4, 4), 0)):
        assert Request(part).parts == Request((part,)).parts == Request([part]).parts
    engine = build_engine()
    one, several = engine.generate([Request("ab", 1), Request(("a", "b"), 1)])
    assert_same_answers(one, engine.generate([Request(("ab",), 1)])[0])


def test_size_may_be_a_list():
    assert Request("a", 1, size=[4, 4]) == Request("a", 1, size=(np.int64(4), 4))


@pytest.mark.parametrize("token", [-1, 10**30, 268])
def test_ids_that_are_not_the_tokenizers_are_refused(token):
    """Markers and image codes come only from the layout of the request."""
    engine = build_engine()
    with pytest.raises(ValueError, match=f"{token} is not an id of the run's tokenizer: its ids are 0 to 267"):
        engine.submit(Request(Text((1, token))))


@few
@given(st.text("ab é", min_size=1, max_size=6), st.integers(0, 2**40))
def test_text_that_is_already_encoded_gives_the_same_answer(text, seed):
    engine = build_engine()
    ids = engine.opened.tokenizer.encode(text)
    expected, *others = engine.generate([Request(part, seed=seed) for part in (text, Text(ids), Text(np.array(ids)))])
    for answers in others:
        assert_same_answers(answers, expected)


# Seeds


@few
@given(st.integers(-(2**63), 2**63 - 1))
def test_seeds_from_numpy_equal_pythons(seed):
    assert derive_seed(np.int64(seed), "a") == derive_seed(seed, "a")
    assert derive_seed(np.str_("a"), np.uint8(3)) == derive_seed("a", 3)
    assert Request("a", seed=np.int64(seed)) == Request("a", seed=seed)


def test_seeds_are_the_same_as_ever():
    assert derive_seed(0, 1, "image", 2) == 3817434912012060142
    assert derive_seed("digits", 3) == 8997016599420016385


@pytest.mark.parametrize("part", [True, 1.0, np.float64(1), None, b"a", np.bool(True), (1,)])
def test_other_seeds_are_refused(part):
    with pytest.raises(TypeError):
        derive_seed(part)


def test_uniform_numbers_are_below_1(monkeypatch):
    for seed in (2**63 - 1, 2**63 - 2**8):
        monkeypatch.setattr("transfusion.seeding.derive_seed", lambda *parts, seed=seed: seed)
        assert uniform_from("a") < 1


# Answers


def test_repr_of_answers_is_short():
    answer = Answer(["three", np.zeros((512, 256, 3), np.uint8), "x" * 10_000], "eos")
    assert repr(answer) == f"Answer(['three', <image 256x512>, '{'x' * 60}...'], 'eos')"
    assert repr(Answers([answer, Answer()])) == f"[{answer!r}, Answer([], '')]"
