"""The world of the tables about text and images: scenes of `shapes`, two thirds of the positions, and Python's
documentation, for twice as many steps as the tables about images alone.

Both families read the same data in equally many rows of 320 positions: one network with two middles, the autoencoder and its
VQ twin, trained on the same scenes for equally many steps (8 numbers for a latent pixel, 8x8 of them; 512 codes).
Transfusion cuts latents into 16 patches, Chameleon writes 64 codes, as the paper's 256 and 1,024: of as many positions it
sees a third of the images, and of their captions. Longer images fill rows less well, 93 % of 4.6 million positions for 98,
as tables show. The tokenizer is the same.

Chameleon here is the paper's but for its smaller learning rate, and queries and keys are normalised in both. Both have the
same rate: with half of it Chameleon S did worse (2.45 bits per byte for 2.24, FID 4.0 for 2.4). Steps, shares and the weight
of images were chosen by pilots of Transfusion at S: with half of the positions each and 1,200 steps drawings had hardly
begun; with 3,600 steps the text, of which there is little, was learnt by heart; a weight of 4 on images, of which Chameleon
has none, kept the text back, one of 1 the images.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from experiments import scenes
from experiments.lab import Column, Options, Variant, transfusion
from experiments.scenes import SCALES
from transfusion.codecs.codec import encode_many
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.fitting import open_codec
from transfusion.disk import read_json
from transfusion.evaluation.fid import fid
from transfusion.evaluation.perplexity import heldout_topics
from transfusion.evaluation.scenes import judge_scenes
from transfusion.inference.engine import Engine

CODEC = (
    "--size", "32x32", "--most", "20000", "--training.steps", "5400", "--training.validate-every", "600",
)  # fmt: skip
CODECS = {"latents": ("vae", ()), "codes": ("vq", ("--network.codes", "512"))}  # by what they make
DOCUMENTS = "20000"  # of each source
STABLE = "--model.post-norm", "--model.z-loss", "1e-5"
TEXT_ONLY = "--data.sources", "topics", "--data.mixture-weights", "1"
COLUMNS = {
    "bits_per_byte": Column(".3f", "lower"), "captions": Column(".1%"), "cider": Column(".2f"),
    "fid": Column(".2f", "lower"), "right": Column(".1%"), "attributes": Column(".1%"),
    "positions": Column(",.0f"), "minutes": Column(".1f", "lower"),
}  # fmt: skip


def prepare(asked: Options) -> None:
    """Both codecs and what they make of the scenes; where that is there already, a look."""
    level = "--shapes-level", str(SCALES[asked.scale].level)
    for data, (codec, more) in CODECS.items():
        folder, made = folder_of(asked, codec), folder_of(asked, data)
        if not (folder / "reconstructions.html").exists():
            transfusion("data", "fit-codec", "small", "shapes", *level, *CODEC, *more, "--out", folder)
        known = folder_of(asked, "latents") / "tokenizer.json"
        tokenizer = ("--tokenizer-size", "512") if data == "latents" else ("--tokenizer", known)
        if not (made / "dataset.json").exists():
            transfusion("data", "prepare", "shapes", "topics", *level, "--limit", DOCUMENTS, "--sizes", "32x32",
                        "--codec", folder, *tokenizer, "--out", made)  # fmt: skip


def folder_of(asked: Options, name: str) -> Path:
    """Where the lab keeps a codec, or what it made."""
    return asked.out / at(asked.scale, name)


def at(scale: str, name: str) -> str:
    """The name of a folder at this scale: codecs or data that are made in another way lie elsewhere."""
    recipe = json.dumps([CODEC, CODECS, DOCUMENTS])
    return f"{name}-{scale}-{hashlib.sha256(recipe.encode()).hexdigest()[:6]}"


def codec_quality(asked: Options) -> str:
    """What comes back through each codec, once they are there: more than that no drawing can reach."""
    if not (folder_of(asked, "vq") / "codec.json").exists():
        return ""
    source = Shapes(SCALES[asked.scale].level, split="heldout")
    captions, pictures = zip(*(source[n].pair for n in range(scenes.SCENES)), strict=True)
    told = []
    for name, (codec, _) in zip(("autoencoder", "VQ twin"), CODECS.values(), strict=True):
        folder = folder_of(asked, codec)
        psnr, made = read_json(folder / "codec.json")["heldout"]["psnr"], open_codec(folder)
        back = [made.decode(content) for content in encode_many(made, pictures)]
        features = scenes.small_network(source.level)
        right, fid_of = judge_scenes(captions, back)[0]["everything"], fid(features(pictures), features(back))
        told.append(f"from the {name} at {psnr:.1f} dB, {right:.1%} right, FID {fid_of:.2f}")
    return f"Held-out scenes come back {'; '.join(told)}."


def variant(
    scale: str, name: str, family: str, size: str = "M", *more: str, paper: Mapping[str, float] | None = None
) -> Variant:
    """A run of a family ("transfusion", "chameleon", and "llama" and "chameleon, text" on the text alone)."""
    of, codes = SCALES[scale], family == "chameleon"
    images = ("--model.patches", "codes", "--model.patch-size", "1") if codes else ("--model.patch-size", "2")
    arguments = (
        "small", "--data.sources", "shapes", "topics", "--data.mixture-weights", "2", "1", "--data.seq-len", "320",
        "--data.rows", str(of.rows), "--data.image-first-max-t", "1", *scenes.size(scale, size), *images,
        *(STABLE if family.startswith("chameleon") else ()),
        *((*TEXT_ONLY, "--data.rows", str(of.rows // 3)) if family in ("llama", "chameleon, text") else ()),
        "--training.steps", str(2 * of.steps), "--training.learning-rate", scenes.rate(of.rate),
        "--training.image-weight", "2", "--training.preview-every", "0",
        "--generation.sampler", "dpm", "--generation.steps", "20", *more,
    )  # fmt: skip
    return Variant(name, arguments, at(scale, "codes" if codes else "latents"), paper or {})


def measure(scale: str, engine: Engine) -> dict[str, float]:
    """The text; and of runs that have seen scenes, what `scenes` measures."""
    found = {"bits_per_byte": heldout_topics(engine)["bits_per_byte"]}
    return found | (scenes.measure(scale, engine) if "shapes" in engine.run.data.sources else {})
