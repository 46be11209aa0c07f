"""CIDEr-D and BLEU-4 against values of coco-caption (pycocoevalcap 1.2, on the same words), and their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from transfusion.evaluation.cider import bleu, cider, split_words

PREDICTIONS = ["a red circle above a small blue square", "two large green triangles", "a dog on the table"]
REFERENCES = [
    ["a red circle above a blue square", "a large red circle over a small blue square"],
    ["two green triangles", "two large triangles of green"],
    ["a cat on the mat", "the dog lies on a table", "a dog sits on the table"],
]
WORDS = st.sampled_from("a red blue circle square above below two cat dog".split())
texts = st.lists(WORDS, min_size=4, max_size=9).map(" ".join)
many = examples(100)


def test_scores_equal_coco_caption():
    assert cider(PREDICTIONS, REFERENCES) == pytest.approx(3.883666533490747, rel=1e-12)
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(0.6470841480107823, rel=1e-9)


def test_words_have_no_case_and_no_punctuation():
    assert split_words("A dog's bowl, and THREE cats. Été!") == ["a", "dog's", "bowl", "and", "three", "cats", "été"]


@many
@given(st.lists(texts, min_size=2, max_size=6, unique=True))
def test_exact_predictions_score_best(predictions):
    references, rotated = [[text] for text in predictions], predictions[1:] + predictions[:1]
    assert bleu(predictions, references) == pytest.approx(1)
    assert bleu(rotated, references) <= 1
    assert cider(predictions, references) >= cider(rotated, references) - 1e-9


def test_exact_captions_without_common_words_score_10():
    predictions = ["one two three four five", "six seven eight nine ten"]
    assert cider(predictions, [[text] for text in predictions]) == pytest.approx(10)


@many
@given(st.data(), st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=2, max_size=6))
def test_order_of_images_and_references_does_not_matter(data, pairs):
    shuffled = [(text, data.draw(st.permutations(references))) for text, references in data.draw(st.permutations(pairs))]
    for score, maximum in ((cider, 10), (bleu, 1)):
        value, other = (score(*map(list, zip(*order, strict=True))) for order in (pairs, shuffled))
        assert value == pytest.approx(other, rel=1e-9, abs=1e-12)
        assert 0 <= value <= maximum + 1e-9


def test_repeated_words_lower_the_score():
    """CIDEr-D, unlike CIDEr, clips counts and has a length penalty."""
    references = [["a red circle"], ["two blue squares"]]
    plain = cider(["a red circle", "two blue squares"], references)
    assert cider(["a red red red red red circle", "two blue squares"], references) < plain


@pytest.mark.parametrize("score", [cider, bleu])
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])])
def test_captions_without_references_are_refused(score, predictions, references):
    with pytest.raises(ValueError, match="references"):
        score(predictions, references)
