"""Random documents, a small vocabulary and a tiny model for property tests.

Hypothesis generates the structure (segments, lengths, loss, row lengths). Pixels and latents come from a seed: no
property depends on their values.
"""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.profile import examples
from transfusion.config import DataConfig, ModelConfig
from transfusion.data.lengths import change, choose_changes, kind_of
from transfusion.data.loader import Loader
from transfusion.data.packing import pack
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.model import transfusion
from transfusion.model.mask import Mask, packed_mask
from transfusion.sequence import (
    Batch,
    Chunk,
    Document,
    Image,
    Row,
    Sides,
    Text,
    Vocabulary,
    collate,
    encode_document,
    split_chunk,
)

CHANNELS = 3
SHAPES = ((4, 4), (2, 6), (2, 2))  # 4, 3 and 1 patches of side 2
VOCABULARY = Vocabulary.build(num_text_tokens=50, shapes=SHAPES, patch_size=2)
TINY = ModelConfig(
    width=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, vocab_size=VOCABULARY.size, latent_channels=CHANNELS,
    patch_size=2,
)  # fmt: skip

torch.set_num_threads(1)  # for small matrices two threads are ten times slower on a busy machine

few = examples(25, quick=12)  # for tests that run a model
some = examples(40, quick=20)
many = examples(150)


# Documents

either = st.booleans()
limits = st.sampled_from((0.0, 0.5, 1.0))


def texts(min_size: int = 0, max_size: int = 8, loss=either):
    """A Text of that many tokens."""
    tokens = st.lists(st.integers(0, VOCABULARY.num_text_tokens - 1), min_size=min_size, max_size=max_size)
    return st.builds(Text, tokens.map(tuple), loss)


def images(shapes=SHAPES, loss=either, max_t=limits):
    """An Image of one of these shapes."""
    return st.builds(image, st.sampled_from(shapes), st.integers(0, 2**32 - 1), loss, max_t)


def image(shape: tuple[int, int], seed: int, loss: bool = True, max_t: float = 1.0) -> Image:
    """An Image with a random latent from the seed."""
    latent = np.random.default_rng(seed).standard_normal((CHANNELS, *shape), dtype=np.float32)
    return Image(latent, loss, max_t)


@st.composite
def documents(draw, min_images: int = 0, max_segments: int = 5, **of_images):
    """Texts and images in any order. Texts and documents may be empty."""
    segments = draw(st.lists(texts() | images(**of_images), max_size=max_segments))
    segments += draw(st.lists(images(**of_images), min_size=min_images, max_size=max(min_images, 1)))
    segments = draw(st.permutations(segments))
    key = draw(st.integers(0, 2**62))
    return Document(tuple(segments), draw(st.integers(0, 99)), draw(st.sampled_from("ab")), key)


@st.composite
def pair_documents(draw, max_pairs: int = 4, caption_first=either):
    """Alternating captions and images; all pairs have the same order."""
    pairs = draw(st.lists(st.tuples(texts(), images()), min_size=1, max_size=max_pairs))
    if not draw(caption_first):
        pairs = [pair[::-1] for pair in pairs]
    segments = tuple(part for pair in pairs for part in pair)
    return Document(segments, draw(st.integers(0, 99)), "pairs", draw(st.integers(0, 2**62)), pairs=True)


# Rows and batches

LENGTH = 48  # positions of a row


@st.composite
def batches(draw, min_documents: int = 1, max_documents: int = 5, length: int = LENGTH, clean_copies=either, **of_documents):
    """Packed rows of random documents (too long ones are split), with or without clean copies, as (rows, batch)."""
    sampled = draw(st.lists(documents(**of_documents), min_size=min_documents, max_size=max_documents))
    rows = pack(sampled, length, VOCABULARY, draw(st.integers(0, 2**31)), draw(clean_copies))
    return rows, collate(rows, length, VOCABULARY)


def chunks_of(document: Document, length: int | None = None) -> list[Chunk]:
    """The encoded document, split if a length is given."""
    chunk = encode_document(document, VOCABULARY)
    return [chunk] if length is None else split_chunk(chunk, length)


def alone(chunk: Chunk) -> Batch:
    """A batch of only this chunk, without padding."""
    return collate([Row((chunk,))], len(chunk), VOCABULARY)


def positioned_chunks(rows: list[Row]) -> list[tuple[int, int, Chunk]]:
    """(row, first position, chunk) of every chunk in these rows."""
    positions = []
    for b, row in enumerate(rows):
        begin = 0
        for chunk in row.chunks:
            positions.append((b, begin, chunk))
            begin += len(chunk)
    return positions


def changed(document: Document, config: DataConfig) -> Document:
    """The document as its key decides: image first, or with dropped parts."""
    [how] = choose_changes(np.array([document.key], np.uint64), np.array([kind_of(document)]), config)
    return change(document, how, config)


def entries_of(loader: Loader, block: int, num_blocks: int = 1) -> list[tuple[int, int, int]]:
    """(source, epoch, id) of all documents of some blocks."""
    entries = loader.stream.read(block, num_blocks)
    return list(zip(entries.sources.tolist(), entries.epochs.tolist(), entries.ids.tolist(), strict=True))


def contents(chunk: Chunk) -> tuple:
    """A chunk as a hashable value."""
    keys = (tuple((i.start, i.key, i.image.max_t) for i in placed) for placed in (chunk.images, chunk.copies))
    return tuple(chunk.tokens.tolist()), tuple(chunk.targets.tolist()), *keys


def contents_of(rows: list[Row]) -> list[list[tuple]]:
    """Rows as comparable values."""
    return [[contents(chunk) for chunk in row.chunks] for row in rows]


def may_see(document: Tensor, image: Tensor, bidirectional: bool = True, clean: Tensor | None = None) -> Tensor:
    """The attention rule (section 3, figure 4) in one expression: (L,), (L,), (L,) -> (L, L) bool, query by key. `clean`: in
    a noisy copy the first position of the clean image, else negative. Copies are behind their document."""
    q, k = torch.arange(len(document))[:, None], torch.arange(len(document))[None]
    same_image = (image[q] == image[k]) & (image[q] >= 0) & ((k <= q) | bidirectional)
    end = q + 1 if clean is None else torch.where(clean[q] >= 0, clean[q], q + 1)
    return (document[q] == document[k]) & ((k < end) | same_image)


def mask_of(batch: Batch, image_attention: str = "bidirectional") -> Mask:
    return packed_mask(batch.document_ids, batch.image_ids, image_attention, batch.clean_starts)


def rows_of(batch: Batch) -> list[tuple[Tensor | None, ...]]:
    """(document, image, clean) of each row, for `may_see`."""
    clean = [None] * len(batch.tokens) if batch.clean_starts is None else batch.clean_starts
    return list(zip(batch.document_ids, batch.image_ids, clean, strict=True))


# Raw data


class Notes:
    """A synthetic source: texts of about `mean` characters; every third document is a pair with an image."""

    def __init__(self, name: str, size: int, mean: int = 20):
        self.name, self.size, self.mean = name, size, mean

    def __len__(self):
        return self.size

    def __getitem__(self, id):
        text = "".join(chr(97 + (id * 7 + i) % 26) for i in range(self.mean // 2 + id % self.mean))
        image = RawImage(np.full((4, 4, 1), id % 256, dtype=np.uint8))
        return RawDocument((RawText(text), image)[: 1 + (id % 3 == 0)], id, pairs=id % 3 == 0)


@st.composite
def image_lists(draw, side: int = 8):
    """Images of one size: noise, smooth, or with a constant channel."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, channels = draw(st.integers(2, 6)), draw(st.sampled_from((1, 3)))
    pixels = rng.integers(0, 256, (n, side, 2 * side, channels))
    if draw(st.booleans()):
        pixels = pixels // 8 + rng.integers(0, 200, (n, 1, 1, channels))
    if draw(st.booleans()):
        pixels[..., 0] = 77
    return list(pixels.astype(np.uint8))


# The model


def build(
    config: ModelConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64
) -> transfusion.Transfusion:
    """A tiny model in which parameters that are initialised to zero are random too."""
    model = transfusion.build(config, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "patches.proj_out.weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def in_double(batch: Batch) -> Batch:
    """The same batch with float64 latents."""
    return replace(batch, groups=[replace(group, x0=group.x0.double()) for group in batch.groups])


def with_all_logits(batch: Batch) -> Batch:
    """The same batch with the logits of every position: (B * L, V)."""
    return replace(batch, text_index=torch.arange(batch.tokens.numel()))


def times_of(batch: Batch, salt: int = 0) -> list[Tensor]:
    """A t for every image that depends only on the image's key, so it is the same in any batch."""
    return [
        torch.tensor([np.random.default_rng((key, salt)).random() for key in group.keys], dtype=torch.float64)
        for group in batch.groups
    ]


def same_batch(a: Batch, b: Batch) -> bool:
    """Whether all tensors, lists and numbers are equal."""
    return _same(a, b) and all(_same(*pair) for pair in zip(a.groups, b.groups, strict=True))


def _same(a, b) -> bool:
    for name, value in vars(a).items():
        if name == "groups":
            if len(value) != len(b.groups):
                return False
        elif isinstance(value, Tensor | Sides):
            pairs = zip(value, getattr(b, name), strict=True) if isinstance(value, Sides) else [(value, getattr(b, name))]
            if not all(torch.equal(*pair) for pair in pairs):
                return False
        elif value != getattr(b, name):
            return False
    return True
