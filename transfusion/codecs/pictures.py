"""Image files to pixels of a size that a run supports. The size in the header is checked before anything is decoded."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")  # of their files, in lower case
MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded
BAND_PIXELS = 1_000_000  # that are put on white at once


class PictureError(ValueError):
    """A file is not an image that can be read; the message is one line."""


def read_picture(source: Path | bytes, name: str = "", max_pixels: int | None = None) -> Picture.Image:
    """The image in a file, or in its bytes (with a name for messages), rotated as its EXIF data say. PictureError when it is
    missing, not an image, truncated or too large. Of an animation the first frame is read."""
    name, max_pixels = name or str(source), max_pixels or MAX_PIXELS
    try:
        with Picture.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if not width * height:
                raise PictureError(f"{name} has no pixels")
            if width * height > max_pixels:
                raise PictureError(f"{name} has {width}x{height} pixels; the limit is {max_pixels:,} pixels")
            image.load()
            return ImageOps.exif_transpose(image)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not an image ({', '.join(FORMATS)})") from None
    except Picture.DecompressionBombError:
        raise PictureError(f"{name} has too many pixels; the limit is {max_pixels:,} pixels") from None
    except Exception as error:  # decoders raise many types on damaged files
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or "it is damaged"
        raise PictureError(f"cannot read the image {name}: {reason}") from None


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
    return np.asarray(image.convert(mode), dtype=np.uint8).reshape(height, width, len(mode))


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


def contact_sheet(images: Sequence[np.ndarray], columns: int, side: int = 64) -> Picture.Image:
    """A grid of images (Y, X, channels) uint8, each enlarged by a whole factor to about `side` pixels."""
    tiles = []
    for pixels in images:
        zoom = max(1, round(side / max(pixels.shape[:2])))
        tile = np.repeat(np.repeat(pixels, zoom, 0), zoom, 1)
        tiles.append(np.broadcast_to(tile, (*tile.shape[:2], 3)))
    height, width = (max(tile.shape[axis] for tile in tiles) + 4 for axis in (0, 1))
    sheet = np.full((-(-len(tiles) // columns) * height + 4, columns * width + 4, 3), 128, dtype=np.uint8)
    for n, tile in enumerate(tiles):
        y, x = n // columns * height + 4, n % columns * width + 4
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return Picture.fromarray(sheet)
