"""Stop sequences: against the rule itself, however the text is cut, in linear work."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.profile import examples
from transfusion.serving.stop import StopMatcher


def cut_at_stop_word(text: str, words: list[str]) -> tuple[str, bool]:
    """The rule: a text ends as soon as it ends with a word; the longest such word is removed."""
    for end in range(len(text) + 1):
        completed = [len(word) for word in words if word and text[:end].endswith(word)]
        if completed:
            return text[: end - max(completed)], True
    return text, False


def feed_pieces(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    sent = ""
    for piece in pieces:
        text, is_stopped = matcher.feed(piece)
        sent += text
        if is_stopped:
            return sent, True
    return sent + matcher.held, False


@examples(1000, 200)
@example(["aa", "ab"], ["aab"])
@example(["ababac"], ["abac", "b" * 5])
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", max_size=5), max_size=4))
def test_a_text_ends_before_its_first_stop_word_however_it_is_cut(pieces, words):
    assert feed_pieces(StopMatcher(words), pieces) == cut_at_stop_word("".join(pieces), words)


@examples(500, 100)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_word(text, words):
    matcher = StopMatcher(words)
    if not matcher.feed(text)[1]:
        beginnings = [word[:n] for word in words for n in range(len(word)) if text.endswith(word[:n])]
        assert matcher.held == max(beginnings, key=len, default="")


class CountingWord(str):
    reads = 0

    def __getitem__(self, index):
        CountingWord.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("word", ["a" * 999 + "c", "ab" * 400 + "c", "a" * 400 + "b" + "a" * 400 + "c"])
@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_the_work_is_linear_in_the_text(word, piece):
    matcher, text = StopMatcher([CountingWord(word)]), "aab" * 5 + "a" * 4_000 + "ab" * 1_000
    CountingWord.reads = 0
    for start in range(0, len(text), piece):
        assert not matcher.feed(text[start : start + piece])[1]
    assert CountingWord.reads <= 4 * len(text)
