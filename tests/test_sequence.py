"""How text and images lie in one sequence: layout, targets, cuts and batches, against slow, obvious code."""

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
    documents,
    image,
    many,
    pair_documents,
    pieces_of,
    places,
    some,
)
from transfusion.seeding import derive_seed, uniform_from
from transfusion.sequence import NO_IMAGE, NO_TARGET, Document, Image, Text, Vocabulary, encode_document, split_chunk

# The layout


def slots_of(document: Document) -> list[tuple[str, int, bool]]:
    """The rule spelt out: (what it is, its id, is its segment to be learnt) of every position."""
    slots = [("bos", VOCABULARY.bos, False)]
    for segment in document.segments:
        if isinstance(segment, Text):
            slots += [("text", token, segment.loss) for token in segment.tokens]
        else:
            y, x = segment.shape
            patches = (y // VOCABULARY.patch_size) * (x // VOCABULARY.patch_size)
            slots.append(("boi", VOCABULARY.boi[y, x], segment.loss))
            slots += [("patch", VOCABULARY.pad, segment.loss)] * patches
            slots.append(("eoi", VOCABULARY.eoi, segment.loss))
    last = document.segments[-1].loss if document.segments else True
    return [*slots, ("eos", VOCABULARY.eos, last)]


@many
@given(documents() | pair_documents())
def test_positions_are_bos_segments_eos(document):
    chunk, slots = encode_document(document, VOCABULARY), slots_of(document)
    assert chunk.tokens.tolist() == [token for _, token, _ in slots]
    starts = [i + 1 for i, (what, *_) in enumerate(slots) if what == "boi"]
    assert [placed.start for placed in chunk.images] == starts
    inside = [segment for segment in document.segments if isinstance(segment, Image)]
    assert [placed.image for placed in chunk.images] == inside
    assert all((placed.document, placed.source) == (document.id, document.source) for placed in chunk.images)


@many
@given(documents() | pair_documents())
def test_a_position_is_trained_iff_the_next_slot_is_a_token_to_be_learnt_and_no_eoi(document):
    chunk, slots = encode_document(document, VOCABULARY), slots_of(document)
    expected = [
        token if learnt and what in ("text", "boi", "eos") else NO_TARGET for what, token, learnt in slots[1:]
    ] + [NO_TARGET]
    assert chunk.targets.tolist() == expected
    for (what, *_), target in zip(slots, chunk.targets, strict=True):
        assert target not in (VOCABULARY.eoi, VOCABULARY.pad, VOCABULARY.bos)
        assert what not in ("boi", "patch") or target == NO_TARGET  # the next slot is a patch or eoi


@some
@given(documents() | pair_documents())
def test_a_prompt_is_the_document_without_its_end(document):
    whole, prompt = encode_document(document, VOCABULARY), encode_document(document, VOCABULARY, ends=False)
    assert prompt.tokens.tolist() == whole.tokens[:-1].tolist()
    assert prompt.targets.tolist() == [*whole.targets[:-2].tolist(), NO_TARGET]
    assert [p.start for p in prompt.images] == [p.start for p in whole.images]
    longer = prompt.append(VOCABULARY.eoi)
    assert longer.tokens.tolist() == [*prompt.tokens.tolist(), VOCABULARY.eoi]
    assert longer.targets.tolist() == [*prompt.targets.tolist(), NO_TARGET]
    assert len(longer.can_break) == len(longer)


@some
@given(documents(min_images=2), st.integers(0, 2**62))
def test_images_have_chances_of_their_own_that_follow_from_the_documents(document, other_key):
    keys = [placed.key for placed in encode_document(document, VOCABULARY).images]
    assert len(set(keys)) == len(keys)
    assert keys == [placed.key for placed in encode_document(document, VOCABULARY).images]
    other = Document(document.segments, document.id, document.source, other_key)
    if other_key != document.key:
        assert not set(keys) & {placed.key for placed in encode_document(other, VOCABULARY).images}


# Cuts


def units_of(document: Document) -> list[int]:
    """Lengths of what may not be cut: a token, an image with its markers, a pair; eos stays with the last."""
    lengths = [
        [1] * len(segment.tokens) if isinstance(segment, Text) else [VOCABULARY.patches(segment.shape) + 2]
        for segment in document.segments
    ]
    if document.pairs:
        lengths = [[sum(one) + sum(other)] for one, other in zip(lengths[::2], lengths[1::2], strict=True)]
    units = [1, *(unit for segment in lengths for unit in segment)]
    return [*units[:-1], units[-1] + 1]


lengths = st.just(0) | st.integers(2, 24)  # 0: the shortest row that must do


def check_cut(document: Document, length: int):
    whole = encode_document(document, VOCABULARY)
    length = length or max(units_of(document))
    if max(units_of(document)) > length:
        with pytest.raises(ValueError, match="does not fit"):
            split_chunk(whole, length)
        return
    parts = split_chunk(whole, length)
    assert all(0 < len(part) <= length for part in parts)
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole.tokens.tolist()
    targets = [part.targets for part in parts]  # across cuts too: the last of a part is still trained
    assert np.concatenate(targets).tolist() == whole.targets.tolist()
    starts = np.cumsum([0] + [len(part) for part in parts])
    images = [
        (start + placed.start, placed.image, placed.key)
        for start, part in zip(starts, parts, strict=False)
        for placed in part.images
    ]
    assert images == [(placed.start, placed.image, placed.key) for placed in whole.images]
    allowed = np.cumsum([0, *units_of(document)])  # not through an image, not between it and its caption
    assert set(starts[:-1].tolist()) <= set(allowed[:-1].tolist())


@many
@given(documents(), lengths)
def test_a_cut_loses_nothing_repeats_nothing_and_spares_images(document, length):
    check_cut(document, length)


@many
@given(pair_documents(), lengths)
def test_a_cut_keeps_captions_with_their_images(document, length):
    check_cut(document, length)  # also where a caption is empty


def test_what_fits_is_not_cut():
    document = Document((Text(tuple(range(20))), image((4, 4), 0), Text((1, 2, 3))))
    whole = encode_document(document, VOCABULARY)
    assert len(split_chunk(whole, len(whole))) == 1
    assert [len(part) for part in split_chunk(whole, len(whole) - 1)] != [len(whole)]


# Batches


@some
@given(batches())
def test_collate_puts_every_position_where_it_belongs(found):
    rows, batch = found
    tokens = [[VOCABULARY.pad] * LENGTH for _ in rows]
    document = [[-1] * LENGTH for _ in rows]
    position = [list(range(LENGTH)) for _ in rows]
    text = []
    for b, row in enumerate(rows):
        at = 0
        for number, chunk in enumerate(row.chunks):
            for i in range(len(chunk)):
                tokens[b][at], document[b][at], position[b][at] = chunk.tokens[i], number, i
                if chunk.targets[i] != NO_TARGET:
                    text.append((b * LENGTH + at, int(chunk.targets[i])))
                at += 1
        position[b][at:] = range(LENGTH - at)
    assert batch.tokens.tolist() == tokens
    assert batch.document_ids.tolist() == document
    assert batch.position_ids.tolist() == position
    assert list(zip(batch.text_index.tolist(), batch.text_target.tolist(), strict=True)) == text
    assert batch.text_count == len(text)
    assert batch.positions == sum(len(chunk) for row in rows for chunk in row.chunks)


@some
@given(batches(min_images=1))
def test_collate_groups_images_by_shape_and_says_where_their_patches_lie(found):
    rows, batch = found
    expected: dict[tuple, list] = {}
    image_of = torch.full((len(rows), LENGTH), NO_IMAGE)
    numbers = [0] * len(rows)
    for b, begin, chunk in places(rows):
        for placed in chunk.images:
            first = begin + placed.start
            patches = range(first, first + VOCABULARY.patches(placed.image.shape))
            image_of[b, patches.start : patches.stop] = numbers[b]
            numbers[b] += 1
            expected.setdefault(placed.image.shape, []).append(([b * LENGTH + i for i in patches], placed))
    assert batch.image_ids.tolist() == image_of.tolist()
    assert [tuple(group.x0.shape[2:]) for group in batch.groups] == sorted(expected)
    for group in batch.groups:
        shape = tuple(group.x0.shape[2:])
        index, placed = zip(*expected[shape], strict=True)
        assert group.index.tolist() == list(index)
        assert (batch.tokens.view(-1)[group.index[:, 0] - 1] == VOCABULARY.boi[shape]).all()
        assert (batch.tokens.view(-1)[group.index[:, -1] + 1] == VOCABULARY.eoi).all()
        assert np.array_equal(group.x0.numpy(), np.stack([p.image.content for p in placed]))
        assert group.max_t.tolist() == [p.image.max_t for p in placed]
        assert group.loss.tolist() == [p.image.loss and p.image.max_t > 0 for p in placed]
        assert group.keys == [p.key for p in placed]
        assert group.documents == [p.document for p in placed]
        assert group.sources == [p.source for p in placed]
    assert batch.image_count == sum(int(group.loss.sum()) for group in batch.groups)


@some
@given(documents(), st.integers(8, 24))
def test_positions_restart_in_every_piece(document, length):
    for chunk in pieces_of(document, length):
        assert alone(chunk).position_ids.tolist() == [list(range(len(chunk)))]


@some
@given(batches(min_images=1))
def test_a_batch_moves_whole(found):
    batch = found[1].to("meta")
    for part in (batch, *batch.groups):
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 4
        assert {tensor.device.type for tensor in tensors} == {"meta"}


# Ids

sides = st.integers(1, 40).map(lambda n: 2 * n)
sizes = st.lists(st.tuples(sides, sides), unique=True, max_size=5)


@st.composite
def vocabularies(draw):
    """Tokenizers of any size, with any of bos, eos and pad among their own ids."""
    text = draw(st.integers(3, 1000))
    own = draw(st.permutations(range(min(text, 8))))[:3]
    bos, eos, pad = (id_ if draw(st.booleans()) else None for id_ in own)
    return (text, bos, eos, pad), Vocabulary.build(text, draw(sizes), patch_size=2, bos=bos, eos=eos, pad=pad)


@many
@given(vocabularies())
def test_ids_never_mean_two_things(found):
    (text, *own), vocabulary = found
    special = [vocabulary.bos, vocabulary.eos, vocabulary.pad]
    markers = [vocabulary.eoi, *vocabulary.boi.values()]
    assert len({*special, *markers}) == len(special) + len(markers)
    for id_, reused in zip(special, own, strict=True):
        assert id_ == reused if reused is not None else id_ >= text
    assert all(id_ >= text for id_ in markers)
    assert vocabulary.num_used == max(text - 1, *special, *markers) + 1
    assert vocabulary.num_used == text + sum(id_ is None for id_ in own) + len(markers)  # no holes
    assert vocabulary.size % 128 == 0
    assert 0 <= vocabulary.size - vocabulary.num_used < 128


@some
@given(vocabularies())
def test_a_vocabulary_survives_json(found):
    vocabulary = found[1]
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


@some
@given(vocabularies())
def test_a_boi_names_its_shape(found):
    vocabulary = found[1]
    for id_ in range(vocabulary.size):
        shape = vocabulary.shape_of(id_)
        assert (shape is None) == (id_ not in vocabulary.boi.values())
        assert shape is None or vocabulary.boi[shape] == id_


def test_patches_of_a_shape():
    assert [VOCABULARY.patches(shape) for shape in SHAPES] == [4, 3, 1]


# Chance


@many
@given(st.lists(st.integers() | st.text(max_size=3), min_size=1, max_size=4), st.data())
def test_seeds_tell_words_and_numbers_apart(what, data):
    seed = derive_seed(*what)
    assert 0 <= seed < 2**63
    assert derive_seed(*what) == seed
    assert 0 <= uniform_from(*what) < 1
    other = data.draw(
        st.lists(st.integers() | st.text(max_size=3), min_size=1, max_size=4) | st.permutations(what)
    )
    assert (derive_seed(*other) == seed) == (list(other) == list(what))
    if isinstance(what[0], int):
        assert derive_seed(str(what[0]), *what[1:]) != seed


def test_seeds_never_change():
    """Else a run of an earlier version could not be resumed."""
    assert derive_seed(0, "digits", 3) == 8000709125305087585
    assert uniform_from("digits", 7) == 0.5243992522753965
