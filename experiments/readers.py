"""Contact sheets of pictures for readers, who label them without knowing where they come from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 5, 4
TITLE, GAP = 22, 40  # pixels above and between the pictures


def write_sheets(images: Sequence[np.ndarray], titles: Sequence[str], folder: Path, side: int, thirds: bool = False) -> None:
    """FOLDER/sheet-NN.png, twenty pictures (Y, X, 3) uint8 on each, `side` pixels wide. `thirds`: marks at the thirds."""
    folder.mkdir(parents=True, exist_ok=True)
    font = ImageFont.load_default(13)
    for sheet, first in enumerate(range(0, len(images), COLUMNS * ROWS), 1):
        page = Image.new("RGB", (COLUMNS * (side + GAP), ROWS * (side + TITLE + 12)), "white")
        pen = ImageDraw.Draw(page)
        for n, (image, title) in enumerate(list(zip(images, titles, strict=True))[first : first + COLUMNS * ROWS]):
            x, y = n % COLUMNS * (side + GAP) + GAP // 2, n // COLUMNS * (side + TITLE + 12) + TITLE
            pen.text((x - 16, y - TITLE + 2), title, "black", font)
            page.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (x, y))
            for at in (side // 3, 2 * side // 3) if thirds else ():
                for edge in (-6, side + 1):
                    pen.line((x + at, y + edge, x + at, y + edge + 5), "black")
                    pen.line((x + edge, y + at, x + edge + 5, y + at), "black")
        page.save(folder / f"sheet-{sheet:02}.png", optimize=True)
