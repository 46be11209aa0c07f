"""Pictures in requests to pixels, and pixels to PNG in answers."""

import asyncio
import base64
import binascii
from collections.abc import Sequence

import numpy as np

from transfusion.codecs.pictures import WEB_FORMATS, PictureError, read_picture, to_pixels, to_png
from transfusion.serving.errors import APIError

MAX_DECODING = 2  # pictures that are decoded at once: each may use hundreds of megabytes for a moment


class PictureReader:
    """Decodes pictures, in threads, to pixels (Y, X, channels) uint8 of a size that the run supports."""

    def __init__(self, sizes: Sequence[tuple[int, int]], image_channels: int, max_pixels: int):
        self.sizes, self.image_channels, self.max_pixels = sizes, image_channels, max_pixels
        self.semaphore = asyncio.Semaphore(MAX_DECODING)

    async def read(self, source: str | bytes, param: str) -> np.ndarray:
        """From a data: URL or a file's bytes. APIError: another kind of URL, damaged, not a known format, or too large."""
        async with self.semaphore:
            return await asyncio.to_thread(self._read, source, param)

    def _read(self, source: str | bytes, param: str) -> np.ndarray:
        try:
            encoded = source if isinstance(source, bytes) else _decode_data_url(source)
            return to_pixels(read_picture(encoded, "it", self.max_pixels, WEB_FORMATS), self.sizes, self.image_channels)
        except PictureError as error:
            raise APIError(400, f"{param} cannot be used: {error}", param, "invalid_image") from None


async def to_data_url(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + await to_base64(pixels)


async def to_base64(pixels: np.ndarray) -> str:
    """A PNG file in base64."""
    return base64.b64encode(await asyncio.to_thread(to_png, pixels)).decode()


def _decode_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not head.startswith("data:"):
        raise PictureError("the server fetches no addresses; send the picture itself as data:image/png;base64,...")
    if not comma or not head.endswith(";base64"):
        raise PictureError("a data: URL must be in base64, as in data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("the data after base64, is not valid base64") from None
