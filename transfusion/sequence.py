"""How text and images lie in one sequence: the only file that knows where a segment's positions are.

Shapes, everywhere: **B** rows, **L** positions, **D** width, **H** heads, **V** vocabulary, **N** images in the batch,
**P** patches per image, **C, Y, X** a latent's channels, height and width. Training packs with this file and inference
prefills with it, so the two cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from transfusion.chance import seed_from

NO_TARGET = -1
NO_IMAGE = -1


@dataclass(frozen=True)
class Text:
    """A run of token ids. `loss`: are they to be learnt (as targets)?"""

    tokens: tuple[int, ...]
    loss: bool = True


@dataclass(frozen=True)
class Image:
    """One image as a codec gives it: a normalised latent (C, Y, X), float32, or a grid of codes (Y, X), whole numbers.

    `max_time` is the most noise a latent is trained with: 1, or 0.5 (the noise limit of Table 8), or 0: it only conditions
    what follows, is always clean and has no denoising loss. Codes have no noise.
    """

    content: np.ndarray
    loss: bool = True
    max_time: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the content (Y, X)."""
        return self.content.shape[-2:]

    @property
    def is_codes(self) -> bool:
        return self.content.ndim == 2


@dataclass(frozen=True)
class Document:
    """An ordered list of segments. All its chance (t, noise) follows from `key`; `source` and `id` say what it is."""

    segments: tuple[Text | Image, ...]
    id: int = 0
    source: str = ""
    key: int = 0
    pairs: bool = False  # captions and images in turn: a cut may only fall between two pairs


@dataclass(frozen=True)
class Vocabulary:
    """Which id means what: the tokenizer's own ids, the markers, an image's codes, then padding up to a multiple of 128."""

    text: int  # ids 0 .. text - 1 belong to the tokenizer
    bos: int
    eos: int
    pad: int
    eoi: int
    boi: dict[tuple[int, int], int]  # one per latent shape (Y, X)
    patch_size: int
    codes: int = 0  # of the codec, for images that are grids of codes; 0: images are latents

    @classmethod
    def build(cls, text: int, shapes: Sequence[tuple[int, int]], patch_size: int, codes=0, bos=None, eos=None, pad=None):
        """Reuse the tokenizer's bos, eos and pad where it has them; the missing ones, eoi and the bois follow its ids."""
        following = iter(range(text, text + 4 + len(shapes)))
        ids = [next(following) if own is None else own for own in (bos, eos, pad)]
        return cls(text, *ids, next(following), {tuple(shape): next(following) for shape in shapes}, patch_size, codes)

    @property
    def first_code(self) -> int:
        """The id of the codec's code 0; the others follow it."""
        return max(self.text - 1, self.bos, self.eos, self.pad, self.eoi, *self.boi.values()) + 1

    @property
    def used(self) -> int:
        """One more than the largest id that means something."""
        return self.first_code + self.codes

    @property
    def size(self) -> int:
        """Rows of the embedding: `used`, rounded up to a multiple of 128."""
        return -(-self.used // 128) * 128

    def shape_of(self, boi: int) -> tuple[int, int] | None:
        """The latent shape that this id begins; None when it is no boi."""
        return next((shape for shape, id_ in self.boi.items() if id_ == boi), None)

    def patches(self, shape: tuple[int, int]) -> int:
        """P: how many positions an image of this latent shape takes, boi and eoi not counted."""
        return (shape[0] // self.patch_size) * (shape[1] // self.patch_size)

    def to_json(self) -> dict:
        sizes = {f"{y}x{x}": id_ for (y, x), id_ in self.boi.items()}
        return {**self.__dict__, "boi": sizes}

    @classmethod
    def from_json(cls, values: dict):
        sizes = {tuple(map(int, name.split("x"))): id_ for name, id_ in values["boi"].items()}
        return cls(**{**values, "boi": sizes})


@dataclass(frozen=True)
class Placed:
    """A latent and the position of its first patch (in a document, a piece or a row)."""

    image: Image
    start: int
    key: int  # all its chance follows from this
    document: int
    source: str


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that was longer than a row, as positions."""

    tokens: np.ndarray  # (n,) int64; pad at patches
    targets: np.ndarray  # (n,) int64; NO_TARGET where there is no text loss
    images: tuple[Placed, ...]
    breaks: np.ndarray  # (n,) bool: may a later part begin here?
    source: str = ""  # of the document
    id: int = 0

    def __len__(self):
        return len(self.tokens)

    def part(self, begin: int, end: int | None = None) -> "Piece":
        """These positions as a piece of their own; images that begin elsewhere stay behind."""
        end = len(self) if end is None else end
        images = tuple(replace(i, start=i.start - begin) for i in self.images if begin <= i.start < end)
        span = slice(begin, end)
        return replace(
            self, tokens=self.tokens[span], targets=self.targets[span], images=images, breaks=self.breaks[span]
        )

    def followed_by(self, token: int) -> "Piece":
        """One token more, without loss."""
        return replace(
            self, tokens=np.append(self.tokens, token), targets=np.append(self.targets, NO_TARGET),
            breaks=np.append(self.breaks, False),
        )  # fmt: skip


NOTHING = Piece(np.empty(0, np.int64), np.empty(0, np.int64), (), np.empty(0, bool))


def lay_out(document: Document, vocabulary: Vocabulary, ends: bool = True) -> Piece:
    """bos, text, boi, patches, eoi, text, ..., eos: the document as positions.

    A position has text loss iff the next slot is a token of a segment with loss and is not eoi: that covers boi to
    patch, patch to eoi, and the end. Codes are tokens: they stand where patches would (Chameleon, 2405.09818). `ends=False`
    leaves out eos (a prompt).
    """
    tokens, learnt, breaks, images = [vocabulary.bos], [False], [False], []
    may_break = True  # before the next position; in pairs, only before the first of each pair
    for number, segment in enumerate(document.segments):
        may_break |= not document.pairs or number % 2 == 0
        if isinstance(segment, Text):
            n = len(segment.tokens)
            tokens += segment.tokens
            learnt += [segment.loss] * n
            found = [True] * n if not document.pairs else [may_break, *[False] * (n - 1)][:n]
        else:
            n = vocabulary.patches(segment.shape)
            if segment.is_codes:
                inside = (vocabulary.first_code + segment.content.ravel()).tolist()  # row by row
            else:
                key = seed_from(document.key, len(images))
                images.append(Placed(segment, len(tokens) + 1, key, document.id, document.source))
                inside = [vocabulary.pad] * n
            tokens += [vocabulary.boi[segment.shape], *inside, vocabulary.eoi]
            learnt += [segment.loss, *[segment.loss and segment.is_codes] * n, False]
            found = [may_break] + [False] * (n + 1)
        breaks += found
        may_break &= not found
    if ends:
        tokens.append(vocabulary.eos)
        learnt.append(not document.segments or document.segments[-1].loss)
        breaks.append(False)
    ids = np.array(tokens, dtype=np.int64)
    targets = np.full(len(ids), NO_TARGET, dtype=np.int64)
    targets[:-1] = np.where(learnt[1:], ids[1:], NO_TARGET)
    return Piece(ids, targets, tuple(images), np.array(breaks), document.source, document.id)


def cut(piece: Piece, length: int) -> list[Piece]:
    """The piece in parts of at most `length` positions, cut only where it may break. Nothing is lost or repeated.

    The first position of a later part is still predicted from the last of the one before. ValueError when an image
    (with its caption) is longer than a row.
    """
    parts, begin = [], 0
    while len(piece) - begin > length:
        allowed = np.flatnonzero(piece.breaks[begin + 1 : begin + length + 1])
        if not len(allowed):
            raise ValueError(f"an image with its caption does not fit in a row of {length} positions: raise data.row_length")
        end = begin + 1 + int(allowed[-1])
        parts.append(piece.part(begin, end))
        begin = end
    return [*parts, piece.part(begin)]


@dataclass(frozen=True)
class Row:
    """Pieces side by side, none longer than what is left; the rest is padding."""

    pieces: tuple[Piece, ...]


@dataclass
class ImageGroup:
    """All images of one latent shape in a batch, and where their patches lie."""

    clean: Tensor  # (N, C, Y, X)
    index: Tensor  # (N, P) into the batch's B * L positions
    max_time: Tensor  # (N,)
    loss: Tensor  # (N,) bool
    image_count: int  # with a denoising loss, counted before anything moves to a device
    keys: list[int]
    documents: list[int]
    sources: list[str]


@dataclass
class Batch:
    """Rows as tensors. Only positions with text loss are listed: the others never meet the vocabulary."""

    tokens: Tensor  # (B, L)
    position: Tensor  # (B, L) restarts at 0 in each piece
    document: Tensor  # (B, L) which piece of the row; padding is a piece of its own
    image: Tensor  # (B, L) which image of the row, or NO_IMAGE
    text_index: Tensor  # (T,) into B * L: positions with text loss
    text_target: Tensor  # (T,)
    first_code: int  # targets from here on are an image's codes
    code_count: int  # how many are
    groups: list[ImageGroup]
    positions: int  # that are not padding
    documents: list[list[str]]  # of each row, what stands in it: "source id"

    @property
    def text_count(self) -> int:
        """Positions with next-token loss, on text or on codes."""
        return len(self.text_index)

    @property
    def image_count(self) -> int:
        """Images with a denoising loss."""
        return sum(group.image_count for group in self.groups)

    def to(self, device) -> "Batch":
        """On that device; the copies overlap with other work."""

        def moved(part):
            tensors = {k: v.to(device, non_blocking=True) for k, v in vars(part).items() if isinstance(v, Tensor)}
            return replace(part, **tensors)

        return replace(moved(self), groups=[moved(group) for group in self.groups])


def collate(rows: Sequence[Row], length: int, vocabulary: Vocabulary) -> Batch:
    """Rows to one batch of (B, length)."""
    shape = (len(rows), length)
    tokens = np.full(shape, vocabulary.pad, dtype=np.int64)  # (B, L)
    targets = np.full(shape, NO_TARGET, dtype=np.int64)  # (B, L)
    position = np.zeros(shape, dtype=np.int64)  # (B, L)
    document = np.full(shape, -1, dtype=np.int32)  # (B, L)
    image = np.full(shape, NO_IMAGE, dtype=np.int32)  # (B, L)
    placed: dict[tuple[int, int], list[tuple[int, Placed]]] = {}
    used = 0
    for b, row in enumerate(rows):
        begin = num_images = 0
        for number, piece in enumerate(row.pieces):
            span = slice(begin, begin + len(piece))
            tokens[b, span], targets[b, span] = piece.tokens, piece.targets
            position[b, span], document[b, span] = np.arange(len(piece)), number
            for found in piece.images:
                first = begin + found.start
                image[b, first : first + vocabulary.patches(found.image.shape)] = num_images
                placed.setdefault(found.image.shape, []).append((b * length + first, found))
                num_images += 1
            begin += len(piece)
        position[b, begin:] = np.arange(length - begin)
        used += begin
    flat = targets.reshape(-1)
    text_index = np.flatnonzero(flat != NO_TARGET)
    groups = [_group(found, vocabulary.patches(shape_)) for shape_, found in sorted(placed.items())]
    return Batch(
        *map(torch.from_numpy, (tokens, position, document, image, text_index, flat[text_index])),
        vocabulary.first_code, int((flat >= vocabulary.first_code).sum()), groups, used,
        [[f"{piece.source} {piece.id}" for piece in row.pieces] for row in rows],
    )  # fmt: skip


def _group(found: list[tuple[int, Placed]], patches: int) -> ImageGroup:
    starts = np.array([start for start, _ in found])
    images = [placed.image for _, placed in found]
    max_time = torch.tensor([image.max_time for image in images])
    loss = torch.tensor([image.loss for image in images]) & (max_time > 0)
    return ImageGroup(
        clean=torch.from_numpy(np.stack([image.content for image in images]).astype(np.float32, copy=False)),
        index=torch.from_numpy(starts[:, None] + np.arange(patches)),
        max_time=max_time,
        loss=loss,
        image_count=int(loss.sum()),
        keys=[placed.key for _, placed in found],
        documents=[placed.document for _, placed in found],
        sources=[placed.source for _, placed in found],
    )
