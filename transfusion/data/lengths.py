"""Lengths of documents without reading them, and how each is changed: caption or image first, parts dropped.

`prepare` writes `SIZES` of every document. With these numbers every process can pack all documents of a run, and read only
those of its own rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import numpy as np

from transfusion.config import DataConfig
from transfusion.data.raw import RawDocument, RawImage
from transfusion.seeding import uniforms_from
from transfusion.sequence import Document, Image, Text, Vocabulary, find_copied

SIZES = np.dtype([
    ("tokens", "<u4"),  # of all its texts
    ("area", "<u4"),  # Y x X of the latents of all its images
    ("checksum", "<u4"),  # of its content, see `shards.py`
    ("images", "<u2"),
    ("kind", "u1"),
    ("target", "u1"),  # of an edit: the shape of its last image, its number among the shapes of the source
    # Y x X of all latents that have a noisy copy with `data.clean_copies`: in the document, and with its images first
    ("copied", "<u4"), ("copied_first", "<u4"),
])  # fmt: skip
MAX_SHAPES = 2**8  # of a source
OTHER, ONE_PAIR, PAIRS, EDIT = range(4)  # kinds of documents: a caption-image pair, several pairs, edits, and all others
UNCHANGED, IMAGE_FIRST, WITHOUT_TEXT, TARGET_ONLY = range(4)  # changes of a document
CHANGES = np.array([  # of each kind: the first, the second, and none
    (UNCHANGED, UNCHANGED, UNCHANGED), (IMAGE_FIRST, WITHOUT_TEXT, UNCHANGED), (IMAGE_FIRST, UNCHANGED, UNCHANGED),
    (WITHOUT_TEXT, TARGET_ONLY, UNCHANGED),
], np.int8)  # fmt: skip


class Lengths(NamedTuple):
    """Positions of documents, with bos and eos: arrays (n,)."""

    kinds: np.ndarray
    images: np.ndarray  # number of images
    whole: np.ndarray  # positions of the unchanged document, or with its images first
    without_text: np.ndarray
    target_only: np.ndarray  # with nothing but its last image; of edits only
    copies: np.ndarray  # of the noisy copies that it has with `data.clean_copies`, with or without its text
    copies_image_first: np.ndarray  # the same with its images first; of pairs only

    def after(self, changes: np.ndarray, clean_copies: bool = False) -> np.ndarray:
        """Positions (n,) of the documents after these changes (n,)."""
        lengths = np.where(changes == WITHOUT_TEXT, self.without_text, self.whole)
        if clean_copies:
            lengths = lengths + np.where(changes == IMAGE_FIRST, self.copies_image_first, self.copies)
        return np.where(changes == TARGET_ONLY, self.target_only, lengths)


def lengths_of_sizes(sizes: np.ndarray, shapes: Sequence[tuple[int, int]], patch_size: int) -> Lengths:
    """From `SIZES` (n,). `shapes`: all latent shapes of the source, sorted; the sides are multiples of `patch_size`."""
    areas = np.array([height * width for height, width in shapes] or [0]) // patch_size**2
    images = sizes["images"].astype(np.int64)
    positions, copies, copies_first = (sizes[name] // patch_size**2 for name in ("area", "copied", "copied_first"))
    without_text = 2 + 2 * images + positions
    return Lengths(
        sizes["kind"], images, without_text + sizes["tokens"], without_text, 4 + areas[sizes["target"]], copies, copies_first
    )


def lengths_of_documents(documents: Iterable[Document], vocabulary: Vocabulary) -> Lengths:
    """The same from the documents themselves, for sources that are encoded while they are read."""
    rows = []
    for document in documents:
        tokens = sum(len(part.tokens) for part in document.segments if isinstance(part, Text))
        images = [vocabulary.num_patches(part.shape) + 2 for part in document.segments if isinstance(part, Image)]
        without_text = 2 + sum(images)
        copies = (sum(length - 2 for length in compress(images, copied)) for copied in find_copied_images(document))
        rows.append((kind_of(document), len(images), tokens + without_text, without_text, 2 + sum(images[-1:]), *copies))
    return Lengths(*np.array(rows, np.int64).reshape(-1, len(Lengths._fields)).T)


def sizes_of_segments(
    pairs: np.ndarray, offsets: np.ndarray, is_image: np.ndarray, loss: np.ndarray, max_t: np.ndarray, tokens: np.ndarray,
    height: np.ndarray, width: np.ndarray, checksums: np.ndarray, shapes: Sequence[tuple[int, int]],
) -> np.ndarray:  # fmt: skip
    """`SIZES` (n,) of documents from their segments. `offsets` (n + 1,): the segments of document i are those from
    offsets[i] to offsets[i + 1] - 1; `pairs` and `checksums` are (n,), the rest is of each segment."""
    begin, last = offsets[:-1], np.maximum(offsets[1:] - 1, 0)

    def total(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return sums[offsets[1:]] - sums[begin]

    count = offsets[1:] - begin
    sizes = np.empty(len(pairs), SIZES)
    sizes["checksum"] = checksums
    area = height.astype(np.int64) * width
    is_learnt = loss & (is_image | (tokens > 0))
    learnt = np.cumsum(is_learnt)  # segments, up to each one
    later = np.repeat(np.append(0, learnt)[offsets[1:]], count) - learnt  # learnt segments of the document after each one
    caption = np.append(False, is_learnt[:-1]) & np.repeat(pairs, count)  # follows an image that is put first
    copied, copied_first = (area * (loss & is_image & (max_t > 0) & (after > 0)) for after in (later, later + caption))
    for name, values in (
        ("tokens", tokens), ("area", area), ("images", is_image), ("copied", copied), ("copied_first", copied_first),
    ):  # fmt: skip
        totals, limit = total(values), np.iinfo(SIZES[name]).max
        if totals.max(initial=0) > limit:
            raise ValueError(f"a document has {totals.max():,} {name}, at most {limit:,} are supported: divide it")
        sizes[name] = totals
    if not len(is_image):  # no document has a segment
        sizes["kind"], sizes["target"] = OTHER, 0
        return sizes
    is_edit = ~pairs & (count > 0) & is_image[last] & loss[last] & (total(is_image & ~loss) > 0)
    sizes["kind"] = np.select([pairs & (count == 2), pairs, is_edit], [ONE_PAIR, PAIRS, EDIT], OTHER)
    numbers = {shape: number for number, shape in enumerate(shapes)}
    targets = zip(height[last[is_edit]].tolist(), width[last[is_edit]].tolist(), strict=True)
    sizes["target"] = 0
    sizes["target"][is_edit] = [numbers[shape] for shape in targets]
    return sizes


def kind_of(document: RawDocument | Document) -> int:
    """OTHER, ONE_PAIR, PAIRS or EDIT."""
    if document.pairs:
        return ONE_PAIR if len(document.segments) == 2 else PAIRS
    return EDIT if is_edit(document) else OTHER


def is_edit(document: RawDocument | Document) -> bool:
    """Whether its last segment is an image with loss, and an image without loss (a condition) is before it."""
    *conditions, target = document.segments or (None,)
    images = [part for part in conditions if isinstance(part, Image | RawImage)]
    return isinstance(target, Image | RawImage) and target.loss and any(not image.loss for image in images)


def choose_changes(keys: np.ndarray, kinds: np.ndarray, config: DataConfig) -> np.ndarray:
    """The change (n,) of each document, from its key.

    Caption-image pairs (section 4.1): in some documents the image is first, in others the caption is dropped, but only in
    documents of one pair. Edits: in some the text is dropped, in others all conditions (text and images), to train the
    branches of guidance.
    """
    image_first, without_text = config.image_first, config.condition_text_dropout
    caption_dropout = image_first + (1 - image_first) * config.caption_dropout
    first = np.array([0, image_first, image_first, without_text])  # of each kind: below it the first change,
    second = np.array([0, caption_dropout, 0, without_text + config.condition_dropout])  # else below it the second
    u = uniforms_from(keys, "change")
    return CHANGES[kinds, (u >= first[kinds]).view(np.int8) + (u >= np.maximum(first, second)[kinds])]


def change(document: Document, how: int, config: DataConfig) -> Document:
    """The document after one of the changes of its kind. An empty Text without loss follows an image without its caption or
    conditions, so that eos is no target: otherwise the model would be trained to end without a caption."""
    if how == UNCHANGED:
        return document
    if how == IMAGE_FIRST:
        max_t = 1.0 if config.clean_copies else config.image_first_max_t
        return replace(document, segments=tuple(
            replace(part, max_t=min(part.max_t, max_t)) if isinstance(part, Image) else part
            for part in put_images_first(document)
        ))  # fmt: skip
    *conditions, target = document.segments
    kept = [part for part in conditions if isinstance(part, Image)] if how == WITHOUT_TEXT else []
    return replace(document, segments=(*kept, target, Text((), loss=False)))


def find_copied_images(document: Document) -> tuple[list[bool], list[bool]]:
    """For each image of a document: has it a noisy copy with `data.clean_copies`, in this order and with images first?"""
    return tuple(
        [is_copied for part, is_copied in zip(segments, find_copied(segments), strict=True) if isinstance(part, Image)]
        for segments in (document.segments, put_images_first(document))
    )


def put_images_first(document: Document) -> tuple[Text | Image, ...]:
    """The segments with each image before its caption; those of a document that is no pairs as they are."""
    if not document.pairs:
        return document.segments
    captions, images = document.segments[::2], document.segments[1::2]
    return tuple(part for pair in zip(images, captions, strict=True) for part in pair)
