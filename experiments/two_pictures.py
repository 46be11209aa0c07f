"""Documents of two pictures, as user data and as measured on a run, for the table of `copies`.

Both pictures are scenes with one object; the second is the first after an edit. A document is either both pictures with
their captions, or the edit: picture, instruction, picture. Captions do not say where the object is.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments import edits
from experiments.edits import generate_edits, judge_edits, measure_edits, write_edits
from transfusion.data.built_in.shapes import caption, render
from transfusion.evaluation.scenes import draw
from transfusion.inference.engine import Engine, Request

CAPTIONED, EDITS, CLEAN_EDITS = "captioned", "documents", "edits"  # sources: files of documents


def write_documents(folder: Path) -> list[Path]:
    """Write the training documents in the format for user data: image files, and a JSON Lines file for each source. Return
    the latter. In `EDITS` both pictures are images of a document like any other; in `CLEAN_EDITS`, the package's form of
    edits, the first has no noise and no loss. Instructions have no loss in either."""
    written, lines = write_edits(folder), []
    for n, (before, instruction, after) in enumerate(generate_edits("train", edits.NUM_EDITS)):
        first, second = ({"image": f"{n:05d}-{name}.png"} for name in ("before", "after"))
        captions = ({"text": caption(scene)} for scene in (before, after))
        pairs = [part for pair in zip(captions, (first, second), strict=True) for part in pair]
        lines.append(({"segments": pairs, "pairs": True},
                      {"segments": [first, {"text": instruction, "loss": False}, second]}))  # fmt: skip
    paths = [folder / f"{name}.jsonl" for name in (CAPTIONED, EDITS)]
    for path, documents in zip(paths, zip(*lines, strict=True), strict=True):
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return [*paths, written]


def measure_two_pictures(engine: Engine) -> dict[str, float]:
    """Of held-out scenes and their edits, other ones for each seed: what `measure_edits` returns; the same for second
    pictures drawn after the first one with its caption and the second caption ("drawings", "drawings_stayed"); and the share
    of greedy captions of second pictures, after the first one with its caption, that are exactly right ("captions")."""
    seed, count = engine.run.training.seed, edits.NUM_HELDOUT
    scenes = [*generate_edits("heldout", count, seed)]
    drawings = judge_edits(scenes, draw(engine, [
        Request((caption(before), render(before), caption(after)), 1, seed=seed * count + n)
        for n, (before, _, after) in enumerate(scenes)
    ]))  # fmt: skip
    greedy = replace(engine.run.generation, temperature=0.0)
    answers = engine.generate([
        Request((render(before), caption(before), render(after)), generation=greedy, allow_images=False)
        for before, _, after in scenes
    ])  # fmt: skip
    captions = [[*answer.parts] == [caption(after)] for (answer,), (*_, after) in zip(answers, scenes, strict=True)]
    return {
        **measure_edits(engine), "drawings": drawings["right"], "drawings_stayed": drawings["stayed"],
        "captions": np.mean(captions).item(),
    }  # fmt: skip
