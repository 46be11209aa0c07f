"""Image files to pixels of a size that a run supports. The size in the header is checked before anything is decoded."""

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FORMATS = (*WEB_FORMATS, "TIFF", "AVIF")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif")  # in lower case
OTHER_FORMATS = (  # that are not read: name, and what their files have at an offset
    ("HEIC", 4, b"ftyphei"), ("HEIF", 4, b"ftypmif1"), ("JPEG XL", 0, b"\xff\x0a"), ("JPEG XL", 4, b"JXL "),
    ("SVG", 0, b"<svg"), ("ZIP", 0, b"PK\x03\x04"), ("HTML", 0, b"<!doctype html"), ("PDF", 0, b"%PDF"),
)  # fmt: skip
MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded
GAP, FONT_SIZE, LINE_HEIGHT = 6, 11, 14  # pixels of a contact sheet
MAX_CAPTION_LINES, MAX_CAPTION_CHARS = 8, 400
BAND_PIXELS = 1_000_000  # that are put on white at once
DECODING_ERRORS = (  # that Pillow raises on damaged files
    OSError, ValueError, SyntaxError, LookupError, ArithmeticError, TypeError, EOFError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip
PROFILE_MODES = {"L": "RGB", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}  # -> the mode in sRGB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20  # bytes: drawing programs write megabytes


class PictureError(ValueError):
    """A file is not an image that can be read; the message is one line."""


def read_picture(
    source: Path | bytes, name: str = "", max_pixels: int | None = None, formats: Sequence[str] = FORMATS,
    on_note: Callable[[str], None] | None = None,
) -> Picture.Image:  # fmt: skip
    """The image in a file, or in its bytes (with a name for messages), rotated as its EXIF data say, its colours converted
    to sRGB if it has a colour profile. Of an animation the first frame is read.

    PictureError when it is missing, not an image of these formats, truncated or too large. `on_note` gets what is wrong with
    an image that is read, such as damaged EXIF data; without it Python shows Pillow's warnings.
    """
    name, max_pixels = name or str(source), max_pixels or MAX_PIXELS
    content = source if isinstance(source, bytes) else _read_file(source)
    with _pass_warnings(on_note):
        try:
            image = _decode(content, name, max_pixels, formats)
        except PictureError:
            raise
        except UnidentifiedImageError:
            raise PictureError(f"{name} {_describe(content)} ({', '.join(formats)})") from None
        except Picture.DecompressionBombError:
            raise PictureError(f"{name} has too many pixels; the limit is {max_pixels:,} pixels") from None
        except DECODING_ERRORS as error:
            raise PictureError(f"cannot read the image {name}: {_reason(error)}") from None
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except DECODING_ERRORS as error:
            (on_note or _ignore)(f"EXIF data ignored: {_reason(error)}")
        return _to_srgb(image, on_note or _ignore)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot read the image {path}: {error.strerror or error}") from None


def _decode(content: bytes, name: str, max_pixels: int, formats: Sequence[str]) -> Picture.Image:
    with Picture.open(BytesIO(content), formats=formats) as image:
        width, height = image.size
        if not width * height:
            raise PictureError(f"{name} has no pixels")
        if width * height > max_pixels:
            raise PictureError(f"{name} has {width}x{height} pixels; the limit is {max_pixels:,} pixels")
        image.load()
        return image


@contextmanager
def _pass_warnings(on_note: Callable[[str], None] | None) -> Iterator[None]:
    """Pass Pillow's warnings to `on_note`. Without it nothing is caught: that would change the filters of all threads."""
    if on_note is None:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        on_note(_reason(warning.message).partition(". ")[0])  # numbers may follow, which would make many notes


def _ignore(note: str) -> None:
    pass


def _reason(error: Exception | Warning) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(reason.partition("\n")[0].split()) or "it is damaged"


def _describe(content: bytes) -> str:
    """What a file is that is not a supported image."""
    start = content[:16]
    for name, offset, mark in OTHER_FORMATS:
        if start[offset : offset + len(mark)].lower() == mark.lower():
            return f"is a file of {name}, not an image of a supported format"
    return "is not an image"


# Colours


def _to_srgb(image: Picture.Image, on_note: Callable[[str], None]) -> Picture.Image:
    """The colours of an image with a profile in sRGB. A profile that cannot belong to the image is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in PROFILE_MODES:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    try:
        transform = _build_transform(profile, image.mode)
        converted = transform.apply(image) if transform else image
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        on_note(f"colour profile ignored: {_reason(error)}")
        return image
    return converted.convert("L") if image.mode == "L" else converted


@lru_cache(16)
def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None for a profile that is sRGB already."""
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    if mode != "L" and "srgb" in ImageCms.getProfileDescription(opened).lower():
        return None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(opened, srgb, mode, PROFILE_MODES[mode])


def pixels_of(image: Picture.Image) -> np.ndarray:
    """(Y, X, 3) uint8, or (Y, X, 1) of a grey image. Transparency becomes white, 16 bits become 8. PictureError for a mode
    whose values have no fixed range (I, F) or no conversion without a profile (LAB)."""
    width, height = image.size
    if not width * height:
        raise PictureError(f"a picture of {width}x{height} has no pixels")
    if image.mode in ("I", "F", "LAB"):
        raise PictureError(f"a picture of mode {image.mode} has no defined colours: convert it to L, I;16 or RGB")
    if image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.uint16)  # (Y, X); convert() would saturate
        if (transparent := image.info.get("transparency")) is not None:  # a comparison with None takes a second
            values = np.where(values == transparent, 0xFFFF, values)
        return (values >> 8).astype(np.uint8)[..., None]
    if "transparency" in image.info or image.mode[-1] in "Aa":
        image = _on_white((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    mode = "L" if image.mode in ("1", "L") else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, len(mode))


def _on_white(image: Picture.Image) -> Picture.Image:
    """RGBA -> RGB. In bands of rows: alpha_composite holds the interpreter's lock, and needs two more such images."""
    width, height = image.size
    opaque, rows = Picture.new("RGB", image.size), max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        opaque.paste(Picture.alpha_composite(Picture.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return opaque


def to_pixels(image: Picture.Image | np.ndarray, sizes: Sequence[tuple[int, int]], image_channels: int) -> np.ndarray:
    """(Y, X, image_channels) uint8 in the (width, height) of the nearest aspect ratio, resized and cropped at the centre."""
    pixels = image if isinstance(image, np.ndarray) else pixels_of(image)
    height, width, channels = pixels.shape
    size = min(sizes, key=lambda s: (abs(np.log(s[0] / s[1]) - np.log(width / height)), -s[0] * s[1]))
    if (width, height) == size and channels == image_channels:
        return pixels
    image = Picture.fromarray(pixels[..., 0] if channels == 1 else pixels).convert("L" if image_channels == 1 else "RGB")
    image = ImageOps.fit(image, size, Picture.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8).reshape(size[1], size[0], image_channels)


def encode_picture(pixels: np.ndarray, file_format: str = "png", quality: int = 100) -> bytes:
    """(Y, X, 1 or 3) uint8 -> the bytes of a file: png, or jpeg or webp of this quality (0 to 100)."""
    file = BytesIO()
    options = {} if file_format == "png" else {"quality": quality}
    Picture.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, file_format, **options)
    return file.getvalue()


def contact_sheet(captions: Sequence[str], rows: Mapping[str, Sequence[np.ndarray]], side: int = 96) -> Picture.Image:
    """A column of images (Y, X, channels) uint8 for each caption, which is below it; each row has a title at the left.
    Images are enlarged by a whole factor to about `side` pixels."""
    font = _open_font()
    tiles = {title: [_enlarge(pixels, side) for pixels in images] for title, images in rows.items()}
    width = max([side, *(tile.width for row in tiles.values() for tile in row)])
    heights = {title: max([tile.height for tile in row], default=0) + GAP for title, row in tiles.items()}
    texts = [_wrap(caption, width, font) for caption in captions]
    left = max([math.ceil(font.getlength(title)) for title in rows], default=0) + 2 * GAP
    num_lines = max([text.count("\n") + 1 for text in texts], default=0)
    size = left + (width + GAP) * len(captions), GAP + sum(heights.values()) + num_lines * LINE_HEIGHT + GAP
    sheet = Picture.new("RGB", size, "white")
    canvas, top = ImageDraw.Draw(sheet), GAP
    for title, row in tiles.items():
        canvas.text((GAP, top), title, "black", font)
        for n, tile in enumerate(row):
            sheet.paste(tile, (left + n * (width + GAP), top))
        top += heights[title]
    for n, text in enumerate(texts):
        canvas.multiline_text((left + n * (width + GAP), top), text, "black", font, spacing=LINE_HEIGHT - FONT_SIZE)
    return sheet


def _open_font() -> ImageFont.FreeTypeFont:
    """A font of the system with the letters of many languages; Pillow's own has those of English."""
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf"):
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)


def _enlarge(pixels: np.ndarray, side: int) -> Picture.Image:
    height, width, channels = pixels.shape
    zoom = max(1, round(side / max(height, width)))
    image = Picture.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return image.resize((zoom * width, zoom * height), Picture.Resampling.NEAREST)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text in lines of at most `width` pixels, at most `MAX_CAPTION_LINES` of them; longer words are split."""
    lines = [""]
    for character in " ".join(text[:MAX_CAPTION_CHARS].split()):
        if font.getlength(lines[-1] + character) <= width:
            lines[-1] += character
            continue
        line, space, word = lines[-1].rpartition(" ")
        if character == " ":
            lines.append("")
        elif space:
            lines[-1:] = [line, word + character]
        else:
            lines.append(character)
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], "..."]
    return "\n".join(lines)
