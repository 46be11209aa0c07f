"""A run as one page: what it is, how good it is, how it learnt, and what it writes and draws."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from transfusion.data.built_in.digits import NAMES
from transfusion.data.loader import Encoder, Source
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.scenes import ATTRIBUTES, draw_scenes
from transfusion.inference.engine import Engine, PreviewEvent, Request
from transfusion.page import Cell, Line, Page
from transfusion.runs import named_run
from transfusion.sequence import NO_TARGET, Chunk, Document, encode_document

DRAWINGS = 10  # of each digit
SCENES = 64  # drawn
CAPTIONED = 40  # held-out pictures shown with what the model says of them
WRONG = 32  # of these, at most
FRAMES = 10  # of the film
SEEDS = 30  # tried for an answer that holds two images
TOPICS = 3  # held-out texts that are written on
OPENING = 95  # letters of each, at most, that the model is given
TEMPERATURE = 0.8  # of what follows them
SMALL = 10_000_000  # parameters; what a smaller model writes makes no sense
SMOOTHED = 9  # training points in a running mean
POINTS = 600  # of a line in a plot, at most
FITTED = ("vocab_size", "latent_channels")  # of the model: they follow from the data, whatever is typed
ORANGE, BLUE = (222, 139, 62, 255), (88, 134, 236, 255)  # legible on light and on dark

LEARNT_FROM = {
    "digits": "1,500 scans of handwritten digits, 8 × 8 pixels, with their English names",
    "shapes": "made-up scenes of coloured shapes, 32 × 32 pixels, with captions that say what stands where",
    "topics": "the language reference that Python carries inside itself",
}
MUST_BE_RIGHT = {
    "everything": "all of the below at once", "count": "as many things as named, no more and no fewer",
    "colour": "of every thing", "shape": "of every thing", "size": "of every thing, small or large",
    "place": "above and left of, as the caption says",
}  # fmt: skip
PICTURE = {"digits": "scan", "shapes": "scene"}  # what a picture of the source is called
PREDICTION = {
    "noise": "which noise is in it", "clean": "what it is without noise",
    "velocity": "its velocity, the mixture of noise and picture from which both can be worked out",
}  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What the page is made from."""

    engine: Engine
    saved: dict  # run.json
    metrics: list[dict]
    results: dict  # empty when the run has not been evaluated
    sources: dict[str, Source]  # held out

    @property
    def pictured(self) -> list[Source]:
        """The sources that hold captioned pictures."""
        return [source for source in self.sources.values() if source[0].pairs]

    @cached_property
    def digits(self) -> list[tuple[str, list[np.ndarray]]]:
        """Each name and what was drawn from it."""
        answers = self.engine.generate([Request(parts=(name,), num_images=DRAWINGS) for name in NAMES])
        return [(name, [one.parts[0] for one in draws]) for name, draws in zip(NAMES, answers, strict=True)]

    @cached_property
    def scenes(self) -> list[tuple[str, np.ndarray, bool]]:
        """A drawing for each of the first held-out captions: caption, pixels, and is it right?"""
        return draw_scenes(self.engine, self.sources["shapes"], SCENES)[1]

    @property
    def trained(self) -> list[dict]:
        """The metrics of training steps."""
        return [line for line in self.metrics if "seconds" in line]


def write_report(folder: Path, engine: Engine) -> Path:
    """Make report.html in the run's folder, and return its path. The same run gives the same page.

    A section whose results, metrics or source are missing is left out, or shorter.
    """
    results = folder / "results.json"
    material = Material(
        engine, json.loads((folder / "run.json").read_text()), _read_lines(folder / "metrics.jsonl"),
        json.loads(results.read_text()) if results.exists() else {},
        {source.name: source for source in open_raw(engine.run.data, "heldout")},
    )  # fmt: skip
    page = Page(engine.run.name, above="A Transfusion run")
    for tell in (introduce, tell_what_it_is, tell_results, tell_curves, tell_drawn_digits, tell_drawn_scenes,
                 tell_film, tell_captions, tell_interleaved, tell_text, tell_making):  # fmt: skip
        tell(page, material)
    return page.write(folder / "report.html")


def introduce(page: Page, material: Material) -> None:
    """Two sentences and a few drawings, above all sections."""
    run = material.engine.run
    learnt_from = " and ".join(LEARNT_FROM.get(name, name) for name in run.data.sources)
    took = f", {_duration(material.trained[-1]['seconds'])}" if material.trained else ""
    page.say(
        f"A transformer of {material.engine.opened.parameters / 1e6:.1f} million parameters that reads and writes text and "
        f"images. It learnt from {learnt_from} ({material.engine.opened.step:,} steps{took})."
    )
    drawn = []
    if "digits" in material.sources:
        drawn = [(name, draws[0], None) for name, draws in material.digits]
    elif "shapes" in material.sources:
        drawn = [(caption, pixels, None) for caption, pixels, _ in material.scenes[:8]]
    if drawn:
        page.pictures(drawn, width=60 if "digits" in material.sources else 92)
        page.say("Drawn by this model from the words below each picture.", quiet=True)


def tell_what_it_is(page: Page, material: Material) -> None:
    """Three sentences, one document as the model reads it, and who sees whom."""
    engine = material.engine
    page.heading("What this is")
    page.say(
        "Transfusion is one transformer for sequences in which words and images take turns. Where text "
        "stands it learns to name the next token; where an image stands it gets the image's patches with "
        "noise added and learns to tell picture from noise. So the same weights write, draw what a caption "
        "says, and caption what they are shown."
    )
    if not material.pictured:
        return
    chunk = encode_document(_short_document(engine, material.pictured[0]), engine.vocabulary)
    weight, says = engine.run.training.image_weight, PREDICTION[engine.run.diffusion.prediction]
    page.say("A document of this run, place by place. Above: what the model reads. Below: what it must say.")
    page.sequence(_cells(engine, chunk))
    page.say(
        "Orange is the text loss: the next token, where `bos` and `eos` are the two ends of the document, "
        "`boi` and `eoi` those of the image. Blue is the image loss: the patches, shown clean here, are read "
        f"with noise in training, and the model must say of each {says}. Training adds up both"
        + ("." if weight == 1 else f", the image loss times {weight:g}.")
    )
    if engine.run.model.image_attention == "bidirectional":
        page.picture(
            _attention(engine, chunk),
            "Who sees whom in these places, one row for each. All see what stands before them (orange). "
            "The patches of an image also see each other, ahead as well as back (blue): a picture has no "
            "first and last.",
            f"Who sees whom among {len(chunk)} places: a triangle, and a full square where the image stands",
        )


def _short_document(engine: Engine, source: Source) -> Document:
    """Of the first held-out documents the one with the fewest positions, caption first."""
    opened, plain = engine.opened, replace(engine.run.data, image_first=0.0, caption_dropout=0.0)
    encoder = Encoder(opened.tokenizer, opened.codec, engine.vocabulary, plain, engine.run.training.seed)
    found = [encoder.to_document(source[n], source.name, 0) for n in range(min(32, len(source)))]
    return min(found, key=lambda document: len(encode_document(document, engine.vocabulary)))


def _cells(engine: Engine, chunk: Chunk) -> list[Cell]:
    """The positions one by one; the patches of an image share a cell."""
    vocabulary, codec = engine.vocabulary, engine.opened.codec
    images = {placed.start: placed.image for placed in chunk.images}
    cells, n = [], 0
    while n < len(chunk):
        if n in images:
            pixels, side = codec.decode(images[n].content), vocabulary.patch_size * codec.downsampling
            learnt = images[n].loss and images[n].max_t > 0
            says = f"{engine.run.diffusion.prediction} of each patch" if learnt else ""
            cells.append(Cell(_squares(pixels, side), says, "image", "image"))
            n += vocabulary.patches(images[n].shape)
        else:
            token, target = int(chunk.tokens[n]), int(chunk.targets[n])
            says = "" if target == NO_TARGET else _name(engine, target)
            cells.append(Cell(_name(engine, token), says, "plain" if token in _markers(engine) else "text"))
            n += 1
    return cells


def _squares(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    """The picture (Y, X, channels) in squares, in reading order."""
    Y, X = pixels.shape[:2]
    return [pixels[y : y + side, x : x + side] for y in range(0, Y, side) for x in range(0, X, side)]


def _name(engine: Engine, token: int) -> str:
    """What a token is called on the page."""
    if engine.vocabulary.first_code <= token < engine.vocabulary.num_used:
        return f"code {token - engine.vocabulary.first_code}"
    return _markers(engine).get(token) or engine.opened.tokenizer.decode([token]).replace(" ", "\u2423")


def _markers(engine: Engine) -> dict[int, str]:
    vocabulary = engine.vocabulary
    ends = {vocabulary.bos: "bos", vocabulary.eos: "eos", vocabulary.eoi: "eoi"}
    return ends | dict.fromkeys(vocabulary.boi.values(), "boi")


def _attention(engine: Engine, chunk: Chunk) -> np.ndarray:
    """(L, L, 4) uint8: row by row what a position sees."""
    seen = np.zeros((len(chunk), len(chunk), 4), np.uint8)
    seen[np.tri(len(chunk), dtype=bool)] = ORANGE
    for placed in chunk.images:
        inside = slice(placed.start, placed.start + engine.vocabulary.patches(placed.image.shape))
        seen[inside, inside] = BLUE
    return seen


def tell_results(page: Page, material: Material) -> None:
    """The headline figures with plain words, what they compare with, and what they cost."""
    page.heading("How good it is")
    figures = list(_figures(material))
    if figures:
        page.figures(figures)
    else:
        told = "What was measured of it has no figures here" if material.results else "This run is not measured yet"
        page.say(f"{told}: `transfusion evaluate` writes them all to `results.json`.")
    drawings, text = _result(material, "digits", "drawings"), _result(material, "topics", "text")
    if drawings:
        page.bars(
            "Are the drawings copies?",
            [("from a drawing to the nearest training scan", drawings["nearest_training_scan"], "image"),
             ("from a held-out scan", drawings["nearest_training_scan_of_heldout"], "plain")],
            "Median distance over the 64 pixels, each from 0 to 1. Copies would lie near 0; real scans that "
            "were held out show how far apart two real digits lie.",
        )  # fmt: skip
    if text:
        page.bars(
            "Bits per byte, beside a file compressor",
            [("this model", text["bits_per_byte"], "text"),
             ("xz on the held-out text alone", text["xz_alone"], "plain"),
             ("xz that has read the training text first", text["xz_after_training_text"], "plain")],
            "xz can look up every sentence of the training text word for word. The model has only what it "
            "kept of it in its weights.",
        )  # fmt: skip
    scenes = _result(material, "shapes", "drawings")
    if scenes:
        rows = [(name, _percent(scenes[name]), MUST_BE_RIGHT[name]) for name in ATTRIBUTES]
        page.table(rows, ("drawn scenes", "right", "what must be right"))
    page.table(_costs(material))


def _figures(material: Material) -> Iterator[tuple[str, str, str]]:
    """Number, what it counts, and a line that helps to read it."""
    for name in material.sources:
        if values := _result(material, name, "captions"):
            yield (
                _percent(values["exact"]),
                f"of {values['count']} held-out {PICTURE.get(name, 'picture')}s captioned exactly",
                f"{round(values['exact'] * values['count'])} of {values['count']}, letter by letter. None of "
                "these pictures was in training.",
            )
    if values := _result(material, "digits", "drawings"):
        real = _percent(values["classifier_on_heldout_scans"])
        yield (
            _percent(values["recognised"]), f"of {values['count']} drawn digits recognised as asked",
            f"By a classifier that knows only the scans. It recognises {real} of the real held-out ones.",
        )  # fmt: skip
    if values := _result(material, "shapes", "drawings"):
        yield (
            _percent(values["everything"]), f"of {values['count_drawn']} drawn scenes right in everything",
            "A program reads each drawing back from its pixels and compares it with the caption.",
        )  # fmt: skip
    if values := _result(material, "topics", "text"):
        yield (
            f"{values['bits_per_byte']:.2f}", "bits per byte of text it has never seen",
            f"{values['bytes']:,} bytes of Python's documentation. Lower is better; 8 is no idea at all.",
        )  # fmt: skip


def _costs(material: Material) -> list[tuple[str, str]]:
    run, manifests = material.engine.run, material.results.get("manifest")
    size = f"{material.engine.opened.parameters:,}: {run.model.layers} layers, {run.model.width} wide"
    read = f"{material.engine.opened.step:,} steps of {run.data.rows} × {run.data.seq_len} positions"
    rows = [("Parameters", size), ("Training", read)]
    if material.trained:
        speed = np.median([line["positions_per_second"] for line in material.trained])
        took = _duration(material.trained[-1]["seconds"])
        rows.append(("Time", f"{took}, {speed:,.0f} positions a second"))
    if manifests:
        rows.append(("Measured on", f"{manifests[-1]['machine']}, {manifests[-1]['device']}"))
    return rows


def _result(material: Material, source: str, what: str) -> dict:
    """A part of results.json; empty when it is not there."""
    return material.results.get(source, {}).get(what, {}) if source in material.sources else {}


def tell_curves(page: Page, material: Material) -> None:
    """Losses over the steps."""
    if not material.metrics:
        return
    page.heading("How it learnt")
    page.plot("Text loss (nats per token)", _curves(material, "text_loss", "text"), log=True)
    unit = "nats per code" if material.engine.vocabulary.num_image_codes else "mean squared error"
    page.plot(f"Image loss ({unit})", _curves(material, "image_loss", "image"), log=True)
    uneven = " Text loss jumps from batch to batch because the sources differ and come in uneven portions."
    page.say(
        "Grey is training: batches, and their running mean. In colour is what was held out, seen by the "
        "moving average of the weights. The image loss cannot reach 0: much of a noisy patch is past telling."
        + (uneven if len(material.sources) > 1 else ""),
        quiet=True,
    )


def _curves(material: Material, name: str, colour: str) -> dict[str, Line]:
    lines = {}
    trained = [line for line in material.trained if name in line]  # a step without images has no image loss
    if trained:
        steps, losses = [line["step"] for line in trained], [line[name] for line in trained]
        around = [losses[max(0, n - SMOOTHED // 2) : n + SMOOTHED // 2 + 1] for n in range(len(losses))]
        every = -(-len(steps) // POINTS)
        lines["batches"] = Line(steps[::every], losses[::every], faint=True)
        lines["training"] = Line(steps[::every], [float(np.mean(near)) for near in around[::every]])
    looks = [(line["step"], line["heldout"]) for line in material.metrics if "heldout" in line]
    for source in material.sources:
        found = [(step, values[source][name]) for step, values in looks if name in values.get(source, {})]
        if found:
            steps, losses = zip(*found, strict=True)
            lines[f"held out: {source}"] = Line(steps, losses, colour, dots=True, dashed=source == "topics")
    return lines


def tell_drawn_digits(page: Page, material: Material) -> None:
    """Some drawings of each name."""
    if "digits" not in material.sources:
        return
    page.heading("Drawn from a word")
    page.say(f"Each row was drawn from the one word before it: the first {DRAWINGS} of seed 0, none picked.")
    page.strip(material.digits)
    page.say(f"All pictures of a column began as the same noise. {_settings(material.engine)}", quiet=True)


def tell_drawn_scenes(page: Page, material: Material) -> None:
    """One drawing for each of the first held-out captions, marked."""
    if "shapes" not in material.sources:
        return
    page.heading("Drawn from a caption")
    right = sum(right for _, _, right in material.scenes)
    page.say(
        f"One drawing for each of the first {SCENES} held-out captions, none picked. A program that reads a "
        f"scene back from its pixels finds {right} of them right in everything."
    )
    page.pictures(material.scenes, width=92)
    page.say(_settings(material.engine), quiet=True)


def tell_film(page: Page, material: Material) -> None:
    """One image from noise to clean."""
    if not material.pictured:
        return
    engine, source = material.engine, material.pictured[0]
    asked = "three" if source.name == "digits" else source[0].pair[0]
    number, previews = engine.submit(Request(parts=(asked,), num_images=1, previews=1)), []
    while any(row.request_number == number for row in engine.sequences):
        previews += [event for event in engine.step() if isinstance(event, PreviewEvent)]
    kept = [previews[n] for n in np.unique(np.linspace(0, len(previews) - 1, FRAMES).round().astype(int))]
    page.heading("From noise to a picture")
    page.say(
        f"How `{asked}` was drawn. The upper strip is the image as it stands after a step, at first nothing "
        "but noise. The lower one is what the model takes it for at that step: first a rough guess, in the "
        "end this very picture. Each step moves the image a little towards the guess."
    )
    page.strip(
        [("it sees", [frame.x_t for frame in kept]), ("it expects", [frame.x0 for frame in kept])],
        over=["step", *(str(frame.step) for frame in kept)], width=60 if source.name == "digits" else 76,
    )  # fmt: skip


def _settings(engine: Engine) -> str:
    generation = engine.run.generation
    guided = "" if generation.guidance_scale == 1 else f", guidance scale {generation.guidance_scale:g}"
    return f"The run's own settings: {generation.steps} steps of {generation.sampler}{guided}."


def tell_captions(page: Page, material: Material) -> None:
    """Held-out pictures with the model's captions, the wrong ones first."""
    for source in material.pictured:
        what = PICTURE.get(source.name, "picture")
        values = _result(material, source.name, "captions")
        answers = (values or caption_heldout(material.engine, source, CAPTIONED))["answers"]
        right = [one for one in answers if one["is"] == one["said"]]
        wrong = [one for one in answers if one["is"] != one["said"]]
        first = wrong[:WRONG]
        page.heading(f"Captions of {what}s it has never seen")
        rest = right[: CAPTIONED - len(first)]
        page.say(
            f"The model was shown {len(answers)} held-out {what}s and wrote a caption for each, always the "
            f"likeliest token: {len(right)} right, {len(wrong)} wrong. Here are "
            f"{len(first)} wrong ones, then {len(rest)} right ones, in the order of the data."
        )
        page.pictures(
            [(f"{one['said'] or '(nothing)'}\nis {one['is']}", source[one["document"]].pair[1], False)
             for one in first]
            + [(one["said"], source[one["document"]].pair[1], True) for one in rest],
            width=72 if source.name == "digits" else 130,
        )  # fmt: skip


def tell_interleaved(page: Page, material: Material) -> None:
    """A document that the model goes on with by itself, in text and images."""
    engine = material.engine
    if "digits" not in material.sources or not engine.run.data.digits.interleaved:
        return
    prompt, free = "three", replace(engine.run.generation, temperature=1.0)
    for seed in range(SEEDS):
        [[answer]] = engine.generate([Request(parts=(prompt,), seed=seed, generation=free)])
        origins = ["drawn" if isinstance(part, np.ndarray) else "written" for part in answer.parts]
        if origins.count("drawn") >= 2:
            break
    page.heading("Words and images in turn")
    page.say(
        f"Given the word `{prompt}`, the model ran free: at each place it chose by itself to write a token, "
        "to begin an image, or to end the document. "
        + (f"The answer of seed {seed} is the first, from seed 0 on, that holds at least two images."
           if origins.count("drawn") >= 2
           else f"No answer of the seeds 0 to {seed} holds two images; this is the last of them.")
    )  # fmt: skip
    page.passage([(prompt, "given"), *zip(answer.parts, origins, strict=True)])
    page.say("Then it ended the document." if answer.reason == "eos" else "Then it had to stop.", quiet=True)


def tell_text(page: Page, material: Material) -> None:
    """Held-out texts, written on from their first words."""
    if "topics" not in material.sources:
        return
    engine, source = material.engine, material.sources["topics"]
    texts = [source[n].segments[0].text for n in range(min(TOPICS, len(source)))]
    ids = [engine.opened.tokenizer.encode(text[:OPENING])[: engine.context // 2] for text in texts]
    openings = [engine.opened.tokenizer.decode(opening).rsplit(" ", 1)[0] for opening in ids]
    free = replace(engine.run.generation, temperature=TEMPERATURE, max_tokens=engine.context)
    answers = engine.generate([Request(parts=(opening,), generation=free) for opening in openings])
    page.heading("Text alone")
    senseless = " A model this small picks up the look of the manual, not its sense."
    page.say(
        "The first words of held-out pages of Python's documentation (marked), and how the model went on at "
        f"temperature {TEMPERATURE:g}, seed 0, for as long as a row of {engine.context} positions."
        + (senseless if material.engine.opened.parameters < SMALL else "")
    )
    for opening, [answer] in zip(openings, answers, strict=True):
        page.code("".join(p if isinstance(p, str) else " (an image) " for p in answer.parts), given=opening)


def tell_making(page: Page, material: Material) -> None:
    """The command, the versions, and every number of the run."""
    page.heading("How it was made")
    page.code(_command(material))
    versions = material.saved.get("versions", {})
    page.say(f"With {', '.join(f'{name} {value}' for name, value in versions.items())}.")
    page.fold("Every number of this run (run.json)", json.dumps(material.saved, indent=2, ensure_ascii=False))


def _command(material: Material) -> str:
    """What to type for a run like this one: its name, and whatever is not as the named run has it."""
    run = material.engine.run
    try:
        usual = asdict(named_run(run.name))
    except KeyError:
        return f"transfusion train run.json --out runs/{run.name}"
    changed = [
        _flag(f"{part}.{name}".replace("_", "-"), value)
        for part, values in asdict(run).items() if isinstance(values, dict)
        for name, value in values.items() if value != usual[part][name] and name not in FITTED
    ]  # fmt: skip
    return " ".join([f"transfusion train {run.name}", *changed, f"--out runs/{run.name}"])


def _flag(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--{name.replace('.', '.no-')}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return words.replace(" ", "\u00a0")


def _read_lines(path: Path) -> list[dict]:
    """JSON objects, one a line; a last line that a crash cut short is left out, and no file holds none."""
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]
