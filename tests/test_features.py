"""Features and CLIP score equal those of pytorch-fid and of transformers; the small feature network learns."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from experiments.distances import change_scenes
from tests.lazy import Lazy
from tests.profile import THOROUGH
from tests.sources import picture
from transfusion.data.built_in.shapes import COLOURS, Shapes
from transfusion.evaluation import small_network
from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.features import VisionModel, open_extractor
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.inception import InceptionExtractor, InceptionV3
from transfusion.evaluation.small_network import SmallFeatureNetwork

hf = Lazy("transformers")

torch.set_num_threads(1)
CPU = torch.device("cpu")
_FOLDER = TemporaryDirectory()
FOLDER = Path(_FOLDER.name)


def images() -> list[np.ndarray]:
    """Three sizes, one of them grey."""
    return [picture(0, 40, 24)[1], picture(1, 24, 40)[1], picture(2, 64, 64)[1][..., :1]]


# Inception

PYTORCH_FID = {  # features 0 to 3, 500, 2000 and the mean, of pytorch-fid 0.3.0 with these weights and pictures
    (32, 32): [0.00038566, 0.000359388, 0.0076885, 0.0243937, 0.222299, 0.94188, 0.0759166],
    (20, 50): [0.000590645, 9.07225e-05, 0.00503101, 0.0320366, 0.219007, 0.930993, 0.0757337],
    (310, 330): [0.00255959, 0.000269236, 0.00639945, 0.0332424, 0.222237, 0.931227, 0.0758878],
}


def waves(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A sine wave for each tensor, its frequency from the name, its amplitude such that activations stay stable."""
    tensors = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        wave = np.sin(np.arange(1, count + 1, dtype=np.float64) * (1 + len(name) / 10) ** 2).reshape(shape)
        match name.rpartition(".")[2]:
            case "weight" if len(shape) > 1:
                wave *= 2 / math.sqrt(math.prod(shape[1:]))
            case "weight" | "running_var":
                wave = 1 + 0.3 * wave
            case "num_batches_tracked":
                wave = wave * 0
            case _:
                wave *= 0.1
        tensors[name] = torch.tensor(wave, dtype=torch.int64 if name.endswith("tracked") else torch.float32)
    return tensors


def striped() -> list[np.ndarray]:
    """Three sizes, one of them larger than Inception's input."""
    stripes = []
    for height, width in ((32, 32), (20, 50), (310, 330)):
        y, x, c = np.ogrid[:height, :width, :3]
        stripes.append((127.5 + 127 * np.sin(0.31 * x + 0.17 * y * (1 + c) + c)).astype(np.uint8))
    return stripes


@cache
def inception() -> Path:
    """A file in pytorch-fid's format with other weights."""
    path = FOLDER / "inception.safetensors"
    shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    save_file(waves(shapes) | {"fc.weight": torch.zeros(1008, 1), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_inception_features_equal_pytorch_fid(monkeypatch):
    """Independently of the batch."""
    monkeypatch.setattr("transfusion.evaluation.inception.BATCH_SIZE", 2)
    features = open_extractor(str(inception()), CPU)(striped())
    assert (features.shape, features.dtype) == ((3, InceptionExtractor.num_features), np.float32)
    for row, pixels in zip(features, striped(), strict=True):
        values = [*row[[0, 1, 2, 3, 500, 2000]], row.mean()]
        assert values == pytest.approx(PYTORCH_FID[pixels.shape[:2]], rel=1e-3, abs=1e-6)


def test_inception_reads_grey_as_rgb():
    extract = open_extractor(str(inception()), CPU)
    grey = striped()[0][..., :1]
    of_grey, of_rgb = extract([grey, np.repeat(grey, 3, 2)])
    np.testing.assert_allclose(of_grey, of_rgb, rtol=1e-4, atol=1e-6)
    assert extract([]).shape == (0, 2048)


def test_inception_name_identifies_the_weights(tmp_path):
    extract = open_extractor(str(inception()), CPU)
    assert extract.name.split()[:2] == ["Inception", "v3"]
    assert "not the one" not in extract.name
    tensors = {name: tensor for name, tensor in load_file(inception()).items() if not name.startswith("fc.")}
    torch.save(tensors, tmp_path / "of-torchvision.pth")
    other = open_extractor(str(tmp_path / "of-torchvision.pth"), CPU)
    assert "not the one of published FIDs" in other.name
    assert other.name[:21] != extract.name[:21]
    assert torch.equal(other.network.Mixed_7c.branch_pool.conv.weight, extract.network.Mixed_7c.branch_pool.conv.weight)


def test_missing_inception_weights_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"at .*here\.pth: put .*pt_inception-2015-12-05-6726825d\.pth there"):
        open_extractor(str(tmp_path / "here.pth"), CPU)
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="has no tensor Conv2d_1a_3x3"):
        open_extractor(str(tmp_path / "resnet.safetensors"), CPU)


# Vision models of transformers


@cache
def dino() -> Path:
    torch.manual_seed(0)
    folder = FOLDER / "dino"
    hf.Dinov2Model(hf.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
    )).save_pretrained(folder)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@cache
def clip() -> Path:
    """A CLIP with a word-level tokenizer."""
    torch.manual_seed(1)  # this seed gives positive and negative cosines
    folder = FOLDER / "clip"
    half = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    hf.CLIPModel(hf.CLIPConfig(
        text_config=half | ids, vision_config=half | {"image_size": 32, "patch_size": 8}, projection_dim=24,
    )).save_pretrained(folder)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    words = ["<s>", "</s>", "?", *"a red blue green circle square on the left".split()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="?"
    ).save_pretrained(folder)
    return folder


@torch.inference_mode()
def directly(folder: Path, pixels: np.ndarray) -> Tensor:
    """The features by transformers alone: the short side resized to 32, center crop."""
    side = json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]["height"]
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": side, "width": side})
    x = processor(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), return_tensors="pt")["pixel_values"]
    if folder == dino():
        return hf.Dinov2Model.from_pretrained(folder).eval()(x).last_hidden_state[0, 0]
    model = hf.CLIPModel.from_pretrained(folder).eval()
    return model.visual_projection(model.vision_model(x).pooler_output)[0]


@pytest.mark.parametrize("folder", [dino, clip])
def test_features_equal_transformers(folder, monkeypatch):
    monkeypatch.setattr("transfusion.evaluation.features.BATCH_SIZE", 2)
    extract = open_extractor(str(folder()), CPU)
    features = extract(images())
    assert (features.shape, features.dtype, extract.num_features) == ((3, 24), np.float32, 24)
    for row, pixels in zip(features, images(), strict=True):
        np.testing.assert_allclose(row, directly(folder(), pixels).numpy(), rtol=1e-4, atol=1e-5)
    assert str(folder()) in extract.name
    assert extract.name.startswith({dino: "Dinov2Model", clip: "CLIPModel"}[folder])
    assert extract([]).shape == (0, 24)


def test_source_without_a_vision_model_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(ValueError, match=f"^no vision model can be opened at {source}: .+$"):
            VisionModel(str(source), CPU)
    for source in (tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(ValueError, match=r"it is not a folder.*; give a folder with config\.json, .*model\.safetensors"):
            VisionModel(str(source), CPU)
    folder = tmp_path / "lacking"
    folder.mkdir()
    for path in dino().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if name != "layernorm.weight"}
    save_file(fewer, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, for example layernorm.weight"):
        VisionModel(str(folder), CPU)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no vision model can be opened"):
        VisionModel(str(folder), CPU)


def test_model_without_a_pooled_output_is_refused(tmp_path):
    hf.ViTModel(hf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, intermediate_size=24,
    ), add_pooling_layer=False).save_pretrained(tmp_path)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks weights, for example pooler"):
        VisionModel(str(tmp_path), CPU)


# CLIP score

CAPTIONS = ["a red circle", "the blue square on the left on the left on the left", "green"]


@torch.inference_mode()
def cosines() -> list[float]:
    """By transformers alone, one pair at a time, with the ids by hand; this CLIP has a context of 8 positions."""
    model, values = hf.CLIPModel.from_pretrained(clip()).eval(), []
    ids_of = {word: n for n, word in enumerate("<s> </s> ? a red blue green circle square on the left".split())}
    for text, pixels in zip(CAPTIONS, images(), strict=True):
        ids = torch.tensor([[0, *(ids_of[word] for word in text.split()[:6]), 1]])
        text_embed = model.text_projection(model.text_model(ids).pooler_output)[0]
        image_embed = directly(clip(), pixels)
        values.append(float(text_embed @ image_embed / text_embed.norm() / image_embed.norm()))
    return values


def test_clip_score_is_100_times_the_cosine_and_at_least_0(monkeypatch):
    monkeypatch.setattr("transfusion.evaluation.clip_score.BATCH_SIZE", 2)
    score, expected = ClipScore(str(clip()), CPU), cosines()
    assert min(expected) < 0 < max(expected)  # both signs are tested
    assert score.score_each(images(), CAPTIONS) == pytest.approx([100 * max(0, value) for value in expected], rel=1e-4)
    assert score(images(), CAPTIONS) == pytest.approx(np.mean([100 * max(0, value) for value in expected]), rel=1e-4)
    assert score.name.startswith(f"CLIPModel {clip()} ")


def test_siglip_is_refused(tmp_path):
    """SigLIP pools the last position, which depends on the padding, that is, on other captions."""
    half = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.SiglipModel(hf.SiglipConfig(
        text_config=half | {"vocab_size": 20, "max_position_embeddings": 8},
        vision_config=half | {"image_size": 32, "patch_size": 8},
    )).save_pretrained(tmp_path)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a siglip model: a CLIP score needs a clip model"):
        ClipScore(str(tmp_path), CPU)


def test_clip_score_needs_a_whole_clip_and_one_caption_per_image(tmp_path):
    with pytest.raises(ValueError, match="has no text encoder"):
        ClipScore(str(dino()), CPU)
    score = ClipScore(str(clip()), CPU)
    for few in ([], CAPTIONS[:2]):
        with pytest.raises(ValueError, match=f"3 images need one caption each, not {len(few)}"):
            score(images(), few)
    for path in clip().iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer: add tokenizer.json or vocab.json"):
        ClipScore(str(tmp_path), CPU)


# The small network


@cache
def pairs(split: str, count: int) -> tuple[list[str], list[np.ndarray]]:
    """Captions and images of shapes, one thing in each."""
    source = Shapes(0, split=split)
    captions, drawn = zip(*(source[n].pair for n in range(count)), strict=True)
    return list(captions), list(drawn)


@pytest.fixture(scope="module")
def network() -> SmallFeatureNetwork:
    captions, drawn = pairs("train", 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_network, "STEPS", 200)
        return SmallFeatureNetwork("shapes", drawn, captions)


def test_small_network_learns_caption_words(network):
    assert {"red", "circle", "red circle", "small"} <= set(network.vocabulary)
    assert "a" not in network.vocabulary  # every caption has it
    assert colours_right(network, pairs("heldout", 100)[1]) > 0.6  # chance is at most 1 / 6


def colours_right(network: SmallFeatureNetwork, drawn: list[np.ndarray]) -> float:
    """The share of the first held-out images (in the form `drawn`) for which exactly the right colour is predicted."""
    captions = pairs("heldout", len(drawn))[0]
    colours = [words & COLOURS.keys() for words in network.predict_words(drawn)]
    return float(np.mean([predicted == {text.split()[2]} for predicted, text in zip(colours, captions, strict=True)]))


def test_scores_separate_good_images_from_bad_ones(network):
    real, same = (network(drawn) for _, drawn in (pairs("heldout", 100), pairs("train", 200)))
    rng = np.random.default_rng(0)
    drawn = pairs("train", 200)[1]
    noisy = [(image + rng.normal(0, 40, image.shape)).clip(0, 255).astype(np.uint8) for image in drawn]
    faded = [image // 2 + 60 for image in drawn]
    few_distinct = drawn[:10] * 20
    good, *bad = (image_scores(real, network(images))["fid"] for images in (drawn, noisy, faded, few_distinct))
    assert 1.5 * good < min(bad)
    assert image_scores(real, same)["coverage"] > 0.8 > image_scores(real, network(few_distinct))["coverage"]


def test_strengths_of_degradations_are_those_of_the_images():
    """An image with strength 0 of everything is unchanged; warping alone moves pixels and changes few values."""
    torch.manual_seed(0)
    plain = torch.cat([small_network._preprocess(image) for image in pairs("train", 200)[1]])
    degraded, strengths = small_network._degrade(plain)
    difference = (degraded - plain).abs().flatten(1).mean(1)
    assert strengths.shape == (200, small_network.NUM_DEGRADATIONS)
    assert (difference[(strengths == 0).all(1)] < 1e-4).all()
    assert (difference[(strengths > 0.1).any(1)] > 1e-3).all()
    warped = (strengths[:, 0] > 0.3) & (strengths[:, 1:] == 0).all(1)
    assert warped.any() and (difference[warped] < 0.3).all()
    torch.testing.assert_close(degraded[warped].amax((2, 3)), plain[warped].amax((2, 3)), atol=0.3, rtol=0)


@pytest.mark.skipif(not THOROUGH, reason="trains the network in full")
def test_scores_see_wrong_shapes_and_not_faint_noise():
    network = SmallFeatureNetwork("shapes", *pairs("train", 2000)[::-1])
    real = network(pairs("heldout", 400)[1])
    changed = change_scenes([Shapes(0, split="heldout").scene(400 + n) for n in range(400)])
    same, arches, noise = (image_scores(real, network(changed[name]))["fid"]
                           for name in ("none", "an arch as shape, 100% of scenes", "noise, 8 of 255"))  # fmt: skip
    assert arches > 2 * same and noise < 1.5 * same


def test_training_features_have_mean_0_and_std_1(network):
    features = network(pairs("train", 400)[1])
    assert (features.shape, features.dtype) == ((400, network.num_features), np.float32)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(0, ddof=1), 1, atol=1e-3)
    assert network([]).shape == (0, network.num_features)


def test_small_network_accepts_any_size_and_grey_images(network):
    large = [np.repeat(np.repeat(pixels, 3, 0), 3, 1) for pixels in pairs("heldout", 50)[1]]
    assert colours_right(network, large) > 0.6
    grey = large[0][..., :1]
    assert np.array_equal(network([grey]), network([np.repeat(grey, 3, 2)]))


def test_small_network_is_seeded_and_keeps_the_global_rng_state(monkeypatch):
    monkeypatch.setattr(small_network, "STEPS", 5)
    captions, drawn = pairs("train", 40)
    state = torch.get_rng_state()
    first = SmallFeatureNetwork("shapes", drawn, captions)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = SmallFeatureNetwork("shapes", drawn, captions), SmallFeatureNetwork("shapes", drawn, captions, seed=1)
    assert np.array_equal(first(drawn), again(drawn))
    assert not np.array_equal(first(drawn), other(drawn))
    assert first.name == again.name == "small network of shapes (40 pictures, 5 steps, seed 0)"
    assert "seed 1" in other.name


@pytest.mark.parametrize("captions", [["a circle"] * 4, [""] * 4])
def test_captions_that_do_not_differ_are_refused(captions):
    with pytest.raises(ValueError, match="captions of plain do not differ"):
        SmallFeatureNetwork("plain", pairs("train", 4)[1], captions)
