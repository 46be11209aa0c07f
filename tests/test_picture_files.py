"""Image files of every kind to pixels: formats, modes, colour profiles, metadata, and notes on what is wrong with them."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from tests.profile import examples
from tests.reading import close_account, read_at
from transfusion.codecs import pictures
from transfusion.codecs.pictures import FORMATS, IMAGE_SUFFIXES, WEB_FORMATS, PictureError, pixels_of, read_picture
from transfusion.data.reading.readers import open_reader

COLOUR = (200, 60, 20)
RED = Image.new("RGB", (24, 16), COLOUR)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DAMAGED_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01" + b"\xff" * 40
MAX_ERROR = 4  # levels of 255: lossy formats


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def read(content: bytes, notes: list[str] | None = None, **options) -> np.ndarray:
    return pixels_of(read_picture(content, "a", on_note=(notes if notes is not None else []).append, **options))


def profile(primaries: dict[str, tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of a display with these primaries (XYZ) and this gamma, as in the specification ICC.1:2001."""
    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    description = b"desc" + bytes(4) + struct.pack(">I", 6) + b"plain\0" + bytes(78)
    white = b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6000100000000d32d")
    tags = {b"desc": description + bytes(-len(description) % 4), b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for name, values in primaries.items():
        tags[name.encode() + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(map(number, values))
        tags[name.encode() + b"TRC"] = curve
    table, content, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", offset + len(content), len(tag))
        content += tag
    size = offset + len(content)
    head = struct.pack(">I", size) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += bytes.fromhex("0000f6d6000100000000d32d")
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + content


SRGB_PRIMARIES = {"r": (0.4360, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971), "b": (0.1431, 0.0606, 0.7141)}
SWAPPED = profile({"r": SRGB_PRIMARIES["b"], "g": SRGB_PRIMARIES["g"], "b": SRGB_PRIMARIES["r"]}, 2.2)
LINEAR = profile(SRGB_PRIMARIES, 1.0)
LINEAR_GREY = profile({}, 1.0, b"GRAY")


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_is_read(file_format):
    notes = []
    pixels = read(encode(RED, file_format), notes)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - COLOUR).max() <= MAX_ERROR
    assert not notes


def test_every_suffix_is_read_from_a_folder(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        kind = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        (tmp_path / f"{suffix}.{suffix}").write_bytes(encode(RED, kind))
        (tmp_path / f"{suffix}.txt").write_text(suffix)
    documents = read_at(tmp_path)
    assert sorted(document.segments[0].text for document in documents) == sorted(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", ["heic", "jxl", "svg", "zip"])
def test_other_files_are_named_and_counted(suffix, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(RED))
    (tmp_path / f"b.{suffix}").write_bytes(b"x")
    account = close_account(open_reader(str(tmp_path)))
    assert f"  1 .{suffix}: b.{suffix}" in account.lines()


def test_other_formats_are_refused_by_name():
    contents = {
        "HEIC": b"\0\0\0\x18ftypheic", "HEIF": b"\0\0\0\x18ftypmif1", "JPEG XL": b"\xff\x0a\x01\x02", "SVG": b"<svg xmlns",
        "ZIP": b"PK\x03\x04x", "HTML": b"<!DOCTYPE html>", "PDF": b"%PDF-1.7",
    }  # fmt: skip
    for name, content in contents.items():
        with pytest.raises(PictureError, match=f"^a is a file of {name}, not an image of a supported format"):
            read(content)
    with pytest.raises(PictureError, match="JPEG XL"):
        read(b"\0\0\0\x0cJXL \r\n")
    for content in (b"", b"x", b"\0\0\0\x18ft"):
        with pytest.raises(PictureError, match="^a is not an image"):
            read(content)
    with pytest.raises(PictureError, match="is not an image"):
        read(encode(RED, "TIFF"), formats=WEB_FORMATS)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [(Image.fromarray(np.full((4, 4), 0xABCD, np.uint16)), {}, [0xAB]),
     (Image.fromarray(np.full((4, 4), 0xABCD, np.uint16)), {"format": "TIFF"}, [0xAB]),
     (RED.convert("CMYK"), {"format": "JPEG"}, COLOUR), (RED.convert("CMYK"), {"format": "TIFF"}, COLOUR),
     (Image.new("1", (4, 4), 1), {}, [255]), (Image.new("LA", (4, 4), (0, 0)), {}, [255, 255, 255]),
     (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), {"format": "WEBP"}, [255, 255, 255]),
     (RED.convert("P", palette=Image.Palette.ADAPTIVE), {"format": "GIF"}, COLOUR),
     (RED.convert("P", palette=Image.Palette.ADAPTIVE), {"transparency": 0}, [255, 255, 255])],
)  # fmt: skip
def test_modes(image, options, expected):
    pixels = read(encode(image, options.pop("format", "PNG"), **options))
    assert pixels.shape[2] == len(expected)
    assert np.abs(pixels[1, 1].astype(int) - expected).max() <= MAX_ERROR


def test_picture_without_defined_colours_is_refused():
    for mode in ("F", "LAB"):
        with pytest.raises(PictureError, match=f"mode {mode} has no defined colours"):
            read(encode(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation_is_read(file_format):
    others = [Image.new("RGB", (24, 16), colour) for colour in ("blue", "green")]
    pixels = read(encode(RED, file_format, save_all=True, append_images=others))
    assert np.abs(pixels[8, 8].astype(int) - COLOUR).max() <= MAX_ERROR


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_image_is_rotated_as_its_exif_data_say(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = RED.copy()
    image.paste((0, 0, 255), (0, 0, 12, 16))  # the left half, which must become the upper one
    pixels = read(encode(image, file_format, exif=exif))
    assert pixels.shape == (24, 16, 3)
    assert pixels[2, 8, 2] > 200 > 60 > pixels[21, 8, 2]


# Colour profiles


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_to_srgb(mode):
    notes = []
    image = RED.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else RED.convert(mode)
    pixels = read(encode(image, icc_profile=SWAPPED), notes)
    assert not notes
    assert np.abs(pixels[3, 3].astype(int) - COLOUR[::-1]).max() <= 12  # gamma 2.2 is not quite that of sRGB
    (linear,) = np.unique(read(encode(Image.new("RGB", (4, 4), (55, 55, 55)), icc_profile=LINEAR)))
    assert abs(int(linear) - 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)) <= 2


def test_grey_image_with_a_profile_stays_grey():
    pixels = read(encode(Image.new("L", (4, 4), 55), icc_profile=LINEAR_GREY))
    assert pixels.shape == (4, 4, 1)
    assert abs(int(pixels[0, 0, 0]) - 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)) <= 2


def test_profile_of_srgb_changes_nothing():
    notes, content = [], encode(RED, icc_profile=SRGB)
    assert (read(content, notes) == COLOUR).all()
    assert not notes


@pytest.mark.parametrize("wrong", [bytes(2 << 20), b"x", LINEAR_GREY, SWAPPED[:200]])
def test_wrong_profile_is_ignored_with_a_note(wrong):
    notes = []
    assert (read(encode(RED, icc_profile=wrong), notes) == COLOUR).all()
    assert [note.partition(":")[0] for note in notes] == ["colour profile ignored"]


# Metadata


def test_png_with_megabytes_of_text_is_read():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * (3 << 20), zip=True)
    info.add_text("parameters", "y" * (3 << 20), zip=True)
    assert (read(encode(RED, pnginfo=info)) == COLOUR).all()


def test_damaged_exif_data_are_a_note_with_the_name_of_the_picture(tmp_path, capfd):
    damaged = encode(RED, "JPEG", exif=DAMAGED_EXIF)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(damaged)
    reader = open_reader(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        account = close_account(reader)
    assert list(account.lines())[-2:] == ["notes on pictures that are read:", "  2 Corrupt EXIF data: a.jpg, b.jpg"]
    assert capfd.readouterr() == ("", "")


def test_bug_of_ours_is_not_a_fault(tmp_path, monkeypatch):
    """Only what decoders raise on damaged files is one."""
    (tmp_path / "a.png").write_bytes(encode(RED))

    def fail(*_, **__):
        raise error

    for error in (MemoryError(), AssertionError("a bug"), NameError("a bug")):
        monkeypatch.setattr(pictures.Picture, "open", fail)
        with pytest.raises(type(error)):
            read_at(tmp_path)


@examples(400, 60)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 4))
def test_random_damage_gives_an_image_or_a_picture_error(file_format, seed, is_cut, places):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    content = bytearray(encode(Image.fromarray(pixels), file_format, icc_profile=SWAPPED) if file_format != "BMP" else
                        encode(Image.fromarray(pixels), "BMP"))  # fmt: skip
    for place in random.integers(0, len(content), places):
        content[place] = random.integers(0, 256)
    content = content[: random.integers(0, len(content))] if is_cut else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert read(bytes(content), max_pixels=10**6).dtype == np.uint8
        except PictureError as error:
            assert "\n" not in str(error)
