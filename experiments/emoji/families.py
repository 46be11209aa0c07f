"""Table 3 on pictures of emoji: Transfusion against Chameleon at two model sizes.

Pictures that artists drew, instead of synthetic scenes: 150 emoji without flags in four styles, 540 pictures for training,
with captions such as "pizza, openmoji". Held out are 60 pictures of the same emoji: the model saw them in other styles. Both
codecs train on all training pictures of the data set (1,899 emoji) for the same number of steps. They share the network: 8
numbers, or one of 512 codes, for 4x4 pixels.

A picture is 16 patches for Transfusion and 64 codes for Chameleon. Both families train on the same number of positions, so
Chameleon sees a third of the pictures and captions. In pilot runs of Transfusion, presentations per picture decided what is
drawn: 700 of each of 100 pictures were enough, 42 of each of 1,658 were not. Here it sees each picture about 400 times,
Chameleon about 130 times.

Drawings are judged by `experiments.emoji.judge`, which looks them up among the real pictures of all 1,899 emoji in the other
styles: is the asked emoji among the five nearest (top-5), and is the style the asked one? Each held-out picture is drawn
four times, and 240 of the training pictures once, with guidance 3. Captions are greedy captions of the held-out pictures.
The caption loss is the mean loss of their text, in nats per token. Intervals are over seeds of weights, data order, noise
and training pictures to draw. They do not cover other held-out pictures, codecs or judges. No claim is judged here.

    python -m experiments.emoji.families
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import lab
from experiments.emoji import dataset, judge
from experiments.emoji.evaluate import reconstruct
from experiments.emoji.judge import judge_pictures
from experiments.emoji.measures import (
    HELDOUT,
    NUM_CONCEPTS,
    TRAINING,
    choose_concepts,
    judge_folder,
    measure_emoji,
    open_lab,
    pictures_folder,
    take_cells,
)  # fmt: skip
from experiments.emoji.packages import DataError
from experiments.emoji.recipe import AUTOENCODER, CODEC
from experiments.lab import Claim, Column, Options, Table, Variant, data_folder, describe_machine, run_command
from experiments.multimodal import STABLE
from experiments.scaling import FAMILIES
from transfusion.data.fitting import open_codec
from transfusion.training.codec import psnr

CODEC_STEPS = "--training.steps", "5500"
CODECS = {"latents": ("emoji-vae", AUTOENCODER), "codes": ("emoji-vq", ("--network.codes", "512"))}  # by their data
CODECS_NAME = "codecs-emoji"  # of the file in docs/results with what the codecs lose
SIZES = {"S": ("128", "2", "256"), "M": ("256", "4", "512")}  # width, heads, intermediate_size; M is the model of the recipe
TRAINING_OPTIONS = (
    "--data.seq-len", "320", "--training.batch-size", "6", "--training.steps", "3000",
    "--data.image-first", "0.25", "--data.image-first-max-t", "0.3", "--training.image-weight", "5",
    "--training.learning-rate", "3e-3", "--training.min-learning-rate", "3e-5", "--training.warmup-steps", "100",
    "--training.ema-decay", "0.995", "--training.validate-every", "1000", "--training.preview-every", "0",
    "--generation.sampler", "dpm-sde", "--generation.steps", "20", "--generation.guidance-scale", "3",
)  # fmt: skip
COLUMNS = {
    "text_loss": Column("caption loss", ".3f", "lower"), "captions_concept": Column("captions with the emoji", ".1%"),
    "captions_style": Column("captions with the style", ".1%"),
    f"{HELDOUT}_top5": Column("top-5, held out", ".1%"), f"{HELDOUT}_style": Column("style, held out", ".1%"),
    f"{TRAINING}_top5": Column("top-5, training", ".1%"), f"{TRAINING}_style": Column("style, training", ".1%"),
    "positions": Column("positions", ",.0f"),
}  # fmt: skip
COMPARED = "text_loss", "captions_concept", f"{HELDOUT}_top5", f"{HELDOUT}_style", f"{TRAINING}_top5"


def build_table(preset: str) -> Table:
    """The same for both presets: more compute would need more pictures."""
    return Table(
        "emoji-families",
        tuple(make_variant(f"{title} {size}", family, size) for title, family in FAMILIES.items() for size in SIZES),
        COLUMNS,
        measure_emoji,
        tuple(Claim(f"Transfusion is better than Chameleon at {size}, by {COLUMNS[column].title}", column,
                    f"Transfusion {size}", f"Chameleon {size}") for size in SIZES for column in COMPARED),
        prepare,
    )  # fmt: skip


def make_variant(name: str, family: str, size: str) -> Variant:
    """A run on captioned emoji; `family` is "transfusion" or "chameleon"."""
    numbers = zip(("width", "heads", "intermediate-size"), SIZES[size], strict=True)
    model = "--model.layers", "4", "--model.tie-word-embeddings", *(
        word for option, number in numbers for word in (f"--model.{option}", number))  # fmt: skip
    codes = family == "chameleon"
    images = ("--model.patches", "codes", "--model.patch-size", "1", *STABLE) if codes else ("--model.patch-size", "2")
    return Variant(name, ("small", *model, *images, *TRAINING_OPTIONS), data_name("codes" if codes else "latents"))


def data_name(name: str) -> str:
    """The name of the pictures as latents or as codes. It contains a hash of the recipe: another recipe has another name."""
    recipe = json.dumps([CODEC, CODEC_STEPS, CODECS, NUM_CONCEPTS])
    return f"emoji-{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:6]}"


def codec_folder(options: Options, name: str) -> Path:
    """The folder of the codec that makes these data."""
    codec, _ = CODECS[name]
    return data_folder(options, data_name(name).replace(f"emoji-{name}", codec))


def prepare(options: Options) -> None:
    """Fetch the pictures, train the judge, train both codecs for equal steps, and encode the table's pictures with each.
    Skip what exists."""
    pictures = pictures_folder(options.out)
    if not (pictures / "edits" / "validation.jsonl").exists():  # the last file that is written
        try:
            dataset.main(dataset.Options(pictures))
        except DataError as error:
            sys.exit(f"error: {error}")
    if not (judge_folder(options.out) / "judge.safetensors").exists():
        judge.main(judge.Options(pictures, judge_folder(options.out)))
    for name, (_, more) in CODECS.items():
        codec, data = codec_folder(options, name), data_folder(options, data_name(name))
        if not (codec / "reconstructions.html").exists():
            run_command("data", "fit-codec", "small", pictures / "pictures" / "train", *CODEC, *CODEC_STEPS, *more,
                        "--out", codec)  # fmt: skip
        tokenizer_path = data_folder(options, data_name("latents")) / "tokenizer.json"
        tokenizer = ("--tokenizer-size", "512") if name == "latents" else ("--tokenizer", tokenizer_path)
        if not (data / "dataset.json").exists():
            pairs = write_pairs(pictures)
            run_command("data", "prepare", pairs, "--sizes", "32x32", "--codec", codec, *tokenizer, "--out", data)


def write_pairs(pictures: Path) -> Path:
    """Copy the pictures of the table's concepts, with captions and splits, to a folder beside the data set's others."""
    concepts, pairs = choose_concepts(judge.read_cells(pictures)), pictures / "pairs"
    shutil.rmtree(pairs, ignore_errors=True)
    for split in ("train", "validation"):
        lines = (pictures / "pictures" / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if (row := json.loads(line))["concept"] in concepts]
        dataset.write_lines(pairs / split / "metadata.jsonl", rows)
        for row in rows:
            shutil.copy(pictures / "pictures" / split / row["file_name"], pairs / split)
    return pairs


def measure_codecs(options: Options) -> dict[str, Any] | None:
    """What the judge finds in the table's real pictures, the upper bound of drawings, and in both codecs' reconstructions of
    them, and the distance of these in dB. None if the codecs are missing."""
    folders = {"autoencoder": codec_folder(options, "latents"), "VQ twin": codec_folder(options, "codes")}
    if not all((folder / "codec.json").exists() for folder in folders.values()):
        return None
    opened, gallery = open_lab(options.out)
    concepts, values = choose_concepts(gallery.cells), describe_machine(options.device)
    for kind in (HELDOUT, TRAINING):
        cells = take_cells(gallery.cells, kind, concepts)
        values[kind] = {"real pictures": asdict(judge_pictures(opened, cells.pixels, cells, gallery))}
        for name, folder in folders.items():
            pixels = reconstruct(open_codec(folder), cells.pixels)
            values[kind][name] = asdict(judge_pictures(opened, pixels, cells, gallery)) | {
                "psnr": psnr(cells.pixels, pixels).mean().item()}  # fmt: skip
    return values


def describe_codecs(values: Mapping[str, Any]) -> str:
    """What `measure_codecs` returns, as Markdown."""
    rows = [[f"{name}, {title}", *(f"{it[share]:.1%}" for share in ("top1", "top5", "style")),
             f"{it['psnr']:.1f} dB" if "psnr" in it else "", str(it["count"])]
            for kind, title in ((HELDOUT, "held out"), (TRAINING, "training"))
            for name, it in values[kind].items()]  # fmt: skip
    head = f"Real pictures and their reconstructions (commit {values['commit']})", "top-1", "top-5", "style", "PSNR", "count"
    return lab.format_markdown(head, rows)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
    if (quality := measure_codecs(options)) is not None:
        print(describe_codecs(quality), end="")
