"""Pictures that come with a request, and go out with an answer."""

import asyncio
import base64
import binascii
from collections.abc import Sequence

import numpy as np

from transfusion.codecs.pictures import PictureError, read_picture, to_pixels, to_png
from transfusion.serving.errors import APIError

AT_ONCE = 2  # pictures that are decoded: each may take hundreds of megabytes for a moment


class PictureReader:
    """Pictures to pixels (Y, X, channels) uint8 of a size that the run knows, in threads of their own."""

    def __init__(self, sizes: Sequence[tuple[int, int]], image_channels: int, most_pixels: int):
        self.sizes, self.image_channels, self.most_pixels = sizes, image_channels, most_pixels
        self.room = asyncio.Semaphore(AT_ONCE)

    async def read(self, source: str | bytes, param: str) -> np.ndarray:
        """From a data: URL, or a file's bytes. Refused when it is neither, damaged, of another format or too large."""
        async with self.room:
            return await asyncio.to_thread(self._read, source, param)

    def _read(self, source: str | bytes, param: str) -> np.ndarray:
        try:
            encoded = source if isinstance(source, bytes) else _bytes_of(source)
            return to_pixels(read_picture(encoded, "it", self.most_pixels), self.sizes, self.image_channels)
        except PictureError as error:
            raise APIError(400, f"{param} cannot be used: {error}", param, "invalid_image") from None


async def data_url(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + await base64_of(pixels)


async def base64_of(pixels: np.ndarray) -> str:
    """A PNG file, in base64."""
    return base64.b64encode(await asyncio.to_thread(to_png, pixels)).decode()


def _bytes_of(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not head.startswith("data:"):
        raise PictureError("no address is ever fetched, send the picture itself, data:image/png;base64,...")
    if not comma or not head.endswith(";base64"):
        raise PictureError("a data: URL must be in base64, data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("what follows base64, is not base64") from None
