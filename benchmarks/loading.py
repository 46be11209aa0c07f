"""What one core reads from prepared data, beside what models can eat: the paper's mixture, 256-patch images and text 1:1.

    python benchmarks/loading.py [--pictures 512] [--seconds 10]

Pictures of 256x256 pixels become latents of 8x32x32 (256 patches of 32 numbers, in float16), rows are 4,096 positions.
The whole process is held to one core. What a GPU eats is computed, not measured: 40 % of an H100's 989 TFLOP/s.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro
from PIL import Image as Picture

from transfusion import objective
from transfusion.config import SIZES, DataConfig, DiffusionConfig, PrepareConfig
from transfusion.data.loader import Loader
from transfusion.data.prepare import prepare
from transfusion.data.reading.readers import open_reader
from transfusion.data.shapes import Shapes
from transfusion.data.sources import fit, open_sources
from transfusion.data.topics import Topics
from transfusion.model.flops import training_flops
from transfusion.sequence import Batch

H100, MFU = 989e12, 0.4


@dataclass
class Options:
    pictures: int = 512
    seconds: float = 10.0
    rows: int = 8


def main(options: Options) -> None:
    """Prepare a small data set, then read it round and round."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sources(folder, options.pictures)
        readers = [open_reader(f"{folder}/pictures"), open_reader(f"{folder}/passages.jsonl")]
        begun = time.perf_counter()
        about = prepare(readers, PrepareConfig(), folder / "prepared")
        preparing = time.perf_counter() - begun
        config = DataConfig(prepared=(str(folder / "prepared"),), row_length=4096, rows=options.rows)
        encoder = fit(config, patch_size=2, seed=0)
        sources = open_sources(config, "train")
        batches = Loader(sources, encoder).batches()
        found = [batch for batch, _ in islice(batches, 40)]  # more than two blocks
        fill = sum(batch.positions for batch in found) / (len(found) * options.rows * config.row_length)
        reading = speed(lambda: next(batches)[0], options.seconds)
        noising = speed(lambda: noised(next(batches)[0]), options.seconds)
        flops = {name: training_flops(found[0], model) / found[0].positions for name, model in SIZES.items()}
    eaten = {name: MFU * H100 / each for name, each in flops.items()}
    images = sum(batch.image_count for batch in found) * 258 / sum(batch.positions for batch in found)
    print(json.dumps({
        "documents_prepared_per_second": round(sum(s["records"] for s in about["sources"].values()) / preparing),
        "fill": round(fill, 4), "share_of_image_positions": round(images, 3),
        "positions_per_second_packed": round(reading), "positions_per_second_with_noise": round(noising),
        "an_h100_eats_at_40_percent": {name: round(value) for name, value in eaten.items()},
        "cores_that_feed_an_h100": {name: round(value / noising, 2) for name, value in eaten.items()},
    }, indent=2))  # fmt: skip


def write_sources(folder: Path, pictures: int) -> None:
    """A folder of captioned pictures, and passages as JSON lines."""
    (folder / "pictures").mkdir()
    shapes, topics = Shapes(level=2, size=256), Topics()
    for n in range(pictures):
        caption, image = shapes[n].segments
        Picture.fromarray(image.pixels).save(folder / "pictures" / f"{n:05d}.png", compress_level=1)
        (folder / "pictures" / f"{n:05d}.txt").write_text(caption.text)
    lines = (json.dumps({"text": topics[n].segments[0].text}) for n in range(len(topics)))
    (folder / "passages.jsonl").write_text("\n".join(lines))


def noised(batch: Batch) -> Batch:
    """With t and noise for every image, as the trainer draws them."""
    objective.draw(batch, DiffusionConfig())
    return batch


def speed(read: Callable[[], Batch], seconds: float) -> float:
    """Positions a second, padding not counted."""
    positions, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        positions += read().positions
    return positions / (time.perf_counter() - begun)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
