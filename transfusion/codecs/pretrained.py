"""Pretrained autoencoders: any `AutoencoderKL` of diffusers (Stable Diffusion, FLUX, SD3), from a folder or the hub.

Data sets and runs store its name and the SHA-256 of its weights, not the weights. Its shift and scaling factors are applied
as in diffusers; then every channel is normalised to mean 0 and standard deviation 1 over the data.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfusion.codecs.autoencoder import check_size, from_uint8, to_uint8
from transfusion.disk import sha256_of

TILING_PIXELS = 512 * 512  # larger images are processed in tiles
BATCH_PIXELS = 2**21  # pixels in one forward pass, about: 8 images of 512x512


class Pretrained:
    """An `AutoencoderKL` as a codec: (Y, X, 3) uint8 <-> normalised mode of the latent (C, Y / f, X / f)."""

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
    def fit(cls, source: str, images: Sequence[np.ndarray]) -> "Pretrained":
        """The autoencoder of a folder or the hub, with the statistics of these images. ValueError when it does not open, or
        when a channel is constant over them."""
        network, digest = _open(source)
        identity = np.zeros(network.config.latent_channels), np.ones(network.config.latent_channels)
        codec = cls(network, source, digest, (*identity, *identity))
        latents = [codec.encode(image).reshape(codec.channels, -1) for image in images]
        values = np.concatenate(latents, 1).astype(np.float64)  # (C, n)
        mean, std = values.mean(1), values.std(1)
        if not (std > 0).all():  # 0 or not a number
            raise ValueError(f"channel {int((std > 0).argmin())} of {source} is constant over the images, or not finite: "
                             "give more images, or another autoencoder")  # fmt: skip
        low, high = ((side - mean) / std for side in (values.min(1), values.max(1)))
        return cls(network, source, digest, (mean, std, low, high))

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Pretrained":
        """The inverse of `tensors`. ValueError when the autoencoder is missing or was changed."""
        about = json.loads(tensors["about"].tobytes().decode())
        network, digest = _open(about["source"])
        if digest != about["sha256"]:
            raise ValueError(f"the weights of {about['source']} have changed since the data were encoded with them")
        return cls(network, about["source"], digest, [tensors[name] for name in ("mean", "std", "low", "high")])

    def tensors(self) -> dict[str, np.ndarray]:
        """The codec's content, for `from_tensors`."""
        about = json.dumps({"source": self.source, "sha256": self.digest}).encode()
        statistics = {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}
        return {"about": np.frombuffer(about, np.uint8), **statistics}

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, 3) uint8 -> latent (C, Y / f, X / f) float32."""
        return self.encode_many([pixels])[0]

    @torch.inference_mode()
    def encode_many(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Latents of images of one size, in batches. ValueError when f does not divide their sides."""
        check_size(images[0], self.downsampling)
        num_pixels = images[0].shape[0] * images[0].shape[1]
        self._set_tiling(num_pixels)
        normalised = []
        batch_size = max(1, BATCH_PIXELS // num_pixels)
        mean, std = (values[:, None, None].astype(np.float32) for values in (self.mean, self.std))
        for first in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.stack(images[first : first + batch_size]))
            batch = from_uint8(pixels.to(self.network.device))  # (N, 3, Y, X)
            latents = (self.network.encode(batch).latent_dist.mode() - self.shift) * self.factor  # (N, C, Y / f, X / f)
            normalised += list((latents.float().cpu().numpy() - mean) / std)
        return normalised

    @torch.inference_mode()
    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / f, X / f) -> (Y, X, 3) uint8."""
        self._set_tiling(latent.shape[1] * latent.shape[2] * self.downsampling**2)
        scaled = latent.astype(np.float32) * self.std[:, None, None] + self.mean[:, None, None]
        raw = torch.from_numpy(scaled)[None].float() / self.factor + self.shift  # (1, C, Y / f, X / f)
        return to_uint8(self.network.decode(raw.to(self.network.device)).sample)[0].cpu().numpy()

    def _set_tiling(self, num_pixels: int) -> None:
        if num_pixels > TILING_PIXELS:
            self.network.enable_tiling()
        else:
            self.network.disable_tiling()


def is_pretrained(source: str) -> bool:
    """True for a folder with a diffusers config.json, and for `owner/name` on the hub unless such a path exists."""
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
    except Exception as error:  # the hub's client and diffusers raise many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no autoencoder can be opened at {source}: {reason}") from None
    weights = sorted(folder.glob("*.safetensors"))
    return network, " ".join(sha256_of(path) for path in weights)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors"]))
