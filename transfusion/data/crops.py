"""Pictures of one size in one file, for training a codec: read once, then mapped, any of them at once."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from transfusion.chance import seed_from
from transfusion.codecs.pictures import to_pixels
from transfusion.data.raw import Fault, RawImage
from transfusion.data.reading.readers import Reader
from transfusion.disk import read_json, write_json

UNIT = 512  # records read between two reports of progress


def gather_pictures(
    readers: Sequence[Reader], size: tuple[int, int], colours: int, most: int, folder: Path,
    tick: Callable[[int, int], None] = lambda done, total: None, crops: int = 0,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """(n, Y, X, colours) uint8, mapped from the folder's `pictures.u8`, and how many records could not be read.

    At most `most` pictures, each cut to size (width, height), or so many crops of each. A folder that holds them already
    is not read anew; ValueError when it holds others.
    """
    width, height = size
    sources = [{"options": asdict(reader.options), "files": reader.fingerprint()} for reader in readers]
    built_in = [reader.address for reader in readers if reader.files is None]
    recipe = {"sources": sources, "built_in": built_in, "size": size, "colours": colours, "most": most, "crops": crops}
    path = folder / "pictures.json"
    if not path.exists():
        count, faults = _write(readers, size, colours, most, crops, folder / "pictures.u8", tick)
        if not count:
            raise ValueError(f"{', '.join(reader.address for reader in readers)}: no picture in them could be read")
        write_json(path, {"recipe": recipe, "count": count, "faults": faults})
    found = read_json(path)
    before = {"built_in": built_in, "crops": 0, **found.get("recipe", {})}  # neither was written down once
    if before != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} was begun with other pictures: give another --out")
    pictures = np.memmap(folder / "pictures.u8", np.uint8, "r", shape=(found["count"], height, width, colours))
    return pictures, found["faults"]


def cut(pixels: np.ndarray, number: int, size: tuple[int, int], colours: int, crops: int) -> Iterator[np.ndarray]:
    """Picture `number`, (Y, X, 1 | 3) uint8, as pictures (height, width, colours) uint8, never flipped.

    Crops are windows anywhere in it, of any scale from its own pixels to the largest window that fits, each doubling as
    likely as any other: all chance from the numbers of picture and crop. Without crops, or when it is smaller than `size`,
    it is the whole picture, its short side resized and the middle cut out.
    """
    largest = min(pixels.shape[0] / size[1], pixels.shape[1] / size[0])
    if not crops or largest < 1:
        yield to_pixels(pixels, [size], colours)
        return
    for crop in range(crops):
        chance = np.random.default_rng(seed_from("crop", number, crop))
        scale = largest ** chance.random()
        width, height = (round(side * scale) for side in size)
        x, y = (int(chance.integers(room + 1)) for room in (pixels.shape[1] - width, pixels.shape[0] - height))
        yield to_pixels(pixels[y : y + height, x : x + width], [size], colours)


def _write(
    readers: Sequence[Reader], size: tuple[int, int], colours: int, most: int, crops: int, path: Path,
    tick: Callable[[int, int], None],
) -> tuple[int, int]:  # fmt: skip
    count = number = faults = 0
    with path.open("wb") as file:
        for reader in readers:
            units = reader.units(UNIT)
            total = min(most, max(crops, 1) * sum(unit.rows for unit in units))
            for one in (one for unit in units for one in reader.read(unit)):
                faults += isinstance(one, Fault)
                for part in () if isinstance(one, Fault) else one.segments:
                    if isinstance(part, RawImage):
                        for made in islice(cut(part.pixels, number, size, colours, crops), most - count):
                            file.write(made.tobytes())
                            count += 1
                        number += 1
                tick(min(count, total), total)
                if count == most:
                    return count, faults
    return count, faults
