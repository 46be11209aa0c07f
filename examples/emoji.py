"""A folder of real pictures with captions that needs no download: the colour emoji of a font, with their Unicode names.

    python examples/emoji.py --out emoji
    transfusion data validate emoji
    transfusion data prepare emoji --sizes 32x32 --out data/emoji
    transfusion train small --data data/emoji --out runs/emoji

The font is Noto Color Emoji: on Debian and Ubuntu the package fonts-noto-color-emoji.
"""

import json
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

SIZE = 109  # the one size in which the font holds its pictures; they are 136 x 128 pixels
BLOCKS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
COLOURS = 6  # a letter in black, which is no emoji, has fewer


@dataclass
class Options:
    out: Path = Path("emoji")
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def main(options: Options) -> None:
    """Draw every emoji that the font holds, and write metadata.jsonl."""
    try:
        font = ImageFont.truetype(str(options.font), SIZE)
    except OSError:
        sys.exit(f"no font at {options.font}: install fonts-noto-color-emoji, or name another place with --font")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for letter in (chr(code) for block in BLOCKS for code in block):
        name = unicodedata.name(letter, "").lower()
        picture = draw(letter, font) if name else None
        if picture is not None:
            file = f"{ord(letter):05x}.png"
            picture.save(options.out / file)
            lines.append(json.dumps({"file_name": file, "text": name}) + "\n")
    (options.out / "metadata.jsonl").write_text("".join(lines))
    print(f"{len(lines):,} pictures in {options.out}")


def draw(letter: str, font: ImageFont.FreeTypeFont) -> Picture.Image | None:
    """The letter on white, 136 x 136 pixels; None where the font has no picture of it."""
    drawn = Picture.new("RGBA", (136, 128))
    ImageDraw.Draw(drawn).text((0, 0), letter, font=font, embedded_color=True)
    square = Picture.new("RGBA", (136, 136), "white")
    square.alpha_composite(drawn, (0, 4))
    square = square.convert("RGB")
    colours = square.resize((32, 32)).getcolors(32 * 32)
    return square if len(colours) >= COLOURS else None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
