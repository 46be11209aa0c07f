"""Captions: does the model write exactly what a held-out picture shows?"""

from dataclasses import replace

from transfusion.data.loader import Source
from transfusion.data.raw import RawImage, RawText
from transfusion.inference.engine import Engine, Request


def caption_heldout(engine: Engine, source: Source, count: int) -> dict:
    """Greedy captions of the first `count` held-out documents of one picture each, compared letter by letter."""
    raws = [source[n] for n in range(min(count, len(source)))]
    pictures = [next(part.pixels for part in raw.segments if isinstance(part, RawImage)) for raw in raws]
    asked = [next(part.text for part in raw.segments if isinstance(part, RawText)) for raw in raws]
    greedy = replace(engine.run.generation, temperature=0.0)
    answers = engine.generate([Request(parts=(picture,), generation=greedy) for picture in pictures])
    said = [next((part for part in answer.parts if isinstance(part, str)), "") for (answer,) in answers]
    exact = sum(a == s for a, s in zip(asked, said, strict=True))
    return {
        "exact": exact / len(raws), "count": len(raws),
        "answers": [{"document": n, "is": a, "said": s} for n, (a, s) in enumerate(zip(asked, said, strict=True))],
    }  # fmt: skip
