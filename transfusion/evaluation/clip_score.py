"""CLIP score (Hessel et al. 2021, 2104.08718): does CLIP find that a picture is what its caption says?"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from transfusion.evaluation.features import VisionModel

AT_ONCE = 32  # captions in one forward pass
TOKENIZERS = ("tokenizer.json", "vocab.json")  # without them transformers would make an empty one, and say nothing


class ClipScore:
    """100 times the cosine of a picture's embedding and its caption's, 0 where that is negative, mean over pictures.

    It is the scale of the Transfusion paper, whose models score 22 to 26. (Hessel's is 2.5 times the cosine, behind the
    words "A photo depicts", which are not put before captions here.) The paper does not say which CLIP it used, and they
    differ by points: `name` belongs beside every score.
    """

    def __init__(self, source: str, device: torch.device):
        """A CLIPModel of transformers, from a folder or the hub. ValueError says why it cannot be opened."""
        self.vision, self.device = VisionModel(source, device), device
        self.name, self.model = self.vision.name, self.vision.model
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{source} reads no text: a CLIP score needs both halves of a CLIP")
        if self.model.config.model_type != "clip":  # of a SigLIP captions want padding, and cosines are others
            raise ValueError(f"{source} is a {self.model.config.model_type}, no clip: its scores are no CLIP scores")
        if not any((self.vision.folder / name).exists() for name in TOKENIZERS):
            raise ValueError(f"{source} has no tokenizer: {' or '.join(TOKENIZERS)} should be there")
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.vision.folder, local_files_only=True)
        self.longest = self.model.config.text_config.max_position_embeddings

    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> float:
        """The mean over pictures (Y, X, 1 or 3) uint8 of any sizes. ValueError as `each`."""
        return float(self.each(pictures, captions).mean())

    def each(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """(N,) from 0 to 100. Of a caption longer than CLIP reads (77 tokens) the end is not looked at.

        ValueError when there is not one caption for each picture, or none.
        """
        if len(pictures) != len(captions) or not captions:
            raise ValueError(f"{len(pictures)} pictures need one caption each, not {len(captions)}")
        shown = torch.from_numpy(self.vision(pictures))  # (N, D)
        said = torch.cat([self.read(captions[n : n + AT_ONCE]) for n in range(0, len(captions), AT_ONCE)])  # (N, D)
        return 100 * F.cosine_similarity(shown.double(), said.double()).clamp(min=0).numpy()

    @torch.inference_mode()
    def read(self, captions: Sequence[str]) -> torch.Tensor:
        """Their embeddings, (N, D)."""
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.device)  # (N, L)
        said = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return said.pooler_output.float().cpu()  # (N, D)
