"""Caption metrics over reference captions: CIDEr-D (Vedantam et al. 2015, 1411.5726) and BLEU-4.

They equal coco-caption's values on the same words. coco-caption uses a Java tokenizer; here a word is a run of letters and
digits in lower case, which is nearly the same for captions. Compare values only if both used the same tokenizer.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_N = 4  # words in an n-gram
LENGTH_SIGMA = 6.0  # of the Gaussian length penalty
WORD = re.compile(r"\w+(?:'\w+)?")


def split_words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return WORD.findall(text.lower())


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, 0 to 10: the mean cosine similarity of TF-IDF weighted n-grams, with clipped counts and a length penalty.
    Published tables show 100 times this value. The document frequencies come from `references`: with one image all n-grams
    are common and the score is 0. ValueError unless every prediction has at least one reference."""
    _check(predictions, references)
    ngrams = [[_ngrams(split_words(text)) for text in texts] for texts in references]
    frequency = Counter(ngram for counts in ngrams for ngram in set().union(*counts))  # number of images with the n-gram
    log_images = math.log(len(predictions))

    def tf_idf(counts: Counter) -> list[dict]:
        """For each n: count * log(images / images with the n-gram)."""
        weights = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequency[ngram])))
        return weights

    scores = []
    for text, texts in zip(predictions, ngrams, strict=True):
        counts = _ngrams(split_words(text))
        scores.append(sum(_similarity(counts, tf_idf(counts), other, tf_idf(other)) for other in texts) / len(texts))
    return 10 * sum(scores) / len(scores)


def _similarity(counts: Counter, weights: list[dict], reference: Counter, reference_weights: list[dict]) -> float:
    """The cosine, clipped to the reference's weight of each n-gram, averaged over n."""
    difference = _num_bigrams(counts) - _num_bigrams(reference)
    penalty = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
    cosines = []
    for ours, theirs in zip(weights, reference_weights, strict=True):
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum(min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, weight in ours.items())
        cosines.append(dot / norm if norm else 0.0)
    return penalty * sum(cosines) / MAX_N


def _num_bigrams(counts: Counter) -> int:
    """coco-caption's length of a caption."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0 to 1 (Papineni et al. 2002): the geometric mean of the n-gram precisions times the brevity penalty,
    relative to the reference of the nearest length. Errors as `cider`."""
    _check(predictions, references)
    matches, totals, length, reference_length = [0] * MAX_N, [0] * MAX_N, 0, 0
    for text, texts in zip(predictions, references, strict=True):
        words, others = split_words(text), [split_words(other) for other in texts]
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        allowed = Counter()
        for other in others:
            allowed |= _ngrams(other)
        for ngram, count in _ngrams(words).items():
            matches[len(ngram) - 1] += min(count, allowed[ngram])
            totals[len(ngram) - 1] += count
    if not all(matches):
        return 0.0
    mean = sum(math.log(match / total) for match, total in zip(matches, totals, strict=True)) / MAX_N
    return math.exp(mean + min(0.0, 1 - reference_length / length))


def _ngrams(words: Sequence[str]) -> Counter:
    """The counts of all n-grams, n from 1 to 4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references) or not predictions or not all(references):
        counts = f"{len(predictions)} captions and references of {len(references)} images"
        raise ValueError(f"{counts}: give at least one caption, and at least one reference for each caption")
