"""What one core reads from prepared data, beside what models can eat: the paper's mixture, 256-patch images and text 1:1.

Pictures of 256x256 pixels become latents of 8x32x32 (256 patches of 32 numbers, in float16), rows are 4,096 positions.
All is held to one core. What a GPU eats is computed, not measured: 40 % of an H100's 989 TFLOP/s.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from PIL import Image as Picture

from benchmarks.measuring import Figure, Setting
from transfusion import objective
from transfusion.config import DataConfig, DiffusionConfig, PrepareConfig
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.loader import Loader
from transfusion.data.prepare import prepare
from transfusion.data.reading.readers import open_reader
from transfusion.data.sources import fit, open_sources
from transfusion.model.flops import count_training_flops
from transfusion.runs import SIZES
from transfusion.sequence import Batch

H100, MFU = 989e12, 0.4
ROWS = 8


def measure(setting: Setting) -> Iterator[Figure]:
    """Prepare a small data set, then read it round and round."""
    with one_core(), tempfile.TemporaryDirectory() as place:
        folder, seconds = Path(place), setting.pick(10, 0.2)
        write_sources(folder, setting.pick(512, 24), setting.pick(None, 24))
        readers = [open_reader(f"{folder}/pictures"), open_reader(f"{folder}/passages.jsonl")]
        begun = time.perf_counter()
        about = prepare(readers, PrepareConfig(), folder / "prepared")
        preparing = time.perf_counter() - begun
        records = sum(source["records"] for source in about["sources"].values())
        yield Figure("prepared from pictures and text", records / preparing, "documents/s")
        config = DataConfig(
            prepared=(str(folder / "prepared"),), seq_len=4096, rows=ROWS, shuffle_block=setting.pick(2048, 64)
        )
        encoder = fit(config, patch_size=2, seed=0)
        batches = Loader(open_sources(config, "train"), encoder).batches()
        found = [batch for batch, _ in islice(batches, setting.pick(40, 2))]  # more than two blocks
        positions = sum(batch.positions for batch in found)
        yield Figure("rows of 4,096 are filled", 100 * positions / (len(found) * ROWS * config.seq_len), "%")
        images = sum(batch.image_count for batch in found) * 258 / positions
        yield Figure("  images are of their positions", 100 * images, "%")
        reading = speed(lambda: next(batches)[0], seconds)
        yield Figure("read and packed, one core", reading, "positions/s")
        noising = speed(lambda: noised(next(batches)[0]), seconds)
        yield Figure("  with t and noise drawn", noising, "positions/s")
        for name, model in SIZES.items():
            eaten = MFU * H100 / (count_training_flops(found[0], model) / found[0].positions)
            what = f"  an H100 at 40 % eats with {name}"
            yield Figure(what, eaten, "positions/s", eaten / noising, "one core, with noise")


@contextmanager
def one_core() -> Iterator[None]:
    """What this thread does, and what it starts, stays on one core."""
    threads, held = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if held else set()
    if held:
        os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if held:
            os.sched_setaffinity(0, cores)


def write_sources(folder: Path, pictures: int, passages: int | None) -> None:
    """A folder of captioned pictures, and passages as JSON lines."""
    (folder / "pictures").mkdir()
    shapes, topics = Shapes(level=2, size=256), Topics()
    for n in range(pictures):
        caption, image = shapes[n].segments
        Picture.fromarray(image.pixels).save(folder / "pictures" / f"{n:05d}.png", compress_level=1)
        (folder / "pictures" / f"{n:05d}.txt").write_text(caption.text)
    lines = (json.dumps({"text": topics[n].segments[0].text}) for n in range(len(topics))[:passages])
    (folder / "passages.jsonl").write_text("\n".join(lines))


def noised(batch: Batch) -> Batch:
    """With t and noise for every image, as the trainer draws them."""
    objective.sample_noise(batch, DiffusionConfig())
    return batch


def speed(read: Callable[[], Batch], seconds: float) -> float:
    """Positions a second, padding not counted."""
    positions, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        positions += read().positions
    return positions / (time.perf_counter() - begun)
