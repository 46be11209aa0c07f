"""Pictures in requests to pixels, and pixels to files in answers."""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from transfusion.codecs.pictures import WEB_FORMATS, PictureError, encode_picture, read_picture, to_pixels
from transfusion.serving.errors import APIError
from transfusion.serving.memory import release_memory

STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet
BASE64_FILLERS = b" \t\r\n\f="


class PictureReader:
    """Decodes pictures, beside the event loop, to pixels (Y, X, channels) uint8 of a size that the run supports."""

    def __init__(self, sizes: Sequence[tuple[int, int]], image_channels: int, max_pixels: int):
        self.sizes, self.image_channels, self.max_pixels = sizes, image_channels, max_pixels

    async def read(self, source: str | bytes, param: str) -> np.ndarray:
        """From a data: URL or a file's bytes. APIError: another kind of URL, damaged, not a known format, or too large."""
        return await asyncio.to_thread(self._read, source, param)

    def _read(self, source: str | bytes, param: str) -> np.ndarray:
        try:
            encoded = source if isinstance(source, bytes) else _decode_data_url(source)
            return to_pixels(read_picture(encoded, "it", self.max_pixels, WEB_FORMATS), self.sizes, self.image_channels)
        except PictureError as error:
            raise APIError(400, f"{param} cannot be used: {error}", param, "invalid_image") from None
        finally:
            release_memory()


@dataclass(frozen=True)
class PictureWriter:
    """Encodes pictures of answers, in threads, as files in base64 or as data: URLs."""

    file_format: str = "png"  # png, jpeg or webp
    quality: int = 100  # of jpeg and webp
    as_url: bool = False

    async def encode(self, pixels: np.ndarray, prefix: str = "") -> dict[str, str]:
        """One field: url or b64_json, with this prefix."""
        url = await self.to_data_url(pixels)
        return {f"{prefix}url": url} if self.as_url else {f"{prefix}b64_json": url.partition(",")[2]}

    async def to_data_url(self, pixels: np.ndarray) -> str:
        file = await asyncio.to_thread(encode_picture, pixels, self.file_format, self.quality)
        return f"data:image/{self.file_format};base64,{base64.b64encode(file).decode()}"


def _decode_data_url(url: str) -> bytes:
    """A data: URL, or its base64 alone. As clients write it: any letter case, parameters such as charset, line breaks,
    percent-encoding, the URL-safe alphabet, no padding."""
    head, comma, body = url.partition(",")
    if not comma and ":" not in head:
        body = head
    elif not head.lower().startswith("data:"):
        raise PictureError("the server fetches no addresses; send the picture itself as data:image/png;base64,...")
    elif not re.fullmatch(r".*; *base64 *", head[-20:], re.DOTALL | re.IGNORECASE):
        raise PictureError("a data: URL must be in base64, as in data:image/png;base64,...")
    try:
        symbols = (unquote(body) if "%" in body else body).encode("ascii").translate(STANDARD_BASE64, BASE64_FILLERS)
        return base64.b64decode(symbols + b"=" * (-len(symbols) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("the data after base64, is not valid base64") from None
