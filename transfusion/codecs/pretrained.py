"""Other people's autoencoders: any `AutoencoderKL` of diffusers (of Stable Diffusion, FLUX, SD3), from a folder or the hub.

Its weights are not copied into data sets and runs: those name it, with the SHA-256 of its weights. Its own shift and scale
are undone and done by diffusers' convention; on top of them every channel gets mean 0 and deviation 1 over the data.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfusion.codecs.autoencoder import to_bytes, to_unit
from transfusion.disk import sha256_of

TILED = 512 * 512  # pixels: larger pictures go through it in tiles
AT_ONCE = 2**21  # pixels in one forward pass, about: 8 pictures of 512x512


class Pretrained:
    """An `AutoencoderKL` as a codec: (Y, X, 3) uint8 <-> latent (C, Y / f, X / f), the mode, normalised."""

    kind = "pretrained"

    def __init__(self, network: Any, source: str, digest: str, statistics: Sequence[np.ndarray]):
        self.network = network.eval().requires_grad_(False)
        self.source, self.digest = source, digest
        self.mean, self.std, self.low, self.high = statistics  # (C,) each
        config = network.config
        self.channels, self.image_channels = config.latent_channels, config.in_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.shift, self.factor = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @classmethod
    def fit(cls, source: str, pictures: Sequence[np.ndarray]) -> "Pretrained":
        """Opened from a folder or the hub, with the statistics of these pictures. ValueError says why it cannot be."""
        network, digest = _open(source)
        nothing = np.zeros(network.config.latent_channels), np.ones(network.config.latent_channels)
        plain = cls(network, source, digest, (*nothing, *nothing))
        found = [plain.encode(picture).reshape(plain.channels, -1) for picture in pictures]
        values = np.concatenate(found, 1).astype(np.float64)  # (C, n)
        mean, deviation = values.mean(1), values.std(1)
        low, high = ((side - mean) / deviation for side in (values.min(1), values.max(1)))
        return cls(network, source, digest, (mean, deviation, low, high))

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Pretrained":
        """The inverse of `tensors`. ValueError when it is not where it was, or no longer the same."""
        about = json.loads(tensors["about"].tobytes().decode())
        network, digest = _open(about["source"])
        if digest != about["sha256"]:
            raise ValueError(f"the weights of {about['source']} are not those that the latents were made with")
        return cls(network, about["source"], digest, [tensors[name] for name in ("mean", "std", "low", "high")])

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `from_tensors` needs."""
        about = json.dumps({"source": self.source, "sha256": self.digest}).encode()
        statistics = {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}
        return {"about": np.frombuffer(about, np.uint8), **statistics}

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, 3) uint8 -> latent (C, Y / f, X / f) float32."""
        return self.encode_many([pixels])[0]

    @torch.inference_mode()
    def encode_many(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of one size, several in a forward pass. ValueError when f does not divide their sides."""
        Y, X = pictures[0].shape[:2]
        if Y % self.downsampling or X % self.downsampling:
            raise ValueError(
                f"a picture of {X}x{Y} pixels cannot be cut into squares of {self.downsampling}x{self.downsampling}"
            )
        self._tile(Y * X)
        found = []
        n = max(1, AT_ONCE // (Y * X))
        for first in range(0, len(pictures), n):
            batch = to_unit(torch.from_numpy(np.stack(pictures[first : first + n])))  # (N, 3, Y, X)
            latents = (self.network.encode(batch).latent_dist.mode() - self.shift) * self.factor  # (N, C, Y / f, X / f)
            found += list(latents.float().numpy())
        mean, deviation = (values[:, None, None].astype(np.float32) for values in (self.mean, self.std))
        return [(latent - mean) / deviation for latent in found]

    @torch.inference_mode()
    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / f, X / f) -> (Y, X, 3) uint8."""
        self._tile(latent.shape[1] * latent.shape[2] * self.downsampling**2)
        own = latent.astype(np.float32) * self.std[:, None, None] + self.mean[:, None, None]
        scaled = torch.from_numpy(own)[None].float() / self.factor + self.shift  # (1, C, Y / f, X / f)
        return to_bytes(self.network.decode(scaled).sample)[0].numpy()

    def _tile(self, pixels: int) -> None:
        if pixels > TILED:
            self.network.enable_tiling()
        else:
            self.network.disable_tiling()


def is_pretrained(source: str) -> bool:
    """Does this name an autoencoder of diffusers: a folder with its config.json, or `owner/name` on the hub?"""
    return (Path(source) / "config.json").exists() or (source.count("/") == 1 and not Path(source).exists())


def _open(source: str) -> tuple[Any, str]:
    """The network, and the SHA-256 of its weights."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(f"{source} needs diffusers: pip install '.[pretrained]' in a clone of the repository") from None
    try:
        folder = Path(source) if Path(source).is_dir() else _download(source)
        network = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # whatever the hub's client and diffusers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no autoencoder can be opened at {source}: {reason}") from None
    weights = sorted(folder.glob("*.safetensors"))
    return network, " ".join(sha256_of(path) for path in weights)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors"]))
