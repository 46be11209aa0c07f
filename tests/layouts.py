"""The layouts of data that people have: docs/data.md's table is written from these cases, and each is read in a test."""

import io
import json
import tarfile
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FOLDERS, RECORDS, ARCHIVES, CHATS, TEXTS = (
    "Folders of pictures", "Lists of records and tables", "Archives and downloaded sets", "Conversations", "Text",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """`files` are written, and read as `documents`: the texts of each, "#" for an image, and "(held out)" if it is declared
    so. What is passed over, by kind and reason, is exactly `passed_over` (fields apart)."""

    section: str
    data: str  # first column of the table
    example: str  # second column
    becomes: str  # third column
    files: dict[str, Any]
    documents: list[str]
    passed_over: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


P = picture(0)


def write(root: Path, files: dict[str, Any]) -> None:
    """bytes and text as they are; a list as JSON lines, as rows of a .parquet, or as members (name, content) of a .tar;
    an object as JSON; a `Path` as a link to it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif path.suffix == ".tar":
            path.write_bytes(b"".join(map(tar, content)) if content and isinstance(content[0], list) else tar(content))
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else
                             content.encode() if isinstance(content, str) else json.dumps(content).encode())  # fmt: skip


def tar(members: list[tuple[str, bytes | str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def downloaded(number: int, status: str = "success", **fields: Any) -> dict:
    """A record of img2dataset."""
    return {"url": f"http://127.0.0.1:9/{number}.jpg", "caption": f"caption {number}", "key": f"{number:09d}",
            "status": status, "error_message": None, "width": 4, "height": 4, **fields}  # fmt: skip


def coco(names: dict[int, str], captions: list[tuple[int, str]]) -> dict:
    return {"images": [{"id": id, "file_name": name} for id, name in names.items()],
            "annotations": [{"image_id": id, "caption": caption} for id, caption in captions]}  # fmt: skip


def turns(*texts: Any, keys: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ("user", "assistant")) -> list:
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


ANSWER = "Which bird?|\n|A robin."
LAYOUTS = [
    Layout(FOLDERS, "pictures with captions beside them", "`bird.jpg` and `bird.txt`, `bird.caption` or `bird.jpg.txt`",
           "a pair", {"a.png": P, "a.txt": "one", "b.PNG": P, "b.TXT": "two", "c.png": P, "c.caption": "three",
                      "d.v2.png": P, "d.v2.png.txt": "four", "d.v2.json": {"a": 1}, "e.txt": "alone"},
           ["one|#", "two|#", "three|#", "four|#"],
           {"files: beside another caption of the same picture": 1, "files: without a picture of the same name": 1}),
    Layout(FOLDERS, "pictures with a `.json` beside each", "`bird.jpg` and `bird.json` with a `caption`, without `bird.txt`",
           "a pair; an address in the `.json` is not used", {f"{n}.png": P for n in range(2)} | {
               f"{n}.json": {"caption": f"caption {n}", "url": "http://127.0.0.1:9/a.jpg"} for n in range(2)} | {
               "0.png.supplemental.json": {"title": "0.png"}},
           ["caption 0|#", "caption 1|#"], {"files: .json beside pictures": 1}),
    Layout(FOLDERS, "pictures in folders named after their content", "`red_bird/0001.jpg`", "a pair, caption `red bird`",
           {"red_bird/1.png": P, "nest/2.png": P}, ["nest|#", "red bird|#"]),
    Layout(FOLDERS, "kohya's repeat folders", "`10_my dog/1.png`, with or without `1.caption`",
           "a pair, caption from the file or `my dog`; the number of repeats is not used",
           {"10_my dog/1.png": P, "10_my dog/2.png": P, "10_my dog/2.caption": "two"}, ["my dog|#", "two|#"]),
    Layout(FOLDERS, "pictures only", "`0001.jpg`, or all in one folder `images/`", "an image",
           {"images/1.png": P, "images/2.png": P, "notes.txt": "notes"}, ["#", "#"],
           {"files: without a picture of the same name": 1}),
    Layout(FOLDERS, "`metadata.jsonl` or `.csv` in one or several folders",
           '`{"file_name": "0001.png", "text": "a red bird"}`', "a pair",
           {"a/metadata.jsonl": [{"file_name": "1.png", "text": "one"}], "a/1.png": P, "a/more.png": P,
            "b/metadata.jsonl": [{"file_name": "x/2.png", "text": "two"}], "b/x/2.png": P},
           ["one|#", "two|#"], {"files: named by no record": 1}),
    Layout(FOLDERS, "captions in one table, pictures in one folder (Flickr8k)",
           "`captions.txt` or `.csv` with the columns `image` and `caption`, pictures in `Images/`", "one pair per caption",
           {"captions.txt": "image,caption\n1.png,one\n1.png,two\n", "Images/1.png": P}, ["one|#", "two|#"]),
    Layout(FOLDERS, "tokens of Flickr8k and Flickr30k", "`results.token` or a `.txt` with lines `bird.jpg#0`, tab, caption",
           "one pair per caption",
           {"flickr.token": "1.png#0\tA dog, black .\n1.png#1\tTwo dogs .\n", "results.csv": "image_name| comment_number| "
            "comment\n1.png| 0| A cat .\n", "text.txt": "1.png#0\tA bird .\n", "images/1.png": P},
           ["A dog, black .|#", "Two dogs .|#", "A cat .|#", "A bird .|#"]),
    Layout(FOLDERS, "names of pictures without suffix (Kaggle)",
           "a table with a column `image_id` or any other name, values `0001`, pictures `train/0001.jpg`",
           "a pair, if the first values of a column all name pictures of one folder",
           {"labels.csv": "n,image_id,caption\n1,07,one\n2,ab.c,two\n", "photos/07.png": P, "photos/ab.c.PNG": P,
            "other/9.png": P}, ["one|#", "two|#"], {"files: named by no record": 1}),
    Layout(FOLDERS, "captioned pictures beside logs, tables and other files", "`log.jsonl`, `tags.csv`, `more.zip`, `.heic`",
           "the pictures; the account names the other files",
           {"1.png": P, "1.txt": "one", "log.jsonl": [{"step": 1, "loss": 0.5}], "tags.csv": "tag,count\nred,3\n",
            "notes.jsonl": [{"text": "a note"}], "more.zip": b"PK", "2.heic": b"x", "2.txt": "two", "3": P,
            ".DS_Store": b"x", "empty.csv": "", "_cache/3.png": P, "README.md": "x"},
           ["one|#"], {"files: without records of a known form": 2, "files: with texts beside pictures with captions": 1,
                       "files: .zip": 1, "files: .heic": 1, "files: without a picture of the same name": 1,
                       "files: without a suffix": 1, "files: hidden": 2, "files: empty": 1, "files: README or LICENSE": 1}),
    Layout(FOLDERS, "splits in folders or file names", "`train/`, `training/`; `val/`, `valid/`, `dev/`; `test/`, `eval/`",
           "train is for training, validation (or else test) is held out; the outermost folder decides",
           {f"{split}/{name}/{split}_{name}.png": P for split in ("train", "val", "test") for name in ("train", "bus")},
           ["bus|#", "train|#", "bus|# (held out)", "train|# (held out)"], {"files: of another split": 2}),
    Layout(FOLDERS, "... with `--split train`", "`train/`, `val/`", "only this split",
           {f"{split}/{name}/{split}_{name}.png": P for split in ("train", "val") for name in ("train", "bus")},
           ["bus|#", "train|#"], {"files: of another split": 2}, {"split": "train"}),
    Layout(FOLDERS, "linked folders", "`photos -> /disk/photos`", "as real folders; a link to listed files is not entered",
           {"a/1.png": P, "a/1.txt": "one", "b": Path("a"), "c": Path(".")}, ["one|#"],
           {"files: linked folder, listed already": 2}),
    Layout(FOLDERS, "COCO captions", "`annotations/captions_train2017.json`, pictures in `train2017/` (or `--pictures DIR`)",
           "one pair per caption",
           {"annotations/captions_train2017.json": coco({1: "train2017/1.png", 2: "train2017/2.png", 3: "train2017/no.png"},
                                                        [(1, "one"), (1, "two"), (3, "three")]),
            "annotations/instances_train2017.json": {"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}]},
            "train2017/1.png": P, "train2017/2.png": P}, ["one|#", "two|#", "missing image"],
           {"files: without records of a known form (it has COCO annotations without captions)": 1,
            "files: named by no record": 1, "records: missing image": 1}),
    Layout(FOLDERS, "pictures with files of labels beside them (YOLO)", "`bird.txt` with the line `0 0.5 0.5 0.1 0.1`",
           "a fault: numbers, or the JSON of a labelling tool, are no caption",
           {"a.png": P, "a.txt": "0 0.5 0.5 0.1 0.1\n1 0.2 0.2 1e-1 0.1\n", "b.png": P, "b.txt": "7",
            "c.png": P, "c.txt": '[{"text": ["a bird"]}]', "d.png": P, "d.txt": "[two] birds"},
           ["bad caption", "7|#", "bad caption", "[two] birds|#"], {"records: bad caption": 2}),
    Layout(FOLDERS, "a table that cannot be read, beside pictures", "`captions.csv` with wrong quotes in each row",
           "the pictures; the account gives the first fault of the table",
           {"1.png": P, "a.csv": '"image" , "caption"\n"1.png" , "one"\n'}, ["#"],
           {'files: without records of a known form (a cell in quotes has a quote inside: write it twice (""), '
            'not as \\")': 1}),
    Layout(RECORDS, "JSON lines, lists, CSV, Parquet of pairs", '`{"image": "bird.jpg", "caption": "a red bird"}`',
           "a pair. Other names of columns: `path`, `file_name`, `img`, `photo`, ...; `text`, `prompt`, `alt`, ...",
           {"a.jsonl": [{"image_file_name": "1.png", "text": "one"}, {"filepath": "1.png", "alt_text": "two"},
                        {"view": "1.png", "TEXT": "three"}, {"images": ["1.png"], "caption": "four"},
                        {"imagePath": "1.png", "altText": "five"}, {"Image Name": "1.png", "Image Caption": "six"},
                        {"image": "1.png", "caption_en": "seven"}], "1.png": P},
           ["one|#", "two|#", "three|#", "four|#", "five|#", "six|#", "seven|#"]),
    Layout(RECORDS, "marks of images in a caption", '`{"text": "a bird <image> and a nest <image>", "images": ["1.png", '
           '"2.png"]}`', "interleaved: each mark is the place of the next image; without images it is text",
           {"a.jsonl": [{"text": "one <image> two <image>", "images": ["1.png", "1.png"]},
                        {"text": "<image>\none", "image": "1.png"}, {"text": "one <image 1>", "image": "1.png"},
                        {"text": "one <image> two <image>", "image": "1.png"}, {"text": "an <image> element"},
                        {"source": "1.png", "instruction": "Turn <img><|image_1|></img> left.", "target": "1.png"},
                        {"source": "1.png", "instruction": "<image> like <image>", "target": "1.png"}], "1.png": P},
           ["one |#| two |#", "#|one", "one |#", "lists of different lengths", "an <image> element", "Turn |#| left.|#",
            "lists of different lengths"], {"records: lists of different lengths": 2}),
    Layout(RECORDS, "tables with a title above the header, or delimiters at the end of rows", "`Birds,,`, a blank line, "
           "`image,caption`", "the records behind the header",
           {"a.csv": "Birds,,\n,,\nimage,caption,note\n1.png,one,x\n",
            "b.csv": "Birds; of 2024\n\nimage;caption\n1.png;two;;\n1.png;three;\n\x1a", "1.png": P},
           ["one|#", "two|#", "three|#"]),
    Layout(RECORDS, "open_clip's tables", "columns `filepath` and `title`, a tab between them, in a `.csv` or `.tsv`",
           "a pair", {"a.csv": "filepath\ttitle\nx/1.png\tone, a bird\nx/1.png\ttwo\n", "x/1.png": P},
           ["one, a bird|#", "two|#"]),
    Layout(RECORDS, "JSON of any shape", "a list; objects over one or several lines; `{\"data\": [{...}, ...]}`; "
           "`{\"bird.jpg\": \"a red bird\"}`; pandas' `to_json` with any `orient` but `values`; Karpathy's splits",
           "the records, in each file by its shape",
           {"a.json": '[{"image": "1.png", "caption": "one"}]',
            "b.json": json.dumps({"image": "1.png", "caption": "two"}, indent=1),
            "c.json": {"image": {"0": "1.png"}, "caption": {"0": "three"}}, "d.json": {"1.png": ["four", "five"]},
            "e.json": {"images": [{"filename": "1.png", "split": "train", "sentences": [{"raw": "six"}]}]}, "1.png": P},
           ["one|#", "two|#", "three|#", "four|#", "five|#", "six|#"]),
    Layout(RECORDS, "UTF-16 with a byte order mark", "Excel's Unicode text, files of PowerShell", "as UTF-8",
           {"a.csv": "text\tn\none 猫\t1\n".encode("utf-16")}, ["one 猫"]),
    Layout(RECORDS, "several pictures or captions in one record",
           '`{"file_names": ["1.png", "2.png"], "text": "two views"}`, `{"image": "1.png", "captions": ["one", "two"]}`',
           "the text and all pictures; one pair per caption",
           {"a.jsonl": [{"file_names": ["1.png", "1.png"], "text": "two views"}, {"image": "1.png", "captions": ["b", "c"]}],
            "1.png": P}, ["two views|#|#", "b|#", "c|#"]),
    Layout(RECORDS, "records of different forms", "texts, pictures and pairs in one file", "each in its own form",
           {"a.jsonl": [*[{"text": "only text"}] * 120, {"image": "1.png", "text": "one"}, {"image": "1.png"}], "1.png": P},
           [*["only text"] * 120, "one|#", "#"]),
    Layout(RECORDS, "Parquet with image bytes", "columns `image` (bytes, or `{bytes, path}`) and `caption`", "a pair",
           {"a.parquet": [{"image": P, "caption": "one"}, {"image": None, "caption": "two"}]},
           ["one|#", "missing image"], {"records: missing image": 1}),
    Layout(RECORDS, "a Hugging Face data set", "a folder from `save_to_disk`, or of `.parquet`, or its id",
           "by its columns; a class label becomes its name",
           {"data/train-00000-of-00001.parquet": [{"text": "one"}], "data/test-00000-of-00001.parquet": [{"text": "two"}]},
           ["one", "two (held out)"]),
    Layout(RECORDS, "splits inside file names", "`flickr_train_29k.jsonl`, `flickr_val_1k.jsonl`, `flickr_test_1k.jsonl`",
           "by their split, as above",
           {f"flickr_{split}_1k.jsonl": [{"text": split}] for split in ("train", "val", "test")},
           ["train", "val (held out)"], {"files: of another split": 1}),
    Layout(RECORDS, "a column `split`, `set`, `partition` or `subset`", '`{"text": "...", "split": "val"}`',
           "by their split, as above; Karpathy's `restval` is for training, and so are other values",
           {"a.jsonl": [{"text": value, "Partition": value}
                        for value in ("train", "restval", "other", "val", "test-dev", "testA", "train2014")]},
           ["train", "restval", "other", "val (held out)", "train2014"], {"records: of another split": 2}),
    Layout(RECORDS, "OBELICS", '`{"texts": ["The bird", null], "images": [null, "bird.jpg"]}`', "interleaved",
           {"a.jsonl": [{"texts": ["The bird", None], "images": [None, "1.png"]}], "1.png": P}, ["The bird|#"]),
    Layout(RECORDS, "MMC4", '`{"text_list": [...], "image_info": [{"image_name": "bird.jpg", "matched_text_index": 1}]}`',
           "interleaved, each image before its sentence",
           {"a.jsonl": [{"text_list": ["One.", "Two."], "image_info": [{"image_name": "1.png", "matched_text_index": 1}]}],
            "1.png": P}, ["One. |#|Two."]),
    Layout(RECORDS, "edits", '`{"source": "bird.jpg", "instruction": "make it blue", "target": "blue.jpg"}`, or '
           "`input_image`, `output_image`, ...", "source without noise and loss, instruction without loss, target with loss",
           {"a.jsonl": [{"source": "1.png", "instruction": "turn it", "target": "1.png"}], "1.png": P}, ["#|turn it|#"]),
    Layout(ARCHIVES, "webdataset `.tar`", "members `000.jpg` and `000.txt`, `000.caption` or `000.json`",
           "by the fields of the `.json`; otherwise a pair. Dots in names are allowed",
           {"a.tar": [("0.png", P), ("0.caption", "one"), ("0.cls", "7"), ("22.05.png", P), ("22.05.txt", "two"),
                      ("x/1.png", P), ("x/1.jpg", P), ("x/1.txt", "three"), ("x/1.npy", b"x"), ("._0.png", b"x"),
                      ("2.png", P), ("3.txt", "alone"), ("4.png", b""), ("4.txt", "empty"), ("0.png", P)]},
           ["one|#", "two|#", "three|#", "empty caption", "missing image", "unreadable image", "repeated key"],
           {"members: beside another one of the same kind and key": 2, "members: .npy": 1, "members: hidden": 1,
            "members: with a key that was read: members of one key must be neighbours": 1,
            "records: empty caption": 1, "records: missing image": 1,
            "records: unreadable image": 1, "records: repeated key": 1}),
    Layout(ARCHIVES, "a folder as an archive", "members `images/a.jpg` and `metadata.jsonl`",
           "images alone; the account names the list: unpack the archive",
           {"a.tar": [("images/a.png", P), ("metadata.jsonl", '{"file_name": "images/a.png", "text": "one"}\n')]}, ["#"],
           {"members: list of records in an archive, which is not read: unpack the archive": 1}),
    Layout(ARCHIVES, "a word before each suffix", "members `000.input.jpg` and `000.outputs.txt`", "a pair",
           {"a.tar": [("0.input.png", P), ("0.outputs.txt", "one"), ("1.input.png", P), ("1.outputs.txt", "two")]},
           ["one|#", "two|#"]),
    Layout(ARCHIVES, "folders in an archive that are named after splits", "members `train/dog/0.jpg`, `val/dog/1.jpg`",
           "by their split, as above", {"a.tar": [
               (f"x/{split}/dog/{n}.{suffix}", content) for split, n in (("val", 1), ("train", 0), ("val", 2), ("test", 3))
               for suffix, content in (("png", P), ("txt", f"{split} {n}"))]},
           ["val 1|# (held out)", "train 0|#", "val 2|# (held out)"], {"records: of another split": 1}),
    Layout(ARCHIVES, "joined archives", "`cat 0.tar 1.tar > all.tar`", "the records of all",
           {"a.tar": [[("0.png", P), ("0.txt", "one")], [("1.png", P), ("1.txt", "two")]]}, ["one|#", "two|#"]),
    Layout(ARCHIVES, "img2dataset, format `files`", "`00000/000000000.jpg`, `.txt` and `.json`, `00000.parquet`",
           "a pair, from the local pictures",
           {**{f"00000/{n:09d}{suffix}": content for n in range(2) for suffix, content in (
               (".png", P), (".txt", f"caption {n}"), (".json", downloaded(n)))},
            "00000.parquet": [downloaded(0), downloaded(1), downloaded(2, "failed_to_download")],
            "00000_stats.json": {"count": 3, "successes": 2}},
           ["caption 0|#", "caption 1|#"],
           {"files: beside another caption of the same picture": 2,
            "files: with addresses of pictures, which are read from this folder": 1,
            "files: without records of a known form": 1}),
    Layout(ARCHIVES, "img2dataset, format `webdataset`", "`00000.tar`, `00000.parquet`, `00000_stats.json`",
           "a pair, from the archive",
           {"00000.tar": [("000000000.png", P), ("000000000.txt", "caption 0"),
                          ("000000000.json", json.dumps(downloaded(0)))],
            "00000.parquet": [downloaded(0)], "00000_stats.json": {"count": 1}},
           ["caption 0|#"], {"files: .parquet beside archives": 1, "files: .json beside archives": 1}),
    Layout(ARCHIVES, "img2dataset, format `parquet`", "`00000.parquet` with the bytes in `jpg`",
           "a pair; what could not be downloaded is counted",
           {"00000.parquet": [downloaded(0, jpg=P), downloaded(1, "failed_to_download", jpg=None)],
            "00000_stats.json": {"count": 2}},
           ["caption 0|#"], {"records: not downloaded by img2dataset": 1, "files: .json beside Parquet tables": 1}),
    Layout(CHATS, "LLaVA", '`{"image": "bird.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhich bird?"}, '
           '{"from": "gpt", ...}]}`', "the turns of `gpt` are in the loss",
           {"a.json": [{"image": "1.png", "conversations": turns(
               "<image>\nWhich bird?", "A robin.", keys=("from", "value"), roles=("human", "gpt"))}], "1.png": P},
           [f"#|{ANSWER}"]),
    Layout(CHATS, "ShareGPT", '`{"conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}`, empty image fields',
           "the turns of `gpt` are in the loss",
           {"a.jsonl": [{"image": image,
                         "conversations": turns("Which bird?", "A robin.", keys=keys, roles=("human", role))}
                        for image, keys, role in (("", ("from", "value"), "gpt"), (None, ("role", "content"), "chatgpt"),
                                                  ([], ("from", "value"), "bot"))]}, [ANSWER] * 3),
    Layout(CHATS, "OpenAI messages", '`{"messages": [{"role": "user", "content": [{"type": "image_url", ...}, {"type": '
           '"text", ...}]}, ...]}`', "the assistant's text and images are in the loss",
           {"a.jsonl": [{"messages": turns([{"type": "image_url", "image_url": {"url": "1.png"}},
                                            {"type": "text", "text": "Which bird?"}], "A robin.")}], "1.png": P},
           [f"#|{ANSWER}"]),
    Layout(CHATS, "LLaMA-Factory, ms-swift, TRL", '`{"messages": [{"role": "user", "content": "<image>Which bird?"}, ...], '
           '"images": ["bird.jpg"]}`', "each mark, or image part without content, is the place of the next of `images`",
           {"a.jsonl": [{"messages": turns("<image>Which bird?", "A robin."), "images": ["1.png"]},
                        {"messages": turns("<image><image>Which bird?", "A robin."), "images": ["1.png", "1.png"]},
                        {"messages": turns("Which bird?", "A robin."), "images": ["1.png"]},
                        {"messages": turns("Which bird?", "A robin."), "images": []},
                        {"messages": turns([{"type": "image"}, {"type": "text", "text": "Which bird?"}], "A robin."),
                         "images": ["1.png"]},
                        {"messages": turns("<image>Which bird?", "A robin."), "images": []}], "1.png": P},
           [f"#|{ANSWER}", f"#|#|{ANSWER}", f"#|{ANSWER}", ANSWER, f"#|{ANSWER}", "lists of different lengths"],
           {"records: lists of different lengths": 1}),
    Layout(CHATS, "a question and its answer (Alpaca, Dolly, old ms-swift, VQA, TRL)", "columns `instruction`, `input` (or "
           "`context`) and `output` (or `response`); `query` and `response`; `question` and `answer`; `prompt` and "
           "`completion`; with `history`, `system` and images",
           "the answer is in the loss",
           {"a.jsonl": [{"instruction": "Which", "input": "bird?", "output": "A robin."},
                        {"instruction": "<image>Which bird?", "input": "", "output": "A robin.", "images": ["1.png"]},
                        {"query": "Which bird?", "response": "A robin.", "images": ["1.png"]},
                        {"query": "And now?", "response": "Two.", "history": [["Which bird?", "A robin."]],
                         "system": "Look."},
                        {"question": "Which bird?", "answer": "A robin.", "image": "1.png"},
                        {"prompt": "Which bird?", "completion": "A robin."}, {"query": "Which bird?", "response": ""},
                        {"query": None, "response": "A robin."},
                        {"prompt": "a robin", "image": "1.png"}, {"question": "Which?", "answer": "It.", "text": "whole"}],
            "1.png": P},
           ["Which\nbird?|\n|A robin.", f"#|{ANSWER}", f"#|{ANSWER}", "Look.|\n|Which bird?|\n|A robin.|\n|And now?|\n|Two.",
            f"#|{ANSWER}", ANSWER, "empty answer", "empty question", "a robin|#", "whole"],
           {"records: empty answer": 1, "records: empty question": 1}),
    Layout(CHATS, "lists of turns with other names, or written as JSON", "`conversation`, `contents` (Gemini), `items`, "
           '`chatml`; `"[{\\"role\\": \\"user\\", ...}]"`', "as `conversations` with `from`, as `messages` with `role`",
           {"a.jsonl": [{"conversation": turns("Which bird?", "A robin.")},
                        {"items": turns("Which bird?", "A robin.", keys=("from", "value"), roles=("human", "gpt"))},
                        {"contents": turns([{"text": "Which bird?"}], [{"text": "A robin."}], keys=("role", "parts"))},
                        {"contents": turns([{"inline_data": {"data": b64encode(P).decode()}}, {"text": "Which bird?"}],
                                           [{"text": "A robin."}], keys=("role", "parts"))},
                        {"conversations": json.dumps(turns("<image>Which bird?", "A robin.")), "image": "1.png"},
                        {"messages": json.dumps(turns("Which bird?", "A robin."))}], "1.png": P},
           [ANSWER, ANSWER, ANSWER, f"#|{ANSWER}", f"#|{ANSWER}", ANSWER]),
    Layout(CHATS, "other marks", "`<Image>`, `<ImageHere>`, `<image_placeholder>`; with a number `<image 1>`, `<image_1>`",
           "the next of `images`, or the one with this number",
           {"a.jsonl": [{"messages": turns(f"{mark}\nWhich bird?", "A robin."), "images": ["1.png"]}
                        for mark in ("<Image>", "<ImageHere>", "<image 1>", "<image_1>", "<|image_1|>", "<image_0>")],
            "1.png": P}, [f"#|{ANSWER}"] * 6),
    Layout(CHATS, "images in the messages", "a mark beside an image part, a message that is a picture in base64, "
           '`{"type": "image", "source": {"data": ...}}`', "an image, at the mark if there is one",
           {"a.jsonl": [{"messages": turns(content, "A robin.")} for content in (
               [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "<image>\nWhich bird?"}],
               [{"type": "image", "source": {"type": "base64", "data": b64encode(P).decode()}},
                {"type": "text", "text": "Which bird?"}])] + [
                {"messages": turns(f"data:image/png;base64,{b64encode(P).decode()}", "A robin.")}], "1.png": P},
           [f"#|{ANSWER}", f"#|{ANSWER}", "#|\n|A robin."]),
    Layout(CHATS, "videos and audio", '`<video>` with `{"videos": ["a.mp4"]}`, parts `{"type": "input_audio", ...}`',
           "a fault: unsupported media",
           {"a.jsonl": [{"messages": turns("<video>What?", "A robin."), "videos": ["a.mp4"]},
                        {"messages": turns("Which bird?", "A robin."), "videos": []},
                        {"messages": turns([{"type": "input_audio", "input_audio": {}}], "A robin.")}]},
           ["unsupported media", ANSWER, "unsupported media"], {"records: unsupported media": 2}),
    Layout(CHATS, "Qwen", "`Picture 1: <img>bird.jpg</img>` in the text, or parts `{\"image\": ...}`, `{\"text\": ...}`",
           "images are conditions, the assistant's text is in the loss",
           {"a.jsonl": [{"messages": turns([{"image": "1.png"}, {"text": "Which bird?"}], "A robin.")},
                        {"conversations": turns("Picture 1: <img>1.png</img>\nWhich bird?", "A robin.",
                                                keys=("from", "value"))},
                        {"messages": turns("<|vision_start|><|image_pad|><|vision_end|>Which bird?", "A robin."),
                         "images": ["1.png"]}], "1.png": P}, [f"#|{ANSWER}"] * 3),
    Layout(TEXTS, "text files", "`.txt`, `.md`, `.rst`",
           "text; a long file is split after blank lines, no character is lost",
           {"a.txt": "One.\n", "b.md": "# Two", "model.pt": b"x"}, ["One.\n", "# Two"], {"files: .pt": 1}),
    Layout(TEXTS, "JSON lines of text", '`{"text": "..."}`', "text",
           {"a.jsonl": [{"text": "One.", "url": "https://example.org/page", "lang": None}]}, ["One."]),
]  # fmt: skip


def table() -> str:
    """docs/data.md's table."""
    lines = ["| data | example | becomes |", "|---|---|---|"]
    for section in (FOLDERS, RECORDS, ARCHIVES, CHATS, TEXTS):
        lines.append(f"| **{section}** | | |")
        lines += [f"| {row.data} | {row.example} | {row.becomes} |" for row in LAYOUTS if row.section == section]
    return "\n".join(lines) + "\n"
