"""Writing: the engine's tokens a second behind a cached prompt, beside reading everything again for each token."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.made import engine
from benchmarks.measuring import Figure, Setting, in_turn
from transfusion.config import GenerationConfig
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import lower_precision, precision
from transfusion.sequence import Document, Row, Text, collate, encode_document

# 200 tokens, with what follows never 256: whole blocks would go to FlexAttention, and be compiled.
PROMPT = " ".join(["three"] * 100)


def measure(setting: Setting) -> Iterator[Figure]:
    """Both ways in turn. RuntimeError when they do not write the same (in bfloat16 near equals may change places)."""
    writer, tokens = engine("digits", setting), setting.pick(32, 3)
    writer.allowed_tokens[[writer.vocabulary.eos, *writer.vocabulary.boi.values()]] = (
        False  # text, and as much as is asked for
    )
    prompt = len(writer.opened.tokenizer.encode(PROMPT))
    for rows in setting.pick((1, 16), (2,)):
        same = with_cache(writer, rows, tokens) == again(writer, rows, tokens)
        if not same and precision(setting.device) == torch.float32:
            raise RuntimeError("with the cache the engine writes something else than without")
        ways = {
            "cache": lambda rows=rows: with_cache(writer, rows, tokens),
            "again": lambda rows=rows: again(writer, rows, tokens),
        }
        seconds = in_turn(ways, setting.pick(5, 1), setting.device, warm=0)
        what = f"{rows} row{'s' * (rows > 1)}, {tokens} tokens behind {prompt}"
        ratio = seconds["again"] / seconds["cache"]
        yield Figure(what, rows * tokens / seconds["cache"], "tokens/s", ratio, "reading everything again")


def with_cache(writer: Engine, rows: int, tokens: int) -> list[str]:
    """The engine's own way, the prompt read along; greedy."""
    generation = GenerationConfig(temperature=0, max_tokens=tokens)
    answers = writer.generate([Request((PROMPT,), generation=generation)] * rows)
    return [answer.parts[0] for (answer,) in answers]


@torch.inference_mode()
def again(writer: Engine, rows: int, tokens: int) -> list[str]:
    """All rows from their beginning for every token."""
    encode, decode = writer.opened.tokenizer.encode, writer.opened.tokenizer.decode
    written = [list(encode(PROMPT)) for _ in range(rows)]
    given = len(written[0])
    for _ in range(tokens):
        laid = [encode_document(Document((Text(tuple(row)),)), writer.vocabulary, ends=False) for row in written]
        length = len(laid[0])
        batch = collate([Row((chunk,)) for chunk in laid], length, writer.vocabulary)
        batch = replace(batch, text_index=torch.arange(rows) * length + length - 1).to(writer.device)
        with lower_precision(writer.device):
            logits = writer.model(batch, [], []).logits.float().cpu()  # (B, V)
        for row, token in zip(
            written, logits.masked_fill(~writer.allowed_tokens, -torch.inf).argmax(-1).tolist(), strict=True
        ):
            row.append(token)
    return [decode(row[given:]) for row in written]
