"""`emoji`: the colour emoji of the font Noto Color Emoji, captioned with their names in Unicode."""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.disk import sha256_of
from transfusion.seeding import uniform_from

FONT = "NotoColorEmoji.ttf"  # wherever the system keeps its fonts
STRIKE = 109  # the one size in which the font holds its pictures; they are 136 x 128 pixels
SIDE = 128  # of the pictures that are given
BLOCKS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
FACE = "\N{GRINNING FACE}"
COLOURS = 6  # a letter in black, which is no emoji, has fewer
HELDOUT = 0.05


class Emoji:
    """Pictures with their names, as caption-image pairs; about one in twenty is held out, by its name.

    The pictures depend on the font, the names a little on the version of Python, so the results `describe` both.
    FileNotFoundError when there is no such font.
    """

    name = "emoji"

    def __init__(self, split: str = "train"):
        self.font = find_font()
        self.drawn = [(name, pixels) for name, pixels in draw_all(self.font)
                      if (uniform_from("emoji", name) < HELDOUT) == (split == "heldout")]  # fmt: skip

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, id: int) -> RawDocument:
        name, pixels = self.drawn[id]
        return RawDocument((RawText(name), RawImage(pixels)), id=id, pairs=True)

    def describe(self) -> dict:
        """The hash of the font, and the version of Unicode that gave the names."""
        return {"font": sha256_of(self.font), "unicode": unicodedata.unidata_version}


def find_font() -> Path:
    """FileNotFoundError when it is not installed, or damaged, or of another kind."""
    try:
        font = ImageFont.truetype(FONT, STRIKE)
        if not _is_coloured(draw(FACE, font)):
            raise OSError("a font of that name without colours")
        return Path(font.path)
    except OSError:
        raise FileNotFoundError(
            f"the source emoji needs the font {FONT}, which is not installed: "
            "on Debian and Ubuntu, apt install fonts-noto-color-emoji"
        ) from None


@cache
def draw_all(path: Path) -> tuple[tuple[str, np.ndarray], ...]:
    """Every emoji that the font holds: its name in lower case, and (SIDE, SIDE, 3) uint8."""
    font = ImageFont.truetype(str(path), STRIKE)
    letters = (chr(code) for block in BLOCKS for code in block)
    named = ((unicodedata.name(letter, "").lower(), letter) for letter in letters)
    drawn = ((name, draw(letter, font)) for name, letter in named if name)
    return tuple((name, np.asarray(picture)) for name, picture in drawn if picture is not None)


def draw(letter: str, font: ImageFont.FreeTypeFont) -> Picture.Image | None:
    """The letter in the middle of a white square; None where the font has no picture of it."""
    drawn = Picture.new("RGBA", (136, 128))
    ImageDraw.Draw(drawn).text((0, 0), letter, font=font, embedded_color=True)
    square = Picture.new("RGBA", (136, 136), "white")
    square.alpha_composite(drawn, (0, 4))
    square = square.convert("RGB")
    colours = square.resize((32, 32)).getcolors(32 * 32)
    return square.resize((SIDE, SIDE), Picture.Resampling.LANCZOS) if len(colours) >= COLOURS else None


def _is_coloured(picture: Picture.Image | None) -> bool:
    """Not only black, white and what lies between."""
    pixels = np.asarray(picture or Picture.new("RGB", (1, 1)), np.int16)
    return bool((pixels.max(-1) - pixels.min(-1) > 64).any())
