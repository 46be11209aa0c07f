"""Drawn images of a run: of digits, of scenes, beside held-out pictures, and from noise to an image."""

import numpy as np

from transfusion.data.loader import read_pairs
from transfusion.inference.engine import Engine
from transfusion.inference.request import PreviewEvent, Request, raise_if_failed
from transfusion.page import Page
from transfusion.report.material import DRAWINGS, NUM_SCENES, PICTURE, Material

FRAMES = 10  # of the denoising strip


def add_digits(page: Page, material: Material) -> None:
    """Images drawn from each digit's name."""
    if "digits" not in material.sources:
        return
    page.heading("Drawn from a word")
    page.paragraph(f"The first {DRAWINGS} images of each prompt, the word at the left. A column has the same initial noise.")
    page.strip(material.digits)
    _add_settings(page, material.engine, "0")


def add_scenes(page: Page, material: Material) -> None:
    """One image for each of the first held-out captions, marked right or wrong."""
    if "shapes" not in material.sources:
        return
    page.heading("Drawn from a caption")
    right = sum(right for _, _, right in material.scenes)
    page.paragraph(
        f"One image for each of the first {NUM_SCENES} held-out captions. A program reads each scene from its pixels: "
        f"{right} of {NUM_SCENES} are right in everything."
    )
    page.pictures(material.scenes, width=92)
    _add_settings(page, material.engine, "0, 1, 2, ... for the first, second, third ... caption")


def add_gallery(page: Page, material: Material) -> None:
    """Held-out pictures beside drawings from their captions, of every source of captioned images."""
    for name, items in material.galleries.items():
        word = PICTURE.get(name, "picture")
        page.heading(f"Held-out {word}s and drawings")
        page.paragraph(
            f"The first {len(items)} held-out {word}s of `{name}` at the left, and at the right an image drawn "
            "from the caption alone."
        )
        page.pairs(items, width=60 if name == "digits" else 92)
        _add_settings(page, material.engine, "0, 1, 2, ... for the first, second, third ... caption")


def _add_settings(page: Page, engine: Engine, seed: str) -> None:
    """The options of generation with their values and meanings."""
    generation = engine.run.generation
    page.table([
        ("sampler", generation.sampler, "the algorithm that removes the noise"),
        ("steps", f"{generation.steps}", "denoising steps per image; more steps take longer and are more exact"),
        ("guidance scale", f"{generation.guidance_scale:g}", "how strongly the prompt is weighted; 1 is no guidance"),
        ("seed", seed, "sets the initial noise; the same seed and prompt give the same image"),
    ], ("setting", "value", "meaning"))  # fmt: skip


def add_denoising(page: Page, material: Material) -> None:
    """One image from noise to its final state."""
    if not material.pictured:
        return
    source = material.pictured[0]
    prompt = "three" if source.name == "digits" else next(read_pairs(source, 1))[1]
    frames = denoising_frames(material.engine, prompt)
    page.heading("From noise to an image")
    page.paragraph(
        f"Steps of the image drawn from `{prompt}`. Upper row: the noisy image x_t after the step. Lower row: the model's "
        "prediction of the final image x0 at that step. Each step moves x_t towards the prediction."
    )
    titles = ["step", *(str(frame.step) for frame in frames)]
    rows = [("noisy image x_t", [frame.x_t for frame in frames]), ("predicted image x0", [frame.x0 for frame in frames])]
    page.strip(rows, titles, width=60 if source.name == "digits" else 76)


def denoising_frames(engine: Engine, prompt: str) -> list[PreviewEvent]:
    """At most `FRAMES` evenly spaced steps of the image that is drawn from a prompt. RuntimeError if the sample fails."""
    request_id, previews = engine.submit(Request(parts=(prompt,), num_images=1, preview_every=1)), []
    while any(sequence.request_id == request_id for sequence in engine.sequences):
        for event in engine.step():
            raise_if_failed(event)
            previews += [event] if isinstance(event, PreviewEvent) else []
    return [previews[n] for n in np.unique(np.linspace(0, len(previews) - 1, FRAMES).round().astype(int))]
