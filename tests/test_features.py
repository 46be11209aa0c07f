"""Features and CLIP score: those of pytorch-fid and of transformers called directly; a small network learns what it says."""

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

from tests.lazy import Lazy
from tests.sources import picture
from transfusion.data.built_in.shapes import COLOURS, Shapes
from transfusion.evaluation import small_network
from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.features import VisionModel, open_extractor
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.inception import Inception, Network
from transfusion.evaluation.small_network import SmallNetwork

hf = Lazy("transformers")

torch.set_num_threads(1)
CPU = torch.device("cpu")
_FOLDER = TemporaryDirectory()
FOLDER = Path(_FOLDER.name)


def pictures() -> list[np.ndarray]:
    """Of three sizes, one of them grey."""
    return [picture(0, 40, 24)[1], picture(1, 24, 40)[1], picture(2, 64, 64)[1][..., :1]]


# Inception

PYTORCH_FID = {  # features 0 to 3, 500, 2000 and the mean, of pytorch-fid 0.3.0 with these weights and pictures
    (32, 32): [0.00038566, 0.000359388, 0.0076885, 0.0243937, 0.222299, 0.94188, 0.0759166],
    (20, 50): [0.000590645, 9.07225e-05, 0.00503101, 0.0320366, 0.219007, 0.930993, 0.0757337],
    (310, 330): [0.00255959, 0.000269236, 0.00639945, 0.0332424, 0.222237, 0.931227, 0.0758878],
}


def waves(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor for each name, of waves whose length follows from the name; of a size that keeps signals alive."""
    found = {}
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
        found[name] = torch.tensor(wave, dtype=torch.int64 if name.endswith("tracked") else torch.float32)
    return found


def striped() -> list[np.ndarray]:
    """Three of different sizes, one of them larger than what Inception sees."""
    found = []
    for height, width in ((32, 32), (20, 50), (310, 330)):
        y, x, c = np.ogrid[:height, :width, :3]
        found.append((127.5 + 127 * np.sin(0.31 * x + 0.17 * y * (1 + c) + c)).astype(np.uint8))
    return found


@cache
def inception() -> Path:
    """A file as pytorch-fid's, of other weights."""
    path = FOLDER / "inception.safetensors"
    shapes = {name: tensor.shape for name, tensor in Network().state_dict().items()}
    save_file(waves(shapes) | {"fc.weight": torch.zeros(1008, 1), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_inception_gives_the_features_of_pytorch_fid(monkeypatch):
    """Whatever other pictures go through it at the same time."""
    monkeypatch.setattr("transfusion.evaluation.inception.AT_ONCE", 2)
    found = open_extractor(str(inception()), CPU)(striped())
    assert (found.shape, found.dtype) == ((3, Inception.features), np.float32)
    for row, pixels in zip(found, striped(), strict=True):
        here = [*row[[0, 1, 2, 3, 500, 2000]], row.mean()]
        assert here == pytest.approx(PYTORCH_FID[pixels.shape[:2]], rel=1e-3, abs=1e-6)


def test_inception_looks_at_grey_as_colour():
    look = open_extractor(str(inception()), CPU)
    grey = striped()[0][..., :1]
    one, other = look([grey, np.repeat(grey, 3, 2)])
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert look([]).shape == (0, 2048)


def test_inception_is_named_by_its_weights(tmp_path):
    look = open_extractor(str(inception()), CPU)
    assert look.name.split()[:2] == ["Inception", "v3"]
    assert "not the one" not in look.name
    tensors = {name: tensor for name, tensor in load_file(inception()).items() if not name.startswith("fc.")}
    torch.save(tensors, tmp_path / "of-torchvision.pth")
    other = open_extractor(str(tmp_path / "of-torchvision.pth"), CPU)
    assert "not the one of published FIDs" in other.name
    assert other.name[:21] != look.name[:21]
    assert torch.equal(other.network.Mixed_7c.branch_pool.conv.weight, look.network.Mixed_7c.branch_pool.conv.weight)


def test_inception_without_weights_says_which_file_to_put_where(tmp_path):
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
    """With a tokenizer of whole words."""
    torch.manual_seed(1)  # one with cosines on both sides of 0
    folder = FOLDER / "clip"
    half = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    hf.CLIPModel(hf.CLIPConfig(
        text_config=half | ids, vision_config=half | {"image_size": 32, "patch_size": 8}, projection_dim=24,
    )).save_pretrained(folder)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    words = ["<s>", "</s>", "?", *"a red blue green circle square on the left".split()]
    cut = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    cut.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=cut, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="?"
    ).save_pretrained(folder)
    return folder


@torch.inference_mode()
def directly(folder: Path, pixels: np.ndarray) -> Tensor:
    """One picture through a model of transformers, without any of ours: the short side to 32, the middle cut out."""
    side = json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]["height"]
    prepare = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": side, "width": side})
    x = prepare(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), return_tensors="pt")["pixel_values"]
    if folder == dino():
        return hf.Dinov2Model.from_pretrained(folder).eval()(x).last_hidden_state[0, 0]
    model = hf.CLIPModel.from_pretrained(folder).eval()
    return model.visual_projection(model.vision_model(x).pooler_output)[0]


@pytest.mark.parametrize("folder", [dino, clip])
def test_features_are_those_of_transformers(folder, monkeypatch):
    monkeypatch.setattr("transfusion.evaluation.features.AT_ONCE", 2)
    look = open_extractor(str(folder()), CPU)
    found = look(pictures())
    assert (found.shape, found.dtype, look.features) == ((3, 24), np.float32, 24)
    for row, pixels in zip(found, pictures(), strict=True):
        np.testing.assert_allclose(row, directly(folder(), pixels).numpy(), rtol=1e-4, atol=1e-5)
    assert str(folder()) in look.name
    assert look.name.startswith({dino: "Dinov2Model", clip: "CLIPModel"}[folder])
    assert look([]).shape == (0, 24)


def test_what_is_no_vision_model_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(ValueError, match=f"^no vision model can be opened at {source}: .+$"):
            VisionModel(str(source), CPU)
    for source in (tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(ValueError, match=r"it is no folder.*; put its config\.json, .*model\.safetensors"):
            VisionModel(str(source), CPU)
    folder = tmp_path / "lacking"
    folder.mkdir()
    for path in dino().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if name != "layernorm.weight"}
    save_file(fewer, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, layernorm.weight for one"):
        VisionModel(str(folder), CPU)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no vision model can be opened"):
        VisionModel(str(folder), CPU)


def test_a_model_without_a_word_on_the_whole_picture_is_refused(tmp_path):
    hf.ViTModel(hf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, intermediate_size=24,
    ), add_pooling_layer=False).save_pretrained(tmp_path)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks weights, pooler"):
        VisionModel(str(tmp_path), CPU)


# CLIP score

CAPTIONS = ["a red circle", "the blue square on the left on the left on the left", "green"]


@torch.inference_mode()
def cosines() -> list[float]:
    """Without any of ours, each alone, its words by hand; 8 positions are all that this CLIP reads."""
    model, found = hf.CLIPModel.from_pretrained(clip()).eval(), []
    words = {word: n for n, word in enumerate("<s> </s> ? a red blue green circle square on the left".split())}
    for text, pixels in zip(CAPTIONS, pictures(), strict=True):
        ids = torch.tensor([[0, *(words[word] for word in text.split()[:6]), 1]])
        said = model.text_projection(model.text_model(ids).pooler_output)[0]
        shown = directly(clip(), pixels)
        found.append(float(said @ shown / said.norm() / shown.norm()))
    return found


def test_clip_score_is_100_times_the_cosine_and_never_negative(monkeypatch):
    monkeypatch.setattr("transfusion.evaluation.clip_score.AT_ONCE", 2)
    score, expected = ClipScore(str(clip()), CPU), cosines()
    assert min(expected) < 0 < max(expected)  # both sides are tried
    assert score.each(pictures(), CAPTIONS) == pytest.approx([100 * max(0, value) for value in expected], rel=1e-4)
    assert score(pictures(), CAPTIONS) == pytest.approx(np.mean([100 * max(0, value) for value in expected]), rel=1e-4)
    assert score.name.startswith(f"CLIPModel {clip()} ")


def test_a_siglip_is_no_clip(tmp_path):
    """It pools the last place of its captions, which other captions' lengths would move."""
    half = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.SiglipModel(hf.SiglipConfig(
        text_config=half | {"vocab_size": 20, "max_position_embeddings": 8},
        vision_config=half | {"image_size": 32, "patch_size": 8},
    )).save_pretrained(tmp_path)  # fmt: skip
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a siglip, no clip"):
        ClipScore(str(tmp_path), CPU)


def test_clip_score_needs_a_whole_clip_and_a_caption_for_each_picture(tmp_path):
    with pytest.raises(ValueError, match="reads no text"):
        ClipScore(str(dino()), CPU)
    score = ClipScore(str(clip()), CPU)
    for few in ([], CAPTIONS[:2]):
        with pytest.raises(ValueError, match=f"3 pictures need one caption each, not {len(few)}"):
            score(pictures(), few)
    for path in clip().iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer: tokenizer.json or vocab.json should be there"):
        ClipScore(str(tmp_path), CPU)


# The small network


@cache
def pairs(split: str, count: int) -> tuple[list[str], list[np.ndarray]]:
    """Captions and pictures of shapes, one thing in each."""
    source = Shapes(0, split=split)
    captions, drawn = zip(*(source[n].pair for n in range(count)), strict=True)
    return list(captions), list(drawn)


@pytest.fixture(scope="module")
def network() -> SmallNetwork:
    captions, drawn = pairs("train", 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_network, "STEPS", 200)
        return SmallNetwork("shapes", drawn, captions)


def test_a_small_network_learns_what_captions_say(network):
    assert {"red", "circle", "red circle", "small"} <= set(network.vocabulary)
    assert "a" not in network.vocabulary  # all captions have it
    assert colours_right(network, pairs("heldout", 100)[1]) > 0.6  # one of six, which it may also leave open


def colours_right(network: SmallNetwork, drawn: list[np.ndarray]) -> float:
    """The share of the first held-out pictures, as drawn here, of which it guesses the colour and no other."""
    captions = pairs("heldout", len(drawn))[0]
    colours = [guessed & COLOURS.keys() for guessed in network.guess(drawn)]
    return float(np.mean([here == {words.split()[2]} for here, words in zip(colours, captions, strict=True)]))


def test_its_scores_tell_good_pictures_from_bad_ones(network):
    real, same = (network(drawn) for _, drawn in (pairs("heldout", 100), pairs("train", 200)))
    chance = np.random.default_rng(0)
    drawn = pairs("train", 200)[1]
    noisy = [(it + chance.normal(0, 40, it.shape)).clip(0, 255).astype(np.uint8) for it in drawn]
    pale = [it // 2 + 60 for it in drawn]
    few_kinds = drawn[:10] * 20
    good, *bad = (image_scores(real, network(it))["fid"] for it in (drawn, noisy, pale, few_kinds))
    assert 1.5 * good < min(bad)
    assert image_scores(real, same)["coverage"] > 0.8 > image_scores(real, network(few_kinds))["coverage"]


def test_its_features_have_mean_0_and_deviation_1_where_it_learnt(network):
    found = network(pairs("train", 400)[1])
    assert (found.shape, found.dtype) == ((400, network.features), np.float32)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(found.std(0, ddof=1), 1, atol=1e-3)
    assert network([]).shape == (0, network.features)


def test_pictures_of_any_size_and_grey_ones_are_looked_at(network):
    large = [np.repeat(np.repeat(pixels, 3, 0), 3, 1) for pixels in pairs("heldout", 50)[1]]
    assert colours_right(network, large) > 0.6
    grey = large[0][..., :1]
    assert np.array_equal(network([grey]), network([np.repeat(grey, 3, 2)]))


def test_it_follows_from_its_seed_and_touches_no_other_chance(monkeypatch):
    monkeypatch.setattr(small_network, "STEPS", 5)
    captions, drawn = pairs("train", 40)
    state = torch.get_rng_state()
    one = SmallNetwork("shapes", drawn, captions)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = SmallNetwork("shapes", drawn, captions), SmallNetwork("shapes", drawn, captions, seed=1)
    assert np.array_equal(one(drawn), again(drawn))
    assert not np.array_equal(one(drawn), other(drawn))
    assert one.name == again.name == "small network of shapes (40 pictures, 5 steps, seed 0)"
    assert "seed 1" in other.name


@pytest.mark.parametrize("captions", [["a circle"] * 4, [""] * 4])
def test_captions_that_say_nothing_teach_nothing(captions):
    with pytest.raises(ValueError, match="captions of plain do not differ"):
        SmallNetwork("plain", pairs("train", 4)[1], captions)
