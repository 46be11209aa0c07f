"""Captions: does the model write what a held-out picture shows?"""

from dataclasses import replace

from transfusion.data.loader import Source
from transfusion.evaluation.cider import LONGEST, bleu, cider, words_of
from transfusion.inference.engine import Engine, Request


def caption_heldout(engine: Engine, source: Source, count: int) -> dict:
    """Greedy captions of the first `count` held-out documents of one picture each, compared letter by letter.

    Where captions are long enough for it, also by their words: CIDEr-D and BLEU-4.
    """
    asked, pictures = zip(*(source[n].pair for n in range(min(count, len(source)))), strict=True)
    greedy = replace(engine.run.generation, temperature=0.0)
    answers = engine.generate([Request(parts=(picture,), generation=greedy) for picture in pictures])
    said = [next((part for part in answer.parts if isinstance(part, str)), "") for (answer,) in answers]
    exact = sum(a == s for a, s in zip(asked, said, strict=True))
    scores = {}
    if any(len(words_of(text)) >= LONGEST for text in asked):
        references = [[text] for text in asked]
        scores = {"cider": cider(said, references), "bleu": bleu(said, references)}
    return {
        "exact": exact / len(asked), **scores, "count": len(asked),
        "answers": [{"document": n, "is": a, "said": s} for n, (a, s) in enumerate(zip(asked, said, strict=True))],
    }  # fmt: skip
