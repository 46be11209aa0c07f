"""Reading of sources: whether the time of a record depends on their number, and a folder of pictures beside Pillow alone."""

import gzip
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from benchmarks.timing import ROOT, Figure, Setting, time_alternately
from transfusion.data.reading.readers import open_reader
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
        small, large = setting.pick((12_500, 50_000), (20, 40))
        for count in (small, large):
            write_pictures(folder / f"{count}", count)
        pictures = folder / f"{large}"
        seconds = time_alternately(
            {"Pillow": lambda: decode(pictures), "survey": lambda: survey(open_reader(str(pictures)), None),
             "duplicates": lambda: str(survey_duplicates(pictures))}, setting.pick(3, 1), setting.device, warmup=1,
        )  # fmt: skip
        for name, label in (("survey", "stats of"), ("duplicates", "validate")):
            time, ratio = seconds[name] / large * 1e6, seconds["Pillow"] / seconds[name]
            yield Figure(f"{label} {large:,} pairs", time, "us/picture", ratio, "decoding them with Pillow")
        growth = peak_memory(pictures) - peak_memory(folder / f"{small}")
        yield Figure("  memory for one more picture", max(growth / (large - small), 0.01), "bytes")


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


def survey_duplicates(folder: Path) -> Duplicates:
    duplicates = Duplicates()
    survey(open_reader(str(folder)), None, duplicates=duplicates)
    return duplicates


def peak_memory(folder: Path) -> int:
    """The peak memory in bytes of a process that validates a folder."""
    command = [sys.executable, "-m", "transfusion", "data", "validate", str(folder)]
    with open(os.devnull, "wb") as null:
        actions = [(os.POSIX_SPAWN_DUP2, null.fileno(), stream) for stream in (1, 2)]
        process = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)}, file_actions=actions)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise ChildProcessError(f"{' '.join(command)} failed with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Files


def write_csv(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.write("id,text\n")
        file.writelines(f"{number},{TEXT}\n" for number in range(count))


def write_json_lines(path: Path, count: int) -> None:
    with gzip.open(path, "wt", 1) as file:
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
        (parent / f"{number:06d}.txt").write_text(f"picture number {number}")


WRITERS: dict[str, Callable[[Path, int], None]] = {
    ".csv": write_csv, ".jsonl.gz": write_json_lines, ".tar.gz": write_archive,
}  # fmt: skip
