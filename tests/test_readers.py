"""What people have, read: a fixture of each kind, from any disk, in units of any size; what can be chosen about it."""

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
from tests.reading import EXPECTED, FIXTURES, Block, other_disks, put, read, read_at, texts, write_lines
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading import containers, files
from transfusion.data.reading.readers import Reader, ReaderOptions, open_reader

UNITS = (1, 2, 1000)


def open_fixture(title: str, root: str | Path = FIXTURES) -> Reader:
    expected = EXPECTED[title]
    return open_reader(f"{root}/{expected['source']}", ReaderOptions(**expected["options"]))


def check(found: list, expected: list[dict]) -> None:
    """These documents and no others, in this order."""
    assert [getattr(one, "where", one) for one in found] == [document["where"] for document in expected]
    for one, document in zip(found, expected, strict=True):
        assert isinstance(one, RawDocument), str(one)
        about = {name: getattr(one, name) for name in ("where", "name", "split", "pairs")} | {"kin": one.split_group}
        assert {**about, "segments": document["segments"]} == document
        assert len(one.segments) == len(document["segments"])
        for part, segment in zip(one.segments, document["segments"], strict=True):
            assert described(part, segment) == segment


def described(part: RawText | RawImage, segment: dict) -> dict:
    """A segment in the words of expected.json. The colours of a JPEG count as those expected if they are close."""
    if isinstance(part, RawText):
        if "text" in segment:
            return {"text": part.text, "loss": part.loss}
        digest = hashlib.sha256(part.text.encode()).hexdigest()
        return {"letters": len(part.text), "text_sha256": digest, "loss": part.loss}
    height, width, channels = part.pixels.shape
    about = {"width": width, "height": height, "channels": channels, "loss": part.loss, "max_t": part.max_t}
    assert part.pixels.dtype == np.uint8
    if "sha256" in segment:
        return {**about, "sha256": hashlib.sha256(part.pixels.tobytes()).hexdigest()}
    mean = part.pixels.mean((0, 1))
    close = np.abs(part.pixels - np.array(segment.get("mean", 1e9))).max() < 4
    return {**about, "mean": segment["mean"] if close else mean.tolist()}


# The fixtures


@pytest.mark.parametrize("title", EXPECTED)
def test_a_fixture_gives_its_documents_in_units_of_any_size_and_order(title):
    reader, expected = open_fixture(title), EXPECTED[title]
    assert reader.form == expected["form"]
    for most in UNITS:
        units = reader.units(most)
        assert sum(unit.rows for unit in units) == len(expected["documents"])
        backwards = [list(reader.read(unit)) for unit in reversed(units)]
        for found in (read(reader, most), [one for unit in reversed(backwards) for one in unit]):
            check(found, expected["documents"])


def test_fixtures_made_by_the_installed_libraries_are_read_as_those_that_lie_here(tmp_path, capfd):
    make.make(tmp_path)
    assert json.loads((tmp_path / "expected.json").read_text(encoding="utf-8")) == EXPECTED
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(FIXTURES) for path in FIXTURES.rglob("*") if path.is_file()}
    assert names == {path for path in kept if path.suffix not in (".py", ".pyc")}
    for title, expected in EXPECTED.items():
        check(read(open_fixture(title, tmp_path)), expected["documents"])


# Other disks


@pytest.fixture
def disks():
    with other_disks():
        yield


def put_fixtures(root: str) -> None:
    for path in FIXTURES.rglob("*"):
        if path.is_file():
            put(f"{root}/{path.relative_to(FIXTURES)}", path.read_bytes())


@pytest.mark.parametrize("root", ["memory://some/where", "bucket://some/where"])
def test_any_disk_gives_the_same_documents(root, disks):
    put_fixtures(root)
    for title, expected in EXPECTED.items():
        for most in (1, 1000):
            check(read(open_fixture(title, root), most), expected["documents"])


def test_the_name_of_a_data_set_on_the_hub_is_read_from_there(disks, monkeypatch):
    put_fixtures("memory://hub/owner")
    connect = files._connect
    asked = []

    def on_the_hub(address):
        asked.append(address)
        return connect(address.replace("hf://datasets/", "memory://hub/"))

    monkeypatch.setattr(files, "_connect", on_the_hub)
    for title in ("a folder as the hub has it", "webdataset archives", "an image folder with metadata.jsonl"):
        source = EXPECTED[title]["source"]
        reader = open_reader(f"owner/{source}")
        check(read(reader), EXPECTED[title]["documents"])
        assert reader.name == source
        assert asked[-2:] == [f"owner/{source}", f"hf://datasets/owner/{source}"]


def test_what_lies_on_this_disk_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    def refuse(address):
        assert not address.startswith("hf://")
        return connect(address)

    connect = files._connect
    monkeypatch.setattr(files, "_connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name.jsonl").write_text('{"text": "here"}')
    assert texts(read_at("owner/name.jsonl")) == ["here"]
    for missing in ("./owner/other", "../owner/other", "~/no/such", f"{tmp_path}/other", "other", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_reader(missing)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), RuntimeError("the client's own\n\nway"), OSError()])
def test_without_a_network_one_line_says_which_address_could_not_be_asked(error, monkeypatch, tmp_path):
    connect = files._connect

    def unreachable(address):
        if address.startswith("hf://"):
            raise error
        return connect(address)

    monkeypatch.setattr(files, "_connect", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as raised:
        open_reader("owner/name")
    assert "owner/name does not exist; the hub's error" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["nosuch://a/b", "zip://a.zip", "memory://not/there", "bucket://not/there/*.tar"])
def test_an_address_that_leads_nowhere_is_refused_in_one_line(address, disks):
    with pytest.raises((ValueError, OSError)) as raised:
        open_reader(address)
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_network_that_fails_on_the_way_is_no_fault_of_the_data(disks, monkeypatch):
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
def test_patterns_choose_files_and_folders(root, disks, tmp_path):
    root = root or str(tmp_path)
    for name in ("a-0.jsonl", "a-1.jsonl", "b-0.jsonl", "more/a-2.jsonl"):
        put(f"{root}/{name}", json.dumps({"text": name}))
    assert texts(read_at(f"{root}/a-*.jsonl")) == ["a-0.jsonl", "a-1.jsonl"]
    assert texts(read_at(f"{root}/*/*.jsonl")) == ["more/a-2.jsonl"]
    assert [one.where for one in read_at(f"{root}/a-*")] == ["a-0.jsonl:1", "a-1.jsonl:1"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_reader(f"{root}/c-*.jsonl")


# Properties: every record once and in order, in units of any size

unicode = st.text(max_size=20).filter(lambda text: text.strip())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip
rows = st.lists(st.fixed_dictionaries({"text": unicode, "beside": values}), min_size=1, max_size=9)
sizes = st.sampled_from((1, 2, 3, 5, 1000))


def read_content(name: str, content: bytes, most: int, **options) -> list:
    """What a file of this name and content holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read_at(path, most, **options)


@some
@given(rows, st.data(), st.booleans(), st.booleans(), sizes)
def test_lines_are_read_once_each_and_counted_with_the_blank_ones(records, data, bom, ascii_only, most):
    content, expected, row = "\ufeff" if bom else "", [], 0
    for record in records:
        blank = data.draw(st.lists(st.sampled_from(("", " ", "\t")), max_size=2))
        end = data.draw(st.sampled_from(("\n", "\r\n")))
        content += "".join(line + end for line in blank) + json.dumps(record, ensure_ascii=ascii_only) + end
        row += len(blank) + 1
        expected.append((f"a.jsonl:{row}", record["text"]))
    if data.draw(st.booleans()):
        content = content.rstrip()
    found = read_content("a.jsonl", content.encode(), most)
    assert list(zip([one.where for one in found], texts(found), strict=True)) == expected


def spread(value, data) -> str:
    """JSON with blanks anywhere that it allows them."""
    blank = data.draw(st.sampled_from(("", "", " ", "\n", "\r\n\t")))
    if isinstance(value, dict):
        inside = ",".join(f"{blank}{json.dumps(key)}{blank}:{spread(one, data)}" for key, one in value.items())
        return f"{blank}{{{inside}{blank}}}{blank}"
    if isinstance(value, list):
        return f"{blank}[{','.join(spread(one, data) for one in value) or blank}]{blank}"
    return blank + json.dumps(value, ensure_ascii=data.draw(st.booleans())) + blank


@some
@given(rows, st.data(), st.sampled_from((1, 7, 64, 2**20)), st.booleans(), sizes)
def test_elements_of_a_list_are_read_once_each_however_it_is_cut_into_chunks(records, data, chunk, bom, most):
    content = ("\ufeff" if bom else "") + spread(records, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "READ_SIZE", chunk)
        found = read_content("a.json", content.encode(), most)
    assert texts(found) == [record["text"] for record in records]
    assert [one.where for one in found] == [f"a.json:{n}" for n in range(1, len(records) + 1)]


captions = st.lists(st.text(min_size=1, max_size=12).filter(lambda text: text.strip() == text), min_size=1, max_size=8)


@few
@given(captions, st.data(), st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), sizes)
def test_groups_of_an_archive_are_read_once_each_whatever_lies_between(captions, data, form, most):
    buffer, expected = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for n, caption in enumerate(captions):
            folder = data.draw(st.sampled_from(("", "./", "some/folder/", *(["deep/" * 40] if form else []))))
            members = {"png": make.png(n), "txt": caption.encode(), "npy": b"no data", "seg.png": b"none either"}
            for suffix in data.draw(st.permutations(sorted(members))):
                about = tarfile.TarInfo(f"{folder}{n:04d}.{suffix}")
                about.size = len(members[suffix])
                archive.addfile(about, io.BytesIO(members[suffix]))
            if data.draw(st.booleans()):
                about = tarfile.TarInfo(f"{folder}{n:04d}")
                about.type = tarfile.DIRTYPE
                archive.addfile(about)
            expected.append((f"a.tar:{folder}{n:04d}", caption, make.noise(n).tobytes()))
    found = read_content("a.tar", buffer.getvalue(), most)
    assert [(one.where, one.segments[0].text, one.segments[1].pixels.tobytes()) for one in found] == expected


@few
@given(st.lists(unicode, min_size=1, max_size=60), st.integers(1, 25), sizes, st.sampled_from(("parquet", "stream", "file")))
def test_rows_of_a_table_are_read_once_each_whatever_its_groups(found_texts, group, most, kind):
    table, buffer = pa.table({"text": found_texts}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=group)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    found = read_content(name, buffer.getvalue(), most)
    assert texts(found) == found_texts
    assert [one.where for one in found] == [f"{name}:{n}" for n in range(1, len(found_texts) + 1)]


lines = st.lists(st.text("aé中😀 \t", max_size=30), max_size=40).flatmap(
    lambda found: st.sampled_from(("\n", "\r\n", "\n\n")).map(lambda end: end.join(found))
)


@some
@given(lines, st.booleans(), sizes, st.sampled_from(((20, 40), (1, 5), (10, 12))))
def test_passages_joined_are_the_file_to_the_byte(content, bom, most, limits):
    if not content.strip():
        with pytest.raises(ValueError, match="has no records"):
            read_content("a.txt", content.encode(), most)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "PASSAGE_BYTES", limits[0])
        patch.setattr(containers, "MAX_PASSAGE_BYTES", limits[1])
        found = read_content("a.txt", ("\ufeff" * bom + content).encode(), most)
    passages = texts(found)
    assert "".join(passages) == content
    assert [one.where for one in found] == [f"a.txt:passage {n}" for n in range(1, len(found) + 1)]
    for n, passage in enumerate(passages):
        assert passage.strip()
        assert len(passage.strip().encode()) <= 2 * limits[1] + 3
        last = n + 1 == len(passages)
        assert last or len(passage.encode()) >= min(limits[0], limits[1] - 4) - 3  # none is cut for nothing


# What can be chosen


def test_columns_are_taken_by_the_names_that_a_person_gives(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"alt": f"alt {n}", "text": "another", "id": 7} for n in range(3)))
    assert texts(read_at(path)) == ["another"] * 3
    assert texts(read_at(path, columns={"text": "alt"})) == ["alt 0", "alt 1", "alt 2"]
    assert [one.name for one in read_at(path)] == ["7"] * 3
    without_id = read_at(path, columns={"id": ""})
    assert [(one.name, one.split_group) for one in without_id] == [("", f"a.jsonl:{n}") for n in (1, 2, 3)]
    (tmp_path / "bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "b.jsonl", {"picture_of": "bird.png", "says": "one", "caption": "two", "img": "none.png"})
    (found,) = read_at(path, columns={"image": "picture_of", "caption": "says"})
    assert (found.segments[0].text, found.segments[1].pixels.shape, found.pairs) == ("one", (4, 4, 3), True)
    (found,) = read_at(path, columns={"caption": "caption", "image": "picture_of"})
    assert found.segments[0].text == "two"


def test_a_column_that_is_nowhere_is_refused_and_those_there_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"alt": "a bird", "text": "another"})
    with pytest.raises(ValueError, match="no column 'alt_text', only alt, text"):
        open_reader(str(path), ReaderOptions(columns={"text": "alt_text"}))


def test_a_column_that_one_record_lacks_is_not_replaced_by_another(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"alt": "a bird"}, {"text": "other"})
    found = read_at(path, columns={"text": "alt"})
    assert texts(found[:1]) == ["a bird"]
    assert isinstance(found[1], Fault)
    assert (found[1].kind, found[1].where) == ("missing column", "a.jsonl:2")


def test_the_form_of_records_can_be_said(tmp_path):
    (tmp_path / "bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "a.jsonl", {"image": "bird.png", "caption": "a bird"})
    for form, kinds in (("pair", [RawText, RawImage]), ("text", [RawText]), ("image", [RawImage])):
        assert [type(part) for part in read_at(path, form=form)[0].segments] == kinds
    with pytest.raises(ValueError, match="there is no form 'pears'; use one of document, pair"):
        open_reader(str(path), ReaderOptions(form="pears"))


def test_most_records_decide_the_form_and_captions_that_some_pictures_lack_are_not_dropped(tmp_path):
    (tmp_path / "bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "a.jsonl", *[{"image": "bird.png"}] * 3, {"image": "bird.png", "text": "a bird"})
    found = read_at(path)
    assert [getattr(one, "kind", "document") for one in found] == ["missing column"] * 3 + ["document"]
    path = write_lines(tmp_path / "b.jsonl", {"image": "bird.png"}, *[{"text": "a bird"}] * 2)
    assert open_reader(str(path)).form == "text"


@pytest.mark.parametrize("title", [
    "JSON lines of text", "parquet with image bytes", "an Arrow file", "webdataset archives", "plain text", "COCO captions",
    "an image folder without captions", "LLaVA's conversations",
])  # fmt: skip
def test_a_limit_ends_the_records_where_it_says(title):
    expected = EXPECTED[title]
    for limit in (1, 2, 3):
        for most in UNITS:
            reader = open_reader(f"{FIXTURES}/{expected['source']}", ReaderOptions(limit=limit))
            assert sum(unit.rows for unit in reader.units(most)) == limit
            check(read(reader, most), expected["documents"][:limit])


def test_a_limit_ends_inside_a_group_of_rows(tmp_path):
    table = pa.table({"text": [str(n) for n in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    assert texts(read_at(tmp_path / "a.parquet", limit=50)) == [str(n) for n in range(50)]
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    assert texts(read_at(tmp_path / "a.arrow", limit=50)) == [str(n) for n in range(50)]


def test_splits_are_found_in_the_names_of_files_and_folders(tmp_path):
    for name in ("train.jsonl", "val.jsonl", "test2017.jsonl", "trainer/test_sft-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, {"text": name})
    assert texts(read_at(tmp_path)) == ["train.jsonl"]
    assert texts(read_at(tmp_path, split="validation")) == ["val.jsonl"]
    assert texts(read_at(tmp_path, split="test")) == ["test2017.jsonl", "trainer/test_sft-0.jsonl"]
    assert texts(read_at(tmp_path, split="test_sft")) == ["trainer/test_sft-0.jsonl"]
    assert len(read_at(tmp_path, split="nowhere")) == 4  # no file names it: they are no splits
    assert texts(read_at(tmp_path / "val.jsonl")) == ["val.jsonl"]


def test_a_saved_split_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match="there is no split dev in"):
        open_reader(str(FIXTURES / "saved_splits"), ReaderOptions(split="dev"))


def test_caches_beside_a_saved_data_set_are_not_read(tmp_path):
    for path in (FIXTURES / "saved").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cache-0123456789abcdef.arrow").write_bytes((FIXTURES / "feather/rows.arrow").read_bytes())
    check(read_at(tmp_path), EXPECTED["a saved data set"]["documents"])


def test_a_saved_data_set_whose_order_lies_beside_it_is_refused(tmp_path):
    for path in (FIXTURES / "saved").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = json.loads((tmp_path / "state.json").read_text())
    for text, word in ((json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}), "flatten_indices"),
                       ("{", "damaged"), ("[]", "damaged")):  # fmt: skip
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            open_reader(str(tmp_path))


def test_paths_of_pictures_can_be_counted_from_another_folder(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/bird.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "lists/a.jsonl", {"image": "bird.png", "caption": "a bird"})
    assert isinstance(read_at(path)[0], Fault)
    assert read_at(path, image_root=str(tmp_path / "images"))[0].segments[1].pixels.tobytes() == make.noise(1).tobytes()
    about = {"images": [{"id": 1, "file_name": "bird.png"}], "annotations": [{"image_id": 1, "caption": "a bird"}]}
    (tmp_path / "lists/captions.json").write_text(json.dumps(about))
    found = read_at(tmp_path / "lists/captions.json", image_root=str(tmp_path / "images"))
    assert found[0].segments[1].pixels.tobytes() == make.noise(1).tobytes()
    with pytest.raises(ValueError, match="same kind of file system"):
        open_reader(str(path), ReaderOptions(image_root="memory://images"))


@pytest.mark.parametrize(("source", "name"), [
    ("metadata", "metadata"), ("archives/*.tar", "archives"), ("texts/a.txt", "a"), ("mine=texts/a.txt", "mine"),
    ("my-own_2=metadata", "my-own_2"),
])  # fmt: skip
def test_a_source_is_called_after_its_folder_or_as_one_says(source, name, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    assert open_reader(source).name == name


def test_a_folder_that_is_called_like_a_source_of_ours_gets_another_name(tmp_path):
    (tmp_path / "shapes").mkdir()
    write_lines(tmp_path / "shapes/a.jsonl", {"text": "no shape"})
    assert open_reader(str(tmp_path / "shapes")).name == "my_shapes"


@pytest.mark.parametrize(("source", "words"), [
    ("a b=metadata", "'a b' is not a valid source name"), ("a:b=metadata", "'a:b' is not a valid source name"),
    ("shapes=metadata", "shapes is the name of a built-in source: choose another name for metadata"),
    ("digits=shapes", "digits is the name of a built-in source"),
])  # fmt: skip
def test_bad_and_reserved_names_are_refused(source, words, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    with pytest.raises(ValueError, match=words):
        open_reader(source)


def test_sources_that_need_no_files_give_their_documents_in_units_of_any_size():
    expected = [(one.where, one.split) for one in read_at("topics", limit=None)]
    assert {split for _, split in expected} == {"train", "heldout"}
    assert len(set(expected)) == len(expected)
    assert [(one.where, one.split) for one in read_at("topics", 7)] == expected
    assert len(read_at("mine=digits", limit=30)) == 30


def test_a_folder_of_nothing_that_can_be_read_is_refused_in_one_line(tmp_path):
    with pytest.raises((ValueError, OSError), match="has no files"):
        open_reader(str(tmp_path))
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no supported files \(only \.pt, \.xlsx\)"):
        open_reader(str(tmp_path))


# What lies beside


@pytest.mark.parametrize("record", [
    {"id": "7", "url": "https://example.org/page", "title": "A page", "text": "What it says."},
    {"content": "print()", "path": "src/main.py"}, {"text": "a", "filename": "notes"},
])  # fmt: skip
def test_text_with_an_address_stays_text(tmp_path, record):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    reader = open_reader(str(tmp_path / "a.jsonl"))
    assert reader.form == "text"
    (found,) = read(reader)
    assert found.segments == (RawText(record.get("text") or record["content"]),)


def test_img2datasets_own_folder_is_read_from_its_archives(tmp_path):
    """The tables beside them hold the addresses that the pictures once had."""
    (tmp_path / "00000.tar").write_bytes((FIXTURES / "archives").joinpath(
        sorted(path.name for path in (FIXTURES / "archives").glob("*.tar"))[0]).read_bytes())  # fmt: skip
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["gone"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 1}')
    reader = open_reader(str(tmp_path))
    assert all(isinstance(one, RawDocument) for one in read(reader))
    assert "files not read: 1 .parquet, 1 .json" in reader.describe()


def test_what_is_not_read_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "lang": "en", "score": 3}\n')
    (tmp_path / "b.csv").write_text("text\ntwo\n")
    said = open_reader(f"mine={tmp_path}").describe()
    assert said == "mine: each record is read as text (text); columns not read: lang, score; files not read: 1 .csv"
    assert "not read" not in open_reader(str(FIXTURES / "captions")).describe()  # pictures, and the texts beside them


def test_a_word_inside_a_name_is_no_split(tmp_path):
    for name in ("wiki-a", "wiki-b", "hogwarts-train-rides"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert sorted(texts(read_at(tmp_path))) == ["hogwarts-train-rides", "wiki-a", "wiki-b"]
    (tmp_path / "train-00000-of-00001.jsonl").write_text('{"text": "this"}\n')
    assert texts(read_at(tmp_path)) == ["this"]


def test_an_image_folder_may_have_a_csv(tmp_path):
    """As Hugging Face's image folders may; a comma, a line break and a quote in a caption are part of it."""
    captions = ["a red, small bird", 'two\nlines, "quoted"', "three"]
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(content)
    quoted = [caption.replace('"', '""') for caption in captions]
    lines = "".join(f'{n}.png,"{caption}"\n' for n, caption in enumerate(quoted))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + lines)
    for most in (1, 2, 1000):
        found = read_at(tmp_path, most)
        assert texts(found) == captions
        assert [one.where for one in found] == ["metadata.csv:2", "metadata.csv:3", "metadata.csv:4"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a,b\n1.png\n2.png,three\n")
    assert [getattr(one, "kind", "") for one in read_at(tmp_path)] == ["damaged table", "damaged table", ""]


def test_settings_that_lie_among_pictures_hide_none(tmp_path):
    for path in (FIXTURES / "captions").rglob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    before = read_at(tmp_path)
    for number, content in enumerate(('{"editor": "x"}', '{\n  "a": [1, 2]\n}\n', "5")):
        (tmp_path / f"config{number}.json").write_text(content)
    after = read_at(tmp_path)
    assert [(one.where, len(one.segments)) for one in after] == [(one.where, len(one.segments)) for one in before]


def test_a_dead_address_is_one_fault_and_no_more(tmp_path):
    """Nobody listens there; the records around it come all the same."""
    good = next((FIXTURES / "metadata").rglob("*.png"))
    records = [{"image": image, "caption": "red"} for image in (str(good), "http://127.0.0.1:9/a.png", str(good))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_at(tmp_path)
    assert [isinstance(one, RawDocument) for one in found] == [True, False, True]
    assert (found[1].kind, found[1].where) == ("missing image", "a.jsonl:2")


def test_the_documents_that_the_page_shows_are_read_as_it_says(tmp_path):
    """docs/data.md: a pair, text, a picture, interleaved, a question, an edit."""
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    lines = page.partition("```jsonl\n")[2].partition("```")[0]
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    for name in ("bird", "nest", "blue"):
        (tmp_path / f"{name}.jpg").write_bytes(content)
    (tmp_path / "a.jsonl").write_text(lines)
    found = read_at(tmp_path / "a.jsonl")
    assert all(isinstance(one, RawDocument) for one in found), found
    shown = ["".join("ti"[isinstance(part, RawImage)].upper() if part.loss else "ti"[isinstance(part, RawImage)]
                     for part in one.segments) for one in found]  # fmt: skip
    assert shown == ["TI", "T", "I", "TITI", "itT", "itI"]
    assert [one.pairs for one in found] == [True, *[False] * 5]
    clean = [[part.max_t for part in one.segments if isinstance(part, RawImage)] for one in found[4:]]
    assert clean == [[0.0], [0.0, 1.0]]


def test_messages_may_have_their_pictures_in_a_list_beside_them(tmp_path):
    """As TRL's data: the parts only say where a picture stands."""
    content = next((FIXTURES / "metadata").rglob("*.png")).read_bytes()
    (tmp_path / "a.png").write_bytes(content)
    asked = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    lines = [json.dumps({"messages": messages, "images": ["a.png"] * count}) for count in (2, 1, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    good, few_, many_ = read_at(tmp_path / "a.jsonl")
    assert [type(part) for part in good.segments] == [RawImage, RawText, RawImage, RawText, RawText]
    assert [part.loss for part in good.segments] == [False, False, False, False, True]
    assert {few_.kind, many_.kind} == {"lists of different lengths"}
