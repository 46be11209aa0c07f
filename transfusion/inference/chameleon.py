"""Drawing with codes, as the paper's baseline does (Chameleon, 2405.09818): one after the other, row by row, like text.

Guidance is image mode's, with its branches, on logits instead of predictions: each branch has read the same codes of the
image behind more or less of the prompt. Only codes can be chosen, at the temperature and top_p of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from transfusion.codecs.vq import VQ
from transfusion.config import GenerationConfig
from transfusion.inference import text_mode
from transfusion.inference.cache import Cache
from transfusion.inference.image_mode import Branch, guide
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import NOTHING, Vocabulary

GREY = 128  # of what is not drawn yet
OF_NOISE = frozenset({"sampler", "steps", "shift", "guidance_interval", "guidance_rescale", "clip_clean"})  # no use here


@dataclass
class Drawing:
    """An image on its way, and the branches that guide it. They are yet to read its last token, `unread`."""

    shape: tuple[int, int]
    branches: tuple[Branch, ...]  # what has read everything comes first, then ever less
    generation: GenerationConfig
    generator: torch.Generator
    unread: int
    codes: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Codes that are chosen."""
        return len(self.codes)

    @property
    def kept(self) -> int:
        """Positions that the branches hold of the image, boi included."""
        return len(self.codes)

    def content(self) -> np.ndarray | None:
        """The grid of codes (Y, X); None while it is not finished."""
        Y, X = self.shape
        return np.array(self.codes).reshape(Y, X) if len(self.codes) == Y * X else None

    def preview(self, codec: VQ) -> tuple[np.ndarray, np.ndarray]:
        """What is drawn so far, the rest grey, (Y, X, colours) uint8. Nothing else is known of it, so it comes twice."""
        Y, X = self.shape
        grid = np.array(self.codes + [0] * (Y * X - len(self.codes))).reshape(Y, X)
        drawn = np.arange(Y * X).reshape(Y, X) < len(self.codes)
        inside = drawn.repeat(codec.scale, 0).repeat(codec.scale, 1)[..., None]
        pixels = np.where(inside, codec.decode(grid), GREY).astype(np.uint8)
        return pixels, pixels


def begin(
    shape: tuple[int, int], branches: Sequence[Branch], generation: GenerationConfig, vocabulary: Vocabulary, cache: Cache,
    seed: int,
) -> Drawing:  # fmt: skip
    """An image (Y, X) that is yet to begin. All branches have read its boi; they read it once more, for its logits."""
    for branch in branches:
        cache.advance(branch.slot, -1)
    generator = torch.Generator().manual_seed(seed)
    return Drawing(shape, tuple(branches), generation, generator, vocabulary.boi[shape])


def write(model: Transfusion, cache: Cache, drawings: Sequence[Drawing], vocabulary: Vocabulary) -> None:
    """The next code of every drawing: all branches of all of them in one forward pass."""
    read = [(branch.slot, NOTHING.followed_by(drawing.unread)) for drawing in drawings for branch in drawing.branches]
    slots, pieces = zip(*read, strict=True)
    logits = iter(text_mode.read(model, cache, list(slots), pieces, vocabulary).cpu())  # (branches of all, V)
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[vocabulary.first_code : vocabulary.used] = True
    for drawing in drawings:
        said = [next(logits) for _ in drawing.branches]  # (V,) each
        guided = guide(said, [branch.scale for branch in drawing.branches])
        drawing.unread = text_mode.choose(guided, allowed, drawing.generation, drawing.generator)
        drawing.codes.append(drawing.unread - vocabulary.first_code)
