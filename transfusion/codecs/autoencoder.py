"""The convolutional autoencoder: pixels to a latent of 8 channels, f times smaller, and back (section 4.1); and its losses.

The network of VQGAN (Esser et al. 2021), as in Stable Diffusion: with the paper's numbers 86M parameters at f = 8. The codec
encodes with the mode of the latent distribution, never a sample. It normalises every channel to mean 0 and standard
deviation 1 over the images that its statistics are from.
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

BATCH_PIXELS = 2**22  # pixels in one forward pass of a codec, about: 64 images of 256x256
LOGVAR_RANGE = (-30.0, 20.0)  # of the logarithm of a latent's variance


class AutoencoderOutput(NamedTuple):
    """One training forward pass."""

    reconstruction: Tensor  # (N, image_channels, Y, X)
    terms: dict[str, tuple[float, Tensor]]  # loss terms of the latents by name: weight and value
    latents: Tensor | None = None  # (N * Y / f * X / f, C) before quantisation, with a codebook
    codes: Tensor | None = None  # (N * Y / f * X / f,) int64, of each latent pixel, with a codebook


class AutoencoderNetwork(nn.Module):
    """Encoder and decoder. Images are (N, image_channels, Y, X) in [-1, 1], moments (N, 2 C, Y / f, X / f)."""

    loss_names = ("KL",)  # besides those of the images

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_encoder(config, 2 * config.channels), build_decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each image's latent, (N, C, Y / f, X / f) each."""
        mean, logvar = self.encoder(images).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from the latent mean + exp(logvar / 2) * noise, and the moments. noise (N, C, Y / f, X / f)."""
        mean, logvar = self.moments(images)
        return self.decoder(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def compute_losses(self, images: Tensor, seeds: Sequence[int], training: CodecTrainingConfig) -> AutoencoderOutput:
        """Reconstruction from a sampled latent, and the KL term. Each image's noise follows from its seed, on the CPU."""
        f = self.config.downsampling
        shape = (self.config.channels, images.shape[2] // f, images.shape[3] // f)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(noise).to(images.device)  # (N, C, Y / f, X / f)
        reconstruction, mean, logvar = self(images, noise)  # (N, image_channels, Y, X), (N, C, Y / f, X / f) twice
        # KL is summed over the latent and divided by the pixels of an image, as in latent diffusion, where L1 is a sum too.
        kl_weight = training.kl_weight / images[0].numel()
        return AutoencoderOutput(reconstruction, {"kl": (kl_weight, kl_divergence(mean, logvar).mean())})

    def encode(self, images: Tensor) -> Tensor:
        """The mode of each image's latent, (N, C, Y / f, X / f)."""
        return self.moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (N, image_channels, Y, X), not clipped to [-1, 1]."""
        return self.decoder(latents)


def build_encoder(config: AutoencoderConfig, channels: int) -> nn.Sequential:
    """(N, image_channels, Y, X) -> (N, channels, Y / f, X / f)."""
    widths = [config.width * m for m in config.multipliers]
    return nn.Sequential(
        nn.Conv2d(config.image_channels, widths[0], 3, padding=1), *_down(config, widths), *_middle(config, widths[-1]),
        group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Conv2d(channels, channels, 1),
    )  # fmt: skip


def build_decoder(config: AutoencoderConfig) -> nn.Sequential:
    """(N, C, Y / f, X / f) -> (N, image_channels, Y, X)."""
    widths = [config.width * m for m in config.multipliers]
    return nn.Sequential(
        nn.Conv2d(config.channels, config.channels, 1), nn.Conv2d(config.channels, widths[-1], 3, padding=1),
        *_middle(config, widths[-1]), *_up(config, widths),
        group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], config.image_channels, 3, padding=1),
    )  # fmt: skip


def _down(config: AutoencoderConfig, widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    in_width = widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.blocks):
            layers.append(ResidualBlock(in_width, width))
            in_width = width
        if level + 1 < len(widths):
            layers.append(Downsample(width, width))
    return layers


def _up(config: AutoencoderConfig, widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    in_width = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.blocks + 1):
            layers.append(ResidualBlock(in_width, width))
            in_width = width
        if level:
            layers.append(Upsample(width, width))
    return layers


def _middle(config: AutoencoderConfig, width: int) -> list[nn.Module]:
    attention = [PixelAttention(width)] if config.attention else []
    return [ResidualBlock(width, width), *attention, ResidualBlock(width, width)]


def build_network(config: AutoencoderConfig, seed: int, kind: type[nn.Module] = AutoencoderNetwork) -> nn.Module:
    """A new network of this class; each parameter's initial values follow from (seed, its name)."""
    with torch.device("meta"):
        network = kind(config)
    network = network.to_empty(device="cpu")
    init_convolutions(network, seed)
    return network


@torch.no_grad()
def init_convolutions(network: nn.Module, seed: int) -> None:
    """Weights N(0, 1 / fan_in), norms 1, biases 0. Residual blocks add 0 at first: the weights of their last layer are 0."""
    for name, parameter in network.named_parameters():
        if name.endswith(".out.weight"):
            parameter.zero_()
        elif parameter.dim() > 1:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            weight = torch.empty(parameter.shape).normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            parameter.copy_(weight)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def from_uint8(pixels: Tensor) -> Tensor:
    """(N, Y, X, image_channels) uint8 -> (N, image_channels, Y, X) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `from_uint8`; values outside [-1, 1] are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over each latent: (N,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class Autoencoder:
    """The trained network as a codec: (Y, X, channels) uint8 <-> normalised latent (C, Y / f, X / f)."""

    kind = "autoencoder"

    def __init__(self, network: AutoencoderNetwork, mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray):
        self.network = network.eval().requires_grad_(False)
        self.mean, self.std, self.low, self.high = mean, std, low, high  # (C,) each
        config = network.config
        self.channels, self.downsampling, self.image_channels = config.channels, config.downsampling, config.image_channels

    @classmethod
    def fit(cls, network: AutoencoderNetwork, images: Sequence[np.ndarray]) -> "Autoencoder":
        """The codec with each channel's statistics over these images of one size. ValueError when a channel is constant."""
        latents = encode_raw(network, images).astype(np.float64)  # (N, C, Y / f, X / f)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        if not (std > 0).all():
            raise ValueError("a latent channel is constant: the network does not use it; train it for longer")
        low, high = ((side - mean) / std for side in (latents.min((0, 2, 3)), latents.max((0, 2, 3))))
        return cls(network, mean, std, low, high)

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Autoencoder":
        """The inverse of `tensors`. ValueError or KeyError when they do not fit."""
        tensors = dict(tensors)
        statistics = [tensors.pop(name) for name in ("mean", "std", "low", "high")]
        return cls(network_from_tensors(tensors, AutoencoderNetwork), *statistics)

    def tensors(self) -> dict[str, np.ndarray]:
        """The codec's content, for `from_tensors`."""
        statistics = {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}
        return statistics | network_tensors(self.network)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / f, X / f) float32."""
        return self.encode_many([pixels])[0]

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / f, X / f) -> (Y, X, channels) uint8."""
        device = next(self.network.parameters()).device
        raw = latent.astype(np.float32) * self.std[:, None, None] + self.mean[:, None, None]
        with torch.inference_mode():
            return to_uint8(self.network.decoder(torch.from_numpy(raw)[None].float().to(device)))[0].cpu().numpy()

    def encode_many(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Latents (C, Y / f, X / f) of images of one size, in batches. ValueError when f does not divide their sides."""
        check_size(images[0], self.downsampling)
        mean, std = (values[:, None, None].astype(np.float32) for values in (self.mean, self.std))
        return list((encode_raw(self.network, images) - mean) / std)


def network_tensors(network: nn.Module) -> dict[str, np.ndarray]:
    """The network's weights by name, and its config as JSON bytes."""
    state = {name: value.cpu().numpy() for name, value in network.state_dict().items()}
    return {"config": np.frombuffer(json.dumps(asdict(network.config)).encode(), np.uint8), **state}


def network_from_tensors(tensors: dict[str, np.ndarray], kind: type[nn.Module]) -> nn.Module:
    """The inverse of `network_tensors`, in float32. ValueError or KeyError when they do not fit a network of this class."""
    config = from_json(AutoencoderConfig, json.loads(tensors["config"].tobytes().decode()))
    with torch.device("meta"):
        network = kind(config)
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in tensors.items() if name != "config"}
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the codec's weights do not fit its config: {str(error).splitlines()[-1].strip()}") from None
    return network


def check_size(image: np.ndarray, downsampling: int) -> None:
    """ValueError when `downsampling` does not divide the sides of an image (Y, X, channels)."""
    Y, X = image.shape[:2]
    if Y % downsampling or X % downsampling:
        raise ValueError(f"an image of {X}x{Y} pixels does not fit: both sides must be multiples of {downsampling}")


@torch.inference_mode()
def encode_raw(network: nn.Module, images: Sequence[np.ndarray]) -> np.ndarray:
    """`network.encode` of images (Y, X, channels) uint8 of one size, in batches.

    Latents before normalisation, (N, C, Y / f, X / f) float32; with a codebook codes, (N, Y / f, X / f) int64.
    """
    device = next(network.parameters()).device
    batch_size = max(1, BATCH_PIXELS // (images[0].shape[0] * images[0].shape[1]))
    encoded = []
    for first in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.stack(images[first : first + batch_size])).to(device)
        encoded.append(network.encode(from_uint8(batch)).cpu().numpy())
    return np.concatenate(encoded)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch, three strided layers, a receptive field of 70 pixels."""

    def __init__(self, image_channels: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, 4):
            in_width, out_width = width * 2 ** (level - 1), width * 2**level
            layers += [nn.Conv2d(in_width, out_width, 4, 2 if level < 3 else 1, 1), group_norm(out_width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 8, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, image_channels, Y, X) -> logits (N, 1, y, x), higher for real patches."""
        return self.layers(images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: logits of real images above 1, of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
