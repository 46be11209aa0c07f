"""Images for training a codec, whole or cropped."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.reading import read_at
from tests.sources import write_photos
from tests.test_cli import command, fails
from transfusion.codecs.pictures import to_pixels
from transfusion.data import crops
from transfusion.data.config import PrepareConfig
from transfusion.data.crops import cut_crops, gather_images
from transfusion.data.prepare import prepare
from transfusion.data.reading.readers import ReaderOptions, open_reader
from transfusion.data.store import open_prepared

sides = st.integers(1, 24)


def slope(height: int, width: int) -> np.ndarray:
    """An image whose colours encode pixel positions: x in red, y in green. A crop keeps their order."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@examples(60)
@given(sides, sides, st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 3)), st.integers(0, 9), st.integers(0, 5))
def test_crops_have_the_requested_size_for_any_image(width, height, x, y, channels, number, crops):
    images = list(cut_crops(noise(y, x, channels), number, (width, height), channels, crops))
    is_whole = not crops or x < width or y < height
    assert len(images) == (1 if is_whole else crops)
    assert all(image.shape == (height, width, channels) and image.dtype == np.uint8 for image in images)
    if is_whole:
        assert np.array_equal(images[0], to_pixels(noise(y, x, channels), [(width, height)], channels))


@examples(30)
@given(sides, sides, st.integers(0, 9))
def test_image_of_the_crop_size_is_unchanged(width, height, number):
    pixels = noise(height, width)
    assert all(np.array_equal(crop, pixels) for crop in cut_crops(pixels, number, (width, height), 3, 3))


def test_crops_are_never_flipped_and_have_all_scales_and_positions():
    pixels = slope(427, 640)
    spans, corners = [], []
    for crop in cut_crops(pixels, 0, (32, 32), 3, 400):
        red, green = crop[16, :, 0].astype(int), crop[:, 16, 1].astype(int)
        assert (np.diff(red) >= 0).all()
        assert (np.diff(green) >= 0).all()
        spans.append((green[-1] - green[0]) / 255 * 427)
        corners.append(red[0] / 255 * 640 / max(1, 640 - spans[-1]))
    assert min(spans) < 36
    assert 390 < max(spans) < 428
    median = np.median(spans)  # log-uniform between 32 and 427 has median 117 (uniform: 230)
    assert 95 < median < 140
    assert min(corners) < 0.05
    assert max(corners) > 0.9


def test_crop_depends_only_on_image_and_crop_number():
    pixels = noise(60, 80)
    few, many, other = (list(cut_crops(pixels, number, (16, 16), 3, crops)) for number, crops in ((4, 3), (4, 9), (5, 3)))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({crop.tobytes() for crop in (*many, *other)}) == 12


@pytest.mark.parametrize(("height", "width"), [(16, 19), (19, 16)])
def test_crops_at_scale_1_equal_windows_of_the_image(height, width):
    """The largest window of these images has the crop size, and four possible positions."""
    pixels = noise(height, width)
    windows = {pixels[y : y + 16, x : x + 16].tobytes() for y in range(height - 15) for x in range(width - 15)}
    assert {crop.tobytes() for crop in cut_crops(pixels, 0, (16, 16), 3, 50)} == windows


def test_gathered_images_are_the_crops_of_every_image_in_order(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    gathered = gather_images([reader], (16, 16), 3, 20, tmp_path, crops=4)
    assert (len(gathered.images), gathered.faults, gathered.heldout) == (20, 0, ())
    raws = [document.segments[1].pixels for unit in reader.units(9) for document in reader.read(unit)]
    expected = [crop for number, raw in enumerate(raws) for crop in cut_crops(raw, number, (16, 16), 3, 4)]
    assert np.array_equal(gathered.images, expected)


def test_max_images_reduces_the_crops_per_image(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    gathered = gather_images([reader], (16, 16), 3, 11, tmp_path, crops=4)
    raws = [document.segments[1].pixels for unit in reader.units(9) for document in reader.read(unit)]
    expected = [crop for number, raw in enumerate(raws) for crop in cut_crops(raw, number, (16, 16), 3, 2)]
    assert np.array_equal(gathered.images, expected)


def test_max_images_selects_records_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "UNIT_SIZE", 4)
    readers = [open_reader(str(write_photos(tmp_path / name, 40, 20, 20 + n))) for n, name in enumerate("ab")]
    gathered = gather_images(readers, (16, 16), 3, 24, tmp_path / "a")
    documents = [document for reader in readers for unit in reader.units(4) for document in reader.read(unit)]
    contents = [to_pixels(document.segments[1].pixels, [(16, 16)], 3).tobytes() for document in documents]
    positions = [contents.index(image.tobytes()) for image in gathered.images]
    assert len(positions) == 24 and positions[0] < 4 and positions[-1] >= 76
    assert sum(position < 40 for position in positions) == 12


def test_duplicate_image_is_used_once_and_faults_are_reported(tmp_path):
    folder, faults = write_photos(tmp_path / "photos", 5), []
    (folder / "0001.png").write_bytes((folder / "0000.png").read_bytes())
    (folder / "0002.png").write_bytes(b"no picture")
    gathered = gather_images([open_reader(str(folder))], (16, 16), 3, 100, tmp_path, on_fault=faults.append)
    assert (len(gathered.images), gathered.faults) == (3, 1)
    assert len(faults) == 1 and "0002.png" in str(faults[0])


def test_heldout_images_of_a_source_are_marked(tmp_path):
    gathered = gather_images([open_reader("digits", ReaderOptions(limit=60))], (16, 16), 1, 100, tmp_path)
    assert gathered.heldout == (0, 1, 2)  # one in twenty of the first documents


@pytest.mark.parametrize("crops", [0, 2])
def test_codec_is_not_trained_on_what_prepare_holds_out(crops, tmp_path):
    """Images of another size than the codec's; some occur twice."""
    photos = write_photos(tmp_path / "photos", 80, 20, 24)
    for n in range(20):
        (photos / f"{n + 60:04d}.png").write_bytes((photos / f"{n:04d}.png").read_bytes())
    gathered = gather_images([open_reader(str(photos))], (16, 16), 3, 1000, tmp_path, crops=crops)
    config = PrepareConfig(tokenizer_size=260, sizes=("16x16",), codec="pixels")
    prepare([open_reader(str(photos))], config, tmp_path / "out")
    source = open_prepared(tmp_path / "out").source("photos", "heldout")
    heldout = {to_pixels(source.original_images(n)[0], [(16, 16)], 3).tobytes() for n in range(len(source))}
    assert 0 < len(heldout) < 12
    raws = {document.segments[1].pixels.tobytes(): document.segments[1].pixels for document in read_at(photos)}
    expected = [to_pixels(raw, [(16, 16)], 3).tobytes() in heldout for raw in raws.values() for _ in range(max(1, crops))]
    assert gathered.heldout == tuple(np.flatnonzero(expected))


def test_truncated_image_file_is_an_error(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5)))
    gather_images([reader], (16, 16), 3, 100, tmp_path)
    (tmp_path / "pictures.u8").write_bytes(b"short")
    with pytest.raises(ValueError, match="pictures.u8 is missing or truncated"):
        gather_images([reader], (16, 16), 3, 100, tmp_path)


def test_other_crops_for_the_same_folder_are_an_error(tmp_path):
    reader = open_reader(str(write_photos(tmp_path / "photos", 5, 40, 30)))
    first = gather_images([reader], (16, 16), 3, 100, tmp_path).images
    assert np.array_equal(gather_images([reader], (16, 16), 3, 100, tmp_path).images, first)
    with pytest.raises(ValueError, match="started with other images"):
        gather_images([reader], (16, 16), 3, 100, tmp_path, crops=2)


def test_other_built_in_source_for_the_same_folder_is_an_error(tmp_path):
    gather_images([open_reader("digits", ReaderOptions(limit=3))], (8, 8), 3, 3, tmp_path)
    with pytest.raises(ValueError, match="started with other images"):
        gather_images([open_reader("photographs", ReaderOptions(limit=3))], (8, 8), 3, 3, tmp_path)


def test_fit_codec_can_crop_photographs(tmp_path, capsys):
    fit = ("data", "fit-codec", "small", "photographs", "--size", "16x16", "--out", tmp_path / "codec", "--network.width", 8,
           "--network.channels", 4, "--training.steps", 2, "--training.batch_size", 4)  # fmt: skip
    command(*fit, "--crops", 30)
    assert "60 different crops of 16x16" in capsys.readouterr().err
    page = (tmp_path / "codec" / "reconstructions.html").read_text()
    assert "30 held-out images" in page  # of the flower; the temple is the training image
    assert "started with other images" in fails(capsys, 1, *fit, "--crops", 31)
    assert "at least 0" in fails(capsys, 2, *fit, "--crops", -1)
    assert json.loads(Path(tmp_path / "codec" / "pictures.json").read_text())["recipe"]["crops"] == 30


def test_fit_codec_refuses_other_folders(tmp_path, capsys):
    """It would overwrite the codec of a prepared data set."""
    photos = write_photos(tmp_path / "photos", 12)
    command("data", "prepare", photos, "--out", tmp_path / "data")
    fit = ("data", "fit-codec", "small", photos, "--size", "16x16", "--training.steps", 2, "--training.batch_size", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert "holds a data set" in fails(capsys, 2, *fit, "--out", tmp_path / "data")
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before
    assert "or is inside it" in fails(capsys, 1, *fit, "--out", photos)
    assert "or is inside it" in fails(capsys, 1, *fit, "--out", photos / "codec")


def test_folder_can_be_used_after_an_input_error(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 12)
    fit = ("data", "fit-codec", "small", photos, "--size", "16x16", "--out", tmp_path / "codec", "--training.steps", 2,
           "--training.batch_size", 2, "--network.width", 8)  # fmt: skip
    assert "nosuch.pth" in fails(capsys, 1, *fit, "--training.perceptual", tmp_path / "nosuch.pth")
    command(*fit)
    assert (tmp_path / "codec" / "codec.json").exists()


@pytest.mark.parametrize(("size", "more"), [("8x8", ()), ("12x12", ("--training.perceptual", "lpips.pth"))])
def test_images_too_small_for_a_loss_are_an_error(tmp_path, capsys, size, more):
    photos = write_photos(tmp_path / "photos", 12)
    fit = ("data", "fit-codec", "small", photos, "--size", size, "--out", tmp_path / "codec")
    assert "needs images of at least" in fails(capsys, 1, *fit, *more)
