"""Pictures that nobody made for a test: colour emoji at 64x64, through an autoencoder of their own, drawn and captioned.

There are 1,391 of them, so this shows the whole path on real pictures, and what is remembered rather than understood:
emoji.html has some that were trained on and some that were held out.

    python -m experiments.emoji --out runs/emoji           # two cores
    python -m experiments.emoji --large --out runs/emoji   # one GPU
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.lab import transfusion
from transfusion.data.loader import Source
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_heldout
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.page import Page

PIXELS = 64
SIZE = f"{PIXELS}x{PIXELS}"
SHOWN = 48  # emoji of each kind
SMALL = "--training.steps", "3000"
LARGE = (
    "--model.width", "512", "--model.layers", "12", "--model.heads", "8", "--model.intermediate-size", "1408",
    "--data.seq-len", "1024", "--data.rows", "16", "--training.steps", "3000", "--training.learning-rate", "1e-3",
    "--training.warmup-steps", "200", "--training.ema-decay", "0.998", "--training.validate-every", "500",
    "--training.checkpoint-every", "1000", "--training.preview-every", "0",
)  # fmt: skip
LARGE_CODEC = (
    "--network.width", "64", "--network.blocks", "2", "--training.batch_size", "32", "--training.steps", "2000",
    "--training.learning-rate", "1e-3", "--training.validate-every", "500", "--training.checkpoint-every", "1000",
)  # fmt: skip


@dataclass
class Options:
    out: Path = Path("runs/emoji")
    """The folder of autoencoder, data, run and page; the same command goes on where it stopped."""
    large: bool = False
    """For a GPU: 40 million parameters instead of 2, on eight times as many positions a step."""
    train: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """More options of `transfusion train`: --train=--training.steps=20"""
    codec: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """More options of `transfusion data fit-codec`."""
    device: str = "auto"


def main(asked: Options) -> None:
    codec, data, run = asked.out / "codec", asked.out / "data", asked.out / "run"
    if not (codec / "reconstructions.html").exists():
        transfusion("data", "fit-codec", "small", "emoji", "--size", SIZE, *(LARGE_CODEC if asked.large else ()),
                    *asked.codec, "--device", asked.device, "--out", codec)  # fmt: skip
    transfusion("data", "prepare", "emoji", "--sizes", SIZE, "--codec", codec, "--out", data)
    transfusion("train", "small", "--data", data, *(LARGE if asked.large else SMALL), *asked.train,
                "--device", asked.device, "--out", run)  # fmt: skip
    page = Page("Emoji at 64x64")
    page.say(
        "Each picture is a pair: left the emoji, right what the model draws from its name. Below stands its name, and "
        "what the model calls it when it is shown, where that is something else. None are picked."
    )
    engine = open_run(run, device=asked.device)
    for split, heading in (("train", "Trained on"), ("heldout", "Held out")):
        (source,) = open_raw(engine.run.data, split)
        page.heading(heading)
        page.pictures(look(engine, source), width=2 * PIXELS)
    print(f"wrote {page.write(asked.out / 'emoji.html')}")


def look(engine: Engine, source: Source) -> list[tuple[str, np.ndarray, bool]]:
    """The first emoji of a source, each beside what is drawn from its name: caption, pixels, is it named rightly?"""
    pairs = [source[n].pair for n in range(min(SHOWN, len(source)))]
    said = [answer["said"] for answer in caption_heldout(engine, source, len(pairs))["answers"]]
    drawn = engine.generate([Request((name,), num_images=1, seed=n) for n, (name, _) in enumerate(pairs)])
    return [
        (name if called == name else f"{name}\nsaid: {called}",
         np.concatenate([pixels, answer.parts[-1]], 1), called == name)
        for (name, pixels), called, (answer,) in zip(pairs, said, drawn, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
