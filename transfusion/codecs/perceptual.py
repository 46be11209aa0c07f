"""How alike two pictures look: LPIPS (Zhang et al. 2018) and MoCo v2's features, from weights in a local file.

Both networks are written out here, since no weights come with this package and none are ever fetched. A file is safetensors,
or a .pth of which nothing but tensors is read, with the names that the networks' own authors gave: the state dict of
`lpips.LPIPS(net="vgg")`, and that of torchvision's ResNet-50 (a prefix such as `module.encoder_q.` is passed over).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.foreign_weights import get_tensor, load_frozen, read_weights

VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RESNET = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, width
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pictures between 0 and 1


class Perceptual(nn.Module):
    """LPIPS: squared distances of VGG-16's normalised features at five depths, weighed by channel."""

    def __init__(self):
        super().__init__()
        before, self.slices, self.weights = 3, nn.ModuleList(), nn.ParameterList()
        for number, widths in enumerate(VGG):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.slices.append(nn.Sequential(*layers))
            self.weights.append(nn.Parameter(torch.ones(before)))

    @classmethod
    def from_file(cls, path: Path) -> "Perceptual":
        """ValueError when the file is missing or does not hold it."""
        found = read_weights(path)
        own, state, number = cls(), {}, 0  # number: of the layer in the whole of VGG, as their names have it
        for n, part in enumerate(own.slices):
            for layer, module in enumerate(part):
                for what in ("weight", "bias") if isinstance(module, nn.Conv2d) else ():
                    state[f"slices.{n}.{layer}.{what}"] = get_tensor(found, f"net.slice{n + 1}.{number}.{what}", path)
                number += 1
            state[f"weights.{n}"] = get_tensor(found, f"lin{n}.model.1.weight", path).view(-1)
        return load_frozen(own, state, path)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Pictures (N, 3, Y, X) between -1 and 1 -> how unlike each pair is, (N,)."""
        mean, deviation = one.new_tensor((-0.030, -0.088, -0.188)), one.new_tensor((0.458, 0.448, 0.450))
        x = torch.cat([one, other]).sub(mean[:, None, None]).div(deviation[:, None, None])  # LPIPS' own scale
        distance = 0.0
        for part, weight in zip(self.slices, self.weights, strict=True):
            x = part(x)
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            distance = distance + ((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2))
        return distance


class Identity(nn.Module):
    """The paper's L_ID: distances of the features of MoCo v2's ResNet-50 after each of its four stages."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for number, (blocks, width) in enumerate(RESNET, 1):
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(before, width, stride=2 if number > 1 and not block else 1))
                before = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*layers))

    @classmethod
    def from_file(cls, path: Path) -> "Identity":
        """ValueError when the file is missing or does not hold it."""
        found, own = read_weights(path), cls()
        first = min((name for name in found if name.endswith("conv1.weight")), key=len, default="conv1.weight")
        prefix = first.removesuffix("conv1.weight")
        names = [name for name in own.state_dict() if not name.endswith("num_batches_tracked")]
        return load_frozen(own, {name: get_tensor(found, prefix + name, path) for name in names}, path)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Pictures (N, 3, Y, X) between -1 and 1 -> how unlike each pair is, (N,)."""
        mean, deviation = one.new_tensor(MEAN), one.new_tensor(DEVIATION)
        x = torch.cat([one, other]).add(1).div(2).sub(mean[:, None, None]).div(deviation[:, None, None])
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        distance = 0.0
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            a, b = F.normalize(x, dim=1).chunk(2)
            distance = distance + (a - b).square().sum(1).mean((1, 2))
        return distance


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample = None
        if before != after or stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.bn1(self.conv1(x)))
        inside = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(inside)))))
        return F.relu(inside + (x if self.downsample is None else self.downsample(x)))
