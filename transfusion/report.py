"""The report of a run as one HTML page: what the model is, its scores, its training curves, and samples."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from transfusion.data.built_in.digits import NAMES
from transfusion.data.loader import DocumentEncoder, Source, read_pairs
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.scenes import ATTRIBUTES, draw_scenes
from transfusion.inference.engine import Engine
from transfusion.inference.request import PreviewEvent, Request, raise_if_failed
from transfusion.page import Cell, Line, Page
from transfusion.runs import named_run
from transfusion.sequence import NO_TARGET, Chunk, Document, encode_document

DRAWINGS = 10  # of each digit
NUM_SCENES = 64
NUM_CAPTIONS = 40  # held-out images shown with the model's captions
MAX_WRONG = 32  # of these
FRAMES = 10  # of the denoising strip
MAX_SEEDS = 30  # tried for an answer that holds two images
NUM_TEXTS = 3  # held-out texts that are continued
PROMPT_CHARACTERS = 95  # of each text, at most
TEMPERATURE = 0.8  # of the continuation
SMALL = 10_000_000  # parameters; text from a smaller model makes no sense
WINDOW = 9  # training points in a running mean
MAX_POINTS = 600  # of a line in a plot
FITTED = ("vocab_size", "latent_channels")  # model settings that follow from the data; the command omits them
ORANGE, BLUE = (222, 139, 62), (88, 134, 236)  # legible on light and dark pages
LEGEND = {"causal: itself and earlier positions": ORANGE, "bidirectional: all patches of the same image": BLUE}

TRAINED_ON = {
    "digits": "1,500 scans of handwritten digits, 8 × 8 pixels, with their English names",
    "shapes": "synthetic scenes of coloured shapes, 32 × 32 pixels, with captions that name the shapes and their relation",
    "topics": "Python's built-in language reference",
}
CRITERIA = {
    "everything": "all criteria below", "count": "the number of objects equals the caption's",
    "colour": "of every object", "shape": "of every object", "size": "of every object, small or large",
    "place": "the relations above and left of, as in the caption",
}  # fmt: skip
PICTURE = {"digits": "scan", "shapes": "scene"}  # the word for an image of the source
PREDICTION = {
    "epsilon": "the noise in it", "x0": "the patch without noise",
    "velocity": "its velocity (alpha * noise - sigma * x0 on the cosine schedule, noise - x0 on rectified flow)",
}  # fmt: skip


@dataclass(frozen=True)
class Material:
    """The data of a report."""

    folder: Path
    engine: Engine
    saved: dict  # run.json
    metrics: list[dict]
    results: dict  # empty when the run has not been evaluated
    sources: dict[str, Source]  # held out

    @property
    def pictured(self) -> list[Source]:
        """Sources of captioned images."""
        return [source for source in self.sources.values() if any(read_pairs(source, 1))]

    @cached_property
    def digits(self) -> list[tuple[str, list[np.ndarray]]]:
        """Each digit's name and the images drawn from it."""
        answers = self.engine.generate([Request(parts=(name,), num_images=DRAWINGS) for name in NAMES])
        return [(name, [draw.parts[0] for draw in draws]) for name, draws in zip(NAMES, answers, strict=True)]

    @cached_property
    def scenes(self) -> list[tuple[str, np.ndarray, bool]]:
        """One image for each of the first held-out captions: (caption, pixels, is it right?)."""
        return draw_scenes(self.engine, self.sources["shapes"], NUM_SCENES)[1]

    @property
    def trained(self) -> list[dict]:
        """The metrics of training steps."""
        return [line for line in self.metrics if "seconds" in line]


def write_report(folder: Path, engine: Engine) -> Path:
    """Write report.html into the run's folder and return its path. The same run gives the same page. A section whose
    results, metrics or source are missing is omitted or shorter."""
    results = folder / "results.json"
    material = Material(
        folder, engine, json.loads((folder / "run.json").read_text(encoding="utf-8")), _read_lines(folder / "metrics.jsonl"),
        json.loads(results.read_text(encoding="utf-8")) if results.exists() else {},
        {source.name: source for source in open_raw(engine.run.data, "heldout")},
    )  # fmt: skip
    page = Page(engine.run.name, subtitle="A Transfusion run")
    for add in (add_introduction, add_description, add_scores, add_curves, add_digits, add_scenes, add_denoising,
                add_captions, add_interleaved, add_text, add_reproduction):  # fmt: skip
        add(page, material)
    return page.write(folder / "report.html")


def add_introduction(page: Page, material: Material) -> None:
    """Two sentences and a few images, above all sections."""
    run, opened = material.engine.run, material.engine.opened
    data = " and ".join(TRAINED_ON.get(name, name) for name in run.data.sources)
    duration = f", {_duration(material.trained[-1]['seconds'])}" if material.trained else ""
    page.paragraph(
        f"A transformer of {opened.parameters / 1e6:.1f} million parameters that reads and generates text and images. "
        f"It was trained on {data} ({opened.step:,} steps{duration})."
    )
    title = "Drawn by this model from the words below each image"
    if "digits" in material.sources:
        page.pictures([(name, pictures[0], None) for name, pictures in material.digits], 60, title)
    elif "shapes" in material.sources:
        page.pictures([(caption, pixels, None) for caption, pixels, _ in material.scenes[:8]], 92, title)


def add_description(page: Page, material: Material) -> None:
    """What the model does, one document as the model reads it, and the attention mask."""
    engine = material.engine
    page.heading("What this is")
    page.paragraph(
        "Transfusion is one transformer for sequences of text and images. At a text position it predicts the next token. At "
        "an image position it reads a patch with noise added and learns to separate image and noise. The same weights write "
        "text, draw an image from a caption, and caption an image."
    )
    if not material.pictured:
        return
    chunk = encode_document(_short_document(engine, material.pictured[0]), engine.vocabulary)
    weight, target = engine.run.training.image_weight, PREDICTION[engine.run.diffusion.prediction]
    page.paragraph("A held-out document of this run, position by position. Above: the input. Below: the target of the loss.")
    page.sequence(_cells(engine, chunk))
    page.paragraph(
        "Orange is the text loss, for the next token: `bos` and `eos` delimit the document, `boi` and `eoi` the image. "
        "Blue is the image loss. Patches are shown without noise; in training noise is added, and the model predicts for "
        f"each patch {target}. Training minimises text loss + {weight:g} * image loss."
    )
    if engine.run.model.image_attention == "bidirectional":
        page.matrix(
            _attention(engine, chunk), ("query position", "key position"), LEGEND,
            "The attention mask of this document: the positions (keys) that each position (query) attends to. Empty cells "
            "are masked. Patches of an image attend in both directions, because an image has no order.",
            f"Attention mask of {len(chunk)} positions: a lower triangle, and a full square at the image",
        )  # fmt: skip


def _short_document(engine: Engine, source: Source) -> Document:
    """The shortest of the first 32 held-out documents, caption first."""
    opened, options = engine.opened, replace(engine.run.data, image_first=0.0, caption_dropout=0.0)
    encoder = DocumentEncoder(opened.tokenizer, opened.codec, engine.vocabulary, options, engine.run.training.seed)
    documents = [encoder.to_document(source[n], source.name, 0) for n in range(min(32, len(source)))]
    return min(documents, key=lambda document: len(encode_document(document, engine.vocabulary)))


def _cells(engine: Engine, chunk: Chunk) -> list[Cell]:
    """One cell for each position; the patches of an image share one."""
    vocabulary, codec = engine.vocabulary, engine.opened.codec
    images = {placed.start: placed.image for placed in chunk.images}
    cells, n = [], 0
    while n < len(chunk):
        if n in images:
            pixels, side = codec.decode(images[n].content), vocabulary.patch_size * codec.downsampling
            has_loss = images[n].loss and images[n].max_t > 0
            target = f"{engine.run.diffusion.prediction} of each patch" if has_loss else ""
            cells.append(Cell(_tiles(pixels, side), target, "image", "image"))
            n += vocabulary.num_patches(images[n].shape)
        else:
            token, target_token = int(chunk.tokens[n]), int(chunk.targets[n])
            target = "" if target_token == NO_TARGET else _token_name(engine, target_token)
            cells.append(Cell(_token_name(engine, token), target, "plain" if token in _markers(engine) else "text"))
            n += 1
    return cells


def _tiles(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    """The image (Y, X, channels) in squares, row by row."""
    Y, X = pixels.shape[:2]
    return [pixels[y : y + side, x : x + side] for y in range(0, Y, side) for x in range(0, X, side)]


def _token_name(engine: Engine, token: int) -> str:
    """The name of a token on the page."""
    if engine.vocabulary.first_code <= token < engine.vocabulary.num_used:
        return f"code {token - engine.vocabulary.first_code}"
    return _markers(engine).get(token) or engine.opened.tokenizer.decode([token]).replace(" ", "\u2423")


def _markers(engine: Engine) -> dict[int, str]:
    vocabulary = engine.vocabulary
    ends = {vocabulary.bos: "bos", vocabulary.eos: "eos", vocabulary.eoi: "eoi"}
    return ends | dict.fromkeys(vocabulary.boi.values(), "boi")


def _attention(engine: Engine, chunk: Chunk) -> np.ndarray:
    """(L, L, 4) uint8: row q, column k is coloured where query q attends to key k, else transparent."""
    mask = np.zeros((len(chunk), len(chunk), 4), np.uint8)
    mask[np.tri(len(chunk), dtype=bool)] = (*ORANGE, 255)
    for placed in chunk.images:
        image = slice(placed.start, placed.start + engine.vocabulary.num_patches(placed.image.shape))
        mask[image, image] = (*BLUE, 255)
    return mask


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
        reason = "The measured tasks have no figures here" if material.results else "This run is not measured yet"
        folder = shlex.quote(str(material.folder))
        page.paragraph(f"{reason}: `transfusion evaluate {folder}` writes all figures to `results.json`.")
    if drawings := _result(material, "digits", "drawings"):
        page.bars(
            "Are the drawn digits copies of training scans?",
            [("drawing to nearest training scan", drawings["nearest_training_scan"], "image"),
             ("held-out scan to nearest training scan", drawings["nearest_training_scan_of_heldout"], "plain")],
            "Median Euclidean distance over the 64 pixels, each from 0 to 1; near 0 for copies. Compare both bars.",
        )  # fmt: skip
    if text := _result(material, "topics", "text"):
        page.bars(
            "Bits per byte, compared with a file compressor",
            [("this model", text["bits_per_byte"], "text"),
             ("xz on the held-out text alone", text["xz_alone"], "plain"),
             ("xz after the training text", text["xz_after_training_text"], "plain")],
            "xz can copy whole sentences from the training text. The model has only its weights.",
        )  # fmt: skip
    if scenes := _result(material, "shapes", "drawings"):
        rows = [(name, _percent(scenes[name]), CRITERIA[name]) for name in ATTRIBUTES]
        page.table(rows, ("drawn scenes", "right", "criterion"))
    page.table(_costs(material))


def _figures(material: Material) -> Iterator[tuple[str, str, str]]:
    """For each score: the number, what it counts, and an explanation."""
    for name in material.sources:
        if values := _result(material, name, "captions"):
            yield (
                _percent(values["exact"]),
                f"of {values['count']} held-out {PICTURE.get(name, 'picture')}s captioned exactly",
                f"{round(values['exact'] * values['count'])} of {values['count']}, compared character by character.",
            )
    if values := _result(material, "digits", "drawings"):
        real = _percent(values["classifier_on_heldout_scans"])
        yield (
            _percent(values["recognised"]), f"of {values['count']} drawn digits recognised as the digit in the prompt",
            f"By a classifier trained on the real scans. It recognises {real} of the held-out scans.",
        )  # fmt: skip
    if values := _result(material, "shapes", "drawings"):
        yield (
            _percent(values["everything"]), f"of {values['count_drawn']} drawn scenes right in everything",
            "A program reads each drawing from its pixels and compares it with the caption.",
        )  # fmt: skip
    if values := _result(material, "topics", "text"):
        yield (
            f"{values['bits_per_byte']:.2f}", "bits per byte of held-out text",
            f"{values['bytes']:,} bytes of Python's documentation. Lower is better; 8 is a uniform guess.",
        )  # fmt: skip


def _costs(material: Material) -> list[tuple[str, str]]:
    run, manifests = material.engine.run, material.results.get("manifest")
    size = f"{material.engine.opened.parameters:,}: {run.model.layers} layers, width {run.model.width}"
    steps = f"{material.engine.opened.step:,} steps of {run.data.rows} × {run.data.seq_len} positions"
    rows = [("Parameters", size), ("Training", steps)]
    if material.trained:
        speed = np.median([line["positions_per_second"] for line in material.trained])
        rows.append(("Time", f"{_duration(material.trained[-1]['seconds'])}, {speed:,.0f} positions per second"))
    if manifests:
        rows.append(("Measured on", f"{manifests[-1]['machine']}, {manifests[-1]['device']}"))
    return rows


def _result(material: Material, source: str, task: str) -> dict:
    """The values of a task in results.json; empty when they are missing."""
    return material.results.get(source, {}).get(task, {}) if source in material.sources else {}


def add_curves(page: Page, material: Material) -> None:
    """Losses over the training steps."""
    if not material.metrics:
        return
    page.heading("Training curves")
    unit = "nats per code" if material.engine.vocabulary.num_image_codes else "mean squared error per value"
    for kind, label in (("text", "nats per token"), ("image", unit)):
        lines = _curves(material, f"{kind}_loss", kind)
        page.plot(f"{kind.capitalize()} loss", lines, "training step", f"loss ({label})", log=True)
    uneven = " The text loss varies from batch to batch because the sources differ and their shares of a batch vary."
    page.paragraph(
        "Grey: training, each batch (thin) and the running mean. Colour: held-out data, with the EMA weights. The "
        "image loss cannot reach 0: part of the noise cannot be predicted." + (uneven if len(material.sources) > 1 else ""),
        muted=True,
    )


def _curves(material: Material, name: str, colour: str) -> dict[str, Line]:
    lines = {}
    trained = [line for line in material.trained if name in line]  # a step without images has no image loss
    if trained:
        steps, losses = [line["step"] for line in trained], [line[name] for line in trained]
        windows = [losses[max(0, n - WINDOW // 2) : n + WINDOW // 2 + 1] for n in range(len(losses))]
        stride = -(-len(steps) // MAX_POINTS)
        lines["batches"] = Line(steps[::stride], losses[::stride], faint=True)
        lines["training"] = Line(steps[::stride], [float(np.mean(window)) for window in windows[::stride]])
    evaluations = [(line["step"], line["heldout"]) for line in material.metrics if "heldout" in line]
    for source in material.sources:
        points = [(step, values[source][name]) for step, values in evaluations if name in values.get(source, {})]
        if points:
            steps, losses = zip(*points, strict=True)
            lines[f"held out: {source}"] = Line(steps, losses, colour, dots=True, dashed=source == "topics")
    return lines


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


def add_captions(page: Page, material: Material) -> None:
    """Held-out images with the model's captions, the wrong ones first."""
    for source in material.pictured:
        word = PICTURE.get(source.name, "picture")
        measured = _result(material, source.name, "captions") or caption_heldout(material.engine, source, NUM_CAPTIONS)
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


def add_reproduction(page: Page, material: Material) -> None:
    """The command, the versions, and all settings of the run."""
    page.heading("How to reproduce it")
    page.code(_command(material))
    versions = material.saved.get("versions", {})
    page.paragraph(f"With {', '.join(f'{name} {value}' for name, value in versions.items())}.")
    page.fold("All settings (run.json)", json.dumps(material.saved, indent=2, ensure_ascii=False))


def _command(material: Material) -> str:
    """The command that trains such a run: its name, and the options that differ from the named run."""
    run, out = material.engine.run, shlex.quote(str(material.folder))
    try:
        defaults = asdict(named_run(run.name))
    except KeyError:
        return f"transfusion train run.json --out {out}"
    changed = [
        _flag(f"{part}.{name}".replace("_", "-"), value)
        for part, values in asdict(run).items() if isinstance(values, dict)
        for name, value in values.items() if value != defaults[part][name] and name not in FITTED
    ]  # fmt: skip
    return " ".join([f"transfusion train {run.name}", *changed, f"--out {out}"])


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
    """The JSON objects of a file, one per line. An incomplete last line (after a crash) is ignored; no file is empty."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
