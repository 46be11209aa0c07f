"""The convolutional autoencoder: pixels to a latent of 8 channels, f times smaller, and back (section 4.1); and its losses.

The network of VQGAN (Esser et al. 2021), as in Stable Diffusion: with the paper's numbers 86M parameters at f = 8. As a
codec it encodes with the mode of its distribution, never a sample, and gives every channel mean 0 and deviation 1 over the
pictures that its statistics were taken on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.config import from_json
from transfusion.model.conv import Downsample, PixelAttention, ResidualBlock, Upsample, group_norm
from transfusion.seeding import derive_seed

AT_ONCE = 2**22  # pixels in one forward pass of a codec, about: 64 pictures of 256x256
LOGVAR = (-30.0, 20.0)  # bounds of the logarithm of a latent's variance


class AutoencoderOutput(NamedTuple):
    """One pass of a network in training."""

    reconstruction: Tensor  # (N, image_channels, Y, X) what came back
    terms: dict[str, tuple[float, Tensor]]  # what else it learns from than the pictures: weight and value by name
    latents: Tensor | None = None  # (N * Y / f * X / f, C) before a codebook, if it has one
    codes: Tensor | None = None  # (N * Y / f * X / f,) int64, the code of each


class Network(nn.Module):
    """Encoder and decoder. Pictures are (N, image_channels, Y, X) between -1 and 1, moments (N, 2 C, Y / f, X / f)."""

    loss_names = ("KL",)  # of its own, beside those of pictures

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder_of(config, 2 * config.channels), decoder_of(config)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of each picture's latent, (N, C, Y / f, X / f) each."""
        mean, logvar = self.encoder(pictures).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR)

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes back of a sample of each picture's latent, and its moments. noise (N, C, Y / f, X / f)."""
        mean, logvar = self.moments(pictures)
        return self.decoder(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def losses(self, pictures: Tensor, keys: Sequence[int], training: CodecTrainingConfig) -> AutoencoderOutput:
        """Through a sample of each picture's latent, drawn on the CPU from the picture's key, and KL."""
        f = self.config.downsampling
        shape = (self.config.channels, pictures.shape[2] // f, pictures.shape[3] // f)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys]
        noise = torch.stack(drawn).to(pictures.device)  # (N, C, Y / f, X / f)
        made, mean, logvar = self(pictures, noise)  # (N, image_channels, Y, X), (N, C, Y / f, X / f) twice
        # KL is summed over a latent's numbers and set against L1 summed over the picture's, as in latent diffusion.
        return AutoencoderOutput(
            made, {"kl": (training.kl_weight / pictures[0].numel(), kl_divergence(mean, logvar).mean())}
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """The mode of each picture's latent, (N, C, Y / f, X / f)."""
        return self.moments(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, nearly: (N, image_channels, Y, X), not cut to black and white."""
        return self.decoder(latents)


def encoder_of(config: AutoencoderConfig, channels: int) -> nn.Sequential:
    """(N, image_channels, Y, X) -> (N, channels, Y / f, X / f)."""
    widths = [config.width * m for m in config.multipliers]
    return nn.Sequential(
        nn.Conv2d(config.image_channels, widths[0], 3, padding=1), *_down(config, widths), *_middle(config, widths[-1]),
        group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Conv2d(channels, channels, 1),
    )  # fmt: skip


def decoder_of(config: AutoencoderConfig) -> nn.Sequential:
    """(N, C, Y / f, X / f) -> (N, image_channels, Y, X)."""
    widths = [config.width * m for m in config.multipliers]
    return nn.Sequential(
        nn.Conv2d(config.channels, config.channels, 1), nn.Conv2d(config.channels, widths[-1], 3, padding=1),
        *_middle(config, widths[-1]), *_up(config, widths),
        group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], config.image_channels, 3, padding=1),
    )  # fmt: skip


def _down(config: AutoencoderConfig, widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.blocks):
            layers.append(ResidualBlock(before, width))
            before = width
        if level + 1 < len(widths):
            layers.append(Downsample(width, width))
    return layers


def _up(config: AutoencoderConfig, widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.blocks + 1):
            layers.append(ResidualBlock(before, width))
            before = width
        if level:
            layers.append(Upsample(width, width))
    return layers


def _middle(config: AutoencoderConfig, width: int) -> list[nn.Module]:
    attention = [PixelAttention(width)] if config.attention else []
    return [ResidualBlock(width, width), *attention, ResidualBlock(width, width)]


def build_network(config: AutoencoderConfig, seed: int, kind: type[nn.Module] = Network) -> nn.Module:
    """A new network of this kind with its starting weights; each parameter's chance follows from (seed, its name)."""
    with torch.device("meta"):
        network = kind(config)
    network = network.to_empty(device="cpu")
    init_convolutions(network, seed)
    return network


@torch.no_grad()
def init_convolutions(network: nn.Module, seed: int) -> None:
    """Matrices and kernels by their fan-in, norms 1, biases 0; what a block adds to its input starts at 0."""
    for name, parameter in network.named_parameters():
        if name.endswith(".out.weight"):
            parameter.zero_()
        elif parameter.dim() > 1:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            fresh = torch.empty(parameter.shape).normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            parameter.copy_(fresh)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def to_unit(pixels: Tensor) -> Tensor:
    """(N, Y, X, image_channels) uint8 -> (N, image_channels, Y, X) between -1 and 1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """The inverse of `to_unit`; what lies beyond black or white is cut off."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of each latent from the normal one, summed over its numbers: (N,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class Autoencoder:
    """The trained network as a codec: (Y, X, channels) uint8 <-> latent (C, Y / f, X / f), normalised."""

    kind = "autoencoder"

    def __init__(self, network: Network, mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray):
        self.network = network.eval().requires_grad_(False)
        self.mean, self.std, self.low, self.high = mean, std, low, high  # (C,) each
        config = network.config
        self.channels, self.downsampling, self.image_channels = config.channels, config.downsampling, config.image_channels

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Autoencoder":
        """The inverse of `tensors`. ValueError or KeyError when they do not make one."""
        tensors = dict(tensors)
        statistics = [tensors.pop(name) for name in ("mean", "std", "low", "high")]
        return cls(network_from(tensors, Network), *statistics)

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `from_tensors` needs."""
        statistics = {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}
        return statistics | network_tensors(self.network)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / f, X / f) float32."""
        return self.encode_many([pixels])[0]

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / f, X / f) -> (Y, X, channels) uint8."""
        device = next(self.network.parameters()).device
        scaled = latent.astype(np.float32) * self.std[:, None, None] + self.mean[:, None, None]
        with torch.inference_mode():
            return to_bytes(self.network.decoder(torch.from_numpy(scaled)[None].float().to(device)))[0].cpu().numpy()

    def encode_many(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of one size, several in a forward pass. ValueError when f does not divide their sides."""
        check_size(pictures[0], self.downsampling)
        mean, deviation = (values[:, None, None].astype(np.float32) for values in (self.mean, self.std))
        return list((encode_raw(self.network, pictures) - mean) / deviation)  # (C, Y / f, X / f) each


def network_tensors(network: nn.Module) -> dict[str, np.ndarray]:
    """Its weights by name, and its config, as JSON."""
    state = {name: value.cpu().numpy() for name, value in network.state_dict().items()}
    return {"config": np.frombuffer(json.dumps(asdict(network.config)).encode(), np.uint8), **state}


def network_from(tensors: dict[str, np.ndarray], kind: type[nn.Module]) -> nn.Module:
    """The inverse of `network_tensors`. ValueError or KeyError when they do not make a network of this kind."""
    config = from_json(AutoencoderConfig, json.loads(tensors["config"].tobytes().decode()))
    with torch.device("meta"):
        network = kind(config)
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items() if name != "config"}
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit its network: {str(error).splitlines()[-1].strip()}") from None
    return network


def check_size(picture: np.ndarray, scale: int) -> None:
    """ValueError when `scale` does not divide the sides of a picture (Y, X, channels)."""
    Y, X = picture.shape[:2]
    if Y % scale or X % scale:
        raise ValueError(f"a picture of {X}x{Y} pixels cannot be cut into squares of {scale}x{scale}")


@torch.inference_mode()
def encode_raw(network: nn.Module, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """What `network.encode` makes of pictures (Y, X, channels) uint8 of one size: its codes, or latents not yet normalised.

    (N, C, Y / f, X / f) float32, or (N, Y / f, X / f) int64 from a network with a codebook.
    """
    device = next(network.parameters()).device
    n = max(1, AT_ONCE // (pictures[0].shape[0] * pictures[0].shape[1]))
    found = []
    for first in range(0, len(pictures), n):
        batch = torch.from_numpy(np.stack(pictures[first : first + n])).to(device)
        found.append(network.encode(to_unit(batch)).cpu().numpy())
    return np.concatenate(found)


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture whether it is real (Isola et al. 2017): three halvings, 70 pixels across."""

    def __init__(self, image_channels: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, 4):
            before, after = width * 2 ** (level - 1), width * 2**level
            layers += [nn.Conv2d(before, after, 4, 2 if level < 3 else 1, 1), group_norm(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 8, 1, 4, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, image_channels, Y, X) -> (N, 1, y, x): the higher, the more real."""
        return self.layers(pictures)


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge: what is said of real pictures should be above 1, of made ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def with_statistics(network: Network, pictures: Sequence[np.ndarray]) -> Autoencoder:
    """The network as a codec, with the mean, deviation and bound of each channel over these pictures of one size."""
    latents = encode_raw(network, pictures).astype(np.float64)  # (N, C, Y / f, X / f)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    if not (deviation > 0).all():
        raise ValueError("a channel of the latents never changes: the network has not learnt to use it")
    low, high = ((side - mean) / deviation for side in (latents.min((0, 2, 3)), latents.max((0, 2, 3))))
    return Autoencoder(network, mean, deviation, low, high)
