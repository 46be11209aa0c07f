"""Pretrained autoencoders: latents are those of diffusers, shifted and scaled; changed weights are refused."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from tests.lazy import Lazy
from tests.sources import picture, write_photos
from tests.test_cli import TINY, command, fails
from transfusion.codecs import pretrained
from transfusion.codecs.codec import codec_from_bytes, codec_to_bytes
from transfusion.codecs.pretrained import Pretrained, is_pretrained
from transfusion.data.store import open_prepared

diffusers = Lazy("diffusers")

torch.set_num_threads(1)
_FOLDER = TemporaryDirectory()


@cache
def write_network(shift: float | None = 0.3, factor: float = 0.7) -> Path:
    """The folder of a small network with random weights, f = 4, as diffusers writes it."""
    torch.manual_seed(0)
    folder = Path(_FOLDER.name) / f"{shift}-{factor}"
    vae = diffusers.AutoencoderKL(
        latent_channels=5, block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        shift_factor=shift, scaling_factor=factor,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def images(count: int = 6, width: int = 32, height: int = 16) -> list[np.ndarray]:
    return [picture(n, width, height)[1] for n in range(count)]


@pytest.mark.parametrize(("shift", "factor"), [(None, 0.18215), (0.0609, 1.5305)])
def test_latents_are_those_of_diffusers_shifted_scaled_and_normalised(shift, factor):
    codec = Pretrained.fit(str(write_network(shift, factor)), images())
    vae = diffusers.AutoencoderKL.from_pretrained(write_network(shift, factor))
    assert (codec.channels, codec.downsampling, codec.image_channels) == (5, 4, 3)
    batch = torch.from_numpy(np.stack(images())).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        expected = (vae.encode(batch).latent_dist.mean - (shift or 0)) * factor
    latents = np.stack(codec.encode_many(images()))
    raw = latents * codec.std[:, None, None] + codec.mean[:, None, None]
    np.testing.assert_allclose(raw, expected.numpy(), atol=1e-4 * factor)
    assert np.abs(latents.mean((0, 2, 3))).max() < 1e-4
    assert np.abs(latents.std((0, 2, 3)) - 1).max() < 1e-4
    with torch.inference_mode():
        decoded = vae.decode(expected[:1] / factor + (shift or 0)).sample
    pixels = ((decoded[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(codec.decode(latents[0]).astype(float) - pixels).max() <= 1


def test_codec_file_has_name_and_hash_instead_of_weights():
    codec = Pretrained.fit(str(write_network()), images())
    content = codec_to_bytes(codec)
    assert len(content) < 2000
    again = codec_from_bytes("pretrained", content)
    assert np.array_equal(again.encode(images()[0]), codec.encode(images()[0]))


def test_large_images_are_processed_in_tiles(monkeypatch):
    codec = Pretrained.fit(str(write_network()), images())
    image = images(1, 64, 64)[0]
    untiled = codec.encode(image)
    monkeypatch.setattr(pretrained, "TILING_PIXELS", 32 * 32)
    tiled = codec.encode(image)
    assert tiled.shape == untiled.shape == (5, 16, 16)
    assert not np.array_equal(tiled, untiled)  # tiling was used
    assert codec.decode(tiled).shape == image.shape


def test_missing_or_changed_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no autoencoder can be opened at .*nowhere"):
        Pretrained.fit(str(tmp_path / "nowhere"), images())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no autoencoder"):
        Pretrained.fit(str(tmp_path), images())
    with pytest.raises(ValueError, match="18x16"):
        Pretrained.fit(str(write_network()), images()).encode(images(1, 18, 16)[0])
    diffusers.AutoencoderKL.from_pretrained(write_network()).save_pretrained(tmp_path / "copy")
    content = codec_to_bytes(Pretrained.fit(str(tmp_path / "copy"), images()))
    path = next((tmp_path / "copy").glob("*.safetensors"))
    content_bytes = bytearray(path.read_bytes())
    content_bytes[-1] ^= 1
    path.write_bytes(content_bytes)
    with pytest.raises(ValueError, match="have changed since the data were encoded"):
        codec_from_bytes("pretrained", content)


def test_constant_channel_is_one_line(tmp_path):
    """Also one that is not a number, for example of weights that overflow."""
    for value in (0.0, float("nan")):
        vae = diffusers.AutoencoderKL.from_pretrained(write_network())
        with torch.no_grad():
            for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
                parameter[2] = value
        vae.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="channel 2 of .* is constant over the images, or not finite: give more images"):
            Pretrained.fit(str(tmp_path), images())


def test_hub_names_are_distinguished_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_pretrained("stabilityai/sd-vae-ft-mse")
    assert is_pretrained(str(write_network()))
    (tmp_path / "codecs" / "mine").mkdir(parents=True)
    assert not is_pretrained("codecs/mine")
    assert not is_pretrained("block_pca")
    monkeypatch.setattr(pretrained, "_download", lambda source: write_network())
    assert Pretrained.fit("somebody/something", images()).channels == 5


def test_run_trains_with_a_pretrained_codec(tmp_path, capsys):
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--codec", write_network(), "--out", tmp_path / "data")
    data = open_prepared(tmp_path / "data")
    assert (data.codec.kind, data.shapes) == ("pretrained", [(4, 4)])
    command("train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    command("generate", tmp_path / "run", "red", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["codec"]["kind"] == "pretrained"
    error = fails(capsys, 1, "data", "prepare", tmp_path / "photos", "--codec", "no/body", "--out", tmp_path / "new")
    assert "no autoencoder can be opened at no/body" in error
