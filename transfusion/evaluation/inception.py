"""Inception v3 for FID (Szegedy et al. 2015, 1512.00567; Heusel et al. 2017): 2,048 features per image, weights from a file.

The network is defined here because this package contains no weights and downloads none. Modules and blocks (InceptionA to
InceptionE) have torchvision's names, which are also those of pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`: the
TensorFlow network of published FIDs. It differs from torchvision's: average pooling excludes the padding, and the last block
has max instead of average pooling. Tests compare the features with pytorch-fid's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.disk import sha256_of
from transfusion.foreign_weights import get_tensor, load_frozen, read_weights

IMAGE_SIZE = 299
NUM_CLASSES = 1008  # of the network of published FIDs; torchvision's has 1,000
BATCH_SIZE = 32  # images in one forward pass


class InceptionExtractor:
    """Images (Y, X, 1 or 3) uint8 of any sizes -> features (N, 2048) float32, the spatial mean of the last block."""

    num_features = 2048

    def __init__(self, network: "InceptionV3", name: str, device: torch.device):
        self.network, self.name, self.device = network.to(device), name, device

    @classmethod
    def from_file(cls, path: Path, device: torch.device) -> "InceptionExtractor":
        """The name includes the first digits of the file's SHA-256. ValueError if the file is missing or wrong."""
        if not path.is_file():
            raise ValueError(
                f"there are no Inception weights at {path}: put pytorch-fid's pt_inception-2015-12-05-6726825d.pth there,"
                " or the same tensors as .safetensors"
            )
        weights, network = read_weights(path), InceptionV3()
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        network = load_frozen(network, {name: get_tensor(weights, name, path) for name in names}, path)
        name = f"Inception v3 {sha256_of(path)[:8]}"
        if len(weights.get("fc.weight", ())) != NUM_CLASSES:
            name += ", not the one of published FIDs"
        return cls(network, name, device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Preprocessed as in pytorch-fid: bilinear to 299x299 without antialiasing or crop, values from -1 to 1."""
        features = [np.empty((0, self.num_features), np.float32)]
        for first in range(0, len(images), BATCH_SIZE):
            batch = torch.cat([_preprocess(pixels) for pixels in images[first : first + BATCH_SIZE]])  # (N, 3, 299, 299)
            features.append(self.network(batch.to(self.device)).cpu().numpy())
        return np.concatenate(features)


def _preprocess(pixels: np.ndarray) -> Tensor:
    """(Y, X, 1 or 3) uint8 -> (1, 3, 299, 299)."""
    x = torch.tensor(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).float() / 255  # (1, 3, Y, X)
    return 2 * F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False) - 1


class InceptionV3(nn.Module):
    """All blocks, without the classifier."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, _avg_pool), InceptionE(2048, _max_pool)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 299, 299) between -1 and 1 -> (N, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (N, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (N, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (N, 2048)


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionA(nn.Module):
    """35x35 positions: convolutions of up to 5x5."""

    def __init__(self, in_channels: int, pool_features: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = BasicConv2d(in_channels, 48, 1), BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = BasicConv2d(in_channels, 64, 1), BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(_avg_pool(x))], 1)


class InceptionB(nn.Module):
    """35x35 positions to 17x17."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = BasicConv2d(in_channels, 64, 1), BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    """17x17 positions: 7x7 convolutions factorised into 1x7 and 7x1."""

    def __init__(self, in_channels: int, channels_7x7: int):
        super().__init__()
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        c7 = channels_7x7
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = BasicConv2d(in_channels, c7, 1), BasicConv2d(c7, c7, **row)
        self.branch7x7_3 = BasicConv2d(c7, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = BasicConv2d(in_channels, c7, 1), BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = BasicConv2d(c7, c7, **row), BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_5 = BasicConv2d(c7, 192, **row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(_avg_pool(x))], 1)


class InceptionD(nn.Module):
    """17x17 positions to 8x8."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = BasicConv2d(in_channels, 192, 1), BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7x3), F.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    """8x8 positions: parallel 1x3 and 3x1 convolutions in place of 3x3."""

    def __init__(self, in_channels: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = BasicConv2d(in_channels, 448, 1), BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = self.branch3x3_2a(y), self.branch3x3_2b(y), self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z)
        return torch.cat([self.branch1x1(x), *branches, self.branch_pool(self.pool(x))], 1)


def _avg_pool(x: Tensor) -> Tensor:
    """3x3, padding excluded."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)
