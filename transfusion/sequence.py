"""How text and images form one sequence. Only this file defines the positions of a segment.

Shapes, in all files: **B** rows, **L** positions, **D** width, **H** heads, **V** vocabulary, **N** images in the batch,
**P** patches per image, **C, Y, X** a latent's channels, height and width. Training packs with this file and inference
prefills with it, so the two cannot disagree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion.seeding import derive_seed

NO_TARGET = -1
NO_IMAGE = -1


@dataclass(frozen=True)
class Text:
    """Token ids. `loss`: are they targets of the next-token loss?"""

    tokens: tuple[int, ...]
    loss: bool = True


@dataclass(frozen=True)
class Image:
    """One image from a codec: a normalised latent (C, Y, X), float32, or a grid of codes (Y, X), integers.

    `max_t` limits the noise of a latent in training: 1, or 0.5 (the noise limit of Table 8), or 0: the image is a condition
    for what follows, always with t = 0 (no noise) and without denoising loss. Codes have no noise.
    """

    content: np.ndarray
    loss: bool = True
    max_t: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the content (Y, X)."""
        return self.content.shape[-2:]

    @property
    def is_codes(self) -> bool:
        return self.content.ndim == 2

    @property
    def is_denoised(self) -> bool:
        """Whether it has a denoising loss."""
        return self.loss and self.max_t > 0 and not self.is_codes


@dataclass(frozen=True)
class Document:
    """An ordered list of segments. `key` seeds t and noise of its images; `source` and `id` name it."""

    segments: tuple[Text | Image, ...]
    id: int = 0
    source: str = ""
    key: int = 0
    pairs: bool = False  # alternating captions and images; it may only be split between two pairs


@dataclass(frozen=True)
class Vocabulary:
    """The meaning of each token id: the tokenizer's ids, the markers, image codes, then padding to a multiple of 128."""

    num_text_tokens: int  # ids 0 .. num_text_tokens - 1 are the tokenizer's
    bos: int
    eos: int
    pad: int
    eoi: int
    boi: dict[tuple[int, int], int]  # one per latent shape (Y, X)
    patch_size: int
    num_image_codes: int = 0  # of the codec, where images are grids of codes; 0: images are latents
    other_eos_ids: tuple[int, ...] = ()  # of the tokenizer: these end an answer too, for example a turn of a chat

    @classmethod
    def build(
        cls, num_text_tokens: int, shapes: Sequence[tuple[int, int]], patch_size: int, num_image_codes: int = 0,
        bos: int | None = None, eos: int | None = None, pad: int | None = None, other_eos_ids: Sequence[int] = (),
    ) -> "Vocabulary":  # fmt: skip
        """Reuse the tokenizer's bos, eos and pad where it has them; the missing ones, eoi and the bois follow its ids."""
        new_ids = count(num_text_tokens)
        bos, eos, pad = (next(new_ids) if id_ is None else id_ for id_ in (bos, eos, pad))
        eoi, boi = next(new_ids), {tuple(shape): next(new_ids) for shape in shapes}
        return cls(num_text_tokens, bos, eos, pad, eoi, boi, patch_size, num_image_codes, tuple(other_eos_ids))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer. Documents end with the first, `eos`."""
        return (self.eos, *self.other_eos_ids)

    @property
    def tokenizer_markers(self) -> dict:
        """The arguments of `build` that are ids of the tokenizer."""
        ids = {name: getattr(self, name) for name in ("bos", "eos", "pad")}
        own = {name: id_ for name, id_ in ids.items() if id_ < self.num_text_tokens}
        return own | ({"other_eos_ids": [*self.other_eos_ids]} if self.other_eos_ids else {})

    @property
    def first_code(self) -> int:
        """The id of the codec's code 0; the other codes follow."""
        return max(self.num_text_tokens - 1, self.bos, self.eos, self.pad, self.eoi, *self.boi.values()) + 1

    @property
    def text_size(self) -> int:
        """Number of ids that text has: the tokenizer's, bos, eos and pad. Those from eoi on are of images."""
        return self.eoi

    @property
    def num_used(self) -> int:
        """Number of ids with a meaning, 0 .. num_used - 1."""
        return self.first_code + self.num_image_codes

    @property
    def size(self) -> int:
        """Rows of the embedding: `num_used`, rounded up to a multiple of 128."""
        return -(-self.num_used // 128) * 128

    def shape_of(self, boi: int) -> tuple[int, int] | None:
        """The latent shape of this boi; None for any other id."""
        return next((shape for shape, id_ in self.boi.items() if id_ == boi), None)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of an image of this latent shape."""
        return shape[0] // self.patch_size, shape[1] // self.patch_size

    def num_patches(self, shape: tuple[int, int]) -> int:
        """P: positions of an image of this latent shape, without boi and eoi."""
        rows, columns = self.grid(shape)
        return rows * columns

    def to_json(self) -> dict:
        sizes = {f"{y}x{x}": id_ for (y, x), id_ in self.boi.items()}
        return {**self.__dict__, "boi": sizes}

    @classmethod
    def from_json(cls, values: dict):
        sizes = {tuple(map(int, name.split("x"))): id_ for name, id_ in values["boi"].items()}
        return cls(**{**values, "boi": sizes, "other_eos_ids": tuple(values.get("other_eos_ids", ()))})


@dataclass(frozen=True)
class PlacedImage:
    """A latent and the position of its first patch (in a document, a chunk or a row)."""

    image: Image
    start: int
    key: int  # seed of its t and noise
    num_patches: int


@dataclass(frozen=True)
class Chunk:
    """A document as positions, or a part of one that is longer than a row."""

    tokens: np.ndarray  # (n,) int64; pad at patches
    targets: np.ndarray  # (n,) int64; NO_TARGET where there is no text loss
    images: tuple[PlacedImage, ...]
    can_break: np.ndarray  # (n,) bool: may a new chunk begin here?
    grid_offsets: np.ndarray  # (n, 2) int32, of patches and codes as in `grid_offsets`; 0 elsewhere
    source: str = ""  # of the document
    id: int = 0
    copies: tuple[PlacedImage, ...] = ()  # noisy copies of images that are clean in `images`, at the same start

    def __len__(self) -> int:
        """Positions that it takes in a row: n, and behind them the noisy copies, which `collate` places."""
        return len(self.tokens) + sum(copy.num_patches for copy in self.copies)

    def part(self, begin: int, end: int | None = None) -> "Chunk":
        """Positions begin .. end - 1 as a chunk, with the images that start there and their copies."""
        end = len(self.tokens) if end is None else end
        images, copies = (
            tuple(replace(i, start=i.start - begin) for i in placed if begin <= i.start < end)
            for placed in (self.images, self.copies)
        )
        span = slice(begin, end)
        return replace(
            self, tokens=self.tokens[span], targets=self.targets[span], images=images, can_break=self.can_break[span],
            copies=copies, grid_offsets=self.grid_offsets[span],
        )  # fmt: skip

    def append(self, token: int, grid_offset: Sequence[int] = (0, 0)) -> "Chunk":
        """With one more token, without loss; `grid_offset` (2,) of a code."""
        return replace(
            self, tokens=np.append(self.tokens, token), targets=np.append(self.targets, NO_TARGET),
            can_break=np.append(self.can_break, False), grid_offsets=np.append(self.grid_offsets, [grid_offset], 0),
        )  # fmt: skip


EMPTY_CHUNK = Chunk(np.empty(0, np.int64), np.empty(0, np.int64), (), np.empty(0, bool), np.empty((0, 2), np.int32))


@cache
def grid_offsets(rows: int, columns: int) -> np.ndarray:
    """(P, 2) int32: what is added to the position of each patch for its position by row, and by column. Patch (r, c) of an
    image whose first patch has position p turns by p + r and p + c (`model.image_rope` 2d)."""
    patch = np.arange(rows * columns, dtype=np.int32)
    return np.stack([patch // columns - patch, patch % columns - patch], 1)


class Span(NamedTuple):
    """The positions of one segment."""

    tokens: list[int]
    loss_mask: list[bool]  # has the token next-token loss, as a target?


def encode_document(
    document: Document, vocabulary: Vocabulary, add_eos: bool = True, clean_copies: bool = False
) -> Chunk:
    """bos, text, boi, patches, eoi, text, ..., eos: the document as positions.

    A position has text loss iff the next position holds a token of a segment with loss that is not eoi. This covers boi to
    patch, patch to eoi, and the end. Codes are tokens instead of patches (Chameleon, 2405.09818). `add_eos=False`
    omits eos (a prompt). `clean_copies`: what follows an image sees it clean, and its denoising loss is on a noisy copy.
    """
    tokens, loss_mask, images, copies, grids = [vocabulary.bos], [False], [], [], []
    contexts = find_contexts(document.segments) if clean_copies else [False] * len(document.segments)
    for segment, is_context in zip(document.segments, contexts, strict=True):
        if isinstance(segment, Text):
            span = Span(list(segment.tokens), [segment.loss] * len(segment.tokens))
        else:
            span = _image_span(segment, vocabulary)
            grids.append((len(tokens) + 1, grid_offsets(*vocabulary.grid(segment.shape))))
            if not segment.is_codes:
                key = derive_seed(document.key, len(images))
                placed = PlacedImage(segment, len(tokens) + 1, key, vocabulary.num_patches(segment.shape))
                if is_context and segment.is_denoised:
                    copies.append(placed)
                images.append(replace(placed, image=replace(segment, max_t=0.0)) if is_context else placed)
        tokens += span.tokens
        loss_mask += span.loss_mask
    if add_eos:
        tokens.append(vocabulary.eos)
        loss_mask.append(not document.segments or document.segments[-1].loss)
    ids = np.array(tokens, dtype=np.int64)
    targets = np.full(len(ids), NO_TARGET, dtype=np.int64)
    targets[:-1] = np.where(loss_mask[1:], ids[1:], NO_TARGET)
    can_break = find_breaks(document, vocabulary)[: len(ids)]
    offsets = np.zeros((len(ids), 2), np.int32)
    for start, grid in grids:
        offsets[start : start + len(grid)] = grid
    return Chunk(ids, targets, tuple(images), can_break, offsets, document.source, document.id, tuple(copies))


def _image_span(image: Image, vocabulary: Vocabulary) -> Span:
    n = vocabulary.num_patches(image.shape)
    if image.is_codes:
        patches = (vocabulary.first_code + image.content.ravel()).tolist()  # row by row
    else:
        patches = [vocabulary.pad] * n
    return Span(
        [vocabulary.boi[image.shape], *patches, vocabulary.eoi],
        [image.loss, *[image.loss and image.is_codes] * n, False],
    )


def find_contexts(segments: Sequence[Text | Image]) -> list[bool]:
    """For each segment: is something learnt after it, a token or an image? eos alone does not count: it would double every
    image after its caption."""
    contexts, is_context = [], False
    for segment in reversed(segments):
        contexts.append(is_context)
        is_context |= segment.loss and (isinstance(segment, Image) or bool(segment.tokens))
    return contexts[::-1]


def find_copied(segments: Sequence[Text | Image]) -> list[bool]:
    """For each segment: is it an image with a noisy copy, if there are clean copies?"""
    return [
        is_context and isinstance(segment, Image) and segment.is_denoised
        for segment, is_context in zip(segments, find_contexts(segments), strict=True)
    ]


def find_breaks(document: Document, vocabulary: Vocabulary) -> np.ndarray:
    """(n,) bool: may a new chunk begin at this position of the document? At any token of a text, and at the first position
    of an image. But a pair may only be split before the first position of its first segment, or of its second if the first
    is empty."""
    parts, is_pending = [np.zeros(1, bool)], True
    for number, segment in enumerate(document.segments):
        is_pending |= not document.pairs or number % 2 == 0
        is_text = isinstance(segment, Text)
        part = np.full(len(segment.tokens) if is_text else vocabulary.num_patches(segment.shape) + 2,
                       is_text and not document.pairs)  # fmt: skip
        part[:1] = is_pending
        is_pending &= not len(part)
        parts.append(part)
    return np.concatenate([*parts, np.zeros(1, bool)])


def count_copies(document: Document, vocabulary: Vocabulary) -> np.ndarray:
    """(n,) positions of the noisy copy of the image whose boi is at this position of the document; else 0."""
    parts = [np.zeros(1, np.int64)]
    for segment, is_copied in zip(document.segments, find_copied(document.segments), strict=True):
        is_text = isinstance(segment, Text)
        parts.append(np.zeros(len(segment.tokens) if is_text else vocabulary.num_patches(segment.shape) + 2, np.int64))
        if is_copied:
            parts[-1][0] = len(parts[-1]) - 2
    return np.concatenate([*parts, np.zeros(1, np.int64)])


def split_chunk(chunk: Chunk, length: int) -> list[Chunk]:
    """Chunks of at most `length` positions, split only where `can_break` allows. No position is lost or repeated.

    The first position of a later chunk is still predicted, from the last one of the chunk before it. ValueError when an
    image (with its caption, and its noisy copy) is longer than a row.
    """
    copies = np.zeros(len(chunk.tokens), np.int64)
    for copy in chunk.copies:
        copies[copy.start - 1] = copy.num_patches
    ends = find_splits(chunk.can_break, length, copies if chunk.copies else None)
    return [chunk.part(*span) for span in pairwise([0, *ends])]


def find_splits(can_break: np.ndarray, length: int, copies: np.ndarray | None = None) -> list[int]:
    """The end of each chunk of at most `length` positions, the last one included. `copies` (n,): as of `count_copies`; they
    stay with their image. ValueError as for `split_chunk`."""
    n, ends, begin = len(can_break), [], 0
    taken = np.arange(n + 1) if copies is None else np.append(0, np.cumsum(1 + copies))  # in a row, before each position
    while taken[n] - taken[begin] > length:
        last = np.searchsorted(taken, taken[begin] + length, side="right")
        allowed = np.flatnonzero(can_break[begin + 1 : last])
        if not len(allowed):
            parts = "its caption" if copies is None else "its caption and its noisy copy"
            raise ValueError(f"an image with {parts} does not fit in a row of {length} positions: raise data.seq_len")
        begin += 1 + int(allowed[-1])
        ends.append(begin)
    return [*ends, n]


@dataclass(frozen=True)
class Row:
    """Chunks side by side; the rest of the row is padding."""

    chunks: tuple[Chunk, ...]


@dataclass
class ImageGroup:
    """All images of one latent shape in a batch, noisy copies among them, and the positions of their patches."""

    x0: Tensor  # (N, C, Y, X)
    index: Tensor  # (N, P) into the batch's B * L positions
    max_t: Tensor  # (N,)
    loss: Tensor  # (N,) bool
    image_count: int  # with a denoising loss, counted before the copy to a device
    keys: list[int]


class Sides(NamedTuple):
    """All positions, as indices into B * L, by the weights that a model with untied image weights uses for them."""

    text: Tensor  # (n,) text, markers and padding
    image: Tensor  # (m,) patches and codes of images


@dataclass
class Batch:
    """Rows as tensors. Logits are computed only at positions with text loss."""

    tokens: Tensor  # (B, L)
    position_ids: Tensor  # (B, L) from 0 in each chunk
    grid_offsets: Tensor  # (B, L, 2) what is added to `position_ids` for positions by row and by column
    document_ids: Tensor  # (B, L) number of the chunk in its row; -1: padding
    image_ids: Tensor  # (B, L) number of the image in its row, or NO_IMAGE
    clean_starts: Tensor | None  # (B, L) in a noisy copy the first position of the clean image, or NO_IMAGE; None: no copies
    sides: Sides
    text_index: Tensor  # (T,) into B * L: positions with text loss
    text_target: Tensor  # (T,)
    first_code: int  # targets from this id on are codes of images
    code_count: int  # number of such targets
    groups: list[ImageGroup]
    positions: int  # without padding
    documents: list[list[str]]  # of each row: "source id" of its chunks

    @property
    def text_count(self) -> int:
        """Positions with next-token loss, on text or codes."""
        return len(self.text_index)

    @property
    def image_count(self) -> int:
        """Images with a denoising loss."""
        return sum(group.image_count for group in self.groups)

    def to(self, device) -> "Batch":
        """On that device; the copies overlap with other work if the batch is in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In pinned (page-locked) memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(part):
            return replace(part, **{k: function(v) for k, v in vars(part).items() if isinstance(v, Tensor)})

        sides = Sides(*map(function, self.sides))
        return replace(apply(self), sides=sides, groups=[apply(group) for group in self.groups])


def collate(rows: Sequence[Row], length: int, vocabulary: Vocabulary) -> Batch:
    """Rows to one batch of (B, length)."""
    shape = (len(rows), length)
    tokens = np.full(shape, vocabulary.pad, dtype=np.int64)  # (B, L)
    targets = np.full(shape, NO_TARGET, dtype=np.int64)  # (B, L)
    position_ids = np.zeros(shape, dtype=np.int64)  # (B, L)
    offsets = np.zeros((*shape, 2), dtype=np.int32)  # (B, L, 2)
    document_ids = np.full(shape, -1, dtype=np.int32)  # (B, L)
    image_ids = np.full(shape, NO_IMAGE, dtype=np.int32)  # (B, L)
    clean_starts = None
    images: dict[tuple[int, int], list[tuple[int, PlacedImage]]] = {}  # by shape; with the first patch's index in B * L
    positions = 0
    for b, row in enumerate(rows):
        begin = num_images = 0
        for number, chunk in enumerate(row.chunks):
            end = begin + len(chunk.tokens)
            tokens[b, begin:end], targets[b, begin:end] = chunk.tokens, chunk.targets
            position_ids[b, begin:end], offsets[b, begin:end] = np.arange(end - begin), chunk.grid_offsets
            starts = [begin + placed.start for placed in chunk.images]
            for copy in chunk.copies:
                clean_starts = np.full(shape, NO_IMAGE, dtype=np.int32) if clean_starts is None else clean_starts  # (B, L)
                clean, noisy = (slice(start, start + copy.num_patches) for start in (begin + copy.start, end))
                position_ids[b, noisy], clean_starts[b, noisy] = position_ids[b, clean], clean.start
                offsets[b, noisy] = offsets[b, clean]
                starts.append(end)
                end += copy.num_patches
            for start, placed in zip(starts, chunk.images + chunk.copies, strict=True):
                image_ids[b, start : start + placed.num_patches] = num_images
                images.setdefault(placed.image.shape, []).append((b * length + start, placed))
                num_images += 1
            document_ids[b, begin:end] = number
            begin = end
        position_ids[b, begin:] = np.arange(length - begin)
        positions += begin
    flat_targets = targets.reshape(-1)
    text_index = np.flatnonzero(flat_targets != NO_TARGET)
    is_image = ((image_ids != NO_IMAGE) | (tokens >= vocabulary.first_code)).reshape(-1)  # (B * L,)
    return Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        grid_offsets=torch.from_numpy(offsets),
        document_ids=torch.from_numpy(document_ids),
        image_ids=torch.from_numpy(image_ids),
        clean_starts=None if clean_starts is None else torch.from_numpy(clean_starts),
        sides=Sides(*(torch.from_numpy(np.flatnonzero(mask)) for mask in (~is_image, is_image))),
        text_index=torch.from_numpy(text_index),
        text_target=torch.from_numpy(flat_targets[text_index]),
        first_code=vocabulary.first_code,
        code_count=int((flat_targets >= vocabulary.first_code).sum()),
        groups=[_group(placed, vocabulary.num_patches(shape)) for shape, placed in sorted(images.items())],
        positions=positions,
        documents=[[f"{chunk.source} {chunk.id}" for chunk in row.chunks] for row in rows],
    )


def _group(images: list[tuple[int, PlacedImage]], patches: int) -> ImageGroup:
    starts = np.array([start for start, _ in images])
    placed = [image for _, image in images]
    max_t = torch.tensor([p.image.max_t for p in placed])
    loss = torch.tensor([p.image.is_denoised for p in placed])
    return ImageGroup(
        x0=torch.from_numpy(np.stack([p.image.content for p in placed]).astype(np.float32, copy=False)),
        index=torch.from_numpy(starts[:, None] + np.arange(patches)),
        max_t=max_t,
        loss=loss,
        image_count=int(loss.sum()),
        keys=[p.key for p in placed],
    )
