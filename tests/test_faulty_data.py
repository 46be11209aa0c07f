"""Faulty data: each bad record is a fault with kind, file and row, and all other documents are read."""

import base64
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.make import encoded, noise, png, write_tar
from tests.layouts import tar, write
from tests.profile import examples
from tests.reading import FIXTURES, other_disks, put, read_at, texts, write_lines
from transfusion.codecs import pictures
from transfusion.data.raw import Fault, RawDocument, RawImage
from transfusion.data.reading import archives, json_files, plain_text
from transfusion.data.reading.columns import FORMS
from transfusion.data.reading.readers import ReaderOptions, open_reader
from transfusion.data.reading.records import to_document

GOOD = png(1)
PAIR = {"image": "good.png", "caption": "a bird"}


@pytest.fixture
def folder(tmp_path):
    """A folder with one valid image."""
    (tmp_path / "good.png").write_bytes(GOOD)
    return tmp_path


@pytest.fixture
def disks():
    with other_disks():
        yield


def outcomes(records: list) -> list[tuple[str, str]]:
    """(where, kind of fault or "") of everything read. All messages are printable and one line."""
    for record in records:
        assert isinstance(record, RawDocument | Fault)
        assert str(getattr(record, "message", "")).isprintable()
        assert record.where.isprintable()
    return [(record.where, getattr(record, "kind", "")) for record in records]


def kinds(records: list) -> list[str]:
    return [kind for _, kind in outcomes(records)]


def check_between(folder: Path, faulty: list[dict], kind: str, **options) -> list[Fault]:
    """Each of these records, between good ones, is a fault of this kind; the good ones are read."""
    good = PAIR if options.get("form", "pair") == "pair" else GOOD_RECORDS[options["form"]]
    path = write_lines(folder / "mixed.jsonl", good, *(line for record in faulty for line in (record, good)))
    expected = [(f"mixed.jsonl:{n}", kind if n % 2 == 0 else "") for n in range(1, 2 * len(faulty) + 2)]
    for max_rows in (1, 1000):
        records = read_at(path, max_rows, **options)
        assert outcomes(records) == expected
    return records[1::2]


# Images


def header(width: int, height: int) -> bytes:
    """A PNG with this size in its header, and no pixels."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = {
    "cut.png": (encoded(noise(2, 12, 8))[:-60], "truncated"),
    "cut.jpg": (encoded(noise(2, 12, 8), "JPEG")[:-60], "truncated"),
    "text.png": (b"this is no picture", "is not an image"),
    "zero.png": (b"", "is not an image"),
    "huge.png": (header(20000, 10000), "too many pixels"),
    "large.png": (header(9000, 8000), "9000x8000 pixels"),
    "flat.png": (header(0, 5), "cannot read|not an image|no pixels"),
    "page.svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is a file of SVG"),
    "phone.png": (b"\0\0\0\x18ftypheic\0\0\0\0", "is a file of HEIC"),
    "film.png": (b"RIFF\x24\x00\x00\x00AVI LIST", "is not an image"),
    "map.png": (encoded(noise(2), "PPM"), "is not an image"),  # not a supported format
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_is_a_fault_in_every_kind_of_source(name, tmp_path):
    content, message = BROKEN[name]
    sources = {kind: tmp_path / kind for kind in ("alone", "lines")}
    for path in sources.values():
        path.mkdir()
        for file, image in (("a.png", GOOD), ("b-" + name, content), ("c.png", GOOD)):
            (path / file).write_bytes(image)
    images = ["a.png", "b-" + name, "c.png"]
    write_lines(sources["lines"] / "metadata.jsonl", *({"file_name": image, "text": "a bird"} for image in images))
    write_tar(tmp_path / "a.tar", [member for n, image in enumerate((GOOD, content, GOOD))
                                   for member in ((f"{n}.png", image), (f"{n}.txt", b"a bird"))])  # fmt: skip
    pq.write_table(pa.table({"image": [GOOD, content, GOOD], "text": ["a bird"] * 3}), tmp_path / "a.parquet")
    table = pa.table({"image": [{"bytes": GOOD}, {"bytes": content}]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    expected = {
        sources["alone"]: images, sources["lines"]: [f"metadata.jsonl:{n}" for n in (1, 2, 3)],
        tmp_path / "a.tar": [f"a.tar:{n}" for n in range(3)], tmp_path / "a.parquet": [f"a.parquet:{n}" for n in (1, 2, 3)],
        tmp_path / "a.arrow": ["a.arrow:1", "a.arrow:2"],
    }  # fmt: skip
    for source, where in expected.items():
        records = read_at(source)
        assert outcomes(records) == list(zip(where, ["", "unreadable image", ""], strict=False))
        with pytest.raises(Fault, match=message):
            raise records[1]


def test_image_size_is_checked_before_decoding(monkeypatch, folder):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 15)
    assert kinds(read_at(folder)) == ["unreadable image"]
    monkeypatch.setattr(pictures, "MAX_PIXELS", 16)
    assert kinds(read_at(folder)) == [""]


MISSING = {
    "a name": "none.png", "a folder": ".", "inside a file": "good.png/more.png", "a device": "/dev/zero", "nothing": "",
    "a number": 5, "a boolean": True, "a list": ["none.png"], "an empty object": {},
    "an object of nulls": {"bytes": None, "path": None}, "an object with a number": {"path": 7},
    "an image as text": base64.b64encode(bytes(5000)).decode(),
    "a zero byte": "good\x00.png", "half a surrogate pair": "good\ud800.png", "a byte that is not UTF-8": "good\udcff.png",
    "an unknown protocol": "nosuch://good.png", "an invalid address": "http://[bad",
    "a chain": "simplecache::good.png",
    "another chain": "zip://a.png::file:///tmp/a.zip", "an archive": "zip://a.zip", "a line": "no\nsuch.png",
    "data that is not base64": "data:image/png,abc", "a pipe": "pipe:cat good.png",
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_missing_image_is_a_fault_for_any_value(case, folder):
    check_between(folder, [{"image": MISSING[case], "caption": "a bird"}], "missing image")


@pytest.mark.parametrize("value", [None, "", [], [None], "none.png", ["none.png"]])
def test_missing_image_of_a_record_without_text_is_a_fault(value, folder):
    path = write_lines(folder / "mixed.jsonl", {"image": "good.png"}, {"image": value}, {"image": "good.png"})
    assert kinds(read_at(path)) == kinds(read_at(path, form="image")) == ["", "missing image", ""]


def test_damaged_data_url_is_a_fault(folder):
    inline = "data:image/png;base64," + base64.b64encode(GOOD).decode()
    damaged = [inline[:-3], inline[:40] + "é" + inline[41:], inline[:40] + "!" + inline[41:], inline + "\n\n=A",
               "data:image/png;base64,", inline[:-24] + "A" * 24 + "===="]  # fmt: skip
    check_between(folder, [{"image": url, "caption": "a bird"} for url in damaged], "unreadable image")


def test_too_large_image_file_is_a_fault(folder):
    with open(folder / "large.png", "wb") as file:
        file.truncate(300 * 2**20)  # a sparse file
    check_between(folder, [{"image": "large.png", "caption": "a bird"}], "too large")


@pytest.mark.parametrize("address", [
    "file:///etc/hostname", "local:///etc/hostname", "/etc/hostname", "../../../etc/hostname", "file::memory://data/good.png",
    "filecache::file:///etc/hostname",
])  # fmt: skip
@pytest.mark.parametrize("root", ["memory://data", "bucket://data"])
def test_remote_data_cannot_read_local_files(root, address, disks):
    put(f"{root}/good.png", GOOD)
    records = [PAIR, {"image": address, "caption": "a secret"}, PAIR]
    put(f"{root}/a.jsonl", "\n".join(map(json.dumps, records)))
    assert outcomes(read_at(root)) == [("a.jsonl:1", ""), ("a.jsonl:2", "missing image"), ("a.jsonl:3", "")]


# Captions and texts


@pytest.mark.parametrize(("caption", "kind"), [
    ("", "empty caption"), (" \n\t ", "empty caption"), (None, "empty caption"), (5, "bad segment"), (True, "bad segment"),
    ([], "empty caption"), ([5], "bad segment"), ({}, "empty caption"), ({"a": 1}, "bad segment"),
    ("half \ud800", "wrong encoding"),
])  # fmt: skip
def test_empty_or_invalid_caption_is_a_fault(caption, kind, folder):
    check_between(folder, [{"image": "good.png", "caption": caption}], kind)


@pytest.mark.parametrize(("content", "kind"), [
    (b"", "empty caption"), (b"\xef\xbb\xbf \r\n", "empty caption"), ("größe".encode("latin-1"), "wrong encoding"),
    (None, "empty caption"),
])  # fmt: skip
def test_empty_or_invalid_caption_file_is_a_fault(content, kind, folder):
    (folder / "good.txt").write_text("a bird")
    (folder / "lone.png").write_bytes(GOOD)
    if content is not None:
        (folder / "lone.txt").write_bytes(content)
    assert outcomes(read_at(folder)) == [("good.png", ""), ("lone.png", kind)]


def test_invalid_utf8_in_a_table_is_a_fault_of_its_row(tmp_path):
    raw = [b"one", "größe".encode("latin-1"), b"three"]
    lists = pa.array([[content, b"more"] for content in raw])
    as_text = pa.array(raw).view(pa.string())  # strings that are not valid UTF-8
    in_lists = pa.ListArray.from_arrays(lists.offsets, lists.values.view(pa.string()))
    for name, table in {
        "bytes": {"text": raw}, "text": {"text": as_text}, "beside": {"text": ["one", "two", "three"], "id": as_text},
        "lists": {"texts": in_lists, "images": [[None, None]] * 3},
    }.items():  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        records = read_at(tmp_path / f"{name}.parquet")
        assert outcomes(records) == [(f"{name}.parquet:{n}", "wrong encoding" if n == 2 else "") for n in (1, 2, 3)]
        assert texts(records)[::2] == ["one", "three"]
    for kind, table in (("stream", {"text": as_text}), ("file", {"text": as_text})):
        with getattr(pa.ipc, f"new_{kind}")(tmp_path / "a.arrow", pa.table(table).schema) as out:
            out.write_table(pa.table(table))
        assert kinds(read_at(tmp_path / "a.arrow")) == ["", "wrong encoding", ""]


def test_id_with_a_lone_surrogate_is_a_fault(folder):
    check_between(folder, [{**PAIR, "id": "half \ud800"}], "wrong encoding")


def test_passage_that_is_not_utf8_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "PASSAGE_BYTES", 4)
    (tmp_path / "a.txt").write_bytes("one.\n\ngröße\n\nthree".encode("latin-1"))
    (tmp_path / "b.txt").write_text("four")
    records = read_at(tmp_path)
    assert kinds(records) == ["", "wrong encoding", "", ""]
    assert texts(records)[::2] == ["one.\n\n", "three"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_text_in_utf_16_without_its_mark_is_a_fault(encoding, tmp_path):
    (tmp_path / "bird.png").write_bytes(encoded(noise(1, 8, 8)))
    (tmp_path / "bird.txt").write_bytes("a red bird\n".encode(encoding))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes("a red bird\n".encode(encoding))
    assert kinds(read_at(tmp_path)) == kinds(read_at(tmp_path / "texts")) == ["wrong encoding"]


# JSON

DEEP = "[" * 100_000
BAD_LINES = {
    "no JSON": (b'{"text": }', "bad JSON"), "words": (b"two words", "bad JSON"), "a list": (b'["text"]', "bad JSON"),
    "text": (b'"text"', "bad JSON"), "a number": (b"5", "bad JSON"), "null": (b"null", "bad JSON"),
    "not UTF-8": ('{"text": "größe"}'.encode("latin-1"), "wrong encoding"),
    "two records": (b'{"text": "a"} {"text": "b"}', "bad JSON"), "brackets": (DEEP.encode(), "bad JSON"),
    "brackets inside": (b'{"text": "a", "more": ' + DEEP.encode() + b"}", "bad JSON"),
    "a long number": (b'{"text": ' + b"9" * 5000 + b"}", "bad JSON"), "zeros": (bytes(20), "bad JSON"),
    "a list as deep as can be read": (b"[" * 900 + b"]" * 900, "bad JSON"),
    "no column": (b'{"this": 1, "that\\n": 2}', "missing column"), "an empty object": (b"{}", "missing column"),
    "a text as deep as can be read": (b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_line_without_a_record_is_a_fault(case, tmp_path):
    line, kind = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    for end in (b"\n", b"\r\n"):
        path.write_bytes(end.join([b'{"text": "one"}', line, b'{"text": "three"}', line]))
        records = read_at(path)
        assert [where for where, _ in outcomes(records)] == [f"a.jsonl:{n}" for n in (1, 2, 3, 4)]
        assert kinds(records)[1] == kinds(records)[3] != ""
        assert kind is None or kinds(records) == ["", kind, "", kind]  # the maximum depth depends on Python
        assert texts(records)[::2] == ["one", "three"]


RECORDS = [{"text": f"Größe {n} 中", "more": [1, {"a": "]"}]} for n in range(6)]


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_truncated_list_gives_its_complete_elements_and_one_fault(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "READ_SIZE", chunk)
    content = json.dumps(RECORDS, ensure_ascii=False).encode()
    path = tmp_path / "a.json"
    for cut in range(60, len(content), 3 if chunk > 7 else 11):
        path.write_bytes(content[:cut])
        *documents, fault = read_at(path, max_rows=2)
        complete = len(documents)
        assert texts(documents) == [record["text"] for record in RECORDS[:complete]]
        assert fault.kind in ("cut short", "bad JSON")
        assert fault.where == f"a.json:{complete + 1}"
        assert len(json.dumps(RECORDS[: complete + 1], ensure_ascii=False).encode()) > cut  # none is missing


@pytest.mark.parametrize(("element", "kind", "continues"), [
    ('{"text": "größe"}'.encode("latin-1"), "wrong encoding", True), (b"5", "bad JSON", True), (b"[[]]", "bad JSON", True),
    (b'"text"', "bad JSON", True), (b'{"text": nothing}', "bad JSON", True), (DEEP.encode(), "cut short", False),
    (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON", True), (b"[" * 900 + b"]" * 900, "bad JSON", None),
    (b'{"text": "a"', "cut short", False), (b"nothing", "cut short", False), (b'{"text": "a" "b]}"}', "bad JSON", True),
    (b'{"this": 1}', "missing column", True),
])  # fmt: skip
def test_bad_list_element_is_a_fault_and_the_rest_is_read_if_possible(element, kind, continues, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "one"}, ' + element + b', {"text": "three"}]')
    for max_rows in (1, 1000):
        records = read_at(path, max_rows)
        assert texts(records)[0] == "one"
        assert kinds(records)[1] == kind
        assert continues is None or texts(records)[2:] == ["three"] * continues


def test_endless_list_element_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_RECORD_SIZE", 300)
    monkeypatch.setattr(json_files, "READ_SIZE", 50)
    monkeypatch.setattr(json_files._TextBuffer, "read_more", counted := count_calls(json_files._TextBuffer.read_more))
    path = tmp_path / "a.json"
    for element in ('{"text": "' + "x" * 10_000_000, '{"text": "' + "x" * 320 + '"}]', '{"a": [' + "0, " * 1_000_000):
        path.write_text('[{"text": "one"}, ' + element)
        assert kinds(read_at(path)) == ["", "cut short"]
    assert counted.calls < 100
    path.write_text('[{"text": "one"}, {"text": "' + "x" * 280 + '"}, {"text": "three"}]')
    assert kinds(read_at(path)) == ["", "", ""]


def count_calls(function):
    def counted(*args):
        counted.calls += 1
        return function(*args)

    counted.calls = 0
    return counted


def test_file_without_records_among_others_is_a_fault(tmp_path):
    for name, content in (("a.json", ""), ("b.json", '[{"text": "one"}]'), ("c.json", '{"a": [{"text": "two"}]}'),
                          ("d.json", "\ufeff \n [ ]"), ("e.json", "x"), ("f.json", '[{"text": "three"}]')):  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert outcomes(read_at(tmp_path)) == [("a.json:1", "bad JSON"), ("b.json:1", ""), ("c.json:1", ""),
                                           ("e.json:1", "bad JSON"), ("f.json:1", "")]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), [
    ("", "is not valid JSON"), ("two words", "is not valid JSON"), ('{"a": ' + DEEP, "is not valid JSON"),
    ('{"annotations": []}', "neither a text"), ('{\n"this": "spread over lines"}', "neither a text"),
    ("[]", "has no records"), ("[5]", "no record can be read"), ("5", "not 5"),
    ("\xff", "is not UTF-8"), ("{", "is not valid JSON"),
])  # fmt: skip
def test_json_file_without_records_is_a_one_line_error(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as raised:
        read_at(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


def test_json_lines_in_a_json_file_may_have_a_long_first_line(tmp_path):
    write_lines(tmp_path / "a.json", {"text": "x" * 300_000}, {"text": "two"})
    assert [len(text) for text in texts(read_at(tmp_path))] == [300_000, 3]


# Forms

HELLO = {"role": "assistant", "content": "Hello!"}
TURNS = [{"from": "human", "value": "Which <image>?"}, {"from": "gpt", "value": "A robin."}]
GOOD_RECORDS = {
    "document": {"segments": [{"text": "a bird"}, {"image": "good.png"}]},
    "conversation": {"image": "good.png", "conversations": TURNS},
    "messages": {"messages": [HELLO]}, "interleaved": {"texts": ["a"], "images": [None]},
    "mmc4": {"text_list": ["a"], "image_info": []},
    "editing": {"source": "good.png", "instruction": "turn it", "target": "good.png"},
}  # fmt: skip
LENGTHS = "lists of different lengths"
TWO_MARKS = [{"from": "human", "value": "<image> <image>"}]


def mmc4(*infos: dict) -> dict:
    return {"text_list": ["a"], "image_info": list(infos)}


BAD_FORMS = {
    "interleaved": [
        (LENGTHS, {"texts": ["a", "b"], "images": [None]}), (LENGTHS, {"texts": [], "images": [None]}),
        ("bad segment", {"texts": ["a"], "images": ["good.png"]}), ("bad segment", {"texts": [None], "images": [None]}),
        ("bad segment", {"texts": [""], "images": [""]}), ("bad segment", {"texts": [5], "images": [None]}),
        ("empty document", {"texts": [], "images": []}), ("empty document", {"texts": [" "], "images": [None]}),
        ("missing column", {"texts": "a", "images": [None]}), ("missing image", {"texts": [None], "images": [3]}),
    ],
    "mmc4": [
        (LENGTHS, mmc4({"image_name": "good.png", "matched_text_index": 1})),
        (LENGTHS, mmc4({"image_name": "good.png", "matched_text_index": -1})),
        (LENGTHS, mmc4({"image_name": "good.png", "matched_text_index": "0"})),
        (LENGTHS, mmc4({"image_name": "good.png", "matched_text_index": True})),
        ("bad segment", mmc4({"image_name": "good.png"})), ("bad segment", mmc4({"matched_text_index": 0})),
        ("missing column", {"text_list": ["a"], "image_info": 5}), ("bad segment", {"text_list": [None], "image_info": []}),
        ("empty document", {"text_list": [" "], "image_info": []}),
    ],
    "conversation": [
        (LENGTHS, {"image": "good.png", "conversations": TWO_MARKS}),
        (LENGTHS, {"image": ["good.png"] * 3, "conversations": TWO_MARKS}), (LENGTHS, {"conversations": TURNS}),
        ("bad segment", {"conversations": [{"from": "human", "value": 5}]}), ("bad segment", {"conversations": ["Hello!"]}),
        ("bad segment", {"conversations": [{"from": "human"}]}), ("bad segment", {"conversations": [{"value": "Hello!"}]}),
        ("empty document", {"conversations": []}),
        ("wrong encoding", {"conversations": [{"from": "human", "value": "\ud800"}]}),
    ],
    "messages": [
        *(("unsupported media", {"messages": [{"role": "user", "content": [{"type": kind, kind: "a.mp4"}]}]})
          for kind in ("video", "video_url", "audio", "audio_url", "input_audio")),
        *(("unsupported media", {"messages": [{"role": "user", "content": text}]}) for text in (
            "<video>\nWhich bird?", "Which bird?\n<audio>", "<|video_1|>", "<|video_pad|>Which?", "<video>a.mp4</video>")),
        *(("unsupported media", {"messages": [HELLO], name: ["a.mp4"]}) for name in ("video", "videos", "audio", "audios")),
        ("empty answer", {"messages": [{"role": "user", "content": "Hello!"}]}),
        ("empty answer", {"messages": [HELLO, {"role": "assistant", "content": " "}]}),
        ("bad segment", {"messages": [{"role": "user", "content": 5}]}),
        ("bad segment", {"messages": [{"role": "user", "content": {"type": "text"}}]}),
        ("bad segment", {"messages": [{"role": "user", "content": ["Hello!"]}]}),
        ("bad segment", {"messages": [{"content": "Hello!"}]}), ("empty document", {"messages": []}),
    ],
    "document": [
        ("bad segment", {"segments": [{"text": "a", "image": "good.png"}]}), ("bad segment", {"segments": [{}]}),
        *(("bad segment", {"segments": [{"image": "good.png", "max_t": time}]})
          for time in (1.5, -0.1, "1", True, float("nan"), [])),
        *(("bad segment", {"segments": [{"text": "a", "loss": loss}]}) for loss in (1, "false", [])),
        ("bad segment", {"segments": ["a"]}), ("empty document", {"segments": []}),
        ("empty text", {"segments": [{"text": " "}]}),
        ("bad segment", {"segments": [{"image": "good.png"}, {"text": "a bird"}], "pairs": True}),
        ("bad segment", {"segments": [{"text": "a bird"}, {"text": "a nest"}], "pairs": True}),
        ("bad segment", {"segments": [{"text": "a bird"}], "pairs": True}),
        ("bad segment", {"segments": [{"text": "a bird"}, {"image": "good.png"}], "pairs": "no"}),
    ],
    "editing": [
        ("missing column", {"source": "good.png", "target": "good.png"}),
        ("empty instruction", {"source": "good.png", "instruction": " ", "target": "good.png"}),
        ("missing image", {"source": "good.png", "instruction": "turn it", "target": "none.png"}),
        ("missing image", {"source": ["good.png", "none.png"], "instruction": "turn it", "target": "good.png"}),
        ("missing image", {"source": [], "instruction": "turn it", "target": "good.png"}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", GOOD_RECORDS)
def test_invalid_record_of_each_form_is_a_fault(form, folder):
    for kind, record in BAD_FORMS[form]:
        check_between(folder, [record], kind, form=form)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.binary(max_size=4)
    | st.sampled_from(("", " ", "good.png", "<image>", "text", "\ud800")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((
        "text", "image", "loss", "max_t", "from", "value", "role", "content", "type", "image_url", "url", "bytes", "path",
        "matched_text_index", "image_name")), inner, max_size=4), max_leaves=12,
)  # fmt: skip
columns = st.sampled_from((
    "segments", "pairs", "conversations", "messages", "texts", "images", "text_list", "image_info", "image", "caption",
    "text", "id", "source", "instruction", "target",
))  # fmt: skip


class EverySecondImage:
    """An image reader for which every second image is missing."""

    def __init__(self):
        self.calls = 0

    def read(self, value):
        self.calls += 1
        if self.calls % 2:
            return np.zeros((2, 2, 3), np.uint8)
        raise Fault("missing image", "it does not exist")


@examples(400)
@given(st.sampled_from(FORMS), st.dictionaries(columns, anything, max_size=5))
def test_random_record_is_a_document_or_a_fault(form, record):
    try:
        document = to_document(form, record, EverySecondImage())
    except Fault as fault:
        assert fault.kind
        return
    assert document.segments
    for part in document.segments:
        assert isinstance(part, RawImage) or part.text.encode() is not None
    assert document.name.encode() is not None


# Archives


class MaliciousPickle:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


GROUPS = [(f"{n}.{suffix}", content) for n in range(4) for suffix, content in (("png", png(n)), ("txt", b"bird %d" % n))]


def test_pickles_in_an_archive_are_never_opened(tmp_path):
    malicious = pickle.dumps(MaliciousPickle(tmp_path / "written"))
    pickle.loads(malicious).close()  # noqa: S301 (to check that it writes the file)
    (tmp_path / "written").unlink()
    suffixes = ("pickle", "pkl", "pyd", "pth", "pt", "npy", "npz", "pyc")
    pickles = [(f"0.{suffix}", malicious) for suffix in suffixes]
    write_tar(tmp_path / "a.tar", [*GROUPS[:2], *pickles, *GROUPS[2:4], ("1.json", malicious)])
    assert outcomes(read_at(tmp_path / "a.tar")) == [("a.tar:0", ""), ("a.tar:1", "wrong encoding")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_archives_are_not_extracted_and_links_and_devices_are_skipped(tmp_path):
    inner = tmp_path / "deep/inside"
    inner.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("a secret")
    with tarfile.open(inner / "a.tar", "w") as archive:
        for name, content in (("../../evil.png", GOOD), ("../../evil.txt", b"a bird"), ("/abs.png", GOOD),
                              ("/abs.txt", b"a nest")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        links = ("b.png", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)
        others = (("c.txt", tarfile.CHRTYPE), ("c.png", tarfile.BLKTYPE), ("d.txt", tarfile.FIFOTYPE),
                  ("e.txt", tarfile.DIRTYPE))  # fmt: skip
        for name, kind in (*links, *others):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../secret.txt" if (name, kind) in links else ""
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    documents = read_at(inner)
    assert outcomes(documents) == [("a.tar:../../evil", ""), ("a.tar:abs", "")]
    assert texts(documents) == ["a bird", "a nest"]
    assert sorted(tmp_path.rglob("*")) == before


def test_truncated_archive_gives_its_complete_records_and_one_fault(tmp_path):
    """A record is complete when the next record or the end mark can be read after it."""
    path = tmp_path / "a.tar"
    write_tar(path, GROUPS)
    content, group, block = path.read_bytes(), 2048, tarfile.BLOCKSIZE  # two headers and two contents, one block each
    ends = [group * n + block * k + j for n in range(5) for k in range(4) for j in (-1, 0, 1)]
    for cut in (cut for cut in ends if 0 <= cut <= len(content)):
        path.write_bytes(content[:cut])
        num_complete = max(0, (cut - block) // group)
        if num_complete == 0:
            with pytest.raises(ValueError, match="no record can be read; the first fault: a.tar"):
                open_reader(str(path))
            continue
        for max_rows in (1, 1000):
            records = read_at(path, max_rows)
            assert outcomes(records[:num_complete]) == [(f"a.tar:{n}", "") for n in range(num_complete)]
            assert texts(records[:num_complete]) == [f"bird {n}" for n in range(num_complete)]
            assert outcomes(records[num_complete:]) == ([(f"a.tar:{num_complete}", "cut short")] if num_complete < 4 else [])


def test_truncated_compressed_archive_gives_its_complete_records_and_one_fault(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_tar(path, GROUPS)
    content, lengths = path.read_bytes(), set()
    for cut in range(len(content) // 2, len(content), 7):
        path.write_bytes(content[:cut])
        records = read_at(path)
        num_complete = kinds(records).count("")
        lengths.add(num_complete)
        assert texts(records[:num_complete]) == [f"bird {n}" for n in range(num_complete)]
        assert outcomes(records[num_complete:]) == ([(f"a.tar.gz:{num_complete}", "cut short")] if num_complete < 4 else [])
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"garbage!"])
def test_damaged_header_ends_an_archive_with_a_fault(damage, tmp_path):
    write_tar(tmp_path / "a.tar", GROUPS)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[4 * 1024 + 148 : 4 * 1024 + 156] = damage  # the checksum of 2.png
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:4096] + bytes(1024))
    assert outcomes(read_at(tmp_path)) == [("a.tar:0", ""), ("a.tar:1", "cut short"), ("b.tar:0", ""), ("b.tar:1", "")]


def test_negative_member_size_ends_an_archive_with_a_fault(tmp_path):
    with open(tmp_path / "a.tar", "wb") as out:
        for name, size in (("0.txt", 3), ("1.txt", -1024)):
            info = tarfile.TarInfo(name)
            info.size = abs(size)
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            if size < 0:
                header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
                header[148:156] = b"%06o\x00 " % tarfile.calc_chksums(bytes(header))[0]
            out.write(header + b"abc".ljust(512, b"\x00"))
        out.write(bytes(1024))
    with pytest.raises(ValueError, match="cannot be read from here on"):
        read_at(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    write_tar(tmp_path / "c.tar", GROUPS[:2])
    assert kinds(read_at(tmp_path)) == ["cut short", "cut short", ""]


def test_archive_of_only_long_names_is_a_fault(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    (tmp_path / "a.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512) * 3000 + bytes(1024))
    write_tar(tmp_path / "b.tar", GROUPS[:2])
    assert kinds(read_at(tmp_path)) == ["cut short", ""]


def test_unusable_members_are_faults_of_their_record(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_RECORD_SIZE", 1000)
    groups = [("a.png", GOOD), ("a.txt", b"a bird"), ("b.png", GOOD), ("b.txt", b" \n"), ("c.png", GOOD), ("c.json", b"{"),
              ("d.png", GOOD), ("d.json", b"[1]"), ("e.png", GOOD), ("f.txt", b"no picture"), ("g.png", GOOD),
              ("g.txt", b"x" * 1001), ("h.png", GOOD), ("h.txt", b"a nest")]  # fmt: skip
    write_tar(tmp_path / "a.tar", groups)
    assert dict(outcomes(read_at(tmp_path / "a.tar"))) == {
        "a.tar:a": "", "a.tar:b": "empty caption", "a.tar:c": "bad JSON", "a.tar:d": "bad JSON", "a.tar:e": "empty caption",
        "a.tar:f": "missing image", "a.tar:g": "too large", "a.tar:h": "",
    }  # fmt: skip


# Tables


def test_truncated_table_is_a_fault_and_other_files_are_read(tmp_path):
    table = pa.table({"text": ["one", "two"]})
    for name in ("a", "b", "c"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for content in ((tmp_path / "b.parquet").read_bytes()[:-10], b"", b"no parquet"):
        (tmp_path / "b.parquet").write_bytes(content)
        for max_rows in (1, 1000):
            assert outcomes(read_at(tmp_path, max_rows)) == [
                ("a.parquet:1", ""), ("a.parquet:2", ""), ("b.parquet:1", "cut short"),
                ("c.parquet:1", ""), ("c.parquet:2", ""),
            ]  # fmt: skip


@pytest.mark.parametrize("max_rows", [1, 1000])
def test_each_row_of_a_damaged_row_group_is_a_fault(max_rows, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" * 20 for n in range(9)]}), path, row_group_size=3, use_dictionary=False,
                   compression="none")  # fmt: skip
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    expected = [(f"a.parquet:{n}", "damaged table" if n in (4, 5, 6) else "") for n in range(1, 10)]
    assert outcomes(read_at(path, max_rows)) == expected


@pytest.mark.parametrize("max_rows", [1, 1000])
def test_truncated_arrow_stream_gives_its_complete_batches_and_one_fault(max_rows, tmp_path):
    table, buffer, ends = pa.table({"text": [f"text {n}" * 20 for n in range(9)]}), io.BytesIO(), []
    with pa.ipc.new_stream(buffer, table.schema) as out:
        for batch in table.to_batches(max_chunksize=3):
            out.write_batch(batch)
            ends.append(buffer.tell())
    (tmp_path / "b.arrow").write_bytes(buffer.getvalue())
    for batches, end in enumerate(ends, 1):
        for extra in (0, 3, 50, 500) if end < ends[-1] else (0, 3, 7):  # bytes of the next batch, or of the end mark
            (tmp_path / "a.arrow").write_bytes(buffer.getvalue()[: end + extra])
            complete = [(f"a.arrow:{n}", "") for n in range(1, 3 * batches + 1)]
            others = [(f"b.arrow:{n}", "") for n in range(1, 10)]
            actual = outcomes(read_at(tmp_path, max_rows))
            assert actual == [*complete, (f"a.arrow:{3 * batches + 1}", "cut short"), *others]


@pytest.mark.parametrize("max_rows", [1, 1000])
def test_joined_arrow_streams_are_read_and_bytes_behind_them_are_a_fault(max_rows, tmp_path):
    content = b""
    for number in range(2):
        table, buffer = pa.table({"text": [f"{number} {n}" for n in range(3)]}), io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as out:
            out.write_table(table, max_chunksize=2)
        content += buffer.getvalue()
    for extra, kind in ((b"", []), (b"abc", ["cut short"]), (bytes(64), ["cut short"])):
        (tmp_path / "a.arrow").write_bytes(content + extra)
        records = read_at(tmp_path, max_rows)
        assert kinds(records) == [""] * 6 + kind
        assert texts(records[:6]) == [f"{number} {n}" for number in range(2) for n in range(3)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_equal_names_do_not_replace_each_other(suffix, tmp_path):
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table)
    assert texts(read_at(path)) == ["one"]


def test_saved_data_set_without_one_of_its_tables_is_an_error(tmp_path):
    shutil.copytree(FIXTURES / "saved", tmp_path / "saved")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    state["_data_files"].append({"filename": "data-00001-of-00002.arrow"})
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"lacks data-00001-of-00002.arrow, which its state.json names"):
        open_reader(str(tmp_path / "saved"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt", "a.md", "a.tar", "a.parquet", "a.arrow"])
def test_pointer_of_git_lfs_is_no_content(name, tmp_path):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises((ValueError, OSError), match="Git LFS pointer without its content: run git lfs pull"):
        open_reader(str(tmp_path))
    good = {"csv": b"text,n\none,1\n", "tsv": b"text\tn\none\t1\n", "json": b'[{"text": "one"}]',
            "jsonl": b'{"text": "one"}', "tar": tar([("1.txt", "one")])}.get(name[2:], b"one")  # fmt: skip
    if name.endswith(("parquet", "arrow")):
        write_table = pq.write_table if name.endswith("parquet") else pyarrow.feather.write_feather
        write_table(pa.table({"text": ["one"]}), tmp_path / f"b{name[1:]}")
    else:
        (tmp_path / f"b{name[1:]}").write_bytes(good)
    records = read_at(tmp_path)
    assert "cut short" in kinds(records)
    assert len(records) == 2


def test_pointers_of_captions_and_pictures_are_faults(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(POINTER if name == "a" else encoded(noise(1, 8, 8)))
        (tmp_path / f"{name}.txt").write_bytes(POINTER if name == "b" else b"one")
    faults = read_at(tmp_path)
    assert kinds(faults) == ["unreadable image", "cut short", ""]
    assert all("run git lfs pull" in str(fault) for fault in faults[:2])


def test_table_without_captions_is_images_or_faults_by_form(tmp_path):
    pq.write_table(pa.table({"image": [GOOD, GOOD]}), tmp_path / "a.parquet")
    assert kinds(read_at(tmp_path)) == ["", ""]
    assert open_reader(str(tmp_path)).form == "image"
    faults = read_at(tmp_path, form="pair")
    assert kinds(faults) == ["missing column", "missing column"]
    assert "among its columns: image" in str(faults[0])


def test_class_label_without_a_name_is_a_fault(tmp_path):
    def features(names) -> dict:
        return {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}

    for info, expected in ((features(["nest"]), ["", "bad segment", "empty caption"]), ({"info": {"features": [1]}}, None),
                            ({}, None), (features(5), None)):  # fmt: skip
        schema = pa.schema({"image": pa.binary(), "label": pa.int64()}, {"huggingface": json.dumps(info)})
        pq.write_table(pa.table({"image": [GOOD] * 3, "label": [0, 7, None]}, schema), tmp_path / "a.parquet")
        items = read_at(tmp_path)
        assert kinds(items) == (expected or ["bad segment", "bad segment", "empty caption"])
        assert expected or "its caption is the number 7: --columns caption=NAME chooses a column" in items[1].message
    assert kinds(read_at(tmp_path, columns={"caption": ""})) == ["", "", ""]


# Compressed files


@pytest.mark.parametrize(("name", "content", "kind"), [
    ("a.jsonl.gz", "\n".join(map(json.dumps, RECORDS * 300)), "cut short"),
    ("a.json.gz", json.dumps(RECORDS * 300), "cut short"),
])  # fmt: skip
def test_truncated_compressed_file_gives_its_complete_records(name, content, kind, tmp_path):
    packed = gzip.compress(content.encode(), 1)
    (tmp_path / name).write_bytes(packed)
    expected = [record["text"] for record in RECORDS * 300]
    assert texts(read_at(tmp_path)) == expected
    for damaged in (packed[: len(packed) // 2], packed[: len(packed) * 9 // 10]):
        (tmp_path / name).write_bytes(damaged)
        for max_rows in (100, 1000):
            records = read_at(tmp_path, max_rows)
            assert kinds(records[-1:]) == [kind]
            assert texts(records[:-1]) == expected[: len(records) - 1]
        assert len(records) > 300


@pytest.mark.parametrize(("end", "kind"), [
    ('{"text": "ab', "cut short"), ('{"text": "é'.encode()[:-1], "cut short"), ('{"text": "a", ', "cut short"),
    ("{", "cut short"), ('{"text": "ab\n', "bad JSON"), ('{"text": nothing}', "bad JSON"), ("ab", "bad JSON"),
    ('{"text": "ab"}', ""),
])  # fmt: skip
def test_json_lines_that_end_inside_an_object_are_cut_short(end, kind, tmp_path):
    end = end if isinstance(end, bytes) else end.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + end)
    for max_rows in (1, 1000):
        assert outcomes(read_at(tmp_path, max_rows)) == [("a.jsonl:1", ""), ("a.jsonl:2", kind)]


def test_wrong_checksum_is_a_fault_after_all_records(tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    packed[-6] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert outcomes(read_at(tmp_path)) == [("a.jsonl.gz:1", ""), ("a.jsonl.gz:2", ""), ("a.jsonl.gz:3", "cut short")]


# COCO


def test_missing_image_of_coco_is_named_relative_to_the_source(tmp_path):
    """One in another folder has its whole path."""
    data = {"images": [{"id": 1, "file_name": "none.png"}, {"id": 2, "file_name": "1.png"}],
            "annotations": [{"image_id": 1, "caption": "no file"}, {"image_id": 2, "caption": "not a picture"}]}  # fmt: skip
    write(tmp_path, {"a/annotations/captions_train.json": data, "a/train/1.png": b"?", "aa/1.png": b"?"})
    for folder, options in (("train", {}), (f"{tmp_path}/aa", {"image_root": str(tmp_path / "aa")})):
        missing, bad = map(str, read_at(tmp_path / "a", **options))
        assert f": {folder}/none.png: No such file" in missing and f": {folder}/1.png is not an image" in bad


def test_coco_annotations_without_an_image_are_faults(folder):
    images = [{"id": 1, "file_name": "good.png"}, {"id": 2, "file_name": "none.png"}, {"id": [3]}, {"id": 4}, 5,
              {"id": 6, "file_name": "../" * 20 + "dev/zero"}]  # fmt: skip
    annotations = [{"image_id": 1, "caption": "a bird"}, {"image_id": 2, "caption": "no file"},
                   {"image_id": 9, "caption": "none"},
                   {"image_id": [3], "caption": "none"}, {"caption": "none"}, 7, {"image_id": 4, "caption": "no name"},
                   {"image_id": 1}, {"image_id": 1, "caption": 5}, {"image_id": 6, "caption": "zeros"},
                   {"image_id": 1, "caption": "a bird again"}]  # fmt: skip
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    records = read_at(folder / "captions.json")
    assert kinds(records) == ["", *["missing image"] * 6, "empty caption", "bad segment", "missing image", ""]
    assert [record.where for record in records] == [f"captions.json:{n}" for n in range(1, 12)]
    (folder / "captions_z.json").write_text("{")
    assert kinds(read_at(folder))[-1] == "cut short"
    for second in ('{"images": null, "annotations": null}', '{"images": [], "annotations": {}}'):
        (folder / "captions_z.json").write_text(second)
        assert kinds(read_at(folder))[-1] == ""  # passed over: the account names it


# Names of files


def test_file_names_that_are_not_utf8_are_printable(tmp_path):
    for n, name in enumerate((b"b\xffird.png", b"line\nbreak.png")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png(n))
    assert outcomes(read_at(tmp_path)) == [("b?ird.png", ""), ("line?break.png", "")]


def test_archive_names_that_are_not_utf8_are_printable(tmp_path):
    write_tar(tmp_path / "a.tar", [("bXrd.png", GOOD), ("bXrd.txt", b"a bird")])
    content = (tmp_path / "a.tar").read_bytes()
    for start in (0, 1024):
        head = bytearray(content[start : start + 512])
        head[1:2] = b"\xff"
        head[148:156] = b"%06o\x00 " % tarfile.calc_chksums(bytes(head))[0]
        content = content[:start] + head + content[start + 512 :]
    (tmp_path / "a.tar").write_bytes(content)
    assert outcomes(read_at(tmp_path)) == [("a.tar:b\ufffdrd", "")]


# Empty and damaged files


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", b""), ("a.jsonl", b"\n\n \n"), ("a.jsonl", b"{\n["), ("a.tar", b""), ("a.parquet", b""), ("a.arrow", b""),
    ("a.txt", b""), ("a.txt", b" \n\n"), ("a.tar", b"no archive" * 100), ("a.jsonl.gz", b"no gzip"),
    ("a.json.gz", b"no gzip"), ("a.json", b""), ("a.tgz", gzip.compress(b"", mtime=0)),
])  # fmt: skip
def test_file_without_readable_records_is_a_one_line_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises((ValueError, OSError)) as raised:
            open_reader(str(source)).units(10)
        assert str(raised.value).isprintable()
        assert name in str(raised.value) or str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", [
    "archives/shard-000000.tar", "archives/shard-000001.tar.gz", "parquet/rows.parquet", "structs/rows.parquet",
    "saved/data-00000-of-00001.arrow", "feather/rows.arrow", "text_lines/a.jsonl", "segments/documents.jsonl",
    "llava/llava.json", "paths/prompts.json", "coco/annotations/captions_val2017.json", "texts/z.txt.gz",
    "alone/turned.jpg", "alone/clear.png",
    "alone/gif.gif", "alone/webp.webp", "alone/bmp.bmp",
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
@examples(50)
@given(st.integers(0, 2**32), st.sampled_from(("cut", "byte", "bits")), st.booleans())
def test_random_damage_gives_faults_or_a_one_line_error(name, seed, damage, many_places):
    rng, content = random.Random(seed), bytearray((FIXTURES / name).read_bytes())
    if damage == "cut":
        content = content[: rng.randrange(len(content))]
    for _ in range(20 if many_places else 1):
        if damage != "cut":
            position = rng.randrange(len(content))
            content[position] = rng.randrange(256) if damage == "byte" else content[position] ^ 1 << rng.randrange(8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(content)
        try:
            reader = open_reader(str(path), ReaderOptions())
            units = reader.units(2)
        except (ValueError, OSError) as error:
            assert str(error).isprintable()
            return
        outcomes([record for unit in units for record in reader.read(unit)])
