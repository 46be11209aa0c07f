"""Images as codes, the paper's baseline (Chameleon, 2405.09818): sampled one after another, row by row, like text tokens.

Classifier-free guidance works on logits: the branches of `image_mode` share the codes of the image and differ in the prompt.
Only codes can be sampled, with the temperature and top_p of text.
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
from transfusion.sequence import EMPTY_CHUNK, Vocabulary

GREY = 128  # pixels of codes that are not sampled yet
# Generation options without effect on codes.
DIFFUSION_OPTIONS = frozenset({"sampler", "steps", "t_shift", "guidance_interval", "guidance_rescale", "clip_x0"})


@dataclass
class CodeImageState:
    """An unfinished image, and its guidance branches, which have not yet read its last token, `pending`."""

    shape: tuple[int, int]
    branches: tuple[Branch, ...]  # the fully conditional one first
    generation: GenerationConfig
    generator: torch.Generator
    vocabulary: Vocabulary
    pending: int
    codes: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Sampled codes."""
        return len(self.codes)

    @property
    def num_cached_positions(self) -> int:
        """Positions of the image in the branches' slots, boi included."""
        return len(self.codes)

    def advance(self, predictions: Sequence[torch.Tensor]) -> None:
        """Sample the next code from the logits (V,) of the branches."""
        guided = guide(predictions, [branch.scale for branch in self.branches])  # (V,)
        first, end = self.vocabulary.first_code, self.vocabulary.num_used
        is_code = torch.zeros(len(guided), dtype=torch.bool)  # (V,)
        is_code[first:end] = True
        self.pending = text_mode.sample_token(guided, is_code, self.generation, self.generator)
        self.codes.append(self.pending - first)

    def content(self) -> np.ndarray | None:
        """The finished grid of codes (Y, X); None before."""
        Y, X = self.shape
        return np.array(self.codes).reshape(Y, X) if len(self.codes) == Y * X else None

    def preview(self, codec: VQ) -> tuple[np.ndarray, np.ndarray]:
        """The sampled codes as pixels, the rest grey, (Y, X, channels) uint8; twice, as there is no other estimate."""
        Y, X = self.shape
        grid = np.array(self.codes + [0] * (Y * X - len(self.codes))).reshape(Y, X)
        is_sampled = np.arange(Y * X).reshape(Y, X) < len(self.codes)
        is_sampled = is_sampled.repeat(codec.downsampling, 0).repeat(codec.downsampling, 1)[..., None]
        pixels = np.where(is_sampled, codec.decode(grid), GREY).astype(np.uint8)
        return pixels, pixels


def begin_image(
    shape: tuple[int, int], branches: Sequence[Branch], generation: GenerationConfig, vocabulary: Vocabulary, cache: Cache,
    seed: int,
) -> CodeImageState:  # fmt: skip
    """An image (Y, X) without codes. The boi is removed from every slot; the next pass reads it for its logits."""
    for branch in branches:
        cache.truncate(branch.slot, 1)
    generator = torch.Generator().manual_seed(seed)
    return CodeImageState(shape, tuple(branches), generation, generator, vocabulary, vocabulary.boi[shape])


def predict_branches(
    model: Transfusion, cache: Cache, images: Sequence[CodeImageState], vocabulary: Vocabulary
) -> list[list[torch.Tensor]]:
    """One forward pass for all images: the logits (V,) of all branches of each, on the CPU."""
    slots = [branch.slot for image in images for branch in image.branches]
    chunks = [EMPTY_CHUNK.append(image.pending) for image in images for _ in image.branches]
    logits = iter(text_mode.extend_cache(model, cache, slots, chunks, vocabulary).cpu())  # (branches of all, V)
    return [[next(logits) for _ in image.branches] for image in images]
