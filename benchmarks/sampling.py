"""Sampling of tokens: all rows of a batch at once, against row by row with sorted ids on the CPU."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.config import GenerationConfig
from transfusion.inference.text_mode import sample_tokens

ROWS, NUM_IDS = 16, 128_256  # of Llama 3
SHARPNESS = 1.0  # standard deviation of the logits: top_p 0.9 keeps 78,000 ids


def measure(setting: Setting) -> Iterator[Figure]:
    """RuntimeError if a token is sampled outside of the sorted nucleus."""
    num_ids = setting.pick(NUM_IDS, 1000)
    logits = SHARPNESS * torch.randn(ROWS, num_ids, generator=torch.Generator().manual_seed(0))
    rows = list(logits.to(setting.device))
    for top_p in (1.0, 0.9, 0.5):
        options = [GenerationConfig(top_p=top_p)] * ROWS
        kept = [keep_sorted_nucleus(row.softmax(-1), top_p + 1e-4) for row in logits]
        tokens = sample_tokens(rows, options, range(ROWS))
        if not all(probabilities[token] for probabilities, token in zip(kept, tokens, strict=True)):
            raise RuntimeError(f"at top_p {top_p} a token outside of the nucleus was sampled")
        generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
        functions = {
            "together": partial(sample_tokens, rows, options, range(ROWS)),
            "by row": partial(sample_by_row, rows, top_p, generators),
        }
        seconds = time_alternately(functions, setting.pick(10, 1), setting.device)
        name = f"a token for {ROWS} rows of {num_ids:,} ids, top_p {top_p:g}"
        yield Figure(name, 1e3 * seconds["together"], "ms", seconds["by row"] / seconds["together"], "row by row, sorted")


def sample_by_row(logits: Sequence[Tensor], top_p: float, generators: Sequence[torch.Generator]) -> list[int]:
    """The plain way: the logits are copied to the CPU."""
    tokens = []
    for row, generator in zip(torch.stack(list(logits)).cpu(), generators, strict=True):
        probabilities = row.softmax(-1)
        if top_p < 1:
            probabilities = keep_sorted_nucleus(probabilities, top_p)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens


def keep_sorted_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities (V,) with zeros outside the smallest set of the likeliest ids that has at least top_p in all."""
    values, ids = probabilities.sort(descending=True)
    is_kept = values.cumsum(0) - values < top_p
    return torch.zeros_like(probabilities).index_copy(0, ids, values * is_kept)
