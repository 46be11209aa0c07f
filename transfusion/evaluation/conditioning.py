"""Conditioning gap: how much the image loss of held-out images increases with another image's caption."""

import numpy as np
import torch

from transfusion import objective
from transfusion.data.loader import Source, read_pairs
from transfusion.inference.engine import Engine
from transfusion.seeding import derive_seed
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

BATCH_SIZE = 16  # images per forward pass
NUM_TIMESTEPS = 10  # of the grid from image to noise


def conditioning_gap(engine: Engine, source: Source, count: int) -> dict:
    """Image losses of the first `count` pairs, with their captions and with others', and gap = other / own - 1. The gap is 0
    for a model that ignores the caption. For image codes the loss is in nats per code. Images, timesteps and noise are the
    same for both. The other caption is the next different one; images without one are omitted."""
    pairs = list(read_pairs(source, count))
    triples = [(text, _next_different([t for _, t, _ in pairs], n), pixels) for n, (_, text, pixels) in enumerate(pairs)]
    triples = [triple for triple in triples if triple[1] is not None]
    if not triples:
        return {"count": 0}
    contents = [engine.opened.codec.encode(pixels) for _, _, pixels in triples]
    right, wrong = (_mean_loss(engine, [triple[n] for triple in triples], contents) for n in (0, 1))
    return {"image_loss": right, "image_loss_of_others": wrong, "gap": wrong / right - 1, "count": len(triples)}


@torch.inference_mode()
def _mean_loss(engine: Engine, captions: list[str], contents: list[np.ndarray]) -> float:
    """Mean image loss, each image after its caption. Noise and timestep are a function of the image's number."""
    total, count = 0.0, 0
    encode, vocabulary = engine.opened.tokenizer.encode, engine.vocabulary
    chunks = [
        encode_document(Document((Text(encode(caption)), Image(content)), key=derive_seed("conditioning", n)), vocabulary)
        for n, (caption, content) in enumerate(zip(captions, contents, strict=True))
    ]
    for first in range(0, len(chunks), BATCH_SIZE):
        rows = [Row((chunk,)) for chunk in chunks[first : first + BATCH_SIZE]]
        batch = collate(rows, max(len(row.chunks[0]) for row in rows), vocabulary)
        samples = objective.sample_noise_on_grid(batch, NUM_TIMESTEPS)
        with engine.opened.lower_precision():
            losses = objective.compute_losses(engine.model, batch.to(engine.device), samples, engine.run.diffusion)
        total, count = total + float(losses.image_sum + losses.code_sum), count + batch.image_count + batch.code_count
    return total / count


def _next_different(texts: list[str], n: int) -> str | None:
    return next((text for text in texts[n + 1 :] + texts[:n] if text != texts[n]), None)
