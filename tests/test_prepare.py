"""Prepared data: encoded once, nothing lost, the same however often it was interrupted and however many made it."""

import errno
import json
import os
import shutil
import threading
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from tests.documents import contents, contents_of, same_batch
from tests.profile import THOROUGH, examples
from tests.sources import inline, picture, png, write_lines, write_photos, write_texts
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, PrepareConfig
from transfusion.data import fitting
from transfusion.data import prepare as preparing
from transfusion.data.loader import (
    BEGINNING,
    Encoder,
    Loader,
    contains_edits,
    element_weights,
    heldout_batches,
    reorder_and_drop,
)  # fmt: skip
from transfusion.data.prepare import PrepareError, prepare
from transfusion.data.raw import RawDocument, RawText
from transfusion.data.reading.readers import open_reader
from transfusion.data.sources import fit, open_raw, open_sources
from transfusion.data.store import PreparedFolder, ShardWriter, open_prepared
from transfusion.data.survey import survey
from transfusion.disk import OpenError, read_json
from transfusion.sequence import Document, Image, Text, encode_document, split_chunk

CONFIG = PrepareConfig(tokenizer_size=300, shard=16)


@cache
def place() -> Path:
    """The files that most tests prepare: 70 captioned pictures, 90 texts."""
    folder = Path(_TEMPORARY.name)
    write_photos(folder / "photos", 70)
    write_texts(folder / "texts.jsonl", 90)
    return folder


_TEMPORARY = TemporaryDirectory()


def readers(folder: Path | None = None) -> list:
    folder = folder or place()
    return [open_reader(f"{folder}/photos"), open_reader(f"{folder}/texts.jsonl")]


@cache
def whole() -> Path:
    """Prepared without any disturbance."""
    folder = place() / "prepared"
    prepare(readers(), CONFIG, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(prepared: PreparedFolder, name: str) -> dict[str, Document]:
    """Every document of a source, held out or not, by where it came from."""
    stored = [prepared.source(name, split) for split in ("train", "heldout")]
    found = {source.where(n): source[n] for source in stored for n in range(len(source))}
    assert len(found) == sum(map(len, stored))
    return found


# What is in it


def test_every_document_is_there_once_with_its_tokens_and_its_latents():
    prepared = open_prepared(whole())
    for reader in readers():
        found = documents_of(prepared, reader.name)
        for unit in reader.units(1000):
            for raw in reader.read(unit):
                document = found.pop(raw.where)
                assert document.pairs == raw.pairs
                for part, original in zip(document.segments, raw.segments, strict=True):
                    assert part.loss == original.loss
                    if isinstance(part, Text):
                        assert part.tokens == prepared.tokenizer.encode(original.text)
                    else:
                        expected = prepared.codec.encode(original.pixels).astype(np.float16)
                        assert np.array_equal(part.content, expected)
        assert not found


def test_held_out_documents_keep_their_pictures(tmp_path):
    """As they were before the codec, of each size, in their order; training documents are as the codec gives them back."""
    pairs = [[{"image": inline(picture(n + wide, 16 + wide, 16)[1])} for wide in (0, 16)] for n in range(100)]
    records = [{"segments": [first, {"text": "and"}, second]} for first, second in pairs]
    records += [{"segments": [{"text": "no picture"}]}] * 100
    source = open_reader(str(write_lines(tmp_path / "two.jsonl", records)))
    prepare([source], replace(CONFIG, sizes=("16x16", "32x16"), shard=30), tmp_path / "out")
    (heldout,), (train,) = (open_raw(DataConfig(prepared=(str(tmp_path / "out"),), sources=("two",)), split)
                            for split in ("heldout", "train"))  # fmt: skip
    raws = {raw.where: raw for unit in source.units(30) for raw in source.read(unit)}
    shown = [heldout[n] for n in range(len(heldout))]
    assert {len(one.segments) for one in shown} == {1, 3}
    for one in shown:
        for part, original in zip(one.segments, raws[one.where].segments, strict=True):
            assert part.text == original.text if isinstance(part, RawText) else np.array_equal(part.pixels, original.pixels)
    assert not any(train.stored.original_images(n) for n in range(len(train)))
    with_pictures = next(train[n] for n in range(len(train)) if len(train[n].segments) == 3)
    before = raws[with_pictures.where].segments[0].pixels
    assert not np.array_equal(with_pictures.segments[0].pixels, before)  # the codec has lost some of it


def test_a_document_may_hold_anything(tmp_path):
    """Texts and images in any order, of several sizes, with and without loss, empty texts between them."""
    pixels = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 32), (16, 16)))]
    many = [{"image": inline(p), "loss": n % 2 == 0, "max_t": (0.0, 0.5, 1.0, 1.0)[n]} for n, p in enumerate(pixels)]
    records = [
        {"segments": [*many, {"text": "behind", "loss": False}]}, {"segments": [{"text": "before"}, *many]},
        {"segments": [{"text": "alone"}]}, {"segments": [many[1]]},
    ]  # fmt: skip
    source = open_reader(str(write_lines(tmp_path / "any.jsonl", records * 12)))
    config = replace(CONFIG, sizes=("16x16", "32x16", "16x32"), codec="pixels", heldout=0, shard=5)
    prepare([source], config, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.shapes == [(16, 16), (16, 32), (32, 16)]
    found = documents_of(prepared, "any")
    for number, document in enumerate(found[f"any.jsonl:{n + 1}"] for n in range(48)):
        asked = records[number % 4]["segments"]
        assert [part.loss for part in document.segments] == [part.get("loss", True) for part in asked]
        images = [part for part in document.segments if isinstance(part, Image)]
        kept = [part for part in asked if "image" in part]
        assert [image.max_t for image in images] == [part["max_t"] for part in kept]
        for image, part in zip(images, kept, strict=True):
            expected = prepared.codec.encode(pixels[many.index(part)])
            assert np.array_equal(image.content, expected.astype(np.float16))


def test_tokenizer_and_codec_know_only_training_documents(tmp_path):
    """Whatever the held-out pictures and captions are, they change nothing."""
    write_photos(tmp_path / "photos", 70)
    before = open_prepared(whole())
    config = replace(CONFIG)
    prepare([open_reader(f"{tmp_path}/photos")], config, tmp_path / "one")
    heldout = open_prepared(tmp_path / "one").source("photos", "heldout")
    assert 0 < len(heldout) < 15
    lines = (tmp_path / "photos" / "metadata.jsonl").read_text().splitlines()
    for number in range(len(heldout)):
        row = int(heldout.where(number).rpartition(":")[2]) - 1
        record = json.loads(lines[row])
        lines[row] = json.dumps({**record, "text": "quite another matter"})
        (tmp_path / "photos" / record["file_name"]).write_bytes(png(np.full((16, 16, 3), 7, np.uint8)))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prepare([open_reader(f"{tmp_path}/photos")], config, tmp_path / "other")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert before.codec.channels == open_prepared(tmp_path / "one").codec.channels


def test_captions_of_one_picture_are_held_out_together(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    images, annotations = [], []
    for number in range(60):
        (tmp_path / "train2017" / f"{number}.png").write_bytes(png(picture(number)[1]))
        images.append({"id": 1000 + number, "file_name": f"{number}.png"})
        annotations += [{"image_id": 1000 + number, "caption": f"caption {n} of {number}"} for n in range(5)]
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations[::2] + annotations[1::2]}))
    prepare([open_reader(str(path))], CONFIG, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    sides = []
    for split in ("train", "heldout"):
        source = prepared.source("captions_train2017", split)
        texts = [prepared.tokenizer.decode(source[n].segments[0].tokens) for n in range(len(source))]
        sides.append(Counter(text.split()[-1] for text in texts))
    assert sides[1]
    assert not sides[0].keys() & sides[1].keys()
    assert set((sides[0] + sides[1]).values()) == {5}


def test_pictures_are_cut_to_the_nearest_of_the_sizes(tmp_path):
    folder = write_photos(tmp_path / "wide", 12, 64, 32)
    write_photos(tmp_path / "wide" / "more", 12, 30, 33)
    (tmp_path / "wide" / "more" / "metadata.jsonl").unlink()
    lines = (folder / "metadata.jsonl").read_text()
    more = lines.replace('"00', '"more/00')
    (folder / "metadata.jsonl").write_text(lines + more)
    config = replace(CONFIG, sizes=("16x16", "32x16"), codec="block_pca", codec_block=4, heldout=0)
    prepare([open_reader(str(folder))], config, tmp_path / "out")
    shapes = Counter(d.segments[1].shape for d in documents_of(open_prepared(tmp_path / "out"), "wide").values())
    assert shapes == {(4, 8): 12, (4, 4): 12}


@pytest.mark.parametrize(("sizes", "expected"), [
    ([(16, 16)] * 4, [16, 16]), ([(16, 16), (16, 20)] * 2, [256, 256]), ([(300, 300)] * 4, [256, 256]),
    ([(48, 32)] * 4, [48, 32]),
])  # fmt: skip
def test_pictures_that_are_alike_and_small_stay_as_they_are(tmp_path, sizes, expected):
    records = [{"image": inline(picture(n, *size)[1]), "caption": f"number {n}"} for n, size in enumerate(sizes)]
    about = prepare([open_reader(str(write_lines(tmp_path / "a.jsonl", records)))], CONFIG, tmp_path / "out")
    assert about["sizes"] == [expected]


def test_a_tokenizer_that_is_brought_along_keeps_its_markers(tmp_path):
    engine = Engine.from_str(Tokenizer.train(["red above blue, number"], 280).to_json())
    engine.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<x>")])
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    config = replace(CONFIG, tokenizer=str(tmp_path / "tokenizer.json"))
    lines = [{"image": inline(picture(n)[1]), "caption": "</s> red <s><x>"} for n in range(30)]
    prepare([open_reader(str(write_lines(tmp_path / "a.jsonl", lines)))], config, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    vocabulary = fit(DataConfig(prepared=(str(tmp_path / "out"),), seq_len=64), patch_size=2, seed=0).vocabulary
    assert (vocabulary.bos, vocabulary.eos) == (engine.token_to_id("<s>"), engine.token_to_id("</s>"))
    assert len({vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.eoi, *vocabulary.boi.values()}) == 5
    special = {engine.token_to_id(name) for name in ("<s>", "</s>", "<x>")}
    for document in documents_of(prepared, "a").values():
        assert not special & set(document.segments[0].tokens)
        assert prepared.tokenizer.decode(document.segments[0].tokens) == "</s> red <s><x>"


def test_a_folder_may_be_made_like_another(tmp_path):
    """With its tokenizer, codec and sizes: then it may hold text alone."""
    config = replace(CONFIG, like=str(whole()), tokenizer_size=None)
    prepare(readers()[1:], config, tmp_path / "texts")
    one, other = open_prepared(whole()), open_prepared(tmp_path / "texts")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (whole() / name).read_bytes() == (tmp_path / "texts" / name).read_bytes()
    assert one.metadata["sizes"] == other.metadata["sizes"]
    (before, now) = (documents_of(prepared, "texts") for prepared in (one, other))
    assert {where: d.segments for where, d in before.items()} == {where: d.segments for where, d in now.items()}
    with pytest.raises(OpenError, match="no prepared data"):
        prepare(readers(), replace(CONFIG, like=str(tmp_path), tokenizer_size=None), tmp_path / "out")


def test_one_run_reads_several_folders_that_go_together(tmp_path):
    alike = replace(CONFIG, like=str(whole()), tokenizer_size=None)
    prepare([open_reader(f"more={place()}/texts.jsonl")], alike, tmp_path / "more")
    both = encoder(prepared=(str(whole()), str(tmp_path / "more")))
    sources = open_sources(both.config, "train")
    assert [source.name for source in sources] == ["photos", "texts", "more"]
    texts = [{source.where(n): source[n].segments for n in range(len(source))} for source in sources[1:]]
    assert all(texts[0][where] == texts[1][where] for where in texts[0].keys() & texts[1].keys())
    assert both.vocabulary == encoder().vocabulary
    assert Loader(sources, both).pack_block(0)
    with pytest.raises(ValueError, match="called photos"):
        encoder(prepared=(str(whole()), str(whole())))
    prepare(readers(), replace(CONFIG, tokenizer_size=280), tmp_path / "other")
    with pytest.raises(ValueError, match="--like"):
        encoder(prepared=(str(whole()), str(tmp_path / "other")))


def test_datasets_reads_the_shards():
    datasets = pytest.importorskip("datasets")
    path = whole() / "photos" / "train-00000.arrow"
    found, prepared = datasets.Dataset.from_file(str(path)), open_prepared(whole())
    stored = prepared.source("photos", "train")
    for row, record in enumerate(found):
        assert record["where"] == stored.where(row)
        assert tuple(record["tokens"]) == stored[row].segments[0].tokens
        assert np.array_equal(np.array(record["latents"], np.float16), stored[row].segments[1].content.ravel())


# Interrupted, spread, refused


class Killed(BaseException):
    """A process that is no longer there."""


@pytest.mark.parametrize("world", [2, 3, 5])
def test_however_many_processes_the_result_is_the_same(tmp_path, world):
    barrier, failed = threading.Barrier(world), []

    def work(rank: int) -> None:
        try:
            prepare(readers(), CONFIG, tmp_path / "out", rank, world, barrier.wait)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert files_of(tmp_path / "out") == files_of(whole())


@examples(12)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_killed_anywhere_it_goes_on_and_redoes_no_finished_shard(moments):
    with TemporaryDirectory() as temporary:
        folder, made, real = Path(temporary) / "out", [], fitting.TokenizerAndCodec.crop
        written = {}
        for moment in [*moments, None]:
            left = [moment]

            def cut_once(self, raw, left=left):
                if left[0] is not None:
                    if left[0] == 0:
                        raise Killed
                    left[0] -= 1
                made.append(raw.where)
                return real(self, raw)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fitting.TokenizerAndCodec, "crop", cut_once)
                patch.setattr(ShardWriter, "abort", lambda self: None)  # who is killed cleans nothing up
                try:
                    prepare(readers(), CONFIG, folder)
                except Killed:
                    pass
            marks = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.json")}
            assert marks.items() >= written.items()
            written = marks
        found = {name: content for name, content in files_of(folder).items() if not name.endswith(".tmp")}
        assert found == files_of(whole())
        assert not list(folder.rglob("*.tmp"))
        assert len(made) <= 160 + sum(min(moment, 16) for moment in moments)  # at most a shard anew for each kill


@pytest.mark.parametrize("what", ["_flush", "close"])
def test_a_full_disk_stops_it_in_words_and_costs_nothing(tmp_path, monkeypatch, what):
    real, calls = getattr(ShardWriter, what), []

    def full(self):
        calls.append(self.path)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self)

    monkeypatch.setattr(ShardWriter, what, full)
    with pytest.raises(PrepareError, match="No space left on device") as error:
        prepare(readers(), CONFIG, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "resumes" in str(error.value)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(OpenError, match="not finished"):
        open_prepared(tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole())


def test_prepared_again_it_only_says_so(monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole().rglob("*")}
    monkeypatch.setattr(fitting.TokenizerAndCodec, "crop", None)
    assert prepare(readers(), CONFIG, whole()) == read_json(whole() / "dataset.json")
    assert {path: path.stat().st_mtime_ns for path in whole().rglob("*")} == before


def test_other_files_or_settings_for_the_same_folder_are_refused(tmp_path):
    shutil.copytree(whole(), tmp_path / "out")
    with pytest.raises(PrepareError, match="heldout is 1000 there, 5 here"):
        prepare(readers(), replace(CONFIG, heldout=5), tmp_path / "out")
    with pytest.raises(PrepareError, match="its sources are photos, texts"):
        prepare(readers()[:1], CONFIG, tmp_path / "out")
    shutil.copytree(place() / "photos", tmp_path / "photos")
    write_texts(tmp_path / "texts.jsonl", 91)
    with pytest.raises(PrepareError, match="texts: records is 90 there, 91 here"):
        prepare(readers(tmp_path), CONFIG, tmp_path / "out")
    shutil.copy2(place() / "texts.jsonl", tmp_path / "texts.jsonl")
    prepare(readers(tmp_path), replace(CONFIG, max_faults=0.5), tmp_path / "out")  # nothing of it decides what is in it
    (tmp_path / "photos" / "0003.png").rename(tmp_path / "photos" / "0003b.png")
    with pytest.raises(PrepareError, match="photos: files is"):  # the same number of files, and of bytes
        prepare(readers(tmp_path), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole())


def test_a_start_that_failed_ties_nobody_to_its_settings(tmp_path):
    with pytest.raises(ValueError, match="18x18"):
        prepare(readers(), replace(CONFIG, sizes=("18x18",), codec="block_pca"), tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole())


@pytest.mark.parametrize("out", ["photos", "photos/prepared", "."])
def test_what_is_made_may_not_lie_among_its_sources(tmp_path, out):
    write_photos(tmp_path / "photos", 5)
    with pytest.raises(PrepareError, match="contains the source .* or is inside it"):
        prepare([open_reader(f"{tmp_path}/photos")], CONFIG, tmp_path / out)
    assert not list(tmp_path.rglob("recipe.json"))


@pytest.mark.parametrize("moment", [1, 3, 5, 7])
def test_a_disk_that_is_full_while_fitting_or_at_the_end_is_said_in_words(tmp_path, monkeypatch, moment):
    """recipe, tokenizer, codec, fitted, ..., quarantine, dataset: each is written whole or not at all."""
    from transfusion import disk

    written = []

    def full(path, content, real=disk.write_whole):
        written.append(path)
        if len(written) == moment and path.suffix != ".arrow":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    with monkeypatch.context() as patch:
        for module in (disk, fitting, preparing):
            patch.setattr(module, "write_whole", full)
        with pytest.raises(PrepareError, match="No space left on device.*resumes"):
            prepare(readers(), CONFIG, tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole())


def test_photographs_are_cut_as_they_are_read(tmp_path, monkeypatch):
    """However many documents are encoded together, hardly more than one is held as it was read."""
    alive, most, real = [], [], fitting.TokenizerAndCodec.crop

    def cut(self, raw):
        alive.append(weakref.ref(raw))
        most.append(sum(one() is not None for one in alive))
        return real(self, raw)

    monkeypatch.setattr(fitting.TokenizerAndCodec, "crop", cut)
    prepare(readers(), CONFIG, tmp_path / "out")
    assert len(most) == 160
    assert max(most) <= 2


def test_two_sources_of_one_name_are_refused(tmp_path):
    with pytest.raises(PrepareError, match="2 sources are called photos"):
        prepare([*readers(), open_reader(f"photos={place()}/texts.jsonl")], CONFIG, tmp_path / "out")


# Faults


def faulty(folder: Path, count: int, bad: int, seed: int = 0) -> Path:
    """Captioned pictures as lines, of which some cannot be used."""
    wrong = set(np.random.default_rng(seed).choice(count, bad, replace=False).tolist())
    records = []
    for number in range(count):
        caption, pixels = picture(number)
        content = inline(pixels)
        record = {"image": content, "caption": caption}
        if number in wrong:
            kinds = ({"image": content[:70]}, {"caption": "  "}, {"image": "nowhere.png"}, {"image": None})
            record |= kinds[number % 4]
        records.append(record)
    return write_lines(folder / "faulty.jsonl", records)


def test_a_few_faults_are_left_out_named_and_counted(tmp_path):
    path = faulty(tmp_path, 400, 4)
    about = prepare([open_reader(str(path))], CONFIG, tmp_path / "out")["sources"]["faulty"]
    assert sum(about["faults"].values()) == 4
    assert sum(about["documents"].values()) == 396
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    found = survey(open_reader(str(path)), None)
    assert Counter(line["kind"] for line in lines) == found.faults
    expected = {f"faulty.jsonl:{n + 1}" for n in np.random.default_rng(0).choice(400, 4, replace=False).tolist()}
    assert {line["where"] for line in lines} == expected
    assert all(line["source"] == "faulty" and line["message"] for line in lines)


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_faults_stop_it_with_the_first_ten(tmp_path, world):
    path = faulty(tmp_path, 400, 30)
    wrong = sorted(np.random.default_rng(0).choice(400, 30, replace=False).tolist())
    with pytest.raises(PrepareError) as error:
        for rank in reversed(range(world)):
            prepare([open_reader(str(path))], CONFIG, tmp_path / "out", rank, world) if rank == 0 else None
    message = str(error.value)
    assert "of 400 records of faulty, so far, cannot be used" in message
    assert message.count("\n") <= 10
    assert f"faulty.jsonl:{wrong[0] + 1}:" in message
    assert not (tmp_path / "out" / "dataset.json").exists()
    about = prepare([open_reader(str(path))], replace(CONFIG, max_faults=0.1), tmp_path / "lenient")
    assert about["sources"]["faulty"]["documents"]["train"] > 300


def test_of_documents_with_one_id_the_first_stays(tmp_path):
    ids = [f"n{number % 97}" for number in range(100)]  # three stand twice
    records = [{"id": id_, "text": f"text {n}", "image": inline(picture(n)[1])} for n, id_ in enumerate(ids)]
    path = write_lines(tmp_path / "twice.jsonl", records)
    about = prepare([open_reader(str(path))], replace(CONFIG, max_faults=0.03), tmp_path / "out")["sources"]["twice"]
    assert about["faults"] == {"duplicate id": 3}
    assert survey(open_reader(str(path)), None).faults == {"duplicate id": 3}
    prepared = open_prepared(tmp_path / "out")
    found = documents_of(prepared, "twice")
    assert set(found) == {f"twice.jsonl:{n + 1}" for n in range(97)}
    for where, document in found.items():
        said = prepared.tokenizer.decode(document.segments[0].tokens)
        assert said == f"text {int(where.rpartition(':')[2]) - 1}"


def test_a_source_without_pictures_alone_is_refused(tmp_path):
    with pytest.raises(PrepareError, match="none of the first documents has an image"):
        prepare(readers()[1:], CONFIG, tmp_path / "out")


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["photos/train-00000.arrow", "tokenizer.json", "codec.safetensors"])
def test_a_file_that_was_changed_is_found(tmp_path, name, change):
    shutil.copytree(whole(), tmp_path / "out")
    path = tmp_path / "out" / name
    content = path.read_bytes()
    match change:
        case "flip":
            path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "remove":
            path.unlink()
    with pytest.raises(OpenError, match=path.name):
        open_prepared(tmp_path / "out").verify()


@examples(60)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_damaged_shard_raises_nothing_but_one_clear_error(seed, truncate):
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        shutil.copytree(whole(), folder)
        path, rng = folder / "photos" / "train-00000.arrow", np.random.default_rng(seed)
        content = bytearray(path.read_bytes())
        if truncate:
            content = content[: rng.integers(len(content))]
        for at in rng.integers(len(content), size=3) if content else ():
            content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        stored = open_prepared(folder).source("photos", "train")
        for number in range(len(stored)):
            try:
                stored[number]
            except OpenError as error:
                assert "\n" not in str(error)


def test_folders_that_are_not_prepared(tmp_path):
    with pytest.raises(OpenError, match="no prepared data"):
        open_prepared(tmp_path)
    shutil.copytree(whole(), tmp_path / "out")
    about = read_json(tmp_path / "out" / "dataset.json")
    (tmp_path / "out" / "dataset.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(OpenError, match="format 99"):
        open_prepared(tmp_path / "out")
    del about["codec"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(OpenError, match="damaged"):
        open_prepared(tmp_path / "out")


def test_a_shard_without_documents_is_no_hindrance(tmp_path):
    """A whole unit of faults, and splits that get nothing."""
    records = [{"image": inline(picture(n)[1]), "caption": "red" if not 5 <= n < 10 else ""} for n in range(20)]
    config = replace(CONFIG, shard=5, max_faults=0.3, heldout=0)
    path = write_lines(tmp_path / "a.jsonl", records)
    prepare([open_reader(str(path))], config, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert len(prepared.source("a", "train")) == 15
    assert len(prepared.source("a", "heldout")) == 0
    assert pa.ipc.open_stream(str(tmp_path / "out" / "a" / "train-00001.arrow")).read_all().num_rows == 0
    assert open_sources(DataConfig(prepared=(str(tmp_path / "out"),)), "heldout") == []


# Read by a run


@cache
def encoder(**config) -> Encoder:
    usual = {"prepared": (str(whole()),), "seq_len": 64, "rows": 2, "shuffle_block": 24}
    return fit(DataConfig(**usual | config), patch_size=2, seed=0)


def loader(rank: int = 0, world: int = 1, **config) -> Loader:
    found = encoder(**config)
    return Loader(open_sources(found.config, "train"), found, rank, world)


def rows_from(found: Loader, start, count: int) -> list:
    """So many batches as the contents of their rows, and the places behind them."""
    return list(islice(found.batches(start), count))


def test_every_position_of_an_epoch_comes_exactly_once():
    found = loader()
    epochs = {(source.name, id_): 0 for source in found.sources for id_ in range(len(source))}
    expected, packed, block = Counter(), Counter(), 0
    while min(epochs.values()) < 2:  # until every document has been read twice
        entries = [found.stream[n] for n in range(24 * block, 24 * block + 24)]
        for source, epoch, id_ in entries:
            name = found.sources[source].name
            assert epochs[name, id_] == epoch  # neither too early nor too late, and never twice
            epochs[name, id_] += 1
            document = found.encoder.to_document(found.sources[source][id_], name, epoch)
            expected.update(
                contents(piece) for piece in split_chunk(encode_document(document, found.encoder.vocabulary), 64)
            )
        packed.update(piece for row in contents_of(found.pack_block(block)) for piece in row)
        block += 1
    assert packed == expected


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(workers):
    one, other = rows_from(loader(), BEGINNING, 30), rows_from(loader(workers=workers), BEGINNING, 30)
    assert all(same_batch(a, b) and x == y for (a, x), (b, y) in zip(one, other, strict=True))


WAYS = [(1, 4, 4), (4, 1, 4), (2, 4, 8), (4, 2, 8), (1, 2, 8)]  # ranks before, ranks after, rows of all together


@pytest.mark.parametrize(("before", "after", "batch"), list(product((1, 2, 4), (1, 2, 4), (4, 8))) if THOROUGH else WAYS)
def test_ranks_may_change_where_a_run_goes_on(before, after, batch):
    """Saved by so many ranks, gone on with by others: at one global batch size the same global batches."""
    undisturbed = rows_from(loader(rows=batch), BEGINNING, 9)

    def together(world: int, start, count: int):
        ranks = [rows_from(loader(rank, world, rows=batch // world), start, count) for rank in range(world)]
        for parts in zip(*ranks, strict=True):
            assert len({place_ for _, place_ in parts}) == 1
            tokens = np.empty((batch, 64), np.int64)
            for rank, (part, _) in enumerate(parts):
                tokens[rank::world] = part.tokens.numpy()
            yield tokens, parts[0][1]

    first = list(together(before, BEGINNING, 4))
    rest = list(together(after, first[-1][1], 5))
    for (tokens, place_), (expected, expected_place) in zip(first + rest, undisturbed, strict=True):
        assert np.array_equal(tokens, expected.tokens.numpy())
        assert place_ == expected_place


@examples(20, quick=8)
@given(st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=4))
def test_whatever_the_batch_sizes_no_row_is_missed_or_repeated(sessions):
    """Each session has its own number of ranks and rows, and stops after some batches."""
    place_, seen = BEGINNING, []
    for world, rows, count in sessions:
        ranks = [rows_from(loader(rank, world, rows=rows), place_, count) for rank in range(world)]
        for n in range(count):
            both = np.concatenate([found[n][0].tokens.numpy() for found in ranks])
            order = np.argsort([rank + world * row for rank in range(world) for row in range(rows)])
            seen.append(both[order])
        place_ = ranks[0][-1][1]
    seen = np.concatenate(seen)
    one_by_one = rows_from(loader(rows=1), BEGINNING, len(seen))
    assert np.array_equal(seen, np.concatenate([batch.tokens.numpy() for batch, _ in one_by_one]))
    assert one_by_one[-1][1] == place_


@examples(8)
@given(
    st.lists(st.lists(st.integers(0, 90) | st.none(), min_size=1, max_size=5), min_size=3, max_size=25),
    st.integers(1, 6),
)
def test_random_corpora_lose_and_repeat_nothing(corpus, shard):
    """Numbers are lengths of texts, None is a picture."""
    rng = np.random.default_rng(0)
    records = [
        {"segments": [{"image": inline(picture(n)[1])} if size is None else
                      {"text": "".join(rng.choice(list("abcdefgh "), size)) + "."} for size in document]}
        for n, document in enumerate([*corpus, [None]])
    ]  # fmt: skip
    with TemporaryDirectory() as temporary:
        path = write_lines(Path(temporary) / "some.jsonl", records)
        config = PrepareConfig(tokenizer_size=260, shard=shard, heldout=0)
        prepare([open_reader(str(path))], config, Path(temporary) / "out")
        data = DataConfig(prepared=(f"{temporary}/out",), seq_len=40, rows=1, shuffle_block=7)
        fitted = fit(data, 2, seed=3)
        found = Loader(open_sources(data, "train"), fitted)
        epoch = len(found.sources[0])
        blocks = -(-epoch // 7)
        kept = [row for block in range(blocks) for row in contents_of(found.pack_block(block))]
        expected = Counter()
        for n in range(7 * blocks):
            _, number, id_ = found.stream[n]
            document = fitted.to_document(found.sources[0][id_], "some", number)
            parts = split_chunk(encode_document(document, fitted.vocabulary), 40)
            whole_piece = encode_document(document, fitted.vocabulary)
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole_piece.tokens)
            expected.update(map(contents, parts))
        assert Counter(piece for row in kept for piece in row) == expected
        assert sorted(found.stream[n][2] for n in range(epoch)) == list(range(len(records)))


def test_latents_may_be_half_precision_until_they_are_a_batch():
    batch, _ = next(loader().batches())
    assert all(str(group.x0.dtype) == "torch.float32" for group in batch.groups)


def test_a_row_too_short_for_an_image_is_refused_before_training():
    needed = encoder().config.seq_len
    caption = max(len(d.segments[0].tokens) for d in documents_of(open_prepared(whole()), "photos").values())
    shortest = caption + 4 + 4  # bos is let go; boi, eoi, eos and 4 patches
    assert shortest - 1 <= needed
    with pytest.raises(ValueError, match="raise data.seq_len"):
        encoder(seq_len=shortest - 2)
    found = loader(seq_len=shortest - 1)
    assert all(len(found.pack_block(block)) for block in range(4))


def test_weights_follow_from_exact_mean_lengths():
    found = loader(mixture_weights=(3.0, 1.0), caption_dropout=0.0)
    lengths = [
        [len(encode_document(found.encoder.to_document(one, source.name, 0), found.encoder.vocabulary)) for one in source]
        for source in found.sources
    ]
    weights = [share / np.mean(length) for share, length in zip((3, 1), lengths, strict=True)]
    assert np.allclose(element_weights(found.sources, found.encoder), np.array(weights) / sum(weights), rtol=1e-12)
    with pytest.raises(ValueError, match="photos, texts"):
        loader(mixture_weights=(1.0, 1.0, 1.0))


def test_dropped_captions_are_counted_into_the_mean_length():
    found = loader(caption_dropout=0.5, image_first=0.2)
    source, vocabulary = found.sources[0], found.encoder.vocabulary
    measured = np.mean([
        len(encode_document(found.encoder.to_document(source[n], source.name, epoch), vocabulary))
        for n in range(len(source)) for epoch in range(60)
    ])  # fmt: skip
    assert abs(source.mean_positions(vocabulary, 0.8 * 0.5) - measured) < 0.1


def test_heldout_documents_are_held_out():
    sources = open_sources(encoder().config, "heldout")
    batches = [batch for source in sources for batch in heldout_batches(source, encoder(), 99)]
    assert sum(batch.image_count for batch in batches) == len(open_prepared(whole()).source("photos", "heldout"))


def test_prepared_documents_are_shown_as_they_were():
    raws = open_raw(encoder().config, "train")
    for source, stored in zip(raws, open_sources(encoder().config, "train"), strict=True):
        for number in range(0, len(source), 7):
            raw = source[number]
            assert isinstance(raw, RawDocument)
            assert raw.where == stored.where(number)
            if source.name == "photos":
                row = int(raw.where.rpartition(":")[2]) - 1
                caption, pixels = picture(row)
                assert raw.segments[0].text == caption
                assert np.abs(raw.segments[1].pixels.astype(int) - pixels).mean() < 8


# Documents that draw from a given image


def edit(key: int) -> Document:
    source, target = (Image(np.zeros((3, 4, 4), np.float32), loss, time) for loss, time in ((False, 0.0), (True, 1.0)))
    return Document((source, Text((1, 2, 3), loss=False), target), key=key)


def test_conditions_are_dropped_as_often_as_asked():
    config = DataConfig(condition_text_dropout=0.2, condition_dropout=0.1)
    kinds = Counter()
    for key in range(4000):
        document = edit(key)
        segments = reorder_and_drop(document, config).segments
        if segments is not document.segments:
            assert segments[-1] == Text((), loss=False)  # nothing is learnt behind the image
            assert segments[-2] is document.segments[-1]
            segments = segments[:-1]
        kinds[tuple(type(part).__name__ for part in segments)] += 1
    assert abs(kinds["Image", "Image"] / 4000 - 0.2) < 0.02
    assert abs(kinds["Image",] / 4000 - 0.1) < 0.02
    assert kinds["Image", "Text", "Image"] == 4000 - kinds["Image", "Image"] - kinds["Image",]


def test_a_source_with_edits_is_known_by_them():
    """Only then does a server take edits."""
    picture, text = Image(np.zeros((3, 4, 4))), Text((1,))
    others = [Document((text, picture)), Document((picture, text, picture)), Document((text,)), Document(())]
    assert contains_edits([*others, edit(1)])
    assert not contains_edits(others)


@pytest.mark.parametrize("segments", [
    (Image(np.zeros((3, 4, 4)), loss=False), Text((1,))), (Text((1,)), Image(np.zeros((3, 4, 4)))),
    (Image(np.zeros((3, 4, 4))), Text((1,)), Image(np.zeros((3, 4, 4)))), (),
])  # fmt: skip
def test_other_documents_keep_what_they_have(segments):
    config = DataConfig(condition_text_dropout=0.5, condition_dropout=0.5)
    assert reorder_and_drop(Document(segments), config).segments == segments
