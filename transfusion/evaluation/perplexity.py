"""Text: how surprised is the model? In bits per byte, so that tokenizers do not matter, beside what xz makes of it; and as
perplexity, which is per token of this tokenizer.
"""

import lzma
import math
from dataclasses import replace

import numpy as np
import torch

from transfusion.data.built_in.topics import Topics
from transfusion.inference.engine import Engine
from transfusion.objective import next_token_loss
from transfusion.sequence import NO_TARGET, Chunk, Document, Row, Text, collate, encode_document

ROWS = 16  # windows per forward pass


@torch.inference_mode()
def bits_per_byte(engine: Engine, texts: list[str]) -> dict:
    """Over whole texts, the end included. Every token but those of the first half row is seen behind at least half a row."""
    length, tokenizer = engine.context, engine.opened.tokenizer
    windows = [
        window
        for text in texts
        for window in cut_windows(encode_document(Document((Text(tokenizer.encode(text)),)), engine.vocabulary), length)
    ]
    nats, tokens = 0.0, 0
    for first in range(0, len(windows), ROWS):
        rows = [Row((window,)) for window in windows[first : first + ROWS]]
        batch = collate(rows, length, engine.vocabulary).to(engine.device)
        with engine.opened.lower_precision():
            logits = engine.model(batch, [], []).logits
        nats += float(next_token_loss(logits, batch.text_target).sum())
        tokens += batch.text_count
    size = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / size, "perplexity": math.exp(nats / tokens), "tokens": tokens, "bytes": size,
    }  # fmt: skip


def heldout_topics(engine: Engine) -> dict:
    """The held-out topics, and the two figures of xz -9: of them alone, and of what they add to the training topics."""
    heldout, train = Topics("heldout"), Topics("train")
    held, seen = ("".join(topics.texts).encode() for topics in (heldout, train))
    alone, both, without = (len(lzma.compress(data, preset=9)) for data in (held, seen + held, seen))
    return bits_per_byte(engine, heldout.texts) | {
        "xz_alone": 8 * alone / len(held), "xz_after_training_text": 8 * (both - without) / len(held),
        "text": heldout.describe(),
    }  # fmt: skip


def cut_windows(chunk: Chunk, length: int) -> list[Chunk]:
    """Half-overlapping windows of at most this length; each position's loss stands in exactly one of them."""
    half, windows = length // 2, []
    for begin in range(0, max(1, len(chunk) - half), half):
        window = chunk.part(begin, min(begin + 2 * half, len(chunk)))
        if begin:
            counted = np.where(np.arange(len(window)) < half, NO_TARGET, window.targets)
            window = replace(window, targets=counted)
        windows.append(window)
    return windows
