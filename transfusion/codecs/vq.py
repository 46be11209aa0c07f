"""The VQ codec: pixels to a grid of codes and back, for the paper's Chameleon baseline (section 4.1).

The autoencoder's convolutions with a codebook in the middle: the encoder's output has 8 channels, and each latent pixel is
replaced by the nearest of 16,384 codes (van den Oord et al. 2017). It has no latent distribution, no KL and no statistics.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codecs.autoencoder import (
    AutoencoderOutput,
    build_decoder,
    build_encoder,
    check_size,
    encode_raw,
    network_from_tensors,
    network_tensors,
    to_uint8,
)  # fmt: skip
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig

MAX_DISTANCES = 2**25  # in memory at a time, about: of 2,048 latent pixels to the paper's codebook


class QuantisedNetwork(nn.Module):
    """Encoder, codebook and decoder. Images are (N, image_channels, Y, X) in [-1, 1], codes (N, Y / f, X / f) int64.
    ValueError when the config has no codebook."""

    loss_names = ("codebook", "commitment")  # besides those of the images

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        if config.codes is None:
            raise ValueError("a VQ network needs network.codes, the size of its codebook")
        self.config = config
        self.encoder, self.decoder = build_encoder(config, config.channels), build_decoder(config)
        self.codebook = nn.Parameter(torch.empty(config.codes, config.channels))  # (codes, C)

    def compute_losses(self, images: Tensor, seeds: Sequence[int], training: CodecTrainingConfig) -> AutoencoderOutput:
        """Reconstruction from codes. The codebook term has gradients for the codes only, commitment for the encoder only."""
        grid = self.encoder(images)  # (N, C, Y / f, X / f)
        N, C, y, x = grid.shape
        latents = grid.permute(0, 2, 3, 1).reshape(-1, C)  # (N * Y / f * X / f, C)
        codes = find_nearest_codes(latents, self.codebook)  # (N * Y / f * X / f,)
        quantised = F.embedding(codes, self.codebook)  # (N * Y / f * X / f, C)
        decoder_input = straight_through(latents, quantised).view(N, y, x, C).permute(0, 3, 1, 2)
        reconstruction = self.decoder(decoder_input)  # (N, image_channels, Y, X)
        terms = {
            "codebook": (training.codebook_weight, F.mse_loss(quantised, latents.detach())),
            "commitment": (training.commitment, F.mse_loss(latents, quantised.detach())),
        }
        return AutoencoderOutput(reconstruction, terms, latents.detach(), codes)

    def encode(self, images: Tensor) -> Tensor:
        """The codes of each image, (N, Y / f, X / f) int64."""
        grid = self.encoder(images).permute(0, 2, 3, 1)  # (N, Y / f, X / f, C)
        return find_nearest_codes(grid.reshape(-1, grid.shape[3]), self.codebook).view(grid.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to images (N, image_channels, Y, X), not clipped to [-1, 1]."""
        return self.decoder(F.embedding(codes, self.codebook).permute(0, 3, 1, 2))


@torch.no_grad()
def find_nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """The code nearest to each latent pixel, the first of equals: (n, C), (codes, C) -> (n,) int64."""
    norms = codebook.square().sum(1)  # (codes,)
    # argmin |z - e|^2 = argmin |e|^2 - 2 z e: |z|^2 is the same for all codes.
    codes = [
        torch.addmm(norms, chunk, codebook.T, alpha=-2).argmin(1)  # (chunk, codes) -> (chunk,)
        for chunk in latents.split(max(1, MAX_DISTANCES // len(codebook)))
    ]
    return torch.cat(codes)  # (n,)


def straight_through(latents: Tensor, quantised: Tensor) -> Tensor:
    """The quantised latents (n, C); their gradient passes unchanged to `latents`."""
    return latents + (quantised - latents).detach()


class VQ:
    """The trained network as a codec: (Y, X, channels) uint8 <-> codes (Y / f, X / f) int64."""

    kind = "vq"

    def __init__(self, network: QuantisedNetwork):
        self.network = network.eval().requires_grad_(False)
        config = network.config
        self.channels, self.codes = config.channels, config.codes  # numbers per code, number of codes
        self.downsampling, self.image_channels = config.downsampling, config.image_channels

    @property
    def codebook(self) -> np.ndarray:
        """The vectors of the codes, (codes, channels) float32."""
        return self.network.codebook.float().cpu().numpy()

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "VQ":
        """The inverse of `tensors`. ValueError or KeyError when they do not fit."""
        return cls(network_from_tensors(tensors, QuantisedNetwork))

    def tensors(self) -> dict[str, np.ndarray]:
        """The codec's content, for `from_tensors`."""
        return network_tensors(self.network)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> codes (Y / f, X / f) int64."""
        return self.encode_many([pixels])[0]

    def encode_many(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes (Y / f, X / f) of images of one size, in batches. ValueError when f does not divide their sides."""
        check_size(images[0], self.downsampling)
        return list(encode_raw(self.network, images))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (Y / f, X / f) -> (Y, X, channels) uint8. ValueError when a code is not in the codebook."""
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codes:
            raise ValueError(f"codes must be between 0 and {self.codes - 1}, not {codes.min()} and {codes.max()}")
        grid = torch.from_numpy(codes.astype(np.int64))[None].to(self.network.codebook.device)  # (1, Y / f, X / f)
        with torch.inference_mode():
            return to_uint8(self.network.decode(grid))[0].cpu().numpy()
