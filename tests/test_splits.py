"""Declared splits: what is trained on and what is held out, and that no picture or text is both."""

import io
import json
import re
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layouts import P, write
from tests.profile import examples
from tests.ranks import run_as_threads
from tests.reading import close_account, read_at, texts
from tests.sources import inline, picture, png, write_lines
from tests.test_cli import command, fails
from transfusion.config import DataConfig
from transfusion.data import prepare
from transfusion.data.config import PrepareConfig
from transfusion.data.crops import gather_images
from transfusion.data.heldout import HASH_RANGE, hash_pixels, hash_text
from transfusion.data.leaks import count_leaks
from transfusion.data.raw import RawDocument
from transfusion.data.reading.readers import ReaderOptions, open_reader
from transfusion.data.reading.splits import split_of_name, split_of_record, splits_of_folders
from transfusion.data.store import PreparedFolder, open_prepared
from transfusion.sequence import Image, Text, Vocabulary

CONFIG = PrepareConfig(tokenizer_size=260, sizes=("16x16",), codec="pixels", records_per_shard=3, max_faults=0.0)
SHARE = 0.3  # held out of sources without splits
OPTIONS = ["--sizes", "16x16", "--codec", "pixels", "--tokenizer-size", 260]

Record = tuple[str, int]  # split and content: below 10 a text, otherwise a picture


def is_heldout(content: int) -> bool:
    """In a source without splits."""
    value = hash_text(f"text {content}") if content < 10 else hash_pixels(picture(content)[1])
    return value < SHARE * HASH_RANGE


FREE = [content for content in range(50, 99) if not is_heldout(content)]
contents = st.integers(0, 3) | st.integers(10, 13)
corpora = st.lists(st.tuples(
    st.sampled_from(("files", "column", "archive", "none")),
    st.lists(st.tuples(st.sampled_from(("train", "validation", "test")), contents), max_size=12),
), min_size=1, max_size=3)  # fmt: skip


def write_source(path: Path, kind: str, records: list[Record]) -> dict[str, Record]:
    """Write a source; returns its records by file and row."""
    rows = [{"text": f"text {content}"} if content < 10 else {"image": inline(picture(content)[1]), "caption": "a picture"}
            for _, content in records]  # fmt: skip
    if kind == "archive":
        with tarfile.open(path, "w") as archive:
            for number, (split, content) in enumerate(records):
                for suffix, data in (("png", png(picture(content)[1])), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{split}/{number}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return {f"{path.name}:{split}/{number}": (split, content) for number, (split, content) in enumerate(records)}
    if kind == "files":
        places = {}
        for split in ("train", "validation", "test"):
            numbers = [number for number, record in enumerate(records) if record[0] == split]
            if numbers:
                write_lines(path / f"{split}.jsonl", [rows[number] for number in numbers])
            places |= {f"{split}.jsonl:{row}": records[number] for row, number in enumerate(numbers, 1)}
        return places
    write_lines(path, [row | ({"split": split} if kind == "column" else {})
                       for row, (split, _) in zip(rows, records, strict=True)])  # fmt: skip
    return {f"{path.name}:{row}": record for row, record in enumerate(records, 1)}


@pytest.fixture(autouse=True)
def many_held_out(monkeypatch):
    monkeypatch.setattr(prepare, "MAX_FRACTION", SHARE)


@examples(60, quick=12)
@given(corpora, st.integers(1, 2))
def test_one_picture_has_one_fate_in_sources_with_and_without_splits(corpus, world):
    """Held-out parts are complete, what they have is not trained on, and everything else is."""
    with TemporaryDirectory() as temporary:
        places, addresses = {}, []
        for n, (kind, records) in enumerate(corpus):
            records = [("train", FREE[n]), *(record for record in records if kind != "archive" or record[1] >= 10)]
            records = [("train", content) for _, content in records] if kind == "none" else records
            path = Path(temporary) / (f"s{n}" + {"files": "", "archive": ".tar"}.get(kind, ".jsonl"))
            addresses.append(f"s{n}={path}")
            places |= {(f"s{n}", where): record for where, record in write_source(path, kind, records).items()}
        readers = [open_reader(address) for address in addresses]
        out = Path(temporary) / "out"
        run_as_threads(world, lambda rank, barrier: prepare.prepare(readers, CONFIG, out, rank, world, barrier))
        prepared = open_prepared(out)
        found = {split: sorted(documents_of(prepared, split)) for split in ("train", "heldout")}

        uses = {}
        for source in prepared.names:
            splits = {split for (name, _), (split, _) in places.items() if name == source}
            heldout = next((split for split in ("validation", "test") if split in splits), None)
            use = {"train": "train", heldout: "heldout"} if heldout else {"train": ""}
            uses |= {(source, split): use.get(split) for split in splits}
        fates = {place: uses[place[0], split] or (uses[place[0], split] == "" and ["train", "heldout"][is_heldout(content)])
                 for place, (split, content) in places.items()}  # fmt: skip
        heldout = {content for place, (_, content) in places.items() if fates[place] == "heldout"}
        trained = [place for place, fate in fates.items() if fate == "train"]
        assert found["heldout"] == sorted(place for place, fate in fates.items() if fate == "heldout")
        assert found["train"] == sorted(place for place in trained if places[place][1] not in heldout)
        left_out = {(fault["source"], fault["where"]) for fault in map(json.loads, open(out / "quarantine.jsonl"))}
        assert left_out == {*trained} - {*found["train"]}
        leaks = count_leaks([(out, prepared.metadata)])
        assert (leaks.images, leaks.texts, leaks.heldout_images + leaks.heldout_texts) == (0, 0, len(heldout))
        check_counts(prepared)
        for reader in readers:
            account = prepared.metadata["sources"][reader.name]["account"]["kinds"]["records"]
            assert account["total"] == sum(account["read"].values()) + sum(account["passed_over"].values())


def documents_of(prepared: PreparedFolder, split: str) -> list[tuple[str, str]]:
    """Source and place of each document."""
    sources = (prepared.source(name, split) for name in prepared.names)
    return [(source.name, source.where(number)) for source in sources for number in range(len(source))]


def check_counts(prepared: PreparedFolder) -> None:
    """The counts of a prepared folder are those of the documents that are not left out."""
    vocabulary = Vocabulary.build(prepared.tokenizer.size, prepared.shapes, 2, **prepared.tokenizer.markers)
    for name in prepared.names:
        source = prepared.source(name, "train")
        lengths, shards = [], source.metadata["shards"]
        for document in (source[number] for number in range(len(source))):
            lengths.append(2 + sum(len(part.tokens) if isinstance(part, Text) else vocabulary.num_patches(part.shape) + 2
                                   for part in document.segments))  # fmt: skip
        mean = source.mean_positions(vocabulary, DataConfig(caption_dropout=0.0))
        assert mean == pytest.approx(sum(lengths) / len(lengths))
        images = sum(isinstance(part, Image) for n in range(len(source)) for part in source[n].segments)
        assert sum(count for shard in shards for count in shard["images"]["train"].values()) == images


# Names


@pytest.mark.parametrize(("names", "splits"), [
    ({"test_tube", "dog", "dev_board"}, {}), ({"test_tube", "train_tube"}, {"test_tube": "test", "train_tube": "train"}),
    ({"Train_images", "val2017", "dog"}, {"Train_images": "train", "val2017": "validation"}),
    ({"training-set", "10_dog", "testing"}, {"training-set": "train", "testing": "test"}), ({"hard"}, {}),
    ({"train", "eval"}, {"train": "train", "eval": "test"}),
])  # fmt: skip
def test_splits_of_folders_of_pictures(names, splits, tmp_path):
    assert splits_of_folders(names, "train") == splits
    write(tmp_path, {f"{name}/{n}.png": P for n, name in enumerate(names)})
    documents = read_at(tmp_path, split=None if "train" in splits.values() or not splits else "all")
    is_split = {"train"} < {*splits.values()}
    assert len(documents) == (len(splits) if is_split else len(names))
    assert {document.split for document in documents} == ({"train", "heldout"} if is_split else {""})


@pytest.mark.parametrize(("name", "split", "is_inside"), [
    ("captions_train2017.json", "train", False), ("flickr_test_1k.jsonl", "test", True), ("coco-val-5k", "validation", True),
    ("train_29k.parquet", "train", False), ("restval", "train", False), ("training.tar", "train", False),
    ("contest.jsonl", None, True), ("retrieval.jsonl", None, True),
    ("latest_values.csv", None, True), ("wiki.jsonl", None, True),
])  # fmt: skip
def test_split_of_a_name(name, split, is_inside):
    assert split_of_name(name, "train", is_anywhere=True) == split
    assert split_of_name(name, "train") == (None if is_inside else split)


@pytest.mark.parametrize(("record", "split"), [
    ({"split": "val"}, "validation"), ({"set": " Test "}, "test"), ({"partition": "train2014"}, "train"),
    ({"subset": "testA"}, "test"), ({"split": "dev-clean"}, "validation"), ({"split": "restval"}, "train"),
    ({"set": "Test of Metal"}, None), ({"split": "0"}, None), ({"split": 1, "set": "val"}, "validation"),
    ({"fold": "val"}, None), ({"split": "valley"}, None), ({"split": "news", "subset": "testing"}, "test"), ({}, None),
])  # fmt: skip
def test_split_of_a_record(record, split):
    assert split_of_record(record, "train") == split


@pytest.mark.parametrize(("names", "expected"), [
    (["flickr_train_29k", "flickr_val_1k", "flickr_test_1k"], {"train": ["flickr_train_29k"], "heldout": ["flickr_val_1k"]}),
    (["flickr", "flickr_test_1k"], {"train": ["flickr"], "heldout": ["flickr_test_1k"]}),
    (["wiki", "steam-train-rides"], {"": ["steam-train-rides", "wiki"]}),  # train inside a name, without another split
    (["train", "test"], {"train": ["train"], "heldout": ["test"]}),
    (["train", "evaluation"], {"train": ["train"], "heldout": ["evaluation"]}),
    (["train-0", "train-1"], {"": ["train-0", "train-1"]}),
])  # fmt: skip
def test_files_are_read_by_the_splits_in_their_names(names, expected, tmp_path):
    for name in names:
        write(tmp_path, {f"{name}.jsonl": [{"text": name}]})
    documents = read_at(tmp_path)
    found = {}
    for document, text in zip(documents, texts(documents), strict=True):
        found.setdefault(document.split, []).append(text)
    assert found == expected


def test_column_decides_where_all_files_have_one_split(tmp_path):
    """As in Flickr30k on the hub: test.parquet with a column of splits."""
    rows = [{"text": f"{split} {n}", "split": split} for split in ("train", "val", "test") for n in range(60)]
    write(tmp_path, {"data/test-00000-of-00001.parquet": rows})
    documents = read_at(tmp_path)
    assert [document.split for document in documents] == ["train"] * 60 + ["heldout"] * 60  # more than the first records
    assert texts(read_at(tmp_path, split="test")) == [f"test {n}" for n in range(60)]


@pytest.mark.parametrize("names", [["test", "val"], ["a/test_1k"]])
def test_source_without_training_part_is_an_error(names, tmp_path):
    write(tmp_path, {f"{name}.jsonl": [{"text": name}] for name in names})
    message = r"there is no split train in .*; there are test.*; choose one with --split, or --split all"
    with pytest.raises(ValueError, match=message):
        read_at(tmp_path)
    assert len(read_at(tmp_path, split="all")) == len(names)
    write(tmp_path, {"rows.jsonl": [{"text": "one", "split": "test"}]})
    with pytest.raises(ValueError, match=message):
        read_at(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"there is no split validation in .*; there are test"):
        read_at(tmp_path / "rows.jsonl", split="val")


def test_folder_in_a_file_of_a_split_is_a_class(tmp_path):
    """The outermost name decides: val.tar with pictures of trains has nothing to train on."""
    members = [(f"{name}/{n}.{suffix}", content) for name in ("train", "bus") for n in range(2)
               for suffix, content in (("png", P), ("txt", name))]  # fmt: skip
    write(tmp_path, {"train.tar": members, "val.tar": members})
    documents = read_at(tmp_path)
    assert [(document.where.partition(":")[0], document.split) for document in documents] == (
        [("train.tar", "train")] * 4 + [("val.tar", "heldout")] * 4
    )
    write(tmp_path / "classes", {"a.tar": members})
    assert {document.split for document in read_at(tmp_path / "classes")} == {""}


def test_pictures_of_the_held_out_part_are_found_in_their_own_folder(tmp_path):
    write(tmp_path, {f"{split}/images/{split}.png": png(picture(n)[1]) for n, split in enumerate(("train", "val"))})
    write(tmp_path, {f"{split}.csv": f"image,caption\n{split}.png,a picture\n" for split in ("train", "val")})
    documents = read_at(tmp_path)
    assert all(isinstance(document, RawDocument) for document in documents), documents
    assert [document.split for document in documents] == ["train", "heldout"]
    account = close_account(open_reader(str(tmp_path)))
    assert account.tallies["files"].passed_over.total() == 0


def test_log_beside_the_captions_is_not_held_out(tmp_path):
    write(tmp_path, {"captions.jsonl": [{"file_name": "1.png", "text": "one"}], "1.png": P,
                     "val_losses.jsonl": [{"step": 1, "loss": 0.5}]})  # fmt: skip
    assert [document.split for document in read_at(tmp_path)] == [""]


# Limits


@pytest.mark.parametrize(("limit", "members"), [(1, 2), (3, 6), (4, 8), (5, 10), (6, 12), (9, 12)])
@pytest.mark.parametrize("max_rows", [1, 2, 1000])
def test_limit_ends_the_listing_of_archives(limit, members, max_rows, tmp_path):
    """What is behind it is not counted as read; a file that is not reached is named."""
    for name in "ab":
        write(tmp_path, {f"{name}.tar": [(f"{n}.{suffix}", content) for n in range(3)
                                         for suffix, content in (("png", P), ("txt", f"{name} {n}"))]})  # fmt: skip
    account = close_account(open_reader(str(tmp_path), ReaderOptions(limit=limit)), max_rows)
    assert account.tallies["members"].total == account.tallies["members"].read.total() == members
    assert account.tallies["records"].total == min(limit, 6)
    assert account.tallies["files"].passed_over == ({"behind the limit of records": 1} if limit <= 3 else {})


def test_limit_of_a_folder_names_the_other_pictures(tmp_path):
    write(tmp_path, {f"{n}.{suffix}": content for n in range(5) for suffix, content in (("png", P), ("txt", str(n)))})
    account = close_account(open_reader(str(tmp_path), ReaderOptions(limit=2)))
    assert account.tallies["files"].passed_over == {"behind the limit of records": 6}


def test_held_out_part_gets_a_twentieth_of_the_limit(tmp_path):
    write(tmp_path, {f"{split}.jsonl": [{"text": f"{split} {n}"} for n in range(50)] for split in ("train", "val")})
    for limit, heldout in ((1, 0), (2, 1), (20, 1), (21, 2), (40, 2)):
        splits = [document.split for document in read_at(tmp_path, limit=limit)]
        assert (len(splits), splits.count("heldout")) == (limit, heldout)


# Commands


@pytest.fixture
def photos(tmp_path):
    """Pictures 0 to 7 to train on, 8 to 11 and 0 to be held out, 12 of another split."""
    parts = {"train": range(8), "val": (8, 9, 10, 11, 0), "test": (12,)}
    write(tmp_path / "photos", {f"{split}/{n}.{suffix}": content for split, numbers in parts.items() for n in numbers
                                for suffix, content in (("png", png(picture(n)[1])), ("txt", f"number {n}"))})  # fmt: skip
    return tmp_path / "photos"


def test_commands_say_what_is_held_out(photos, tmp_path, capsys):
    command("data", "validate", photos)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "the split validation is held out" in lines
    assert "8 documents for training, 5 held out" in lines
    both = "1 pictures? and 1 documents? are held out and also for training: prepare leaves their training documents out"
    assert any(re.fullmatch(both, line) for line in lines)
    assert "2 of another split: test/12.png, test/12.txt" in lines
    command("data", "prepare", photos, "--out", tmp_path / "out", *OPTIONS)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert "photos: the split validation is held out" in lines
    assert any(line.startswith("photos: 7 to train on, 5 held out; 1 left out (1 also held out)") for line in lines)
    assert "1 also held out: train/0.png" in lines
    assert "5 pictures and 0 texts are held out; none of them is trained on" in lines
    trained = documents_of(open_prepared(tmp_path / "out"), "train")
    assert trained == [("photos", f"train/{n}.png") for n in range(1, 8)]


@pytest.mark.parametrize(("path", "options"), [("photos/val", []), ("photos", ["--split", "val"])])
def test_training_on_a_validation_part_is_said(path, options, photos, tmp_path, capsys):
    for arguments in (("validate",), ("prepare", "--out", tmp_path / "out", *OPTIONS, "--heldout", 0)):
        verb, *others = arguments
        command("data", verb, photos.parent / path, *options, *others)
        captured = capsys.readouterr()
        assert "only the split validation is read, and it is for training" in captured.out + captured.err
    assert "there is no split nowhere in" in fails(capsys, 1, "data", "validate", photos, "--split", "nowhere")


def test_codec_is_not_trained_on_a_held_out_picture(photos, tmp_path):
    """Picture 0 is also a training picture, which is read first."""
    (tmp_path / "gathered").mkdir()
    for crops in (0, 2):
        folder = tmp_path / f"gathered{crops}"
        folder.mkdir()
        gathered = gather_images([open_reader(str(photos))], (8, 8), 3, 1000, folder, crops=crops)
        heldout = {n // max(1, crops) for n in gathered.heldout}
        assert len(gathered.images) == 12 * max(1, crops)
        assert heldout == {0, 8, 9, 10, 11}


def test_a_split_that_is_missing_only_within_the_limit_is_not_called_absent(tmp_path):
    rows = [{"text": f"words {n}", "split": "test" if n < 20 else "train"} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = open_reader(str(tmp_path / "a.jsonl"), ReaderOptions(limit=10))
    with pytest.raises(ValueError, match=r"^there is no split train in the first 10 records of .*a\.jsonl; there are test"):
        reader.units(5)
    assert open_reader(str(tmp_path / "a.jsonl")).units(5)
