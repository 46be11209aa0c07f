"""Perceptual distances of two images: LPIPS (Zhang et al. 2018) and MoCo v2's features, with weights from a local file.

Both networks are defined here. The package contains no weights and never downloads any. A file is safetensors, or a .pth
from which only tensors are read, with the tensor names of the original authors: the state dict of `lpips.LPIPS(net="vgg")`,
and that of torchvision's ResNet-50 (a prefix such as `module.encoder_q.` is ignored).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.foreign_weights import get_tensor, load_frozen, read_weights

VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RESNET = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, width
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]


class LPIPS(nn.Module):
    """Squared distances of VGG-16's normalised features at five depths, weighted by channel."""

    def __init__(self):
        super().__init__()
        in_width, self.slices, self.weights = 3, nn.ModuleList(), nn.ParameterList()
        for number, widths in enumerate(VGG):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for width in widths:
                layers += [nn.Conv2d(in_width, width, 3, padding=1), nn.ReLU()]
                in_width = width
            self.slices.append(nn.Sequential(*layers))
            self.weights.append(nn.Parameter(torch.ones(in_width)))

    @classmethod
    def from_file(cls, path: Path) -> "LPIPS":
        """ValueError when the file is missing or holds other weights."""
        tensors = read_weights(path)
        network, state, vgg_layer = cls(), {}, 0  # vgg_layer: the layer's number in VGG, as in the file's names
        for n, layers in enumerate(network.slices):
            for number, layer in enumerate(layers):
                for name in ("weight", "bias") if isinstance(layer, nn.Conv2d) else ():
                    state[f"slices.{n}.{number}.{name}"] = get_tensor(tensors, f"net.slice{n + 1}.{vgg_layer}.{name}", path)
                vgg_layer += 1
            state[f"weights.{n}"] = get_tensor(tensors, f"lin{n}.model.1.weight", path).view(-1)
        return load_frozen(network, state, path)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (N, 3, Y, X) in [-1, 1] -> the distance of each pair, (N,)."""
        x = _normalise(torch.cat([a, b]), LPIPS_MEAN, LPIPS_STD)
        distance = 0.0
        for layers, weight in zip(self.slices, self.weights, strict=True):
            x = layers(x)
            f_a, f_b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            distance = distance + ((f_a - f_b).square() * weight[:, None, None]).sum(1).mean((1, 2))
        return distance


class IdentityLoss(nn.Module):
    """The paper's L_ID: distances of the features of MoCo v2's ResNet-50 after each of its four stages."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        in_width = 64
        for number, (blocks, width) in enumerate(RESNET, 1):
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(in_width, width, stride=2 if number > 1 and not block else 1))
                in_width = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*layers))

    @classmethod
    def from_file(cls, path: Path) -> "IdentityLoss":
        """ValueError when the file is missing or holds other weights."""
        tensors, network = read_weights(path), cls()
        first = min((name for name in tensors if name.endswith("conv1.weight")), key=len, default="conv1.weight")
        prefix = first.removesuffix("conv1.weight")
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        return load_frozen(network, {name: get_tensor(tensors, prefix + name, path) for name in names}, path)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (N, 3, Y, X) in [-1, 1] -> the distance of each pair, (N,)."""
        x = _normalise(torch.cat([a, b]).add(1).div(2), IMAGENET_MEAN, IMAGENET_STD)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        distance = 0.0
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            f_a, f_b = F.normalize(x, dim=1).chunk(2)
            distance = distance + (f_a - f_b).square().sum(1).mean((1, 2))
        return distance


def _normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return x.sub(x.new_tensor(mean)[:, None, None]).div(x.new_tensor(std)[:, None, None])


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        out_width = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_width, 1, bias=False), nn.BatchNorm2d(out_width)
        self.downsample = None
        if in_width != out_width or stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(in_width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(residual)))))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))
