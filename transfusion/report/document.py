"""What a run does: one held-out document as the model reads it, and its attention mask."""

from dataclasses import replace

import numpy as np

from transfusion.data.loader import DocumentEncoder, Source
from transfusion.inference.engine import Engine
from transfusion.page import Cell, Page
from transfusion.report.material import Material
from transfusion.sequence import NO_TARGET, Chunk, Document, encode_document

ORANGE, BLUE = (222, 139, 62), (88, 134, 236)  # legible on light and dark pages
LEGEND = {"causal: itself and earlier positions": ORANGE, "bidirectional: all patches of the same image": BLUE}
PREDICTION = {
    "epsilon": "the noise in it", "x0": "the patch without noise",
    "velocity": "its velocity (alpha * noise - sigma * x0 on the cosine schedule, noise - x0 on rectified flow)",
}  # fmt: skip


def add_description(page: Page, material: Material) -> None:
    """What the model does, one document as the model reads it, and the attention mask."""
    engine = material.engine
    page.heading("What this is")
    page.paragraph(
        "Transfusion is one transformer for sequences of text and images. At a text position it predicts the next token. At "
        "an image position it reads a patch with noise added and learns to separate image and noise. The same weights write "
        "text, draw an image from a caption, and caption an image."
    )
    if not material.pictured:
        return
    chunk = encode_document(_short_document(engine, material.pictured[0]), engine.vocabulary)
    weight, target = engine.run.training.image_weight, PREDICTION[engine.run.diffusion.prediction]
    page.paragraph("A held-out document of this run, position by position. Above: the input. Below: the target of the loss.")
    page.sequence(_cells(engine, chunk))
    page.paragraph(
        "Orange is the text loss, for the next token: `bos` and `eos` delimit the document, `boi` and `eoi` the image. "
        "Blue is the image loss. Patches are shown without noise; in training noise is added, and the model predicts for "
        f"each patch {target}. Training minimises text loss + {weight:g} * image loss."
    )
    if engine.run.model.image_attention == "bidirectional":
        page.matrix(
            _attention(engine, chunk), ("query position", "key position"), LEGEND,
            "The attention mask of this document: the positions (keys) that each position (query) attends to. Empty cells "
            "are masked. Patches of an image attend in both directions, because an image has no order.",
            f"Attention mask of {len(chunk)} positions: a lower triangle, and a full square at the image",
        )  # fmt: skip


def _short_document(engine: Engine, source: Source) -> Document:
    """The shortest of the first 32 held-out documents, caption first."""
    opened, options = engine.opened, replace(engine.run.data, image_first=0.0, caption_dropout=0.0)
    encoder = DocumentEncoder(opened.tokenizer, opened.codec, engine.vocabulary, options, engine.run.training.seed)
    documents = [encoder.to_document(source[n], source.name, 0) for n in range(min(32, len(source)))]
    return min(documents, key=lambda document: len(encode_document(document, engine.vocabulary)))


def _cells(engine: Engine, chunk: Chunk) -> list[Cell]:
    """One cell for each position; the patches of an image share one."""
    vocabulary, codec = engine.vocabulary, engine.opened.codec
    images = {placed.start: placed.image for placed in chunk.images}
    cells, n = [], 0
    while n < len(chunk):
        if n in images:
            pixels, side = codec.decode(images[n].content), vocabulary.patch_size * codec.downsampling
            has_loss = images[n].loss and images[n].max_t > 0
            target = f"{engine.run.diffusion.prediction} of each patch" if has_loss else ""
            cells.append(Cell(_tiles(pixels, side), target, "image", "image"))
            n += vocabulary.num_patches(images[n].shape)
        else:
            token, target_token = int(chunk.tokens[n]), int(chunk.targets[n])
            target = "" if target_token == NO_TARGET else _token_name(engine, target_token)
            cells.append(Cell(_token_name(engine, token), target, "plain" if token in _markers(engine) else "text"))
            n += 1
    return cells


def _tiles(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    """The image (Y, X, channels) in squares, row by row."""
    Y, X = pixels.shape[:2]
    return [pixels[y : y + side, x : x + side] for y in range(0, Y, side) for x in range(0, X, side)]


def _token_name(engine: Engine, token: int) -> str:
    """The name of a token on the page."""
    if engine.vocabulary.first_code <= token < engine.vocabulary.num_used:
        return f"code {token - engine.vocabulary.first_code}"
    return _markers(engine).get(token) or engine.opened.tokenizer.decode([token]).replace(" ", "\u2423")


def _markers(engine: Engine) -> dict[int, str]:
    vocabulary = engine.vocabulary
    ends = {vocabulary.bos: "bos", vocabulary.eos: "eos", vocabulary.eoi: "eoi"}
    return ends | dict.fromkeys(vocabulary.boi.values(), "boi")


def _attention(engine: Engine, chunk: Chunk) -> np.ndarray:
    """(L, L, 4) uint8: row q, column k is coloured where query q attends to key k, else transparent."""
    mask = np.zeros((len(chunk), len(chunk), 4), np.uint8)
    mask[np.tri(len(chunk), dtype=bool)] = (*ORANGE, 255)
    for placed in chunk.images:
        image = slice(placed.start, placed.start + engine.vocabulary.num_patches(placed.image.shape))
        mask[image, image] = (*BLUE, 255)
    return mask
