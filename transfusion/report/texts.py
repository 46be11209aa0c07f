"""Texts that a run generates: captions of held-out images, interleaved documents, and continued texts."""

from dataclasses import replace

import numpy as np

from transfusion.evaluation.captions import caption_heldout
from transfusion.inference.request import Request
from transfusion.page import Page
from transfusion.report.material import PICTURE, Material

NUM_CAPTIONS = 40  # held-out images shown with the model's captions
MAX_WRONG = 32  # of these
MAX_SEEDS = 30  # tried for an answer that holds two images
NUM_TEXTS = 3  # held-out texts that are continued
PROMPT_CHARACTERS = 95  # of each text, at most
TEMPERATURE = 0.8  # of the continuation
SMALL = 10_000_000  # parameters; text from a smaller model makes no sense


def add_captions(page: Page, material: Material) -> None:
    """Held-out images with the model's captions, the wrong ones first."""
    for source in material.pictured:
        word = PICTURE.get(source.name, "picture")
        measured = material.result(source.name, "captions") or caption_heldout(material.engine, source, NUM_CAPTIONS)
        answers = measured["answers"]
        right = [answer for answer in answers if answer["reference"] == answer["prediction"]]
        wrong = [answer for answer in answers if answer["reference"] != answer["prediction"]]
        shown_wrong, shown_right = wrong[:MAX_WRONG], right[: NUM_CAPTIONS - min(len(wrong), MAX_WRONG)]
        page.heading(f"Captions of held-out {word}s")
        page.paragraph(
            f"The model captioned {len(answers)} held-out {word}s by greedy decoding: "
            f"{len(right)} right, {len(wrong)} wrong. The first of each kind are shown, in the order of the data."
        )
        for title, part, total in (("Wrong", shown_wrong, wrong), ("Right", shown_right, right)):
            items = [(_compare(one), source[one["document"]].pair[1], total is right) for one in part]
            if items:
                width = 130 if source.name != "digits" else 72 if total is right else 112
                page.pictures(items, width=width, title=f"{title}: {len(part)} of {len(total)}")


def _compare(answer: dict) -> str:
    """The predicted caption, and the actual one where it differs."""
    predicted, actual = answer["prediction"], answer["reference"]
    return actual if predicted == actual else f"predicted {predicted or '(nothing)'},\nactual {actual}"


def add_interleaved(page: Page, material: Material) -> None:
    """A document that the model continues without constraints, with text and images."""
    engine = material.engine
    if "digits" not in material.sources or not engine.run.data.digits.interleaved:
        return
    prompt, options = "three", replace(engine.run.generation, temperature=1.0)
    for seed in range(MAX_SEEDS):
        [[answer]] = engine.generate([Request(parts=(prompt,), seed=seed, generation=options)])
        origins = ["drawn" if isinstance(part, np.ndarray) else "written" for part in answer.parts]
        if origins.count("drawn") >= 2:
            break
    page.heading("Interleaved text and images")
    page.paragraph(
        f"After the prompt `{prompt}` the model generates without constraints: at each position it writes a token, begins "
        "an image, or ends the document. "
        + (f"The answer of seed {seed} is the first, from seed 0 on, that holds at least two images."
           if origins.count("drawn") >= 2
           else f"No answer of the seeds 0 to {seed} holds two images; this is the last of them.")
    )  # fmt: skip
    page.passage([(prompt, "prompt"), *zip(answer.parts, origins, strict=True)])
    page.paragraph("The model ended the document." if answer.reason == "eos" else "It reached its length limit.", muted=True)


def add_text(page: Page, material: Material) -> None:
    """Held-out texts, continued from their first words."""
    if "topics" not in material.sources:
        return
    engine, source = material.engine, material.sources["topics"]
    texts = [source[n].segments[0].text for n in range(min(NUM_TEXTS, len(source)))]
    ids = [engine.opened.tokenizer.encode(text[:PROMPT_CHARACTERS])[: engine.max_positions // 2] for text in texts]
    prompts = [engine.opened.tokenizer.decode(prompt).rsplit(" ", 1)[0] for prompt in ids]
    options = replace(engine.run.generation, temperature=TEMPERATURE, max_tokens=engine.max_positions)
    answers = engine.generate([Request(parts=(prompt,), generation=options) for prompt in prompts])
    page.heading("Text only")
    style = " A model this small learns the style of a manual, not its meaning." if engine.opened.parameters < SMALL else ""
    page.paragraph(
        "The first words of held-out pages of Python's documentation (highlighted), and the model's continuation at "
        f"temperature {TEMPERATURE:g}, seed 0, up to the row length of {engine.max_positions} positions.{style}"
    )
    for prompt, [answer] in zip(prompts, answers, strict=True):
        page.code("".join(p if isinstance(p, str) else " (an image) " for p in answer.parts), prompt=prompt)
