"""CIDEr-D and BLEU-4 against values of coco-caption (pycocoevalcap 1.2, on the same words), and what must hold of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from transfusion.evaluation.cider import bleu, cider, words_of

SAID = ["a red circle above a small blue square", "two large green triangles", "a dog on the table"]
REFERENCES = [
    ["a red circle above a blue square", "a large red circle over a small blue square"],
    ["two green triangles", "two large triangles of green"],
    ["a cat on the mat", "the dog lies on a table", "a dog sits on the table"],
]
WORDS = st.sampled_from("a red blue circle square above below two cat dog".split())
texts = st.lists(WORDS, min_size=4, max_size=9).map(" ".join)
many = examples(100)


def test_they_are_those_of_coco_caption():
    assert cider(SAID, REFERENCES) == pytest.approx(3.883666533490747, rel=1e-12)
    assert bleu(SAID, REFERENCES) == pytest.approx(0.6470841480107823, rel=1e-9)


def test_words_are_cut_without_case_and_punctuation():
    assert words_of("A dog's bowl, and THREE cats. Été!") == ["a", "dog's", "bowl", "and", "three", "cats", "été"]


@many
@given(st.lists(texts, min_size=2, max_size=6, unique=True))
def test_to_say_what_was_said_is_best(said):
    same = [[text] for text in said]
    assert bleu(said, same) == pytest.approx(1)
    assert bleu(said[1:] + said[:1], same) <= 1
    assert cider(said, same) >= cider(said[1:] + said[:1], same) - 1e-9


def test_each_picture_alone_in_its_words_scores_10():
    said = ["one two three four five", "six seven eight nine ten"]
    assert cider(said, [[text] for text in said]) == pytest.approx(10)


@many
@given(st.data(), st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=2, max_size=6))
def test_the_order_of_pictures_and_references_changes_nothing(data, pairs):
    other = [(text, data.draw(st.permutations(found))) for text, found in data.draw(st.permutations(pairs))]
    for score, most in ((cider, 10), (bleu, 1)):
        one, two = (score(*map(list, zip(*found, strict=True))) for found in (pairs, other))
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12)
        assert 0 <= one <= most + 1e-9


def test_a_caption_that_repeats_one_word_gains_nothing_by_it():
    """What CIDEr lacked, and CIDEr-D has: counts are clipped, and another length costs."""
    references = [["a red circle"], ["two blue squares"]]
    plain = cider(["a red circle", "two blue squares"], references)
    assert cider(["a red red red red red circle", "two blue squares"], references) < plain


@pytest.mark.parametrize("score", [cider, bleu])
@pytest.mark.parametrize(("said", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])])
def test_captions_without_references_are_refused(score, said, references):
    with pytest.raises(ValueError, match="references"):
        score(said, references)
