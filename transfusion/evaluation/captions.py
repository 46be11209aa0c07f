"""Captions: does the model write what a held-out picture shows?"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image as Picture

from transfusion.data.loader import Source
from transfusion.evaluation.cider import LONGEST, bleu, cider, words_of
from transfusion.inference.engine import Engine, Request

ROWS = 256  # pictures that are captioned together


def caption_heldout(engine: Engine, source: Source, count: int) -> dict:
    """Greedy captions of the first `count` held-out documents of one picture each, compared letter by letter.

    Where captions are long enough for it, also by their words: CIDEr-D and BLEU-4.
    """
    asked, pictures = zip(*(source[n].pair for n in range(min(count, len(source)))), strict=True)
    said = caption_pictures(engine, pictures)
    exact = sum(a == s for a, s in zip(asked, said, strict=True))
    return {
        "exact": exact / len(asked), **by_words(said, [[text] for text in asked]), "count": len(asked),
        "answers": [{"document": n, "is": a, "said": s} for n, (a, s) in enumerate(zip(asked, said, strict=True))],
    }  # fmt: skip


def caption_pictures(engine: Engine, pictures: Iterable[np.ndarray]) -> list[str]:
    """What the model says of each picture (Y, X, channels) uint8 of any size, greedily; `ROWS` at a time."""
    greedy = replace(engine.run.generation, temperature=0.0)
    said, left = [], iter(pictures)
    while some := list(islice(left, ROWS)):
        fitted = [_fitting(engine, pixels) for pixels in some]
        answers = engine.generate([Request(parts=(part,), generation=greedy, allow_images=False) for part in fitted])
        said += [next((part for part in answer.parts if isinstance(part, str)), "") for (answer,) in answers]
    return said


def _fitting(engine: Engine, pixels: np.ndarray) -> np.ndarray | Picture.Image:
    """As it is where the run knows its size, else as a picture that the engine cuts to the nearest one."""
    if pixels.shape[1::-1] in engine.sizes and pixels.shape[2] == engine.opened.codec.image_channels:
        return pixels
    return Picture.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def by_words(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-4, where any reference is long enough for them."""
    if not any(len(words_of(text)) >= LONGEST for texts in references for text in texts):
        return {}
    return {"cider": cider(said, references), "bleu": bleu(said, references)}
