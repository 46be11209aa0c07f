"""Shared setup of the tables on text and images: scenes of `shapes` (two thirds of the positions) and Python's
documentation, with twice as many steps as the tables on images alone. The scenes are of the level of the tables on images,
or of `JUDGED_LEVEL`, whose continuous hues, sizes, places and gradients are more than 512 codes can describe exactly.

Both families train on the same data with the same tokenizer, in the same number of rows of 320 positions. The autoencoder
and its VQ twin share the encoder and decoder network, and train on the same scenes for the same number of steps (8 numbers
per latent pixel, 8x8 pixels; 512 codes). An image is 16 patches for Transfusion and 64 codes for Chameleon (256 and 1,024 in
the paper). With as many positions Chameleon sees a third of the images and captions. Longer images fill rows less well: 93 %
of 4.6 million positions instead of 98 %.

Chameleon here is the paper's except for its smaller learning rate; queries and keys are normalised in both families. Both
use one learning rate: half of it was worse for Chameleon S (2.45 bits per byte instead of 2.24, FID 4.0 instead of 2.4).
Steps, mixture weights and image weight come from pilot runs of Transfusion S:

- half of the positions for each source and 1,200 steps: image generation was hardly learnt;
- 3,600 steps: the model memorised the text, which is short;
- image weight 4 (Chameleon has none): worse text; image weight 1: worse images.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import measures, scenes
from experiments.lab import Column, Measure, Options, Variant, data_folder, describe_machine, run_command
from experiments.measures import measure_text_and_scenes
from experiments.scenes import PRESETS
from transfusion.codecs.codec import encode_many
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.fitting import open_codec
from transfusion.disk import read_json
from transfusion.evaluation.fid import fid
from transfusion.evaluation.scenes import judge_scenes

JUDGED_LEVEL = 3  # of `shapes`: the scenes of the primary claims of Table 3
CODEC = (
    "--size", "32x32", "--max-images", "20000", "--training.steps", "5400", "--training.validate-every", "600",
)  # fmt: skip
CODECS = {"latents": ("vae", ()), "codes": ("vq", ("--network.codes", "512"))}  # by the data they encode
MAX_DOCUMENTS = "20000"  # of each source
STABLE = "--model.post-norm", "--model.z-loss", "1e-5"
TEXT_ONLY = "--data.sources", "topics", "--data.mixture-weights", "1"
COLUMNS = {  # of scenes of the tables on images
    "bits_per_byte": Column("bits per byte", ".3f", "lower"), "captions": Column("caption exact match", ".1%"),
    "cider": Column("CIDEr", ".2f"), "fid": Column("FID", ".2f", "lower"), "right": Column("images correct", ".1%"),
    "attributes": Column("attributes correct", ".1%"), "positions": Column("positions", ",.0f"),
}  # fmt: skip
JUDGED_COLUMNS = {
    **COLUMNS, "captions_within_limits": Column("captions correct", ".1%"),
    "hue_error": Column("hue error", ".1f", "lower"), "place_error": Column("place error", ".2f", "lower"),
    "size_error": Column("size error", ".2f", "lower"),
}  # of scenes of `JUDGED_LEVEL`; the errors are of drawings  # fmt: skip


def prepare(level: int, options: Options) -> None:
    """Train both codecs on scenes of a level of `shapes`, for equal steps, and encode them with each. Skip what exists."""
    words = "--shapes-level", str(level)
    for name, (codec, more) in CODECS.items():
        codec_folder, data_folder = lab_folder(options, codec, level), lab_folder(options, name, level)
        if not (codec_folder / "reconstructions.html").exists():
            run_command("data", "fit-codec", "small", "shapes", *words, *CODEC, *more, "--out", codec_folder)
        tokenizer_path = lab_folder(options, "latents", level) / "tokenizer.json"
        tokenizer = ("--tokenizer-size", "512") if name == "latents" else ("--tokenizer", tokenizer_path)
        if not (data_folder / "dataset.json").exists():
            run_command("data", "prepare", "shapes", "topics", *words, "--limit", MAX_DOCUMENTS, "--sizes", "32x32",
                        "--codec", codec_folder, *tokenizer, "--out", data_folder)  # fmt: skip


def prepare_documents(options: Options, name: str, write: Callable[[Path], Path | Sequence[Path]]) -> None:
    """Prepare other documents with the codec and tokenizer of the scenes of the tables on images: those that `write` puts
    into a folder. Skip what exists."""
    level = PRESETS[options.preset].level
    prepare(level, options)
    data = lab_folder(options, name, level)
    if not (data / "dataset.json").exists():
        paths = write(options.out / f"{name}-files")
        run_command("data", "prepare", *([paths] if isinstance(paths, Path) else paths), "--like",
                    lab_folder(options, "latents", level), "--out", data)  # fmt: skip


def lab_folder(options: Options, name: str, level: int) -> Path:
    """The folder of a codec or of prepared data in the lab, of scenes of this level."""
    return data_folder(options, data_name(options.preset, name, level))


def data_name(preset: str, name: str, level: int) -> str:
    """The name of a codec or of data; it contains a hash of the recipe, so another recipe has another name. The level of the
    tables on images is not named."""
    recipe = json.dumps([CODEC, CODECS, MAX_DOCUMENTS])
    scenes = "" if level == PRESETS[preset].level else f"-level-{level}"
    return f"{name}{scenes}-{preset}-{hashlib.sha256(recipe.encode()).hexdigest()[:6]}"


def codecs_name(preset: str, level: int) -> str:
    """The name of the file in docs/results with what the codecs of a level lose."""
    scenes = "" if level == PRESETS[preset].level else f"-level-{level}"
    return f"codecs{scenes}{'' if preset == 'cpu' else f'-{preset}'}"


def measure_codecs(options: Options, level: int) -> dict[str, Any] | None:
    """The quality of both codecs on held-out scenes, the upper bound of image quality. None if they are missing."""
    if not (lab_folder(options, "vq", level) / "codec.json").exists():
        return None
    source = Shapes(level, split="heldout")
    captions, images = zip(*(source[n].pair for n in range(measures.NUM_SCENES)), strict=True)
    features, values = measures.small_network(level), describe_machine(options.device)
    for name, (codec_name, _) in zip(("autoencoder", "VQ twin"), CODECS.values(), strict=True):
        folder = lab_folder(options, codec_name, level)
        codec = open_codec(folder)
        reconstructions = [codec.decode(content) for content in encode_many(codec, images)]
        accuracy, _ = judge_scenes(captions, reconstructions)
        values[name] = {
            "psnr": read_json(folder / "codec.json")["heldout"]["psnr"], "right": accuracy["everything"],
            "fid": fid(features(images), features(reconstructions)),
            **{error: accuracy[error] for error in measures.ERRORS if error in accuracy},
        }  # fmt: skip
    return values


def describe_codecs(values: Mapping[str, Any]) -> str:
    """What `measure_codecs` returns, as a sentence."""
    texts = [f"{name} {it['psnr']:.1f} dB PSNR, {it['right']:.1%} correct, FID {it['fid']:.2f}{_describe_errors(it)}"
             for name, it in values.items() if isinstance(it, dict)]  # fmt: skip
    return f"Reconstructions of held-out scenes (commit {values['commit']}): {'; '.join(texts)}."


def _describe_errors(values: Mapping[str, float]) -> str:
    errors = [f"{error.partition('_')[0]} {values[error]:.2f}" for error in measures.ERRORS if error in values]
    return f", mean errors: {', '.join(errors)}" if errors else ""


def make_variant(
    preset: str, level: int, name: str, family: str, size: str = "M", *more: str,
    paper: Mapping[str, float | str] | None = None,
) -> Variant:  # fmt: skip
    """A run on text and images of this level. `family` is "transfusion", "chameleon", or, on text alone, "llama" or
    "chameleon, text"."""
    numbers, codes = PRESETS[preset], family == "chameleon"
    images = ("--model.patches", "codes", "--model.patch-size", "1") if codes else ("--model.patch-size", "2")
    is_text_only = family in ("llama", "chameleon, text")
    arguments = (
        "small", "--data.sources", "shapes", "topics", "--data.mixture-weights", "2", "1", "--data.seq-len", "320",
        "--training.batch-size", str(numbers.rows), "--data.image-first-max-t", "1",
        *scenes.model_options(preset, size), *images, *(STABLE if family.startswith("chameleon") else ()),
        *((*TEXT_ONLY, "--training.batch-size", str(numbers.rows // 3)) if is_text_only else ()),
        "--training.steps", str(2 * numbers.steps), "--training.learning-rate", scenes.format_rate(numbers.learning_rate),
        "--training.image-weight", "2", "--training.preview-every", "0",
        "--generation.sampler", "dpm", "--generation.steps", "20", *more,
    )  # fmt: skip
    return Variant(name, arguments, data_name(preset, "codes" if codes else "latents", level), paper or {})


def measure(level: int) -> Measure:
    """The measurements of a run on text and images of this level."""
    return partial(measure_text_and_scenes, level)
