"""GenEval's detector: the objects and colours equal those of transformers; unsuitable models are refused."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Picture

from tests.lazy import Lazy
from tests.test_cli import TINY, command, fails
from tests.test_features import clip
from transfusion.disk import read_json
from transfusion.evaluation import suite
from transfusion.evaluation.detector import InstanceDetector
from transfusion.evaluation.geneval_prompts import COLOURS, NAMES, published_prompts

hf = Lazy("transformers")

CPU = torch.device("cpu")
ALIASED_NAMES = tuple({"computer mouse": "mouse", "tv remote": "remote", "couch": "sofa"}.get(name, name) for name in NAMES)


@cache
def mask2former(names: tuple[str, ...] = ALIASED_NAMES) -> Path:
    """A small model with random weights and large class logits."""
    torch.manual_seed(3)
    swin = hf.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, encoder_feedforward_dim=32, dim_feedforward=32, num_queries=6,
        id2label=dict(enumerate(names)),
    ))  # fmt: skip
    with torch.no_grad():
        model.class_predictor.weight.normal_(0, 8)
    folder = Path(mkdtemp()) / "mask2former"
    model.save_pretrained(folder)
    hf.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@cache
def detector() -> InstanceDetector:
    return InstanceDetector(str(mask2former()), str(clip()), CPU)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((48, 32, 3), (40, 56, 1), (64, 64, 3))]


@torch.inference_mode()
def directly(pixels: np.ndarray) -> list[tuple[str, tuple, float, str]]:
    """Without our code: masks and scores from the logits, colours with GenEval's CLIP prompts, images with PIL."""
    model = hf.Mask2FormerForUniversalSegmentation.from_pretrained(mask2former()).eval()
    image = Picture.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
    output = model(**hf.AutoImageProcessor.from_pretrained(mask2former())(image, return_tensors="pt"))
    probs = output.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes)
    large = F.interpolate(output.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False)[0]
    detections = []
    for query, label in (probs.flatten().topk(len(probs)).indices[:, None] // torch.tensor([probs.shape[1], 1])).tolist():
        label %= probs.shape[1]
        mask = large[query] > 0
        score = float(probs[query, label] * large[query].sigmoid()[mask].mean()) if mask.any() else 0.0
        small = F.interpolate(mask[None, None].float(), size=pixels.shape[:2], mode="nearest")[0, 0].bool().numpy()
        if score >= 0.3 and small.any():
            rows, columns = np.nonzero(small)
            box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
            crop = Picture.composite(image, Picture.new("RGB", image.size, "#999"), Picture.fromarray(small)).crop(box)
            detections.append((NAMES[label], box, score, colour_of(crop, NAMES[label])))
    return detections


def colour_of(crop: Picture.Image, name: str) -> str:
    model, tokenizer = hf.CLIPModel.from_pretrained(clip()).eval(), hf.AutoTokenizer.from_pretrained(clip())
    pixels = hf.CLIPImageProcessor.from_pretrained(clip())(crop, return_tensors="pt")
    image_embed = F.normalize(model.get_image_features(**pixels).pooler_output)[0]
    scores = []
    for colour in COLOURS:
        prompts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"]
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
        text_embeds = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        scores.append(float(F.normalize(F.normalize(text_embeds).mean(0), dim=0) @ image_embed))
    return COLOURS[int(np.argmax(scores))]


def test_detections_equal_transformers():
    by_image = [detector()(pixels) for pixels in images()]
    assert sum(map(len, by_image)) > 3
    for pixels, detections in zip(images(), by_image, strict=True):
        expected = sorted(directly(pixels))
        ours = sorted((detection.name, detection.box, detection.score, detection.colour) for detection in detections)
        assert [(name, box, colour) for name, box, _, colour in ours] == [(n, box, c) for n, box, _, c in expected]
        assert [detection[2] for detection in ours] == pytest.approx([detection[2] for detection in expected], abs=1e-4)


def test_name_identifies_the_weights():
    assert detector().name.startswith(f"Mask2FormerForUniversalSegmentation {mask2former()} ")
    assert "colours by CLIPModel" in detector().name


def test_model_with_other_classes_is_refused():
    with pytest.raises(ValueError, match="has 7 classes: GenEval needs COCO's 80"):
        InstanceDetector(str(mask2former(NAMES[:7])), str(clip()), CPU)
    with pytest.raises(ValueError, match="calls its class 0 'toothbrush'; in COCO it is 'person'"):
        InstanceDetector(str(mask2former(NAMES[::-1])), str(clip()), CPU)


def test_model_without_instance_masks_is_refused(monkeypatch):
    monkeypatch.setattr(hf.Mask2FormerImageProcessorPil, "post_process_instance_segmentation", lambda self, outputs: [])
    with pytest.raises(ValueError, match="gives no mask for each object"):
        InstanceDetector(str(mask2former()), str(clip()), CPU)


def test_evaluate_draws_the_published_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "published_prompts", lambda: published_prompts()[:2])
    run = tmp_path / "run"
    command("train", "digits", *TINY, "--generation.steps", "1", "--out", run)
    arguments = "evaluate", run, "--tasks", "geneval", "--detector", mask2former()
    assert "detector needs --clip" in fails(capsys, 1, *arguments)
    command(*arguments, "--clip", clip())
    results = read_json(run / "results.json")
    assert results["geneval"]["geneval"]["count_drawn"] == 8
    assert 0 <= results["geneval"]["geneval"]["overall"] <= 1
    assert results["manifest"][0]["networks"]["geneval geneval"].startswith("Mask2Former")
