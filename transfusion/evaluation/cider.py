"""Captions beside what people wrote of the same pictures: CIDEr-D (Vedantam et al. 2015, 1411.5726) and BLEU-4.

Numbers agree with coco-caption's on the same words. Its words come from a Java program; here they are runs of letters and
digits in lower case, which for captions is nearly the same: compare numbers only where both were cut alike.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words in an n-gram
WIDTH = 6.0  # of the penalty for another length, in words
WORDS = re.compile(r"\w+(?:'\w+)?")


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return WORDS.findall(text.lower())


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, 0 to 10: how like its references each caption is, n-grams weighed by how rare they are among all pictures'.

    Published tables show 100 times as much. `references` are also what rarity is counted in, so with one picture everything
    is common, and the score is 0. ValueError when there are not as many as captions, or none for one.
    """
    _check(said, references)
    cut = [[_grams(words_of(text)) for text in texts] for texts in references]
    frequency = Counter(gram for texts in cut for gram in set().union(*texts))  # pictures that an n-gram is said of
    pictures = math.log(len(said))

    def weigh(grams: Counter) -> list[dict]:
        """By length of the n-grams: each one's count, times how rare it is."""
        weights = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (pictures - math.log(max(1, frequency[gram])))
        return weights

    scores = []
    for text, texts in zip(said, cut, strict=True):
        mine = _grams(words_of(text))
        scores.append(sum(_alike(mine, weigh(mine), other, weigh(other)) for other in texts) / len(texts))
    return 10 * sum(scores) / len(scores)


def _alike(mine: Counter, my_weights: list[dict], other: Counter, weights: list[dict]) -> float:
    """The cosine of both, clipped to what the reference has of each n-gram, mean over the lengths of n-grams."""
    difference = _length(mine) - _length(other)
    penalty = math.exp(-(difference**2) / (2 * WIDTH**2))
    cosines = []
    for here, there in zip(my_weights, weights, strict=True):
        norm = math.hypot(*here.values()) * math.hypot(*there.values())
        shared = sum(min(weight, there.get(gram, 0.0)) * there.get(gram, 0.0) for gram, weight in here.items())
        cosines.append(shared / norm if norm else 0.0)
    return penalty * sum(cosines) / LONGEST


def _length(grams: Counter) -> int:
    """In pairs of words, as coco-caption counts it."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all captions together, 0 to 1 (Papineni et al. 2002): the geometric mean of the shares of their n-grams that
    references have, less for captions that are shorter than the nearest reference. Errors as `cider`.
    """
    _check(said, references)
    right, all_, my_length, length = [0] * LONGEST, [0] * LONGEST, 0, 0
    for text, texts in zip(said, references, strict=True):
        mine, others = words_of(text), [words_of(other) for other in texts]
        my_length += len(mine)
        length += min((abs(len(other) - len(mine)), len(other)) for other in others)[1]
        grams, allowed = _grams(mine), Counter()
        for other in others:
            allowed |= _grams(other)
        for gram, count in grams.items():
            right[len(gram) - 1] += min(count, allowed[gram])
            all_[len(gram) - 1] += count
    if not all(right):
        return 0.0
    mean = sum(math.log(r / a) for r, a in zip(right, all_, strict=True)) / LONGEST
    return math.exp(mean + min(0.0, 1 - length / my_length))


def _grams(words: Sequence[str]) -> Counter:
    """How often every run of 1 to 4 words is there."""
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _check(said: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(said) != len(references) or not said or not all(references):
        raise ValueError(f"{len(said)} captions need as many pictures' references, at least one each, not {len(references)}")
