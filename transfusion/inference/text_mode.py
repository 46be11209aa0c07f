"""Reading and writing: positions into the cache, and the next token out of it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transfusion.config import GenerationConfig
from transfusion.inference.cache import Cache
from transfusion.model.mask import cached
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Piece, Vocabulary, collate
from transfusion.sequence import Row as PackedRow

COLDEST = 1e-4  # below this temperature nothing but the likeliest token has a chance that float32 could hold


def read(model: Transfusion, cache: Cache, slots: list[int], pieces: Sequence[Piece], vocabulary: Vocabulary) -> Tensor:
    """Put each piece behind what its slot holds, images clean (t = 0); the logits after its last position, (B, V)."""
    new = max(map(len, pieces))
    view = cache.view(slots, new)
    batch = collate([PackedRow((piece,)) for piece in pieces], new, vocabulary).to(cache.device)
    last = torch.tensor([row * new + len(piece) - 1 for row, piece in enumerate(pieces)], device=cache.device)
    batch = replace(batch, position=view.place, text_index=last)
    mask = cached(view.lengths, new, batch.image, model.config.image_attention)
    clean = [group.clean for group in batch.groups]
    said = model(batch, clean, [torch.zeros(len(latent), device=cache.device) for latent in clean], mask, view)
    for slot, piece in zip(slots, pieces, strict=True):
        cache.advance(slot, len(piece))
    return said.logits.float()


def choose(logits: Tensor, allowed: Tensor, generation: GenerationConfig, generator: torch.Generator) -> int:
    """One token id from logits (V,) on the CPU, among those allowed (V,): greedy at temperature 0."""
    logits = logits.masked_fill(~allowed, -torch.inf)
    if generation.temperature < COLDEST:
        return int(logits.argmax())
    probabilities = (logits / generation.temperature).softmax(-1)
    if generation.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        kept = ordered.cumsum(0) - ordered < generation.top_p  # the likeliest ones that together reach top_p
        probabilities = torch.zeros_like(probabilities).index_copy(0, order, ordered * kept)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def allowed_tokens(vocabulary: Vocabulary) -> Tensor:
    """(V,) bool: text, eos and the bois. bos, pad, eoi and the ids that fill up to 128 are never sampled."""
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[: vocabulary.text] = True
    allowed[[vocabulary.bos, vocabulary.pad, vocabulary.eoi]] = False
    allowed[[vocabulary.eos, *vocabulary.boi.values()]] = True
    return allowed
