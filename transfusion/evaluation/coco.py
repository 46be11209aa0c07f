"""COCO's captions, several per image. The paper measures captions on Karpathy's test split of COCO, 5,000 images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps

from transfusion.data.raw import Fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.images import RecordImageReader
from transfusion.disk import OpenError, read_json
from transfusion.seeding import derive_seed

SPLIT = "test"  # in Karpathy's file


@dataclass(frozen=True)
class CaptionedImage:
    """An image's path as the file names it, and its reference captions."""

    path: str
    references: tuple[str, ...]


def read_coco(path: Path, count: int, seed: int = 0) -> list[CaptionedImage]:
    """At most `count` random images of Karpathy's `dataset_coco.json` (its test split) or of COCO's own annotations, in the
    order of the file. OpenError if the file is neither, or has no image with a caption."""
    values = read_json(path)
    try:
        images = _from_karpathy(values) if "annotations" not in values else _from_annotations(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{path} is neither Karpathy's dataset_coco.json nor COCO's annotations: {error!r}") from None
    if not images:
        raise OpenError(f"{path} has no image with a caption in its split {SPLIT!r}")
    chosen = np.random.default_rng(derive_seed("coco", seed)).permutation(len(images))[:count]
    return [images[n] for n in sorted(chosen)]


def read_images(captioned: Sequence[CaptionedImage], path: Path, folder: str | None) -> Iterator[np.ndarray]:
    """The images, each (Y, X, 1 or 3) uint8. OpenError names the first that is missing or damaged.

    `folder`: the base of relative paths; None: the folder of the file `path`.
    """
    reader = RecordImageReader.of(Files.from_address(str(path), folder), str(path.resolve()))
    for image in captioned:
        try:
            yield reader.read(image.path)
        except Fault as fault:
            raise OpenError(f"{path}: {fault.message}") from None


def check_images(captioned: Sequence[CaptionedImage], path: Path, folder: str | None) -> None:
    """OpenError names the first image that is missing."""
    reader = RecordImageReader.of(Files.from_address(str(path), folder), str(path.resolve()))
    for image in captioned:
        if not reader.exists(image.path):
            raise OpenError(f"{path}: there is no image {image.path}")


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of an image (Y, X, 1 or 3), cropped and resized to `size` (width, height): (Y, X, 3) uint8."""
    rgb = Picture.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
    return np.asarray(ImageOps.fit(rgb, size, Picture.Resampling.LANCZOS))


def _from_karpathy(values: dict) -> list[CaptionedImage]:
    """Paths as in the file: val2014/COCO_val2014_000000391895.jpg."""
    return [
        CaptionedImage("/".join(filter(None, (image.get("filepath"), image["filename"]))),
                       tuple(sentence["raw"] for sentence in image["sentences"]))
        for image in values["images"] if image["split"] == SPLIT and image["sentences"]
    ]  # fmt: skip


def _from_annotations(values: dict) -> list[CaptionedImage]:
    """The captions grouped by image, in the order of the images."""
    captions: dict[int, list[str]] = {}
    for annotation in values["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    images = [image for image in values["images"] if image["id"] in captions]
    return [CaptionedImage(image["file_name"], tuple(captions[image["id"]])) for image in images]
