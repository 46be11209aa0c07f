"""Other people's autoencoders: the latents are diffusers' own, shifted and scaled; what was changed is refused."""

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
def network(shift: float | None = 0.3, factor: float = 0.7) -> Path:
    """A small one with random weights, f = 4, as diffusers writes it."""
    torch.manual_seed(0)
    folder = Path(_FOLDER.name) / f"{shift}-{factor}"
    vae = diffusers.AutoencoderKL(
        latent_channels=5, block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        shift_factor=shift, scaling_factor=factor,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def pictures(count: int = 6, width: int = 32, height: int = 16) -> list[np.ndarray]:
    return [picture(n, width, height)[1] for n in range(count)]


@pytest.mark.parametrize(("shift", "factor"), [(None, 0.18215), (0.0609, 1.5305)])
def test_latents_are_diffusers_own_shifted_scaled_and_normalised(shift, factor):
    codec = Pretrained.fit(str(network(shift, factor)), pictures())
    vae = diffusers.AutoencoderKL.from_pretrained(network(shift, factor))
    assert (codec.channels, codec.downsampling, codec.image_channels) == (5, 4, 3)
    batch = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        theirs = (vae.encode(batch).latent_dist.mean - (shift or 0)) * factor
    ours = np.stack(codec.encode_many(pictures()))
    raw = ours * codec.std[:, None, None] + codec.mean[:, None, None]
    np.testing.assert_allclose(raw, theirs.numpy(), atol=1e-4 * factor)
    assert np.abs(ours.mean((0, 2, 3))).max() < 1e-4
    assert np.abs(ours.std((0, 2, 3)) - 1).max() < 1e-4
    with torch.inference_mode():
        back = vae.decode(theirs[:1] / factor + (shift or 0)).sample
    expected = ((back[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(codec.decode(ours[0]).astype(float) - expected).max() <= 1


def test_it_is_stored_by_name_and_hash():
    codec = Pretrained.fit(str(network()), pictures())
    content = codec_to_bytes(codec)
    assert len(content) < 2000
    again = codec_from_bytes("pretrained", content)
    assert np.array_equal(again.encode(pictures()[0]), codec.encode(pictures()[0]))


def test_large_pictures_go_through_in_tiles(monkeypatch):
    codec = Pretrained.fit(str(network()), pictures())
    one = pictures(1, 64, 64)[0]
    whole = codec.encode(one)
    monkeypatch.setattr(pretrained, "TILED", 32 * 32)
    tiled = codec.encode(one)
    assert tiled.shape == whole.shape == (5, 16, 16)
    assert not np.array_equal(tiled, whole)  # it did go through in tiles
    assert codec.decode(tiled).shape == one.shape


def test_what_is_missing_or_changed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no autoencoder can be opened at .*nowhere"):
        Pretrained.fit(str(tmp_path / "nowhere"), pictures())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no autoencoder"):
        Pretrained.fit(str(tmp_path), pictures())
    with pytest.raises(ValueError, match="18x16"):
        Pretrained.fit(str(network()), pictures()).encode(pictures(1, 18, 16)[0])
    diffusers.AutoencoderKL.from_pretrained(network()).save_pretrained(tmp_path / "copy")
    content = codec_to_bytes(Pretrained.fit(str(tmp_path / "copy"), pictures()))
    path = next((tmp_path / "copy").glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="not those that the latents were made with"):
        codec_from_bytes("pretrained", content)


def test_names_on_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_pretrained("stabilityai/sd-vae-ft-mse")
    assert is_pretrained(str(network()))
    (tmp_path / "codecs" / "mine").mkdir(parents=True)
    assert not is_pretrained("codecs/mine")
    assert not is_pretrained("block_pca")
    monkeypatch.setattr(pretrained, "_download", lambda source: network())
    assert Pretrained.fit("somebody/something", pictures()).channels == 5


def test_a_run_learns_through_it(tmp_path, capsys):
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--codec", network(), "--out", tmp_path / "data")
    found = open_prepared(tmp_path / "data")
    assert (found.codec.kind, found.shapes) == ("pretrained", [(4, 4)])
    command("train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    command("generate", tmp_path / "run", "red", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["codec"]["kind"] == "pretrained"
    said = fails(capsys, 1, "data", "prepare", tmp_path / "photos", "--codec", "no/body", "--out", tmp_path / "new")
    assert "no autoencoder can be opened at no/body" in said
