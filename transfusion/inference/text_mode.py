"""Text mode: extend the cache, sample the next token from the logits, and log probabilities."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transfusion.config import GenerationConfig
from transfusion.inference.cache import Cache
from transfusion.inference.request import TokenLogprob
from transfusion.model.mask import cached_mask
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import NO_TARGET, Chunk, Row, Vocabulary, collate

NUM_SORTED = 1024  # ids that are sorted first for top_p
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
    mask = cached_mask(view.lengths, new, batch.image_ids, model.config.image_attention)
    x0 = [group.x0 for group in batch.groups]
    t = [torch.zeros(len(latents), device=cache.device) for latents in x0]
    prediction = model.forward_cached(
        batch.tokens, view.position_ids, mask, view, index, x0, t, [group.index for group in batch.groups]
    )
    for slot, chunk in zip(slots, chunks, strict=True):
        cache.commit(slot, len(chunk))
    return prediction.logits.float()


def sample_token(logits: Tensor, allowed: Tensor, generation: GenerationConfig, generator: torch.Generator) -> int:
    """Returns one token id, sampled from logits (V,) on the CPU among the allowed ids (V,) bool. Greedy at temperature 0."""
    logits = logits.masked_fill(~allowed, -torch.inf)
    if generation.temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    probabilities = (logits / generation.temperature).softmax(-1)
    if generation.top_p < 1:
        probabilities = keep_nucleus(probabilities, generation.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities (V,) with zeros outside the smallest set of the likeliest ids that has at least top_p in all (nucleus
    sampling, 1904.09751). A part of the ids is sorted, and all only if that is not enough: a sort of 128,256 takes 25 ms."""
    for size in (min(NUM_SORTED, len(probabilities)), len(probabilities)):
        values, ids = probabilities.topk(size)
        before = values.cumsum(0) - values  # (size,) total of the likelier ids
        if before[-1] >= top_p:
            break
    return torch.zeros_like(probabilities).index_copy(0, ids, values * (before < top_p))


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
