"""The autoencoder's VQ twin: pixels to a grid of codes and back, for the paper's Chameleon baseline (section 4.1).

The same convolutions with a codebook in the middle: what the encoder makes is projected to 8 channels, and each latent pixel
becomes the nearest of 16,384 codes there (van den Oord et al. 2017). No distribution, no KL, nothing to normalise.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codecs.autoencoder import (
    AutoencoderOutput,
    check_size,
    decoder_of,
    encode_raw,
    encoder_of,
    network_from,
    network_tensors,
    to_bytes,
)  # fmt: skip
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig

DISTANCES = 2**25  # that are held at once, about: 2,048 latent pixels against the paper's codebook


class QuantisedNetwork(nn.Module):
    """Encoder, codebook and decoder. Pictures are (N, image_channels, Y, X) between -1 and 1, codes (N, Y / f, X / f) int64.

    ValueError when the config has no codebook.
    """

    loss_names = ("codebook", "commitment")  # of its own, beside those of pictures

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        if config.codes is None:
            raise ValueError("a network that quantises needs network.codes, the size of its codebook")
        self.config = config
        self.encoder, self.decoder = encoder_of(config, config.channels), decoder_of(config)
        self.codebook = nn.Parameter(torch.empty(config.codes, config.channels))  # (codes, C)

    def losses(self, pictures: Tensor, keys: Sequence[int], training: CodecTrainingConfig) -> AutoencoderOutput:
        """Through the codes of each picture; the codebook's loss moves codes alone, commitment the encoder alone."""
        grid = self.encoder(pictures)  # (N, C, Y / f, X / f)
        N, C, y, x = grid.shape
        latents = grid.permute(0, 2, 3, 1).reshape(-1, C)  # (N * Y / f * X / f, C)
        codes = nearest(latents, self.codebook)  # (N * Y / f * X / f,)
        chosen = F.embedding(codes, self.codebook)  # (N * Y / f * X / f, C)
        made = self.decoder(
            straight_through(latents, chosen).view(N, y, x, C).permute(0, 3, 1, 2)
        )  # (N, image_channels, Y, X)
        terms = {
            "codebook": (training.codebook_weight, F.mse_loss(chosen, latents.detach())),
            "commitment": (training.commitment, F.mse_loss(latents, chosen.detach())),
        }
        return AutoencoderOutput(made, terms, latents.detach(), codes)

    def encode(self, pictures: Tensor) -> Tensor:
        """The codes of each picture, (N, Y / f, X / f) int64."""
        grid = self.encoder(pictures).permute(0, 2, 3, 1)  # (N, Y / f, X / f, C)
        return nearest(grid.reshape(-1, grid.shape[3]), self.codebook).view(grid.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`, nearly: (N, image_channels, Y, X), not cut to black and white."""
        return self.decoder(F.embedding(codes, self.codebook).permute(0, 3, 1, 2))


@torch.no_grad()
def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """The number of the code nearest to each latent pixel, the first of equals: (n, C), (codes, C) -> (n,) int64."""
    lengths = codebook.square().sum(1)  # (codes,)
    # A latent's own length is the same to every code, so it need not be added to compare them.
    found = [
        torch.addmm(lengths, part, codebook.T, alpha=-2).argmin(1)  # (some, codes) -> (some,)
        for part in latents.split(max(1, DISTANCES // len(codebook)))
    ]
    return torch.cat(found)  # (n,)


def straight_through(latents: Tensor, chosen: Tensor) -> Tensor:
    """The chosen codes, (n, C), with the gradient of the latents, as if nothing had been done to them."""
    return latents + (chosen - latents).detach()


class VQ:
    """The trained network as a codec: (Y, X, channels) uint8 <-> codes (Y / f, X / f) int64."""

    kind = "vq"

    def __init__(self, network: QuantisedNetwork):
        self.network = network.eval().requires_grad_(False)
        config = network.config
        self.channels, self.downsampling, self.image_channels = (
            config.channels,
            config.downsampling,
            config.image_channels,
        )  # channels: of a code
        self.codes = config.codes  # how many there are

    @property
    def codebook(self) -> np.ndarray:
        """(codes, channels) float32: where each code lies."""
        return self.network.codebook.float().cpu().numpy()

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "VQ":
        """The inverse of `tensors`. ValueError or KeyError when they do not make one."""
        return cls(network_from(tensors, QuantisedNetwork))

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `from_tensors` needs."""
        return network_tensors(self.network)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> codes (Y / f, X / f) int64."""
        return self.encode_many([pixels])[0]

    def encode_many(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of one size, several in a forward pass. ValueError when f does not divide their sides."""
        check_size(pictures[0], self.downsampling)
        return list(encode_raw(self.network, pictures))  # (Y / f, X / f) each

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (Y / f, X / f) -> (Y, X, channels) uint8. ValueError when one is not in the codebook."""
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codes:
            raise ValueError(f"codes must lie between 0 and {self.codes - 1}, not {codes.min()} and {codes.max()}")
        grid = torch.from_numpy(codes.astype(np.int64))[None].to(self.network.codebook.device)  # (1, Y / f, X / f)
        with torch.inference_mode():
            return to_bytes(self.network.decode(grid))[0].cpu().numpy()
