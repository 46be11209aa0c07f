"""How good a run is, and what it cost: the figures of results.json and of training."""

import shlex
from collections.abc import Iterator

import numpy as np

from transfusion.evaluation.continuous import MAX_HUE_ERROR, MAX_PLACE_ERROR, MAX_SIZE_ERROR
from transfusion.evaluation.scenes import ATTRIBUTES
from transfusion.page import Page
from transfusion.report.material import PICTURE, Material
from transfusion.report.record import format_duration

CRITERIA = {
    "everything": "all criteria below", "count": "the number of objects equals the caption's",
    "colour": "of every object", "shape": "of every object", "size": "of every object, small or large",
    "place": "the relations above and left of, as in the caption",
}  # fmt: skip
CONTINUOUS_CRITERIA = {
    "everything": "all criteria below", "count": "one object", "colour": f"its hue within {MAX_HUE_ERROR:g} degrees",
    "shape": "that of the caption", "size": f"within {MAX_SIZE_ERROR:g} of 32", "place": f"within {MAX_PLACE_ERROR:g} of 32",
}  # of level 3  # fmt: skip
ERRORS = {"hue_error": "hue, degrees", "place_error": "place, of a side of 32", "size_error": "size, of a side of 32"}


def add_scores(page: Page, material: Material) -> None:
    """The size of the held-out data, the headline scores, what they compare with, and the cost of training."""
    page.heading("How good it is")
    pictured = [source.name for source in material.pictured]
    words = {name: PICTURE.get(name, "picture" if name in pictured else "text") for name in material.sources}
    sizes = [f"{len(material.sources[name]):,} {word}s of `{name}`" for name, word in words.items()]
    page.paragraph(f"Held-out data, not used in training: {', '.join(sizes)}.")
    figures = list(_figures(material))
    if figures:
        page.figures(figures)
    else:
        reason = "The measured tasks have no figures here" if material.record.results else "This run is not measured yet"
        folder = shlex.quote(str(material.record.folder))
        page.paragraph(f"{reason}: `transfusion evaluate {folder}` writes all figures to `results.json`.")
    if drawings := material.result("digits", "drawings"):
        page.bars(
            "Are the drawn digits copies of training scans?",
            [("drawing to nearest training scan", drawings["nearest_training_scan"], "image"),
             ("held-out scan to nearest training scan", drawings["nearest_training_scan_of_heldout"], "plain")],
            "Median Euclidean distance over the 64 pixels, each from 0 to 1; near 0 for copies. Compare both bars.",
        )  # fmt: skip
    if text := material.result("topics", "text"):
        page.bars(
            "Bits per byte, compared with a file compressor",
            [("this model", text["bits_per_byte"], "text"),
             ("xz on the held-out text alone", text["xz_alone"], "plain"),
             ("xz after the training text", text["xz_after_training_text"], "plain")],
            "xz can copy whole sentences from the training text. The model has only its weights.",
        )  # fmt: skip
    if scenes := material.result("shapes", "drawings"):
        is_continuous = "hue_error" in scenes
        criteria = CONTINUOUS_CRITERIA if is_continuous else CRITERIA
        rows = [(name, _percent(scenes[name]), criteria[name]) for name in ATTRIBUTES]
        page.table(rows, ("drawn scenes", "right", "criterion"))
        if is_continuous:
            page.table([(unit, f"{scenes[name]:.1f}") for name, unit in ERRORS.items()], ("mean error", "of drawn objects"))
    page.table(_costs(material))


def _figures(material: Material) -> Iterator[tuple[str, str, str]]:
    """For each score: the number, what it counts, and an explanation."""
    for name in material.sources:
        if values := material.result(name, "captions"):
            yield (
                _percent(values["exact"]),
                f"of {values['count']} held-out {PICTURE.get(name, 'picture')}s captioned exactly",
                f"{round(values['exact'] * values['count'])} of {values['count']}, compared character by character.",
            )
    if values := material.result("digits", "drawings"):
        real = _percent(values["classifier_on_heldout_scans"])
        yield (
            _percent(values["recognised"]), f"of {values['count']} drawn digits recognised as the digit in the prompt",
            f"By a classifier trained on the real scans. It recognises {real} of the held-out scans.",
        )  # fmt: skip
    if values := material.result("shapes", "drawings"):
        yield (
            _percent(values["everything"]), f"of {values['count_drawn']} drawn scenes right in everything",
            "A program reads each drawing from its pixels and compares it with the caption.",
        )  # fmt: skip
    if values := material.result("topics", "text"):
        yield (
            f"{values['bits_per_byte']:.2f}", "bits per byte of held-out text",
            f"{values['bytes']:,} bytes of Python's documentation. Lower is better; 8 is a uniform guess.",
        )  # fmt: skip


def _costs(material: Material) -> list[tuple[str, str]]:
    run, manifests = material.engine.run, material.record.results.get("manifest")
    size = f"{material.engine.opened.parameters:,}: {run.model.layers} layers, width {run.model.width}"
    steps = f"{material.engine.opened.step:,} steps of {run.training.batch_size} × {run.data.seq_len} positions"
    rows = [("Parameters", size), ("Training", steps)]
    if trained := material.record.trained:
        speed = np.median([line["positions_per_second"] for line in trained])
        rows.append(("Time", f"{format_duration(trained[-1]['seconds'])}, {speed:,.0f} positions per second"))
    if manifests:
        rows.append(("Measured on", f"{manifests[-1]['machine']}, {manifests[-1]['device']}"))
    return rows


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
