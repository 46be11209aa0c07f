"""Train on real images: colour emoji at 64x64, with an autoencoder trained on them, drawn and captioned.

There are only 1,391 emoji. The experiment shows the complete workflow on real images, and memorisation rather than
generalisation: emoji.html shows training emoji and held-out emoji.

    python -m experiments.emoji --out runs/emoji           # two cores
    python -m experiments.emoji --large --out runs/emoji   # one GPU
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.lab import run_command
from transfusion.data.loader import Source
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.page import Page

PIXELS = 64
SIZE = f"{PIXELS}x{PIXELS}"
NUM_SHOWN = 48  # emoji of each split
SMALL = "--training.steps", "3000"
LARGE = (
    "--model.width", "512", "--model.layers", "12", "--model.heads", "8", "--model.intermediate-size", "1408",
    "--data.seq-len", "1024", "--data.rows", "16", "--training.steps", "3000", "--training.learning-rate", "1e-3",
    "--training.warmup-steps", "200", "--training.ema-decay", "0.998", "--training.validate-every", "500",
    "--training.checkpoint-every", "1000", "--training.preview-every", "0",
)  # fmt: skip
LARGE_CODEC = (
    "--network.width", "64", "--network.blocks", "2", "--training.batch-size", "32", "--training.steps", "2000",
    "--training.learning-rate", "1e-3", "--training.validate-every", "500", "--training.checkpoint-every", "1000",
)  # fmt: skip


@dataclass
class Options:
    out: Path = Path("runs/emoji")
    """Folder of the autoencoder, the data, the run and the page. The same command resumes an interrupted experiment."""
    large: bool = False
    """For a GPU: 40 million parameters instead of 2, and eight times as many positions per step."""
    train: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Further options of `transfusion train`: --train=--training.steps=20"""
    codec: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Further options of `transfusion data fit-codec`."""
    device: str = "auto"
    """Device for all commands: auto, cpu, cuda or mps."""


def main(options: Options) -> None:
    codec, data, run = options.out / "codec", options.out / "data", options.out / "run"
    if not (codec / "reconstructions.html").exists():
        run_command("data", "fit-codec", "small", "emoji", "--size", SIZE, *(LARGE_CODEC if options.large else ()),
                    *options.codec, "--device", options.device, "--out", codec)  # fmt: skip
    run_command("data", "prepare", "emoji", "--sizes", SIZE, "--codec", codec, "--out", data)
    run_command("train", "small", "--data", data, *(LARGE if options.large else SMALL), *options.train,
                "--device", options.device, "--out", run)  # fmt: skip
    page = Page("Emoji at 64x64")
    page.paragraph(
        "Each pair shows an emoji on the left, and on the right the image that the model draws from its name. The text "
        "below is the name, followed by the model's caption of the emoji if it is different. The emoji are not selected."
    )
    engine = open_run(run, device=options.device)
    for split, heading in (("train", "Training set"), ("heldout", "Held out")):
        (source,) = open_raw(engine.run.data, split)
        page.heading(heading)
        page.pictures(draw_pairs(engine, source), width=2 * PIXELS)
    print(f"wrote {page.write(options.out / 'emoji.html')}")


def draw_pairs(engine: Engine, source: Source) -> list[tuple[str, np.ndarray, bool]]:
    """The first emoji of a source, each next to the image drawn from its name: (text, pixels, is the caption correct?)."""
    pairs = [source[n].pair for n in range(min(NUM_SHOWN, len(source)))]
    captions = [answer["prediction"] for answer in caption_heldout(engine, source, len(pairs))["answers"]]
    drawn = engine.generate([Request((name,), num_images=1, seed=n) for n, (name, _) in enumerate(pairs)])
    return [
        (name if caption == name else f"{name}\ncaption: {caption}",
         np.concatenate([pixels, answer.parts[-1]], 1), caption == name)
        for (name, pixels), caption, (answer,) in zip(pairs, captions, drawn, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
