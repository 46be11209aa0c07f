"""Text generation: tokens per second with the KV cache, against recomputing the whole sequence for each token."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.fixtures import make_engine
from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.config import GenerationConfig
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import lower_precision, precision
from transfusion.sequence import Document, Row, Text, collate, encode_document

# 200 tokens. With the generated ones never 256: whole blocks would use FlexAttention, which is compiled.
PROMPT = " ".join(["three"] * 100)


def measure(setting: Setting) -> Iterator[Figure]:
    """RuntimeError if both ways give different tokens. (In bfloat16 nearly equal logits may swap.)"""
    engine, num_tokens = make_engine("digits", setting), setting.pick(32, 3)
    # Text only, and always as many tokens as requested.
    engine.allowed_tokens[[*engine.vocabulary.eos_ids, *engine.vocabulary.boi.values()]] = False
    prompt_length = len(engine.opened.tokenizer.encode(PROMPT))
    for rows in setting.pick((1, 16), (2,)):
        is_same = generate_cached(engine, rows, num_tokens) == generate_uncached(engine, rows, num_tokens)
        if not is_same and precision(setting.device) == torch.float32:
            raise RuntimeError("the engine generates different tokens with and without the cache")
        functions = {
            "cached": lambda rows=rows: generate_cached(engine, rows, num_tokens),
            "uncached": lambda rows=rows: generate_uncached(engine, rows, num_tokens),
        }
        seconds = time_alternately(functions, setting.pick(5, 1), setting.device, warmup=0)
        name = f"{rows} row{'s' * (rows > 1)}, {num_tokens} tokens after {prompt_length}"
        ratio = seconds["uncached"] / seconds["cached"]
        yield Figure(name, rows * num_tokens / seconds["cached"], "tokens/s", ratio, "without a cache")


def generate_cached(engine: Engine, rows: int, num_tokens: int) -> list[str]:
    """Greedy generation by the engine, including the prefill."""
    generation = GenerationConfig(temperature=0, max_tokens=num_tokens)
    answers = engine.generate([Request((PROMPT,), generation=generation)] * rows)
    return [answer.parts[0] for (answer,) in answers]


@torch.inference_mode()
def generate_uncached(engine: Engine, rows: int, num_tokens: int) -> list[str]:
    """Greedy generation that recomputes all rows from the start for every token."""
    encode, decode = engine.opened.tokenizer.encode, engine.opened.tokenizer.decode
    sequences = [list(encode(PROMPT)) for _ in range(rows)]
    prompt_length = len(sequences[0])
    for _ in range(num_tokens):
        documents = [Document((Text(tuple(tokens)),)) for tokens in sequences]
        chunks = [encode_document(document, engine.vocabulary, add_eos=False) for document in documents]
        length = len(chunks[0])
        batch = collate([Row((chunk,)) for chunk in chunks], length, engine.vocabulary)
        batch = replace(batch, text_index=torch.arange(rows) * length + length - 1).to(engine.device)
        with lower_precision(engine.device):
            logits = engine.model(batch, [], []).logits.float().cpu()  # (B, V)
        next_tokens = logits.masked_fill(~engine.allowed_tokens, -torch.inf).argmax(-1).tolist()
        for tokens, token in zip(sequences, next_tokens, strict=True):
            tokens.append(token)
    return [decode(tokens[prompt_length:]) for tokens in sequences]
