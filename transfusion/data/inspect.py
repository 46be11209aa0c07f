"""Documents as a person sees them: a page with their texts, thumbnails, and what of them is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image as Picture

from transfusion.data.raw import Fault, RawDocument, RawText
from transfusion.data.reading.readers import Reader
from transfusion.data.store import DecodedSource, Prepared
from transfusion.page import Page

SIDE = 256  # pixels of a thumbnail, at most; small pictures are enlarged in whole pixels
WIDTH = 128  # of a thumbnail on the page
LETTERS = 1_200  # of a text that are shown
UNIT = 256  # records read at a time


def show_source(page: Page, reader: Reader, count: int) -> None:
    """The first records of a source: documents and faults."""
    page.heading(reader.name)
    reading = (one for unit in reader.units(UNIT) for one in reader.read(unit))
    first = [one if isinstance(one, Fault) else _small(one) for one in islice(reading, count)]
    page.say(f"The first {len(first)} records of `{reader.address}`. {reader.describe()}.")
    _show(page, first)


def show_prepared(page: Page, prepared: Prepared, count: int) -> None:
    """Documents of a prepared folder, evenly spread, as the model gets them: text from its ids, pictures from latents."""
    for name in prepared.names:
        about = prepared.about["sources"][name]
        stored = DecodedSource(prepared.source(name, "train"))
        chosen = [n * len(stored) // min(count, len(stored)) for n in range(min(count, len(stored)))]
        page.heading(name)
        left_out = sum(about["faults"].values())
        page.say(
            f"{len(chosen)} of {len(stored):,} training documents, evenly spread. {about['documents']['heldout']:,} more "
            f"are held out, {left_out:,} of {about['records']:,} records were left out. Pictures went through the codec."
        )
        _show(page, [_small(stored[n]) for n in chosen])


@dataclass(frozen=True)
class Thumbnail:
    """A picture as it is shown, and the size that it has."""

    pixels: np.ndarray
    size: str
    loss: bool
    max_t: float


def _small(document: RawDocument) -> RawDocument:
    """The document with thumbnails in place of pictures: many photographs at once would not fit into memory."""
    return replace(document, segments=tuple(
        part if isinstance(part, RawText)
        else Thumbnail(thumbnail(part.pixels), "{1} x {0}".format(*part.pixels.shape), part.loss, part.max_t)
        for part in document.segments
    ))  # fmt: skip


def _show(page: Page, found: Sequence[RawDocument | Fault]) -> None:
    if any(isinstance(one, RawDocument) and one.pairs for one in found):
        page.say("In a pair, caption and picture change places in some epochs; in some the caption is left out.", quiet=True)
    for one in found:
        if isinstance(one, Fault):
            page.say(f"`{one.where}` cannot be used, {one.kind}: {one.message}")
            continue
        page.say(f"`{one.where}`{', a pair' if one.pairs else ''}", quiet=True)
        parts: list[tuple[str | np.ndarray, str]] = []
        for part in one.segments:
            learnt = "learnt" if part.loss else "not learnt"
            if isinstance(part, RawText):
                rest = len(part.text) - LETTERS
                text = part.text[:LETTERS] + (f" ... and {rest:,} letters more" if rest > 0 else "")
                parts.append((text, f"text, {learnt}"))
            else:
                clean = ", always clean" if part.max_t == 0 else ""
                parts.append((part.pixels, f"{part.size}, {learnt}{clean}"))
        page.passage(parts, WIDTH)


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The picture (Y, X, 1 | 3) uint8 with its longer side at most `side`; much smaller ones enlarged."""
    longest = max(pixels.shape[:2])
    if longest * 2 <= side:
        zoom = side // longest
        return np.repeat(np.repeat(pixels, zoom, 0), zoom, 1)
    if longest <= side:
        return pixels
    picture = Picture.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((side, side))
    return np.asarray(picture).reshape(picture.height, picture.width, -1)
