"""Weights for Inception without any chance, so that its features can be compared with recorded ones of pytorch-fid's."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor for each name, of waves whose length follows from the name; of a size that keeps signals alive."""
    found = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        wave = np.sin(np.arange(1, count + 1, dtype=np.float64) * (1 + len(name) / 10) ** 2).reshape(shape)
        match name.rpartition(".")[2]:
            case "weight" if len(shape) > 1:
                wave *= 2 / math.sqrt(math.prod(shape[1:]))
            case "weight" | "running_var":
                wave = 1 + 0.3 * wave
            case "num_batches_tracked":
                wave = wave * 0
            case _:
                wave *= 0.1
        found[name] = torch.tensor(wave, dtype=torch.int64 if name.endswith("tracked") else torch.float32)
    return found


def pictures() -> list[np.ndarray]:
    """Three of different sizes, one of them larger than what Inception sees."""
    found = []
    for height, width in ((32, 32), (20, 50), (310, 330)):
        y, x, c = np.ogrid[:height, :width, :3]
        found.append((127.5 + 127 * np.sin(0.31 * x + 0.17 * y * (1 + c) + c)).astype(np.uint8))
    return found
