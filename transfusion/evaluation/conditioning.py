"""Does the model listen? How much worse it denoises a held-out picture behind another picture's caption."""

import numpy as np
import torch

from transfusion import objective
from transfusion.data.loader import Source
from transfusion.inference.engine import Engine
from transfusion.seeding import derive_seed
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

ROWS = 16  # pictures per forward pass
TIMES = 10  # between clean and noise


def conditioning_gap(engine: Engine, source: Source, count: int) -> dict:
    """Image losses of the first `count` pairs, behind their own captions and behind others'; and the share by which the
    second is larger: 0 for a model that ignores what is asked. Of codes it is nats per code.

    Same pictures, same times, same noise. Another caption is the next one in order that says something else; pictures
    for which there is none are left out.
    """
    pairs = [source[n].pair for n in range(min(count, len(source)))]
    pairs = [(text, _another([t for t, _ in pairs], n), picture) for n, (text, picture) in enumerate(pairs)]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if not pairs:
        return {"count": 0}
    contents = [engine.opened.codec.encode(picture) for _, _, picture in pairs]
    right, wrong = (_loss(engine, [pair[which] for pair in pairs], contents) for which in (0, 1))
    return {"image_loss": right, "image_loss_of_others": wrong, "gap": wrong / right - 1, "count": len(pairs)}


@torch.inference_mode()
def _loss(engine: Engine, captions: list[str], contents: list[np.ndarray]) -> float:
    """Mean over pictures, each behind its caption; its noise and time follow from its number."""
    total, count = 0.0, 0
    encode, vocabulary = engine.opened.tokenizer.encode, engine.vocabulary
    chunks = [
        encode_document(Document((Text(encode(caption)), Image(content)), key=derive_seed("conditioning", n)), vocabulary)
        for n, (caption, content) in enumerate(zip(captions, contents, strict=True))
    ]
    for first in range(0, len(chunks), ROWS):
        rows = [Row((chunk,)) for chunk in chunks[first : first + ROWS]]
        batch = collate(rows, max(len(row.chunks[0]) for row in rows), vocabulary)
        draws = objective.sample_noise_on_grid(batch, TIMES)
        with engine.opened.lower_precision():
            losses = objective.compute_losses(engine.model, batch.to(engine.device), draws, engine.run.diffusion)
        total, count = total + float(losses.image_sum + losses.code_sum), count + batch.image_count + batch.code_count
    return total / count


def _another(texts: list[str], n: int) -> str | None:
    return next((text for text in texts[n + 1 :] + texts[:n] if text != texts[n]), None)
