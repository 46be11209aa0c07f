"""A page that shows documents: texts, thumbnails, and which segments the loss includes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image as PILImage

from transfusion.chat import describe_layout
from transfusion.data.leaks import Leaks
from transfusion.data.raw import Fault, RawDocument, RawText
from transfusion.data.reading.account import Account, counted
from transfusion.data.reading.readers import Reader
from transfusion.data.store import DecodedSource, PreparedFolder
from transfusion.page import Page

MAX_SIDE = 256  # pixels of a thumbnail; small images are enlarged by whole factors
DISPLAY_WIDTH = 128  # of a thumbnail on the page
MAX_CHARS = 1_200  # of a text that are shown
UNIT_SIZE = 256  # records read at a time


def show_source(page: Page, reader: Reader, count: int) -> Account:
    """Add the first records of a source to the page: documents and faults. Returns the account of what is read."""
    page.heading(reader.name)
    account = Account()
    documents = (document for unit in reader.units(UNIT_SIZE) for document in reader.read(unit, account))
    first = [document if isinstance(document, Fault) else _shrink_images(document) for document in islice(documents, count)]
    reader.close_account(account)
    if rest := account.tallies["records"].unexplained:
        account.pass_over("records", f"after the first {len(first):,}", count=rest)
    page.paragraph(f"The first {counted(len(first), 'record')} of `{reader.address}`. {reader.describe()}.")
    page.fold("What is read, and what is not", "\n".join(account.lines()) or "Everything is read.")
    _show(page, first)
    return account


def show_prepared(page: Page, prepared: PreparedFolder, count: int) -> None:
    """Add evenly spaced documents of a prepared folder, as the model gets them: decoded from ids and latents."""
    page.paragraph("; ".join(Leaks(**prepared.metadata["leaks"]).lines()) + ".")
    for name in prepared.names:
        info = prepared.metadata["sources"][name]
        source = DecodedSource(prepared.source(name, "train"))
        indices = [n * len(source) // min(count, len(source)) for n in range(min(count, len(source)))]
        page.heading(name)
        num_faults = sum(info["faults"].values())
        page.paragraph(
            f"{len(indices)} of {counted(len(source), 'training document')}, evenly spaced; held out: "
            f"{info['documents']['heldout']:,}; left out: {num_faults:,} of {counted(info['records'], 'record')}. "
            "Images are decoded by the codec."
        )
        if layout := prepared.chat_layout([name]):
            page.paragraph(f"Chat layout: {describe_layout(layout)}. Its special tokens are not shown below.")
        _show(page, [_shrink_images(source[n]) for n in indices])


@dataclass(frozen=True)
class Thumbnail:
    """A reduced image, and the original size as text."""

    pixels: np.ndarray
    size: str
    loss: bool
    max_t: float


def _shrink_images(document: RawDocument) -> RawDocument:
    """The document with thumbnails instead of images: many photographs at once would not fit into memory."""
    return replace(document, segments=tuple(
        part if isinstance(part, RawText)
        else Thumbnail(thumbnail(part.pixels), "{1} x {0}".format(*part.pixels.shape), part.loss, part.max_t)
        for part in document.segments
    ))  # fmt: skip


def _show(page: Page, documents: Sequence[RawDocument | Fault]) -> None:
    if any(isinstance(document, RawDocument) and document.pairs for document in documents):
        page.paragraph("In some epochs a pair is read with its image first, or without its caption.", muted=True)
    for document in documents:
        if isinstance(document, Fault):
            page.paragraph(f"`{document.where}` cannot be used, {document.kind}: {document.message}")
            continue
        page.paragraph(f"`{document.where}`{', a pair' if document.pairs else ''}", muted=True)
        parts: list[tuple[str | np.ndarray, str]] = []
        for part in document.segments:
            loss = "in the loss" if part.loss else "not in the loss"
            if isinstance(part, RawText):
                rest = len(part.text) - MAX_CHARS
                text = part.text[:MAX_CHARS] + (f" ... and {counted(rest, 'more character')}" if rest > 0 else "")
                parts.append((text, f"text, {loss}"))
            else:
                no_noise = ", without noise" if part.max_t == 0 else ""
                parts.append((part.pixels, f"{part.size}, {loss}{no_noise}"))
        page.passage(parts, DISPLAY_WIDTH)


def thumbnail(pixels: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """The image (Y, X, 1 | 3) uint8 with its longer side at most `max_side`; much smaller ones are enlarged."""
    longest = max(pixels.shape[:2])
    if longest * 2 <= max_side:
        factor = max_side // longest
        return np.repeat(np.repeat(pixels, factor, 0), factor, 1)
    if longest <= max_side:
        return pixels
    image = PILImage.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((max_side, max_side))
    return np.asarray(image).reshape(image.height, image.width, -1)
