"""`emoji`: the colour emoji of the font Noto Color Emoji, captioned with their Unicode names."""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.disk import sha256_of
from transfusion.seeding import uniform_from

FONT = "NotoColorEmoji.ttf"  # found by name in the system's font folders
FONT_SIZE = 109  # the only size in which the font has bitmaps; they are 136 x 128 pixels
IMAGE_SIZE = 128  # side of the images of this source
CODE_BLOCKS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
TEST_EMOJI = "\N{GRINNING FACE}"
MIN_COLOURS = 6  # a black character that is not an emoji has fewer
HELDOUT = 0.05


class Emoji:
    """Images with their names, as caption-image pairs. About one in twenty is held out; the name decides. The images depend
    on the font, the names on the Unicode version of Python: `describe` returns both. FileNotFoundError when the font is not
    installed."""

    name = "emoji"

    def __init__(self, split: str = "train"):
        self.font = find_font()
        self.images = [(name, pixels) for name, pixels in render_all(self.font)
                       if (uniform_from("emoji", name) < HELDOUT) == (split == "heldout")]  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, id: int) -> RawDocument:
        name, pixels = self.images[id]
        return RawDocument((RawText(name), RawImage(pixels)), id=id, pairs=True)

    def describe(self) -> dict:
        """SHA-256 of the font, and the Unicode version of the names."""
        return {"font": sha256_of(self.font), "unicode": unicodedata.unidata_version}


def find_font() -> Path:
    """Path of the font. FileNotFoundError when it is not installed, is damaged or has no colours."""
    try:
        font = ImageFont.truetype(FONT, FONT_SIZE)
        if not _is_coloured(render_character(TEST_EMOJI, font)):
            raise OSError("a font of that name without colours")
        return Path(font.path)
    except OSError:
        raise FileNotFoundError(f"the source emoji needs the font {FONT}, which is not installed: on Debian and Ubuntu, "
                                "apt install fonts-noto-color-emoji") from None  # fmt: skip


@cache
def render_all(path: Path) -> tuple[tuple[str, np.ndarray], ...]:
    """Every emoji of the font: its name in lower case, and (IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    font = ImageFont.truetype(str(path), FONT_SIZE)
    characters = (chr(code) for block in CODE_BLOCKS for code in block)
    named = ((unicodedata.name(character, "").lower(), character) for character in characters)
    images = ((name, render_character(character, font)) for name, character in named if name)
    return tuple((name, np.asarray(image)) for name, image in images if image is not None)


def render_character(character: str, font: ImageFont.FreeTypeFont) -> PILImage.Image | None:
    """The character in the middle of a white square; None when the font has no colour bitmap for it."""
    bitmap = PILImage.new("RGBA", (136, 128))
    ImageDraw.Draw(bitmap).text((0, 0), character, font=font, embedded_color=True)
    square = PILImage.new("RGBA", (136, 136), "white")
    square.alpha_composite(bitmap, (0, 4))
    square = square.convert("RGB")
    colours = square.resize((32, 32)).getcolors(32 * 32)
    has_bitmap = len(colours) >= MIN_COLOURS
    return square.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.LANCZOS) if has_bitmap else None


def _is_coloured(image: PILImage.Image | None) -> bool:
    """Whether any pixel is clearly not grey."""
    pixels = np.asarray(image or PILImage.new("RGB", (1, 1)), np.int16)
    return bool((pixels.max(-1) - pixels.min(-1) > 64).any())
