"""Captions of held-out images: exact match, CIDEr-D and BLEU-4."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image as Picture

from transfusion.data.loader import Source, read_pairs
from transfusion.evaluation.cider import MAX_N, bleu, cider, split_words
from transfusion.inference.engine import Engine, Request

BATCH_SIZE = 256  # images that are captioned together


def caption_heldout(engine: Engine, source: Source, count: int) -> dict:
    """Greedy captions of the first `count` held-out images, one of each document: the share that is exactly right. Where
    captions are long enough, also CIDEr-D and BLEU-4."""
    documents, captions, images = zip(*read_pairs(source, count), strict=True)
    predictions = caption_images(engine, images)
    pairs = list(zip(captions, predictions, strict=True))
    return {
        "exact": sum(caption == prediction for caption, prediction in pairs) / len(pairs),
        **word_scores(predictions, [[caption] for caption in captions]), "count": len(pairs),
        "answers": [{"document": n, "reference": caption, "prediction": text}
                    for n, (caption, text) in zip(documents, pairs, strict=True)],
    }  # fmt: skip


def caption_images(engine: Engine, images: Iterable[np.ndarray]) -> list[str]:
    """The greedy caption of each image (Y, X, channels) uint8 of any size, in batches of `BATCH_SIZE`."""
    greedy = replace(engine.run.generation, temperature=0.0)
    predictions, remaining = [], iter(images)
    while batch := list(islice(remaining, BATCH_SIZE)):
        parts = [_to_part(engine, pixels) for pixels in batch]
        answers = engine.generate([Request(parts=(part,), generation=greedy, allow_images=False) for part in parts])
        predictions += [next((part for part in answer.parts if isinstance(part, str)), "") for (answer,) in answers]
    return predictions


def _to_part(engine: Engine, pixels: np.ndarray) -> np.ndarray | Picture.Image:
    """The pixels if the run supports their size, else a PIL image, which the engine resizes to the nearest size."""
    if pixels.shape[1::-1] in engine.sizes and pixels.shape[2] == engine.opened.codec.image_channels:
        return pixels
    return Picture.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def word_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-4; empty if no reference has enough words for them."""
    if not any(len(split_words(text)) >= MAX_N for texts in references for text in texts):
        return {}
    return {"cider": cider(predictions, references), "bleu": bleu(predictions, references)}
