"""Positions of patches and codes by row and by column (`model.image_rope` 2d), compared with slow, simple code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import (
    TINY,
    VOCABULARY,
    alone,
    build,
    documents,
    few,
    image,
    in_double,
    pair_documents,
    some,
    texts,
    times_of,
    with_all_logits,
)
from tests.tiny import write_run
from transfusion.checkpoint.start import OtherRunStart
from transfusion.config import ModelConfig
from transfusion.model.transformer import apply_rotary_emb, rope_cos_sin, rotary_positions
from transfusion.model.transfusion import build_uninitialized
from transfusion.parallel import SINGLE_PROCESS
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document, split_chunk

PLANE = replace(TINY, image_rope="2d")
CODES = Vocabulary.build(num_text_tokens=50, shapes=[(2, 3), (3, 1)], patch_size=1, num_image_codes=30)

grids = st.sampled_from(sorted(CODES.boi)).map(lambda shape: Image(np.arange(math.prod(shape)).reshape(shape)))
code_documents = st.lists(texts() | grids, max_size=5).map(lambda segments: Document(tuple(segments)))


def rows_and_columns(document: Document, vocabulary: Vocabulary) -> list[list[int]]:
    """The row and column of every position: with boi at p, patch (r, c) has p + 1 + r and p + 1 + c; all others their own
    place in the document, twice."""
    positions = [[0, 0]]  # bos
    for segment in document.segments:
        place = len(positions)
        if isinstance(segment, Text):
            positions += [[place + n] * 2 for n in range(len(segment.tokens))]
            continue
        Y, X = segment.shape
        rows, columns = range(Y // vocabulary.patch_size), range(X // vocabulary.patch_size)
        positions += [[place, place], *([place + 1 + r, place + 1 + c] for r in rows for c in columns)]
        positions.append([len(positions)] * 2)  # eoi
    return [*positions, [len(positions)] * 2]  # eos


# Positions


@some
@given(
    st.lists(documents() | pair_documents(), min_size=1, max_size=3).map(lambda documents: (documents, VOCABULARY))
    | st.lists(code_documents, min_size=1, max_size=3).map(lambda documents: (documents, CODES)),
    st.integers(20, 40),
)
def test_positions_are_those_of_row_and_column(drawn, length):
    """In packed rows, of latents and codes, also of documents that are cut: a later chunk begins at position 0."""
    chunks, expected = [], []
    for document in drawn[0]:
        positions, begin = np.array(rows_and_columns(document, drawn[1])), 0
        for chunk in split_chunk(encode_document(document, drawn[1]), length):
            chunks.append(chunk)
            expected += (positions[begin : begin + len(chunk)] - begin).tolist()
            begin += len(chunk)
    batch = collate([Row(tuple(chunks))], len(expected) + 3, drawn[1])
    positions = rotary_positions(batch.position_ids, batch.grid_offsets, PLANE)
    assert positions[0].tolist() == [*expected, [0, 0], [1, 1], [2, 2]]  # padding
    assert rotary_positions(batch.position_ids, batch.grid_offsets, TINY) is batch.position_ids


@some
@given(
    st.sampled_from((4, 8, 12, 64)), st.sampled_from((100.0, 1e4, 1e6)),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5),
)  # fmt: skip
def test_even_frequencies_turn_by_row_and_odd_ones_by_column(head_dim, theta, pairs):
    """As complex numbers: coordinate i + j coordinate (i + h / 2) is multiplied by exp(j angle)."""
    config = ModelConfig(width=head_dim, heads=1, rope_theta=theta, image_rope="2d")
    positions = torch.tensor([pairs])  # (1, L, 2)
    x = torch.randn(1, len(pairs), 3, head_dim, dtype=torch.float64)
    turned = apply_rotary_emb(x, rope_cos_sin(positions, config, x.dtype))
    half = head_dim // 2
    for n, pair in enumerate(pairs):
        angles = torch.tensor([pair[i % 2] * theta ** (-2 * i / head_dim) for i in range(half)], dtype=torch.float64)
        expected = torch.complex(x[0, n, :, :half], x[0, n, :, half:]) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(turned[0, n], torch.cat([expected.real, expected.imag], -1), rtol=0, atol=3e-4)


@few
@given(texts(min_size=1, max_size=40), st.booleans())
def test_text_is_unchanged_bit_for_bit(text, untied):
    """A language model that continues with 2d keeps its logits. An image changes its own prediction and what follows it."""
    config = replace(TINY, untied="full", text_vocab_size=VOCABULARY.text_size) if untied else TINY
    line, plane = (build(replace(config, image_rope=rope), dtype=torch.float32) for rope in ("1d", "2d"))
    batch = with_all_logits(alone(encode_document(Document((text,)), VOCABULARY)))
    with torch.no_grad():
        assert torch.equal(line(batch, [], []).logits, plane(batch, [], []).logits)
        document = Document((text, image((4, 4), 1), Text((3,))))
        batch = in_double(with_all_logits(alone(encode_document(document, VOCABULARY))))
        first, second = (model.double()(batch, [batch.groups[0].x0], times_of(batch)) for model in (line, plane))
    differs = (first.logits - second.logits).abs().amax(1) > 1e-9
    assert differs.tolist() == [False] * (2 + len(text.tokens)) + [True] * 7  # bos, text, boi; patches, eoi, text, eos
    assert not torch.allclose(first.images[0], second.images[0])


# Settings


@pytest.mark.parametrize(("options", "words"), [
    ({"head_dim": 6}, "6: model.image_rope 2d needs a width of a head divisible by 4; use 8"),
    ({"width": 36, "heads": 6}, "6: model.image_rope 2d needs a width of a head divisible by 4; use 8"),
    ({"head_dim": 9}, "9: model.image_rope 2d needs a width of a head divisible by 4; use 12"),
    ({"head_dim": 7, "image_rope": "1d"}, "7: model.image_rope 1d needs a width of a head divisible by 2; use 8"),
])  # fmt: skip
def test_heads_that_cannot_be_divided_are_refused(options, words):
    with pytest.raises(ValueError, match=f"^model.head_dim {words}$"):
        ModelConfig(**{"image_rope": "2d"} | options)


def test_run_of_one_line_starts_one_of_rows_and_columns(tmp_path):
    """All weights have the same shapes."""
    run = write_run(tmp_path / "run")
    start = OtherRunStart(str(tmp_path / "run"))
    models = [build_uninitialized(start.adapt_config(replace(run.model, image_rope=rope))) for rope in ("1d", "2d")]
    for model in models:
        start.fill(model, 3, SINGLE_PROCESS)
    assert [model.config.image_rope for model in models] == ["1d", "2d"]
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


@some
@given(st.lists(documents(min_images=1), min_size=1, max_size=2))
def test_noisy_copies_have_the_positions_of_their_images(drawn):
    chunks = [encode_document(document, VOCABULARY, clean_copies=True) for document in drawn]
    batch = collate([Row(tuple(chunks))], sum(map(len, chunks)), VOCABULARY)
    if batch.clean_starts is None:
        return
    positions = rotary_positions(batch.position_ids, batch.grid_offsets, PLANE)[0]
    for number in batch.image_ids[0, batch.clean_starts[0] >= 0].unique():
        copy = (batch.image_ids[0] == number).nonzero()[:, 0]
        start = int(batch.clean_starts[0, copy[0]])
        assert positions[copy].tolist() == positions[start : start + len(copy)].tolist()
