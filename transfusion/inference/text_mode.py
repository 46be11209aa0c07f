"""Text mode: extend the cache, sample the next token from the logits, and log probabilities."""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from transfusion.config import GenerationConfig
from transfusion.inference.cache import Cache
from transfusion.inference.request import TokenLogprob
from transfusion.model.mask import cached_mask
from transfusion.model.transformer import rotary_positions
from transfusion.model.transfusion import Transfusion
from transfusion.seeding import derive_seed
from transfusion.sequence import NO_TARGET, Chunk, Row, Vocabulary, collate

MAX_CACHED = 2**17  # logits that a CPU samples from at once: their sums stay in its cache
ONE = 2**40  # the probability 1 as a whole number: smaller steps than those of float32
MIN_TEMPERATURE = 1e-4  # below it float32 gives every token but the most likely one probability zero


def extend_cache(
    model: Transfusion, cache: Cache, slots: list[int], chunks: list[Chunk], vocabulary: Vocabulary,
    num_logits: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Append each chunk to its slot, images with t = 0 (no noise). Returns logits (T, V) float32: those after the last
    num_logits[b] positions of chunk b, for all b in order. Default: one for each chunk."""
    num_logits = num_logits or [1] * len(chunks)
    new = max(map(len, chunks))
    view = cache.view(slots, new)
    batch = collate([Row((chunk,)) for chunk in chunks], new, vocabulary).to(cache.device)
    ends = [(row * new + len(chunk), n) for row, (chunk, n) in enumerate(zip(chunks, num_logits, strict=True))]
    index = torch.tensor([i for end, n in ends for i in range(end - n, end)], device=cache.device)  # (T,)
    is_full = new == 1 and view.needs_no_mask
    mask = None if is_full else cached_mask(view.lengths, new, batch.image_ids, model.config.image_attention)
    positions = rotary_positions(view.position_ids, batch.grid_offsets, model.config)
    x0 = [group.x0 for group in batch.groups]
    t = [torch.zeros(len(latents), device=cache.device) for latents in x0]
    prediction = model.forward_cached(
        batch.tokens, positions, mask, view, index, x0, t, [group.index for group in batch.groups], batch.sides
    )
    for slot, chunk in zip(slots, chunks, strict=True):
        cache.commit(slot, len(chunk))
    return prediction.logits.float()


def sample_tokens(
    logits: Sequence[Tensor], generations: Sequence[GenerationConfig], seeds: Sequence[int],
    allowed: Sequence[Tensor] | None = None,
) -> list[int]:  # fmt: skip
    """One token id for each row of logits (V,), among its allowed ids (V,) bool (default: all), with its temperature and
    top_p; greedy at temperature 0. A row depends on nothing but its own arguments. ValueError if its logits are not finite.

    All is computed on the device of the logits. A CPU takes a few rows at a time, which stay in its cache.
    """
    num_rows = max(1, MAX_CACHED // len(logits[0])) if logits[0].device.type == "cpu" else len(logits)
    tokens = []
    for rows in (slice(first, first + num_rows) for first in range(0, len(logits), num_rows)):
        batch = torch.stack(logits[rows])  # (B, V)
        if allowed is not None:
            batch.masked_fill_(~torch.stack(allowed[rows]), -torch.inf)
        tokens += _sample_batch(batch, generations[rows], seeds[rows])
    return tokens


def _sample_batch(logits: Tensor, generations: Sequence[GenerationConfig], seeds: Sequence[int]) -> list[int]:
    """A token id for each row of logits (B, V)."""
    highest, likeliest = logits.max(-1)  # (B,) each
    if not highest.isfinite().all():
        raise ValueError("the logits are not finite: the weights of the run are damaged, or too large for its precision")
    tokens = likeliest.tolist()
    rows = [row for row, generation in enumerate(generations) if generation.temperature >= MIN_TEMPERATURE]
    if rows:
        largest = torch.finfo(logits.dtype).max
        temperature = logits.new_tensor([min(generations[row].temperature, largest) for row in rows])[:, None]  # (R, 1)
        # The highest logit is subtracted first: divided by a small temperature it could be infinite.
        probabilities = logits[rows].sub_(highest[rows, None]).div_(temperature).softmax(-1)  # (R, V)
        sampled = _sample_nuclei(probabilities, [generations[row].top_p for row in rows], [seeds[row] for row in rows])
        for row, token in zip(rows, sampled, strict=True):
            tokens[row] = token
    return tokens


def _sample_nuclei(probabilities: Tensor, top_ps: Sequence[float], seeds: Sequence[int]) -> list[int]:
    """An id of each row of probabilities (B, V), from the smallest set of the likeliest ids that has at least top_p in all
    (nucleus sampling, 1904.09751). Equally likely ids are all in it, or all outside.

    No ids are sorted: an id is sampled from all, and rejected if the likelier ones have top_p without it. It is then outside
    of the set, like all that are not likelier, and the next id is sampled from the likelier ones (as in FlashInfer,
    2501.01005). Whole numbers make all sums exact, in any order and on any device.
    """
    tokens, rows = [0] * len(seeds), list(range(len(seeds)))
    weights = (probabilities * ONE).long()  # (R, V) of the remaining rows
    # With top_p 1 nothing is rejected, although the rounded probabilities may be more than 1 in all.
    limits = weights.new_tensor([max(1, int(top_p * ONE)) if top_p < 1 else 2 * ONE for top_p in top_ps])  # (R,)
    for attempt in count():
        ends = weights.cumsum(-1)  # (R, V) inverse transform sampling
        totals = ends[:, -1].tolist()
        numbers = [derive_seed(seeds[row], attempt) * total >> 63 for row, total in zip(rows, totals, strict=True)]
        sampled = torch.searchsorted(ends, weights.new_tensor(numbers)[:, None], right=True)  # (R, 1)
        likelier = weights * (weights > weights.gather(1, sampled))  # (R, V)
        is_outside = likelier.sum(-1) >= limits  # (R,)
        for row, token in zip(rows, sampled[:, 0].tolist(), strict=True):
            tokens[row] = token
        rows = [row for row, outside in zip(rows, is_outside.tolist(), strict=True) if outside]
        if not rows:
            return tokens
        weights, limits = likelier[is_outside], limits[is_outside]


def token_logprobs(logits: Tensor, tokens: Sequence[int], allowed: Tensor, num_top: int) -> list[TokenLogprob]:
    """Of each token, from the logits (T, V) that predict it, with the num_top most likely of the allowed ids (V,) bool."""
    normalizers = logits.logsumexp(-1, keepdim=True)  # (T, 1)
    own = logits.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]) - normalizers  # (T, 1)
    if not num_top:
        return [TokenLogprob(token, value) for token, (value,) in zip(tokens, own.tolist(), strict=True)]
    allowed_logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)  # (T, V)
    values, ids = allowed_logits.topk(min(num_top, int(allowed.sum())))  # (T, num_top)
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), (values - normalizers).tolist(), strict=True)]
    return [TokenLogprob(token, value, top) for token, (value,), top in zip(tokens, own.tolist(), pairs, strict=True)]


def prompt_logprobs(logits: Tensor, chunk: Chunk, allowed: Tensor, num_top: int) -> tuple[TokenLogprob | None, ...]:
    """Of a prompt after bos, from the logits after each of its positions (n, V). None where there is no text loss."""
    positions = np.flatnonzero(chunk.targets != NO_TARGET)
    scores = token_logprobs(logits[torch.from_numpy(positions)], chunk.targets[positions].tolist(), allowed, num_top)
    by_position = dict(zip(positions.tolist(), scores, strict=True))
    return tuple(map(by_position.get, range(len(chunk) - 1)))


def allowed_tokens(vocabulary: Vocabulary) -> Tensor:
    """Returns (V,) bool: text, every eos and boi. bos, pad, eoi and the padding ids of the vocabulary are never sampled."""
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[: vocabulary.num_text_tokens] = True
    allowed[[vocabulary.bos, vocabulary.pad, vocabulary.eoi]] = False
    allowed[[*vocabulary.eos_ids, *vocabulary.boi.values()]] = True  # after bos and pad: eos may be the same id
    return allowed
