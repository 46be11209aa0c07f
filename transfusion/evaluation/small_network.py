"""Image features without pretrained weights: a small network that learns to predict caption words from images.

For small runs and machines without network access. Its scores rank runs on one data set; they are not comparable with
published FIDs.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.evaluation.cider import split_words
from transfusion.seeding import derive_seed

IMAGE_SIZE = 32  # images are resized to it
NUM_FEATURES = 48
MAX_WORDS = 256  # words and word pairs that are predicted
NUM_DEGRADATIONS = 4  # warp, blur, fade, noise
WARP_GRID, WARP_STD = 8, 1.5  # random displacements per side, interpolated; their standard deviation in pixels
WORD_WEIGHT = 2.0  # of the word loss; with less, degradations are learnt first and words late
STEPS, BATCH_SIZE, LEARNING_RATE = 1_000, 48, 1e-2  # after 400 steps it does not tell the shapes of `shapes` apart


class SmallFeatureNetwork:
    """Images (Y, X, 1 or 3) uint8 of any sizes -> features (N, 48) float32, mean 0 and std 1 on the training images.

    It predicts which words and word pairs ("red circle") an image's caption has, and how much the image was warped, blurred,
    faded and made noisy. So its features measure content and image quality, but little that captions do not mention. Images,
    captions and seed determine it.
    """

    num_features = NUM_FEATURES

    def __init__(self, source: str, images: Sequence[np.ndarray], captions: Sequence[str], seed: int = 0):
        """Train on pairs of the data set `source`, on one CPU. ValueError if the captions have the same words."""
        targets, vocabulary = _word_targets(captions)
        if not vocabulary:
            raise ValueError(f"the captions of {source} do not differ in their words: a small network has nothing to learn")
        self.name = f"small network of {source} ({len(images)} pictures, {STEPS} steps, seed {seed})"
        self.vocabulary = vocabulary
        pixels = torch.cat([_preprocess(image) for image in images])  # (N, 3, 32, 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("small network", seed))
            self.body = _build_body()
            self.head = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, len(vocabulary) + NUM_DEGRADATIONS))
            self._train(pixels, targets)
        self.body.eval().requires_grad_(False)
        self.mean, self.std = torch.zeros(NUM_FEATURES), torch.ones(NUM_FEATURES)
        features = torch.from_numpy(self(images))  # (N, 48)
        self.mean, self.std = features.mean(0), features.std(0)

    def _train(self, pixels: Tensor, targets: Tensor) -> None:
        """pixels (N, 3, 32, 32), targets (N, words)."""
        parameters = [*self.body.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(pixels), (BATCH_SIZE,))  # (B,)
            degraded, strengths = _degrade(pixels[rows])  # (B, 3, 32, 32), (B, 3)
            output = self.head(self.body(degraded))  # (B, words + 3)
            words, predicted = output.split([targets.shape[1], NUM_DEGRADATIONS], 1)  # (B, words), (B, 3)
            word_loss = F.binary_cross_entropy_with_logits(words, targets[rows])
            loss = WORD_WEIGHT * word_loss + F.mse_loss(predicted, strengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images -> features."""
        features = [np.empty((0, NUM_FEATURES), np.float32)]
        for first in range(0, len(images), 256):
            batch = torch.cat([_preprocess(image) for image in images[first : first + 256]])  # (N, 3, 32, 32)
            features.append(((self.body(batch) - self.mean) / self.std).numpy())  # (N, 48)
        return np.concatenate(features)

    @torch.inference_mode()
    def predict_words(self, images: Sequence[np.ndarray]) -> list[set[str]]:
        """The words and word pairs with a probability above 0.5, for each image."""
        is_likely = self.head(torch.from_numpy(self(images)) * self.std + self.mean) > 0  # (N, words + 3)
        return [{self.vocabulary[n] for n in np.flatnonzero(row[: len(self.vocabulary)])} for row in is_likely.numpy()]


def _build_body() -> nn.Sequential:
    """(N, 3, 32, 32) -> (N, 48). No spatial pooling: words such as "above" need positions."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in ((3, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, NUM_FEATURES))


def _degrade(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A quarter of the images (B, 3, 32, 32) unchanged, the others with each degradation half of the time; and the strength
    of each, (B, 4)."""
    size = len(pixels), NUM_DEGRADATIONS
    strengths = torch.rand(size) * (torch.rand(size) < 0.5) * (torch.rand(len(pixels), 1) < 0.75)  # (B, 4)
    warp, blur, fade, noise = strengths[..., None, None, None].unbind(1)  # (B, 1, 1, 1) each
    shifts = F.interpolate(torch.randn(len(pixels), 2, WARP_GRID, WARP_GRID), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    shifts = shifts * warp * WARP_STD * 2 / IMAGE_SIZE  # (B, 2, 32, 32) in units of half an image
    grid = F.affine_grid(torch.eye(2, 3).expand(len(pixels), 2, 3), pixels.shape, align_corners=False)  # (B, 32, 32, 2)
    warped = F.grid_sample(pixels, grid + shifts.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    smooth = F.interpolate(F.avg_pool2d(warped, 4), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")  # (B, 3, 32, 32)
    return warped.lerp(smooth, blur) * (1 - fade / 2) + noise * torch.randn_like(pixels) / 2, strengths


def _preprocess(pixels: np.ndarray) -> Tensor:
    """(Y, X, 1 or 3) uint8 -> (1, 3, 32, 32) between -1 and 1, with antialiasing."""
    x = torch.tensor(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).float() / 127.5 - 1  # (1, 3, Y, X)
    return F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True)


def _word_targets(captions: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The words and word pairs of each caption, (N, words) of 0 and 1, and their list: the most frequent ones that are not
    in every caption."""
    terms = [{*words, *map(" ".join, zip(words, words[1:], strict=False))} for words in map(split_words, captions)]
    counts = Counter(term for caption in terms for term in caption)
    varying = sorted((term for term, count in counts.items() if count < len(terms)), key=lambda term: (-counts[term], term))
    varying = varying[:MAX_WORDS]
    return torch.tensor([[float(term in caption) for term in varying] for caption in terms]).view(len(terms), -1), varying
