"""JSON files: each is read by its own beginning, and every way of writing the same records gives the same documents."""

import json
import tempfile
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layouts import coco, write
from tests.profile import examples
from tests.reading import close_account, read_at, texts
from tests.sources import picture, png
from transfusion.data.raw import Fault
from transfusion.data.reading import json_files
from transfusion.data.reading.json_objects import unwrap
from transfusion.data.reading.readers import open_reader

PIXELS = png(picture(0)[1])
words = st.text(st.sampled_from('ab é猫"\\{}[],:\n\u2028'), max_size=8)


def dump(records: list[dict], **options) -> str:
    return json.dumps(records, ensure_ascii=False, **options)


WAYS = {
    "lines": lambda records: "".join(dump(record) + "\n" for record in records),
    "a list": dump,
    "a list over lines": lambda records: dump(records, indent=2),
    "joined lists": lambda records: dump(records[:1]) + "\n" + dump(records[1:]),
    "objects over lines": lambda records: "\n".join(dump(record, indent=1) for record in records),
    "objects in one line": lambda records: "".join(map(dump, records)),
    "columns": lambda records: dump({name: [record[name] for record in records] for name in records[0]}),
    "an envelope": lambda records: dump({"version": "1", "data": records}),
    "an envelope over lines": lambda records: dump({"data": records, "info": {"year": 2017}}, indent=2),
    "by split": lambda records: dump({"training": records}),
    **{f"pandas {orient}": (lambda records, orient=orient: pandas.DataFrame(records).to_json(orient=orient))
       for orient in ("columns", "index", "records", "split", "table")},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@examples(100, 12)
@given(st.lists(words, min_size=2, max_size=5), st.booleans(), st.sampled_from((1, 2, 1000)), st.sampled_from((7, 2**20)))
def test_all_ways_of_writing_records_give_the_same_documents(way, contents, bom, max_rows, read_size):
    records = [{"text": f"{number}{content}", "n": number} for number, content in enumerate(contents)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "READ_SIZE", read_size)
        path = Path(folder) / "a.json"
        path.write_text("\ufeff" * bom + WAYS[way](records), encoding="utf-8")
        assert texts(read_at(path, max_rows)) == [record["text"] for record in records]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("way", ["lines", "a list", "a list over lines", "objects over lines"])
def test_suffix_of_lines_does_not_decide(name, way, tmp_path):
    (tmp_path / name).write_text(WAYS[way]([{"text": "one"}, {"text": "two"}]))
    assert texts(read_at(tmp_path)) == ["one", "two"]


def test_bad_first_line_of_a_jsonl_costs_one_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\n{"text": "two"}\n')
    fault, document = read_at(tmp_path)
    assert (fault.kind, texts([document])) == ("bad JSON", ["two"])


@pytest.mark.parametrize("max_rows", [1, 1000])
def test_files_of_one_folder_may_be_written_in_different_ways(tmp_path, max_rows):
    for number, write_records in enumerate(WAYS.values()):
        (tmp_path / f"{number:02d}.json").write_text(write_records([
            {"text": f"{number} one", "n": 1}, {"text": f"{number} two", "n": 2}]))  # fmt: skip
    expected = [f"{number} {word}" for number in range(len(WAYS)) for word in ("one", "two")]
    assert texts(read_at(tmp_path, max_rows)) == expected


CONVERSATION = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]}
SENTENCES = {"filename": "1.png", "split": "val", "sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "two"}]}


@pytest.mark.parametrize(("value", "records"), [
    ({"text": "one"}, None), (CONVERSATION, None), ({"texts": ["a", None], "images": [None, "1.png"]}, None),
    ({"segments": [{"text": "one"}]}, None), ({"model": {"text": "x"}, "data": {"size": 3}}, None), ({}, None),
    ({"1.png": "one", "2.png": ["two", "three"]},
     [{"image": "1.png", "caption": "one"}, {"image": "2.png", "caption": ["two", "three"]}]),
    ({"1.png": {"caption": "one"}, "2.png": {"text": "two"}},
     [{"key": "1.png", "caption": "one"}, {"key": "2.png", "text": "two"}]),
    ({"7": {"text": "one"}, "8": {"text": "two"}}, [{"key": "7", "text": "one"}, {"key": "8", "text": "two"}]),
    ({"image": ["1.png", "2.png"], "caption": ["one", "two"]},
     [{"image": "1.png", "caption": "one"}, {"image": "2.png", "caption": "two"}]),
    ({"columns": ["text"], "index": [0, 1], "data": [["one"], ["two", 3]]}, [{"text": "one"}, ["two", 3]]),
    ({"train": [{"text": "one"}], "val": [{"text": "two"}]},
     [{"text": "one", "split": "train"}, {"text": "two", "split": "val"}]),
    ({"images": [SENTENCES], "dataset": "flickr8k"}, [{"image": "1.png", "captions": ["one", "two"], "split": "val"}]),
    ({"images": [{**SENTENCES, "filepath": "val2014"}], "dataset": "coco"},
     [{"image": "val2014/1.png", "captions": ["one", "two"], "split": "val"}]),
    ({"a": [{"text": "one"}], "b": [{"text": "two"}]}, None),
])  # fmt: skip
def test_one_object_may_be_several_records(value, records):
    assert unwrap(value) == ([value] if records is None else records)


@pytest.mark.parametrize("way", ["lines", "a list", "objects over lines", "an envelope"])
def test_key_that_stands_twice_is_a_fault(way, tmp_path):
    """Python keeps the last value: the first caption would be lost without a word."""
    path = tmp_path / "a.json"
    path.write_text(WAYS[way]([{"text": "one", "more": {"n": 1}}, {"text": "two"}]).replace('"n"', '"text": "x", "text"'))
    (tmp_path / "b.json").write_text('[{"text": "three"}]')
    fault, *documents = read_at(tmp_path)
    assert "the key 'text' occurs twice" in str(fault)
    if way in ("lines", "a list"):
        assert (fault.kind, texts(documents)) == ("bad JSON", ["two", "three"])
    else:
        assert (fault.kind, texts(documents)) == ("cut short", ["three"])


@pytest.mark.parametrize(("content", "expected"), [
    ('{\n"text": "one"}\n{\n"text": "two', ["one", "cut short"]), ('{\n"text": "one"}, {"text": "t"}', ["one", "cut short"]),
    ('{\n"text": "one"}\n5', ["one", "bad JSON"]), ('[{"text": "one"}]\n x', ["one", "cut short"]),
    ('[{"text": "one"}] [{"text": "two"', ["one", "cut short"]), ('[{"text": "one"}]\n\n', ["one"]),
])  # fmt: skip
@pytest.mark.parametrize("max_rows", [1, 1000])
def test_what_is_behind_a_value_is_read_or_a_fault(content, expected, max_rows, tmp_path):
    (tmp_path / "a.json").write_text(content)
    records = read_at(tmp_path, max_rows)
    assert [item.kind if isinstance(item, Fault) else text
            for item, text in zip(records, texts(records), strict=True)] == expected  # fmt: skip


@pytest.mark.parametrize("others", ["a.json", "d.json"])
def test_captions_of_coco_may_be_beside_other_json(others, tmp_path):
    content = coco({1: "1.png"}, [(1, "one"), (1, "two")])
    write(tmp_path, {"b.json": content, "c.json": json.dumps(content, indent=1), others: '[{"text": "three"}]',
                     "instances_0.json": "{", "boxes.json": {"images": [], "annotations": [{"bbox": []}]},
                     "1.png": PIXELS})  # fmt: skip
    reader = open_reader(str(tmp_path))
    assert sorted(texts(read_at(tmp_path))) == ["one", "one", "three", "two", "two"]
    reason = "without records of a known form (it has COCO annotations without captions)"
    assert close_account(reader).tallies["files"].examples == {reason: ["boxes.json", "instances_0.json"]}
    for name in ("boxes.json", "instances_0.json"):
        with pytest.raises(ValueError, match=f"the first fault: {name}:1: it has COCO annotations without captions"):
            open_reader(str(tmp_path / name))


def test_settings_do_not_hide_captioned_pictures(tmp_path):
    settings = {"model": {"size": 3}, "data": {"path": "1.png"}}
    write(tmp_path, {"1.png": PIXELS, "1.txt": "one", "config.json": json.dumps(settings, indent=2)})
    reader = open_reader(str(tmp_path))
    assert reader.form == "pair"
    assert close_account(reader).tallies["files"].examples == {"with images beside pictures with captions": ["config.json"]}
