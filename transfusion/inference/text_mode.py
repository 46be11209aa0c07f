"""Text mode: extend the cache, and sample the next token from the logits."""

import torch
from torch import Tensor

from transfusion.config import GenerationConfig
from transfusion.inference.cache import Cache
from transfusion.model.mask import cached_mask
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Chunk, Row, Vocabulary, collate

MIN_TEMPERATURE = 1e-4  # below it float32 gives every token but the most likely one probability zero


def extend_cache(model: Transfusion, cache: Cache, slots: list[int], chunks: list[Chunk], vocabulary: Vocabulary) -> Tensor:
    """Append each chunk to its slot, images with t = 0 (no noise). Returns the logits after its end, (B, V) float32."""
    new = max(map(len, chunks))
    view = cache.view(slots, new)
    batch = collate([Row((chunk,)) for chunk in chunks], new, vocabulary).to(cache.device)
    last = torch.tensor([row * new + len(chunk) - 1 for row, chunk in enumerate(chunks)], device=cache.device)  # (B,)
    mask = cached_mask(view.lengths, new, batch.image_ids, model.config.image_attention)
    x0 = [group.x0 for group in batch.groups]
    t = [torch.zeros(len(latents), device=cache.device) for latents in x0]
    prediction = model.forward_cached(
        batch.tokens, view.position_ids, mask, view, last, x0, t, [group.index for group in batch.groups]
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
        sorted_probabilities, order = probabilities.sort(descending=True)
        in_nucleus = sorted_probabilities.cumsum(0) - sorted_probabilities < generation.top_p
        probabilities = torch.zeros_like(probabilities).index_copy(0, order, sorted_probabilities * in_nucleus)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def allowed_tokens(vocabulary: Vocabulary) -> Tensor:
    """Returns (V,) bool: text, every eos and boi. bos, pad, eoi and the padding ids of the vocabulary are never sampled."""
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[: vocabulary.num_text_tokens] = True
    allowed[[vocabulary.bos, vocabulary.pad, vocabulary.eoi]] = False
    allowed[[*vocabulary.eos_ids, *vocabulary.boi.values()]] = True  # after bos and pad: eos may be the same id
    return allowed
