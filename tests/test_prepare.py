"""Prepared data: complete, and independent of interruptions and the number of processes."""

import errno
import gzip
import io
import json
import os
import shutil
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
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from tests.documents import changed, contents, contents_of, entries_of
from tests.profile import THOROUGH, examples
from tests.ranks import run_as_threads
from tests.sources import inline, picture, png, write_lines, write_photos, write_texts
from tests.test_cli import command
from transfusion import parallel
from transfusion.codecs.autoencoder import Autoencoder, build_network
from transfusion.codecs.codec import fit_codec, move_to
from transfusion.codecs.config import AutoencoderConfig
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data import fitting
from transfusion.data import prepare as preparing
from transfusion.data.config import PrepareConfig
from transfusion.data.heldout import HASH_RANGE, MAX_FRACTION, hash_pixels
from transfusion.data.lengths import choose_changes
from transfusion.data.loader import (
    START,
    DocumentEncoder,
    Loader,
    contains_edits,
    document_weights,
    heldout_batches,
)  # fmt: skip
from transfusion.data.prepare import PrepareError, prepare
from transfusion.data.raw import RawDocument, RawText
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import open_reader
from transfusion.data.shards import ShardWriter
from transfusion.data.sources import fit, open_raw, open_sources
from transfusion.data.store import PreparedFolder, open_prepared
from transfusion.data.survey import survey
from transfusion.disk import OpenError, read_json
from transfusion.parallel import pick_device
from transfusion.sequence import Document, Image, Text, collate, encode_document, split_chunk

CONFIG = PrepareConfig(tokenizer_size=300, records_per_shard=16)


@cache
def source_folder() -> Path:
    """The files that most tests prepare: 70 captioned images, 90 texts."""
    folder = Path(_TEMPORARY.name)
    write_photos(folder / "photos", 70)
    write_texts(folder / "texts.jsonl", 90)
    return folder


_TEMPORARY = TemporaryDirectory()


def readers(folder: Path | None = None) -> list:
    folder = folder or source_folder()
    return [open_reader(f"{folder}/photos"), open_reader(f"{folder}/texts.jsonl")]


@cache
def reference() -> Path:
    """A folder prepared without interruption, by one process."""
    folder = source_folder() / "prepared"
    prepare(readers(), CONFIG, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(prepared: PreparedFolder, name: str) -> dict[str, Document]:
    """Every document of a source, held out or not, by file and row."""
    sources = [prepared.source(name, split) for split in ("train", "heldout")]
    documents = {source.where(n): source[n] for source in sources for n in range(len(source))}
    assert len(documents) == sum(map(len, sources))
    return documents


# Content


def test_every_document_is_stored_once_with_its_tokens_and_latents():
    prepared = open_prepared(reference())
    for reader in readers():
        documents = documents_of(prepared, reader.name)
        for unit in reader.units(1000):
            for raw in reader.read(unit):
                document = documents.pop(raw.where)
                assert document.pairs == raw.pairs
                for part, original in zip(document.segments, raw.segments, strict=True):
                    assert part.loss == original.loss
                    if isinstance(part, Text):
                        assert part.tokens == prepared.tokenizer.encode(original.text)
                    else:
                        expected = prepared.codec.encode(original.pixels).astype(np.float16)
                        assert np.array_equal(part.content, expected)
        assert not documents


def test_heldout_documents_keep_their_original_images(tmp_path):
    """Of each size, in order. Images of training documents are decoded by the codec."""
    pairs = [[{"image": inline(picture(n + wide, 16 + wide, 16)[1])} for wide in (0, 16)] for n in range(100)]
    records = [{"segments": [first, {"text": "and"}, second]} for first, second in pairs]
    records += [{"segments": [{"text": f"no picture {n}"}]} for n in range(100)]
    source = open_reader(str(write_lines(tmp_path / "two.jsonl", records)))
    prepare([source], replace(CONFIG, sizes=("16x16", "32x16"), records_per_shard=30), tmp_path / "out")
    (heldout,), (train,) = (open_raw(DataConfig(prepared=(str(tmp_path / "out"),), sources=("two",)), split)
                            for split in ("heldout", "train"))  # fmt: skip
    raws = {raw.where: raw for unit in source.units(30) for raw in source.read(unit)}
    documents = [heldout[n] for n in range(len(heldout))]
    assert {len(document.segments) for document in documents} == {1, 3}
    for document in documents:
        for part, original in zip(document.segments, raws[document.where].segments, strict=True):
            assert part.text == original.text if isinstance(part, RawText) else np.array_equal(part.pixels, original.pixels)
    assert not any(train.stored.original_images(n) for n in range(len(train)))
    decoded = next(train[n] for n in range(len(train)) if len(train[n].segments) == 3)
    original = raws[decoded.where].segments[0].pixels
    assert not np.array_equal(decoded.segments[0].pixels, original)  # the codec is lossy


def test_document_may_have_any_segments(tmp_path):
    """Texts and images in any order, of several sizes, with and without loss, empty texts between them."""
    pixels = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 32), (16, 16)))]
    images = [{"image": inline(p), "loss": n % 2 == 0, "max_t": (0.0, 0.5, 1.0, 1.0)[n]} for n, p in enumerate(pixels)]
    records = [
        {"segments": [*images, {"text": "behind", "loss": False}]}, {"segments": [{"text": "before"}, *images]},
        {"segments": [{"text": "alone"}]}, {"segments": [images[1]]},
    ]  # fmt: skip
    source = open_reader(str(write_lines(tmp_path / "any.jsonl", records * 12)))
    config = replace(CONFIG, sizes=("16x16", "32x16", "16x32"), codec="pixels", heldout=0, records_per_shard=5)
    prepare([source], config, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.shapes == [(16, 16), (16, 32), (32, 16)]
    documents = documents_of(prepared, "any")
    for number, document in enumerate(documents[f"any.jsonl:{n + 1}"] for n in range(48)):
        segments = records[number % 4]["segments"]
        assert [part.loss for part in document.segments] == [part.get("loss", True) for part in segments]
        encoded = [part for part in document.segments if isinstance(part, Image)]
        originals = [part for part in segments if "image" in part]
        assert [image.max_t for image in encoded] == [part["max_t"] for part in originals]
        for image, part in zip(encoded, originals, strict=True):
            expected = prepared.codec.encode(pixels[images.index(part)])
            assert np.array_equal(image.content, expected.astype(np.float16))


def test_tokenizer_and_codec_depend_only_on_training_documents(tmp_path):
    """Changed held-out images and captions give the same tokenizer and codec."""
    write_photos(tmp_path / "photos", 70)
    prepare([open_reader(f"{tmp_path}/photos")], CONFIG, tmp_path / "first")
    heldout = open_prepared(tmp_path / "first").source("photos", "heldout")
    assert 0 < len(heldout) < 15
    lines = (tmp_path / "photos" / "metadata.jsonl").read_text().splitlines()
    greys = (np.full((16, 16, 3), level, np.uint8) for level in range(256))
    another = next(pixels for pixels in greys if hash_pixels(pixels) < MAX_FRACTION * HASH_RANGE)  # held out, too
    for number in range(len(heldout)):
        row = int(heldout.where(number).rpartition(":")[2]) - 1
        record = json.loads(lines[row])
        lines[row] = json.dumps({**record, "text": "quite another matter"})
        (tmp_path / "photos" / record["file_name"]).write_bytes(png(another))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prepare([open_reader(f"{tmp_path}/photos")], CONFIG, tmp_path / "second")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert open_prepared(reference()).codec.channels == open_prepared(tmp_path / "first").codec.channels


def test_captions_of_one_image_are_in_the_same_split(tmp_path):
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
    counts = []
    for split in ("train", "heldout"):
        source = prepared.source("captions_train2017", split)
        texts = [prepared.tokenizer.decode(source[n].segments[0].tokens) for n in range(len(source))]
        counts.append(Counter(text.split()[-1] for text in texts))
    assert counts[1]
    assert not counts[0].keys() & counts[1].keys()
    assert set((counts[0] + counts[1]).values()) == {5}


def test_images_are_cropped_to_the_nearest_size(tmp_path):
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
def test_small_images_of_one_size_keep_their_size(tmp_path, sizes, expected):
    records = [{"image": inline(picture(n, *size)[1]), "caption": f"number {n}"} for n, size in enumerate(sizes)]
    about = prepare([open_reader(str(write_lines(tmp_path / "a.jsonl", records)))], CONFIG, tmp_path / "out")
    assert about["sizes"] == [expected]


def test_foreign_tokenizer_keeps_its_special_tokens(tmp_path):
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


def test_like_reuses_tokenizer_codec_and_sizes(tmp_path):
    """Such a folder may contain only text."""
    config = replace(CONFIG, like=str(reference()), tokenizer_size=None)
    prepare(readers()[1:], config, tmp_path / "texts")
    original, like = open_prepared(reference()), open_prepared(tmp_path / "texts")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (reference() / name).read_bytes() == (tmp_path / "texts" / name).read_bytes()
    assert original.metadata["sizes"] == like.metadata["sizes"]
    expected, actual = (documents_of(prepared, "texts") for prepared in (original, like))
    assert {where: d.segments for where, d in expected.items()} == {where: d.segments for where, d in actual.items()}
    with pytest.raises(OpenError, match="not prepared data"):
        prepare(readers(), replace(CONFIG, like=str(tmp_path), tokenizer_size=None), tmp_path / "out")


def test_one_run_reads_several_compatible_folders(tmp_path):
    config = replace(CONFIG, like=str(reference()), tokenizer_size=None)
    prepare([open_reader(f"more={source_folder()}/texts.jsonl")], config, tmp_path / "more")
    fitted = encoder(prepared=(str(reference()), str(tmp_path / "more")))
    sources = open_sources(fitted.config, "train")
    assert [source.name for source in sources] == ["photos", "texts", "more"]
    texts = [{source.where(n): source[n].segments for n in range(len(source))} for source in sources[1:]]
    assert all(texts[0][where] == texts[1][where] for where in texts[0].keys() & texts[1].keys())
    assert fitted.vocabulary == encoder().vocabulary
    assert list(Loader(sources, fitted, 1).block(0))
    with pytest.raises(ValueError, match="called photos"):
        encoder(prepared=(str(reference()), str(reference())))
    prepare(readers(), replace(CONFIG, tokenizer_size=280), tmp_path / "other")
    with pytest.raises(ValueError, match="--like"):
        encoder(prepared=(str(reference()), str(tmp_path / "other")))


def test_datasets_library_reads_shards():
    datasets = pytest.importorskip("datasets")
    path = reference() / "photos" / "train-00000.arrow"
    dataset, prepared = datasets.Dataset.from_file(str(path)), open_prepared(reference())
    stored = prepared.source("photos", "train")
    for row, record in enumerate(dataset):
        assert record["where"] == stored.where(row)
        assert tuple(record["tokens"]) == stored[row].segments[0].tokens
        assert np.array_equal(np.array(record["latents"], np.float16), stored[row].segments[1].content.ravel())


# Interruptions, processes and errors


class Killed(BaseException):
    """The process was killed."""


@pytest.mark.parametrize("world", [2, 3, 5])
def test_result_does_not_depend_on_the_number_of_processes(tmp_path, world):
    expected = files_of(reference())  # before the threads start: they share the cached source folder
    run_as_threads(world, lambda rank, barrier: prepare(readers(), CONFIG, tmp_path / "out", rank, world, barrier))
    assert files_of(tmp_path / "out") == expected


@examples(12)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_killed_preparation_resumes_and_keeps_finished_shards(moments):
    with TemporaryDirectory() as temporary:
        folder, encoded, crop = Path(temporary) / "out", [], fitting.TokenizerAndCodec.crop
        written = {}
        for moment in [*moments, None]:
            remaining = [moment]

            def crop_or_kill(self, raw, remaining=remaining):
                if remaining[0] is not None:
                    if remaining[0] == 0:
                        raise Killed
                    remaining[0] -= 1
                encoded.append(raw.where)
                return crop(self, raw)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fitting.TokenizerAndCodec, "crop", crop_or_kill)
                patch.setattr(ShardWriter, "abort", lambda self: None)  # a killed process does not clean up
                try:
                    prepare(readers(), CONFIG, folder)
                except Killed:
                    pass
            times = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.json")}
            assert times.items() >= written.items()
            written = times
        files = {name: content for name, content in files_of(folder).items() if not name.endswith(".tmp")}
        assert files == files_of(reference())
        assert not list(folder.rglob("*.tmp"))
        assert len(encoded) <= 160 + sum(min(moment, 16) for moment in moments)  # one shard per kill


@pytest.mark.parametrize("method", ["_flush", "close"])
def test_full_disk_gives_a_clear_error_and_loses_no_shard(tmp_path, monkeypatch, method):
    original, calls = getattr(ShardWriter, method), []

    def fail_on_full_disk(self):
        calls.append(self.path)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self)

    monkeypatch.setattr(ShardWriter, method, fail_on_full_disk)
    with pytest.raises(PrepareError, match="No space left on device") as error:
        prepare(readers(), CONFIG, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "resumes" in str(error.value)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(OpenError, match="not finished"):
        open_prepared(tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(reference())


def test_finished_folder_is_not_prepared_again(monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in reference().rglob("*")}
    monkeypatch.setattr(fitting.TokenizerAndCodec, "crop", None)
    assert prepare(readers(), CONFIG, reference()) == read_json(reference() / "dataset.json")
    assert {path: path.stat().st_mtime_ns for path in reference().rglob("*")} == before


def test_lost_sizes_are_written_again_as_their_error_says(tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference(), out)
    name = open_prepared(out).names[0]
    (out / name / "train-sizes.bin").unlink()
    with pytest.raises(OpenError, match="train-sizes.bin is missing; delete .*/dataset.json and run the same"):
        open_prepared(out).source(name, "train")[0]
    (out / "dataset.json").unlink()
    prepare(readers(), CONFIG, out)
    assert files_of(out) == files_of(reference())


def test_other_files_or_settings_for_the_same_folder_are_an_error(tmp_path):
    shutil.copytree(reference(), tmp_path / "out")
    with pytest.raises(PrepareError, match="heldout is 1000 in the folder, 5 in this command"):
        prepare(readers(), replace(CONFIG, heldout=5), tmp_path / "out")
    with pytest.raises(PrepareError, match="its sources are photos, texts"):
        prepare(readers()[:1], CONFIG, tmp_path / "out")
    shutil.copytree(source_folder() / "photos", tmp_path / "photos")
    write_texts(tmp_path / "texts.jsonl", 91)
    with pytest.raises(PrepareError, match="texts: records is 90 in the folder, 91 in this command"):
        prepare(readers(tmp_path), CONFIG, tmp_path / "out")
    shutil.copy2(source_folder() / "texts.jsonl", tmp_path / "texts.jsonl")
    prepare(readers(tmp_path), replace(CONFIG, max_faults=0.5), tmp_path / "out")  # it does not change the content
    (tmp_path / "photos" / "0003.png").rename(tmp_path / "photos" / "0003b.png")
    with pytest.raises(PrepareError, match="photos: files is"):  # the same number of files, and of bytes
        prepare(readers(tmp_path), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(reference())


def test_settings_may_change_after_a_failed_start(tmp_path):
    with pytest.raises(ValueError, match="18x18"):
        prepare(readers(), replace(CONFIG, sizes=("18x18",), codec="block_pca"), tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(reference())


@pytest.mark.parametrize("out", ["photos", "photos/prepared", "."])
def test_output_folder_and_sources_must_not_be_nested(tmp_path, out):
    write_photos(tmp_path / "photos", 5)
    with pytest.raises(PrepareError, match="contains the source .* or is inside it"):
        prepare([open_reader(f"{tmp_path}/photos")], CONFIG, tmp_path / out)
    assert not list(tmp_path.rglob("recipe.json"))


@pytest.mark.parametrize("moment", [1, 3, 5, 7])
def test_full_disk_while_fitting_or_finishing_gives_a_clear_error(tmp_path, monkeypatch, moment):
    """Each file (recipe, tokenizer, codec, fitted, ..., quarantine, dataset) is written completely or not at all."""
    from transfusion import disk

    written = []

    def fail_on_full_disk(path, content, write_whole=disk.write_whole):
        written.append(path)
        if len(written) == moment and path.suffix != ".arrow":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content)

    with monkeypatch.context() as patch:
        for module in (disk, fitting, preparing):
            patch.setattr(module, "write_whole", fail_on_full_disk)
        with pytest.raises(PrepareError, match="No space left on device.*resumes"):
            prepare(readers(), CONFIG, tmp_path / "out")
    prepare(readers(), CONFIG, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(reference())


def test_images_are_cropped_as_they_are_read(tmp_path, monkeypatch):
    """At most two uncropped documents are in memory, although more are encoded in one batch."""
    references, counts, crop = [], [], fitting.TokenizerAndCodec.crop

    def count_and_crop(self, raw):
        references.append(weakref.ref(raw))
        counts.append(sum(document() is not None for document in references))
        return crop(self, raw)

    monkeypatch.setattr(fitting.TokenizerAndCodec, "crop", count_and_crop)
    prepare(readers(), CONFIG, tmp_path / "out")
    assert len(counts) == 160
    assert max(counts) <= 2


def test_two_sources_of_one_name_are_an_error(tmp_path):
    with pytest.raises(PrepareError, match="2 sources are called photos"):
        prepare([*readers(), open_reader(f"photos={source_folder()}/texts.jsonl")], CONFIG, tmp_path / "out")


# Faults


def faulty(folder: Path, count: int, num_faulty: int, seed: int = 0) -> Path:
    """A JSONL file of captioned images, some of them faulty."""
    faulty_numbers = set(np.random.default_rng(seed).choice(count, num_faulty, replace=False).tolist())
    records = []
    for number in range(count):
        caption, pixels = picture(number)
        content = inline(pixels)
        record = {"image": content, "caption": caption}
        if number in faulty_numbers:
            kinds = ({"image": content[:70]}, {"caption": "  "}, {"image": "nowhere.png"}, {"image": None})
            record |= kinds[number % 4]
        records.append(record)
    return write_lines(folder / "faulty.jsonl", records)


def test_few_faults_are_left_out_listed_and_counted(tmp_path):
    path = faulty(tmp_path, 400, 4)
    about = prepare([open_reader(str(path))], CONFIG, tmp_path / "out")["sources"]["faulty"]
    assert sum(about["faults"].values()) == 4
    assert sum(about["documents"].values()) == 396
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    statistics = survey(open_reader(str(path)), None)
    assert Counter(line["kind"] for line in lines) == statistics.faults
    expected = {f"faulty.jsonl:{n + 1}" for n in np.random.default_rng(0).choice(400, 4, replace=False).tolist()}
    assert {line["where"] for line in lines} == expected
    assert all(line["source"] == "faulty" and line["message"] for line in lines)


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_faults_are_an_error_with_the_first_ten(tmp_path, world):
    path = faulty(tmp_path, 400, 30)
    numbers = sorted(np.random.default_rng(0).choice(400, 30, replace=False).tolist())
    with pytest.raises(PrepareError) as error:
        for rank in reversed(range(world)):
            prepare([open_reader(str(path))], CONFIG, tmp_path / "out", rank, world) if rank == 0 else None
    message = str(error.value)
    assert "of 400 records of faulty, so far, cannot be used" in message
    assert message.count("\n") <= 10
    assert f"faulty.jsonl:{numbers[0] + 1}:" in message
    assert not (tmp_path / "out" / "dataset.json").exists()
    about = prepare([open_reader(str(path))], replace(CONFIG, max_faults=0.1), tmp_path / "lenient")
    assert about["sources"]["faulty"]["documents"]["train"] > 300


def test_first_document_of_each_id_is_kept(tmp_path):
    ids = [f"n{number % 97}" for number in range(100)]  # three are used twice
    records = [{"id": id_, "text": f"text {n}", "image": inline(picture(n)[1])} for n, id_ in enumerate(ids)]
    path = write_lines(tmp_path / "twice.jsonl", records)
    about = prepare([open_reader(str(path))], replace(CONFIG, max_faults=0.03), tmp_path / "out")["sources"]["twice"]
    assert about["faults"] == {"duplicate id": 3}
    assert survey(open_reader(str(path)), None).faults == {"duplicate id": 3}
    prepared = open_prepared(tmp_path / "out")
    documents = documents_of(prepared, "twice")
    assert set(documents) == {f"twice.jsonl:{n + 1}" for n in range(97)}
    for where, document in documents.items():
        text = prepared.tokenizer.decode(document.segments[0].tokens)
        assert text == f"text {int(where.rpartition(':')[2]) - 1}"


def test_sources_without_images_are_an_error(tmp_path):
    with pytest.raises(PrepareError, match="none of the first documents has an image"):
        prepare(readers()[1:], CONFIG, tmp_path / "out")


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["photos/train-00000.arrow", "tokenizer.json", "codec.safetensors"])
def test_changed_files_are_detected(tmp_path, name, change):
    shutil.copytree(reference(), tmp_path / "out")
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
def test_damaged_shard_raises_only_open_error(seed, truncate):
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        shutil.copytree(reference(), folder)
        path, rng = folder / "photos" / "train-00000.arrow", np.random.default_rng(seed)
        content = bytearray(path.read_bytes())
        if truncate:
            content = content[: rng.integers(len(content))]
        for position in rng.integers(len(content), size=3) if content else ():
            content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        stored = open_prepared(folder).source("photos", "train")
        for number in range(len(stored)):
            try:
                stored[number]
            except OpenError as error:
                assert "\n" not in str(error)


def test_folder_that_is_not_prepared_is_an_error(tmp_path):
    with pytest.raises(OpenError, match="not prepared data"):
        open_prepared(tmp_path)
    shutil.copytree(reference(), tmp_path / "out")
    about = read_json(tmp_path / "out" / "dataset.json")
    (tmp_path / "out" / "dataset.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(OpenError, match="format 99"):
        open_prepared(tmp_path / "out")
    del about["codec"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(OpenError, match="damaged"):
        open_prepared(tmp_path / "out")


def test_shards_without_documents_are_supported(tmp_path):
    """A unit with only faults, and empty splits."""
    records = [{"image": inline(picture(n)[1]), "caption": "red" if not 5 <= n < 10 else ""} for n in range(20)]
    config = replace(CONFIG, records_per_shard=5, max_faults=0.3, heldout=0)
    path = write_lines(tmp_path / "a.jsonl", records)
    prepare([open_reader(str(path))], config, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert len(prepared.source("a", "train")) == 15
    assert len(prepared.source("a", "heldout")) == 0
    assert pa.ipc.open_stream(str(tmp_path / "out" / "a" / "train-00001.arrow")).read_all().num_rows == 0
    assert open_sources(DataConfig(prepared=(str(tmp_path / "out"),)), "heldout") == []


# Reading prepared data in a run


@cache
def encoder(**config) -> DocumentEncoder:
    defaults = {"prepared": (str(reference()),), "seq_len": 64, "shuffle_block": 24}
    return fit(DataConfig(**defaults | config), patch_size=2, seed=0)


def loader(batch_size: int = 2, rank: int = 0, world: int = 1, **config) -> Loader:
    fitted = encoder(**config)
    return Loader(open_sources(fitted.config, "train"), fitted, batch_size, rank, world)


def take(loader: Loader, start, count: int) -> list:
    """The loader's rows of the first `count` steps as batches, each with the loader state after it."""
    return [(collate(rows, 64, loader.vocabulary), state) for rows, state in islice(loader.batches(start), count)]


def test_every_position_of_an_epoch_is_read_exactly_once():
    reader = loader()
    epochs = {(source.name, id_): 0 for source in reader.sources for id_ in range(len(source))}
    expected, packed, block = Counter(), Counter(), 0
    while min(epochs.values()) < 2:  # until every document has been read twice
        for source, epoch, id_ in entries_of(reader, block):
            name = reader.sources[source].name
            assert epochs[name, id_] == epoch  # once per epoch, in order of epochs
            epochs[name, id_] += 1
            document = reader.encoder.to_document(reader.sources[source][id_], name, epoch)
            chunks = split_chunk(encode_document(document, reader.encoder.vocabulary), 64)
            expected.update(map(contents, chunks))
        packed.update(chunk for row in contents_of(reader.block(block)) for chunk in row)
        block += 1
    assert packed == expected


RANK_CHANGES = [(1, 4, 4), (4, 1, 4), (2, 4, 8), (4, 2, 8), (1, 2, 8)]  # ranks before, ranks after, rows of a step


@pytest.mark.parametrize(
    ("before", "after", "batch"), list(product((1, 2, 4), (1, 2, 4), (4, 8))) if THOROUGH else RANK_CHANGES
)
def test_number_of_ranks_may_change_when_a_run_resumes(before, after, batch):
    """The steps have the same rows."""
    uninterrupted = take(loader(batch), START, 9)

    def global_batches(world: int, start, count: int):
        ranks = [take(loader(batch, rank, world), start, count) for rank in range(world)]
        for parts in zip(*ranks, strict=True):
            assert len({state for _, state in parts}) == 1
            tokens = np.empty((batch, 64), np.int64)
            for rank, (part, _) in enumerate(parts):
                tokens[rank::world] = part.tokens.numpy()
            yield tokens, parts[0][1]

    first = list(global_batches(before, START, 4))
    rest = list(global_batches(after, first[-1][1], 5))
    for (tokens, state), (expected, expected_state) in zip(first + rest, uninterrupted, strict=True):
        assert np.array_equal(tokens, expected.tokens.numpy())
        assert state == expected_state


@examples(20, quick=8)
@given(st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=4))
def test_no_row_is_skipped_or_repeated_when_batch_sizes_change(sessions):
    """Each session has its own number of ranks and rows, and stops after a few batches."""
    state, read = START, []
    for world, rows, count in sessions:
        ranks = [take(loader(rows * world, rank, world), state, count) for rank in range(world)]
        for n in range(count):
            tokens = np.concatenate([batches[n][0].tokens.numpy() for batches in ranks])
            order = np.argsort([rank + world * row for rank in range(world) for row in range(rows)])
            read.append(tokens[order])
        state = ranks[0][-1][1]
    read = np.concatenate(read)
    single_rows = take(loader(1), START, len(read))
    assert np.array_equal(read, np.concatenate([batch.tokens.numpy() for batch, _ in single_rows]))
    assert single_rows[-1][1] == state


@examples(8)
@given(
    st.lists(st.lists(st.integers(0, 90) | st.none(), min_size=1, max_size=5), min_size=3, max_size=25),
    st.integers(1, 6),
)
def test_random_corpora_are_read_completely_and_once(corpus, shard):
    """Numbers are lengths of texts, None is an image."""
    rng = np.random.default_rng(0)
    records = [
        {"segments": [{"image": inline(picture(n)[1])} if size is None else
                      {"text": "".join(rng.choice(list("abcdefgh "), size)) + "."} for size in document]}
        for n, document in enumerate([*corpus, [None]])
    ]  # fmt: skip
    with TemporaryDirectory() as temporary:
        path = write_lines(Path(temporary) / "some.jsonl", records)
        config = PrepareConfig(tokenizer_size=260, records_per_shard=shard, heldout=0)
        prepare([open_reader(str(path))], config, Path(temporary) / "out")
        data = DataConfig(prepared=(f"{temporary}/out",), seq_len=40, shuffle_block=7)
        fitted = fit(data, 2, seed=3)
        reader = Loader(open_sources(data, "train"), fitted, 1)
        epoch = len(reader.sources[0])
        blocks = -(-epoch // 7)
        packed = [row for block in range(blocks) for row in contents_of(reader.block(block))]
        expected = Counter()
        entries = entries_of(reader, 0, blocks)
        for _, number, id_ in entries:
            document = fitted.to_document(reader.sources[0][id_], "some", number)
            chunk = encode_document(document, fitted.vocabulary)
            parts = split_chunk(chunk, 40)
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), chunk.tokens)
            expected.update(map(contents, parts))
        assert Counter(chunk for row in packed for chunk in row) == expected
        assert sorted(id_ for _, _, id_ in entries[:epoch]) == list(range(len(records)))


def test_float16_latents_become_float32_in_batches():
    ((batch, _),) = take(loader(), START, 1)
    assert all(str(group.x0.dtype) == "torch.float32" for group in batch.groups)


def test_row_too_short_for_an_image_is_an_error_before_training():
    needed = encoder().config.seq_len
    caption = max(len(d.segments[0].tokens) for d in documents_of(open_prepared(reference()), "photos").values())
    shortest = caption + 4 + 4  # without bos; boi, eoi, eos and 4 patches
    assert shortest - 1 <= needed
    with pytest.raises(ValueError, match="raise data.seq_len"):
        encoder(seq_len=shortest - 2)
    reader = loader(seq_len=shortest - 1)
    assert all(len(reader.block(block)) for block in range(4))


def test_row_too_short_for_an_image_and_its_copy_is_an_error_before_training():
    caption = max(len(d.segments[0].tokens) for d in documents_of(open_prepared(reference()), "photos").values())
    shortest = caption + 3 + 2 * 4  # boi, eoi, eos, 4 patches and their copy
    with pytest.raises(ValueError, match=f"needs {shortest} positions with its caption and its noisy copy, a row has"):
        encoder(seq_len=shortest - 1, clean_copies=True)
    reader = loader(seq_len=shortest, clean_copies=True)
    assert all(len(reader.block(block)) for block in range(4))
    encoder(seq_len=shortest - 4, clean_copies=True, image_first=0.0)  # an image after its caption has no copy


def test_weights_use_exact_mean_lengths():
    reader = loader(mixture_weights=(3.0, 1.0), caption_dropout=0.0)
    lengths = [
        [len(encode_document(reader.encoder.to_document(d, source.name, 0), reader.encoder.vocabulary)) for d in source]
        for source in reader.sources
    ]
    weights = [share / np.mean(length) for share, length in zip((3, 1), lengths, strict=True)]
    assert np.allclose(document_weights(reader.sources, reader.encoder), np.array(weights) / sum(weights), rtol=1e-12)
    with pytest.raises(ValueError, match="photos, texts"):
        loader(mixture_weights=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("clean_copies", [False, True])
def test_mean_length_includes_caption_dropout_and_copies(clean_copies):
    reader = loader(caption_dropout=0.5, image_first=0.2, clean_copies=clean_copies)
    source, vocabulary = reader.sources[0], reader.encoder.vocabulary
    entries = reader.stream.read(0, 2000)
    photos = entries.sources == 0
    lengths = source.lengths(entries.ids[photos], vocabulary.patch_size, clean_copies)
    changes = choose_changes(entries.keys[photos], lengths.kinds, reader.config)
    measured = lengths.after(changes).mean()
    assert abs(source.mean_positions(vocabulary, reader.config) - measured) < 0.1


def test_heldout_batches_have_all_heldout_images():
    sources = open_sources(encoder().config, "heldout")
    batches = [batch for source in sources for batch in heldout_batches(source, encoder(), 99, 2)]
    images = sum(len(group.keys) for batch in batches for group in batch.groups)
    assert images == len(open_prepared(reference()).source("photos", "heldout"))


def test_decoded_documents_are_close_to_the_originals():
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


# Edits


def edit(key: int) -> Document:
    source, target = (Image(np.zeros((3, 4, 4), np.float32), loss, max_t) for loss, max_t in ((False, 0.0), (True, 1.0)))
    return Document((source, Text((1, 2, 3), loss=False), target), key=key)


def test_dropouts_of_conditions_are_shares_of_the_same_documents():
    with pytest.raises(ValueError, match="their sum must be at most 1"):
        DataConfig(condition_text_dropout=0.8, condition_dropout=0.3)
    DataConfig(condition_text_dropout=0.7, condition_dropout=0.3)



def test_conditions_are_dropped_at_the_configured_rates():
    config = DataConfig(condition_text_dropout=0.2, condition_dropout=0.1)
    kinds = Counter()
    for key in range(4000):
        document = edit(key)
        segments = changed(document, config).segments
        if segments is not document.segments:
            assert segments[-1] == Text((), loss=False)  # no loss after the image
            assert segments[-2] is document.segments[-1]
            segments = segments[:-1]
        kinds[tuple(type(part).__name__ for part in segments)] += 1
    assert abs(kinds["Image", "Image"] / 4000 - 0.2) < 0.02
    assert abs(kinds["Image",] / 4000 - 0.1) < 0.02
    assert kinds["Image", "Text", "Image"] == 4000 - kinds["Image", "Image"] - kinds["Image",]


def test_sources_with_edits_are_detected():
    """Only then the server accepts edits."""
    image, text = Image(np.zeros((3, 4, 4))), Text((1,))
    others = [Document((text, image)), Document((image, text, image)), Document((text,)), Document(())]
    assert contains_edits([*others, edit(1)])
    assert not contains_edits(others)


@pytest.mark.parametrize("segments", [
    (Image(np.zeros((3, 4, 4)), loss=False), Text((1,))), (Text((1,)), Image(np.zeros((3, 4, 4)))),
    (Image(np.zeros((3, 4, 4))), Text((1,)), Image(np.zeros((3, 4, 4)))), (),
])  # fmt: skip
def test_documents_without_conditions_are_unchanged(segments):
    config = DataConfig(condition_text_dropout=0.5, condition_dropout=0.5)
    assert changed(Document(segments), config).segments == segments


# Files that are cut short, and the account


@pytest.mark.parametrize("name", ["gzip", "list", "table"])
def test_a_file_that_is_cut_short_stops_prepare_whatever_its_share(name, tmp_path):
    """One fault among hundreds of records is within max_faults, but the number of missing records is unknown."""
    rng = np.random.default_rng(0)
    texts = [{"text": f"plain words {n} {rng.random()}"} for n in range(600)]
    if name == "gzip":
        content = gzip.compress("".join(json.dumps(record) + "\n" for record in texts).encode(), mtime=0)
        path, content = tmp_path / "a.jsonl.gz", content[: len(content) // 2]
    elif name == "list":
        path, content = tmp_path / "a.json", json.dumps(texts)[:-300].encode()
    else:
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, pa.table({"text": ["a"]}).schema) as out:
            for first in range(0, 600, 150):
                out.write_table(pa.table({"text": [record["text"] for record in texts[first : first + 150]]}))
        path, content = tmp_path / "a.arrow", buffer.getvalue()[:-3_000]
    path.write_bytes(content)
    sources = [open_reader(str(path)), *readers()[:1]]
    with pytest.raises(PrepareError, match=r"An unknown number of records is missing: .* --allow-cut"):
        prepare(sources, CONFIG, tmp_path / "out")
    dataset = prepare(sources, replace(CONFIG, allow_cut=True), tmp_path / "out")  # it does not change the content
    account = Account.from_json(dataset["sources"]["a"]["account"])
    account.check()
    assert account.tallies["records"].passed_over == {"cut short": 1}
    assert account.tallies["records"].read["document"] > 200


def test_account_of_prepared_data_closes_for_any_number_of_shards(tmp_path):
    """With duplicate ids, which are known after all shards are written, and pictures that are named in different shards."""
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png(picture(n)[1]))
    rows = [{"id": n % 17, "image": f"{5 - n % 5}.png", "caption": f"caption {n}", "lang": "en"} for n in range(20)]
    rows.append({"image": "no.png", "caption": "x"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accounts = []
    for records_per_shard in (3, 100):
        config = replace(CONFIG, records_per_shard=records_per_shard, max_faults=0.5)
        dataset = prepare([open_reader(f"mine={tmp_path}")], config, tmp_path.with_name(f"out-{records_per_shard}"))
        accounts.append(dataset["sources"]["mine"]["account"])
        Account.from_json(accounts[-1]).check()
    assert accounts[0] == accounts[1]
    assert accounts[0]["kinds"]["records"]["passed_over"] == {"duplicate id": 3, "missing image": 1}
    assert accounts[0]["kinds"]["files"]["passed_over"] == {"named by no record": 1}
    assert accounts[0]["kinds"]["fields"]["passed_over"] == {"in 'lang'": 20}


# Devices


@pytest.mark.parametrize(("shared", "rank", "expected"), [(True, 5, "cuda:1"), (True, 1, "cuda:1"), (False, 5, "cuda:5")])
def test_processes_that_prepare_share_the_gpus(shared, rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.torch, "empty", lambda *shape, **options: None)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert str(pick_device("auto", shared=shared)) == expected


def test_images_are_encoded_on_the_device_of_the_command(tmp_path, monkeypatch, capsys):
    moved = []
    monkeypatch.setattr(preparing, "move_to", lambda codec, device: moved.append((codec.kind, str(device))))
    monkeypatch.setattr(parallel, "pick_device", lambda name, shared: torch.device(f"{name}:3" if shared else name))
    folder = source_folder() / "photos"
    command("data", "prepare", folder, "--out", tmp_path, "--device", "cuda", "--tokenizer-size", 300)
    assert moved == [("block_pca", "cuda:3")]


def test_a_codec_is_moved_with_its_network(monkeypatch):
    network = build_network(AutoencoderConfig(width=8, multipliers=(1, 1), blocks=1), 0)
    codec = Autoencoder.fit(network, [picture(number)[1] for number in range(4)])
    move_to(codec, "meta")
    assert {parameter.device.type for parameter in codec.network.parameters()} == {"meta"}
    move_to(fit_codec("pixels", [picture(0)[1]], 4, 6), "meta")  # it has no network
