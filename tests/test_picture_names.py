"""Pictures are found by the names that people's tables have: without suffix, with a caption's number, from Windows."""

import json
import unicodedata

import pytest

from tests.reading import close_account, other_disks, put, read_at, write_lines
from tests.sources import picture, png
from transfusion.data.raw import Fault
from transfusion.data.reading.readers import open_reader

PICTURE = png(picture(0)[1])


@pytest.mark.parametrize("name", [
    "a.b", "a.b.png", "a.b.png#0", "a.b.png#12", "07", 7, "x\\08", "x\\08.PNG", "x\\08.PNG#1", "./x/08",
])  # fmt: skip
@pytest.mark.parametrize("column", ["image", "image_id"])
@pytest.mark.parametrize("disk", ["", "memory://", "bucket://"])
def test_picture_is_found_by_its_name(name, column, disk, tmp_path):
    root = disk + "data" if disk else str(tmp_path)
    with other_disks():
        for path in ("photos/a.b.png", "photos/7.jpg", "photos/x/08.PNG", "photos/07.PNG", "other/c.png"):
            put(f"{root}/{path}", PICTURE)
        put(f"{root}/a.json", json.dumps([{column: name, "caption": "one"}, {column: name, "caption": "two"}]))
        documents = read_at(root)
        assert [len(document.segments) for document in documents] == [2, 2]
        account = close_account(open_reader(root))
        assert account.tallies["files"].read["picture"] == 1
        assert not account.tallies["fields"].passed_over  # the column is the image


@pytest.mark.parametrize(("records", "is_found"), [
    ([{"key": "1", "text": "a"}, {"key": "2", "text": "b"}], True), ([{"key": 1, "text": "a"}] * 2, True),
    ([{"key": "1", "text": "a"}, {"key": "9", "text": "b"}], False),
    ([{"key": "1", "text": "a"}, {"key": "", "text": "b"}], False), ([{"key": "1", "text": "a"}, {"text": "b"}], False),
    ([{"key": "1", "text": "a"}, {"key": "other", "text": "b"}], False),
    ([{"id": "1", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}], False),
])  # fmt: skip
def test_column_of_names_is_one_whose_values_all_name_pictures(records, is_found, tmp_path):
    for name in ("photos/1.png", "photos/2.png", "drawings/other.png"):
        put(str(tmp_path / name), PICTURE)
    write_lines(tmp_path / "a.jsonl", *records)
    reader = open_reader(str(tmp_path))
    assert reader.options.columns == ({"image": "key"} if is_found else {})
    assert (reader.form == "pair") == is_found


@pytest.mark.parametrize(("columns", "text"), [({}, "text"), ({}, "Text"), ({"text": "Word"}, "Word")])
def test_texts_that_are_names_of_pictures_stay_texts(columns, text, tmp_path):
    for name in ("cat.png", "dog.png"):
        put(str(tmp_path / name), PICTURE)
    write_lines(tmp_path / "a.jsonl", *({"key": n, text: word} for n, word in enumerate(("cat", "dog"))))
    documents = read_at(tmp_path, columns=columns)
    assert [part.text for document in documents for part in document.segments] == ["cat", "dog"]


def test_name_without_suffix_of_a_missing_picture_is_a_fault(tmp_path):
    put(str(tmp_path / "1.png"), PICTURE)
    write_lines(tmp_path / "a.jsonl", *({"image": name, "caption": "x"} for name in ("1", "2", "2.png#0", "1.png#0")))
    assert [isinstance(item, Fault) for item in read_at(tmp_path)] == [False, True, True, False]


@pytest.mark.parametrize(("line", "is_table"), [
    ("1.png#0\tA dog .", True), ("1.png,a dog", True), ("image,caption", True), ("1.png\t7", False),
    ("A dog, and a caption", False), ("1.png", False),
])  # fmt: skip
def test_text_with_names_of_pictures_is_a_table(line, is_table, tmp_path):
    put(str(tmp_path / "images/1.png"), PICTURE)
    put(str(tmp_path / "notes.txt"), f"{line}\n1.png,another dog\n" if line == "image,caption" else f"{line}\n")
    assert open_reader(str(tmp_path)).form == ("pair" if is_table else "image")


@pytest.mark.parametrize(("written", "listed"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("folder", ["", "café/"])
def test_accents_of_names_may_have_another_form_of_unicode(written, listed, folder, tmp_path):
    """macOS lists names with accents apart from their letters."""
    put(str(tmp_path / unicodedata.normalize(listed, folder + "é.png")), PICTURE)
    write_lines(tmp_path / "a.jsonl", {"image": unicodedata.normalize(written, folder + "é.png"), "caption": "one"})
    assert [len(document.segments) for document in read_at(tmp_path)] == [2]
    assert close_account(open_reader(str(tmp_path))).tallies["files"].read["picture"] == 1
