"""Inception v3 as FID uses it (Szegedy et al. 2015, Heusel et al. 2017): 2,048 features of pictures, by weights in a file.

The network is written out here, since no weights come with this package and none are ever fetched. Its parts have the names
that they have in torchvision and in pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which holds the network of
TensorFlow's that published FIDs are of. It differs from torchvision's in what pools do at a border, and in a maximum for a
mean in its last block. Tests hold its features against pytorch-fid's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.disk import sha256_of
from transfusion.foreign_weights import get_tensor, load_frozen, read_weights

SIDE = 299
CLASSES = 1008  # of the network that published FIDs are of; torchvision's own has 1,000
AT_ONCE = 32  # pictures in one forward pass


class Inception:
    """Pictures (Y, X, 1 or 3) uint8 of any sizes -> features (N, 2048) float32, means over the places of the last block."""

    features = 2048

    def __init__(self, network: "Network", name: str, device: torch.device):
        self.network, self.name, self.device = network.to(device), name, device

    @classmethod
    def from_file(cls, path: Path, device: torch.device) -> "Inception":
        """Named by the first digits of its file's SHA-256. ValueError when the file is missing or holds something else."""
        if not path.is_file():
            raise ValueError(
                f"there are no Inception weights at {path}: put pytorch-fid's pt_inception-2015-12-05-6726825d.pth there,"
                " or the same tensors as .safetensors"
            )
        found, network = read_weights(path), Network()
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        network = load_frozen(network, {name: get_tensor(found, name, path) for name in names}, path)
        name = f"Inception v3 {sha256_of(path)[:8]}"
        if len(found.get("fc.weight", ())) != CLASSES:
            name += ", not the one of published FIDs"
        return cls(network, name, device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """As pytorch-fid prepares them: bilinear to 299x299 without smoothing, whatever their shape, from -1 to 1."""
        found = [np.empty((0, self.features), np.float32)]
        for first in range(0, len(pictures), AT_ONCE):
            batch = torch.cat([_prepared(pixels) for pixels in pictures[first : first + AT_ONCE]])  # (N, 3, 299, 299)
            found.append(self.network(batch.to(self.device)).cpu().numpy())
        return np.concatenate(found)


def _prepared(pixels: np.ndarray) -> Tensor:
    """(Y, X, 1 or 3) uint8 -> (1, 3, 299, 299)."""
    x = torch.tensor(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).float() / 255  # (1, 3, Y, X)
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


class Network(nn.Module):
    """Up to the last block, without the classes."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Fives(192, 32), Fives(256, 64), Fives(288, 64)
        self.Mixed_6a = Halving(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = Sevens(128), Sevens(160), Sevens(160), Sevens(192)
        self.Mixed_7a = HalvingAgain(768)
        self.Mixed_7b, self.Mixed_7c = Fans(1280, _mean), Fans(2048, _largest)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 299, 299) between -1 and 1 -> (N, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (N, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (N, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (N, 2048)


class Convolution(nn.Module):
    """A convolution, its normalisation, and nothing below 0."""

    def __init__(
        self, before: int, after: int, size: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Fives(nn.Module):
    """The blocks of 35x35 places, with convolutions of up to 5x5."""

    def __init__(self, before: int, pooled: int):
        super().__init__()
        self.branch1x1 = Convolution(before, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Convolution(before, 48, 1), Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(before, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), threes, self.branch_pool(_mean(x))], 1)


class Halving(nn.Module):
    """35x35 places to 17x17."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3 = Convolution(before, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(before, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, 2)], 1)


class Sevens(nn.Module):
    """The blocks of 17x17 places, with 7x7 convolutions taken apart into rows and columns."""

    def __init__(self, inner: int):
        super().__init__()
        row, column = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Convolution(768, inner, 1), Convolution(inner, inner, **row)
        self.branch7x7_3 = Convolution(inner, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Convolution(768, inner, 1), Convolution(inner, inner, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Convolution(inner, inner, **row), Convolution(inner, inner, **column)
        self.branch7x7dbl_5 = Convolution(inner, 192, **row)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean(x))], 1)


class HalvingAgain(nn.Module):
    """17x17 places to 8x8."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Convolution(before, 192, 1), Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(before, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        sevens = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(sevens), F.max_pool2d(x, 3, 2)], 1)


class Fans(nn.Module):
    """The blocks of 8x8 places, whose 3x3 convolutions fan out into a row and a column."""

    def __init__(self, before: int, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(before, 320, 1)
        self.branch3x3_1 = Convolution(before, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(before, 448, 1), Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        fans = [self.branch3x3_2a(once), self.branch3x3_2b(once), self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *fans, self.branch_pool(self.pool(x))], 1)


def _mean(x: Tensor) -> Tensor:
    """Of 3x3 places, those outside the picture not counted."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)
