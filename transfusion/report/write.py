"""The report of a run as one HTML page: what the model is, its scores, its training curves, and samples."""

import json
from pathlib import Path

from transfusion.data.sources import open_raw
from transfusion.evaluation.follow import OnProgress, follow, ignore
from transfusion.inference.engine import Engine
from transfusion.page import Page
from transfusion.report.command import training_command
from transfusion.report.curves import add_curves
from transfusion.report.document import add_description
from transfusion.report.drawings import add_denoising, add_digits, add_gallery, add_scenes
from transfusion.report.material import Material
from transfusion.report.record import Record, format_duration
from transfusion.report.scores import add_scores
from transfusion.report.texts import add_captions, add_interleaved, add_text

TRAINED_ON = {
    "digits": "1,500 scans of handwritten digits, 8 × 8 pixels, with their English names",
    "shapes": "synthetic scenes of coloured shapes, 32 × 32 pixels, with captions that describe them",
    "topics": "Python's built-in language reference",
}
NUM_FIRST = 8  # drawings above all sections


def write_report(folder: Path, engine: Engine, on_progress: OnProgress = ignore) -> Path:
    """Write report.html into the run's folder and return its path. The same run gives the same page. A section whose
    results, metrics or source are missing is omitted or shorter. `on_progress`: see `follow`; the parts are sections."""
    material = Material(
        Record.read(folder), engine, {source.name: source for source in open_raw(engine.run.data, "heldout")}
    )
    page = Page(engine.opened.name, subtitle=f"A Transfusion run of the recipe {engine.run.recipe}")
    sections = {
        "introduction": add_introduction, "description": add_description, "scores": add_scores, "curves": add_curves,
        "digits": add_digits, "scenes": add_scenes, "gallery": add_gallery, "denoising": add_denoising,
        "captions": add_captions, "interleaved": add_interleaved, "text": add_text, "command": add_reproduction,
    }  # fmt: skip
    for name in follow(engine, sections, on_progress):
        sections[name](page, material)
    return page.write(folder / "report.html")


def add_introduction(page: Page, material: Material) -> None:
    """Two sentences and a few images, above all sections."""
    run, opened, trained = material.engine.run, material.engine.opened, material.record.trained
    data = " and ".join(TRAINED_ON.get(name, name) for name in run.data.sources)
    duration = f", {format_duration(trained[-1]['seconds'])}" if trained else ""
    page.paragraph(
        f"A transformer of {opened.parameters / 1e6:.1f} million parameters that reads and generates text and images. "
        f"It was trained on {data} ({opened.step:,} steps{duration})."
    )
    title = "Drawn by this model from the words below each image"
    if "digits" in material.sources:
        page.pictures([(name, pictures[0], None) for name, pictures in material.digits], 60, title)
    elif material.galleries:
        first = next(iter(material.galleries.values()))[:NUM_FIRST]
        page.pictures([(caption, drawing, None) for caption, _, drawing in first], 92, title)


def add_reproduction(page: Page, material: Material) -> None:
    """The command, the versions, and all settings of the run."""
    saved = material.record.saved
    page.heading("How to reproduce it")
    page.code(training_command(material.engine.run, material.record.folder, saved.get("notes", {}).get("start")))
    page.paragraph(f"With {', '.join(f'{name} {value}' for name, value in saved.get('versions', {}).items())}.")
    page.fold("All settings (run.json)", json.dumps(saved, indent=2, ensure_ascii=False))
