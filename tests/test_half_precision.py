"""Exports in float16: the outputs are exactly those of a float32 run whose weights were rounded to float16."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.sources import write_photos
from tests.test_cli import TINY_TRAINING, command, fails
from tests.test_export import answers_of, same
from tests.tiny import prepared, run_tensors, save, small_run
from transfusion.checkpoint.export import export
from transfusion.checkpoint.save import create_run_folder
from transfusion.codecs.autoencoder import Autoencoder, build_network
from transfusion.codecs.config import AutoencoderConfig
from transfusion.codecs.vq import VQ, QuantisedNetwork
from transfusion.inference.engine import open_run
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Vocabulary

IMAGES = list(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype=np.uint8))
CODEC = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1, image_channels=1)
KINDS = "pixels", "autoencoder", "vq"


def rounded(network: torch.nn.Module) -> torch.nn.Module:
    """The same network with weights rounded to float16."""
    return network.half().float()


def build_codec(kind: str, is_rounded: bool, fitted):
    """A codec of digits with f = 2; its statistics are those before rounding."""
    if kind == "pixels":
        return fitted
    codec = Autoencoder.fit(build_network(CODEC, 0), IMAGES) if kind == "autoencoder" else VQ(
        build_network(replace(CODEC, codes=16), 0, QuantisedNetwork)
    )  # fmt: skip
    if is_rounded:
        rounded(codec.network)
    return codec


def write_run(folder: Path, kind: str, is_rounded: bool = False, **changes: torch.Tensor) -> Path:
    """An untrained run with this codec, its weights rounded to float16 on request. changes: other tensors of its average."""
    run, encoder = prepared(small_run())
    codec = build_codec(kind, is_rounded, encoder.codec)
    latent = codec.encode(IMAGES[0])
    has_codes = kind == "vq"
    patch_size = 1 if has_codes else 2
    vocabulary = Vocabulary.build(encoder.tokenizer.size, [latent.shape[-2:]], patch_size, 16 if has_codes else 0)
    patches = {"patches": "codes", "patch_size": 1} if has_codes else {}
    model = replace(run.model, vocab_size=vocabulary.size, latent_channels=codec.channels, **patches)
    run = replace(run, model=model)
    create_run_folder(folder, run, encoder.tokenizer, codec, vocabulary, {})
    tensors = run_tensors(run, 3)
    tensors["ema"] |= changes
    if is_rounded:
        tensors["ema"] = {name: value.half().float() for name, value in tensors["ema"].items()}
    save(folder, 3, tensors, {"step": 3})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_float32_run_with_rounded_weights(tmp_path, kind):
    run = write_run(tmp_path / "run", kind)
    half = export(run, tmp_path / "half", dtype="float16")
    answers = answers_of(half)
    assert same(answers, answers_of(write_run(tmp_path / "rounded", kind, is_rounded=True)))
    assert not same(answers, answers_of(run))  # the comparison can fail
    opened = open_run(half).opened
    networks = [opened.model, *([opened.codec.network] if kind != "pixels" else [])]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.float32}
    again = export(half, tmp_path / "again")
    assert same(answers_of(again), answers)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_card_have_the_dtype(tmp_path, kind):
    run = write_run(tmp_path / "run", kind)
    half, full = export(run, tmp_path / "half", dtype="float16"), export(run, tmp_path / "full")
    for folder, dtype in ((half, torch.float16), (full, torch.float32)):
        tensors = load_file(folder / "model.safetensors")
        assert {value.dtype for value in tensors.values()} == {dtype}
        name = str(dtype).removeprefix("torch.")
        assert json.loads((folder / "config.json").read_text())["dtype"] == name
        assert f"The weights are {name}: the moving average" in (folder / "README.md").read_text()
    before, after = (load_file(folder / "codec.safetensors") for folder in (full, half))
    statistics = {"mean", "std", "low", "high", "config"}
    for name in before:
        is_kept = kind == "pixels" or name in statistics
        assert after[name].dtype == (before[name].dtype if is_kept else torch.float16), name
        assert torch.equal(after[name], before[name].to(after[name].dtype))


def test_network_alone_is_loaded_from_float16(tmp_path):
    run = write_run(tmp_path / "run", "pixels")
    half = export(run, tmp_path / "half", dtype="float16")
    expected = rounded(Transfusion.from_pretrained(export(run, tmp_path / "full"))).state_dict()
    for dtype in (None, "float16"):
        model = Transfusion.from_pretrained(half, dtype=dtype)
        assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in model.state_dict().items())
        assert {value.dtype for value in model.state_dict().values()} == {torch.float16 if dtype else torch.float32}


def test_weight_that_is_too_large_is_one_line_and_leaves_nothing(tmp_path, capsys):
    large = {"transformer.blocks.0.attention.out.weight": torch.full((32, 32), 7e4)}
    model = write_run(tmp_path / "run", "pixels", **large)
    error = fails(capsys, 1, "export", model, "--out", tmp_path / "half", "--dtype", "float16")
    assert error.count("\n") == 1
    assert f"{next(iter(large))} of the model does not fit into float16, whose largest number is 65,504" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    command("export", model, "--out", tmp_path / "full")


def test_codec_weight_that_is_too_large_is_one_line(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "autoencoder")
    opened = open_run(run).opened
    with torch.no_grad():
        opened.codec.network.decoder[0].weight[0, 0] = -7e4
    monkeypatch.setattr("transfusion.checkpoint.export.open_checkpoint", lambda *_: opened)
    with pytest.raises(ValueError, match="decoder.0.weight of the codec does not fit into float16"):
        export(run, tmp_path / "half", dtype="float16")


def test_run_starts_from_a_float16_export_with_data_prepared_like_it(tmp_path):
    half = export(write_run(tmp_path / "run", "autoencoder"), tmp_path / "half", dtype="float16")
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--like", half, "--out", tmp_path / "data")
    model = "--model.width 32 --model.layers 2 --model.heads 2 --model.intermediate-size 48 --model.no-qk-norm".split()
    new = tmp_path / "new"
    command("train", "small", "--data", tmp_path / "data", "--from", half, "--out", new, *model, *TINY_TRAINING)
    assert np.array_equal(open_run(new).opened.codec.encode(IMAGES[0]), open_run(half).opened.codec.encode(IMAGES[0]))
