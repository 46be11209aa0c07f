"""Built-in sources with real images: emoji and photographs."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from tests.reading import read_at
from tests.test_cli import TINY, command, fails
from transfusion.config import BUILT_IN
from transfusion.data.built_in import emoji
from transfusion.data.built_in.emoji import Emoji, find_font, render_all
from transfusion.data.built_in.photographs import Photographs
from transfusion.data.reading.built_in import open_built_in
from transfusion.data.reading.readers import open_reader
from transfusion.data.store import open_prepared


def has_font() -> bool:
    try:
        return find_font().exists()
    except FileNotFoundError:
        return False


needs_font = pytest.mark.skipif(not has_font(), reason="needs the package fonts-noto-color-emoji")


@pytest.fixture
def without_font(monkeypatch):
    monkeypatch.setattr(emoji, "FONT", "not-installed.ttf")


# emoji


@needs_font
def test_emoji_are_coloured_squares_on_white_with_their_unicode_names():
    images = dict(render_all(find_font()))
    assert len(images) > 1_000
    for name, pixels in images.items():
        assert name == unicodedata.name(unicodedata.lookup(name)).lower()
        assert (pixels.shape, pixels.dtype) == ((128, 128, 3), np.uint8)
    circle = images["large red circle"].astype(int)
    red, green, blue = circle[64, 64]
    assert red > 150 > 100 > max(green, blue)
    assert (circle[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # its corners
    assert "digit one" not in images
    assert "latin small letter a" not in images


@needs_font
def test_emoji_splits_are_disjoint_and_complete():
    train, heldout = (Emoji(split) for split in ("train", "heldout"))
    train_names, heldout_names = ([source[n].pair[0] for n in range(len(source))] for source in (train, heldout))
    names = train_names + heldout_names
    assert sorted(names) == sorted(name for name, _ in render_all(find_font()))
    assert len(set(names)) == len(names)
    assert 0.03 < len(heldout_names) / len(names) < 0.07
    assert train[7].pairs
    assert len(read_at("emoji")) == len(names)


@needs_font
def test_emoji_rendering_is_deterministic():
    again = render_all.__wrapped__(find_font())
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(render_all(find_font()), again, strict=True))


@needs_font
def test_changed_font_is_detected(tmp_path, monkeypatch, capsys):
    before = open_reader("emoji").fingerprint()
    assert open_reader("emoji").fingerprint() == before
    words = ("data", "prepare", "emoji", "--sizes", "16x16", "--out", tmp_path / "out")
    command(*words)
    assert open_prepared(tmp_path / "out").metadata["sources"]["emoji"]["documents"]["heldout"] == len(Emoji("heldout"))
    other = tmp_path / "other.ttf"
    shutil.copy(find_font(), other)
    with other.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(emoji, "FONT", str(other))
    assert open_reader("emoji").fingerprint() != before
    assert "emoji: files is" in fails(capsys, 1, *words)


@needs_font
@pytest.mark.slow
def test_run_can_train_on_emoji_directly(tmp_path):
    codec = ("--data.codec-block", 16, "--data.codec-components", 8, "--data.fit-documents", 40)
    command("train", "small", "--data.sources", "emoji", "--out", tmp_path / "run", *TINY, *codec)
    assert PILImage.open(tmp_path / "run" / "samples" / "step-000004.png").width > 128


@pytest.mark.parametrize("words", [
    ("data", "validate", "emoji"), ("data", "prepare", "emoji", "--out", "OUT"),
    ("train", "small", "--data.sources", "emoji"),
])  # fmt: skip
def test_missing_font_error_names_the_package(tmp_path, monkeypatch, capsys, without_font, words):
    monkeypatch.chdir(tmp_path)
    output = fails(capsys, 1, *words)
    assert "apt install fonts-noto-color-emoji" in output.splitlines()[-1]
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("content", [b"", b"no font", b"\0\1\0\0" + bytes(300)])
def test_damaged_font_counts_as_missing(tmp_path, monkeypatch, content):
    (tmp_path / "damaged.ttf").write_bytes(content)
    monkeypatch.setattr(emoji, "FONT", str(tmp_path / "damaged.ttf"))
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        Emoji()


# photographs


def test_each_photograph_is_in_one_split_with_its_caption():
    (train,), (heldout,) = ([source[n] for n in range(len(source))] for source in map(Photographs, ("train", "heldout")))
    captions = [document.segments[0].text for document in (train, heldout)]
    assert captions == ["a chinese temple above a lake", "an orange flower"]
    temple, flower = (document.segments[1].pixels for document in (train, heldout))
    assert temple.shape == flower.shape == (427, 640, 3)
    sky, petals = temple[:80, 400:].mean((0, 1)), flower[150:250, 220:380].mean((0, 1))
    assert sky.min() > 200  # captions are not swapped: the sky is bright,
    assert petals[0] > 1.5 * petals[2]  # the flower's middle is orange
    assert [document.split for document in read_at("photographs")] == ["heldout", "train"]


def test_photographs_can_be_prepared(tmp_path):
    command("data", "prepare", "photographs", "--sizes", "64x48", "--out", tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.metadata["sources"]["photographs"]["documents"] == {"train": 1, "heldout": 1}
    assert prepared.shapes == [(12, 16)]


# All built-in sources


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "emoji" or has_font()])
def test_first_and_last_document_of_every_source_can_be_read(name):
    for split in ("train", "heldout"):
        source = open_built_in(name, split)
        assert source.name == name
        assert [source[n].id for n in (0, len(source) - 1)] == [0, len(source) - 1]


def test_describe_warns_about_a_folder_named_like_a_built_in_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_reader("photographs").describe() == "photographs: built in"
    Path("photographs").mkdir()
    assert open_reader("photographs").describe() == "photographs: built in; the local path of this name is ./photographs"
