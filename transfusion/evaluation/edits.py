"""Edits: does a picture that is changed by words come nearer to what they ask for? (The paper, section 4.5, only looks.)"""

import numpy as np

from transfusion.data.loader import Source
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.scenes import draw
from transfusion.inference.engine import Engine, Request


def is_edit(raw: RawDocument) -> bool:
    """A picture without loss, words, and the picture that comes of it."""
    kinds = tuple(type(part) for part in raw.segments)
    return kinds == (RawImage, RawText, RawImage) and not raw.segments[0].loss and raw.segments[2].loss


def edit_heldout(engine: Engine, source: Source, count: int, seed: int = 0) -> dict:
    """The first `count` held-out edits, drawn: how near a drawing is to the picture that was asked for, beside how near the
    picture was that it began from (PSNR in dB, means), and the share of drawings that are nearer.
    """
    edits = [raw for raw in (source[n] for n in range(min(count, len(source)))) if is_edit(raw)]
    requests = [
        Request(tuple(_shown(part) for part in raw.segments[:2]), 1, seed + n, size=raw.segments[2].pixels.shape[1::-1])
        for n, raw in enumerate(edits)
    ]
    drawn = draw(engine, requests)
    ours = np.array([psnr(pixels, raw.segments[2].pixels) for pixels, raw in zip(drawn, edits, strict=True)])
    theirs = np.array([psnr(raw.segments[0].pixels, raw.segments[2].pixels) for raw in edits])
    return {
        "psnr": float(ours.mean()), "psnr_of_source": float(theirs.mean()), "nearer": float((ours > theirs).mean()),
        "count": len(edits),
    }  # fmt: skip


def _shown(part: RawImage | RawText) -> np.ndarray | str:
    return part.text if isinstance(part, RawText) else part.pixels


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of two pictures of uint8, in dB; at most 100, where they are the same. 0 where they are of different sizes."""
    if one.shape != other.shape:
        return 0.0
    error = np.square(one.astype(np.float64) - other).mean()
    return min(100.0, 10 * np.log10(255**2 / error)) if error else 100.0
