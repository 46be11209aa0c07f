"""CLIP score (Hessel et al. 2021, 2104.08718): the similarity of an image and its caption, measured by CLIP."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from transfusion.evaluation.features import VisionModel

BATCH_SIZE = 32  # captions in one forward pass
TOKENIZERS = ("tokenizer.json", "vocab.json")  # without them transformers silently builds an empty tokenizer


class ClipScore:
    """max(0, 100 cos(image embedding, caption embedding)), averaged over images. This is the scale of the Transfusion paper,
    whose models score 22 to 26. (Hessel's score is 2.5 times the cosine, with the prefix "A photo depicts", which is not
    used here.) The paper does not name its CLIP, and CLIPs differ by points: report `name` with every score."""

    def __init__(self, source: str, device: torch.device):
        """A CLIPModel of transformers, from a folder or the hub. ValueError if it cannot be opened."""
        self.vision, self.device = VisionModel(source, device), device
        self.name, self.model = self.vision.name, self.vision.model
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{source} has no text encoder: a CLIP score needs a whole CLIP model")
        if self.model.config.model_type != "clip":  # a SigLIP needs padded captions and has other cosines
            raise ValueError(f"{source} is a {self.model.config.model_type} model: a CLIP score needs a clip model")
        if not any((self.vision.folder / name).exists() for name in TOKENIZERS):
            raise ValueError(f"{source} has no tokenizer: add {' or '.join(TOKENIZERS)}")
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.vision.folder, local_files_only=True)
        self.max_length = self.model.config.text_config.max_position_embeddings

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> float:
        """The mean score of images (Y, X, 1 or 3) uint8 of any sizes. Errors as `score_each`."""
        return float(self.score_each(images, captions).mean())

    def score_each(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """(N,) from 0 to 100. Captions are truncated to CLIP's context (77 tokens). ValueError unless there is one caption
        for each image, and at least one."""
        if len(images) != len(captions) or not captions:
            raise ValueError(f"{len(images)} images need one caption each, not {len(captions)}")
        image_embeds = torch.from_numpy(self.vision(images))  # (N, D)
        batches = (captions[n : n + BATCH_SIZE] for n in range(0, len(captions), BATCH_SIZE))
        text_embeds = torch.cat([self.embed_captions(batch) for batch in batches])  # (N, D)
        return 100 * F.cosine_similarity(image_embeds.double(), text_embeds.double()).clamp(min=0).numpy()

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """The projected text embeddings, (N, D)."""
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)  # (N, L)
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.pooler_output.float().cpu()  # (N, D)
