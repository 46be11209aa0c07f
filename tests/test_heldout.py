"""Held-out data: one fate for each picture and text, in every record, file and source; leaks and duplicates are counted."""

import base64
import io
import json
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from threadpoolctl import threadpool_info, threadpool_limits

from tests.documents import same_batch
from tests.profile import examples
from tests.ranks import run_as_threads
from tests.sources import inline, picture, png, write_lines, write_photos
from transfusion.config import ChatLayout, DataConfig, EvaluationConfig
from transfusion.data import fitting, prepare, shards
from transfusion.data import heldout as heldout_module
from transfusion.data.config import PrepareConfig
from transfusion.data.heldout import (
    HASH_RANGE,
    MAX_SIDE,
    MIN_STEP,
    SplitDocument,
    _resize_weights,
    hash_pixels,
    hash_text,
    perceptual_hashes,
)  # fmt: skip
from transfusion.data.leaks import count_leaks
from transfusion.data.loader import heldout_batches, is_edit, read_pairs
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.reading.account import Account
from transfusion.data.reading.built_in import open_built_in
from transfusion.data.reading.readers import ReaderOptions, open_reader
from transfusion.data.sources import fit, open_raw, open_sources
from transfusion.data.store import PreparedFolder, open_prepared
from transfusion.data.summaries import Summarizer
from transfusion.data.survey import Duplicates, survey
from transfusion.evaluation.suite import Suite
from transfusion.sequence import Document, Image, Text

CONFIG = PrepareConfig(tokenizer_size=260, sizes=("8x8",), codec="pixels", records_per_shard=4, max_faults=0.0)
NUM_PICTURES, NUM_TEXTS = 12, 8
SHARE = 0.3  # held out in these tests


@pytest.fixture(autouse=True)
def many_held_out(monkeypatch):
    """Small corpora with a held-out share that is large enough."""
    monkeypatch.setattr(prepare, "MAX_FRACTION", SHARE)


def pixels_of(number: int) -> np.ndarray:
    """Picture `number`, (8, 8, 3) uint8. Every third is grey."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (8, 8, 1 if number % 3 == 0 else 3), np.uint8).repeat(3 if number % 3 == 0 else 1, 2)


def text_of(number: int) -> str:
    return f"text number {number} of a few"


def encoded(number: int, form: str) -> bytes:
    """Picture `number` in a lossless file. A grey one may have one channel."""
    pixels, content = pixels_of(number), io.BytesIO()
    if form == "grey" and number % 3 == 0:
        pixels = pixels[..., 0]
    options = {"lossless": True} if form == "webp" else {}
    PILImage.fromarray(pixels).save(content, "png" if form == "grey" else form, **options)
    return content.getvalue()


def is_heldout(number: int) -> bool:
    return hash_pixels(pixels_of(number)) < SHARE * HASH_RANGE


@pytest.mark.parametrize("chat", [
    ChatLayout(), ChatLayout("", "\n\n", "### Question:\n", "\n\n", "### Answer:\n", "\n\n"),
    ChatLayout("<s>", "</s>\n", "<u>", "</u>\n", "<a>", "</a>\n"),
])  # fmt: skip
def test_layout_does_not_change_the_fate_of_a_conversation(chat, tmp_path):
    """Nor is it the fate of another text: the messages alone, as plain text, have the same."""
    talks = [{"messages": [{"role": "user", "content": f"{n} or {n + 1}?"}, {"role": "assistant", "content": f"It is {n}."}]}
             for n in range(40)]  # fmt: skip
    reader = open_reader(str(write_lines(tmp_path / "a.jsonl", talks)))
    (unit,) = reader.units(100)
    items = [SplitDocument.of(document, SHARE) for document in reader.read(unit, chat=chat)]
    assert [item.text_hash for item in items] == [hash_text(f"{n} or {n + 1}? It is {n}.") for n in range(40)]
    assert {item.document.split for item in items} == {"train", "heldout"}


# One fate

FORMS = ("png", "bmp", "webp", "grey")
pictures, some_texts = st.integers(0, NUM_PICTURES - 1), st.integers(0, NUM_TEXTS - 1)
files = st.tuples(pictures, st.sampled_from(FORMS))
pairs = st.lists(st.tuples(files, some_texts), min_size=1, max_size=9)
segments = st.lists(some_texts | files, min_size=1, max_size=4)
source_kinds = ("pairs", "folder", "parquet", "tar", "documents", "edits")


@st.composite
def sources(draw):
    """(kind, records) of a source; each record is a list of texts (numbers) and pictures (number, file format)."""
    kind = draw(st.sampled_from(source_kinds))
    if kind == "documents":
        return kind, draw(st.lists(segments, min_size=4, max_size=9))
    if kind == "edits":
        return kind, list(map(list, draw(st.lists(st.tuples(files, some_texts, files), min_size=1, max_size=5))))
    return kind, [[text, file] for file, text in draw(pairs)]


def write_source(path: Path, kind: str, records: list[list]) -> str:
    """Write a source; returns its address. Pictures are in the records or in files with names that differ each time."""
    rows = [[text_of(part) if isinstance(part, int) else encoded(*part) for part in record] for record in records]
    match kind:
        case "parquet":
            columns = {"image": [image for _, image in rows], "caption": [text for text, _ in rows]}
            pq.write_table(pa.table(columns), f"{path}.parquet", row_group_size=3)
            return f"{path}.parquet"
        case "tar":
            with tarfile.open(f"{path}.tar", "w") as archive:
                for number, (text, image) in enumerate(rows):
                    for suffix, content in (("txt", text.encode()), ("png", image)):
                        member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            return f"{path}.tar"
        case "folder":
            path.mkdir()
            for number, (_, image) in enumerate(rows):
                (path / f"{number}.png").write_bytes(image)
            records = [{"file_name": f"{n}.png", "text": text} for n, (text, _) in enumerate(rows)]
            write_lines(path / "metadata.jsonl", records)
            return str(path)
    urls = [[to_url(part) if isinstance(part, bytes) else part for part in row] for row in rows]
    records = [
        {"caption": url[0], "image": url[1]} if kind == "pairs" else
        {"source": url[0], "instruction": url[1], "target": url[2]} if kind == "edits" else
        {"segments": [{"image" if part.startswith("data:") else "text": part} for part in url]} for url in urls
    ]  # fmt: skip
    return str(write_lines(path.with_suffix(".jsonl"), records))


def to_url(content: bytes) -> str:
    return "data:;base64," + base64.b64encode(content).decode()


def prepare_in(
    folder: Path, addresses: list[str], world: int = 1, crops: int | None = None, config: PrepareConfig = CONFIG
) -> PreparedFolder:
    """Prepare with `world` processes (threads here); killed after that many crops, then resumed."""
    readers = [open_reader(f"s{n}={address}") for n, address in enumerate(addresses)]
    if crops is not None:
        crop, remaining = fitting.TokenizerAndCodec.crop, [crops]

        def crop_or_stop(self, raw):
            remaining[0] -= 1
            if remaining[0] < 0:
                raise KeyboardInterrupt
            return crop(self, raw)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fitting.TokenizerAndCodec, "crop", crop_or_stop)
            prepare.prepare(readers, config, folder)
            raise KeyboardInterrupt  # finished before
    run_as_threads(world, lambda rank, barrier: prepare.prepare(readers, config, folder, rank, world, barrier))
    return open_prepared(folder)


IN_TRAINING = next(number for number in range(NUM_PICTURES) if not is_heldout(number))


@examples(60, quick=12)
@given(st.lists(sources(), min_size=1, max_size=3), st.integers(1, 3), st.none() | st.integers(0, 20))
def test_nothing_held_out_is_trained_on(corpus, world, crops):
    """In any record, form, file format and source, with any number of processes, and after a restart."""
    corpus = [(kind, [*records, *write_always(kind)]) for kind, records in corpus]
    with TemporaryDirectory() as temporary:
        addresses = [write_source(Path(temporary) / f"f{n}", kind, records) for n, (kind, records) in enumerate(corpus)]
        prepared = prepare_in(Path(temporary) / "out", addresses, world, crops)
        trained, heldout = (list(records_of(prepared, corpus, addresses, split)) for split in ("train", "heldout"))
        assert len(trained) + len(heldout) == sum(len(records) for _, records in corpus)
        for record, _ in trained:
            assert not any(map(is_heldout, pictures_in(record)))
            assert pictures_in(record) or hash_text("".join(map(text_of, record))) >= SHARE * HASH_RANGE
        for record, document in heldout:
            numbers = pictures_in(record)
            assert any(map(is_heldout, numbers)) or hash_text("".join(map(text_of, record))) < SHARE * HASH_RANGE
            # figures include only pictures that are held out
            given_loss = [False, True] if is_condition_first(record, document) else [True] * len(numbers)
            losses = [part.loss for part in document.segments if isinstance(part, Image)]
            assert losses == [loss and is_heldout(n) for loss, n in zip(given_loss, numbers, strict=True)]
        in_training = {number for record, _ in trained for number in pictures_in(record)}
        in_heldout = {number for record, _ in heldout for number in pictures_in(record)}
        leaks = count_leaks([(prepared.folder, prepared.metadata)])
        assert (leaks.images, leaks.texts, leaks.named) == (0, 0, ())
        assert leaks.heldout_images == sum(map(is_heldout, in_heldout))
        assert leaks.shared == len({number for number in in_heldout - set(filter(is_heldout, in_heldout))} & in_training)
        assert leaks.heldout_texts == len({tuple(record) for record, _ in heldout if not pictures_in(record)})


def write_always(kind: str) -> list[list]:
    """A record that is in the training split: a source without any is an error."""
    file = (IN_TRAINING, "png")
    return [[file, 0, file]] if kind == "edits" else [[0, file]]


def pictures_in(record: list) -> list[int]:
    return [part[0] for part in record if isinstance(part, tuple)]


def is_condition_first(record: list, document) -> bool:
    return [type(part) for part in record] == [tuple, int, tuple] and not document.segments[1].loss


def records_of(prepared: PreparedFolder, corpus: list, addresses: list[str], split: str):
    """Each record of a split, and its stored document."""
    for n, (_, records) in enumerate(corpus):
        reader = open_reader(f"s{n}={addresses[n]}")
        raws = [raw for unit in reader.units(100) for raw in reader.read(unit)]
        places = {raw.where: record for raw, record in zip(raws, records, strict=True)}
        source = prepared.source(f"s{n}", split)
        yield from ((places[source.where(number)], source[number]) for number in range(len(source)))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_of_one_picture_are_in_one_split(tmp_path, kind):
    """One row for each caption, as in Flickr8k."""
    rows = [{"image": f"Images/{n:04d}.png", "caption": f"caption {k} of picture {n}"} for n in range(60) for k in range(5)]
    (tmp_path / "Images").mkdir()
    for n in range(60):
        colour = (n, 255 - n, 7 * n % 256)
        (tmp_path / "Images" / f"{n:04d}.png").write_bytes(png(np.full((8, 8, 3), colour, np.uint8)))
    if kind == "csv":
        (tmp_path / "captions.csv").write_text("\n".join(map(",".join, [rows[0].keys(), *(row.values() for row in rows)])))
    else:
        write_lines(tmp_path / "captions.jsonl", rows)
    config = replace(CONFIG, records_per_shard=64)
    prepared = prepare_in(tmp_path / "out", [str(tmp_path / f"captions.{kind}")], config=config)
    captions = ([caption for _, caption, _ in read_pairs(source, 300)] for source in both(prepared))
    trained, heldout = (Counter(caption.split()[-1] for caption in of_split) for of_split in captions)
    assert heldout
    assert not trained.keys() & heldout.keys()
    assert set((trained + heldout).values()) == {5}


def both(prepared: PreparedFolder, name: str = "s0") -> list:
    """The training and the held-out documents of a source, decoded."""
    data = DataConfig(prepared=(str(prepared.folder),), sources=(name,))
    return [source for split in ("train", "heldout") for source in open_raw(data, split)]


@pytest.mark.parametrize(("sizes", "share"), [((3, 5), 0.0), ((8, 8), 0.05), ((4, 4), 0.5)])
def test_hashes_are_uniform(sizes, share):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8000, *sizes, 3), np.uint8)
    for hashes in (map(hash_pixels, images), map(hash_text, map(str, range(8000)))):
        assert abs(np.mean([value < share * HASH_RANGE for value in hashes]) - share) < 0.02


def test_hashes_never_change():
    """Otherwise every picture may change its split."""
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert f"{hash_pixels(pixels):016x}" == "9917b972eb261c86"
    assert f"{hash_text('a  red bird'):016x}" == "b858e86ff86e6ef8"
    assert hash_text("a red\n bird ") == hash_text("a red bird") != hash_text("a redbird")
    assert hash_pixels(np.full((2, 2, 1), 7, np.uint8)) == hash_pixels(np.full((2, 2, 3), 7, np.uint8))
    assert len({hash_pixels(pixels.reshape(shape)) for shape in ((2, 2, 3), (4, 1, 3), (1, 4, 3))}) == 3


def test_larger_share_holds_out_all_of_a_smaller_one():
    documents = [RawDocument((RawText("a"), RawImage(pixels_of(n)))) for n in range(200)]
    heldout = [{n for n, raw in enumerate(documents) if SplitDocument.of(raw, share).document.split == "heldout"}
               for share in (0.0, 0.1, 0.2, 1.0)]  # fmt: skip
    assert not heldout[0]
    assert heldout[1] < heldout[2] < heldout[3] == set(range(200))


def test_share_is_the_same_for_all_sources_without_declared_splits(tmp_path, monkeypatch):
    """On average `heldout` documents of a source. Built-in sources declare their splits and do not count."""
    monkeypatch.undo()
    for name, count in (("a", 30), ("b", 90)):
        write_photos(tmp_path / name, count, 8, 8)
    addresses = [f"{tmp_path}/a", f"{tmp_path}/b", "photographs"]
    readers = [open_reader(address) for address in addresses]
    for heldout, expected in ((3, 0.05), (2, 4 / 120), (0, 0.0)):
        config = replace(CONFIG, heldout=heldout, records_per_shard=64)
        assert prepare.heldout_fraction(prepare.list_jobs(readers, config), config) == expected
    about = prepare.prepare(readers, replace(config, heldout=2), tmp_path / "out")
    assert about["heldout_fraction"] == 4 / 120
    assert [about["sources"][name]["declares_split"] for name in ("a", "b", "photographs")] == [False, False, True]
    assert about["sources"]["photographs"]["documents"] == {"train": 1, "heldout": 1}


# Declared splits


@pytest.mark.parametrize(("option", "rows"), [
    ("train", (0, 3, 4, 5)), ("validation", (1,)), ("dev", (1,)), ("all", range(6)), (None, (0, 1, 3, 4, 5)),
])  # fmt: skip
def test_rows_of_another_split_are_not_read(tmp_path, option, rows):
    """The column `split`. Without a value a row is for training."""
    values = ["train", "val", "TEST", "training", "restval", None]
    records = [{"image": inline(picture(n)[1]), "caption": str(n), "split": value} for n, value in enumerate(values)]
    reader, account = open_reader(str(write_lines(tmp_path / "a.jsonl", records)), ReaderOptions(split=option)), Account()
    raws = [raw for unit in reader.units(9) for raw in reader.read(unit, account)]
    assert [raw.segments[0].text for raw in raws] == list(map(str, rows))
    reader.close_account(account)
    account.check()
    assert account.tallies["records"].passed_over.total() == 6 - len(rows)
    assert [raw.split for raw in raws] == [["train", "heldout"][n == 1] if option is None else "" for n in rows]


def test_training_copies_of_declared_held_out_documents_are_left_out(tmp_path):
    """`photographs` and `topics` declare what is held out; other sources may have the same pictures and texts."""
    (flower,), text = open_built_in("photographs", "heldout"), open_built_in("topics", "heldout")[3].segments[0].text
    write_lines(tmp_path / "mine.jsonl", [
        {"segments": [{"text": "a flower"}, {"image": inline(flower.segments[1].pixels)}]}, {"segments": [{"text": text}]},
        *({"segments": [{"image": inline(picture(n)[1])}]} for n in range(20)),
    ])  # fmt: skip
    readers = [open_reader(source) for source in ("photographs", "topics", f"{tmp_path}/mine.jsonl")]
    config = replace(CONFIG, sizes=("16x16",), heldout=0, records_per_shard=2048)
    about = prepare.prepare(readers, config, tmp_path / "out")
    leaks = about["leaks"]
    assert (leaks["heldout_images"], leaks["images"], leaks["texts"], leaks["shared"]) == (1, 0, 0, 0)
    lines = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert [(fault["source"], fault["where"], fault["kind"], fault["message"]) for fault in lines] == [
        ("mine", "mine.jsonl:1", "also held out", "its picture is held out in photographs: heldout:0"),
        ("mine", "mine.jsonl:2", "also held out", "its text is held out in topics: heldout:3"),
    ]
    assert about["sources"]["mine"]["documents"] == {"train": 20, "heldout": 0}
    assert about["sources"]["mine"]["account"]["kinds"]["records"]["passed_over"] == {"also held out": 2}


def test_documents_left_out_are_no_leaks(tmp_path):
    """Of documents with the same id only the first is kept, whatever its split."""
    records = [{"id": f"n{n % 15}", "image": to_url(encoded(n, "png")), "caption": "one"} for n in range(30)]
    config = replace(CONFIG, max_faults=0.5, records_per_shard=20)  # some in one shard, some in two
    prepared = prepare_in(tmp_path / "out", [str(write_lines(tmp_path / "a.jsonl", records))], config=config)
    expected = set(filter(is_heldout, range(15)))
    assert count_leaks([(prepared.folder, prepared.metadata)]).heldout_images == len(expected)
    places = [{source.stored.where(n) for n in range(len(source))} for source in both(prepared)]
    assert places == [{f"a.jsonl:{n + 1}" for n in numbers} for numbers in (set(range(15)) - expected, expected)]


def test_leaks_between_prepared_folders_are_counted(tmp_path):
    """Each folder has its own share: what one holds out the other may train on."""
    write_photos(tmp_path / "photos", 40, 8, 8)
    for name, heldout in (("all", 0), ("some", 1000)):
        config = replace(CONFIG, heldout=heldout, records_per_shard=64)
        prepare.prepare([open_reader(f"{tmp_path}/photos")], config, tmp_path / name)
    folders = [open_prepared(tmp_path / name) for name in ("all", "some")]
    heldout = len(folders[1].source("photos", "heldout"))
    assert heldout > 2
    leaks = count_leaks([(folder.folder, folder.metadata) for folder in folders])
    assert (leaks.heldout_images, leaks.images, len(leaks.named)) == (heldout, heldout, min(heldout, 10))
    assert leaks.similar == 0  # equal ones are not only similar


# Figures


def test_figures_include_only_held_out_pictures(tmp_path):
    """A held-out document of two pairs, one with a picture that is also trained on; an edit with such a target."""
    held, free = next(n for n in range(NUM_PICTURES) if is_heldout(n)), IN_TRAINING
    images = {n: to_url(encoded(n, "png")) for n in (held, free)}
    both_ways = [[(free, "free"), (held, "held")], [(held, "held"), (free, "free")], [(free, "free")]]
    pairs = [{"pairs": True, "segments": [part for n, text in order for part in ({"text": text}, {"image": images[n]})]}
             for order in both_ways]  # fmt: skip
    edits = [{"source": images[a], "instruction": "change", "target": images[b]}
             for a, b in ((held, free), (free, held), (free, free))]  # fmt: skip
    paths = [str(write_lines(tmp_path / f"{n}.jsonl", records)) for n, records in enumerate((pairs, edits))]
    prepared = prepare_in(tmp_path / "out", paths)
    heldout = both(prepared)[1]
    assert [(n, caption) for n, caption, _ in read_pairs(heldout, 9)] == [(0, "held"), (1, "held")]
    assert all(np.array_equal(pixels, pixels_of(held)) for _, _, pixels in read_pairs(heldout, 9))
    assert [is_edit(both(prepared, "s1")[1][n]) for n in (0, 1)] == [False, True]
    data = DataConfig(prepared=(str(prepared.folder),), seq_len=256, image_first=0.0)
    encoder = fit(data, 2, 0)
    batches = [heldout_batches(source, encoder, 9, 2) for source in open_sources(data, "heldout")]
    assert [sum(batch.image_count for batch in of_source) for of_source in batches] == [2, 1]  # the images in the loss
    assert count_leaks([(prepared.folder, prepared.metadata)]).shared == 1


def test_no_condition_of_a_held_out_edit_is_dropped(tmp_path):
    images = [to_url(encoded(n, "png")) for n in range(NUM_PICTURES)]
    records = [{"source": image, "instruction": "change", "target": images[n - 1]} for n, image in enumerate(images)]
    prepared = prepare_in(tmp_path / "out", [str(write_lines(tmp_path / "a.jsonl", records))])
    data = DataConfig(prepared=(str(prepared.folder),), seq_len=256)
    (source,), encoder = open_sources(data, "heldout"), fit(data, 2, 0)
    dropping = replace(encoder, config=replace(data, condition_text_dropout=0.5, condition_dropout=0.5))
    expected = heldout_batches(source, encoder, 99, 2)
    assert all(same_batch(*pair) for pair in zip(heldout_batches(source, dropping, 99, 2), expected, strict=True))
    assert sum(len(group.keys) for batch in expected for group in batch.groups) == 2 * len(source)


class Mixed(list):
    """A source of a text, a pair without loss, a pair and an edit."""

    name = "mixed"

    def __init__(self):
        text, image, condition = RawText("red"), RawImage(pixels_of(0)), RawImage(pixels_of(1), loss=False)
        super().__init__([RawDocument((text,)), RawDocument((text, condition), pairs=True),
                          RawDocument((text, image), pairs=True), RawDocument((condition, text, image))])  # fmt: skip


@pytest.mark.parametrize(("first", "tasks"), [
    (0, {"text", "choice", "captions", "conditioning", "images", "clip", "edits"}), (3, {"edits"}),
    (1, {"captions", "conditioning", "images", "clip", "edits"}),
])  # fmt: skip
def test_source_of_several_kinds_of_documents_supports_the_tasks_of_all(first, tasks):
    source, suite = Mixed(), SimpleNamespace(config=EvaluationConfig(), engine=None)
    del source[:first]
    assert Suite._tasks_of_source(suite, source).keys() == tasks
    assert [(n, caption) for n, caption, _ in read_pairs(source, 9)] == ([(2 - first, "red")] if first < 3 else [])


# Duplicates


@examples(60)
@given(st.lists(st.lists(st.integers(0, 3) | st.integers(10, 12), min_size=1, max_size=3), max_size=12))
def test_duplicates_are_those_of_python_sets(corpus):
    """Numbers below 10 are texts, others pictures."""
    documents = [RawDocument(tuple(RawText(text_of(n)) if n < 10 else RawImage(pixels_of(n)) for n in parts))
                 for parts in corpus]  # fmt: skip
    duplicates = Duplicates()
    for summary in Summarizer(None, None, hashes=True).summarize(documents):
        duplicates.add(summary)
    used = [n for parts in corpus for n in parts if n >= 10]
    numbers = len(corpus) - len(set(map(tuple, corpus))), len(used) - len(set(used)), 0
    assert [int(word) for word in str(duplicates).split() if word.isdigit()] == list(numbers)


def smooth(seed: int, side: int = 96) -> PILImage.Image:
    """A smooth random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return PILImage.fromarray(pixels).resize((side, side), PILImage.Resampling.BICUBIC)


def perceptual_hash(pixels: np.ndarray) -> int:
    return perceptual_hashes([pixels])[0]


def test_perceptual_hash_is_the_difference_hash_and_finds_most_copies():
    copies, hashes = 0, set()
    for seed in range(40):
        image, file = smooth(seed), io.BytesIO()
        image.save(file, "JPEG", quality=80)
        original = perceptual_hash(np.asarray(image))
        grey = np.asarray(image).mean(2).astype(np.float32)
        row_by_row = np.asarray(PILImage.fromarray(grey).resize((9, 8), PILImage.Resampling.BILINEAR))
        steps = np.diff(row_by_row, axis=1).ravel()
        is_clear = np.abs(steps - 4) > 0.3  # the weights of the resizing are rounded
        assert [bit for bit, is_known in zip(f"{original:064b}", is_clear, strict=True) if is_known] == [
            "01"[int(step > 4)] for step in steps[is_clear]
        ]
        assert is_clear.mean() > 0.9
        smaller = image.resize((64, 64), PILImage.Resampling.LANCZOS)
        copies += sum(perceptual_hash(np.asarray(copy)) == original for copy in (PILImage.open(file), smaller))
        hashes.add(original)
    assert copies > 0.6 * 80
    assert len(hashes) == 40
    assert perceptual_hash(np.full((5, 7, 1), 9, np.uint8)) == 0
    large = np.asarray(smooth(0, 1500))
    assert perceptual_hash(large) == perceptual_hash(large[::3, ::3])  # sampled first


def test_perceptual_hashes_of_many_images_are_those_of_each_in_exact_arithmetic():
    """Of any shapes in any order."""
    rng = np.random.default_rng(0)
    shapes = [(8, 9, 3), (64, 64, 3), (64, 64, 1), (1, 1, 3), (700, 300, 3), (1, 40_000, 1), (40_000, 2, 3)]
    images = [rng.integers(200, 256, shapes[n % len(shapes)], np.uint8) for n in rng.permutation(3 * len(shapes))]
    assert perceptual_hashes(images) == list(map(exact_hash, images))
    assert perceptual_hashes([]) == []


def exact_hash(pixels: np.ndarray) -> int:
    """The same with integers: weights in units of 2^-12."""
    step = max(1, min(pixels.shape[:2]) // MAX_SIDE)
    height, width, channels = (pixels := pixels[::step, ::step].astype(int)).shape
    rows, columns = (_resize_weights(*sizes) * 2**12 for sizes in ((height, 8), (width, 9)))
    grey = np.einsum("ay,yxc,bx->ab", rows.astype(int), pixels, columns.astype(int), optimize=True)
    bits = grey[:, 1:] - grey[:, :-1] > MIN_STEP * channels * 2**24
    return int("".join("01"[int(bit)] for bit in bits.ravel()), 2)


def test_likely_duplicates_are_counted(tmp_path):
    """By `validate` within a source, by `prepare` between held-out and training pictures. Flat pictures are all alike."""
    originals = (np.asarray(smooth(seed)) // 2 for seed in range(99))
    limit = SHARE * HASH_RANGE
    image = next(pixels for pixels in originals if hash_pixels(pixels) < limit <= hash_pixels(pixels + 1))
    flat = [np.full((96, 96, 3), level, np.uint8) for level in (10, 200, 10)]
    images = [image, image + 1, np.asarray(smooth(100)), *flat]
    path = write_lines(tmp_path / "a.jsonl", [{"image": inline(pixels), "caption": "the same"} for pixels in images])
    duplicates = Duplicates()
    survey(open_reader(str(path)), None, duplicates=duplicates)
    assert str(duplicates) == (
        "duplicates: 1 document (same pixels and text as an earlier one), 1 picture (same pixels); likely duplicates: "
        "1 picture (same perceptual hash)"
    )
    prepared = prepare_in(tmp_path / "out", [str(path)], config=replace(CONFIG, sizes=("96x96",)))
    leaks = count_leaks([(prepared.folder, prepared.metadata)])
    assert (leaks.similar, leaks.images, leaks.shared) == (1, 0, 0)


# Large texts


def test_shard_is_flushed_by_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BATCH_BYTES", 4000)
    writer = shards.ShardWriter(tmp_path / "a.arrow")
    documents = [Document((Text(tuple(range(first, first + 300))),)) for first in range(10)]
    for document in documents:
        writer.add(document, SplitDocument(RawDocument((), split="train"), (), (), 1))
        assert sum(row[4].nbytes for row in writer.rows) < 4000
    writer.close()
    batches = list(pa.ipc.open_stream(pa.memory_map(str(tmp_path / "a.arrow"))))
    assert [len(batch) for batch in batches] == [4, 4, 2]  # of 1,200 bytes each
    assert [row for batch in batches for row in batch.column("tokens").to_pylist()] == [
        list(document.segments[0].tokens) for document in documents
    ]


def test_offsets_have_64_bits():
    lengths = range(2**31), range(5)
    lists = shards._list_array(lengths, pa.nulls(2**31 + 5))
    assert lists.value_lengths().to_pylist() == [2**31, 5]
    assert not any(pa.types.is_list(column.type) for column in shards.schema(is_vq=False))


def test_memory_does_not_grow_with_the_number_of_long_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BATCH_BYTES", 50_000)
    monkeypatch.setattr(prepare, "MAX_BATCH_CHARS", 20_000)
    peaks = []
    for count in (8, 24):
        lines = [{"segments": [{"text": f"{n} " + "long text, " * 1000}]} for n in range(count)]
        lines.append({"segments": [{"image": inline(picture(0, 8, 8)[1])}]})
        (reader,) = readers = [open_reader(str(write_lines(tmp_path / f"{count}.jsonl", lines)))]
        config = replace(CONFIG, records_per_shard=100, heldout=0)
        prepare.prepare(readers, config, tmp_path / f"out{count}")
        encoder = prepare.ShardEncoder(fitting.open_tokenizer_and_codec(tmp_path / f"out{count}"), 0.0)
        (unit,) = reader.units(100)
        tracemalloc.start()
        encoder.write_shard(prepare.ShardJob(reader, 0, unit, ChatLayout()), tmp_path / f"{count}.json", lambda rows: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_perceptual_hashes_use_one_thread_of_the_matrix_library(monkeypatch):
    """More of them made two processes slower than one."""

    def count_threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    during, hashes_of_one_shape = [], heldout_module._hashes_of_one_shape
    monkeypatch.setattr(heldout_module, "_hashes_of_one_shape",
                        lambda *arguments: during.append(count_threads()) or hashes_of_one_shape(*arguments))  # fmt: skip
    with threadpool_limits(2, "blas"):
        perceptual_hashes([np.zeros((9, 9, 3), np.uint8)])
        assert (during, count_threads()) == ([{1}], {2})
