"""Files for tests: captioned images, JSON lines of text."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 70), "blue": (50, 80, 240), "white": (250, 250, 250)}


def picture(number: int, width: int = 16, height: int = 16) -> tuple[str, np.ndarray]:
    """A caption and its image (height, width, 3) uint8: two colours, one above the other."""
    names = list(COLOURS)
    upper, lower = names[number % 4], names[number // 4 % 4]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2], pixels[height // 2 :] = COLOURS[upper], COLOURS[lower]
    pixels[number % height, number // height % width] = number % 256  # makes every image different
    return f"{upper} above {lower}, number {number}", pixels


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    PILImage.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def inline(pixels: np.ndarray) -> str:
    """The image as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def write_lines(path: Path, records: Sequence[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_photos(folder: Path, count: int, width: int = 16, height: int = 16) -> Path:
    """A folder of captioned images, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        caption, pixels = picture(number, width, height)
        (folder / f"{number:04d}.png").write_bytes(png(pixels))
        records.append({"file_name": f"{number:04d}.png", "text": caption})
    write_lines(folder / "metadata.jsonl", records)
    return folder


def write_texts(path: Path, count: int) -> Path:
    """JSON lines of texts, of very different lengths."""
    words = "the of a red blue green small large circle over under two three four".split()
    rng = np.random.default_rng(0)
    return write_lines(path, [{"text": " ".join(rng.choice(words, 1 + n % 7 * 9))} for n in range(count)])
