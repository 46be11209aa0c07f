"""GenEval's detector: the things and colours that transformers finds by itself, and what cannot be one."""

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
OTHERS = tuple({"computer mouse": "mouse", "tv remote": "remote", "couch": "sofa"}.get(name, name) for name in NAMES)


@cache
def mask2former(names: tuple[str, ...] = OTHERS) -> Path:
    """A small one of chance, made sure of itself."""
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


def pictures() -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, shape, np.uint8) for shape in ((48, 32, 3), (40, 56, 1), (64, 64, 3))]


@torch.inference_mode()
def directly(pixels: np.ndarray) -> list[tuple[str, tuple, float, str]]:
    """Without any of ours: masks and scores from the model's logits, colours as GenEval asks CLIP, with PIL."""
    model = hf.Mask2FormerForUniversalSegmentation.from_pretrained(mask2former()).eval()
    image = Picture.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
    said = model(**hf.AutoImageProcessor.from_pretrained(mask2former())(image, return_tensors="pt"))
    shares = said.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, kinds)
    large = F.interpolate(said.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False)[0]
    found = []
    for query, kind in (shares.flatten().topk(len(shares)).indices[:, None] // torch.tensor([shares.shape[1], 1])).tolist():
        kind %= shares.shape[1]
        mask = large[query] > 0
        score = float(shares[query, kind] * large[query].sigmoid()[mask].mean()) if mask.any() else 0.0
        small = F.interpolate(mask[None, None].float(), size=pixels.shape[:2], mode="nearest")[0, 0].bool().numpy()
        if score >= 0.3 and small.any():
            rows, columns = np.nonzero(small)
            box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
            alone = Picture.composite(image, Picture.new("RGB", image.size, "#999"), Picture.fromarray(small)).crop(box)
            found.append((NAMES[kind], box, score, colour_of(alone, NAMES[kind])))
    return found


def colour_of(alone: Picture.Image, name: str) -> str:
    model, tokenizer = hf.CLIPModel.from_pretrained(clip()).eval(), hf.AutoTokenizer.from_pretrained(clip())
    pixels = hf.CLIPImageProcessor.from_pretrained(clip())(alone, return_tensors="pt")
    shown = F.normalize(model.get_image_features(**pixels).pooler_output)[0]
    scores = []
    for colour in COLOURS:
        words = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"]
        tokens = tokenizer(words, padding=True, truncation=True, max_length=8, return_tensors="pt")
        told = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        scores.append(float(F.normalize(F.normalize(told).mean(0), dim=0) @ shown))
    return COLOURS[int(np.argmax(scores))]


def test_it_finds_what_transformers_finds():
    seen = [detector()(pixels) for pixels in pictures()]
    assert sum(map(len, seen)) > 3
    for pixels, found in zip(pictures(), seen, strict=True):
        expected = sorted(directly(pixels))
        ours = sorted((it.name, it.box, it.score, it.colour) for it in found)
        assert [(name, box, colour) for name, box, _, colour in ours] == [(n, box, c) for n, box, _, c in expected]
        assert [it[2] for it in ours] == pytest.approx([it[2] for it in expected], abs=1e-4)


def test_its_name_says_by_which_weights():
    assert detector().name.startswith(f"Mask2FormerForUniversalSegmentation {mask2former()} ")
    assert "colours by CLIPModel" in detector().name


def test_one_that_knows_other_things_than_coco_is_refused():
    with pytest.raises(ValueError, match="tells 7 kinds of things apart: GenEval asks for COCO's 80"):
        InstanceDetector(str(mask2former(NAMES[:7])), str(clip()), CPU)
    with pytest.raises(ValueError, match="calls its kind 0 'toothbrush', which in COCO is 'person'"):
        InstanceDetector(str(mask2former(NAMES[::-1])), str(clip()), CPU)


def test_one_that_gives_no_masks_is_refused(monkeypatch):
    monkeypatch.setattr(hf.Mask2FormerImageProcessorPil, "post_process_instance_segmentation", lambda self, outputs: [])
    with pytest.raises(ValueError, match="gives no mask for each thing"):
        InstanceDetector(str(mask2former()), str(clip()), CPU)


def test_a_run_is_asked_the_published_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "published_prompts", lambda: published_prompts()[:2])
    run = tmp_path / "run"
    command("train", "digits", *TINY, "--generation.steps", "1", "--out", run)
    words = "evaluate", run, "--tasks", "geneval", "--detector", mask2former()
    assert "detector needs --clip" in fails(capsys, 1, *words)
    command(*words, "--clip", clip())
    results = read_json(run / "results.json")
    assert results["geneval"]["geneval"]["count_drawn"] == 8
    assert 0 <= results["geneval"]["geneval"]["overall"] <= 1
    assert results["manifest"][0]["networks"]["geneval geneval"].startswith("Mask2Former")
