"""The picture of the attention mask with clean copies, in docs/training.md.

    python -m experiments.mask

writes docs/mask.png: a document of two captioned images of four patches, as a run with `--data.clean-copies` reads it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.lab import DOCS
from transfusion.model.mask import packed_mask
from transfusion.report.document import BLUE, ORANGE
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document

GREEN = (64, 160, 96)
LEGEND = {
    "text and clean images: itself and what is before": ORANGE,
    "all patches of the same image": BLUE,
    "a noisy copy: what is before its image, and itself": GREEN,
}
SHAPE = 2, 2
VOCABULARY = Vocabulary.build(num_text_tokens=3, shapes=[SHAPE], patch_size=1)
NAMES = {0: "seven", 1: "one", 2: "and", VOCABULARY.bos: "bos", VOCABULARY.eos: "eos", VOCABULARY.eoi: "eoi",
         VOCABULARY.boi[SHAPE]: "boi"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    out: Path = DOCS / "mask.png"
    """The file to write."""


def main(options: Options) -> None:
    draw(*read_mask(), options.out)
    print(f"wrote {options.out}")


def read_mask() -> tuple[list[str], np.ndarray]:
    """The names of the positions, and (L, L, 4) uint8: the colour of each query and key, transparent where it is masked."""
    image = Image(np.zeros((1, *SHAPE), np.float32))
    document = Document((image, Text((0,)), Text((2,)), image, Text((1,))))
    chunk = encode_document(document, VOCABULARY, clean_copies=True)
    batch = collate([Row((chunk,))], len(chunk), VOCABULARY)
    mask = packed_mask(batch.document_ids, batch.image_ids, clean_starts=batch.clean_starts).dense[0, 0].numpy()
    image_ids, is_copy = batch.image_ids[0].numpy(), batch.clean_starts[0].numpy() >= 0
    is_own_image = (image_ids[:, None] == image_ids) & (image_ids >= 0)
    colours = np.where(is_copy[:, None, None], GREEN, np.where(is_own_image[..., None], BLUE, ORANGE))
    names = [NAMES.get(token, "") for token in chunk.tokens.tolist()] + [""] * int(is_copy.sum())
    for number in range(image_ids.max() + 1):
        patches = np.flatnonzero(image_ids == number)
        kind, letter = ("noisy " if is_copy[patches[0]] else "clean "), "AB"[number % 2]
        names[patches[len(patches) // 2]] = kind + letter
    return names, np.concatenate([colours, 255 * mask[..., None]], -1).astype(np.uint8)


def draw(names: list[str], colours: np.ndarray, path: Path) -> None:
    """Queries downwards, keys to the right."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(7.2, 7.4), layout="constrained", facecolor="#faf9f6")
    axes = figure.subplots()
    axes.imshow(colours)
    positions = range(len(names))
    axes.set_xticks(positions, names, rotation=90)
    axes.set_yticks(positions, names)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.tick_params(length=0)
    axes.set_xticks([n + 0.5 for n in positions], minor=True)
    axes.set_yticks([n + 0.5 for n in positions], minor=True)
    axes.grid(which="minor", color="#e5e3dc", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    handles = [Patch(color=np.array(colour) / 255, label=label) for label, colour in LEGEND.items()]
    figure.legend(handles=handles, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
