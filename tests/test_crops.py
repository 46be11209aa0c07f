"""Pictures for training a codec, whole or in crops."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.sources import write_photos
from tests.test_cli import command, fails
from transfusion.codecs.pictures import to_pixels
from transfusion.data import crops
from transfusion.data.crops import cut_crops, gather_pictures
from transfusion.data.reading.readers import Options, open_reader

sides = st.integers(1, 24)


def slope(height: int, width: int) -> np.ndarray:
    """A picture whose colours say where a pixel lies: x in red, y in green, which a window keeps in their order."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def noise(height: int, width: int, colours: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, colours), dtype=np.uint8)


@examples(60)
@given(sides, sides, st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 3)), st.integers(0, 9), st.integers(0, 5))
def test_crops_have_the_size_that_is_asked_for_whatever_the_picture(width, height, x, y, colours, number, crops):
    found = list(cut_crops(noise(y, x, colours), number, (width, height), colours, crops))
    whole = not crops or x < width or y < height
    assert len(found) == (1 if whole else crops)
    assert all(one.shape == (height, width, colours) and one.dtype == np.uint8 for one in found)
    if whole:
        assert np.array_equal(found[0], to_pixels(noise(y, x, colours), [(width, height)], colours))


@examples(30)
@given(sides, sides, st.integers(0, 9))
def test_a_picture_of_the_size_itself_comes_back_as_it_is(width, height, number):
    pixels = noise(height, width)
    assert all(np.array_equal(one, pixels) for one in cut_crops(pixels, number, (width, height), 3, 3))


def test_crops_are_never_flipped_and_have_every_scale_and_place():
    pixels = slope(427, 640)
    spans, corners = [], []
    for one in cut_crops(pixels, 0, (32, 32), 3, 400):
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
    few, many, other = (list(cut_crops(pixels, number, (16, 16), 3, crops)) for number, crops in ((4, 3), (4, 9), (5, 3)))
    assert all(np.array_equal(one, same) for one, same in zip(few, many, strict=False))
    assert len({one.tobytes() for one in (*many, *other)}) == 12


@pytest.mark.parametrize(("height", "width"), [(16, 19), (19, 16)])
def test_the_finest_crops_are_excerpts_bit_for_bit_from_end_to_end(height, width):
    """The largest window of these pictures is the size itself, and has four places."""
    pixels = noise(height, width)
    excerpts = {pixels[y : y + 16, x : x + 16].tobytes() for y in range(height - 15) for x in range(width - 15)}
    assert {one.tobytes() for one in cut_crops(pixels, 0, (16, 16), 3, 50)} == excerpts


def test_what_is_gathered_is_the_crops_of_every_picture_in_turn(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    found = gather_pictures([reader], (16, 16), 3, 20, tmp_path, crops=4)
    assert (len(found.pictures), found.faults, found.heldout) == (20, 0, ())
    raws = [one.segments[1].pixels for unit in reader.units(9) for one in reader.read(unit)]
    expected = [one for number, raw in enumerate(raws) for one in cut_crops(raw, number, (16, 16), 3, 4)]
    assert np.array_equal(found.pictures, expected)


def test_with_too_few_places_there_are_fewer_crops_of_every_picture(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    found = gather_pictures([reader], (16, 16), 3, 11, tmp_path, crops=4)
    raws = [one.segments[1].pixels for unit in reader.units(9) for one in reader.read(unit)]
    expected = [one for number, raw in enumerate(raws) for one in cut_crops(raw, number, (16, 16), 3, 2)]
    assert np.array_equal(found.pictures, expected)


def test_with_too_many_records_some_are_taken_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "UNIT", 4)
    readers = [open_reader(str(write_photos(tmp_path / name, 40, 20, 20 + n))) for n, name in enumerate("ab")]
    found = gather_pictures(readers, (16, 16), 3, 24, tmp_path / "a")
    wanted = [one.segments[1].pixels for reader in readers for unit in reader.units(4) for one in reader.read(unit)]
    known = [to_pixels(raw, [(16, 16)], 3).tobytes() for raw in wanted]
    places = [known.index(one.tobytes()) for one in found.pictures]
    assert len(places) == 24 and places[0] < 4 and places[-1] >= 76
    assert sum(place < 40 for place in places) == 12


def test_a_picture_that_stands_there_twice_is_used_once_and_a_fault_is_told(tmp_path):
    folder, told = write_photos(tmp_path / "photos", 5), []
    (folder / "0001.png").write_bytes((folder / "0000.png").read_bytes())
    (folder / "0002.png").write_bytes(b"no picture")
    found = gather_pictures([open_reader(str(folder))], (16, 16), 3, 100, tmp_path, hear=told.append)
    assert (len(found.pictures), found.faults) == (3, 1)
    assert len(told) == 1 and "0002.png" in str(told[0])


def test_what_a_source_holds_out_is_known(tmp_path):
    found = gather_pictures([open_reader("digits", Options(limit=60))], (16, 16), 1, 100, tmp_path)
    assert found.heldout == (0, 1, 2)  # of the first documents one in twenty


def test_pictures_that_are_lost_are_said_so(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5)))
    gather_pictures([reader], (16, 16), 3, 100, tmp_path)
    (tmp_path / "pictures.u8").write_bytes(b"short")
    with pytest.raises(ValueError, match="pictures.u8 is missing or cut short"):
        gather_pictures([reader], (16, 16), 3, 100, tmp_path)


def test_crops_are_part_of_what_a_folder_was_begun_with(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    begun = gather_pictures([reader], (16, 16), 3, 100, tmp_path).pictures
    assert np.array_equal(gather_pictures([reader], (16, 16), 3, 100, tmp_path).pictures, begun)
    with pytest.raises(ValueError, match="begun with other pictures"):
        gather_pictures([reader], (16, 16), 3, 100, tmp_path, crops=2)


def test_one_built_in_source_is_not_taken_for_another(tmp_path):
    gather_pictures([open_reader("digits", Options(limit=3))], (8, 8), 3, 3, tmp_path)
    with pytest.raises(ValueError, match="begun with other pictures"):
        gather_pictures([open_reader("photographs", Options(limit=3))], (8, 8), 3, 3, tmp_path)


def test_fit_codec_takes_crops_of_the_photographs(tmp_path, capsys):
    fit = ("data", "fit-codec", "small", "photographs", "--size", "16x16", "--out", tmp_path / "codec", "--network.width", 8,
           "--network.channels", 4, "--training.steps", 2, "--training.batch_size", 4)  # fmt: skip
    command(*fit, "--crops", 30)
    assert "60 different crops of 16x16" in capsys.readouterr().err
    page = (tmp_path / "codec" / "reconstructions.html").read_text()
    assert "30 held-out images" in page  # of the flower, while it learns from the temple
    assert "begun with other pictures" in fails(capsys, 1, *fit, "--crops", 31)
    assert "at least 0" in fails(capsys, 2, *fit, "--crops", -1)
    assert json.loads(Path(tmp_path / "codec" / "pictures.json").read_text())["recipe"]["crops"] == 30


def test_a_codec_takes_no_folder_of_something_else(tmp_path, capsys):
    """Its files are called like others' files: a data set would lose its codec."""
    photos = write_photos(tmp_path / "photos", 12)
    command("data", "prepare", photos, "--out", tmp_path / "data")
    fit = ("data", "fit-codec", "small", photos, "--size", "16x16", "--training.steps", 2, "--training.batch_size", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert "holds a data set" in fails(capsys, 2, *fit, "--out", tmp_path / "data")
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before
    assert "lie in one another" in fails(capsys, 1, *fit, "--out", photos)
    assert "lie in one another" in fails(capsys, 1, *fit, "--out", photos / "codec")


def test_a_slip_of_the_pen_does_not_spoil_the_folder(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 12)
    fit = ("data", "fit-codec", "small", photos, "--size", "16x16", "--out", tmp_path / "codec", "--training.steps", 2,
           "--training.batch_size", 2, "--network.width", 8)  # fmt: skip
    assert "nosuch.pth" in fails(capsys, 1, *fit, "--training.perceptual", tmp_path / "nosuch.pth")
    command(*fit)
    assert (tmp_path / "codec" / "codec.json").exists()


@pytest.mark.parametrize(("size", "more"), [("8x8", ()), ("12x12", ("--training.perceptual", "lpips.pth"))])
def test_pictures_too_small_to_be_compared_are_refused(tmp_path, capsys, size, more):
    photos = write_photos(tmp_path / "photos", 12)
    fit = ("data", "fit-codec", "small", photos, "--size", size, "--out", tmp_path / "codec")
    assert "pixels a side or more are needed" in fails(capsys, 1, *fit, *more)
