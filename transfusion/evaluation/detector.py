"""GenEval's object detector: an instance segmentation model of transformers, and a CLIP that classifies colours.

Published figures use Mask2Former with a Swin-S backbone, trained on COCO, and OpenAI's CLIP ViT-L/14. CLIP classifies the
colour of each object in its box, with the background replaced by grey.
"""

from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.features import open_pretrained
from transfusion.evaluation.geneval import CONFIDENCE, Detection
from transfusion.evaluation.geneval_prompts import COLOURS, NAMES

BACKGROUND_GREY = 0x99
ALIASES = {  # other names of COCO's classes
    "motorcycle": ("motorbike",), "airplane": ("aeroplane",), "couch": ("sofa",), "potted plant": ("pottedplant",),
    "dining table": ("diningtable",), "tv": ("tvmonitor",), "hair drier": ("hair dryer",),
}  # fmt: skip
COLOUR_PROMPTS = "a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object"


class InstanceDetector:
    """All objects of an image with a score above `CONFIDENCE`, boxes in pixels. `name` identifies the weights."""

    def __init__(self, source: str, clip: str, device: torch.device):
        """Each from a folder or the hub. ValueError if one cannot be opened, or its classes are not COCO's."""
        _, self.model, self.processor, name = open_pretrained(source, "AutoModelForUniversalSegmentation", device)
        _check(source, self.model.config.id2label, self.processor)
        self.clip, self.device = ClipScore(clip, device), device
        self.name = f"{name}, colours by {self.clip.name}"
        self._embed_colours = cache(self._embed_colours)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> list[Detection]:
        """The objects of an image (Y, X, 1 or 3) uint8."""
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        inputs = self.processor([pixels], input_data_format="channels_last", return_tensors="pt").to(self.device)
        (output,) = self.processor.post_process_instance_segmentation(
            self.model(**inputs), threshold=CONFIDENCE, target_sizes=[pixels.shape[:2]], return_binary_maps=True
        )
        segments = output["segments_info"]
        if not segments:
            return []
        masks = output["segmentation"].cpu().numpy() > 0  # (segments, Y, X)
        boxes = [_box(mask) for mask in masks]
        names = [NAMES[segment["label_id"]] for segment in segments]
        crops = [_crop(pixels, mask, box) for mask, box in zip(masks, boxes, strict=True)]
        embeds = F.normalize(torch.from_numpy(self.clip.vision(crops)), dim=1)  # (segments, D)
        colours = [
            COLOURS[int((self._embed_colours(name) @ embed).argmax())] for name, embed in zip(names, embeds, strict=True)
        ]
        return [
            Detection(name, box, segment["score"], colour)
            for name, box, segment, colour in zip(names, boxes, segments, colours, strict=True)
        ]

    def _embed_colours(self, name: str) -> torch.Tensor:
        """CLIP's embedding of an object of this name in each colour, averaged over prompts, (colours, D)."""
        prompts = [prompt.format(colour=colour, name=name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
        embeds = F.normalize(self.clip.embed_captions(prompts), dim=1).unflatten(0, (len(COLOURS), len(COLOUR_PROMPTS)))
        return F.normalize(embeds.mean(1), dim=1)


def _check(source: str, labels: dict[int, str], processor: Any) -> None:
    """ValueError unless the classes are COCO's, in COCO's order, and each object has its own mask."""
    if len(labels) != len(NAMES):
        raise ValueError(f"{source} has {len(labels)} classes: GenEval needs COCO's {len(NAMES)}")
    for n, name in enumerate(NAMES):
        if name.split()[-1] not in labels[n] and labels[n] not in ALIASES.get(name, ()):
            raise ValueError(f"{source} calls its class {n} {labels[n]!r}; in COCO it is {name!r}")
    post_process = getattr(processor, "post_process_instance_segmentation", None)
    if post_process is None or "return_binary_maps" not in signature(post_process).parameters:
        raise ValueError(f"{source} gives no mask for each object: use a Mask2Former or a MaskFormer")


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The bounding box of a mask (Y, X): left, top, right, bottom."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _crop(pixels: np.ndarray, mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of an object, everything outside its mask grey."""
    left, top, right, bottom = box
    return np.where(mask[..., None], pixels, np.uint8(BACKGROUND_GREY))[top:bottom, left:right]
