"""Image edits: how near an edited image is to its target (PSNR). The paper's section 4.5 only shows examples."""

import numpy as np

from transfusion.data.loader import Source
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.scenes import draw
from transfusion.inference.engine import Engine, Request


def is_edit(raw: RawDocument) -> bool:
    """Is the document an image without loss, an instruction, and the edited image?"""
    first, *instruction, last = raw.segments if len(raw.segments) > 2 else (None, None)
    return (
        isinstance(first, RawImage) and not first.loss and isinstance(last, RawImage) and last.loss
        and all(isinstance(part, RawText) for part in instruction)  # in a conversation several
    )  # fmt: skip


def edit_heldout(engine: Engine, source: Source, count: int, seed: int = 0) -> dict:
    """Draw the first `count` held-out edits: mean PSNR (dB) of the drawings and of the source images to the targets, and the
    share of drawings that are nearer to the target than the source image."""
    edits = [raw for raw in (source[n] for n in range(min(count, len(source)))) if is_edit(raw)]
    requests = [
        Request(tuple(map(_to_part, raw.segments[:-1])), 1, seed + n, size=raw.segments[-1].pixels.shape[1::-1])
        for n, raw in enumerate(edits)
    ]
    drawn = draw(engine, requests)
    drawn_psnr = np.array([psnr(pixels, raw.segments[-1].pixels) for pixels, raw in zip(drawn, edits, strict=True)])
    source_psnr = np.array([psnr(raw.segments[0].pixels, raw.segments[-1].pixels) for raw in edits])
    return {
        "psnr": float(drawn_psnr.mean()), "psnr_of_source": float(source_psnr.mean()),
        "nearer": float((drawn_psnr > source_psnr).mean()), "count": len(edits),
    }  # fmt: skip


def _to_part(part: RawImage | RawText) -> np.ndarray | str:
    return part.text if isinstance(part, RawText) else part.pixels


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB, at most 100 (equal images). 0 if their sizes differ."""
    if a.shape != b.shape:
        return 0.0
    error = np.square(a.astype(np.float64) - b).mean()
    return min(100.0, 10 * np.log10(255**2 / error)) if error else 100.0
