"""Images as codes, the paper's baseline (Chameleon, 2405.09818): sampled one after another, row by row, like text tokens.

Classifier-free guidance works on logits: the branches of `image_mode` share the codes of the image and differ in the prompt.
Only codes can be sampled, with the temperature and top_p of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from transfusion.codecs.vq import VQ
from transfusion.config import GenerationConfig
from transfusion.inference import text_mode
from transfusion.inference.cache import Cache
from transfusion.inference.image_mode import Branch, BranchRows
from transfusion.model.transfusion import Transfusion
from transfusion.seeding import derive_seed
from transfusion.sequence import EMPTY_CHUNK, Chunk, Vocabulary, grid_offsets

GREY = 128  # pixels of codes that are not sampled yet
# Generation options without effect on codes.
DIFFUSION_OPTIONS = frozenset({"sampler", "steps", "t_shift", "guidance_interval", "guidance_rescale", "clip_x0"})


@dataclass
class CodeImageState:
    """An unfinished image, and its guidance branches, which have not yet read its last token, `pending`."""

    shape: tuple[int, int]
    branches: tuple[Branch, ...]  # the fully conditional one first
    generation: GenerationConfig
    seed: int  # of its codes
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

    @property
    def chunk(self) -> Chunk:
        """The next input: `pending`, which is the boi or a code, as a position."""
        return EMPTY_CHUNK.append(self.pending, grid_offsets(*self.shape)[self.step - 1] if self.codes else (0, 0))

    def advance(self, sampled: tuple[int, int]) -> None:
        """Continue with the next token and its code."""
        self.pending, code = sampled
        self.codes.append(code)

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
    return CodeImageState(shape, tuple(branches), generation, seed, vocabulary.boi[shape])


def sample_codes(
    model: Transfusion, cache: Cache, images: Sequence[CodeImageState], vocabulary: Vocabulary
) -> list[tuple[int, int]]:
    """One forward pass for all branches of all images: the next token of each image, and its code."""
    rows = BranchRows([image.branches for image in images])
    chunks = [images[n].chunk for n in rows.images]
    logits = text_mode.extend_cache(model, cache, rows.slots, chunks, vocabulary)  # (B, V)
    guided = rows.guide(logits[:, vocabulary.first_code : vocabulary.num_used])  # (N, codes)
    seeds = [derive_seed(image.seed, image.step) for image in images]
    codes = text_mode.sample_tokens(guided.unbind(), [image.generation for image in images], seeds)
    return [(vocabulary.first_code + code, code) for code in codes]
