"""Picture files to pixels of a size that a run knows: checked before they are decoded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 64_000_000  # a header that promises more is refused before any is decoded


class PictureError(ValueError):
    """A file is no picture that can be read; the message says why in one line."""


def read_picture(path: Path) -> Picture.Image:
    """The picture in a file. PictureError when it is missing, no picture, cut short or too large."""
    try:
        with Picture.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise PictureError(f"{path} is {width}x{height} pixels; at most {MOST_PIXELS:,} are read")
            picture.load()
            return ImageOps.exif_transpose(picture)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture ({', '.join(FORMATS)})") from None
    except Picture.DecompressionBombError:
        raise PictureError(f"{path} holds too many pixels; at most {MOST_PIXELS:,} are read") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it is damaged"
        raise PictureError(f"cannot read the picture {path}: {reason}") from None


def to_pixels(picture: Picture.Image, sizes: Sequence[tuple[int, int]], colours: int) -> np.ndarray:
    """(Y, X, colours) uint8 of the (width, height) nearest in shape: short side resized, the middle cut out."""
    width, height = picture.size
    size = min(sizes, key=lambda s: (abs(np.log(s[0] / s[1]) - np.log(width / height)), -s[0] * s[1]))
    picture = picture.convert("RGBA" if "transparency" in picture.info or "A" in picture.mode else "RGB")
    if picture.mode == "RGBA":
        picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    picture = ImageOps.fit(picture.convert("L" if colours == 1 else "RGB"), size, Picture.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.uint8).reshape(size[1], size[0], colours)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, side: int = 64) -> Picture.Image:
    """Pictures (Y, X, colours) uint8 side by side, each enlarged in whole pixels to about `side`."""
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
