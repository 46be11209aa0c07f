"""Images of one size in one file, for training a codec: read once, then memory-mapped for random access."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transfusion.codecs.pictures import to_pixels
from transfusion.data.heldout import MAX_FRACTION, hash_pixels, limit_of
from transfusion.data.raw import Fault, RawDocument, RawImage
from transfusion.data.reading.readers import Reader
from transfusion.data.store import SPLITS
from transfusion.disk import read_json, write_json
from transfusion.seeding import derive_seed

UNIT_SIZE = 512  # records read between two reports of progress


@dataclass(frozen=True)
class GatheredImages:
    """Memory-mapped images (n, Y, X, channels) uint8, the indices of held-out ones, and the number of faulty records."""

    images: np.ndarray
    heldout: tuple[int, ...]
    faults: int


def gather_images(
    readers: Sequence[Reader], size: tuple[int, int], image_channels: int, max_images: int, folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None, crops: int = 0,
    on_fault: Callable[[Fault], None] = lambda fault: None,
) -> GatheredImages:  # fmt: skip
    """All different images of some sources, at most `max_images`, in the folder's `pictures.u8`. Each is cut to size (width,
    height), or `crops` random crops are taken of it. When there are too many, records are skipped evenly. Images are held
    out as the source declares, or by the same hashes as in `prepare` with this size. Each fault is passed to `on_fault`. A
    folder with the images is not read again; ValueError when it was made with other settings."""
    width, height = size
    sources = [{"options": asdict(reader.options), "files": reader.fingerprint()} for reader in readers]
    built_in = [reader.address for reader in readers if reader.files is None]
    recipe = {"sources": sources, "built_in": built_in, "size": size, "image_channels": image_channels,
              "most": max_images, "crops": crops}  # fmt: skip
    path = folder / "pictures.json"
    if not path.exists():
        writer = _ImageWriter(size, image_channels, max_images, crops, on_fault)
        with (folder / "pictures.u8").open("wb") as file:
            writer.write(readers, file, on_progress)
        if not writer.count:
            raise ValueError(f"{', '.join(reader.address for reader in readers)}: no image could be read")
        counts = {"count": writer.count, "faults": writer.faults, "heldout": sorted(writer.heldout)}
        write_json(path, {"recipe": recipe, **counts})
    info = read_json(path)
    if info.get("recipe") != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} was started with other images or settings: choose another --out")
    try:
        images = np.memmap(folder / "pictures.u8", np.uint8, "r", shape=(info["count"], height, width, image_channels))
    except (OSError, ValueError):
        raise ValueError(f"{folder / 'pictures.u8'} is missing or truncated: delete {path} to read them again") from None
    return GatheredImages(images, tuple(info["heldout"]), info["faults"])


def cut_crops(
    pixels: np.ndarray, number: int, size: tuple[int, int], image_channels: int, crops: int
) -> Iterator[np.ndarray]:
    """Crops of image `number`, (Y, X, 1 | 3) uint8, each (height, width, channels) uint8, never flipped.

    A crop is a random window, resized to `size` (width, height). Its scale is log-uniform between 1 and that of the
    largest window that fits; the seed is (number, crop). With crops = 0, or for an image smaller than `size`, the only
    result is the whole image: short side resized, centre cut out.
    """
    max_scale = min(pixels.shape[0] / size[1], pixels.shape[1] / size[0])
    if not crops or max_scale < 1:
        yield to_pixels(pixels, [size], image_channels)
        return
    for crop in range(crops):
        rng = np.random.default_rng(derive_seed("crop", number, crop))
        scale = max_scale ** rng.random()
        width, height = (round(side * scale) for side in size)
        x, y = (int(rng.integers(room + 1)) for room in (pixels.shape[1] - width, pixels.shape[0] - height))
        yield to_pixels(pixels[y : y + height, x : x + width], [size], image_channels)


class _ImageWriter:
    """Writes images or crops of readers to a file, each different image once."""

    def __init__(self, size: tuple[int, int], channels: int, max_images: int, crops: int, on_fault: Callable[[Fault], None]):
        self.size, self.channels, self.max_images, self.crops, self.on_fault = size, channels, max_images, crops, on_fault
        self.count = self.number = self.faults = 0
        self.heldout: set[int] = set()
        self.seen: dict[bytes, range] = {}  # digest of an image -> its crops: one with several captions is written once

    def write(self, readers: Sequence[Reader], file: BinaryIO, on_progress: Callable[[int, int], None]) -> None:
        units = [(reader, unit) for reader in readers for unit in reader.units(UNIT_SIZE)]
        records = sum(unit.rows for _, unit in units)
        self.crops = min(self.crops, max(1, self.max_images // records))
        num_units = min(len(units), -(-self.max_images * len(units) // (max(self.crops, 1) * records)))
        selected = np.unique(np.linspace(0, len(units) - 1, num_units).round().astype(int))
        selected = [len(units) // 2] if num_units == 1 else selected  # the first may be held out
        for done, n in enumerate(selected):
            reader, unit = units[n]
            for document in reader.read(unit):
                self._add(document, file)
                if self.count >= self.max_images:
                    return
            on_progress(done + 1, len(selected))

    def _add(self, document: RawDocument | Fault, file: BinaryIO) -> None:
        if isinstance(document, Fault):
            self.faults += 1
            self.on_fault(document)
            return
        for part in document.segments:
            if not isinstance(part, RawImage):
                continue
            digest = hashlib.sha256(np.asarray(part.pixels).tobytes()).digest()
            if digest in self.seen:
                if document.split == "heldout":  # also where it is a training image
                    self.heldout.update(self.seen[digest])
                continue
            first = self.count
            whole = to_pixels(part.pixels, [self.size], self.channels)
            split = document.split or SPLITS[hash_pixels(whole) < limit_of(MAX_FRACTION)]
            images = cut_crops(part.pixels, self.number, self.size, self.channels, self.crops) if self.crops else [whole]
            for image in islice(images, self.max_images - self.count):
                file.write(image.tobytes())
                self.count += 1
            self.seen[digest] = range(first, self.count)
            self.heldout.update(self.seen[digest] if split == "heldout" else ())
            self.number += 1
