"""Packing, reordering, the loader, the built-in sources, the tokenizer and the codecs."""

import warnings
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Engine

from tests.documents import (
    VOCABULARY,
    Notes,
    changed,
    contents,
    contents_of,
    documents,
    entries_of,
    few,
    image_lists,
    many,
    pair_documents,
    same_batch,
    some,
)
from tests.profile import examples, few_samples
from transfusion.codecs.codec import codec_from_tensors
from transfusion.codecs.pixels import MIN_STD, BlockPCA, Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, DigitsConfig
from transfusion.data import sources as run_sources
from transfusion.data.built_in.digits import NAMES, Digits, load_scans
from transfusion.data.built_in.topics import HELDOUT_EVERY, Topics, split_text
from transfusion.data.loader import START, DocumentEncoder, Loader, LoaderState, heldout_batches
from transfusion.data.packing import pack
from transfusion.data.raw import RawDocument, RawText
from transfusion.sequence import NO_TARGET, Document, Image, Text, Vocabulary, collate, encode_document, split_chunk

# Packing


@some
@given(st.lists(documents() | pair_documents(), max_size=8), st.integers(20, 60), st.integers(0, 99))
def test_packing_keeps_every_position_once_and_fits_rows(documents, length, seed):
    rows = pack(documents, length, VOCABULARY, seed)
    split = [split_chunk(encode_document(document, VOCABULARY), length) for document in documents]
    chunks = [contents(chunk) for parts in split for chunk in parts]
    assert Counter(chunk for row in contents_of(rows) for chunk in row) == Counter(chunks)
    used = [sum(len(chunk) for chunk in row.chunks) for row in rows]
    assert all(0 < n <= length for n in used)
    assert all(a + b > length for a, b in combinations(used, 2))  # no two rows fit into one


@some
@given(st.lists(documents(), max_size=8), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_packing_is_a_pure_function(documents, seed, global_seed):
    expected = contents_of(pack(documents, 30, VOCABULARY, seed))
    np.random.seed(global_seed)
    torch.manual_seed(global_seed)
    assert contents_of(pack(iter(documents), 30, VOCABULARY, seed)) == expected


def test_packing_shuffles_rows_and_chunks():
    texts = [Document((Text(tuple(range(n % 7))),), id=n) for n in range(60)]
    first, second = (contents_of(pack(texts, 30, VOCABULARY, seed)) for seed in (0, 1))
    assert first != second
    assert Counter(tuple(sorted(row)) for row in first) == Counter(tuple(sorted(row)) for row in second)
    lengths = [[len(chunk) for chunk, *_ in row] for row in first]
    assert any(row != sorted(row, reverse=True) for row in lengths)


# Reordering and dropping


def pair(key: int, pairs: int = 1) -> Document:
    latent = np.zeros((3, 4, 4), dtype=np.float32)
    return Document((Text((1, 2)), Image(latent)) * pairs, key=key, pairs=True)


def test_image_first_and_caption_dropout_have_the_configured_rates():
    config = DataConfig(image_first=0.3, caption_dropout=0.2, image_first_max_t=0.5)
    documents = [changed(pair(key), config) for key in range(5000)]
    dropped = [document.segments[1] == Text((), loss=False) for document in documents]
    image_first = [isinstance(document.segments[0], Image) and not is_dropped
                   for document, is_dropped in zip(documents, dropped, strict=True)]  # fmt: skip
    assert abs(np.mean(image_first) - 0.3) < 0.02
    caption_first = [is_dropped for is_dropped, is_first in zip(dropped, image_first, strict=True) if not is_first]
    assert abs(np.mean(caption_first) - 0.2) < 0.02
    for document, is_dropped, is_first in zip(documents, dropped, image_first, strict=True):
        image = document.segments[0 if is_dropped or is_first else 1]
        assert image.max_t == (0.5 if is_first else 1.0)


@many
@given(pair_documents(caption_first=st.just(True)), st.sampled_from((0.0, 0.5, 1.0)))
def test_image_first_swaps_every_pair_and_limits_max_t(document, limit):
    config = DataConfig(image_first=1.0, caption_dropout=1.0, image_first_max_t=limit)
    segments = changed(document, config).segments
    assert segments[1::2] == document.segments[::2]  # captions and their loss are unchanged
    for swapped, image in zip(segments[::2], document.segments[1::2], strict=True):
        assert swapped.content is image.content
        assert swapped.loss == image.loss
        assert swapped.max_t == min(limit, image.max_t)


@many
@given(pair_documents(caption_first=st.just(True)))
def test_dropped_caption_leaves_bos_boi_and_no_loss_after_the_image(document):
    dropped = changed(document, DataConfig(image_first=0.0, caption_dropout=1.0))
    if len(document.segments) > 2:
        assert dropped == document  # only single pairs lose their caption
        return
    chunk = encode_document(dropped, VOCABULARY)
    image = document.segments[1]
    assert chunk.tokens[:2].tolist() == [VOCABULARY.bos, VOCABULARY.boi[image.shape]]
    assert chunk.tokens[-2:].tolist() == [VOCABULARY.eoi, VOCABULARY.eos]
    assert (chunk.targets[1:] == NO_TARGET).all()
    assert (chunk.targets[0] != NO_TARGET) == image.loss
    assert chunk.images[0].image is image


@some
@given(documents(), pair_documents(caption_first=st.just(True)))
def test_only_pairs_are_changed_and_only_if_configured(document, of_pairs):
    always = DataConfig(image_first=1.0, caption_dropout=1.0, condition_text_dropout=0.0, condition_dropout=0.0)
    assert changed(document, always) == document
    assert changed(of_pairs, DataConfig(image_first=0.0, caption_dropout=0.0)) == of_pairs


# The loader


@cache
def encoder() -> DocumentEncoder:
    """Each byte is an id; images are not compressed."""
    tokenizer = Tokenizer.train(["abc"], 256)
    codec = Pixels.fit([np.arange(256, dtype=np.uint8).reshape(16, 16, 1)])
    config = DataConfig(seq_len=96, shuffle_block=32)
    vocabulary = Vocabulary.build(tokenizer.size, [(4, 4), (8, 8)], patch_size=2)
    return DocumentEncoder(tokenizer, codec, vocabulary, config, seed=0)


def loader(batch_size: int = 2, rank: int = 0, world: int = 1, seed: int = 0, **config) -> Loader:
    configured = replace(encoder(), config=replace(encoder().config, **config), seed=seed)
    return Loader([Notes("one", 5000), Notes("two", 1000, 40)], configured, batch_size, rank, world)


def take(number: int, loader: Loader, start: LoaderState = START) -> list:
    """The loader's rows of the first steps as batches, each with the state after it."""
    return [(collate(rows, 96, loader.vocabulary), state) for rows, state in islice(loader.batches(start), number)]


@examples(8)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 4), st.sampled_from((5, 12, 16)))
def test_ranks_split_the_rows_of_a_single_rank(seed, rows, world, block):
    """Rank r of 4 gets the rows r, r + 4, ... of each step of a single rank."""
    single = take(4, loader(rows * world, seed=seed, shuffle_block=block))
    ranks = [take(4, loader(rows * world, rank, world, seed, shuffle_block=block)) for rank in range(world)]
    for n, (batch, state) in enumerate(single):
        assert {batches[n][1] for batches in ranks} == {state}
        for rank in range(world):
            part = ranks[rank][n][0]
            for name in ("tokens", "position_ids", "grid_offsets", "document_ids", "image_ids"):
                assert torch.equal(getattr(part, name), getattr(batch, name)[rank::world])
        keys = Counter(key for batches in ranks for group in batches[n][0].groups for key in group.keys)
        assert keys == Counter(key for group in batch.groups for key in group.keys)
        assert sum(batches[n][0].text_count for batches in ranks) == batch.text_count


@few
@given(
    st.integers(0, 99), st.integers(1, 3), st.sampled_from((3, 8, 16)), st.integers(0, 7), st.integers(1, 2)
)
def test_loader_resumes_from_any_state(seed, rows, block, interrupted, world):
    expected = take(9, loader(rows * world, 0, world, seed, shuffle_block=block))
    state = expected[interrupted][1]
    resumed = take(8 - interrupted, loader(rows * world, 0, world, seed, shuffle_block=block), state)
    for (batch, after), (resumed_batch, resumed_after) in zip(expected[interrupted + 1 :], resumed, strict=True):
        assert after == resumed_after
        assert same_batch(batch, resumed_batch)


def test_iterators_of_one_loader_are_independent():
    expected, shared = take(6, loader()), loader()
    iterator = ((collate(rows, 96, shared.vocabulary), state) for rows, state in shared.batches())
    first = [next(iterator) for _ in range(3)]
    np.random.seed(1)
    torch.manual_seed(1)
    second = take(6, shared)
    first += islice(iterator, 3)
    for (batch, state), *pairs in zip(expected, first, second, strict=True):
        for other_batch, other_state in pairs:
            assert state == other_state
            assert same_batch(batch, other_batch)


def test_batches_are_the_rows_of_the_blocks_in_order():
    reader = loader(3)
    rows = [row for block in range(4) for row in reader.block(block)]
    for n, (batch, _) in enumerate(take(len(rows) // 3, reader)):
        assert same_batch(batch, collate(rows[3 * n : 3 * n + 3], 96, reader.encoder.vocabulary))


@pytest.mark.parametrize("together", [1, 5, 32, 64])
def test_block_contains_each_of_its_documents_once(monkeypatch, together):
    monkeypatch.setattr("transfusion.data.loader.ENCODED_TOGETHER", together)
    reader = loader()
    for block in (0, 3):
        expected = [
            reader.encoder.to_document(reader.sources[source][id_], reader.sources[source].name, epoch)
            for source, epoch, id_ in entries_of(reader, block)
        ]
        chunks = [split_chunk(encode_document(document, reader.encoder.vocabulary), 96) for document in expected]
        packed = Counter(chunk for row in contents_of(reader.block(block)) for chunk in row)
        assert packed == Counter(contents(chunk) for parts in chunks for chunk in parts)


def test_each_epoch_reads_every_document_once_in_a_new_order():
    sources = [Notes("one", 50), Notes("two", 13, 40)]
    small = replace(encoder(), config=replace(encoder().config, shuffle_block=20))
    entries = entries_of(Loader(sources, small, 1), 0, 20)
    for number, source in enumerate(sources):
        ids = [(epoch, id_) for index, epoch, id_ in entries if index == number]
        epochs = [[id_ for e, id_ in ids if e == epoch] for epoch in range(len(ids) // len(source))]
        assert len(epochs) >= 2
        assert all(sorted(order) == list(range(len(source))) for order in epochs)
        assert len({tuple(order) for order in epochs}) == len(epochs)
        assert [epoch for epoch, _ in ids] == sorted(epoch for epoch, _ in ids)
    assert entries_of(Loader(sources, replace(small, seed=1), 1), 0, 2) != entries[:40]


def test_document_key_depends_on_seed_source_epoch_and_id():
    raw, other_raw = Notes("one", 9)[3], Notes("one", 9)[6]
    keys = [
        replace(encoder(), seed=seed).to_document(document, source, epoch).key
        for seed in (0, 1) for source in ("one", "two") for epoch in (0, 1) for document in (raw, other_raw)
    ]  # fmt: skip
    assert len(set(keys)) == 16
    assert encoder().to_document(raw, "one", 0).key == keys[0]


@some
@given(st.lists(st.tuples(st.sampled_from(("", "a", "é <s>", "<s>", "<s> a<s>")), st.booleans(), st.booleans()), max_size=9),
       st.integers(1, 4))  # fmt: skip
def test_documents_encoded_together_equal_each_alone(texts, per_document):
    """With and without special tokens in the text, in any order, beside images and documents that are encoded already."""
    tokenizer = Tokenizer.train(["abc"], 256)
    engine = Engine.from_str(tokenizer.to_json())
    engine.add_special_tokens([AddedToken("<s>", special=True)])
    special = replace(encoder(), tokenizer=Tokenizer(engine))
    parts = [(RawText(text, loss, parse_special), Notes("one", 9)[0].segments[1]) for text, loss, parse_special in texts]
    raw = [RawDocument(sum(parts[n : n + per_document], ()), id=n) for n in range(0, len(parts), per_document)]
    entries = [(document, "one", 0) for document in (*raw, Document((Text((1, 2)),), id=99))]
    together, alone = special.encode([document for document, *_ in entries]), [special.to_document(*e) for e in entries]
    assert [encode_document(a, special.vocabulary).tokens.tolist() for a in together] == [
        encode_document(a, special.vocabulary).tokens.tolist() for a in alone
    ]
    for (document, *_), result in zip(entries, together, strict=True):
        for part, encoded in zip(document.segments, result.segments, strict=True):
            if isinstance(part, RawText):
                assert encoded.tokens == special.tokenizer.encode(part.text, part.parse_special)
                assert encoded.tokens.count(engine.token_to_id("<s>")) == part.text.count("<s>") * part.parse_special
                assert encoded.loss == part.loss


def test_text_that_cannot_be_encoded_is_named():
    with pytest.raises(ValueError, match=r"^'b\\ud800' is not valid Unicode \(it has a lone surrogate\)$"):
        Tokenizer.train(["abc"], 256).encode_batch(["a", "b\ud800", "c\ud801"])


@examples(12, quick=5)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3), st.lists(st.integers(8, 40), min_size=3, max_size=3)
)
def test_mixture_weights_are_shares_of_positions(weights, means):
    """Not of documents: a source of long documents is read less often."""
    sources = [Notes(name, 20_000, mean) for name, mean, _ in zip("abc", means, weights, strict=False)]
    config = replace(encoder().config, sources=tuple("abc"[: len(weights)]), mixture_weights=tuple(map(float, weights)))
    with few_samples(1024):
        reader = Loader(sources, replace(encoder(), config=config), 1)
    positions = Counter()
    for source, epoch, id_ in entries_of(reader, 0, 47):
        document = reader.encoder.to_document(sources[source][id_], sources[source].name, epoch)
        positions[source] += len(encode_document(document, reader.encoder.vocabulary))
    for source, weight in enumerate(weights):
        assert abs(positions[source] / positions.total() - weight / sum(weights)) < 0.02


@cache
def small_run() -> tuple[DataConfig, DocumentEncoder]:
    config = DataConfig(
        sources=("digits", "topics"), mixture_weights=(0.85, 0.15), seq_len=128, digits=DigitsConfig(interleaved=0.15)
    )
    return config, run_sources.fit(config, patch_size=2, seed=0)


def test_digits_and_topics_have_their_shares_within_a_few_blocks():
    config, fitted = small_run()
    with few_samples(1024):
        reader = Loader(run_sources.open_sources(config, "train"), fitted, 1)
    positions = [0, 0]
    for source, epoch, id_ in entries_of(reader, 0, 3):
        document = fitted.to_document(reader.sources[source][id_], reader.sources[source].name, epoch)
        positions[source] += len(encode_document(document, fitted.vocabulary))
    assert abs(positions[1] / sum(positions) - 0.15) < 0.02


def test_heldout_batches_are_fixed_and_keep_their_captions():
    config, fitted = small_run()
    source = run_sources.open_sources(config, "heldout")[0]
    dropping = replace(fitted, config=replace(config, caption_dropout=1.0))
    batches = heldout_batches(source, dropping, 40, 8)
    assert all(same_batch(*pair) for pair in zip(batches, heldout_batches(source, dropping, 40, 8), strict=True))
    for num_rows in (1, 3, 100):
        others = heldout_batches(source, dropping, 40, num_rows)
        assert max(len(batch.tokens) for batch in others) <= num_rows
        assert torch.equal(*(torch.cat([batch.tokens for batch in group]) for group in (batches, others)))
    documents = Counter(document for batch in batches for row in batch.documents for document in row)
    assert documents == Counter(f"digits {n}" for n in range(40))
    captions = {fitted.tokenizer.encode(name) for name in NAMES}
    starts = {caption[0] for caption in captions}
    count = sum(int(token in starts) for batch in batches for token in batch.tokens.flatten().tolist())
    assert count >= 40


# The sources


def test_digits_split_equals_sklearn():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    splits = train_test_split(range(1797), test_size=297, random_state=0, stratify=bunch.target)
    assert set(splits[0]).isdisjoint(splits[1])
    for indices, split in zip(splits, ("train", "heldout"), strict=True):
        pixels, labels = load_scans(split)
        assert labels.tolist() == bunch.target[indices].tolist()
        assert np.abs(pixels[..., 0] / 255 * 16 - bunch.images[indices]).max() < 0.04
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("interleaved", [0.0, 0.3, 1.0])
def test_training_digits_have_no_heldout_scan_and_correct_captions(interleaved):
    name_of = {
        scan.tobytes(): NAMES[label]
        for split in ("train", "heldout")
        for scan, label in zip(*load_scans(split), strict=True)
    }
    heldout = {scan.tobytes() for scan in load_scans("heldout")[0]}
    source, counts, partners = Digits("train", interleaved), [], set()
    for id_ in range(0, len(source), 16):
        document = source[id_]
        captions, images = document.segments[::2], document.segments[1::2]
        contents = [image.pixels.tobytes() for image in images]
        assert document.id == id_
        assert document.pairs
        assert not heldout & set(contents)
        assert [caption.text for caption in captions] == [name_of[pixels] for pixels in contents]
        counts.append(len(images))
        partners |= set(contents[1:])
    assert abs(np.mean([n > 1 for n in counts]) - interleaved) < 0.03
    assert set(counts) == {0.0: {1}, 0.3: {1, 2, 3, 4}, 1.0: {2, 3, 4}}[interleaved]
    assert len(partners) > 1200 or not interleaved  # of 1,500: any scan may be combined with any other


def test_heldout_digits_are_single_and_read_once():
    source = Digits("heldout", interleaved=1.0)
    documents = [source[n] for n in range(len(source))]
    assert len(documents) == 297
    assert all(len(document.segments) == 2 for document in documents)
    heldout = {scan.tobytes() for scan in load_scans("heldout")[0]}
    assert {document.segments[1].pixels.tobytes() for document in documents} == heldout


def test_topics_are_split_without_overlap():
    from pydoc_data.topics import topics

    train, heldout = Topics("train"), Topics("heldout")
    assert sorted(train.texts + heldout.texts) == sorted(topics.values())
    assert not set(train.texts) & set(heldout.texts)
    assert heldout.texts == [topics[name] for name in sorted(topics)[::HELDOUT_EVERY]]
    assert train.describe()["sha256"] != heldout.describe()["sha256"]
    for source in (train, heldout):  # the passages are the whole text, in order
        passages = [source[n].segments[0].text for n in range(len(source))]
        assert "".join(passages) == "".join(source.texts)
        assert all(source[n].id == n for n in range(len(source)))


@many
@given(st.lists(st.text("ab\n", max_size=12)).map("\n\n".join), st.integers(1, 30))
def test_text_is_split_only_between_paragraphs(text, max_chars):
    passages = split_text(text, max_chars)
    assert "".join(passages) == text
    for passage, following in zip(passages, passages[1:], strict=False):
        assert passage.endswith("\n\n")
        assert len(passage) <= max_chars or "\n\n" not in passage[:-2].rstrip("\n")
        assert len(passage) + len(following.split("\n\n")[0]) > max_chars - 2  # the next paragraph does not fit


def test_fit_reads_only_training_documents():
    config, fitted = small_run()
    source = Digits("train", config.digits.interleaved)
    images = [part.pixels for n in range(config.fit_documents) for part in source[n].segments[1::2]]
    expected = Pixels.fit(images)
    assert all(np.array_equal(x, expected.tensors()[name]) for name, x in fitted.codec.tensors().items())
    assert fitted.vocabulary.boi.keys() == {(8, 8)}
    assert fitted.vocabulary.num_text_tokens == fitted.tokenizer.size <= config.tokenizer_size


@pytest.mark.parametrize(("config", "patch_size", "word"), [
    (DataConfig(), 2, "sources"), (DataConfig(sources=("nothing",)), 2, "nothing"),
    (DataConfig(sources=("topics",)), 2, "no images"), (DataConfig(sources=("digits",)), 3, "patches"),
])  # fmt: skip
def test_unusable_data_gives_a_clear_error(config, patch_size, word):
    with pytest.raises(ValueError, match=word):
        run_sources.fit(config, patch_size, seed=0)


# The tokenizer

SPECIAL_STRINGS = ("<s>", "</s>", "<image>", "<|endoftext|>", " and the ", "Ġ", "\x00")
any_text = st.lists(st.text() | st.sampled_from(SPECIAL_STRINGS)).map("".join)


@cache
def trained() -> Tokenizer:
    return Tokenizer.train(["<s> one <image> two </s>"] * 5 + Topics("heldout").texts, 400)


@many
@given(any_text)
def test_tokenizer_round_trip_is_exact(text):
    ids = trained().encode(text)
    assert trained().decode(ids) == text
    assert all(0 <= id_ < trained().size <= 400 for id_ in ids)
    assert Tokenizer.from_json(trained().to_json()).encode(text) == ids


SPECIAL, ADDED = ("<s>", "</s>"), ("<image>", "<wide>")
CHARACTERS = [chr(c) for c in range(33, 127)]


def engine_of(model: str) -> Engine:
    """A foreign tokenizer with added tokens, some of which are also in the model's vocabulary."""
    vocab = {token: n for n, token in enumerate([*SPECIAL, *ADDED[:1], *CHARACTERS])}
    match model:
        case "bpe":
            engine = Engine(models.BPE(vocab=vocab, merges=[]))
        case "bpe with ignore_merges":
            engine = Engine(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
        case "unigram":
            scored = [(token, 0.0 if n < 3 else -5.0) for token, n in vocab.items()]
            engine = Engine(models.Unigram(scored, unk_id=3))
        case "words":
            engine = Engine(models.WordLevel(vocab=vocab, unk_token="!"))
    engine.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    engine.add_tokens([AddedToken(token, special=False) for token in ADDED])
    return engine


@pytest.mark.parametrize("model", ["bpe", "bpe with ignore_merges", "unigram", "words"])
@some
@given(text=st.lists(st.sampled_from((*SPECIAL, *ADDED, "a", "<", "s>"))).map("".join))
def test_text_that_spells_a_special_token_stays_text(model, text):
    engine = engine_of(model)
    special_ids = {engine.token_to_id(token) for token in (*SPECIAL, *ADDED)}
    for tokenizer in (Tokenizer(engine), Tokenizer.from_json(engine.to_str()),
                      Tokenizer.from_json(Tokenizer(engine).to_json())):  # fmt: skip
        assert not special_ids & set(tokenizer.encode(text))
        if model == "bpe":
            assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text


@many
@given(any_text)
def test_added_tokens_do_not_change_the_encoding_of_text(text):
    engine = Engine.from_str(trained().to_json())
    engine.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    engine.add_tokens([AddedToken("nd th", special=False), AddedToken("</s", special=False)])
    assert Tokenizer(engine).encode(text) == trained().encode(text)


@some
@given(st.text("ab\n\t"))
def test_added_tokens_needed_for_a_character_are_kept(text):
    """Gemma's newline is such a token; without it texts would lose their line breaks."""
    engine = Engine(models.BPE(vocab={"a": 0, "b": 1, "\n": 2, "\t": 3}, merges=[]))
    engine.decoder = decoders.Fuse()
    engine.add_tokens([AddedToken("\n", special=False, normalized=False), AddedToken("\t", special=False)])
    tokenizer = Tokenizer(engine)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_size_is_the_largest_id_plus_one():
    """Otherwise markers would share ids with tokens after a gap in the vocabulary."""
    tokenizer = Tokenizer(Engine(models.BPE(vocab={"a": 0, "b": 9}, merges=[])))
    assert max(tokenizer.encode("ab")) < tokenizer.size


def test_invalid_tokenizer_gives_a_clear_error():
    with pytest.raises(ValueError, match="256"):
        Tokenizer.train(["abc"], 255)
    for text in ("", "{}", "[1]", "null", '{"model": 3}'):
        with pytest.raises(ValueError, match="not a tokenizer"):
            Tokenizer.from_json(text)


# The codecs


def check_statistics(codec, images):
    """Mean 0; standard deviation 1 for channels that change by a grey level or more, less for others; tight bounds."""
    latents = np.stack([codec.encode(image) for image in images])  # (n, C, Y, X)
    assert latents.dtype == np.float32
    values = latents.transpose(1, 0, 2, 3).reshape(codec.channels, -1)
    is_varying = codec.std > MIN_STD
    assert np.abs(values.mean(1)).max() < 1e-3
    assert np.abs(values.std(1)[is_varying] - 1).max(initial=0) < 1e-3
    assert values.std(1)[~is_varying].max(initial=0) < 1 + 1e-3
    assert np.allclose(values.min(1), codec.low, atol=1e-4)
    assert np.allclose(values.max(1), codec.high, atol=1e-4)


def check_rebuilt(codec, image):
    rebuilt = codec_from_tensors(codec.kind, {name: np.array(values) for name, values in codec.tensors().items()})
    assert np.array_equal(rebuilt.encode(image), codec.encode(image))
    assert np.array_equal(rebuilt.decode(codec.encode(image)), codec.decode(codec.encode(image)))
    assert (rebuilt.channels, rebuilt.downsampling, rebuilt.image_channels) == (
        codec.channels,
        codec.downsampling,
        codec.image_channels,
    )
    assert rebuilt.image_channels == image.shape[2]


@some
@given(image_lists())
def test_pixels_round_trip_is_exact(images):
    codec = Pixels.fit(images)
    check_statistics(codec, images)
    check_rebuilt(codec, images[0])
    for image in images:
        assert codec.encode(image).shape == (image.shape[2], *image.shape[:2])
        assert np.array_equal(codec.decode(codec.encode(image)), image)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # in sklearn
@some
@given(image_lists(), st.sampled_from((2, 4)), st.integers(1, 4))
def test_block_pca_equals_sklearn_pca(images, block, components):
    from sklearn.decomposition import PCA

    codec = BlockPCA.fit(images, block, components)
    check_statistics(codec, images)
    check_rebuilt(codec, images[0])
    Y, X, channels = images[0].shape
    blocks = np.stack([
        image[y : y + block, x : x + block].ravel()
        for image in images for y in range(0, Y, block) for x in range(0, X, block)
    ]).astype(np.float64)  # fmt: skip
    pca = PCA(components, svd_solver="full").fit(blocks)
    expected = pca.inverse_transform(pca.transform(blocks)).clip(0, 255)
    decoded = np.concatenate([
        codec.decode(codec.encode(image)).reshape(Y // block, block, X // block, block, channels)
        .transpose(0, 2, 1, 3, 4).reshape(-1, block * block * channels) for image in images
    ])  # fmt: skip
    variances = np.linalg.eigvalsh(np.cov(blocks, rowvar=False))[::-1][: components + 1]
    if np.diff(variances).max(initial=-1) < -1e-6:  # with equal variances the components are not unique
        assert np.abs(decoded - expected).max() <= 0.5 + 1e-2
        assert np.allclose(np.abs(codec.components @ pca.components_.T), np.eye(components), atol=1e-5)
    assert codec.encode(images[0]).shape == (components, Y // block, X // block)


@some
@given(image_lists())
def test_block_pca_with_all_components_is_lossless(images):
    codec = BlockPCA.fit(images, 2, 4 * images[0].shape[2])
    for image in images:
        assert np.abs(codec.decode(codec.encode(image)).astype(int) - image).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("side", "block"), [(1, 1), (4, 1), (4, 4), (8, 4)])
@pytest.mark.parametrize("is_constant", [True, False])
def test_codecs_of_one_block_or_grey_or_constant_images_work(channels, count, side, block, is_constant):
    """One value per block has no covariance matrix, and one block has no variance."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (side, side, channels), dtype=np.uint8) for _ in range(count)]
    images = [images[0] * 0 + 7] * count if is_constant else images
    with warnings.catch_warnings(action="error"):
        for codec in (BlockPCA.fit(images, block, channels * block**2), Pixels.fit(images)):
            check_statistics(codec, images)
            assert all(np.abs(codec.decode(codec.encode(image)).astype(int) - image).max() <= 1 for image in images)


def test_invalid_codec_gives_a_clear_error():
    with pytest.raises(ValueError, match="blocks"):
        BlockPCA.fit([np.zeros((9, 8, 1), dtype=np.uint8)], 4, 2)
    tensors = Pixels.fit([np.zeros((4, 4, 1), dtype=np.uint8)]).tensors()
    for kind, invalid in (("jpeg", tensors), ("block_pca", tensors), ("pixels", {"mean": tensors["mean"]})):
        with pytest.raises(ValueError, match=f"kind {kind}"):
            codec_from_tensors(kind, invalid)
