"""What it reads: packing, arranging, the loader, the sources; what it reads with: tokenizer and codecs."""

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
    contents,
    contents_of,
    documents,
    few,
    many,
    pair_documents,
    pictures,
    same_batch,
    some,
)
from tests.profile import examples, few_samples
from transfusion.codecs.codec import codec_from_tensors
from transfusion.codecs.pixels import MIN_STD, BlockPCA, Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, DigitsConfig
from transfusion.data import sources as run_sources
from transfusion.data.built_in.digits import NAMES, Digits, scans
from transfusion.data.built_in.topics import EVERY, Topics, split_text
from transfusion.data.loader import BEGINNING, Encoder, Loader, LoaderState, heldout_batches, reorder_and_drop
from transfusion.data.packing import pack
from transfusion.sequence import NO_TARGET, Document, Image, Text, Vocabulary, collate, encode_document, split_chunk

# Packing


@some
@given(st.lists(documents() | pair_documents(), max_size=8), st.integers(20, 60), st.integers(0, 99))
def test_every_position_is_packed_exactly_once_into_rows_that_fit(found, length, seed):
    rows = pack(found, length, VOCABULARY, seed)
    chunks = [contents(chunk) for document in found for chunk in split_chunk(encode_document(document, VOCABULARY), length)]
    assert Counter(chunk for row in contents_of(rows) for chunk in row) == Counter(chunks)
    used = [sum(len(chunk) for chunk in row.chunks) for row in rows]
    assert all(0 < n <= length for n in used)
    assert all(one + other > length for one, other in combinations(used, 2))  # no two rows would fit into one


@some
@given(st.lists(documents(), max_size=8), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_packing_is_a_pure_function(found, seed, elsewhere):
    expected = contents_of(pack(found, 30, VOCABULARY, seed))
    np.random.seed(elsewhere)
    torch.manual_seed(elsewhere)
    assert contents_of(pack(iter(found), 30, VOCABULARY, seed)) == expected


def test_packing_shuffles_rows_and_pieces():
    found = [Document((Text(tuple(range(n % 7))),), id=n) for n in range(60)]
    one, other = (contents_of(pack(found, 30, VOCABULARY, seed)) for seed in (0, 1))
    assert one != other
    assert Counter(tuple(sorted(row)) for row in one) == Counter(tuple(sorted(row)) for row in other)
    longest_first = [[len(chunk) for chunk, *_ in row] for row in one]
    assert any(row != sorted(row, reverse=True) for row in longest_first)


# Arranging


def pair(key: int, pairs: int = 1) -> Document:
    latent = np.zeros((3, 4, 4), dtype=np.float32)
    return Document((Text((1, 2)), Image(latent)) * pairs, key=key, pairs=True)


def test_orders_and_dropped_captions_are_as_frequent_as_asked():
    config = DataConfig(image_first=0.3, caption_dropout=0.2, image_first_max_t=0.5)
    arranged = [reorder_and_drop(pair(key), config) for key in range(5000)]
    dropped = [document.segments[1] == Text((), loss=False) for document in arranged]
    turned = [isinstance(document.segments[0], Image) and not gone
              for document, gone in zip(arranged, dropped, strict=True)]  # fmt: skip
    assert abs(np.mean(turned) - 0.3) < 0.02
    others = [gone for gone, first in zip(dropped, turned, strict=True) if not first]
    assert abs(np.mean(others) - 0.2) < 0.02
    for document, gone, first in zip(arranged, dropped, turned, strict=True):
        image = document.segments[0 if gone or first else 1]
        assert image.max_t == (0.5 if first else 1.0)


@many
@given(pair_documents(caption_first=st.just(True)), st.sampled_from((0.0, 0.5, 1.0)))
def test_image_first_turns_every_pair_and_limits_its_noise(document, limit):
    config = DataConfig(image_first=1.0, caption_dropout=1.0, image_first_max_t=limit)
    segments = reorder_and_drop(document, config).segments
    assert segments[1::2] == document.segments[::2]  # captions as they were, with the loss they had
    for turned, image in zip(segments[::2], document.segments[1::2], strict=True):
        assert turned.content is image.content
        assert turned.loss == image.loss
        assert turned.max_t == min(limit, image.max_t)


@many
@given(pair_documents(caption_first=st.just(True)))
def test_a_dropped_caption_leaves_bos_boi_and_nothing_to_learn_after_the_image(document):
    arranged = reorder_and_drop(document, DataConfig(image_first=0.0, caption_dropout=1.0))
    if len(document.segments) > 2:
        assert arranged == document  # only single pairs lose their caption
        return
    chunk = encode_document(arranged, VOCABULARY)
    image = document.segments[1]
    assert chunk.tokens[:2].tolist() == [VOCABULARY.bos, VOCABULARY.boi[image.shape]]
    assert chunk.tokens[-2:].tolist() == [VOCABULARY.eoi, VOCABULARY.eos]
    assert (chunk.targets[1:] == NO_TARGET).all()
    assert (chunk.targets[0] != NO_TARGET) == image.loss
    assert chunk.images[0].image is image


@some
@given(documents(), pair_documents(caption_first=st.just(True)))
def test_only_pairs_are_arranged_and_only_when_asked(document, of_pairs):
    always = DataConfig(image_first=1.0, caption_dropout=1.0, condition_text_dropout=0.0, condition_dropout=0.0)
    assert reorder_and_drop(document, always) == document
    assert reorder_and_drop(of_pairs, DataConfig(image_first=0.0, caption_dropout=0.0)) == of_pairs


# The loader


@cache
def encoder() -> Encoder:
    """Letters are ids of their own; pictures are taken as they are."""
    tokenizer = Tokenizer.train(["abc"], 256)
    codec = Pixels.fit([np.arange(256, dtype=np.uint8).reshape(16, 16, 1)])
    config = DataConfig(seq_len=96, rows=2, shuffle_block=32)
    vocabulary = Vocabulary.build(tokenizer.size, [(4, 4), (8, 8)], patch_size=2)
    return Encoder(tokenizer, codec, vocabulary, config, seed=0)


def loader(rank: int = 0, world: int = 1, seed: int = 0, **config) -> Loader:
    changed = replace(encoder(), config=replace(encoder().config, **config), seed=seed)
    return Loader([Notes("one", 5000), Notes("two", 1000, 40)], changed, rank, world)


def take(number: int, loader: Loader, start: LoaderState = BEGINNING) -> list:
    return list(islice(loader.batches(start), number))


@examples(8)
@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from((5, 12, 16)))
def test_ranks_deal_out_the_rows_of_one(seed, rows, block):
    """Rows r mod world of what one rank reads in batches as large as all of theirs together."""
    whole = take(4, loader(seed=seed, rows=4 * rows, shuffle_block=block))
    ranks = [take(4, loader(rank, 4, seed, rows=rows, shuffle_block=block)) for rank in range(4)]
    for n, (batch, place) in enumerate(whole):
        assert {found[n][1] for found in ranks} == {place}
        for rank in range(4):
            part = ranks[rank][n][0]
            for name in ("tokens", "position_ids", "document_ids", "image_ids"):
                assert torch.equal(getattr(part, name), getattr(batch, name)[rank::4])
        keys = Counter(key for found in ranks for group in found[n][0].groups for key in group.keys)
        assert keys == Counter(key for group in batch.groups for key in group.keys)
        assert sum(found[n][0].text_count for found in ranks) == batch.text_count


@few
@given(
    st.integers(0, 99), st.integers(1, 3), st.sampled_from((3, 8, 16)), st.integers(0, 7), st.integers(1, 2)
)
def test_a_loader_resumes_from_any_place(seed, rows, block, interrupted, world):
    expected = take(9, loader(0, world, seed, rows=rows, shuffle_block=block))
    place = expected[interrupted][1]
    resumed = take(8 - interrupted, loader(0, world, seed, rows=rows, shuffle_block=block), place)
    for (batch, after), (other, other_after) in zip(expected[interrupted + 1 :], resumed, strict=True):
        assert after == other_after
        assert same_batch(batch, other)


def test_iterators_of_one_loader_do_not_disturb_each_other():
    expected, one = take(6, loader()), loader()
    first = one.batches()
    begun = [next(first) for _ in range(3)]
    np.random.seed(1)
    torch.manual_seed(1)
    second = take(6, one)
    begun += islice(first, 3)
    for (batch, place), *others in zip(expected, begun, second, strict=True):
        for other, other_place in others:
            assert place == other_place
            assert same_batch(batch, other)


def test_batches_are_the_rows_of_the_blocks_in_order():
    found = loader(rows=3)
    rows = [row for block in range(4) for row in found.rows_of(block)]
    for n, (batch, _) in enumerate(take(len(rows) // 3, found)):
        assert same_batch(batch, collate(rows[3 * n : 3 * n + 3], 96, found.encoder.vocabulary))


def test_a_block_holds_each_of_its_documents_once():
    found = loader()
    for block in (0, 3):
        entries = [found.stream[n] for n in range(32 * block, 32 * block + 32)]
        expected = [
            found.encoder.to_document(found.sources[source][id_], found.sources[source].name, epoch)
            for source, epoch, id_ in entries
        ]
        chunks = [split_chunk(encode_document(document, found.encoder.vocabulary), 96) for document in expected]
        packed = Counter(chunk for row in contents_of(found.rows_of(block)) for chunk in row)
        assert packed == Counter(contents(chunk) for parts in chunks for chunk in parts)


def test_an_epoch_reads_every_document_once_in_an_order_of_its_own():
    sources = [Notes("one", 50), Notes("two", 13, 40)]
    found = Loader(sources, encoder())
    read = [found.stream[n] for n in range(400)]
    for number, source in enumerate(found.sources):
        mine = [(epoch, id_) for which, epoch, id_ in read if which == number]
        epochs = [[id_ for e, id_ in mine if e == epoch] for epoch in range(len(mine) // len(source))]
        assert len(epochs) >= 2
        assert all(sorted(ids) == list(range(len(source))) for ids in epochs)
        assert len({tuple(ids) for ids in epochs}) == len(epochs)
        assert [epoch for epoch, _ in mine] == sorted(epoch for epoch, _ in mine)
    other = Loader(sources, replace(encoder(), seed=1))
    assert [other.stream[n] for n in range(40)] != read[:40]


def test_chance_of_a_document_follows_from_seed_source_epoch_and_id():
    raw, other = Notes("one", 9)[3], Notes("one", 9)[6]
    keys = [
        replace(encoder(), seed=seed).to_document(of, source, epoch).key
        for seed in (0, 1) for source in ("one", "two") for epoch in (0, 1) for of in (raw, other)
    ]  # fmt: skip
    assert len(set(keys)) == 16
    assert encoder().to_document(raw, "one", 0).key == keys[0]


@examples(12, quick=5)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3), st.lists(st.integers(8, 40), min_size=3, max_size=3)
)
def test_sources_get_their_shares_of_the_positions(shares, means):
    """Shares are of positions, not of documents: a source of long documents is read less often."""
    sources = [Notes(name, 20_000, mean) for name, mean, _ in zip("abc", means, shares, strict=False)]
    config = replace(encoder().config, sources=tuple("abc"[: len(shares)]), mixture_weights=tuple(map(float, shares)))
    with few_samples(1024):
        found = Loader(sources, replace(encoder(), config=config))
    positions = Counter()
    for source, epoch, id_ in (found.stream[n] for n in range(1500)):
        document = found.encoder.to_document(sources[source][id_], sources[source].name, epoch)
        positions[source] += len(encode_document(document, found.encoder.vocabulary))
    for source, share in enumerate(shares):
        assert abs(positions[source] / positions.total() - share / sum(shares)) < 0.02


@cache
def small_run() -> tuple[DataConfig, Encoder]:
    config = DataConfig(
        sources=("digits", "topics"), mixture_weights=(0.85, 0.15), seq_len=128, digits=DigitsConfig(interleaved=0.15)
    )
    return config, run_sources.fit(config, patch_size=2, seed=0)


def test_digits_and_topics_get_their_shares_within_a_few_blocks():
    config, fitted = small_run()
    with few_samples(1024):
        found = Loader(run_sources.open_sources(config, "train"), fitted)
    positions = [0, 0]
    for n in range(3 * config.shuffle_block):
        source, epoch, id_ = found.stream[n]
        document = fitted.to_document(found.sources[source][id_], found.sources[source].name, epoch)
        positions[source] += len(encode_document(document, fitted.vocabulary))
    assert abs(positions[1] / sum(positions) - 0.15) < 0.02


def test_heldout_batches_are_fixed_and_keep_their_captions():
    config, fitted = small_run()
    source = run_sources.open_sources(config, "heldout")[0]
    always = replace(fitted, config=replace(config, caption_dropout=1.0))
    batches = heldout_batches(source, always, 40)
    assert all(same_batch(*both) for both in zip(batches, heldout_batches(source, always, 40), strict=True))
    documents = Counter(number for batch in batches for group in batch.groups for number in group.documents)
    assert documents == Counter(range(40))
    captions = {fitted.tokenizer.encode(name) for name in NAMES}
    starts = {caption[0] for caption in captions}
    held = sum(int(token in starts) for batch in batches for token in batch.tokens.flatten().tolist())
    assert held >= 40


# The sources


def test_the_split_of_digits_is_sklearns():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    sides = train_test_split(range(1797), test_size=297, random_state=0, stratify=bunch.target)
    assert set(sides[0]).isdisjoint(sides[1])
    for side, split in zip(sides, ("train", "heldout"), strict=True):
        pixels, labels = scans(split)
        assert labels.tolist() == bunch.target[side].tolist()
        assert np.abs(pixels[..., 0] / 255 * 16 - bunch.images[side]).max() < 0.04
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("interleaved", [0.0, 0.3, 1.0])
def test_no_training_document_holds_a_heldout_scan_and_captions_are_true(interleaved):
    name_of = {
        scan.tobytes(): NAMES[label]
        for split in ("train", "heldout")
        for scan, label in zip(*scans(split), strict=True)
    }
    heldout = {scan.tobytes() for scan in scans("heldout")[0]}
    source, counts, company = Digits("train", interleaved), [], set()
    for id_ in range(0, len(source), 16):
        document = source[id_]
        captions, pictures = document.segments[::2], document.segments[1::2]
        held = [picture.pixels.tobytes() for picture in pictures]
        assert document.id == id_
        assert document.pairs
        assert not heldout & set(held)
        assert [caption.text for caption in captions] == [name_of[pixels] for pixels in held]
        counts.append(len(pictures))
        company |= set(held[1:])
    assert abs(np.mean([n > 1 for n in counts]) - interleaved) < 0.03
    assert set(counts) == {0.0: {1}, 0.3: {1, 2, 3, 4}, 1.0: {2, 3, 4}}[interleaved]
    assert len(company) > 1200 or not interleaved  # of 1,500: anyone may be anyone's


def test_heldout_digits_are_read_once_each_and_by_themselves():
    source = Digits("heldout", interleaved=1.0)
    documents = [source[n] for n in range(len(source))]
    assert len(documents) == 297
    assert all(len(document.segments) == 2 for document in documents)
    heldout = {scan.tobytes() for scan in scans("heldout")[0]}
    assert {document.segments[1].pixels.tobytes() for document in documents} == heldout


def test_topics_are_split_without_overlap():
    from pydoc_data.topics import topics

    train, heldout = Topics("train"), Topics("heldout")
    assert sorted(train.texts + heldout.texts) == sorted(topics.values())
    assert not set(train.texts) & set(heldout.texts)
    assert heldout.texts == [topics[name] for name in sorted(topics)[::EVERY]]
    assert train.describe()["sha256"] != heldout.describe()["sha256"]
    for source in (train, heldout):  # passages are all of the text, in order
        passages = [source[n].segments[0].text for n in range(len(source))]
        assert "".join(passages) == "".join(source.texts)
        assert all(source[n].id == n for n in range(len(source)))


@many
@given(st.lists(st.text("ab\n", max_size=12)).map("\n\n".join), st.integers(1, 30))
def test_a_text_is_split_between_paragraphs_only(text, longest):
    passages = split_text(text, longest)
    assert "".join(passages) == text
    for passage, following in zip(passages, passages[1:], strict=False):
        assert passage.endswith("\n\n")
        assert len(passage) <= longest or "\n\n" not in passage[:-2].rstrip("\n")
        assert len(passage) + len(following.split("\n\n")[0]) > longest - 2  # it would not have fitted


def test_fit_sees_only_training_documents_and_numbers_what_it_finds():
    config, fitted = small_run()
    source = Digits("train", config.digits.interleaved)
    pictures = [part.pixels for n in range(config.fit_documents) for part in source[n].segments[1::2]]
    expected = Pixels.fit(pictures)
    assert all(np.array_equal(x, expected.tensors()[name]) for name, x in fitted.codec.tensors().items())
    assert fitted.vocabulary.boi.keys() == {(8, 8)}
    assert fitted.vocabulary.num_text_tokens == fitted.tokenizer.size <= config.tokenizer_size


@pytest.mark.parametrize(("config", "patch_size", "word"), [
    (DataConfig(), 2, "sources"), (DataConfig(sources=("nothing",)), 2, "nothing"),
    (DataConfig(sources=("topics",)), 2, "no image"), (DataConfig(sources=("digits",)), 3, "patches"),
])  # fmt: skip
def test_data_that_cannot_be_used_is_refused_in_words(config, patch_size, word):
    with pytest.raises(ValueError, match=word):
        run_sources.fit(config, patch_size, seed=0)


# The tokenizer

SPELT = ("<s>", "</s>", "<image>", "<|endoftext|>", " and the ", "Ġ", "\x00")
any_text = st.lists(st.text() | st.sampled_from(SPELT)).map("".join)


@cache
def trained() -> Tokenizer:
    return Tokenizer.train(["<s> one <image> two </s>"] * 5 + Topics("heldout").texts, 400)


@many
@given(any_text)
def test_any_text_comes_back_to_the_byte(text):
    ids = trained().encode(text)
    assert trained().decode(ids) == text
    assert all(0 <= id_ < trained().size <= 400 for id_ in ids)
    assert Tokenizer.from_json(trained().to_json()).encode(text) == ids


SPECIAL, ADDED = ("<s>", "</s>"), ("<image>", "<wide>")
PIECES = [chr(c) for c in range(33, 127)]


def engine_of(model: str) -> Engine:
    """A tokenizer as people bring it: added tokens, often in the model's own list too."""
    own = {token: n for n, token in enumerate([*SPECIAL, *ADDED[:1], *PIECES])}
    match model:
        case "bpe":
            engine = Engine(models.BPE(vocab=own, merges=[]))
        case "bpe that looks up whole words":
            engine = Engine(models.BPE(vocab=own, merges=[], ignore_merges=True))
        case "unigram":
            scored = [(token, 0.0 if n < 3 else -5.0) for token, n in own.items()]
            engine = Engine(models.Unigram(scored, unk_id=3))
        case "words":
            engine = Engine(models.WordLevel(vocab=own, unk_token="!"))
    engine.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    engine.add_tokens([AddedToken(token, special=False) for token in ADDED])
    return engine


@pytest.mark.parametrize("model", ["bpe", "bpe that looks up whole words", "unigram", "words"])
@some
@given(text=st.lists(st.sampled_from((*SPECIAL, *ADDED, "a", "<", "s>"))).map("".join))
def test_text_that_spells_a_token_with_a_meaning_stays_text(model, text):
    engine = engine_of(model)
    meant = {engine.token_to_id(token) for token in (*SPECIAL, *ADDED)}
    for tokenizer in (Tokenizer(engine), Tokenizer.from_json(engine.to_str()),
                      Tokenizer.from_json(Tokenizer(engine).to_json())):  # fmt: skip
        assert not meant & set(tokenizer.encode(text))
        if model == "bpe":
            assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text


@many
@given(any_text)
def test_added_tokens_change_nothing_about_text(text):
    engine = Engine.from_str(trained().to_json())
    engine.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    engine.add_tokens([AddedToken("nd th", special=False), AddedToken("</s", special=False)])
    assert Tokenizer(engine).encode(text) == trained().encode(text)


@some
@given(st.text("ab\n\t"))
def test_added_tokens_that_are_the_only_way_to_write_a_letter_are_kept(text):
    """Gemma's newline is such a token: no text may lose its lines."""
    engine = Engine(models.BPE(vocab={"a": 0, "b": 1, "\n": 2, "\t": 3}, merges=[]))
    engine.decoder = decoders.Fuse()
    engine.add_tokens([AddedToken("\n", special=False, normalized=False), AddedToken("\t", special=False)])
    tokenizer = Tokenizer(engine)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_size_counts_up_to_the_largest_id():
    """Else the markers that follow would share ids with tokens behind a hole in someone's list."""
    tokenizer = Tokenizer(Engine(models.BPE(vocab={"a": 0, "b": 9}, merges=[])))
    assert max(tokenizer.encode("ab")) < tokenizer.size


def test_what_is_no_tokenizer_is_refused_in_words():
    with pytest.raises(ValueError, match="256"):
        Tokenizer.train(["abc"], 255)
    for text in ("", "{}", "[1]", "null", '{"model": 3}'):
        with pytest.raises(ValueError, match="not a tokenizer"):
            Tokenizer.from_json(text)


# The codecs


def check_statistics(codec, found):
    """Mean 0; deviation 1 where a channel changes by a grey level or more, less elsewhere; a bound just wide enough."""
    latents = np.stack([codec.encode(picture) for picture in found])  # (n, C, Y, X)
    assert latents.dtype == np.float32
    values = latents.transpose(1, 0, 2, 3).reshape(codec.channels, -1)
    changing = codec.std > MIN_STD
    assert np.abs(values.mean(1)).max() < 1e-3
    assert np.abs(values.std(1)[changing] - 1).max(initial=0) < 1e-3
    assert values.std(1)[~changing].max(initial=0) < 1 + 1e-3
    assert np.allclose(values.min(1), codec.low, atol=1e-4)
    assert np.allclose(values.max(1), codec.high, atol=1e-4)


def check_rebuilt(codec, picture):
    rebuilt = codec_from_tensors(codec.kind, {name: np.array(values) for name, values in codec.tensors().items()})
    assert np.array_equal(rebuilt.encode(picture), codec.encode(picture))
    assert np.array_equal(rebuilt.decode(codec.encode(picture)), codec.decode(codec.encode(picture)))
    assert (rebuilt.channels, rebuilt.downsampling, rebuilt.image_channels) == (
        codec.channels,
        codec.downsampling,
        codec.image_channels,
    )
    assert rebuilt.image_channels == picture.shape[2]


@some
@given(pictures())
def test_pixels_come_back(found):
    codec = Pixels.fit(found)
    check_statistics(codec, found)
    check_rebuilt(codec, found[0])
    for picture in found:
        assert codec.encode(picture).shape == (picture.shape[2], *picture.shape[:2])
        assert np.array_equal(codec.decode(codec.encode(picture)), picture)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # of theirs
@some
@given(pictures(), st.sampled_from((2, 4)), st.integers(1, 4))
def test_block_pca_is_sklearns_pca(found, block, components):
    from sklearn.decomposition import PCA

    codec = BlockPCA.fit(found, block, components)
    check_statistics(codec, found)
    check_rebuilt(codec, found[0])
    Y, X, colours = found[0].shape
    blocks = np.stack([
        picture[y : y + block, x : x + block].ravel()
        for picture in found for y in range(0, Y, block) for x in range(0, X, block)
    ]).astype(np.float64)  # fmt: skip
    theirs = PCA(components, svd_solver="full").fit(blocks)
    rebuilt = theirs.inverse_transform(theirs.transform(blocks)).clip(0, 255)
    mine = np.concatenate([
        codec.decode(codec.encode(picture)).reshape(Y // block, block, X // block, block, colours)
        .transpose(0, 2, 1, 3, 4).reshape(-1, block * block * colours) for picture in found
    ])  # fmt: skip
    variances = np.linalg.eigvalsh(np.cov(blocks, rowvar=False))[::-1][: components + 1]
    if np.diff(variances).max(initial=-1) < -1e-6:  # else equal variances leave the choice of components open
        assert np.abs(mine - rebuilt).max() <= 0.5 + 1e-2
        assert np.allclose(np.abs(codec.components @ theirs.components_.T), np.eye(components), atol=1e-5)
    assert codec.encode(found[0]).shape == (components, Y // block, X // block)


@some
@given(pictures())
def test_all_components_lose_nothing(found):
    codec = BlockPCA.fit(found, 2, 4 * found[0].shape[2])
    for picture in found:
        assert np.abs(codec.decode(codec.encode(picture)).astype(int) - picture).max() <= 1


def test_codecs_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match="blocks"):
        BlockPCA.fit([np.zeros((9, 8, 1), dtype=np.uint8)], 4, 2)
    tensors = Pixels.fit([np.zeros((4, 4, 1), dtype=np.uint8)]).tensors()
    for kind, given_ in (("jpeg", tensors), ("block_pca", tensors), ("pixels", {"mean": tensors["mean"]})):
        with pytest.raises(ValueError, match=f"kind {kind}"):
            codec_from_tensors(kind, given_)
