"""Feature extractors for images: FID's Inception v3, or a vision model of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from transfusion.disk import sha256_of
from transfusion.evaluation.inception import InceptionExtractor

BATCH_SIZE = 32  # images in one forward pass


class Extractor(Protocol):
    """A function from images to features. `name` identifies the network; scores of different networks differ."""

    name: str
    num_features: int

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images (Y, X, 1 or 3) uint8 of any sizes -> (N, num_features) float32."""
        ...


def open_extractor(source: str, device: torch.device) -> Extractor:
    """Inception if `source` is a file of weights (.safetensors, .pth, .pt), else a vision model of transformers: a folder,
    or `owner/name` on the hub. ValueError if it cannot be opened. `SmallFeatureNetwork` needs no weights."""
    if source.endswith((".safetensors", ".pth", ".pt")):
        return InceptionExtractor.from_file(Path(source), device)
    return VisionModel(source, device)


class VisionModel:
    """A vision model of transformers, for example DINOv2 or CLIP. The features are the projected image embedding if the
    model has one (CLIP), else its pooled output (the class token of DINOv2)."""

    def __init__(self, source: str, device: torch.device):
        """From a folder, or `owner/name` on the hub; the name includes the first digits of the weights' SHA-256. ValueError
        if there is no model, it is not stored as safetensors, or weights are missing."""
        self.folder, self.model, self.processor, self.name = open_pretrained(source, "AutoModel", device)
        self.device = device
        self.encode = getattr(self.model, "get_image_features", self.model)
        self.num_features = self([np.zeros((32, 32, 3), np.uint8)]).shape[1]

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images (Y, X, 1 or 3) uint8 of any sizes, preprocessed as the model's files say -> (N, num_features) float32."""
        batches = []
        for first in range(0, len(images), BATCH_SIZE):
            rgb = [np.broadcast_to(pixels, (*pixels.shape[:2], 3)) for pixels in images[first : first + BATCH_SIZE]]
            inputs = self.processor(rgb, input_data_format="channels_last", return_tensors="pt").to(self.device)
            output = self.encode(pixel_values=inputs["pixel_values"]).pooler_output  # (N, num_features)
            if output is None:
                raise ValueError(f"{self.name} has no pooled output: use a model with one feature vector per image")
            batches.append(output.flatten(1).float().cpu().numpy())
        return np.concatenate(batches) if batches else np.empty((0, self.num_features), np.float32)


def open_pretrained(source: str, auto_class: str, device: torch.device) -> tuple[Path, nn.Module, Any, str]:
    """A vision model of transformers by one of its auto classes: folder, model, image processor, and name with the first
    digits of its weights' SHA-256. ValueError if it cannot be opened."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{source} needs transformers: pip install '.[pretrained]' in a clone of the repository") from None
    folder = Path(source) if Path(source).is_dir() else _download(source)
    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types
        raise ValueError(f"no vision model can be opened at {source}: {_first_line(error)}") from None
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks weights, for example {min(report['missing_keys'])}: they would be random")
    digests = [sha256_of(path)[:8] for path in sorted(folder.glob("*.safetensors"))]
    name = " ".join([type(model).__name__, source, *digests])
    return folder, model.eval().requires_grad_(False).to(device), processor, name


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:  # no network, unknown or invalid name: the hub's client raises many types
        raise ValueError(
            f"no vision model can be opened at {source}: it is not a folder, and the hub does not provide it"
            f" ({_first_line(error)}); give a folder with config.json, preprocessor_config.json, model.safetensors and,"
            " for a CLIP, tokenizer.json"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
