"""Pictures of every mode become the pixels that they show, or are refused in one line."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from tests.profile import examples
from tests.tiny import build_engine, picture
from transfusion.codecs import pictures
from transfusion.codecs.pictures import PictureError, contact_sheet, pixels_of, to_pixels
from transfusion.inference.request import Request

few = examples(25, quick=8)
REFUSED = ("F", "I", "LAB")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
GREY = np.tile(np.array([0, 1, 100, 128, 254, 255], np.uint8), (4, 1))  # (4, 6)


def grey_picture(mode: str) -> Picture.Image:
    """The grey levels of GREY, opaque, as a picture of this mode."""
    if mode in SIXTEEN_BITS:
        values = GREY.astype(np.uint16) * 257  # 65535 is white
        order = ">u2" if mode == "I;16B" else "<u2"
        return Picture.frombytes(mode, GREY.shape[::-1], values.astype(order).tobytes())
    image = Picture.fromarray(GREY)
    if mode in ("La", "RGBa", "PA"):
        image = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}[mode])
    return image.convert(mode)


@pytest.mark.parametrize("mode", sorted(set(Picture.MODES) - set(REFUSED)))
def test_every_mode_shows_the_same_grey_levels(mode):
    """Of a grey and of a colour run, at its own size and at another."""
    image = grey_picture(mode)
    expected = (GREY >= 128) * 255 if mode == "1" else GREY
    if mode == "1":  # no dithering
        image = Picture.fromarray(GREY >= 128)
    pixels = pixels_of(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape[:2] == GREY.shape
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 1  # YCbCr rounds
    for channels in (1, 3):
        same_size = to_pixels(image, [(6, 4)], channels)
        assert np.abs(same_size.astype(int) - expected[..., None]).max() <= 1
        assert to_pixels(image, [(3, 2)], channels).shape == (2, 3, channels)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "1", "L", "P", "RGB", "I;16"])
def test_transparent_pixels_are_white(mode):
    """By an alpha channel, or by a colour that a file declares transparent."""
    image = Picture.new(mode, (3, 2))  # black, and without alpha where the mode has it
    if mode[-1] not in "Aa":
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    assert (pixels_of(image) == 255).all()


def test_sixteen_bits_without_transparency_are_not_compared(monkeypatch):
    """A comparison of all values with None would hold the interpreter's lock for half a second."""
    monkeypatch.setattr(pictures.np, "where", mock.Mock(side_effect=AssertionError("all values are compared")))
    assert (pixels_of(Picture.new("I;16", (4, 3), 0x8000)) == 0x80).all()


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_without_defined_colours_are_refused(mode):
    engine = build_engine()
    with pytest.raises(PictureError, match=f"a picture of mode {mode} has no defined colours: convert it") as raised:
        engine.submit(Request(Picture.new(mode, (4, 4))))
    assert len(str(raised.value).splitlines()) == 1
    assert not engine.sequences


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_pictures_without_pixels_are_refused(size):
    with pytest.raises(PictureError, match=f"{size[0]}x{size[1]} has no pixels"):
        build_engine().submit(Request(Picture.new("RGB", size)))


@few
@given(st.sampled_from("float16 float32 float64 int8 uint16 int32 int64 bool complex64 object U3".split()))
def test_arrays_of_other_types_are_refused(dtype):
    engine, pixels = build_engine(), picture((4, 4), 0)
    with pytest.raises(ValueError, match="pixels must be uint8, from 0 to 255, not ") as raised:
        engine.submit(Request((pixels.astype(dtype),)))
    assert len(str(raised.value).splitlines()) == 1
    engine.submit(Request((pixels,)))


def test_array_and_picture_are_the_same_prompt():
    pixels = picture((4, 4), 0)
    parts = (pixels, Picture.fromarray(pixels), Picture.fromarray(pixels).convert("RGBA"), np.asfortranarray(pixels))
    images = [answer.parts[0] for (answer,) in build_engine().generate([Request(part, 1, seed=1) for part in parts])]
    for image in images:
        np.testing.assert_allclose(image, images[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("band_pixels", [1, 24, 100, 10**6])
def test_a_picture_is_put_on_white_band_by_band(monkeypatch, band_pixels):
    """As the whole picture at once, whatever the bands are."""
    monkeypatch.setattr(pictures, "BAND_PIXELS", band_pixels)
    image = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (17, 24, 4), dtype=np.uint8))
    whole = Picture.alpha_composite(Picture.new("RGBA", image.size, "white"), image).convert("RGB")
    assert (pixels_of(image) == np.asarray(whole)).all()


# Contact sheets


def find_tile(sheet: np.ndarray, pixels: np.ndarray, side: int) -> tuple[int, int]:
    """(y, x) of the only place where a sheet shows an image, enlarged to about `side` pixels."""
    zoom = max(1, round(side / max(pixels.shape[:2])))
    tile = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(zoom, 0).repeat(zoom, 1)
    height, width = tile.shape[:2]
    corners = sheet[: -height + 1, : -width + 1] == tile[0, 0]
    [place] = [(y, x) for y, x in np.argwhere(corners.all(2)) if (sheet[y : y + height, x : x + width] == tile).all()]
    return tuple(map(int, place))


def test_contact_sheet_has_rows_of_images_and_captions_below(side=32):
    rng = np.random.default_rng(0)
    captions = ["three", "a large red disc above a small blue square", "Donaudampfschifffahrtsgesellschaft " * 30, "a\nb"]
    rows = {
        title: [rng.integers(0, 256, shape, dtype=np.uint8) for _ in captions]
        for title, shape in (("held out", (8, 8, 1)), ("drawn 1", (20, 40, 3)), ("drawn 2", (7, 3, 3)))
    }
    sheet = np.asarray(contact_sheet(captions, rows, side))
    places = np.array([[find_tile(sheet, pixels, side) for pixels in row] for row in rows.values()])  # (rows, columns, 2)
    assert (np.diff(places[..., 0], axis=1) == 0).all() and (np.diff(places[..., 1], axis=0) == 0).all()  # a grid
    assert np.diff(places[:, 0, 0]).tolist() == [32 + 6, 20 + 6] and (np.diff(places[0, :, 1]) >= 40).all()
    below, edges = sheet[places[-1, 0, 0] + 35 :], [*places[0, :, 1], sheet.shape[1]]
    ink = [below[:, a:b].min(axis=(1, 2)) < 128 for a, b in pairwise(edges)]  # for each caption, the rows with letters
    heights = [int(np.flatnonzero(rows)[-1]) for rows in ink]
    assert 0 < heights[0] == heights[3] < heights[1] < heights[2] < len(below)
    assert all((below[:, edge - 4 : edge] == 255).all() for edge in edges)  # no caption reaches the next column
    assert sheet[places[0, 0, 0] :, : edges[0]].min() < 128  # titles at the left


def test_contact_sheet_without_images_is_a_picture():
    assert min(contact_sheet([], {"held out": []}).size) > 0
    assert min(contact_sheet([""], {"held out": [np.zeros((1, 1, 1), np.uint8)]}).size) > 96
