"""The autoencoder: its size, its losses, its training, and its use as a codec."""

import json
import os
import shutil
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from skimage import metrics

from tests.profile import THOROUGH, examples
from tests.sources import picture, write_photos
from tests.test_cli import TINY, command, fails
from tests.tiny import finished, narrow_discriminator
from transfusion.codecs.autoencoder import (
    Autoencoder,
    Network,
    PatchDiscriminator,
    build_network,
    discriminator_loss,
    kl_divergence,
    to_bytes,
    to_unit,
    with_statistics,
)  # fmt: skip
from transfusion.codecs.codec import codec_from_bytes, codec_to_bytes, encode_many
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.perceptual import Identity, Perceptual
from transfusion.data.store import open_prepared
from transfusion.disk import read_json
from transfusion.training.codec import CodecTrainer, peak_signal_to_noise, structural_similarity
from transfusion.training.guard import TrainingError

SMALL = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1)
QUICK = CodecTrainingConfig(
    steps=6,
    batch_size=4,
    learning_rate=3e-3,
    warmup_steps=2,
    ema_decay=0.9,
    checkpoint_every=3,
    validate_every=3,
    log_every=3,
    heldout=4,
)
torch.set_num_threads(1)


@cache
def pictures(count: int = 40, width: int = 16, height: int = 16) -> np.ndarray:
    return np.stack([picture(n, width, height)[1] for n in range(count)])


@cache
def codec(seed: int = 0) -> Autoencoder:
    return with_statistics(build_network(SMALL, seed), list(pictures()))


# The network


def test_the_papers_network_has_86_million_parameters():
    with torch.device("meta"):
        network = Network(AutoencoderConfig())
    assert abs(sum(p.numel() for p in network.parameters()) / 86e6 - 1) < 0.05
    assert network.config.downsampling == 8


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("attention", [True, False])
def test_a_latent_is_f_times_smaller_and_comes_back_whole(multipliers, attention):
    config = AutoencoderConfig(channels=5, width=8, multipliers=multipliers, blocks=1, attention=attention, image_channels=1)
    network, f = build_network(config, 0), 2 ** (len(multipliers) - 1)
    made, mean, logvar = network(torch.zeros(2, 1, 16, 32), torch.zeros(2, 5, 16 // f, 32 // f))
    assert mean.shape == logvar.shape == (2, 5, 16 // f, 32 // f)
    assert made.shape == (2, 1, 16, 32)


def test_starting_weights_follow_from_the_seed_and_the_name():
    one, same, other = (build_network(SMALL, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    kernels = [name for name, value in one.items() if value.dim() > 1 and not name.endswith(".out.weight")]
    assert not any(torch.equal(one[name], other[name]) for name in kernels)
    assert len({one[name].flatten()[0].item() for name in kernels}) == len(kernels)
    assert all((value == 0).all() for name, value in one.items() if name.endswith(".out.weight"))  # blocks start as nothing


def test_bytes_are_units_and_back():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(to_bytes(to_unit(every)), every)
    assert (to_unit(every).min(), to_unit(every).max()) == (-1, 1)
    assert to_bytes(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


# Losses and measures


@examples(25)
@given(st.integers(0, 2**31))
def test_the_divergence_is_torchs(seed):
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn((2, 3, 4, 2, 2), generator=generator, dtype=torch.float64)
    latent = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


@examples(15)
@given(st.integers(0, 2**31), st.sampled_from((1, 3)), st.floats(0, 0.5))
def test_psnr_and_ssim_are_scikit_images(seed, colours, error):
    chance = np.random.default_rng(seed)
    one = chance.random((colours, 24, 20))
    other = (one + error * chance.standard_normal(one.shape)).clip(0, 1)
    a, b = (torch.from_numpy(2 * x - 1)[None] for x in (one, other))
    if error > 1e-3:
        expected = metrics.peak_signal_noise_ratio(one, other, data_range=1)
        assert abs(peak_signal_to_noise(a, b).item() - expected) < 1e-6
    _, full = metrics.structural_similarity(
        one, other, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert abs(structural_similarity(a, b).item() - full[:, 5:-5, 5:-5].mean()) < 1e-6


def test_the_discriminator_learns_what_is_real_and_the_network_to_pass_for_it():
    one, other = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), -2.0)
    assert discriminator_loss(one, other) == 0
    assert discriminator_loss(other, one) == 3
    said = PatchDiscriminator(3)(torch.zeros(2, 3, 64, 64))
    assert said.shape[:2] == (2, 1)
    assert said.shape[2] > 1  # of patches, not of pictures


def lpips_file(folder: Path) -> Path:
    """Random weights under the names of lpips.LPIPS(net="vgg")."""
    generator, tensors, before, number = torch.Generator().manual_seed(0), {}, 3, 0
    for part, widths in enumerate(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), 1):
        number += part > 1  # the pooling
        for width in widths:
            scale = (2 / (9 * before)) ** 0.5
            kernel = torch.randn((width, before, 3, 3), generator=generator) * scale
            tensors |= {f"net.slice{part}.{number}.weight": kernel, f"net.slice{part}.{number}.bias": torch.zeros(width)}
            before, number = width, number + 2
        tensors[f"lin{part - 1}.model.1.weight"] = torch.rand((1, width, 1, 1), generator=generator)
    assert number == 30  # torchvision's VGG-16 has layers 0 to 30, the last a pooling
    save_file(tensors, folder / "lpips.safetensors")
    return folder / "lpips.safetensors"


def test_lpips_is_zero_for_a_picture_itself_and_grows_with_the_difference(tmp_path):
    network = Perceptual.from_file(lpips_file(tmp_path))
    real = to_unit(torch.from_numpy(pictures(4, 32, 32)))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    distances = [network(real, (real + scale * noise).clamp(-1, 1)) for scale in (0, 0.05, 0.2, 0.8)]
    assert (distances[0] == 0).all()
    assert all((one < other).all() for one, other in zip(distances, distances[1:], strict=False))
    assert not any(p.requires_grad for p in network.parameters())
    swapped = network(noise, real), network(real, noise)
    torch.testing.assert_close(*swapped)


@pytest.mark.parametrize("name", ["lpips.pt", "lpips.pth", "lpips.pth.tar"])
@pytest.mark.parametrize("under", [lambda state: state, lambda state: {"epoch": 7, "arch": "vgg", "state_dict": state}])
def test_weights_that_torch_saved_are_those_of_safetensors(tmp_path, name, under):
    path = lpips_file(tmp_path)
    torch.save(under(load_file(path)), tmp_path / name)
    one, other = (Perceptual.from_file(path).state_dict() for path in (path, tmp_path / name))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_mocos_own_file_is_read(tmp_path):
    """As its authors save it: an epoch, a name, the optimizer, and the weights under `state_dict`."""
    state = load_file(identity_file(tmp_path, "module.encoder_q."))
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    whole = {"epoch": 200, "arch": "resnet50", "state_dict": OrderedDict(state), "optimizer": optimizer}
    torch.save(whole, tmp_path / "moco.pth.tar")
    found = Identity.from_file(tmp_path / "moco.pth.tar").state_dict()
    assert all(torch.equal(found[name.removeprefix("module.encoder_q.")], value) for name, value in state.items())


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", [Perceptual, Identity])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, kind, old):
    mark, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"state_dict": {"net.slice1.0.weight": torch.zeros(1), "trap": Trap(mark)}}, path,
               _use_new_zipfile_serialization=not old)  # fmt: skip
    with pytest.raises(ValueError) as caught:
        kind.from_file(path)
    assert str(caught.value) == f"{path} holds more than tensors, or is damaged: nothing of it was run"
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap works
    assert mark.exists()


def test_a_damaged_pth_is_refused_in_one_line(tmp_path):
    torch.save(load_file(identity_file(tmp_path, "")), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "damaged.pth"
    for damaged in (b"", b"\x80\x04.", b"no weights", content[:100], content[: len(content) // 2], content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged.pth holds more than tensors, or is damaged") as caught:
            Identity.from_file(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", [
    [torch.zeros(1)], torch.zeros(1), {"state_dict": None}, {3: torch.zeros(1)}, {"conv1.weight": 7},
])  # fmt: skip
def test_a_pth_of_something_else_is_refused_in_words(tmp_path, found):
    torch.save(found, tmp_path / "other.pth")
    for kind in (Perceptual, Identity):
        with pytest.raises(ValueError, match="other.pth holds no"):
            kind.from_file(tmp_path / "other.pth")


def identity_file(folder: Path, prefix: str) -> Path:
    """Random weights under the names of a MoCo checkpoint."""
    state = Identity().state_dict()
    save_file({prefix + name: value.clone() for name, value in state.items()}, folder / "moco.safetensors")
    return folder / "moco.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_identity_features_are_torchvisions_resnet_50(tmp_path, prefix):
    """Its 25.6 million parameters without the classifier's, under the names that checkpoints have."""
    torch.manual_seed(0)
    network = Identity.from_file(identity_file(tmp_path, prefix))
    assert sum(p.numel() for p in network.parameters()) == 25_557_032 - 2048 * 1000 - 1000
    real = to_unit(torch.from_numpy(pictures(2, 64, 64)))
    assert (network(real, real) == 0).all()
    assert (network(real, real.flip(3)) > 0).all()


@pytest.mark.parametrize("kind", [Perceptual, Identity])
def test_files_that_hold_no_such_weights_are_refused(tmp_path, kind):
    for name in ("nothing.safetensors", "nothing.pth"):
        with pytest.raises(ValueError, match=f"cannot read the weights in .*{name}"):
            kind.from_file(tmp_path / name)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no"):
        kind.from_file(tmp_path / "other.safetensors")


# As a codec


def test_latents_have_mean_0_and_deviation_1_over_what_they_were_fitted_on():
    latents = np.stack([codec().encode(one) for one in pictures()])
    assert np.abs(latents.mean((0, 2, 3))).max() < 1e-4
    assert np.abs(latents.var((0, 2, 3)) - 1).max() < 1e-3
    sides = latents.min((0, 2, 3)), latents.max((0, 2, 3))
    assert all(np.allclose(found, bound, atol=1e-3) for found, bound in zip(sides, (codec().low, codec().high), strict=True))


def test_a_picture_has_one_latent_whatever_stands_beside_it():
    mixed = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 16), (16, 8)))]
    for one, latent in zip(mixed, encode_many(codec(), mixed), strict=True):
        assert latent.shape == (4, one.shape[0] // 2, one.shape[1] // 2)
        np.testing.assert_allclose(latent, codec().encode(one), atol=1e-5)
        assert codec().decode(latent).shape == one.shape


def test_a_codec_on_the_disk_is_the_same():
    again = codec_from_bytes("autoencoder", codec_to_bytes(codec()))
    one = pictures()[3]
    assert np.array_equal(again.encode(one), codec().encode(one))
    assert np.array_equal(again.decode(again.encode(one)), codec().decode(codec().encode(one)))
    assert (again.channels, again.downsampling, again.image_channels) == (4, 2, 3)


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("mean"), lambda t: t.pop("config"), lambda t: t.pop("decoder.0.weight"),
    lambda t: t.update(more=np.zeros(1)), lambda t: t.update({"encoder.0.bias": np.zeros(3, np.float32)}),
    lambda t: t.update(config=np.frombuffer(b'{"width": "wide"}', np.uint8)),
    lambda t: t.update(config=np.frombuffer(b"{", np.uint8)),
])  # fmt: skip
def test_a_damaged_codec_is_refused_in_words(damage):
    from transfusion.codecs.codec import codec_of

    tensors = codec().tensors()
    damage(tensors)
    with pytest.raises(ValueError):
        codec_of("autoencoder", tensors)


def test_a_size_that_f_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="15x16"):
        codec().encode(pictures()[0][:, :15])


# Training


def train(folder: Path, config: CodecTrainingConfig = QUICK, stop_at: int | None = None) -> CodecTrainer:
    folder.mkdir(exist_ok=True)
    side = 16 if config.gan_from is None else 32
    with narrow_discriminator():
        trainer = CodecTrainer(SMALL, config, folder, pictures(40, side, side), torch.device("cpu"))
        return finished(trainer, folder, stop_at)


WAYS = [(None, 4), (2, 1)]  # from which step on with a discriminator, and where it is stopped


@pytest.mark.parametrize(("gan_from", "stop_at"), [*WAYS, (None, 1), (2, 4)] if THOROUGH else WAYS)
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, gan_from, stop_at):
    config = replace(QUICK, gan_from=gan_from)
    whole = train(tmp_path / "whole", config)
    train(tmp_path / "half", config, stop_at)
    half = train(tmp_path / "half", config)
    assert half.loop.progress.step == whole.loop.progress.step == 6
    for part, tensors in whole.tensors().items():
        assert all(torch.equal(value, half.tensors()[part][name]) for name, value in tensors.items())


def test_it_learns(tmp_path):
    before = CodecTrainer(SMALL, QUICK, tmp_path, pictures(), torch.device("cpu")).quality()
    after = train(tmp_path / "run", replace(QUICK, steps=60, warmup_steps=5, checkpoint_every=100)).quality()
    assert after["psnr"] > before["psnr"] + 3
    assert after["ssim"] > before["ssim"]


def test_every_loss_can_join_in(tmp_path):
    config = replace(QUICK, steps=2, batch_size=2, gan_from=1, perceptual=str(lpips_file(tmp_path)),
                     identity=str(identity_file(tmp_path, "")))  # fmt: skip
    trainer = train(tmp_path / "run", config)
    assert trainer.losses == ["L1", "LPIPS", "identity", "GAN", "KL"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [line for line in lines if "heldout" not in line]
    assert {"l1", "kl", "lpips", "identity", "fooled", "discriminator"} <= trained.keys()


def test_pictures_too_small_for_the_discriminator_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="32 pixels"):
        CodecTrainer(SMALL, replace(QUICK, gan_from=1), tmp_path, pictures(), torch.device("cpu"))
    with pytest.raises(TrainingError, match="too few"):
        CodecTrainer(SMALL, QUICK, tmp_path, pictures()[:1], torch.device("cpu"))


def test_epochs_see_each_picture_once_and_heldout_ones_never(tmp_path):
    trainer = CodecTrainer(SMALL, QUICK, tmp_path, pictures(), torch.device("cpu"))

    def epoch(first: int) -> list[tuple]:
        steps = islice(trainer.read(first), 9)  # 36 pictures
        return [tuple(one.flatten().tolist()) for read, _ in steps for one in read.pictures]

    seen = epoch(0)
    held = {tuple(pictures()[n].flatten().tolist()) for n in trainer.heldout}
    assert len(set(seen)) == 36
    assert not held & set(seen)
    assert epoch(9) != seen
    assert set(epoch(9)) == set(seen)


# As commands

FIT = ("--size", "16x16", "--network.width", 8, "--network.channels", 4, "--training.steps", 4, "--training.batch_size", 4,
       "--training.checkpoint-every", 2, "--training.validate-every", 4)  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    """A folder of pictures, and a codec of theirs."""
    with TemporaryDirectory() as folder:
        write_photos(Path(folder) / "photos", 60)
        command("data", "fit-codec", "small", f"{folder}/photos", "--out", f"{folder}/codec", *FIT)
        yield Path(folder)


def test_fit_codec_makes_a_codec_and_a_page(fitted, capsys):
    about = read_json(fitted / "codec" / "codec.json")
    assert (about["kind"], about["channels"], about["downsampling"]) == ("autoencoder", 4, 4)
    assert about["losses"] == ["L1", "KL"]
    assert about["heldout"]["count"] == 6
    assert (fitted / "codec" / "reconstructions.html").read_text().count("data:image/png;base64,") == 12
    command("data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT)
    assert "PSNR" in capsys.readouterr().err
    other = ("--out", fitted / "codec", *FIT, "--limit", 30)
    assert "started with other images" in fails(capsys, 1, "data", "fit-codec", "small", fitted / "photos", *other)
    said = fails(capsys, 2, "data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT[:-1], 3)
    assert "training.validate_every 4, not 3" in said


def test_a_run_learns_through_its_own_autoencoder(fitted, tmp_path, capsys):
    prepared = ("data", "prepare", fitted / "photos", "--out", tmp_path / "data")
    command(*prepared, "--codec", fitted / "codec")
    found = open_prepared(tmp_path / "data")
    assert found.codec.kind == "autoencoder"
    assert found.shapes == [(4, 4)]
    command("train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    command("generate", tmp_path / "run", "red above blue", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "000.png").exists()
    shutil.copytree(fitted / "codec", tmp_path / "other")
    about = read_json(tmp_path / "other" / "codec.json")
    (tmp_path / "other" / "codec.json").write_text(json.dumps({**about, "sha256": "0"}))
    assert "SHA-256" in fails(capsys, 1, *prepared[:-1], tmp_path / "new", "--codec", tmp_path / "other")
    assert "codec is" in fails(capsys, 1, *prepared)
    assert "holds no codec" in fails(capsys, 1, *prepared[:-1], tmp_path / "more", "--codec", tmp_path)
    said = fails(capsys, 1, *prepared[:-1], tmp_path / "odd", "--codec", fitted / "codec", "--sizes", "18x16")
    assert "--sizes 18x16: width and height must be divisible by the codec's downsampling, 4" in said


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("medium", "PHOTOS"), 2, "small"), (("small",), 2, "name a source"), (("small", "nowhere/x/y"), 1, "does not exist"),
    (("small", "PHOTOS", "--size", "18x18"), 2, "multiples of 4"),
    (("small", "PHOTOS", "--size", "big"), 1, "width x height"),
    (("small", "PHOTOS", "--network.multipliers", "0"), 2, "multipliers"),
    (("small", "PHOTOS", "--training.steps", "0"), 2, "at least 1"),
    (("small", "topics"), 1, "no image"), (("small", "PHOTOS", "--training.perceptual", "nowhere"), 1, "nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line(fitted, tmp_path, capsys, arguments, code, words):
    typed = [str(fitted / "photos") if word == "PHOTOS" else word for word in arguments]
    size = () if "--size" in arguments else ("--size", "16x16")
    assert words in fails(capsys, code, "data", "fit-codec", *typed, *size, "--most", 50, "--out", tmp_path / "codec")
