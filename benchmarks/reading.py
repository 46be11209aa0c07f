"""Reading of sources: whether the time of a record depends on their number, and a folder of pictures beside Pillow alone."""

import concurrent.futures
import gzip
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.data.reading.readers import open_reader
from transfusion.data.summaries import count_processes
from transfusion.data.survey import UNIT_SIZE, Duplicates, survey

TEXT = "some words of a caption " * 4


def measure(setting: Setting) -> Iterator[Figure]:
    """Files of records with few and many of them, then a folder of pictures with captions."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few, many = setting.pick((50_000, 400_000), (20, 40))
        for kind, write in WRITERS.items():
            paths = [folder / f"{count}{kind}" for count in (few, many)]
            for path, count in zip(paths, (few, many), strict=True):
                write(path, count)
            seconds = time_alternately(
                {path.name: lambda path=path: read(path) for path in paths}, setting.pick(3, 1), setting.device, warmup=0
            )  # fmt: skip
            of_few, of_many = (seconds[path.name] / count for path, count in zip(paths, (few, many), strict=True))
            yield Figure(f"{many:,} records of {kind}", of_many * 1e6, "us/record", of_few / of_many, f"{few:,} records")
            for path in paths:
                path.unlink()
        yield from _measure_pictures(setting, folder)


def _measure_pictures(setting: Setting, folder: Path) -> Iterator[Figure]:
    small, large = setting.pick((12_500, 50_000), (20, 40))
    few, many = folder / f"{small}", folder / f"{large}"
    for path, count in ((few, small), (many, large)):
        write_pictures(path, count)
    processes = count_processes()
    seconds = time_alternately(
        {"Pillow": lambda: decode(many), "stats": lambda: survey(open_reader(str(many)), None),
         "few": lambda: validate(few), "one": lambda: validate(many), "all": lambda: validate(many, processes)},
        setting.pick(3, 1), setting.device, warmup=1,
    )  # fmt: skip
    labels = {"stats": "stats of {} pairs, one process", "one": "validate {} pairs, one process",
              "all": f"validate {{}} pairs, {processes} processes"}  # fmt: skip
    for name, label in labels.items():
        time, ratio = seconds[name] / large * 1e6, seconds["Pillow"] / seconds[name]
        yield Figure(label.format(f"{large:,}"), time, "us/picture", ratio, "decoding them with Pillow")
    of_few, of_many = seconds["few"] / small, seconds["one"] / large
    yield Figure("  compared with few", of_many * 1e6, "us/picture", of_few / of_many, f"{small:,} pairs")
    names = ("  memory of one more picture, resident", "  memory of one more picture, of Python")
    for name, value in zip(names, in_process(measure_memory, few, many), strict=True):
        yield Figure(name, value / (large - small), "bytes")


def read(path: Path) -> None:
    reader = open_reader(str(path))
    for unit in reader.units(UNIT_SIZE):
        for _ in reader.read(unit):
            pass


def decode(folder: Path) -> None:
    """Walk a folder and decode every picture with Pillow."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".jpg"):
                with PILImage.open(os.path.join(parent, name)) as image:
                    image.load()


def validate(folder: Path, processes: int = 1) -> tuple:
    """What `transfusion data validate` computes."""
    reader, duplicates = open_reader(str(folder)), Duplicates()
    return reader, survey(reader, None, duplicates=duplicates, processes=processes), duplicates, str(duplicates)


def measure_memory(few: Path, many: Path) -> tuple[int, int]:
    """How many bytes more it needs to validate the larger folder: resident at the end, and the peak of Python's objects.

    C libraries allocate only the first, and the second is exact. The results are kept until both are measured.
    """
    results, resident, peaks = [validate(few)], [resident_memory()], []  # the first one imports and fills caches
    for folder in (few, many):
        results.append(validate(folder))
        resident.append(resident_memory())
    before, after_few, after_many = resident
    results.clear()
    for folder in (few, many):
        tracemalloc.start()
        validate(folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (after_many - after_few) - (after_few - before), peaks[1] - peaks[0]


def in_process(function: Callable, *arguments: object) -> Any:
    """The result of a function in a fresh process."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def resident_memory() -> int:
    """The resident memory of this process in bytes; without /proc its peak."""
    if os.path.exists("/proc/self/statm"):
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Files


def write_csv(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("id,text\n")
        file.writelines(f"{number},{TEXT}\n" for number in range(count))


def write_json_lines(path: Path, count: int) -> None:
    with gzip.open(path, "wt", 1, encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(count))


def write_archive(path: Path, count: int) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number in range(count):
            content, info = json.dumps({"text": f"{number} {TEXT}"}).encode(), tarfile.TarInfo(f"{number:07d}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of 64x64 pixels with captions beside them, 500 in each folder."""
    random = np.random.default_rng(0)
    for number in range(count):
        parent = folder / f"{number // 500:03d}"
        parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(random.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        PILImage.fromarray(pixels).save(parent / f"{number:06d}.jpg")
        (parent / f"{number:06d}.txt").write_text(f"picture number {number}", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, int], None]] = {
    ".csv": write_csv, ".jsonl.gz": write_json_lines, ".tar.gz": write_archive,
}  # fmt: skip
