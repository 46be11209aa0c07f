"""Packing by lengths alone: order, mixture, lengths, splits; ranks read only their own rows; many shards."""

import gc
import resource
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import (
    SHAPES,
    VOCABULARY,
    changed,
    contents,
    contents_of,
    documents,
    image,
    pair_documents,
    texts,
)
from tests.profile import examples
from transfusion.config import DataConfig
from transfusion.data import store
from transfusion.data.heldout import SplitDocument
from transfusion.data.lengths import EDIT, choose_changes, lengths_of_documents
from transfusion.data.loader import START, DocumentEncoder, Loader, LoaderState
from transfusion.data.order import WEIGHT_UNIT, Stream, count_by_weight, permute
from transfusion.data.packing import best_fit, shuffle_bins, split_texts
from transfusion.data.raw import RawDocument
from transfusion.data.shards import ShardWriter
from transfusion.data.store import PreparedFolder, StoredSource
from transfusion.disk import OpenError
from transfusion.seeding import derive_seeds, uniforms_from
from transfusion.sequence import Document, Image, Text, encode_document, split_chunk

some = examples(60)


@pytest.fixture(scope="module", autouse=True)
def _few_packed_together():
    """The first row of a loader waits for all of them."""
    with mock.patch("transfusion.data.loader.PACKED_TOGETHER", 128):
        yield


class Documents(list):
    """A source that is not prepared."""

    def __init__(self, name: str, documents: Iterable[Document]):
        super().__init__(documents)
        self.name = name


# Prepared documents of every kind


@st.composite
def edits(draw):
    """Given images and texts, then an image to be made."""
    given_images = [replace(part, loss=False, max_t=0.0) for part in draw(st.lists(st.builds(
        image, st.sampled_from(SHAPES), st.integers(0, 99)), min_size=1, max_size=3))]  # fmt: skip
    conditions = draw(st.permutations([*given_images, *draw(st.lists(texts(), max_size=3))]))
    return Document((*conditions, image(draw(st.sampled_from(SHAPES)), 5)), key=draw(st.integers(0, 2**62)))


any_document = documents() | pair_documents(caption_first=st.just(True)) | edits() | st.builds(
    lambda text, key: Document((text,), key=key), texts(max_size=90), st.integers(0, 2**62)
)  # fmt: skip
corpora = st.lists(any_document, min_size=1, max_size=24)


def write_shards(folder: Path, name: str, shards: Sequence[Sequence[Document]], skipped: Sequence[int] = ()) -> StoredSource:
    """A source of prepared documents, of which some of the first shard are skipped."""
    (folder / name).mkdir(parents=True)
    infos = []
    for number, members in enumerate(shards):
        writer = ShardWriter(folder / name / f"train-{number:05d}.arrow")
        for document in members:
            writer.add(document, SplitDocument(RawDocument((), split="train"), (), (), 1))
        digest = writer.close()
        rows = [] if number else list(skipped)
        infos.append({
            "documents": {"train": len(members) - len(rows)}, "skipped": {"train": rows},
            "sha256": {writer.path.name: digest}, "max_image_overhead": {f"{y}x{x}": [0, 0, 0] for y, x in SHAPES},
            "tokens": {"train": 0}, "caption_tokens": {"train": 0}, "images": {"train": {}},
        })  # fmt: skip
    source = {"shards": infos, "sha256": store.write_sizes(folder / name, "train", infos)}
    codec = SimpleNamespace(channels=3)
    return StoredSource(PreparedFolder(folder, {"sources": {name: source}}, None, codec), name, "train")


def encoder(**config) -> DocumentEncoder:
    return DocumentEncoder(None, None, VOCABULARY, DataConfig(**{"seq_len": 40, "shuffle_block": 8} | config), seed=3)


@cache
def prepared() -> tuple[Sequence[StoredSource], Path]:
    """Two sources of prepared documents: pairs in 7 shards, and texts, some longer than two rows."""
    folder = Path(_TEMPORARY.name)
    captions = [Text(tuple(range(n % 9))) for n in range(70)]
    pairs = [Document((text, image(SHAPES[n % 3], n)) * (1 + n % 2), pairs=True) for n, text in enumerate(captions)]
    long = [Document((Text(tuple(n % 50 for n in range(3 * n))),)) for n in range(40)]
    return (
        write_shards(folder, "pairs", [pairs[n : n + 10] for n in range(0, 70, 10)], skipped=(0, 3, 4)),
        write_shards(folder, "texts", [long]),
    ), folder


_TEMPORARY = TemporaryDirectory()


# Order and mixture


@some
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2**64 - 1)), min_size=1, max_size=4))
def test_each_source_has_a_permutation_of_its_documents(sources):
    """In one call, with other sizes and seeds beside it, and in any order of places."""
    places = np.concatenate([np.arange(size) for size, _ in sources])
    sizes = np.concatenate([np.full(size, size) for size, _ in sources])
    seeds = np.concatenate([np.full(size, seed, np.uint64) for size, seed in sources])
    mixed = np.random.default_rng(0).permutation(len(places))
    numbers = np.empty_like(places)
    numbers[mixed] = permute(places[mixed], sizes[mixed], seeds[mixed])
    begin = 0
    for size, _ in sources:
        assert sorted(numbers[begin : begin + size].tolist()) == list(range(size))
        begin += size


@pytest.mark.parametrize(("size", "orders"), [(1, 1), (2, 2), (3, 6), (4, 24)])
def test_all_orders_of_few_documents_are_about_equally_frequent(size, orders):
    seeds = np.repeat(derive_seeds(5, np.arange(400 * orders)), size)
    numbers = permute(np.tile(np.arange(size), 400 * orders), np.full(len(seeds), size), seeds)
    counts = Counter(map(tuple, numbers.reshape(-1, size).tolist()))
    assert len(counts) == orders
    assert all(300 < count < 500 for count in counts.values())


def test_neighbours_in_an_order_are_unrelated():
    size = 10_007
    order = permute(np.arange(size), np.full(size, size), np.full(size, 7, np.uint64))
    for values in (np.diff(order) % size, order[:3000], order[::3]):  # each is uniform
        counts = np.bincount(values * 20 // size, minlength=20)
        assert np.abs(counts - len(values) / 20).max() < 5 * np.sqrt(len(values) / 20)


@some
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=12), st.integers(0, 10**15))
def test_sources_have_their_shares_at_any_position(weights, total):
    """Within two documents. From one document to the next only one count grows, by one."""
    units = [max(1, round(weight / sum(weights) * WEIGHT_UNIT)) for weight in weights]
    counts, following = count_by_weight(total, units), count_by_weight(total + 1, units)
    assert sum(counts) == total
    assert sorted(b - a for a, b in zip(counts, following, strict=True)) == [0] * (len(weights) - 1) + [1]
    for count, unit in zip(counts, units, strict=True):
        assert abs(count - total * unit / sum(units)) <= 2 + total * 1e-15


def test_weights_of_one_to_a_thousand_are_kept():
    """With a source of one document beside one of 100,000."""
    stream = Stream(["many", "one"], [100_000, 1], [1000 / 1001, 1 / 1001], seed=0, block_size=64)
    entries = stream.read(0, 1564)
    of_one = entries.sources == 1
    assert of_one.sum() == 100
    assert (entries.ids[of_one] == 0).all()
    assert entries.epochs[of_one].tolist() == list(range(100))
    assert len(set(entries.keys.tolist())) == len(entries.keys)
    assert len(set(entries.ids[~of_one].tolist())) == 99_996  # no document twice in an epoch


@some
@given(st.integers(0, 2**63), st.integers(-1, 2**40), st.integers(0, 2**40))
def test_seeds_in_arrays_equal_those_of_splitmix64(seed, number, other):
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        state = (state ^ state >> shift) * multiplier % 2**64
    assert derive_seeds(seed, np.array([other, number])).tolist()[1] == state ^ state >> 31


def test_uniform_numbers_of_different_labels_are_independent():
    seeds = derive_seeds(1, np.arange(4000))
    first, second = (uniforms_from(seeds, label) for label in ("a", "b"))
    assert first.min() >= 0 and first.max() < 1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert all(abs(np.mean(values < 0.3) - 0.3) < 0.03 for values in (first, second))


# Packing


def pack_one_by_one(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Best-fit decreasing as in books: the numbers of the chunks in each bin."""
    bins, free = [], []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [n for n, space in enumerate(free) if space >= lengths[number]]
        best = min(fitting, key=lambda n: free[n], default=len(bins))
        if best == len(bins):
            bins.append([])
            free.append(seq_len)
        bins[best].append(number)
        free[best] -= lengths[number]
    return bins


@some
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=60), min_size=1, max_size=3), st.integers(30, 70))
def test_equal_lengths_together_are_packed_as_one_by_one(blocks, seq_len):
    lengths, numbers = np.concatenate(blocks), np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    bins, bin_blocks = best_fit(lengths, numbers, seq_len)
    first = 0
    for number, block in enumerate(blocks):
        packed = [
            (np.flatnonzero(bins == n) - first).tolist() for n in np.flatnonzero(bin_blocks == number)
        ]
        assert packed == [sorted(members) for members in pack_one_by_one(block, seq_len)]
        first += len(block)
    order, ends = shuffle_bins(bins, bin_blocks, derive_seeds(0, np.arange(len(blocks))))
    rows = np.split(order, ends[:-1])
    assert sorted(map(tuple, rows)) == sorted(tuple(np.flatnonzero(bins == n)) for n in range(len(bin_blocks)))
    assert [numbers[row[0]] for row in rows] == sorted(bin_blocks)  # block by block


@some
@given(st.lists(texts(max_size=200).map(lambda text: Document((text,))), min_size=1, max_size=6), st.integers(2, 40))
def test_texts_are_split_by_their_lengths(texts, seq_len):
    chunks = [encode_document(document, VOCABULARY) for document in texts]
    counts, ends = split_texts(np.array([len(chunk) for chunk in chunks]), seq_len)
    expected = [[len(part) for part in split_chunk(chunk, seq_len)] for chunk in chunks]
    assert counts.tolist() == list(map(len, expected))
    assert ends.tolist() == [end for lengths in expected for end in np.cumsum(lengths).tolist()]


# Lengths


@some
@given(corpora, st.sampled_from((0.0, 0.4, 1.0)), st.booleans(), st.integers(1, 9))
def test_lengths_are_known_before_documents_are_read(corpus, dropout, clean_copies, per_shard):
    """Of every kind of document, after every change, of prepared documents and of others; documents are stored exactly."""
    config = DataConfig(
        image_first=dropout / 2, caption_dropout=dropout, condition_text_dropout=dropout / 2, condition_dropout=dropout / 2,
        clean_copies=clean_copies,
    )  # fmt: skip
    lengths = lengths_of_documents(corpus, VOCABULARY)
    changes = choose_changes(np.array([document.key for document in corpus], np.uint64), lengths.kinds, config)
    changed_documents = [changed(document, config) for document in corpus]
    encoded = [len(encode_document(document, VOCABULARY, clean_copies=clean_copies)) for document in changed_documents]
    assert lengths.after(changes, clean_copies).tolist() == encoded
    with TemporaryDirectory() as folder:
        shards = [corpus[n : n + per_shard] for n in range(0, len(corpus), per_shard)]
        source = write_shards(Path(folder), "some", shards)
        stored = source.lengths(np.arange(len(source)), VOCABULARY.patch_size)
        assert stored.after(changes, clean_copies).tolist() == encoded
        is_edit = stored.kinds == EDIT
        for name in ("kinds", "images", "whole", "without_text", "copies", "copies_image_first"):
            assert np.array_equal(getattr(stored, name), getattr(lengths, name))
        assert np.array_equal(stored.target_only[is_edit], lengths.target_only[is_edit])
        for number, document in enumerate(corpus):
            read = source[number]
            assert (read.pairs, len(read.segments)) == (document.pairs, len(document.segments))
            for part, original in zip(read.segments, document.segments, strict=True):
                assert part.loss == original.loss
                if isinstance(original, Text):
                    assert part == original
                else:
                    assert part.max_t == original.max_t
                    assert np.array_equal(part.content, original.content.astype(np.float16))


def test_skipped_documents_have_no_number():
    (pairs, _), _ = prepared()
    assert len(pairs) == len(pairs.sizes) == 67
    lengths = pairs.lengths(np.arange(67), VOCABULARY.patch_size).whole
    assert lengths.tolist() == [len(encode_document(pairs[n], VOCABULARY)) for n in range(67)]


# Ranks


def steps(world: int, rank: int, count: int, start: LoaderState = START, sources=None, batch_size: int = 192, **config):
    loader = Loader(sources or prepared()[0], encoder(**config), batch_size, rank, world)
    return list(islice(loader.batches(start), count))


@pytest.mark.parametrize("world", [2, 3, 64])
def test_ranks_have_the_rows_of_one_rank(world):
    expected = steps(1, 0, 2)
    ranks = [steps(world, rank, 2) for rank in range(world)]
    for number, (rows, state) in enumerate(expected):
        for rank, batches in enumerate(ranks):
            assert batches[number][1] == state
            assert contents_of(batches[number][0]) == contents_of(rows[rank::world])


@pytest.mark.parametrize("world", [1, 5])
def test_a_rank_reads_only_the_documents_of_its_rows(world, monkeypatch):
    read = []
    get = StoredSource.__getitem__
    monkeypatch.setattr(StoredSource, "__getitem__", lambda source, id: read.append((source.name, id)) or get(source, id))
    loader = Loader(prepared()[0], encoder(), 30, 0, world)
    rows = [row for batch, _ in islice(loader.read_batches(), 6) for row in batch]
    assert len(rows) == 180 / world
    assert Counter(read).keys() == {(chunk.source, chunk.id) for row in rows for chunk in row.chunks}
    once = sum(len({(chunk.source, chunk.id) for chunk in row.chunks}) for row in rows)
    assert len(read) <= once  # a document in several rows of a block is read once


@pytest.mark.parametrize("together", [1, 16, 256])
def test_blocks_packed_together_equal_each_alone(together, monkeypatch):
    expected = [contents_of(Loader(prepared()[0], encoder(), 1).block(number)) for number in range(8)]
    monkeypatch.setattr("transfusion.data.loader.PACKED_TOGETHER", together)
    loader = Loader(prepared()[0], encoder(), 1)
    assert loader.blocks_together == max(1, together // 8)
    assert [contents_of(loader.block(number)) for number in range(8)] == expected


@pytest.mark.parametrize("sources", ["prepared", "mixed"])
def test_a_run_resumes_at_every_row(sources):
    """Also with a source that is encoded while it is read beside the prepared ones."""
    others = Documents("others", [Document((Text((n,) * n),), n) for n in range(9)])
    chosen = [*prepared()[0], *([others] if sources == "mixed" else [])]
    expected = steps(1, 0, 40, sources=chosen, batch_size=1)
    for number in range(0, 39):
        (rows, state), = steps(1, 0, 1, expected[number][1], chosen, batch_size=1)
        assert state == expected[number + 1][1]
        assert contents_of(rows) == contents_of(expected[number + 1][0])


@some
@given(corpora, st.integers(1, 30), st.integers(30, 60), st.booleans())
def test_every_position_of_an_epoch_is_in_one_row(corpus, block, seq_len, clean_copies):
    with TemporaryDirectory() as folder:
        source = write_shards(Path(folder), "some", [corpus])
        fitted = encoder(seq_len=seq_len, shuffle_block=block, clean_copies=clean_copies)
        loader = Loader([source], fitted, 1)
        entries = loader.stream.read(0, -(-len(corpus) // block))
        expected = Counter()
        for id_, key, epoch in zip(entries.ids.tolist(), entries.keys.tolist(), entries.epochs.tolist(), strict=True):
            document = fitted.to_document(source[id_], "some", epoch)
            assert document.key == key
            chunk = encode_document(document, VOCABULARY, clean_copies=clean_copies)
            expected.update(map(contents, split_chunk(chunk, seq_len)))
        rows = [row for number in range(-(-len(corpus) // block)) for row in loader.block(number)]
        assert Counter(chunk for row in contents_of(rows) for chunk in row) == expected
        assert all(sum(map(len, row.chunks)) <= seq_len for row in rows)


def test_documents_of_other_sources_have_the_same_order_and_keys():
    """The same documents, prepared and not."""
    (pairs, _), _ = prepared()
    others = Documents("pairs", (pairs[n] for n in range(len(pairs))))
    expected, actual = (Loader([source], encoder(), 4).batches() for source in (pairs, others))
    for (rows, state), (other_rows, other_state) in islice(zip(expected, actual, strict=True), 12):
        assert state == other_state
        assert contents_of(rows) == contents_of(other_rows)


def test_a_document_that_cannot_be_split_is_named(tmp_path):
    images = [Document((Text((1,)), image((4, 4), n), image((4, 4), n))) for n in range(3)]
    source = write_shards(tmp_path, "wide", [images])
    with pytest.raises(ValueError, match=r"document \d of wide: an image with its caption does not fit .*data.seq_len"):
        next(Loader([source], encoder(seq_len=5), 1).batches())
    with pytest.raises(ValueError, match="does not fit in a row of 1 positions"):
        next(Loader([prepared()[0][1]], encoder(seq_len=1), 1).batches())


# Many shards


def test_nothing_is_kept_of_documents_that_were_read():
    """Nor of blocks that were packed: 2,400 documents take the memory of 800."""
    loader, kept = Loader(prepared()[0], encoder(), 1), []
    tracemalloc.start()
    try:
        for number in range(300):
            list(loader.block(number))
            if number in (99, 299):
                gc.collect()
                snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/transfusion/*")])
                kept.append(sum(trace.size for trace in snapshot.traces))
    finally:
        tracemalloc.stop()
    assert kept[1] - kept[0] < 1600  # a byte for each


def test_shards_that_were_closed_are_opened_again(monkeypatch, tmp_path):
    """With few open files allowed, more shards than maps, in random order; none is parsed twice."""
    shutil.copytree(prepared()[1] / "pairs", tmp_path / "pairs")
    monkeypatch.setattr(store, "MAX_OPEN_SHARDS", 2)
    parsed = []
    read_layout = store.Shard.__init__.__globals__["_read_layout"]
    monkeypatch.setitem(
        store.Shard.__init__.__globals__, "_read_layout", lambda buffer: parsed.append(1) or read_layout(buffer)
    )
    original = prepared()[0][0]
    source = StoredSource(replace(original.prepared, folder=tmp_path), "pairs", "train")
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 5)).tolist()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else soft - 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    try:
        held = [source[id_] for id_ in ids]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(parsed) == 7
    shutil.rmtree(tmp_path / "pairs")  # documents that were read stay valid
    for id_, document in zip(ids, held, strict=True):
        assert contents(encode_document(document, VOCABULARY)) == contents(encode_document(original[id_], VOCABULARY))
        assert all(np.array_equal(a.content, b.content)
                   for a, b in zip(document.segments, original[id_].segments, strict=True) if isinstance(a, Image))


@pytest.mark.parametrize("kind", ["another shard", "another latent", "shorter", "missing"])
def test_a_shard_that_was_replaced_is_named(kind, monkeypatch, tmp_path):
    """While it was not open, after it had been."""
    shutil.copytree(prepared()[1] / "pairs", tmp_path / "pairs")
    monkeypatch.setattr(store, "MAX_OPEN_SHARDS", 1)
    source = StoredSource(replace(prepared()[0][0].prepared, folder=tmp_path), "pairs", "train")
    latent = source[10].segments[1].content.tobytes()
    source[0]
    path = tmp_path / "pairs" / "train-00001.arrow"
    content = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes({
            "another shard": path.with_name("train-00003.arrow").read_bytes(), "shorter": content[:200],
            "another latent": content.replace(latent, latent[:-1] + bytes([latent[-1] ^ 1])),
        }[kind])  # fmt: skip
    with pytest.raises(OpenError, match="train-00001.arrow") as raised:
        source[10]
    cause = "document 10 of pairs is damaged" if "another" in kind else "cannot read"
    assert cause in str(raised.value) and str(raised.value).count("checks all shards") == 1
    assert source[30]


def test_damaged_sizes_are_named(tmp_path):
    shutil.copytree(prepared()[1] / "texts", tmp_path / "texts")
    path = tmp_path / "texts" / "train-sizes.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    source = StoredSource(replace(prepared()[0][1].prepared, folder=tmp_path), "texts", "train")
    with pytest.raises(OpenError, match="train-sizes.bin was changed.*delete .*dataset.json and run"):
        source[0]
