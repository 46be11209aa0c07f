"""Built-in sources with real images: photographs."""

from pathlib import Path

import pytest

from tests.reading import read_at
from tests.test_cli import command
from transfusion.config import BUILT_IN
from transfusion.data.built_in.photographs import Photographs
from transfusion.data.reading.built_in import open_built_in
from transfusion.data.reading.readers import open_reader
from transfusion.data.store import open_prepared

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


@pytest.mark.parametrize("name", BUILT_IN)
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
