"""Picture files to pixels of a size that a run knows: checked before they are decoded."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 64_000_000  # a header that promises more is refused before any is decoded


class PictureError(ValueError):
    """A file is no picture that can be read; the message says why in one line."""


def read_picture(source: Path | bytes, name: str = "", most_pixels: int | None = None) -> Picture.Image:
    """The picture in a file (or in its bytes, with a name for messages), upright.

    PictureError when it is missing, no picture, cut short or too large. Of a film the first frame is read.
    """
    name, most_pixels = name or str(source), most_pixels or MOST_PIXELS
    try:
        with Picture.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
            width, height = picture.size
            if not width * height:
                raise PictureError(f"{name} has no pixels")
            if width * height > most_pixels:
                raise PictureError(f"{name} is {width}x{height} pixels; at most {most_pixels:,} are read")
            picture.load()
            return ImageOps.exif_transpose(picture)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture ({', '.join(FORMATS)})") from None
    except Picture.DecompressionBombError:
        raise PictureError(f"{name} holds too many pixels; at most {most_pixels:,} are read") from None
    except Exception as error:  # what is damaged makes decoders raise whatever
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or "it is damaged"
        raise PictureError(f"cannot read the picture {name}: {reason}") from None


def pixels_of(picture: Picture.Image) -> np.ndarray:
    """(Y, X, 3) uint8, or (Y, X, 1) of a grey picture; what is transparent lies on white, 16 bits become 8."""
    if picture.mode.startswith("I;16"):
        return (np.asarray(picture, dtype=np.uint16) >> 8).astype(np.uint8)[..., None]  # convert() would saturate
    if "transparency" in picture.info or "A" in picture.mode or "a" in picture.mode:
        picture = picture.convert("RGBA")
        picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    width, height = picture.size
    return np.asarray(picture.convert(mode), dtype=np.uint8).reshape(height, width, len(mode))


def to_pixels(
    picture: Picture.Image | np.ndarray, sizes: Sequence[tuple[int, int]], image_channels: int
) -> np.ndarray:
    """(Y, X, channels) uint8 of the (width, height) nearest in shape: short side resized, the middle cut out."""
    pixels = picture if isinstance(picture, np.ndarray) else pixels_of(picture)
    height, width, found = pixels.shape
    size = min(sizes, key=lambda s: (abs(np.log(s[0] / s[1]) - np.log(width / height)), -s[0] * s[1]))
    if (width, height) == size and found == image_channels:
        return pixels
    picture = Picture.fromarray(pixels[..., 0] if found == 1 else pixels).convert("L" if image_channels == 1 else "RGB")
    picture = ImageOps.fit(picture, size, Picture.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.uint8).reshape(size[1], size[0], image_channels)


def to_png(pixels: np.ndarray) -> bytes:
    """(Y, X, 1 or 3) uint8 as a file, without loss."""
    file = BytesIO()
    Picture.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, side: int = 64) -> Picture.Image:
    """Pictures (Y, X, channels) uint8 side by side, each enlarged in whole pixels to about `side`."""
    tiles = []
    for pixels in pictures:
        zoom = max(1, round(side / max(pixels.shape[:2])))
        tile = np.repeat(np.repeat(pixels, zoom, 0), zoom, 1)
        tiles.append(np.broadcast_to(tile, (*tile.shape[:2], 3)))
    height, width = (max(tile.shape[axis] for tile in tiles) + 4 for axis in (0, 1))
    sheet = np.full((-(-len(tiles) // columns) * height + 4, columns * width + 4, 3), 128, dtype=np.uint8)
    for n, tile in enumerate(tiles):
        y, x = n // columns * height + 4, n % columns * width + 4
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return Picture.fromarray(sheet)
