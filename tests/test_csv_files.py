"""CSV files: every dialect gives the rows that pandas and `csv` write, and a bad row costs one row."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import tempfile
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.reading import close_account, read_at, texts
from tests.sources import picture, png
from transfusion.data.raw import Fault
from transfusion.data.reading import csv_files, streams
from transfusion.data.reading.csv_files import find_dialect
from transfusion.data.reading.readers import open_reader
from transfusion.data.reading.values import parse_texts

PIXELS = png(picture(0)[1])
sizes = st.sampled_from((1, 2, 3, 1000))
cells = st.text(st.sampled_from('ab ,;|\t"\'\n\r\r[é猫\\#'), max_size=12)
plain = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters='\t|;,"')
plain_cells = st.text(plain, max_size=12)


def write(folder: Path, content: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def outcomes(source: Path, max_rows: int = 1000, **options) -> list[tuple[str, str]]:
    """File and row of each record, and its text, or the kind of its fault."""
    records = read_at(source, max_rows, **options)
    return [(item.where, item.kind if isinstance(item, Fault) else text)
            for item, text in zip(records, texts(records), strict=True)]  # fmt: skip


def table(header: str, *rows: str) -> str:
    return "\n".join((header, *rows)) + "\n"


@examples(300, 40)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.sampled_from(",;\t|"), st.booleans(), st.booleans(),
       st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)), st.sampled_from("\n \r\n".split(" ")),
       sizes)  # fmt: skip
def test_rows_written_by_pandas_are_read(rows, delimiter, bom, with_index, quoting, end, max_rows):
    if quoting == csv.QUOTE_MINIMAL:  # carriage returns are then written without quotes, which nothing can read
        rows = [(text.replace("\r", ""), other.replace("\r", "")) for text, other in rows]
    frame = pandas.DataFrame([(f"{number}{text}", f"x{other}") for number, (text, other) in enumerate(rows)],
                             columns=["text", "other"])  # fmt: skip
    content = frame.to_csv(sep=delimiter, index=with_index, quoting=quoting, lineterminator=end)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content.encode("utf-8-sig" if bom else "utf-8"))
        records = read_at(path, max_rows)
        lines = [1 + before.count("\n") for before in _contents_before_rows(frame, delimiter, with_index, quoting, end)]
    assert texts(records) == list(frame["text"])
    assert [record.where for record in records] == [f"a.csv:{line}" for line in lines]


def _contents_before_rows(frame, delimiter, with_index, quoting, end) -> list[str]:
    return [frame[:size].to_csv(sep=delimiter, index=with_index, quoting=quoting, lineterminator=end)
            for size in range(len(frame))]  # fmt: skip


@examples(200, 40)
@given(st.lists(st.tuples(plain_cells, plain_cells, plain_cells), min_size=1, max_size=8), st.sampled_from(",;\t|"),
       st.booleans(), st.booleans(), sizes)  # fmt: skip
def test_header_and_spaces_behind_delimiters_are_found(rows, delimiter, has_spaces, has_header, max_rows):
    rows = [(f"{number}.png", f"one {caption.strip()}", f"a much longer caption {longest.strip()}")
            for number, (_, caption, longest) in enumerate(rows)]  # fmt: skip
    lines = [("image", "comment_number", "caption")] * has_header + rows
    content = "".join((delimiter + " " * has_spaces).join(cells) + "\n" for cells in lines)
    with tempfile.TemporaryDirectory() as folder:
        for name, *_ in rows:
            (Path(folder) / name).write_bytes(PIXELS)
        records = read_at(write(Path(folder), content), max_rows)
    assert texts(records) == [longest for *_, longest in rows]
    assert [record.where for record in records] == [f"a.csv:{n + has_header}" for n in range(1, len(rows) + 1)]


@pytest.mark.parametrize("max_rows", [1, 2, 1000])
def test_bad_row_costs_one_row(tmp_path, max_rows):
    good = [f"{n},plain words number {n}" for n in range(40)]
    bad = {
        3: '3,"he said "hi" to me"', 7: '7,"never closed', 11: "11,a,b", 12: "12", 20: '20,"has ""two"" quotes"',
        21: '21,"two\nlines"', 25: '25,"closed" too early', 39: '39,"open at the end',
    }  # fmt: skip
    path = write(tmp_path, table("id,text", *(bad.get(n, row) for n, row in enumerate(good))))
    damaged = "damaged table"
    expected = [row.partition(",")[2] for row in good]
    for number in (3, 7, 11, 12, 25, 39):
        expected[number] = damaged
    expected[20], expected[21] = 'has "two" quotes', "two\nlines"
    lines = [n + 2 + (n > 21) for n in range(40)]
    assert outcomes(path, max_rows) == [(f"a.csv:{line}", text) for line, text in zip(lines, expected, strict=True)]


def test_stray_quote_hides_nothing_behind_it(tmp_path):
    """The reduced case: 6,000 rows, of which one has quotes in quotes."""
    good = [f"{n},plain words number {n}" for n in range(6000)]
    good[60] = '60,"he said "hi" to me"'
    found = outcomes(write(tmp_path, table("id,text", *good)), 2048)
    assert [(where, text) for where, text in found if text == "damaged table"] == [("a.csv:62", "damaged table")]
    assert len(found) == 6000


def test_rows_are_named_by_their_first_lines(tmp_path):
    write(tmp_path, PIXELS, "a.png")
    path = write(tmp_path, 'image,caption\na.png,"one\nsecond line"\n\n\nnone.png,two\n   \na.png,three')
    expected = [("a.csv:2", "one\nsecond line"), ("a.csv:6", "missing image"), ("a.csv:8", "three")]
    assert all(outcomes(path, max_rows) == expected for max_rows in (1, 2, 1000))


def test_row_that_is_not_utf8_is_one_fault(tmp_path):
    path = write(tmp_path, b"text,n\none,1\ncaf\xe9,2\n\"two\xe9\nlines\",3\nlast,4\n")
    assert [text for _, text in outcomes(path)] == ["one", "wrong encoding", "wrong encoding", "last"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("max_rows", [1, 1000])
def test_row_without_all_cells_and_line_break_is_cut_short(encoding, max_rows, tmp_path):
    content = "id,text,n\n1,one,1\n2,two,2"
    for end in range(content.index("2,"), len(content)):
        complete = [("a.csv:2", "one")]
        last = [("a.csv:3", "cut short" if content[:end].count(",") < 6 else "two")] if content[end - 1] != "\n" else []
        path = write(tmp_path, content[:end].encode(encoding))
        assert outcomes(path, max_rows) == complete + last
        if last and content[end - 1] != ",":  # a line break is the writer's: the row is wrong, not cut
            path = write(tmp_path, f"{content[:end]}\n".encode(encoding))
            assert outcomes(path, max_rows) == complete + [("a.csv:3", last[0][1].replace("cut short", "damaged table"))]


def test_file_of_carriage_returns_is_cut_short(tmp_path):
    """All rows are one line, and one fault would hide them all."""
    write(tmp_path, "text,n\none,1\n", "a.csv")
    write(tmp_path, "text,n\rtwo,2\rthree,3\r", "b.csv")
    assert outcomes(tmp_path) == [("a.csv:2", "one"), ("b.csv:1", "cut short")]


def test_file_that_ends_in_a_quoted_cell_is_cut_short(tmp_path):
    assert [text for _, text in outcomes(write(tmp_path, 'text,n\none,1\n"two and'))] == ["one", "cut short"]


def test_cells_of_any_length_are_read(tmp_path):
    long = "word " * 60_000
    path = write(tmp_path, f'text,n\n"{long}",1\n{long},2\nshort,3\n')
    assert texts(read_at(path)) == [long, long, "short"]


def test_endless_cell_is_one_fault(tmp_path, monkeypatch):
    limit = csv.field_size_limit(1000)
    try:
        path = write(tmp_path, table("text,n", '"open,1', *(f"{n},{n}" for n in range(400))))
        assert [text for _, text in outcomes(path)] == ["damaged table", *map(str, range(400))]
    finally:
        csv.field_size_limit(limit)


def test_quotes_are_characters_where_the_dialect_has_none(tmp_path):
    """As in Conceptual Captions: tabs, no header, and captions that begin or end with quotes."""
    rows = ['he said "hi"\tx1', '"hi" he said\tx2', '"open\tx3', 'a 5" nail\tx4', '"whole"\tx5']
    path = write(tmp_path, table("text\tid", *rows), "a.tsv")
    assert texts(read_at(path)) == [row.partition("\t")[0] for row in rows]
    rows = ['"a ""b"""\tx1', '"two\nlines"\tx2', "plain\tx3"]
    path = write(tmp_path, table("text\tid", *rows), "b.tsv")
    assert texts(read_at(path)) == ['a "b"', "two\nlines", "plain"]
    rows = ['"one"|"1"', '"says "two""|"2"', '"three"|"3"']
    path = write(tmp_path, table("text|id", *rows), "c.csv")
    assert [text for _, text in outcomes(path)] == ["one", "damaged table", "three"]


def test_equal_names_of_columns_do_not_replace_each_other(tmp_path):
    reader = open_reader(str(write(tmp_path, "text,text\none,two\n")))
    (span,) = reader.containers[""].spans(1, None)
    assert dict(reader.containers[""].records(span)) == {"a.csv:2": {"text": "one", "text.1": "two"}}


def test_one_column_may_have_any_delimiter(tmp_path):
    assert texts(read_at(write(tmp_path, 'text\na, b\n"c; d"\ne\tf | g\n'))) == ["a, b", "c; d", "e\tf | g"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [('["a dog", "it\'s"]', ["a dog", "it's"]), ("['a dog', \"it's\"]", ["a dog", "it's"]),
     ("['a dog'\n 'a cat']", ["a dog", "a cat"]), ("['it\\'s', ]", ["it's"]), ("[sic] a dog", None), ("[]", None),
     ("['\\x']", None), ("['a'] b", None), ("[" + "'a', " * 50_000, None), ("['" + "\\" * 100_000, None)],
)  # fmt: skip
def test_list_of_texts_may_be_written_as_text(cell, expected):
    assert parse_texts(cell) == expected


def test_lists_of_captions_in_cells_are_several_captions(tmp_path):
    write(tmp_path, PIXELS, "a.png")
    frame = pandas.DataFrame({"image": ["a.png", "a.png"], "captions": [["one", "it's two"], "[sic] three"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert outcomes(tmp_path / "a.csv") == [
        ("a.csv:2 caption 1", "one"), ("a.csv:2 caption 2", "it's two"), ("a.csv:3", "[sic] three"),
    ]  # fmt: skip


def test_dialect_is_the_same_when_the_sample_ends_in_a_row(tmp_path, monkeypatch):
    content = table("text\tid", *(f'"line one of {n}\nline two\nline three"\t{n}' for n in range(30))).encode()
    for size in range(40, 400, 7):
        monkeypatch.setattr(csv_files, "SAMPLE_SIZE", size)
        assert find_dialect(content[:size]).has_quotes, size


# Linear time


def compressed(suffix: str, content: bytes) -> bytes:
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, bytes)(content)


def archive(rows: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(rows):
            info = tarfile.TarInfo(f"{number:05d}.json")
            content = f'{{"text": "{number} {"word " * 60}"}}'.encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


CONTENTS = {
    ".csv": "".join(["text,n\n", *(f"{n} {'word ' * 60},{n}\n" for n in range(1500))]).encode(),
    ".jsonl": "".join(f'{{"text": "{n} {"word " * 60}"}}\n' for n in range(1500)).encode(),
    ".json": ("[" + ",".join(f'{{"text": "{n} {"word " * 60}"}}' for n in range(1500)) + "]").encode(),
    ".txt": "".join(f"{n} {'word ' * 60}\n\n" for n in range(1500)).encode(),
    ".tar": archive(600),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_compressed_file_is_decompressed_once_for_any_number_of_spans(kind, suffix, tmp_path, monkeypatch):
    """Once to list the records and once to read them, and the first records for the form and the dialect."""
    decompressed = count_bytes(monkeypatch)
    path = write(tmp_path, compressed(suffix, CONTENTS[kind]), f"a{kind}{suffix}")
    reader = open_reader(str(path))
    units = reader.units(20)
    documents = [document for unit in units for document in reader.read(unit)]
    assert len(units) > 5 or kind == ".txt"
    assert not any(isinstance(document, Fault) for document in documents)
    size = len(CONTENTS[kind])
    assert decompressed() <= 2 * size + 8 * 2**18
    middle = len(units) // 2
    again = [document for unit in units[middle:] for document in reader.read(unit)]  # as a preparation that resumes
    assert texts(again) == texts(documents)[-len(again) :]
    assert decompressed() <= 3 * size + 8 * 2**18


def count_bytes(monkeypatch):
    """A function that returns how many bytes were decompressed since now."""
    sizes, original = [], streams.Decoded._decode

    def decompress(stream) -> int:
        sizes.append(original(stream))
        return sizes[-1]

    monkeypatch.setattr(streams.Decoded, "_decode", decompress)
    return lambda: sum(sizes)


def test_each_line_of_a_table_is_read_once_for_any_number_of_spans(tmp_path, monkeypatch):
    lines, original = [0], csv_files.Lines.__next__

    def read_line(self) -> str:
        lines[0] += 1
        return original(self)

    monkeypatch.setattr(csv_files.Lines, "__next__", read_line)
    path = write(tmp_path, CONTENTS[".csv"])
    reader = open_reader(str(path))
    lines[0] = 0
    assert sum(1 for unit in reader.units(10) for _ in reader.read(unit)) == 1500
    assert lines[0] <= 2 * 1501 + 2 * 150 + csv_files.SAMPLE_ROWS * 8


@examples(200, 40)
@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 3000)), max_size=12),
       st.sampled_from((".gz", ".bz2", ".xz")))  # fmt: skip
def test_spans_of_a_compressed_file_may_be_read_in_any_order(places, suffix):
    content = bytes(n % 251 for n in range(60_000))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WINDOW", 2000)
        patch.setattr(streams, "BUFFER_SIZE", 500)
        path = str(write(Path(folder), compressed(suffix, content), f"a.txt{suffix}"))
        files = open_reader(path).files
        for offset, size in places:
            with files.open(path, offset) as file:
                assert file.read(size) == content[offset : offset + size]


@pytest.mark.parametrize("size", [100, 999, 20_000])
def test_last_content_is_kept_and_no_more_than_two_windows(size, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", 1000)
    monkeypatch.setattr(streams, "BUFFER_SIZE", 300)
    content = bytes(n % 251 for n in range(size))
    stream = streams.Decoded(streams.RawFile(io.BytesIO(content), "a"))
    for end in range(0, size, 70):
        stream.seek(end)
        assert min(end, 1000) <= end - stream.start <= 2300
        place = max(0, end - 1000)
        stream.seek(place)
        assert content[place:].startswith(stream.read(20))
        stream.seek(end)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_with_the_separator_is_no_row(delimiter, bom, tmp_path):
    """Excel reads and writes it."""
    content = f"sep={delimiter}\r\ntext{delimiter}other\r\none{delimiter}x\r\ntwo{delimiter}y\r\n"
    assert outcomes(write(tmp_path, bom + content.encode()), 1) == [("a.csv:3", "one"), ("a.csv:4", "two")]


def test_first_row_with_a_picture_is_no_header(tmp_path):
    """Even if its caption is a name that columns have."""
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(PIXELS)
    assert outcomes(write(tmp_path, "0.png,text\n1.png,dog\n")) == [("a.csv:1", "text"), ("a.csv:2", "dog")]


# Other first and last rows


@pytest.mark.parametrize("comments", ["# made by hand\n", "# 1. it's \"quoted, and\n#\n#two\n", "\ufeff# bom\n", ""])
@pytest.mark.parametrize(("rows", "expected"), [
    ("text;n\none, #1;1\n#two;2\n", ["one, #1", "#two"]), ("# n,text\n1000,one\n", ["one"]),
    ("#n\ttext\n1000\tone\n", ["one"]), ("1,a longer text\n#2,another text\n", ["a longer text", "another text"]),
])  # fmt: skip
@pytest.mark.parametrize("max_rows", [1, 1000])
def test_lines_of_comments_before_the_first_row_are_skipped(comments, rows, expected, max_rows, tmp_path):
    found = outcomes(write(tmp_path, comments + rows), max_rows)
    assert [text for _, text in found] == expected
    lines = (comments + rows).splitlines()
    assert found[-1][0] == f"a.csv:{len(lines)}"


def test_texts_with_a_hash_are_no_comments(tmp_path):
    assert [text for _, text in outcomes(write(tmp_path, "text\n#one\n#two\n"))] == ["#one", "#two"]
    assert [text for _, text in outcomes(write(tmp_path, "#one,1\n#two,2\n"))] == ["#one", "#two"]


@pytest.mark.parametrize("blank", [",", ",,,,", " , ", '"",""', ""])
def test_rows_of_delimiters_alone_are_blank(blank, tmp_path):
    path = write(tmp_path, f"{blank}\r\nid,text\r\n{blank}\r\n1,one\r\n{blank}\r\n2,\r\n3,three\r\n{blank}")
    assert outcomes(path) == [("a.csv:4", "one"), ("a.csv:6", "empty text"), ("a.csv:7", "three")]


def test_header_of_joined_tables_is_no_row(tmp_path):
    path = write(tmp_path, "id,text,\n1,one,\nid,text,\n2,two,\n")
    assert all(outcomes(path, max_rows) == [("a.csv:2", "one"), ("a.csv:4", "two")] for max_rows in (1, 1000))


@pytest.mark.parametrize("header", ["File Name,Alt Text", "file-name,alt-text", "File name , ALT  TEXT"])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_names_of_columns_may_have_spaces_and_hyphens(header, suffix, tmp_path):
    write(tmp_path, PIXELS, "1.png")
    names = dict(zip(header.split(","), ("1.png", "a bird"), strict=True))
    path = write(tmp_path, f"{header}\n1.png,a bird\n" if suffix == "csv" else json.dumps(names), f"a.{suffix}")
    assert [len(document.segments) for document in read_at(path)] == [2]


def test_names_of_columns_that_mean_the_same_stay_apart(tmp_path):
    path = write(tmp_path, '{"Alt Text": "one", "alt-text": "two", "ALT_TEXT": "three", "Text": "four"}', "a.jsonl")
    passed_over = close_account(open_reader(str(path))).tallies["fields"].passed_over
    assert passed_over == {"in 'alt_text'": 1, "in 'alt-text'": 1, "in 'ALT_TEXT'": 1}


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA, pandas.NaT, "NULL", "\\N"])
@pytest.mark.parametrize("na_rep", ["", "nan", "NULL", "N/A", "<NA>", "None"])
def test_missing_captions_are_faults(missing, na_rep, tmp_path):
    write(tmp_path, PIXELS, "1.png")
    frame = pandas.DataFrame({"image": ["1.png"] * 3, "caption": ["a nan, or None", missing, "NULLs"]})
    path = write(tmp_path, frame.to_csv(na_rep=na_rep))
    assert [text for _, text in outcomes(path)] == ["a nan, or None", "empty caption", "NULLs"]


@pytest.mark.parametrize("rows", [
    ["1.png,one; two", "2.png,three; four"], ["1.png;one, two", "2.png;three, four"], ["1.png|a, b; c", "2.png|d, e; f"],
])  # fmt: skip
def test_delimiter_beside_pictures_is_that_of_the_columns(rows):
    assert find_dialect("\n".join(rows).encode()).delimiter == rows[0][len("1.png")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", "text,n\none 猫,1\n\"two\n𝄞\",2\n"), ("a.tsv", "text\tn\none 猫\t1\ntwo\t2\n"),
    ("a.jsonl", '{"text": "one 猫"}\n\n{"text": "two 𝄞"}\n'), ("a.json", '[{"text": "one 猫"},\n{"text": "two"}]'),
    ("b.json", '{\n"text": "one 猫"}'), ("a.txt", "one 猫\r\n\r\ntwo"), ("a.csv.gz", "text,n\none,1\n"),
])  # fmt: skip
def test_byte_order_mark_shows_the_encoding(name, content, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", 16)
    monkeypatch.setattr(streams, "BUFFER_SIZE", 7)
    pack = gzip.compress if name.endswith(".gz") else bytes
    for max_rows in (1, 1000):
        expected = outcomes(write(tmp_path, pack(content.encode()), name), max_rows)
        assert outcomes(write(tmp_path, pack(f"\ufeff{content}".encode(encoding)), name), max_rows) == expected
    assert not any(kind == "cut short" for _, kind in expected)


def test_caption_in_utf_16_is_read_and_damage_costs_one_record(tmp_path):
    for name, caption in (("a", "one 猫".encode("utf-16")), ("b", "two".encode("utf-16")[:-1]), ("c", b"three"),
                          ("d", b"\xff\xfe\0\xd8")):  # fmt: skip
        write(tmp_path, PIXELS, f"{name}.png")
        write(tmp_path, caption, f"{name}.txt")
    assert [text for _, text in outcomes(tmp_path)] == ["one 猫", "cut short", "three", "wrong encoding"]


@pytest.mark.parametrize("title", [
    "Birds", "Birds,,", "\ufeffBirds of 2024, all\n", ",\n,", '"Birds, all",', "# note\nBirds", "Images", "Birds,\n" * 8,
])  # fmt: skip
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_lines_above_the_header_are_its_title(title, delimiter, tmp_path):
    rows = "image,caption\n1.png,one bird\n1.png,two\n".replace(",", delimiter)
    (tmp_path / "1.png").write_bytes(PIXELS)
    first = title.count("\n") + 3
    assert outcomes(write(tmp_path, f"{title}\n{rows}")) == [(f"a.csv:{first}", "one bird"), (f"a.csv:{first + 1}", "two")]


@pytest.mark.parametrize("content", ["hello,you\nimage,here\n", "a.png,one\nimage,caption\n", "text\nid,text\n"])
def test_rows_are_not_taken_for_a_title(content):
    assert find_dialect(content.encode()).num_skipped == 0


def test_message_of_a_quote_inside_a_cell_says_how_to_write_it(tmp_path):
    write(tmp_path, 'text,n\n"a \\"red\\" bird",1\nplain,2\n')
    fault, _ = read_at(tmp_path)
    assert fault.message == 'a cell in quotes has a quote inside: write it twice (""), not as \\"'
