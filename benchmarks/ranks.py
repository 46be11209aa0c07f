"""Prepared data read by one of many ranks beside a single one, from many shards beside few; and what is kept in memory.

Measured in CPU seconds of one thread without reading ahead; alternatives take turns.
"""

import gc
import hashlib
import json
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import thread_time

from benchmarks.timing import Figure, Setting
from transfusion.config import DataConfig
from transfusion.data.config import PrepareConfig
from transfusion.data.lengths import SIZES
from transfusion.data.loader import Loader
from transfusion.data.prepare import prepare
from transfusion.data.reading.readers import open_reader
from transfusion.data.sources import fit, open_sources
from transfusion.sequence import collate

ROWS = 8  # of this rank, per step
FEW, MANY = 10, 10_000  # shards


def measure(setting: Setting, mixture: DataConfig, folder: Path) -> Iterator[Figure]:
    """`mixture`: prepared images and text. Everything else is written to `folder`."""
    digits = DataConfig(prepared=(str(folder / "digits"),), seq_len=1024, shuffle_block=mixture.shuffle_block)
    prepare([open_reader("digits")], PrepareConfig(fit_documents=200), folder / "digits")
    for name, config in (("images and text", mixture), ("digits", digits)):
        loaders = {world: make_loader(config, world) for world in (1, setting.world)}
        one, many = read_in_turns(loaders, setting.pick(20, 1)).values()
        yield Figure(f"{name}, one rank of 1", one, "positions/s")
        yield Figure(f"  one rank of {setting.world}", many, "positions/s", many / one, "one rank of 1")
    numbers = FEW, setting.pick(MANY, 2 * FEW)
    loaders = {n: make_loader(repeat_shard(digits, folder / f"digits-{n}", n)) for n in numbers}
    seconds = {number: open_shards(loader, number) for number, loader in loaders.items()}
    few, many = read_in_turns(loaders, setting.pick(20, 1)).values()
    yield Figure(f"digits in {numbers[0]} shards", few, "positions/s")
    yield Figure(f"  in {numbers[1]:,} shards", many, "positions/s", many / few, f"{numbers[0]} shards")
    yield Figure("  opening one of them for the first time", 1e6 * seconds[numbers[1]] / numbers[1], "us")
    for name, size in measure_kept(digits, setting.pick(12, 1)).items():
        yield Figure(f"kept per document, {name}", size, "bytes")


def make_loader(config: DataConfig, world: int = 1) -> Loader:
    """Rank 0 of `world`."""
    return Loader(open_sources(config, "train"), fit(config, patch_size=2, seed=0), ROWS * world, 0, world)


def read_in_turns(loaders: Mapping[object, Loader], rounds: int, steps: int = 8) -> dict[object, float]:
    """Positions without padding per CPU second of each loader. In each round each reads some steps; the first is not
    counted."""
    batches = {name: loader.read_batches() for name, loader in loaders.items()}
    positions, seconds = dict.fromkeys(loaders, 0), dict.fromkeys(loaders, 0.0)
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            start = thread_time()
            for rows, _ in islice(batches[name], steps):
                size = collate(rows, loader.config.seq_len, loader.vocabulary).positions
                positions[name] += size * (number > 0)
            seconds[name] += (thread_time() - start) * (number > 0)
    return {name: positions[name] / seconds[name] for name in loaders}


def open_shards(loader: Loader, number: int) -> float:
    """CPU seconds for reading the first document of each shard of the only source."""
    [source] = loader.sources
    start = thread_time()
    for id_ in range(0, len(source), len(source) // number):
        source[id_]
    return thread_time() - start


def repeat_shard(config: DataConfig, folder: Path, number: int) -> DataConfig:
    """A prepared folder with this number of shards, which are all links to the first one of `config`'s only source."""
    source = Path(config.prepared[0]).resolve()
    metadata = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    [(name, values)] = metadata["sources"].items()
    (folder / name).mkdir(parents=True)
    shard, shards = values["shards"][0], []
    for n in range(number):
        file = f"train-{n:05d}.arrow"
        (folder / name / file).symlink_to(source / name / "train-00000.arrow")
        shards.append(shard | {"sha256": {file: shard["sha256"]["train-00000.arrow"]}})
    with (source / name / "train-sizes.bin").open("rb") as file:
        sizes = number * file.read(shard["documents"]["train"] * SIZES.itemsize)
    (folder / name / "train-sizes.bin").write_bytes(sizes)
    values |= {"shards": shards, "sha256": {"train-sizes.bin": hashlib.sha256(sizes).hexdigest()}}
    for file in ("tokenizer.json", "codec.safetensors"):
        (folder / file).symlink_to(source / file)
    (folder / "dataset.json").write_text(json.dumps(metadata), encoding="utf-8")
    return replace(config, prepared=(str(folder),))


def measure_kept(config: DataConfig, blocks: int) -> dict[str, float]:
    """Bytes that are kept for each document that was read, beyond what is kept after the first ones: objects of Python and
    NumPy; private memory of the process, if the system reports it. And the size of a document in the file of sizes, which is
    mapped and shared by all processes."""
    loader, kept = make_loader(config), {}
    documents = blocks * config.shuffle_block
    read_blocks(loader, 0, blocks)
    before = private_bytes()
    read_blocks(loader, blocks, blocks)
    if before is not None:
        kept["private memory"] = max(0, private_bytes() - before) / documents
    tracemalloc.start()
    try:
        read_blocks(loader, 0, blocks)
        before = tracemalloc.get_traced_memory()[0]
        read_blocks(loader, blocks, blocks)
        kept["objects"] = max(0, tracemalloc.get_traced_memory()[0] - before) / documents
    finally:
        tracemalloc.stop()
    return kept | {"mapped and shared": loader.sources[0].sizes.itemsize}


def read_blocks(loader: Loader, first: int, number: int) -> None:
    for block in range(first, first + number):
        for _ in loader.block(block):
            pass
    gc.collect()


def private_bytes() -> int | None:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)
