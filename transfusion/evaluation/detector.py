"""A detector for GenEval by weights of anybody's: a model of transformers that segments instances, and a CLIP for colours.

Published figures are of Mask2Former with a Swin-S backbone, trained on COCO, and of OpenAI's CLIP ViT-L/14, asked for the
colour of each thing with its surroundings made grey.
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

SURROUNDINGS = 0x99  # grey
SAME = {  # what others call COCO's kinds
    "motorcycle": ("motorbike",), "airplane": ("aeroplane",), "couch": ("sofa",), "potted plant": ("pottedplant",),
    "dining table": ("diningtable",), "tv": ("tvmonitor",), "hair drier": ("hair dryer",),
}  # fmt: skip
ASKED = "a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object"


class InstanceDetector:
    """Everything in a picture that is surer than GenEval looks at, boxes in pixels. `name` says by which weights."""

    def __init__(self, source: str, clip: str, device: torch.device):
        """Both from a folder, or the hub. ValueError says why one cannot be opened, or knows other things than COCO's."""
        _, self.model, self.prepare, name = open_pretrained(source, "AutoModelForUniversalSegmentation", device)
        _check(source, self.model.config.id2label, self.prepare)
        self.clip, self.device = ClipScore(clip, device), device
        self.name = f"{name}, colours by {self.clip.name}"
        self._colours_of = cache(self._colours_of)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> list[Detection]:
        """(Y, X, 1 or 3) uint8, to what is in it."""
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        inputs = self.prepare([pixels], input_data_format="channels_last", return_tensors="pt").to(self.device)
        (said,) = self.prepare.post_process_instance_segmentation(
            self.model(**inputs), threshold=CONFIDENCE, target_sizes=[pixels.shape[:2]], return_binary_maps=True
        )
        segments = said["segments_info"]
        if not segments:
            return []
        masks = said["segmentation"].cpu().numpy() > 0  # (segments, Y, X)
        boxes = [_box(mask) for mask in masks]
        names = [NAMES[segment["label_id"]] for segment in segments]
        crops = [_alone(pixels, mask, box) for mask, box in zip(masks, boxes, strict=True)]
        shown = F.normalize(torch.from_numpy(self.clip.vision(crops)), dim=1)  # (segments, D)
        colours = [COLOURS[int((self._colours_of(name) @ one).argmax())] for name, one in zip(names, shown, strict=True)]
        return [
            Detection(name, box, segment["score"], colour)
            for name, box, segment, colour in zip(names, boxes, segments, colours, strict=True)
        ]

    def _colours_of(self, name: str) -> torch.Tensor:
        """What CLIP makes of a thing of this name in each colour, (colours, D)."""
        asked = [words.format(colour=colour, name=name) for colour in COLOURS for words in ASKED]
        said = F.normalize(self.clip.read(asked), dim=1).unflatten(0, (len(COLOURS), len(ASKED)))
        return F.normalize(said.mean(1), dim=1)


def _check(source: str, kinds: dict[int, str], prepare: Any) -> None:
    """ValueError when it finds other things than COCO's, calls them in another order, or does not give each one's mask."""
    if len(kinds) != len(NAMES):
        raise ValueError(f"{source} tells {len(kinds)} kinds of things apart: GenEval asks for COCO's {len(NAMES)}")
    others = [n for n, name in enumerate(NAMES) if name.split()[-1] not in kinds[n] and kinds[n] not in SAME.get(name, ())]
    if others:
        raise ValueError(f"{source} calls its kind {others[0]} {kinds[others[0]]!r}, which in COCO is {NAMES[others[0]]!r}")
    read = getattr(prepare, "post_process_instance_segmentation", None)
    if read is None or "return_binary_maps" not in signature(read).parameters:
        raise ValueError(f"{source} gives no mask for each thing it finds: take a Mask2Former or a MaskFormer")


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Around a mask (Y, X): left, top, right, bottom."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _alone(pixels: np.ndarray, mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The thing in its box, all else grey."""
    left, top, right, bottom = box
    return np.where(mask[..., None], pixels, np.uint8(SURROUNDINGS))[top:bottom, left:right]
