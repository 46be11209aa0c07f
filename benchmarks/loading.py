"""Data loading on one core from prepared data, against the consumption of a GPU: 256-patch images and text, 1:1. Then one of
many ranks, many shards (`ranks.py`), and the reading of sources (`reading.py`).

Images of 256x256 pixels are latents of 8x32x32 (256 patches of 32 numbers, in float16). Rows have 4,096 positions. The
consumption of a GPU is computed, not measured: 40 % of an H100's 989 TFLOP/s.
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
from PIL import Image as PILImage

from benchmarks import ranks, reading
from benchmarks.timing import Figure, Setting
from transfusion import objective
from transfusion.config import DataConfig, DiffusionConfig
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.config import PrepareConfig
from transfusion.data.loader import Loader
from transfusion.data.prepare import prepare
from transfusion.data.reading.readers import open_reader
from transfusion.data.sources import fit, open_sources
from transfusion.model.flops import count_training_flops
from transfusion.runs import SIZES
from transfusion.sequence import Batch, collate

H100_FLOPS, MFU = 989e12, 0.4
ROWS = 8


def measure(setting: Setting) -> Iterator[Figure]:
    """Prepare a small data set, then read it repeatedly."""
    with pin_to_one_core(), tempfile.TemporaryDirectory() as temporary:
        folder, seconds = Path(temporary), setting.pick(10, 0.2)
        write_sources(folder, setting.pick(512, 24), setting.pick(None, 24))
        readers = [open_reader(f"{folder}/pictures"), open_reader(f"{folder}/passages.jsonl")]
        start = time.perf_counter()
        dataset = prepare(readers, PrepareConfig(), folder / "prepared")
        prepare_seconds = time.perf_counter() - start
        records = sum(source["records"] for source in dataset["sources"].values())
        yield Figure("prepared from images and text", records / prepare_seconds, "documents/s")
        config = DataConfig(
            prepared=(str(folder / "prepared"),), seq_len=4096, shuffle_block=setting.pick(2048, 64)
        )
        encoder = fit(config, patch_size=2, seed=0)
        rows = Loader(open_sources(config, "train"), encoder, ROWS).batches()
        batches = (collate(step, config.seq_len, encoder.vocabulary) for step, _ in rows)
        sample = list(islice(batches, setting.pick(40, 2)))  # more than two shuffle blocks
        positions = sum(batch.positions for batch in sample)
        yield Figure("filled positions of rows of 4,096", 100 * positions / (len(sample) * ROWS * config.seq_len), "%")
        images = sum(batch.image_count for batch in sample) * 258 / positions
        yield Figure("  of these in images", 100 * images, "%")
        speed = positions_per_second(lambda: next(batches), seconds)
        yield Figure("read and packed, one core", speed, "positions/s")
        noising = positions_per_second(lambda: add_noise(next(batches)), seconds)
        yield Figure("  with t and noise sampled", noising, "positions/s")
        for name, model in SIZES.items():
            consumption = MFU * H100_FLOPS / (count_training_flops(sample[0], model) / sample[0].positions)
            label = f"  consumed by an H100 at 40 % with {name}"
            yield Figure(label, consumption, "positions/s", consumption / noising, "one core, with noise")
        yield from ranks.measure(setting, config, folder)
    yield from reading.measure(setting)


@contextmanager
def pin_to_one_core() -> Iterator[None]:
    """Run this thread and the threads that it starts on one core."""
    threads, has_affinity = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if has_affinity else set()
    if has_affinity:
        os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if has_affinity:
            os.sched_setaffinity(0, cores)


def write_sources(folder: Path, num_images: int, num_passages: int | None) -> None:
    """Write a folder of captioned images, and text passages as JSON Lines."""
    (folder / "pictures").mkdir()
    shapes, topics = Shapes(level=2, size=256), Topics()
    for n in range(num_images):
        caption, image = shapes[n].segments
        PILImage.fromarray(image.pixels).save(folder / "pictures" / f"{n:05d}.png", compress_level=1)
        (folder / "pictures" / f"{n:05d}.txt").write_text(caption.text, encoding="utf-8")
    lines = (json.dumps({"text": topics[n].segments[0].text}) for n in range(len(topics))[:num_passages])
    (folder / "passages.jsonl").write_text("\n".join(lines), encoding="utf-8")


def add_noise(batch: Batch) -> Batch:
    """Sample t and noise for every image, as the trainer does."""
    objective.sample_noise(batch, DiffusionConfig())
    return batch


def positions_per_second(read: Callable[[], Batch], seconds: float) -> float:
    """Positions per second without padding."""
    positions, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        positions += read().positions
    return positions / (time.perf_counter() - start)
