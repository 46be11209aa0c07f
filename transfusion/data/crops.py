"""Pictures of one size in one file, for training a codec: read once, then mapped, any of them at once."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transfusion.codecs.pictures import to_pixels
from transfusion.data.raw import Fault, RawDocument, RawImage
from transfusion.data.reading.readers import Reader
from transfusion.disk import read_json, write_json
from transfusion.seeding import derive_seed

UNIT = 512  # records read between two reports of progress


@dataclass(frozen=True)
class GatheredPictures:
    """Pictures (n, Y, X, channels) uint8, mapped from a file; which of them their source holds out; records of no use."""

    pictures: np.ndarray
    heldout: tuple[int, ...]
    faults: int


def gather_pictures(
    readers: Sequence[Reader], size: tuple[int, int], image_channels: int, most: int, folder: Path,
    tick: Callable[[int, int], None] = lambda done, total: None, crops: int = 0,
    hear: Callable[[Fault], None] = lambda fault: None,
) -> GatheredPictures:  # fmt: skip
    """All different pictures of some sources, at most `most`, in the folder's `pictures.u8`; `hear` is told every fault.

    Each is cut to size (width, height), or so many crops are taken of it. Where there are too many, records are passed over
    evenly. A folder that holds the pictures already is not read anew; ValueError when it holds others.
    """
    width, height = size
    sources = [{"options": asdict(reader.options), "files": reader.fingerprint()} for reader in readers]
    built_in = [reader.address for reader in readers if reader.files is None]
    recipe = {
        "sources": sources,
        "built_in": built_in,
        "size": size,
        "image_channels": image_channels,
        "most": most,
        "crops": crops,
    }
    path = folder / "pictures.json"
    if not path.exists():
        gathering = _Gathering(size, image_channels, most, crops, hear)
        with (folder / "pictures.u8").open("wb") as file:
            gathering.write(readers, file, tick)
        if not gathering.count:
            raise ValueError(f"{', '.join(reader.address for reader in readers)}: no picture in them could be read")
        found = {"count": gathering.count, "faults": gathering.faults, "heldout": gathering.heldout}
        write_json(path, {"recipe": recipe, **found})
    found = read_json(path)
    if found.get("recipe") != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} was begun with other pictures: give another --out")
    try:
        pictures = np.memmap(folder / "pictures.u8", np.uint8, "r", shape=(found["count"], height, width, image_channels))
    except (OSError, ValueError):
        lost = f"{folder / 'pictures.u8'} is missing or cut short"
        raise ValueError(f"{lost}: delete {path}, and they are read anew") from None
    return GatheredPictures(pictures, tuple(found["heldout"]), found["faults"])


def cut_crops(
    pixels: np.ndarray, number: int, size: tuple[int, int], image_channels: int, crops: int
) -> Iterator[np.ndarray]:
    """Picture `number`, (Y, X, 1 | 3) uint8, as pictures (height, width, channels) uint8, never flipped.

    Crops are windows anywhere in it, of any scale from its own pixels to the largest window that fits, each doubling as
    likely as any other: all chance from the numbers of picture and crop. Without crops, or when it is smaller than `size`,
    it is the whole picture, its short side resized and the middle cut out.
    """
    largest = min(pixels.shape[0] / size[1], pixels.shape[1] / size[0])
    if not crops or largest < 1:
        yield to_pixels(pixels, [size], image_channels)
        return
    for crop in range(crops):
        chance = np.random.default_rng(derive_seed("crop", number, crop))
        scale = largest ** chance.random()
        width, height = (round(side * scale) for side in size)
        x, y = (int(chance.integers(room + 1)) for room in (pixels.shape[1] - width, pixels.shape[0] - height))
        yield to_pixels(pixels[y : y + height, x : x + width], [size], image_channels)


class _Gathering:
    """Pictures on their way into a file."""

    def __init__(self, size: tuple[int, int], image_channels: int, most: int, crops: int, hear: Callable[[Fault], None]):
        self.size, self.image_channels, self.most, self.crops, self.hear = size, image_channels, most, crops, hear
        self.count = self.number = self.faults = 0
        self.heldout: list[int] = []
        self.seen: set[bytes] = set()  # of pictures that recur, as with several captions, one is enough

    def write(self, readers: Sequence[Reader], file: BinaryIO, tick: Callable[[int, int], None]) -> None:
        units = [(reader, unit) for reader in readers for unit in reader.units(UNIT)]
        records = sum(unit.rows for _, unit in units)
        self.crops = min(self.crops, max(1, self.most // records))
        wanted = min(len(units), -(-self.most * len(units) // (max(self.crops, 1) * records)))
        chosen = np.unique(np.linspace(0, len(units) - 1, wanted).round().astype(int))
        chosen = [len(units) // 2] if wanted == 1 else chosen  # the first may be held out
        for done, n in enumerate(chosen):
            reader, unit = units[n]
            for one in reader.read(unit):
                self._take(one, file)
                if self.count >= self.most:
                    return
            tick(done + 1, len(chosen))

    def _take(self, one: RawDocument | Fault, file: BinaryIO) -> None:
        if isinstance(one, Fault):
            self.faults += 1
            self.hear(one)
            return
        for part in one.segments:
            if not isinstance(part, RawImage):
                continue
            digest = hashlib.sha256(np.asarray(part.pixels).tobytes()).digest()
            if digest in self.seen:
                continue
            self.seen.add(digest)
            for made in islice(
                cut_crops(part.pixels, self.number, self.size, self.image_channels, self.crops), self.most - self.count
            ):
                file.write(made.tobytes())
                self.heldout += [self.count] if one.split == "heldout" else []
                self.count += 1
            self.number += 1
