"""COCO's captions, several to a picture: the paper measures captions on Karpathy's test split of it, 5,000 pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps

from transfusion.data.raw import Fault
from transfusion.data.reading.files import Files
from transfusion.disk import OpenError, read_json
from transfusion.seeding import derive_seed

SPLIT = "test"  # of Karpathy's file


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture's path beside the file that names it, and what people said of it."""

    path: str
    references: tuple[str, ...]


def read_coco(path: Path, count: int, seed: int = 0) -> list[CaptionedPicture]:
    """At most `count` pictures of Karpathy's `dataset_coco.json` (its test split), or of COCO's own annotations: at random,
    in the order of the file.

    OpenError when the file is neither, or holds no picture with a caption.
    """
    values = read_json(path)
    try:
        found = _karpathy(values) if "annotations" not in values else _annotations(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{path} is neither Karpathy's dataset_coco.json nor COCO's annotations: {error!r}") from None
    if not found:
        raise OpenError(f"{path} holds no picture with a caption in its split {SPLIT!r}")
    chosen = np.random.default_rng(derive_seed("coco", seed)).permutation(len(found))[:count]
    return [found[n] for n in sorted(chosen)]


def read_pictures(captioned: Sequence[CaptionedPicture], path: Path, pictures: str | None) -> Iterator[np.ndarray]:
    """(Y, X, 1 or 3) uint8 of each, one after the other. OpenError names the first that is not there.

    `pictures`: the folder from which paths count, if not that of the file.
    """
    images = Files.from_address(str(path), pictures).image_reader(str(path.resolve()))
    for one in captioned:
        try:
            yield images.read(one.path)
        except Fault as fault:
            raise OpenError(f"{path}: {fault.message}") from None


def find_missing(captioned: Sequence[CaptionedPicture], path: Path, pictures: str | None) -> None:
    """OpenError names the first picture that is not there."""
    images = Files.from_address(str(path), pictures).image_reader(str(path.resolve()))
    for one in captioned:
        if not images.exists(one.path):
            raise OpenError(f"{path}: there is no picture {one.path}")


def middle(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture (Y, X, 1 or 3), of the shape of this (width, height) and resized to it: (Y, X, 3) uint8."""
    coloured = Picture.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
    return np.asarray(ImageOps.fit(coloured, size, Picture.Resampling.LANCZOS))


def _karpathy(values: dict) -> list[CaptionedPicture]:
    """Paths as he lists them: val2014/COCO_val2014_000000391895.jpg."""
    return [
        CaptionedPicture("/".join(filter(None, (one.get("filepath"), one["filename"]))),
                         tuple(s["raw"] for s in one["sentences"]))
        for one in values["images"] if one["split"] == SPLIT and one["sentences"]
    ]  # fmt: skip


def _annotations(values: dict) -> list[CaptionedPicture]:
    """Those of one picture together, in the order of the pictures."""
    said: dict[int, list[str]] = {}
    for one in values["annotations"]:
        said.setdefault(one["image_id"], []).append(one["caption"])
    return [CaptionedPicture(one["file_name"], tuple(said[one["id"]])) for one in values["images"] if one["id"] in said]
