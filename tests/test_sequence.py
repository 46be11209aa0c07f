"""Text and images in one sequence: layout, targets, splits and batches, compared with slow, simple code."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import (
    LENGTH,
    SHAPES,
    VOCABULARY,
    alone,
    batches,
    chunks_of,
    documents,
    image,
    many,
    pair_documents,
    positioned_chunks,
    some,
)
from transfusion.seeding import derive_seed, uniform_from
from transfusion.sequence import NO_IMAGE, NO_TARGET, Document, Image, Text, Vocabulary, encode_document, split_chunk

# The layout


def entries_of(document: Document) -> list[tuple[str, int, bool]]:
    """The layout by simple code: (kind, token id, does its segment have loss) of every position."""
    entries = [("bos", VOCABULARY.bos, False)]
    for segment in document.segments:
        if isinstance(segment, Text):
            entries += [("text", token, segment.loss) for token in segment.tokens]
        else:
            y, x = segment.shape
            patches = (y // VOCABULARY.patch_size) * (x // VOCABULARY.patch_size)
            entries.append(("boi", VOCABULARY.boi[y, x], segment.loss))
            entries += [("patch", VOCABULARY.pad, segment.loss)] * patches
            entries.append(("eoi", VOCABULARY.eoi, segment.loss))
    last_loss = document.segments[-1].loss if document.segments else True
    return [*entries, ("eos", VOCABULARY.eos, last_loss)]


@many
@given(documents() | pair_documents())
def test_positions_are_bos_segments_eos(document):
    chunk, entries = encode_document(document, VOCABULARY), entries_of(document)
    assert chunk.tokens.tolist() == [token for _, token, _ in entries]
    starts = [i + 1 for i, (kind, *_) in enumerate(entries) if kind == "boi"]
    assert [placed.start for placed in chunk.images] == starts
    images = [segment for segment in document.segments if isinstance(segment, Image)]
    assert [placed.image for placed in chunk.images] == images


@many
@given(documents() | pair_documents())
def test_position_has_loss_iff_the_next_token_has_loss_and_is_not_eoi(document):
    chunk, entries = encode_document(document, VOCABULARY), entries_of(document)
    expected = [
        token if has_loss and kind in ("text", "boi", "eos") else NO_TARGET for kind, token, has_loss in entries[1:]
    ] + [NO_TARGET]
    assert chunk.targets.tolist() == expected
    for (kind, *_), target in zip(entries, chunk.targets, strict=True):
        assert target not in (VOCABULARY.eoi, VOCABULARY.pad, VOCABULARY.bos)
        assert kind not in ("boi", "patch") or target == NO_TARGET  # the next position is a patch or eoi


@some
@given(documents() | pair_documents())
def test_prompt_is_the_document_without_eos(document):
    chunk, prompt = encode_document(document, VOCABULARY), encode_document(document, VOCABULARY, add_eos=False)
    assert prompt.tokens.tolist() == chunk.tokens[:-1].tolist()
    assert prompt.targets.tolist() == [*chunk.targets[:-2].tolist(), NO_TARGET]
    assert [p.start for p in prompt.images] == [p.start for p in chunk.images]
    longer = prompt.append(VOCABULARY.eoi)
    assert longer.tokens.tolist() == [*prompt.tokens.tolist(), VOCABULARY.eoi]
    assert longer.targets.tolist() == [*prompt.targets.tolist(), NO_TARGET]
    assert len(longer.can_break) == len(longer)


@some
@given(documents(min_images=2), st.integers(0, 2**62))
def test_image_keys_differ_and_depend_on_the_document_key(document, other_key):
    keys = [placed.key for placed in encode_document(document, VOCABULARY).images]
    assert len(set(keys)) == len(keys)
    assert keys == [placed.key for placed in encode_document(document, VOCABULARY).images]
    other = Document(document.segments, document.id, document.source, other_key)
    if other_key != document.key:
        assert not set(keys) & {placed.key for placed in encode_document(other, VOCABULARY).images}


# Splits


def units_of(document: Document) -> list[int]:
    """Lengths of indivisible parts: a token, an image with its markers, a pair; the last one includes eos."""
    lengths = [
        [1] * len(segment.tokens) if isinstance(segment, Text) else [VOCABULARY.num_patches(segment.shape) + 2]
        for segment in document.segments
    ]
    if document.pairs:
        lengths = [[sum(first) + sum(second)] for first, second in zip(lengths[::2], lengths[1::2], strict=True)]
    units = [1, *(unit for segment in lengths for unit in segment)]
    return [*units[:-1], units[-1] + 1]


lengths = st.just(0) | st.integers(2, 24)  # 0: the longest unit of the document


def check_split(document: Document, length: int):
    chunk = encode_document(document, VOCABULARY)
    length = length or max(units_of(document))
    if max(units_of(document)) > length:
        with pytest.raises(ValueError, match="does not fit"):
            split_chunk(chunk, length)
        return
    parts = split_chunk(chunk, length)
    assert all(0 < len(part) <= length for part in parts)
    assert np.concatenate([part.tokens for part in parts]).tolist() == chunk.tokens.tolist()
    targets = [part.targets for part in parts]  # the last position of a part still has its target
    assert np.concatenate(targets).tolist() == chunk.targets.tolist()
    starts = np.cumsum([0] + [len(part) for part in parts])
    images = [
        (start + placed.start, placed.image, placed.key)
        for start, part in zip(starts, parts, strict=False)
        for placed in part.images
    ]
    assert images == [(placed.start, placed.image, placed.key) for placed in chunk.images]
    allowed = np.cumsum([0, *units_of(document)])  # never inside an image or between it and its caption
    assert set(starts[:-1].tolist()) <= set(allowed[:-1].tolist())


@many
@given(documents(), lengths)
def test_split_keeps_all_positions_and_images_whole(document, length):
    check_split(document, length)


@many
@given(pair_documents(), lengths)
def test_split_keeps_captions_with_their_images(document, length):
    check_split(document, length)  # also with empty captions


def test_document_that_fits_is_not_split():
    document = Document((Text(tuple(range(20))), image((4, 4), 0), Text((1, 2, 3))))
    chunk = encode_document(document, VOCABULARY)
    assert len(split_chunk(chunk, len(chunk))) == 1
    assert [len(part) for part in split_chunk(chunk, len(chunk) - 1)] != [len(chunk)]


# Batches


@some
@given(batches())
def test_collate_places_every_position(packed):
    rows, batch = packed
    tokens = [[VOCABULARY.pad] * LENGTH for _ in rows]
    document_ids = [[-1] * LENGTH for _ in rows]
    position_ids = [list(range(LENGTH)) for _ in rows]
    clean_starts = [[NO_IMAGE] * LENGTH for _ in rows]
    targets = []
    for b, row in enumerate(rows):
        column = 0
        for number, chunk in enumerate(row.chunks):
            begin = column
            for i in range(len(chunk.tokens)):
                tokens[b][column], document_ids[b][column], position_ids[b][column] = chunk.tokens[i], number, i
                if chunk.targets[i] != NO_TARGET:
                    targets.append((b * LENGTH + column, int(chunk.targets[i])))
                column += 1
            for copy in chunk.copies:
                for i in range(VOCABULARY.num_patches(copy.image.shape)):
                    document_ids[b][column], position_ids[b][column] = number, copy.start + i
                    clean_starts[b][column] = begin + copy.start
                    column += 1
        position_ids[b][column:] = range(LENGTH - column)
    assert batch.tokens.tolist() == tokens
    assert batch.document_ids.tolist() == document_ids
    assert batch.position_ids.tolist() == position_ids
    has_copies = any(chunk.copies for row in rows for chunk in row.chunks)
    assert (batch.clean_starts.tolist() if has_copies else batch.clean_starts) == (clean_starts if has_copies else None)
    assert list(zip(batch.text_index.tolist(), batch.text_target.tolist(), strict=True)) == targets
    assert batch.text_count == len(targets)
    assert batch.positions == sum(len(chunk) for row in rows for chunk in row.chunks)


@some
@given(batches(min_images=1))
def test_collate_groups_images_by_shape_with_patch_positions(packed):
    rows, batch = packed
    expected: dict[tuple, list] = {}
    image_ids = torch.full((len(rows), LENGTH), NO_IMAGE)
    numbers = [0] * len(rows)
    for b, begin, chunk in positioned_chunks(rows):
        end = begin + len(chunk.tokens)
        for n, placed in enumerate(chunk.images + chunk.copies):
            length, is_copy = VOCABULARY.num_patches(placed.image.shape), n >= len(chunk.images)
            start = end if is_copy else begin + placed.start
            end += length * is_copy
            patches = range(start, start + length)
            image_ids[b, patches.start : patches.stop] = numbers[b]
            numbers[b] += 1
            expected.setdefault(placed.image.shape, []).append(([b * LENGTH + i for i in patches], placed))
    assert batch.image_ids.tolist() == image_ids.tolist()
    assert [tuple(group.x0.shape[2:]) for group in batch.groups] == sorted(expected)
    for group in batch.groups:
        shape = tuple(group.x0.shape[2:])
        index, placed = zip(*expected[shape], strict=True)
        assert group.index.tolist() == list(index)
        in_text = group.index[:, 0]
        if batch.clean_starts is not None:  # a copy has no markers
            in_text = in_text[batch.clean_starts.view(-1)[in_text] == NO_IMAGE]
        assert (batch.tokens.view(-1)[in_text - 1] == VOCABULARY.boi[shape]).all()
        assert (batch.tokens.view(-1)[in_text + group.index.shape[1]] == VOCABULARY.eoi).all()
        assert np.array_equal(group.x0.numpy(), np.stack([p.image.content for p in placed]))
        assert group.max_t.tolist() == [p.image.max_t for p in placed]
        assert group.loss.tolist() == [p.image.loss and p.image.max_t > 0 for p in placed]
        assert group.keys == [p.key for p in placed]
    assert batch.image_count == sum(int(group.loss.sum()) for group in batch.groups)


@some
@given(documents(), st.integers(8, 24))
def test_position_ids_start_at_0_in_every_chunk(document, length):
    for chunk in chunks_of(document, length):
        assert alone(chunk).position_ids.tolist() == [list(range(len(chunk)))]


@some
@given(batches(min_images=1))
def test_batch_moves_all_its_tensors(packed):
    batch = packed[1].to("meta")
    for part in (batch, *batch.groups):
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 4
        assert {tensor.device.type for tensor in tensors} == {"meta"}


# Token ids

sides = st.integers(1, 40).map(lambda n: 2 * n)
sizes = st.lists(st.tuples(sides, sides), unique=True, max_size=5)


@st.composite
def vocabularies(draw):
    """Vocabularies of tokenizers of any size, with or without bos, eos and pad."""
    num_text_tokens = draw(st.integers(3, 1000))
    tokenizer_ids = draw(st.permutations(range(min(num_text_tokens, 8))))[:3]
    bos, eos, pad = (id_ if draw(st.booleans()) else None for id_ in tokenizer_ids)
    vocabulary = Vocabulary.build(num_text_tokens, draw(sizes), patch_size=2, bos=bos, eos=eos, pad=pad)
    return (num_text_tokens, bos, eos, pad), vocabulary


@many
@given(vocabularies())
def test_token_ids_are_unique_and_without_gaps(built):
    (num_text_tokens, *tokenizer_ids), vocabulary = built
    special = [vocabulary.bos, vocabulary.eos, vocabulary.pad]
    markers = [vocabulary.eoi, *vocabulary.boi.values()]
    assert len({*special, *markers}) == len(special) + len(markers)
    for id_, reused in zip(special, tokenizer_ids, strict=True):
        assert id_ == reused if reused is not None else id_ >= num_text_tokens
    assert all(id_ >= num_text_tokens for id_ in markers)
    assert vocabulary.num_used == max(num_text_tokens - 1, *special, *markers) + 1
    assert vocabulary.num_used == num_text_tokens + sum(id_ is None for id_ in tokenizer_ids) + len(markers)  # no gaps
    assert vocabulary.size % 128 == 0
    assert 0 <= vocabulary.size - vocabulary.num_used < 128


@some
@given(vocabularies())
def test_vocabulary_json_round_trip(built):
    vocabulary = built[1]
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


@some
@given(vocabularies())
def test_boi_determines_the_shape(built):
    vocabulary = built[1]
    for id_ in range(vocabulary.size):
        shape = vocabulary.shape_of(id_)
        assert (shape is None) == (id_ not in vocabulary.boi.values())
        assert shape is None or vocabulary.boi[shape] == id_


def test_number_of_patches_of_a_shape():
    assert [VOCABULARY.num_patches(shape) for shape in SHAPES] == [4, 3, 1]


# Seeds


@many
@given(st.lists(st.integers() | st.text(max_size=3), min_size=1, max_size=4), st.data())
def test_seeds_distinguish_strings_and_numbers(parts, data):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert derive_seed(*parts) == seed
    assert 0 <= uniform_from(*parts) < 1
    other = data.draw(
        st.lists(st.integers() | st.text(max_size=3), min_size=1, max_size=4) | st.permutations(parts)
    )
    assert (derive_seed(*other) == seed) == (list(other) == list(parts))
    if isinstance(parts[0], int):
        assert derive_seed(str(parts[0]), *parts[1:]) != seed


def test_seeds_are_stable_across_versions():
    """Otherwise runs of an earlier version could not be resumed."""
    assert derive_seed(0, "digits", 3) == 8000709125305087585
    assert uniform_from("digits", 7) == 0.5243992522753965
