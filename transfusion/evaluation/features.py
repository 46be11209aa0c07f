"""Where features of pictures come from: FID's Inception, or any vision model of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from transfusion.disk import sha256_of
from transfusion.evaluation.inception import Inception

AT_ONCE = 32  # pictures in one forward pass


class Extractor(Protocol):
    """Pictures to features. `name` says of what network; results show it, since other networks give other numbers."""

    name: str
    features: int

    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures (Y, X, 1 or 3) uint8 of any sizes -> (N, features) float32."""
        ...


def open_extractor(source: str, device: torch.device) -> Extractor:
    """Inception where a file with weights is named (.safetensors, .pth), otherwise a vision model of transformers: a folder,
    or `owner/name` on the hub. ValueError says why it cannot be opened. The one that needs no weights is `SmallNetwork`.
    """
    if source.endswith((".safetensors", ".pth", ".pt")):
        return Inception.from_file(Path(source), device)
    return VisionModel(source, device)


class VisionModel:
    """A vision model of transformers, DINOv2 or CLIP for example: what it says of a picture as a whole.

    That is its projected embedding of images where it has one, as CLIP has, otherwise its pooled output, as DINOv2's class
    token is.
    """

    def __init__(self, source: str, device: torch.device):
        """From a folder, or `owner/name` on the hub; named with the first digits of its weights' SHA-256.

        ValueError when there is none, it was not written as safetensors, or lacks weights.
        """
        self.folder, self.model, self.prepare, self.name = open_pretrained(source, "AutoModel", device)
        self.device = device
        self.look = getattr(self.model, "get_image_features", self.model)
        self.features = self([np.zeros((32, 32, 3), np.uint8)]).shape[1]

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures (Y, X, 1 or 3) uint8 of any sizes, prepared as the model's own files say -> (N, features) float32."""
        found = []
        for first in range(0, len(pictures), AT_ONCE):
            coloured = [np.broadcast_to(pixels, (*pixels.shape[:2], 3)) for pixels in pictures[first : first + AT_ONCE]]
            inputs = self.prepare(coloured, input_data_format="channels_last", return_tensors="pt").to(self.device)
            said = self.look(pixel_values=inputs["pixel_values"]).pooler_output  # (N, features)
            if said is None:
                raise ValueError(f"{self.name} says nothing of a picture as a whole: it has no pooled output")
            found.append(said.flatten(1).float().cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, self.features), np.float32)


def open_pretrained(source: str, kind: str, device: torch.device) -> tuple[Path, nn.Module, Any, str]:
    """A model of transformers that looks at pictures, by one of its auto classes: its folder, the model, what prepares
    pictures for it, and its name with the first digits of its weights' SHA-256. ValueError says why it cannot be opened."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{source} needs transformers: pip install '.[pretrained]' in a clone of the repository") from None
    folder = Path(source) if Path(source).is_dir() else _download(source)
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        prepare = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises
        reason = _first_line(error)
        raise ValueError(f"no vision model can be opened at {source}: {reason}") from None
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks weights, {min(report['missing_keys'])} for one: chance would stand in for them")
    digests = [sha256_of(path)[:8] for path in sorted(folder.glob("*.safetensors"))]
    name = " ".join([type(model).__name__, source, *digests])
    return folder, model.eval().requires_grad_(False).to(device), prepare, name


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:  # no network, no such name, or none at all: whatever the hub's client raises
        raise ValueError(
            f"no vision model can be opened at {source}: it is no folder, and the hub does not give it"
            f" ({_first_line(error)}); put its config.json, preprocessor_config.json, model.safetensors and, for a CLIP,"
            " tokenizer.json into one"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
