"""Pictures of one size in one file, for training a codec: read once, then mapped, any of them at once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from transfusion.codecs.pictures import to_pixels
from transfusion.data.raw import Fault, RawImage
from transfusion.data.reading.readers import Reader
from transfusion.disk import read_json, write_json

UNIT = 512  # records read between two reports of progress


def gather_pictures(
    readers: Sequence[Reader], size: tuple[int, int], colours: int, most: int, folder: Path,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """(n, Y, X, colours) uint8, mapped from the folder's `pictures.u8`, and how many records could not be read.

    At most `most` pictures, each cut to size (width, height). A folder that holds them already is not read anew; ValueError
    when it holds others.
    """
    width, height = size
    sources = [{"options": asdict(reader.options), "files": reader.fingerprint()} for reader in readers]
    recipe = json.loads(json.dumps({"sources": sources, "size": size, "colours": colours, "most": most}))
    path = folder / "pictures.json"
    if not path.exists():
        count, faults = _write(readers, size, colours, most, folder / "pictures.u8", tick)
        if not count:
            raise ValueError(f"{', '.join(reader.address for reader in readers)}: no picture in them could be read")
        write_json(path, {"recipe": recipe, "count": count, "faults": faults})
    found = read_json(path)
    if found.get("recipe") != recipe:
        raise ValueError(f"{folder} was begun with other pictures: give another --out")
    pictures = np.memmap(folder / "pictures.u8", np.uint8, "r", shape=(found["count"], height, width, colours))
    return pictures, found["faults"]


def _write(
    readers: Sequence[Reader], size: tuple[int, int], colours: int, most: int, path: Path, tick: Callable[[int, int], None]
) -> tuple[int, int]:
    count = faults = 0
    with path.open("wb") as file:
        for reader in readers:
            units = reader.units(UNIT)
            total = min(most, sum(unit.rows for unit in units))
            for one in (one for unit in units for one in reader.read(unit)):
                faults += isinstance(one, Fault)
                for part in () if isinstance(one, Fault) else one.segments:
                    if isinstance(part, RawImage) and count < most:
                        file.write(to_pixels(part.pixels, [size], colours).tobytes())
                        count += 1
                tick(min(count, total), total)
                if count == most:
                    return count, faults
    return count, faults
