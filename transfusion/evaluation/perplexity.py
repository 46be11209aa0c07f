"""Text metrics: bits per byte, which does not depend on the tokenizer, and perplexity per token; xz as a reference."""

import lzma
import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from transfusion.data.built_in.topics import Topics
from transfusion.inference.engine import Engine
from transfusion.objective import next_token_loss
from transfusion.sequence import NO_TARGET, Chunk, Document, Row, Text, collate, encode_document

BATCH_SIZE = 16  # windows per forward pass


@torch.inference_mode()
def bits_per_byte(engine: Engine, texts: list[str]) -> dict:
    """Over whole texts, eos included. After the first half row, every token has at least half a row of context."""
    length, tokenizer = engine.max_positions, engine.opened.tokenizer
    windows = [
        window
        for text in texts
        for window in split_windows(encode_document(Document((Text(tokenizer.encode(text)),)), engine.vocabulary), length)
    ]
    nats, num_tokens = 0.0, 0
    for first in range(0, len(windows), BATCH_SIZE):
        rows = [Row((window,)) for window in windows[first : first + BATCH_SIZE]]
        batch = collate(rows, length, engine.vocabulary).to(engine.device)
        with engine.opened.lower_precision():
            text, _ = engine.model(batch, [], [], partial(next_token_loss, target=batch.text_target))
        nats += float(text.sum)
        num_tokens += batch.text_count
    size = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / size, "perplexity": math.exp(nats / num_tokens), "tokens": num_tokens,
        "bytes": size,
    }  # fmt: skip


def heldout_topics(engine: Engine) -> dict:
    """Bits per byte of held-out topics; also of xz -9, for these alone and for what they add to the training topics."""
    heldout, train = Topics("heldout"), Topics("train")
    heldout_bytes, train_bytes = ("".join(topics.texts).encode() for topics in (heldout, train))
    alone, both, without = (
        len(lzma.compress(data, preset=9)) for data in (heldout_bytes, train_bytes + heldout_bytes, train_bytes)
    )
    return bits_per_byte(engine, heldout.texts) | {
        "xz_alone": 8 * alone / len(heldout_bytes), "xz_after_training_text": 8 * (both - without) / len(heldout_bytes),
        "text": heldout.describe(),
    }  # fmt: skip


def split_windows(chunk: Chunk, length: int) -> list[Chunk]:
    """Windows of at most `length` positions that overlap by half; each target counts in exactly one of them."""
    half, windows = length // 2, []
    for begin in range(0, max(1, len(chunk) - half), half):
        window = chunk.part(begin, min(begin + 2 * half, len(chunk)))
        if begin:
            targets = np.where(np.arange(len(window)) < half, NO_TARGET, window.targets)
            window = replace(window, targets=targets)
        windows.append(window)
    return windows
