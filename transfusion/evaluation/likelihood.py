"""Log probabilities of texts, token by token, in the layout of training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.inference.engine import Engine
from transfusion.objective import chunk_size
from transfusion.sequence import NO_TARGET, Chunk, Document, Row, Text, collate, encode_document

MAX_POSITIONS = 16_384  # of one forward pass, padding included


@dataclass(frozen=True)
class Likelihood:
    """The log probability (nats) of each token of a continuation, and whether greedy decoding gives the continuation."""

    log_probs: tuple[float, ...] = ()
    is_greedy: bool = True

    @property
    def total(self) -> float:
        return sum(self.log_probs)


def likelihoods(engine: Engine, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Of each (context, continuation), as one document: bos, the context without loss, the continuation. A document longer
    than a row is truncated on the left; if the continuation alone is longer, it is divided as in `rolling_likelihood`."""
    windows = []
    for context, continuation in pairs:
        before, after = encode_pair(engine, context, continuation)
        document = Document((Text(before, loss=False), Text(after)))
        chunk = _without_last(encode_document(document, engine.vocabulary, add_eos=False))
        row = engine.max_positions
        windows.append([chunk.part(max(0, len(chunk) - row))] if len(after) <= row else [*_windows(chunk, row)])
    return _score_windows(engine, windows)


def rolling_likelihood(engine: Engine, text: str) -> Likelihood:
    """Of a whole text of any length, after bos and without eos, in equally long rows. The last row overlaps the one before;
    each token counts once."""
    whole = encode_document(Document((Text(engine.opened.tokenizer.encode(text)),)), engine.vocabulary, add_eos=False)
    (likelihood,) = _score_windows(engine, [[*_windows(_without_last(whole), engine.max_positions)]])
    return likelihood


def encode_pair(engine: Engine, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of context + continuation, split before the first token that differs from the context's own ids. Trailing
    spaces of the context go to the continuation: a word and the space before it are one token."""
    encode = engine.opened.tokenizer.encode
    whole, alone = encode(context + continuation), encode(context.rstrip())
    same = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    return whole[:same], whole[same:]


def _score_windows(engine: Engine, windows: Sequence[list[Chunk]]) -> list[Likelihood]:
    """Of documents that are divided into rows: one likelihood for each."""
    scores = iter(_score(engine, [window for rows in windows for window in rows]))
    parts = [list(islice(scores, len(rows))) for rows in windows]
    return [Likelihood(tuple(nats for it in rows for nats in it.log_probs), all(it.is_greedy for it in rows))
            for rows in parts]  # fmt: skip


@torch.inference_mode()
def _score(engine: Engine, chunks: Sequence[Chunk]) -> list[Likelihood]:
    """Of the targets of each chunk, none longer than a row. Chunks of similar length share a forward pass."""
    scores: dict[int, Likelihood] = {}
    allowed = engine.allowed_tokens.to(engine.device)  # (V,)
    for numbers in _batch_by_length([len(chunk) for chunk in chunks]):
        length = len(chunks[numbers[0]])
        batch = collate([Row((chunks[n],)) for n in numbers], length, engine.vocabulary).to(engine.device)
        with engine.opened.lower_precision():
            head = partial(_score_targets, targets=batch.text_target, allowed=allowed)
            (nats, is_greedy), _ = engine.model(batch, [], [], head)  # (T,) both
        row_ids = batch.text_index // length  # (T,)
        for row, n in enumerate(numbers):
            in_row = row_ids == row  # (T,)
            scores[n] = Likelihood(tuple(nats[in_row].tolist()), bool(is_greedy[in_row].all()))
    return [scores.get(n, Likelihood()) for n in range(len(chunks))]


def _score_targets(hidden: Tensor, lm_head: Tensor, targets: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of the targets (T,), and whether each is the most likely of the allowed tokens."""
    parts = []
    size = chunk_size(hidden.device)
    for chunk, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = F.linear(chunk, lm_head).float()  # (C, V)
        likeliest = logits.masked_fill(~allowed, -torch.inf).argmax(-1)  # (C,)
        parts.append((-F.cross_entropy(logits, target, reduction="none"), likeliest == target))
    nats, is_greedy = map(torch.cat, zip(*parts, strict=True))
    return nats, is_greedy


def _without_last(chunk: Chunk) -> Chunk:
    """The last position has no target."""
    return chunk.part(0, len(chunk) - 1)


def _windows(chunk: Chunk, length: int) -> Iterator[Chunk]:
    for begin in range(0, len(chunk), length):
        end = min(begin + length, len(chunk))
        first = max(0, end - length)
        window = chunk.part(first, end)
        is_new = np.arange(first, end) >= begin
        yield replace(window, targets=np.where(is_new, window.targets, NO_TARGET))


def _batch_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The indices of all lengths above 0, longest first, in groups that fit into one forward pass."""
    order = sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: -lengths[n])
    while order:
        batch_size = max(1, MAX_POSITIONS // lengths[order[0]])
        yield order[:batch_size]
        order = order[batch_size:]
