"""Pictures for training a codec, whole or in crops."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sources import write_photos
from tests.test_cli import command, fails
from transfusion.codecs.pictures import to_pixels
from transfusion.data.crops import cut, gather_pictures
from transfusion.data.reading.readers import Options, open_reader

sides = st.integers(1, 24)


def slope(height: int, width: int) -> np.ndarray:
    """A picture whose colours say where a pixel lies: x in red, y in green, which a window keeps in their order."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def noise(height: int, width: int, colours: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, colours), dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 3)), st.integers(0, 9), st.integers(0, 5))
def test_crops_have_the_size_that_is_asked_for_whatever_the_picture(width, height, x, y, colours, number, crops):
    found = list(cut(noise(y, x, colours), number, (width, height), colours, crops))
    whole = not crops or x < width or y < height
    assert len(found) == (1 if whole else crops)
    assert all(one.shape == (height, width, colours) and one.dtype == np.uint8 for one in found)
    if whole:
        assert np.array_equal(found[0], to_pixels(noise(y, x, colours), [(width, height)], colours))


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(0, 9))
def test_a_picture_of_the_size_itself_comes_back_as_it_is(width, height, number):
    pixels = noise(height, width)
    assert all(np.array_equal(one, pixels) for one in cut(pixels, number, (width, height), 3, 3))


def test_crops_are_never_flipped_and_have_every_scale_and_place():
    pixels = slope(427, 640)
    spans, corners = [], []
    for one in cut(pixels, 0, (32, 32), 3, 400):
        red, green = one[16, :, 0].astype(int), one[:, 16, 1].astype(int)
        assert (np.diff(red) >= 0).all()
        assert (np.diff(green) >= 0).all()
        spans.append((green[-1] - green[0]) / 255 * 427)
        corners.append(red[0] / 255 * 640 / max(1, 640 - spans[-1]))
    assert min(spans) < 36
    assert 390 < max(spans) < 428
    middle = np.median(spans)  # log-uniform between 32 and 427: half of them below 117 (uniform: 230)
    assert 95 < middle < 140
    assert min(corners) < 0.05
    assert max(corners) > 0.9


def test_a_crop_follows_from_the_numbers_of_picture_and_crop_alone():
    pixels = noise(60, 80)
    few, many, other = (list(cut(pixels, number, (16, 16), 3, crops)) for number, crops in ((4, 3), (4, 9), (5, 3)))
    assert all(np.array_equal(one, same) for one, same in zip(few, many, strict=False))
    assert len({one.tobytes() for one in (*many, *other)}) == 12


@pytest.mark.parametrize(("height", "width"), [(16, 19), (19, 16)])
def test_the_finest_crops_are_excerpts_bit_for_bit_from_end_to_end(height, width):
    """The largest window of these pictures is the size itself, and has four places."""
    pixels = noise(height, width)
    excerpts = {pixels[y : y + 16, x : x + 16].tobytes() for y in range(height - 15) for x in range(width - 15)}
    assert {one.tobytes() for one in cut(pixels, 0, (16, 16), 3, 50)} == excerpts


def test_what_is_gathered_is_the_crops_of_every_picture_in_turn(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    pictures, faults = gather_pictures([reader], (16, 16), 3, 18, tmp_path, crops=4)
    assert (len(pictures), faults) == (18, 0)
    raws = [one.segments[1].pixels for unit in reader.units(9) for one in reader.read(unit)]
    expected = [one for number, raw in enumerate(raws) for one in cut(raw, number, (16, 16), 3, 4)]
    assert np.array_equal(pictures, expected[:18])


def test_crops_are_part_of_what_a_folder_was_begun_with(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    begun = gather_pictures([reader], (16, 16), 3, 100, tmp_path)[0]
    about = json.loads((tmp_path / "pictures.json").read_text())
    assert (about["recipe"].pop("crops"), about["recipe"].pop("built_in")) == (0, [])
    (tmp_path / "pictures.json").write_text(json.dumps(about))  # as it was written before there were crops
    assert np.array_equal(gather_pictures([reader], (16, 16), 3, 100, tmp_path)[0], begun)
    with pytest.raises(ValueError, match="begun with other pictures"):
        gather_pictures([reader], (16, 16), 3, 100, tmp_path, crops=2)


def test_one_built_in_source_is_not_taken_for_another(tmp_path):
    gather_pictures([open_reader("digits", Options(limit=3))], (8, 8), 3, 3, tmp_path)
    with pytest.raises(ValueError, match="begun with other pictures"):
        gather_pictures([open_reader("photographs", Options(limit=3))], (8, 8), 3, 3, tmp_path)


def test_fit_codec_takes_crops_of_the_photographs(tmp_path, capsys):
    fit = ("data", "fit-codec", "small", "photographs", "--size", "16x16", "--out", tmp_path / "codec", "--network.width", 8,
           "--network.channels", 4, "--training.steps", 2, "--training.rows", 4)  # fmt: skip
    command(*fit, "--crops", 30)
    assert "60 crops of 16x16" in capsys.readouterr().err
    page = (tmp_path / "codec" / "reconstructions.html").read_text()
    assert "6 held-out crops of the pictures that it learnt from" in page
    assert "begun with other pictures" in fails(capsys, 1, *fit, "--crops", 31)
    assert "at least 0" in fails(capsys, 2, *fit, "--crops", -1)
    assert json.loads(Path(tmp_path / "codec" / "pictures.json").read_text())["recipe"]["crops"] == 30
