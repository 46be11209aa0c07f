"""Readers: a fixture of each kind of data, from any file system, in units of any size, and the reader options."""

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import few, some
from tests.fixtures import make
from tests.layouts import tar
from tests.reading import (
    EXPECTED,
    FIXTURES,
    Block,
    close_account,
    other_disks,
    put,
    read,
    read_at,
    texts,
    write_lines,
)
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading import files, json_files, plain_text
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import Reader, ReaderOptions, open_reader

UNITS = (1, 2, 1000)


def open_fixture(title: str, root: str | Path = FIXTURES) -> Reader:
    expected = EXPECTED[title]
    return open_reader(f"{root}/{expected['source']}", ReaderOptions(**expected["options"]))


def check(documents: list, expected: list[dict]) -> None:
    """The documents are exactly the expected ones, in order."""
    assert [getattr(document, "where", document) for document in documents] == [values["where"] for values in expected]
    for document, values in zip(documents, expected, strict=True):
        assert isinstance(document, RawDocument), str(document)
        fields = {name: getattr(document, name) for name in ("where", "name", "split", "pairs")}
        assert {**fields, "segments": values["segments"]} == values
        assert len(document.segments) == len(values["segments"])
        for part, segment in zip(document.segments, values["segments"], strict=True):
            assert to_json(part, segment) == segment


def to_json(part: RawText | RawImage, segment: dict) -> dict:
    """A segment in the format of expected.json. The expected mean colour of a JPEG is used if all pixels are close."""
    if isinstance(part, RawText):
        if "text" in segment:
            return {"text": part.text, "loss": part.loss}
        digest = hashlib.sha256(part.text.encode()).hexdigest()
        return {"letters": len(part.text), "text_sha256": digest, "loss": part.loss}
    height, width, channels = part.pixels.shape
    values = {"width": width, "height": height, "channels": channels, "loss": part.loss, "max_t": part.max_t}
    assert part.pixels.dtype == np.uint8
    if "sha256" in segment:
        return {**values, "sha256": hashlib.sha256(part.pixels.tobytes()).hexdigest()}
    mean = part.pixels.mean((0, 1))
    is_close = np.abs(part.pixels - np.array(segment.get("mean", 1e9))).max() < 4
    return {**values, "mean": segment["mean"] if is_close else mean.tolist()}


# The fixtures


@pytest.mark.parametrize("title", EXPECTED)
def test_fixture_gives_its_documents_in_units_of_any_size_and_order(title):
    reader, expected = open_fixture(title), EXPECTED[title]
    assert reader.form == expected["form"]
    for max_rows in UNITS:
        units = reader.units(max_rows)
        assert sum(unit.rows for unit in units) == len(expected["documents"])
        reversed_units = [list(reader.read(unit)) for unit in reversed(units)]
        for documents in (read(reader, max_rows), [document for unit in reversed(reversed_units) for document in unit]):
            check(documents, expected["documents"])


def test_regenerated_fixtures_equal_the_stored_ones(tmp_path, capfd):
    make.make(tmp_path)
    assert json.loads((tmp_path / "expected.json").read_text(encoding="utf-8")) == EXPECTED
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    stored = {path.relative_to(FIXTURES) for path in FIXTURES.rglob("*") if path.is_file()}
    assert names == {path for path in stored if path.suffix not in (".py", ".pyc")}
    for title, expected in EXPECTED.items():
        check(read(open_fixture(title, tmp_path)), expected["documents"])


# Other file systems


@pytest.fixture
def disks():
    with other_disks():
        yield


def put_fixtures(root: str) -> None:
    for path in FIXTURES.rglob("*"):
        if path.is_file():
            put(f"{root}/{path.relative_to(FIXTURES)}", path.read_bytes())


@pytest.mark.parametrize("root", ["memory://some/where", "bucket://some/where"])
def test_other_file_systems_give_the_same_documents(root, disks):
    put_fixtures(root)
    for title, expected in EXPECTED.items():
        for max_rows in (1, 1000):
            check(read(open_fixture(title, root), max_rows), expected["documents"])


def test_hub_data_set_is_read_by_name(disks, monkeypatch):
    put_fixtures("memory://hub/owner")
    connect = files.connect
    addresses = []

    def connect_to_hub(address):
        addresses.append(address)
        return connect(address.replace("hf://datasets/", "memory://hub/"))

    monkeypatch.setattr(files, "connect", connect_to_hub)
    for title in ("a folder as the hub has it", "webdataset archives", "an image folder with metadata.jsonl"):
        source = EXPECTED[title]["source"]
        reader = open_reader(f"owner/{source}")
        check(read(reader), EXPECTED[title]["documents"])
        assert reader.name == source
        assert addresses[-2:] == [f"owner/{source}", f"hf://datasets/owner/{source}"]


def test_local_paths_are_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    def connect_locally(address):
        assert not address.startswith("hf://")
        return connect(address)

    connect = files.connect
    monkeypatch.setattr(files, "connect", connect_locally)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name.jsonl").write_text('{"text": "here"}')
    assert texts(read_at("owner/name.jsonl")) == ["here"]
    for missing in ("./owner/other", "../owner/other", "~/no/such", f"{tmp_path}/other", "other", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_reader(missing)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), RuntimeError("the client's own\n\nway"), OSError()])
def test_missing_network_is_a_one_line_error(error, monkeypatch, tmp_path):
    connect = files.connect

    def unreachable(address):
        if address.startswith("hf://"):
            raise error
        return connect(address)

    monkeypatch.setattr(files, "connect", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as raised:
        open_reader("owner/name")
    assert "owner/name does not exist; the hub's error" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["nosuch://a/b", "zip://a.zip", "memory://not/there", "bucket://not/there/*.tar"])
def test_bad_address_is_a_one_line_error(address, disks):
    with pytest.raises((ValueError, OSError)) as raised:
        open_reader(address)
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)


def test_network_failure_is_an_error_and_not_a_fault(disks, monkeypatch):
    class Dropped(Exception):
        pass

    def fail(self, start, end):
        raise Dropped("the line is down")

    lines = b"".join(b'{"text": "%d"}\n' % n for n in range(100_000))
    put("bucket://b/lines.jsonl", lines)
    reader = open_reader("bucket://b/lines.jsonl")
    units = reader.units(50_000)
    monkeypatch.setattr(Block, "_fetch_range", fail)
    with pytest.raises(OSError, match="the line is down"):
        list(reader.read(units[1]))
    with pytest.raises(OSError, match="the line is down"):
        reader.units(1000)


@pytest.mark.parametrize("root", ["memory://shards", "bucket://shards", ""])
def test_patterns_select_files_and_folders(root, disks, tmp_path):
    root = root or str(tmp_path)
    for name in ("a-0.jsonl", "a-1.jsonl", "b-0.jsonl", "more/a-2.jsonl"):
        put(f"{root}/{name}", json.dumps({"text": name}))
    assert texts(read_at(f"{root}/a-*.jsonl")) == ["a-0.jsonl", "a-1.jsonl"]
    assert texts(read_at(f"{root}/*/*.jsonl")) == ["more/a-2.jsonl"]
    assert [document.where for document in read_at(f"{root}/a-*")] == ["a-0.jsonl:1", "a-1.jsonl:1"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_reader(f"{root}/c-*.jsonl")


# Properties: every record is read once and in order, in units of any size

unicode = st.text(max_size=20).filter(lambda text: text.strip() and "." not in text)  # a.png is no text
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip
rows = st.lists(st.fixed_dictionaries({"text": unicode, "beside": values}), min_size=1, max_size=9)
sizes = st.sampled_from((1, 2, 3, 5, 1000))


def read_content(name: str, content: bytes, max_rows: int, **options) -> list:
    """The documents of a file of this name and content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read_at(path, max_rows, **options)


@some
@given(rows, st.data(), st.booleans(), st.booleans(), sizes)
def test_json_lines_are_read_once_and_blank_lines_count(records, data, bom, ascii_only, max_rows):
    content, expected, row = "\ufeff" if bom else "", [], 0
    for record in records:
        blank = data.draw(st.lists(st.sampled_from(("", " ", "\t")), max_size=2))
        end = data.draw(st.sampled_from(("\n", "\r\n")))
        content += "".join(line + end for line in blank) + json.dumps(record, ensure_ascii=ascii_only) + end
        row += len(blank) + 1
        expected.append((f"a.jsonl:{row}", record["text"]))
    if data.draw(st.booleans()):
        content = content.rstrip()
    documents = read_content("a.jsonl", content.encode(), max_rows)
    assert list(zip([document.where for document in documents], texts(documents), strict=True)) == expected


def add_spaces(value, data) -> str:
    """JSON with random white space wherever it is allowed."""
    blank = data.draw(st.sampled_from(("", "", " ", "\n", "\r\n\t")))
    if isinstance(value, dict):
        inside = ",".join(f"{blank}{json.dumps(key)}{blank}:{add_spaces(item, data)}" for key, item in value.items())
        return f"{blank}{{{inside}{blank}}}{blank}"
    if isinstance(value, list):
        return f"{blank}[{','.join(add_spaces(item, data) for item in value) or blank}]{blank}"
    return blank + json.dumps(value, ensure_ascii=data.draw(st.booleans())) + blank


@some
@given(rows, st.data(), st.sampled_from((1, 7, 64, 2**20)), st.booleans(), sizes)
def test_json_list_elements_are_read_once_for_any_read_size(records, data, chunk, bom, max_rows):
    content = ("\ufeff" if bom else "") + add_spaces(records, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "READ_SIZE", chunk)
        documents = read_content("a.json", content.encode(), max_rows)
    assert texts(documents) == [record["text"] for record in records]
    assert [document.where for document in documents] == [f"a.json:{n}" for n in range(1, len(records) + 1)]


letters = st.characters(codec="utf-8", exclude_characters="\0")  # a file of zeros is taken for UTF-16
captions = st.lists(st.text(letters, min_size=1, max_size=12).filter(lambda t: t.strip() == t), min_size=1, max_size=8)


@few
@given(captions, st.data(), st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), sizes)
def test_archive_records_are_read_once_between_other_members(captions, data, form, max_rows):
    buffer, expected = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for n, caption in enumerate(captions):
            folder = data.draw(st.sampled_from(("", "./", "some/folder/", *(["deep/" * 40] if form else []))))
            members = {"png": make.png(n), "txt": caption.encode(), "npy": b"no data", "seg.png": b"none either"}
            for suffix in data.draw(st.permutations(sorted(members))):
                info = tarfile.TarInfo(f"{folder}{n:04d}.{suffix}")
                info.size = len(members[suffix])
                archive.addfile(info, io.BytesIO(members[suffix]))
            if data.draw(st.booleans()):
                info = tarfile.TarInfo(f"{folder}{n:04d}")
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            expected.append((f"a.tar:{folder}{n:04d}", caption, make.noise(n).tobytes()))
    documents = read_content("a.tar", buffer.getvalue(), max_rows)
    assert [(d.where, d.segments[0].text, d.segments[1].pixels.tobytes()) for d in documents] == expected


@few
@given(st.lists(unicode, min_size=1, max_size=60), st.integers(1, 25), sizes, st.sampled_from(("parquet", "stream", "file")))
def test_table_rows_are_read_once_for_any_row_groups(column, group, max_rows, kind):
    table, buffer = pa.table({"text": column}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=group)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    documents = read_content(name, buffer.getvalue(), max_rows)
    assert texts(documents) == column
    assert [document.where for document in documents] == [f"{name}:{n}" for n in range(1, len(column) + 1)]


lines = st.lists(st.text("aé中😀 \t", max_size=30), max_size=40).flatmap(
    lambda parts: st.sampled_from(("\n", "\r\n", "\n\n")).map(lambda end: end.join(parts))
)


@some
@given(lines, st.booleans(), sizes, st.sampled_from(((20, 40), (1, 5), (10, 12))))
def test_joined_passages_equal_the_file(content, bom, max_rows, limits):
    if not content.strip():
        with pytest.raises(ValueError, match="has no records"):
            read_content("a.txt", content.encode(), max_rows)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "PASSAGE_BYTES", limits[0])
        patch.setattr(plain_text, "MAX_PASSAGE_BYTES", limits[1])
        documents = read_content("a.txt", ("\ufeff" * bom + content).encode(), max_rows)
    passages = texts(documents)
    assert "".join(passages) == content
    assert [document.where for document in documents] == [f"a.txt:passage {n}" for n in range(1, len(documents) + 1)]
    for n, passage in enumerate(passages):
        assert passage.strip()
        assert len(passage.strip().encode()) <= 2 * limits[1] + 3
        is_last = n + 1 == len(passages)
        assert is_last or len(passage.encode()) >= min(limits[0], limits[1] - 4) - 3  # none is split too early


# Options


def test_columns_option_renames_columns(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"alt": f"alt {n}", "text": "another", "id": 7} for n in range(3)))
    assert texts(read_at(path)) == ["another"] * 3
    assert texts(read_at(path, columns={"text": "alt"})) == ["alt 0", "alt 1", "alt 2"]
    assert [document.name for document in read_at(path)] == ["7"] * 3
    without_id = read_at(path, columns={"id": ""})
    assert [(document.name, document.where) for document in without_id] == [("", f"a.jsonl:{n}") for n in (1, 2, 3)]
    (tmp_path / "bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "b.jsonl", {"picture_of": "bird.png", "says": "one", "caption": "two", "img": "none.png"})
    (document,) = read_at(path, columns={"image": "picture_of", "caption": "says"})
    assert (document.segments[0].text, document.segments[1].pixels.shape, document.pairs) == ("one", (4, 4, 3), True)
    (document,) = read_at(path, columns={"caption": "caption", "image": "picture_of"})
    assert document.segments[0].text == "two"


def test_missing_column_error_lists_the_columns(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"alt": "a bird", "text": "another"})
    with pytest.raises(ValueError, match="no column 'alt_text', only alt, text"):
        open_reader(str(path), ReaderOptions(columns={"text": "alt_text"}))


def test_renamed_column_missing_in_one_record_is_a_fault(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"alt": "a bird"}, {"text": "other"})
    document, fault = read_at(path, columns={"text": "alt"})
    assert texts([document]) == ["a bird"]
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.where) == ("missing column", "a.jsonl:2")


def test_form_option_sets_the_form(tmp_path):
    (tmp_path / "bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "a.jsonl", {"image": "bird.png", "caption": "a bird"})
    for form, kinds in (("pair", [RawText, RawImage]), ("text", [RawText]), ("image", [RawImage])):
        assert [type(part) for part in read_at(path, form=form)[0].segments] == kinds
    with pytest.raises(ValueError, match="there is no form 'pears'; use one of document, pair"):
        open_reader(str(path), ReaderOptions(form="pears"))


def test_each_record_is_read_in_its_own_form(tmp_path):
    """Whatever the first hundred are. An empty column of the most frequent form is a fault."""
    (tmp_path / "bird.png").write_bytes(make.png(1))
    pair, image, text = {"image": "bird.png", "text": "a bird"}, {"image": "bird.png"}, {"text": "only text"}
    talk = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]}
    for first in (pair, image, text, talk):
        path = write_lines(tmp_path / "a.jsonl", *[first] * 120, pair, image, text, talk)
        reader, account = open_reader(str(path)), Account()
        documents = [document for unit in reader.units(50) for document in reader.read(unit, account)]
        kinds = ["".join("TI"[isinstance(part, RawImage)] for part in document.segments) for document in documents[120:]]
        assert kinds == ["TI", "I", "T", "TTT"]
        assert account.forms.total() == 124
        assert len(account.forms) == 4
    records = read_at(write_lines(tmp_path / "b.jsonl", *({**pair, **bad} for bad in ({}, {"image": None}, {}, {"text": ""},
                                                                                     {"image": []}))))  # fmt: skip
    assert [getattr(record, "kind", "") for record in records] == ["", "missing image", "", "empty caption", "missing image"]


@pytest.mark.parametrize("title", [
    "JSON lines of text", "parquet with image bytes", "an Arrow file", "webdataset archives", "plain text",
    "COCO captions, training split", "an image folder without captions", "LLaVA's conversations",
])  # fmt: skip
def test_limit_reads_the_first_records(title):
    expected = EXPECTED[title]
    for limit in (1, 2, 3):
        for max_rows in UNITS:
            options = ReaderOptions(**expected["options"], limit=limit)
            reader = open_reader(f"{FIXTURES}/{expected['source']}", options)
            assert sum(unit.rows for unit in reader.units(max_rows)) == limit
            check(read(reader, max_rows), expected["documents"][:limit])


@pytest.mark.parametrize("max_rows", UNITS)
@pytest.mark.parametrize("first", [0, 1])
def test_archive_whose_pictures_and_captions_are_apart_has_faults(first, max_rows, tmp_path):
    """Of each key, what is read second is a fault; whatever is between them is read."""
    members = [[(f"{n}.png", make.png(n)) for n in range(5)], [(f"{n}.txt", f"caption {n}") for n in range(5)]]
    between = [("x.png", make.png(9)), ("x.txt", "caption x")]
    (tmp_path / "a.tar").write_bytes(tar([*members[first], *between, *members[1 - first]]))
    items = read_at(tmp_path / "a.tar", max_rows)
    faults = [(item.where, item.kind) for item in items if isinstance(item, Fault)]
    assert faults == [(f"a.tar:{n}", "repeated key") for n in range(5)]
    kinds = ["".join("TI"[isinstance(part, RawImage)] for part in item.segments) for item in items[:6]]
    assert kinds == ["IT"[first]] * 5 + ["TI"] and isinstance(items[6], Fault)


def test_limit_may_end_inside_a_row_group(tmp_path):
    table = pa.table({"text": [str(n) for n in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    assert texts(read_at(tmp_path / "a.parquet", limit=50)) == [str(n) for n in range(50)]
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    assert texts(read_at(tmp_path / "a.arrow", limit=50)) == [str(n) for n in range(50)]


def test_split_is_selected_by_file_and_folder_names(tmp_path):
    for name in ("train.jsonl", "val.jsonl", "test2017.jsonl", "trainer/test_sft-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, {"text": name})
    assert texts(read_at(tmp_path)) == ["train.jsonl", "val.jsonl"]
    assert texts(read_at(tmp_path, split="train")) == ["train.jsonl"]
    assert len(read_at(tmp_path, split="all")) == 4
    assert texts(read_at(tmp_path, split="validation")) == ["val.jsonl"]
    assert texts(read_at(tmp_path, split="test")) == ["test2017.jsonl", "trainer/test_sft-0.jsonl"]
    assert texts(read_at(tmp_path, split="test_sft")) == ["trainer/test_sft-0.jsonl"]
    assert texts(read_at(tmp_path, split="val")) == ["val.jsonl"]
    with pytest.raises(ValueError, match="there is no split nowhere in .*; there are test, train, validation"):
        open_reader(str(tmp_path), ReaderOptions(split="nowhere"))
    assert texts(read_at(tmp_path / "val.jsonl")) == ["val.jsonl"]


def test_missing_saved_split_is_an_error():
    with pytest.raises(ValueError, match="there is no split validation in .*; there are test, train"):
        open_reader(str(FIXTURES / "saved_splits"), ReaderOptions(split="dev"))


def test_cache_files_of_a_saved_data_set_are_not_read(tmp_path):
    for path in (FIXTURES / "saved").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cache-0123456789abcdef.arrow").write_bytes((FIXTURES / "feather/rows.arrow").read_bytes())
    check(read_at(tmp_path), EXPECTED["a saved data set"]["documents"])


def test_saved_data_set_with_indices_is_an_error(tmp_path):
    for path in (FIXTURES / "saved").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = json.loads((tmp_path / "state.json").read_text())
    for text, word in ((json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}), "flatten_indices"),
                       ("{", "damaged"), ("[]", "damaged")):  # fmt: skip
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            open_reader(str(tmp_path))


def test_image_root_is_the_folder_of_relative_image_paths(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "lists/a.jsonl", {"image": "bird.png", "caption": "a bird"})
    assert isinstance(read_at(path)[0], Fault)
    assert read_at(path, image_root=str(tmp_path / "images"))[0].segments[1].pixels.tobytes() == make.noise(1).tobytes()
    coco = {"images": [{"id": 1, "file_name": "bird.png"}], "annotations": [{"image_id": 1, "caption": "a bird"}]}
    (tmp_path / "lists/captions.json").write_text(json.dumps(coco))
    documents = read_at(tmp_path / "lists/captions.json", image_root=str(tmp_path / "images"))
    assert documents[0].segments[1].pixels.tobytes() == make.noise(1).tobytes()
    with pytest.raises(ValueError, match="same kind of file system"):
        open_reader(str(path), ReaderOptions(image_root="memory://images"))


@pytest.mark.parametrize(("source", "name"), [
    ("metadata", "metadata"), ("archives/*.tar", "archives"), ("texts/a.txt", "a"), ("mine=texts/a.txt", "mine"),
    ("my-own_2=metadata", "my-own_2"),
])  # fmt: skip
def test_source_name_is_the_folder_or_the_given_name(source, name, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    assert open_reader(source).name == name


def test_folder_named_like_a_built_in_source_gets_a_prefix(tmp_path):
    (tmp_path / "shapes").mkdir()
    write_lines(tmp_path / "shapes/a.jsonl", {"text": "no shape"})
    assert open_reader(str(tmp_path / "shapes")).name == "my_shapes"


@pytest.mark.parametrize(("source", "words"), [
    ("a b=metadata", "'a b' is not a valid source name"), ("a:b=metadata", "'a:b' is not a valid source name"),
    ("shapes=metadata", "shapes is the name of a built-in source: choose another name for metadata"),
    ("digits=shapes", "digits is the name of a built-in source"),
])  # fmt: skip
def test_invalid_and_reserved_names_are_an_error(source, words, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    with pytest.raises(ValueError, match=words):
        open_reader(source)


def test_built_in_sources_are_read_in_units_of_any_size():
    expected = [(document.where, document.split) for document in read_at("topics", limit=None)]
    assert {split for _, split in expected} == {"train", "heldout"}
    assert len(set(expected)) == len(expected)
    assert [(document.where, document.split) for document in read_at("topics", 7)] == expected
    assert len(read_at("mine=digits", limit=30)) == 30


def test_folder_without_supported_files_is_a_one_line_error(tmp_path):
    with pytest.raises((ValueError, OSError), match="has no files"):
        open_reader(str(tmp_path))
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no supported files \(only \.pt, \.xlsx\)"):
        open_reader(str(tmp_path))


# Other columns and files


@pytest.mark.parametrize("record", [
    {"id": "7", "url": "https://example.org/page", "title": "A page", "text": "What it says."},
    {"content": "print()", "path": "src/main.py"}, {"text": "a", "filename": "notes"},
])  # fmt: skip
def test_text_with_a_url_is_read_as_text(tmp_path, record):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    reader = open_reader(str(tmp_path / "a.jsonl"))
    assert reader.form == "text"
    (document,) = read(reader)
    assert document.segments == (RawText(record.get("text") or record["content"]),)


def test_column_of_picture_paths_is_never_read_as_text(tmp_path):
    (tmp_path / "bird.png").write_bytes(make.png(1))
    records = [{"text": "bird.png"}, {"image": "bird.png", "label": "bird.png"}, {"title": "bird.png", "text": "a bird"},
               {"view": "a bird.png", "text": "a bird"}, {"one": "bird.png", "two": "bird.png", "text": "a bird"},
               {"text": "This is bird.png"}, {"text": "a bird", "thumbnail": "https://example.org/bird.png"}]  # fmt: skip
    items = read_at(write_lines(tmp_path / "a.jsonl", *records))
    kinds = [item.kind if isinstance(item, Fault) else
             "".join("TI"[isinstance(part, RawImage)] for part in item.segments) for item in items]  # fmt: skip
    assert kinds == ["I", "I", "TI", "T", "missing column", "T", "T"]
    assert "one, two may all be its image: choose one with --columns image=" in str(items[4])


def test_columns_whose_names_differ_only_in_case_are_counted(tmp_path):
    records = [{"Text": "other", "text": "this"}, {"text": "this", "TEXT": ""}, {"Text": "this", "TEXT": "other"}]
    reader = open_reader(str(write_lines(tmp_path / "a.jsonl", *records)))
    assert texts(read(reader)) == ["this"] * 3
    assert account_lines(reader) == ["fields: 3 of 6 read; not read: 2 in 'TEXT', 1 in 'Text'"]


def test_captions_of_a_record_with_an_id_have_different_ids(tmp_path):
    (tmp_path / "bird.png").write_bytes(make.png(1))
    records = [{"id": "b", "image": "bird.png", "captions": captions} for captions in (["one", "two"], ["three"])]
    documents = read_at(write_lines(tmp_path / "a.jsonl", *records))
    assert [document.name for document in documents] == ["b caption 1", "b caption 2", "b"]


def test_pictures_of_coco_are_counted_however_their_path_is_written(tmp_path):
    for name in ("images/1.png", "images/2.png"):
        put(f"{tmp_path}/{name}", make.png(1))
    images = [{"id": 1, "file_name": "./1.png"}, {"id": 2, "file_name": "x/..//2.png"}]
    annotations = [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}]
    put(f"{tmp_path}/annotations/captions.json", json.dumps({"images": images, "annotations": annotations}, indent=1))
    assert close_account(open_reader(str(tmp_path))).tallies["files"].read == {"JSON": 1, "picture": 2}


def test_img2dataset_folder_is_read_from_its_archives(tmp_path):
    """Its tables only have the original URLs of the images."""
    (tmp_path / "00000.tar").write_bytes((FIXTURES / "archives").joinpath(
        sorted(path.name for path in (FIXTURES / "archives").glob("*.tar"))[0]).read_bytes())  # fmt: skip
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["gone"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 1}')
    reader = open_reader(str(tmp_path))
    assert all(isinstance(document, RawDocument) for document in read(reader))
    assert account_lines(reader)[-3:] == [
        "files: 1 of 3 read; not read:", "  1 .parquet beside archives: 00000.parquet",
        "  1 .json beside archives: 00000_stats.json",
    ]  # fmt: skip


def account_lines(reader: Reader) -> list[str]:
    """The account of everything, for people. It closes."""
    return list(close_account(reader).lines())


def test_account_lists_unread_columns_and_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "lang": "en", "score": 3}\n')
    (tmp_path / "b.csv").write_text("text\ntwo\n")
    reader = open_reader(f"mine={tmp_path}")
    assert reader.describe() == "mine: records are read as text (text)"
    assert account_lines(reader) == [
        "fields: 1 of 3 read; not read: 1 in 'lang', 1 in 'score'",
        "files: 1 of 2 read; not read:", "  1 .csv beside JSON lines: b.csv",
    ]  # fmt: skip


def test_existing_path_with_an_equals_sign_is_not_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    write_lines(tmp_path / "lr=1/a.jsonl", {"text": "here"})
    assert (open_reader("lr=1").name, open_reader("lr=1").address) == ("lr_1", "lr=1")
    assert open_reader("mine=lr=1").name == "mine"


@pytest.mark.parametrize(("names", "split", "expected"), [
    (("train/val/1", "val/train/2"), "train", ["train/val/1"]),  # the outermost folder decides
    (("train/val/1", "val/train/2"), "dev", ["val/train/2"]),
    (("cat/1", "train/2"), "train", ["cat/1", "train/2"]),  # a class of trains
    (("cat/1", "train/2", "test/3"), "train", ["train/2"]),  # two splits: no classes
    (("train_1", "test_2"), "test", ["test_2"]), (("train_1", "other"), "train", ["other", "train_1"]),
    (("1", "test/2"), "train", ["1"]), (("1", "test/2"), "test", ["test/2"]),
    (("test/1",), "train", None), (("1", "2"), "test", None),
])  # fmt: skip
def test_split_of_pictures(names, split, expected, tmp_path):
    for name in names:
        put(f"{tmp_path}/{name}.png", make.png(1))
    if expected is None:
        with pytest.raises(ValueError, match=f"there is no split {split} in .*; there are "):
            read_at(tmp_path, split=split)
    else:
        assert [item.where.removesuffix(".png") for item in read_at(tmp_path, split=split)] == expected


@pytest.mark.parametrize(("names", "split", "expected"), [
    (("wiki", "test"), "train", ["wiki"]),  # without a name: for training
    (("wiki", "train"), "train", ["train"]), (("test", "val"), "train", None), (("wiki",), "test", None),
    (("train2017", "data/validation-0"), "valid", ["data/validation-0"]),
    (("cc3m-train-0000", "cc3m-validation-0000"), "train", ["cc3m-train-0000"]),  # shards, as of WebDataset and `datasets`
    (("imdb-test-00000-of-00002", "imdb-train-00000-of-00002"), "test", ["imdb-test-00000-of-00002"]),
    (("data_dev_v2", "data_train_v2.1"), "dev", ["data_dev_v2"]),
])  # fmt: skip
def test_split_of_lists(names, split, expected, tmp_path):
    for name in names:
        put(f"{tmp_path}/{name}.jsonl", json.dumps({"text": name}))
    if expected is None:
        with pytest.raises(ValueError, match=f"there is no split {split} in .*; there are "):
            read_at(tmp_path, split=split)
    else:
        assert texts(read_at(tmp_path, split=split)) == expected


def test_word_inside_a_name_is_not_a_split(tmp_path):
    for name in ("wiki-a", "wiki-b", "hogwarts-train-rides"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert sorted(texts(read_at(tmp_path))) == ["hogwarts-train-rides", "wiki-a", "wiki-b"]
    (tmp_path / "train-00000-of-00001.jsonl").write_text('{"text": "this"}\n')
    assert texts(read_at(tmp_path)) == ["this"]


def test_image_folder_may_have_a_csv(tmp_path):
    """As in Hugging Face's image folders; captions may contain commas, line breaks and quotes."""
    captions = ["a red, small bird", 'two\nlines, "quoted"', "three"]
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(content)
    quoted = [caption.replace('"', '""') for caption in captions]
    lines = "".join(f'{n}.png,"{caption}"\n' for n, caption in enumerate(quoted))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + lines)
    for max_rows in (1, 2, 1000):
        documents = read_at(tmp_path, max_rows)
        assert texts(documents) == captions
        assert [document.where for document in documents] == ["metadata.csv:2", "metadata.csv:3", "metadata.csv:5"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a,b\n1.png\n2.png,three\n")
    assert [getattr(record, "kind", "") for record in read_at(tmp_path)] == ["damaged table", "damaged table", ""]


def test_settings_files_in_an_image_folder_are_ignored(tmp_path):
    for path in (FIXTURES / "captions").rglob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    before = read_at(tmp_path)
    for number, content in enumerate(('{"editor": "x"}', '{\n  "a": [1, 2]\n}\n', "5")):
        (tmp_path / f"config{number}.json").write_text(content)
    after = read_at(tmp_path)
    assert [(d.where, len(d.segments)) for d in after] == [(d.where, len(d.segments)) for d in before]


def test_dead_url_is_one_fault(tmp_path):
    """No server uses this port; the other records are read."""
    good = next((FIXTURES / "metadata").rglob("*.png"))
    records = [{"image": image, "caption": "red"} for image in (str(good), "http://127.0.0.1:9/a.png", str(good))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    records = read_at(tmp_path)
    assert [isinstance(record, RawDocument) for record in records] == [True, False, True]
    assert (records[1].kind, records[1].where) == ("missing image", "a.jsonl:2")


def test_example_documents_of_docs_are_read_as_documented(tmp_path):
    """docs/data.md: a pair, text, an image, interleaved, a question, an edit."""
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    lines = page.partition("```jsonl\n")[2].partition("```")[0]
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    for name in ("bird", "nest", "blue"):
        (tmp_path / f"{name}.jpg").write_bytes(content)
    (tmp_path / "a.jsonl").write_text(lines)
    documents = read_at(tmp_path / "a.jsonl")
    assert all(isinstance(document, RawDocument) for document in documents), documents
    kinds = ["".join("ti"[isinstance(part, RawImage)].upper() if part.loss else "ti"[isinstance(part, RawImage)]
                     for part in document.segments) for document in documents]  # fmt: skip
    assert kinds == ["TI", "T", "I", "TITI", "itT", "itI"]
    assert [document.pairs for document in documents] == [True, *[False] * 5]
    max_ts = [[part.max_t for part in document.segments if isinstance(part, RawImage)] for document in documents[4:]]
    assert max_ts == [[0.0], [0.0, 1.0]]


def test_messages_may_have_their_images_in_a_separate_list(tmp_path):
    """As in TRL's data sets: the parts only mark the positions of images."""
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    (tmp_path / "a.png").write_bytes(content)
    question = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    lines = [json.dumps({"messages": messages, "images": ["a.png"] * count}) for count in (2, 1, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    good, too_few, too_many = read_at(tmp_path / "a.jsonl")
    assert [type(part) for part in good.segments] == [RawImage, RawText, RawImage, RawText, RawText]
    assert [part.loss for part in good.segments] == [False, False, False, False, True]
    assert {too_few.kind, too_many.kind} == {"lists of different lengths"}


@pytest.mark.parametrize("column", ["image", "images", "img", "image_path", "file_name", "picture"])
def test_mark_in_a_message_is_an_image_of_any_image_column(column, tmp_path):
    (tmp_path / "a.png").write_bytes(make.png(1))
    messages = [{"role": "user", "content": "See <image> there"}, {"role": "assistant", "content": "A robin."}]
    (document,) = read_at(write_lines(tmp_path / "a.jsonl", {"messages": messages, column: "a.png"}))
    assert [getattr(part, "text", None) for part in document.segments] == ["See ", None, " there", "\n", "A robin."]


@pytest.mark.parametrize(("record", "names"), [
    ({"remark": "a red bird", "note": "It sings. It eats."}, "note, remark"),
    ({"remark": "red", "date": "2024-01-01 10:00"}, ""),
    ({"caption": "a bird", "remark": "a red bird"}, ""), ({"remark": None}, ""), ({"remark": [1, 2]}, ""),
])  # fmt: skip
def test_text_beside_pictures_without_captions_is_named(record, names, tmp_path):
    (tmp_path / "1.png").write_bytes(make.png(1))
    write_lines(tmp_path / "a.jsonl", *[{"image": "1.png", **record}] * 3, {"image": "1.png", "rare": "a blue bird"})
    line = open_reader(str(tmp_path)).describe()
    hint = f"; warning: the text in {names} is not read: --columns caption=NAME chooses the captions"
    assert line.partition(" (image)")[2] == (hint if names else "") or "caption" in record and "warning" not in line
