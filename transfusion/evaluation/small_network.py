"""Features without anyone's weights: a small network that learns to tell a data set's captions from its pictures.

For small runs and for machines without a net. Its figures rank runs on one data set; they are no FID that anyone publishes.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.evaluation.cider import words_of
from transfusion.seeding import derive_seed

SIDE = 32  # pictures are brought to this size
FEATURES = 48
MOST = 256  # words and pairs of words that are learnt
FAULTS = 3  # kinds of faults that pictures get
WORDS = 2.0  # weight of the loss on words: with less, faults are learnt first and words late
STEPS, ROWS, RATE = 400, 48, 1e-2


class SmallNetwork:
    """Pictures (Y, X, 1 or 3) uint8 of any sizes -> features (N, 48) float32, of mean 0 and deviation 1 where it learnt.

    It learns which words, and which two words in a row ("red circle"), the caption of a picture has, and how blurred, pale
    and noisy a picture was made: so features tell what matters in this data, and whether it is drawn well. Of what captions
    never say they know little. Everything follows from pictures, captions and seed.
    """

    features = FEATURES

    def __init__(self, source: str, pictures: Sequence[np.ndarray], captions: Sequence[str], seed: int = 0):
        """Trained on pairs of the data set of this name, on one CPU. ValueError when captions do not differ."""
        said, vocabulary = _said(captions)
        if not vocabulary:
            raise ValueError(f"the captions of {source} do not differ in their words: a small network has nothing to learn")
        self.name = f"small network of {source} ({len(pictures)} pictures, {STEPS} steps, seed {seed})"
        self.vocabulary = vocabulary
        pixels = torch.cat([_prepared(picture) for picture in pictures])  # (N, 3, 32, 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("small network", seed))
            self.body, self.head = _body(), nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, len(vocabulary) + FAULTS))
            self._learn(pixels, said)
        self.body.eval().requires_grad_(False)
        self.mean, self.std = torch.zeros(FEATURES), torch.ones(FEATURES)
        found = torch.from_numpy(self(pictures))  # (N, 48)
        self.mean, self.std = found.mean(0), found.std(0)

    def _learn(self, pixels: Tensor, said: Tensor) -> None:
        """pixels (N, 3, 32, 32), said (N, words)."""
        parameters = [*self.body.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(pixels), (ROWS,))  # (B,)
            seen, faults = _spoilt(pixels[rows])  # (B, 3, 32, 32), (B, 3)
            words, guessed = self.head(self.body(seen)).split([said.shape[1], FAULTS], 1)  # (B, words), (B, 3)
            loss = WORDS * F.binary_cross_entropy_with_logits(words, said[rows]) + F.mse_loss(guessed, faults)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures -> features."""
        found = [np.empty((0, FEATURES), np.float32)]
        for first in range(0, len(pictures), 256):
            batch = torch.cat([_prepared(picture) for picture in pictures[first : first + 256]])  # (N, 3, 32, 32)
            found.append(((self.body(batch) - self.mean) / self.std).numpy())  # (N, 48)
        return np.concatenate(found)

    @torch.inference_mode()
    def guess(self, pictures: Sequence[np.ndarray]) -> list[set[str]]:
        """What it takes the captions of pictures to say: how far it learnt, and what features are of."""
        sure = self.head(torch.from_numpy(self(pictures)) * self.std + self.mean) > 0  # (N, words + 3)
        return [{self.vocabulary[n] for n in np.flatnonzero(row[: len(self.vocabulary)])} for row in sure.numpy()]


def _body() -> nn.Sequential:
    """(N, 3, 32, 32) -> (N, 48). Where things are is kept, for the sake of words such as "above"."""
    layers: list[nn.Module] = []
    for before, after in ((3, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES))


def _spoilt(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the pictures (B, 3, 32, 32) as they are, half blurred, paled and noisy, and how much of each, (B, 3)."""
    faults = torch.rand(len(pixels), FAULTS) * (torch.rand(len(pixels), 1) < 0.5)  # (B, 3)
    blur, pale, noise = faults[..., None, None, None].unbind(1)  # (B, 1, 1, 1) each
    smooth = F.interpolate(F.avg_pool2d(pixels, 4), (SIDE, SIDE), mode="bilinear")  # (B, 3, 32, 32)
    return (pixels.lerp(smooth, blur) * (1 - pale / 2) + noise * torch.randn_like(pixels) / 2), faults


def _prepared(pixels: np.ndarray) -> Tensor:
    """(Y, X, 1 or 3) uint8 -> (1, 3, 32, 32) between -1 and 1, smoothed where it gets smaller."""
    x = torch.tensor(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).float() / 127.5 - 1  # (1, 3, Y, X)
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def _said(captions: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Which words and pairs of words each caption has, (N, words) of 0 and 1, and which these are: the most frequent ones
    among those that some have and some do not."""
    cut = [{*words, *map(" ".join, zip(words, words[1:], strict=False))} for words in map(words_of, captions)]
    counts = Counter(word for words in cut for word in words)
    telling = sorted((word for word, count in counts.items() if count < len(cut)), key=lambda word: (-counts[word], word))
    telling = telling[:MOST]
    return torch.tensor([[float(word in words) for word in telling] for words in cut]).view(len(cut), -1), telling
