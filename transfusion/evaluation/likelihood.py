"""How likely is it that a run writes this text behind that one? Token by token, in the layout that it was trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from transfusion.inference.engine import Engine
from transfusion.sequence import NO_TARGET, Chunk, Document, Row, Text, collate, encode_document

POSITIONS = 16_384  # of one forward pass, padding included


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the log probability of each of its tokens (nats), and whether greedy writing would give just it."""

    tokens: tuple[float, ...] = ()
    is_greedy: bool = True

    @property
    def total(self) -> float:
        return sum(self.tokens)


def likelihoods(engine: Engine, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Of each (context, continuation): bos, the context without loss, the continuation, as one document of training.

    What is longer than a row loses positions on the left. ValueError when that would reach into the continuation.
    """
    chunks = []
    for context, continuation in pairs:
        before, after = split(engine, context, continuation)
        if len(after) > engine.context:
            raise ValueError(f"a continuation of {len(after)} tokens is longer than a row of this run, {engine.context}")
        document = Document((Text(before, loss=False), Text(after)))
        chunk = _without_last(encode_document(document, engine.vocabulary, ends=False))
        chunks.append(chunk.part(max(0, len(chunk) - engine.context)))
    return _score(engine, chunks)


def rolling_likelihood(engine: Engine, text: str) -> Likelihood:
    """Of a whole text behind bos, whatever its length: rows of it side by side, the last one as long as the others, of
    which only what is new counts. That it ends there (eos) does not count.
    """
    whole = encode_document(Document((Text(engine.opened.tokenizer.encode(text)),)), engine.vocabulary, ends=False)
    found = _score(engine, list(_windows(_without_last(whole), engine.context)))
    return Likelihood(tuple(nats for it in found for nats in it.tokens), all(it.is_greedy for it in found))


def split(engine: Engine, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of both written as one text, cut before the first token that is not the context's alone.

    Spaces at the end of the context go with the continuation: a word and the space before it are one token.
    """
    encode = engine.opened.tokenizer.encode
    whole, alone = encode(context + continuation), encode(context.rstrip())
    same = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    return whole[:same], whole[same:]


@torch.inference_mode()
def _score(engine: Engine, chunks: Sequence[Chunk]) -> list[Likelihood]:
    """Of the targets of each chunk, none longer than a row. Pieces of about one length share a forward pass."""
    found: dict[int, Likelihood] = {}
    allowed = engine.allowed_tokens.to(engine.device)  # (V,)
    for numbers in _by_length([len(chunk) for chunk in chunks]):
        length = len(chunks[numbers[0]])
        batch = collate([Row((chunks[n],)) for n in numbers], length, engine.vocabulary).to(engine.device)
        with engine.opened.lower_precision():
            logits = engine.model(batch, [], []).logits.float()  # (T, V)
        target = batch.text_target  # (T,)
        nats = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)  # (T,)
        is_greedy = logits.masked_fill(~allowed, -torch.inf).argmax(-1) == target  # (T,)
        of_row = batch.text_index // length  # (T,)
        for row, n in enumerate(numbers):
            mine = of_row == row  # (T,)
            found[n] = Likelihood(tuple(nats[mine].tolist()), bool(is_greedy[mine].all()))
    return [found.get(n, Likelihood()) for n in range(len(chunks))]


def _without_last(chunk: Chunk) -> Chunk:
    """Nothing is predicted from the last position."""
    return chunk.part(0, len(chunk) - 1)


def _windows(chunk: Chunk, length: int) -> Iterator[Chunk]:
    for begin in range(0, len(chunk), length):
        end = min(begin + length, len(chunk))
        first = max(0, end - length)
        window = chunk.part(first, end)
        is_new = np.arange(first, end) >= begin
        yield replace(window, targets=np.where(is_new, window.targets, NO_TARGET))


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of all that are not empty, the longest first, in groups of which each fits into one forward pass."""
    order = sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: -lengths[n])
    while order:
        fit = max(1, POSITIONS // lengths[order[0]])
        yield order[:fit]
        order = order[fit:]
