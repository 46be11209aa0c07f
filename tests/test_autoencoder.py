"""The autoencoder: its network, losses and training, and its use as a codec."""

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
from tests.test_cli import TINY_FITTED, command, fails
from tests.tiny import finished, narrow_discriminator
from transfusion.codecs.autoencoder import (
    Autoencoder,
    AutoencoderNetwork,
    PatchDiscriminator,
    build_network,
    discriminator_loss,
    from_uint8,
    kl_divergence,
    to_uint8,
)  # fmt: skip
from transfusion.codecs.codec import codec_from_bytes, codec_to_bytes, encode_many
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.perceptual import LPIPS, IdentityLoss
from transfusion.data.store import open_prepared
from transfusion.disk import read_json
from transfusion.training.codec import CodecTrainer, psnr, ssim
from transfusion.training.guard import TrainingError

SMALL = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1)
QUICK = CodecTrainingConfig(
    steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=3, validate_every=3,
    log_every=3, heldout=4,
)  # fmt: skip
torch.set_num_threads(1)


@cache
def images(count: int = 40, width: int = 16, height: int = 16) -> np.ndarray:
    return np.stack([picture(n, width, height)[1] for n in range(count)])


@cache
def codec(seed: int = 0) -> Autoencoder:
    return Autoencoder.fit(build_network(SMALL, seed), list(images()))


# The network


def test_network_of_the_paper_has_86_million_parameters():
    with torch.device("meta"):
        network = AutoencoderNetwork(AutoencoderConfig())
    assert abs(sum(p.numel() for p in network.parameters()) / 86e6 - 1) < 0.05
    assert network.config.downsampling == 8


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("attention", [True, False])
def test_latents_are_f_times_smaller_and_images_keep_their_size(multipliers, attention):
    config = AutoencoderConfig(channels=5, width=8, multipliers=multipliers, blocks=1, attention=attention, image_channels=1)
    network, f = build_network(config, 0), 2 ** (len(multipliers) - 1)
    reconstruction, mean, logvar = network(torch.zeros(2, 1, 16, 32), torch.zeros(2, 5, 16 // f, 32 // f))
    assert mean.shape == logvar.shape == (2, 5, 16 // f, 32 // f)
    assert reconstruction.shape == (2, 1, 16, 32)


def test_first_weights_follow_from_the_seed_and_the_name():
    first, same, other = (build_network(SMALL, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    kernels = [name for name, value in first.items() if value.dim() > 1 and not name.endswith(".out.weight")]
    assert not any(torch.equal(first[name], other[name]) for name in kernels)
    assert len({first[name].flatten()[0].item() for name in kernels}) == len(kernels)
    assert all((value == 0).all() for name, value in first.items() if name.endswith(".out.weight"))  # blocks add nothing


def test_uint8_conversion_is_exact():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert (from_uint8(values).min(), from_uint8(values).max()) == (-1, 1)
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


# Losses and metrics


@examples(25)
@given(st.integers(0, 2**31))
def test_kl_divergence_equals_torch(seed):
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn((2, 3, 4, 2, 2), generator=generator, dtype=torch.float64)
    latent = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


@examples(15)
@given(st.integers(0, 2**31), st.sampled_from((1, 3)), st.floats(0, 0.5))
def test_psnr_and_ssim_equal_scikit_image(seed, channels, error):
    rng = np.random.default_rng(seed)
    image = rng.random((channels, 24, 20))
    other = (image + error * rng.standard_normal(image.shape)).clip(0, 1)
    a, b = (torch.from_numpy(2 * x - 1)[None] for x in (image, other))
    if error > 1e-3:
        expected = metrics.peak_signal_noise_ratio(image, other, data_range=1)
        assert abs(psnr(a, b).item() - expected) < 1e-6
    _, full = metrics.structural_similarity(
        image, other, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert abs(ssim(a, b).item() - full[:, 5:-5, 5:-5].mean()) < 1e-6


def test_discriminator_loss_is_hinge_over_patches():
    high, low = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), -2.0)
    assert discriminator_loss(high, low) == 0
    assert discriminator_loss(low, high) == 3
    logits = PatchDiscriminator(3)(torch.zeros(2, 3, 64, 64))
    assert logits.shape[:2] == (2, 1)
    assert logits.shape[2] > 1  # one per patch, not per image


def write_lpips(folder: Path) -> Path:
    """Random weights with the names of lpips.LPIPS(net="vgg")."""
    generator, tensors, in_width, number = torch.Generator().manual_seed(0), {}, 3, 0
    for part, widths in enumerate(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), 1):
        number += part > 1  # the pooling
        for width in widths:
            std = (2 / (9 * in_width)) ** 0.5
            kernel = torch.randn((width, in_width, 3, 3), generator=generator) * std
            tensors |= {f"net.slice{part}.{number}.weight": kernel, f"net.slice{part}.{number}.bias": torch.zeros(width)}
            in_width, number = width, number + 2
        tensors[f"lin{part - 1}.model.1.weight"] = torch.rand((1, width, 1, 1), generator=generator)
    assert number == 30  # torchvision's VGG-16 has layers 0 to 30, the last a pooling
    save_file(tensors, folder / "lpips.safetensors")
    return folder / "lpips.safetensors"


def test_lpips_is_zero_for_equal_images_and_grows_with_the_difference(tmp_path):
    network = LPIPS.from_file(write_lpips(tmp_path))
    real = from_uint8(torch.from_numpy(images(4, 32, 32)))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    distances = [network(real, (real + sigma * noise).clamp(-1, 1)) for sigma in (0, 0.05, 0.2, 0.8)]
    assert (distances[0] == 0).all()
    assert all((a < b).all() for a, b in zip(distances, distances[1:], strict=False))
    assert not any(p.requires_grad for p in network.parameters())
    swapped = network(noise, real), network(real, noise)
    torch.testing.assert_close(*swapped)


@pytest.mark.parametrize("name", ["lpips.pt", "lpips.pth", "lpips.pth.tar"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 7, "arch": "vgg", "state_dict": state}])
def test_pth_and_safetensors_give_the_same_weights(tmp_path, name, wrap):
    path = write_lpips(tmp_path)
    torch.save(wrap(load_file(path)), tmp_path / name)
    expected, actual = (LPIPS.from_file(path).state_dict() for path in (path, tmp_path / name))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_moco_checkpoint_is_read(tmp_path):
    """As its authors save it: the epoch, a name, the optimizer, and the weights under `state_dict`."""
    state = load_file(write_moco(tmp_path, "module.encoder_q."))
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    checkpoint = {"epoch": 200, "arch": "resnet50", "state_dict": OrderedDict(state), "optimizer": optimizer}
    torch.save(checkpoint, tmp_path / "moco.pth.tar")
    weights = IdentityLoss.from_file(tmp_path / "moco.pth.tar").state_dict()
    assert all(torch.equal(weights[name.removeprefix("module.encoder_q.")], value) for name, value in state.items())


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", [LPIPS, IdentityLoss])
@pytest.mark.parametrize("old", [False, True])
def test_pickle_with_code_is_refused_and_not_executed(tmp_path, kind, old):
    executed, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"state_dict": {"net.slice1.0.weight": torch.zeros(1), "trap": Trap(executed)}}, path,
               _use_new_zipfile_serialization=not old)  # fmt: skip
    with pytest.raises(ValueError) as caught:
        kind.from_file(path)
    assert str(caught.value) == f"{path} is damaged or holds other objects than tensors: no code in it was executed"
    assert not executed.exists()
    torch.load(path, weights_only=False)  # the trap works
    assert executed.exists()


def test_damaged_pth_is_refused_in_one_line(tmp_path):
    torch.save(load_file(write_moco(tmp_path, "")), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "damaged.pth"
    for damaged in (b"", b"\x80\x04.", b"no weights", content[:100], content[: len(content) // 2], content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged.pth is damaged or holds other objects") as caught:
            IdentityLoss.from_file(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    [torch.zeros(1)], torch.zeros(1), {"state_dict": None}, {3: torch.zeros(1)}, {"conv1.weight": 7},
])  # fmt: skip
def test_pth_with_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    for kind in (LPIPS, IdentityLoss):
        with pytest.raises(ValueError, match="other.pth has no tensor"):
            kind.from_file(tmp_path / "other.pth")


def write_moco(folder: Path, prefix: str) -> Path:
    """Random weights with the names of a MoCo checkpoint."""
    state = IdentityLoss().state_dict()
    save_file({prefix + name: value.clone() for name, value in state.items()}, folder / "moco.safetensors")
    return folder / "moco.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_identity_network_is_torchvisions_resnet_50(tmp_path, prefix):
    """Its 25.6 million parameters without the classifier, with the names of checkpoints."""
    torch.manual_seed(0)
    network = IdentityLoss.from_file(write_moco(tmp_path, prefix))
    assert sum(p.numel() for p in network.parameters()) == 25_557_032 - 2048 * 1000 - 1000
    real = from_uint8(torch.from_numpy(images(2, 64, 64)))
    assert (network(real, real) == 0).all()
    assert (network(real, real.flip(3)) > 0).all()


@pytest.mark.parametrize("kind", [LPIPS, IdentityLoss])
def test_files_without_the_weights_are_refused(tmp_path, kind):
    for name in ("nothing.safetensors", "nothing.pth"):
        with pytest.raises(ValueError, match=f"cannot read the weights in .*{name}"):
            kind.from_file(tmp_path / name)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no tensor"):
        kind.from_file(tmp_path / "other.safetensors")


# As a codec


def test_latents_of_the_fitted_images_have_mean_0_and_std_1():
    latents = np.stack([codec().encode(image) for image in images()])
    assert np.abs(latents.mean((0, 2, 3))).max() < 1e-4
    assert np.abs(latents.var((0, 2, 3)) - 1).max() < 1e-3
    assert np.allclose(latents.min((0, 2, 3)), codec().low, atol=1e-3)
    assert np.allclose(latents.max((0, 2, 3)), codec().high, atol=1e-3)


def test_latent_of_an_image_does_not_depend_on_the_batch():
    mixed = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 16), (16, 8)))]
    for image, latent in zip(mixed, encode_many(codec(), mixed), strict=True):
        assert latent.shape == (4, image.shape[0] // 2, image.shape[1] // 2)
        np.testing.assert_allclose(latent, codec().encode(image), atol=1e-5)
        assert codec().decode(latent).shape == image.shape


def test_codec_is_the_same_after_saving_and_loading():
    again = codec_from_bytes("autoencoder", codec_to_bytes(codec()))
    image = images()[3]
    assert np.array_equal(again.encode(image), codec().encode(image))
    assert np.array_equal(again.decode(again.encode(image)), codec().decode(codec().encode(image)))
    assert (again.channels, again.downsampling, again.image_channels) == (4, 2, 3)


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("mean"), lambda t: t.pop("config"), lambda t: t.pop("decoder.0.weight"),
    lambda t: t.update(more=np.zeros(1)), lambda t: t.update({"encoder.0.bias": np.zeros(3, np.float32)}),
    lambda t: t.update(config=np.frombuffer(b'{"width": "wide"}', np.uint8)),
    lambda t: t.update(config=np.frombuffer(b"{", np.uint8)),
])  # fmt: skip
def test_damaged_codec_is_refused(damage):
    from transfusion.codecs.codec import codec_from_tensors

    tensors = codec().tensors()
    damage(tensors)
    with pytest.raises(ValueError):
        codec_from_tensors("autoencoder", tensors)


def test_size_not_divisible_by_f_is_refused():
    with pytest.raises(ValueError, match="15x16"):
        codec().encode(images()[0][:, :15])


# Training


def train(folder: Path, config: CodecTrainingConfig = QUICK, stop_at: int | None = None) -> CodecTrainer:
    folder.mkdir(exist_ok=True)
    side = 16 if config.gan_from is None else 32
    with narrow_discriminator():
        trainer = CodecTrainer(SMALL, config, folder, images(40, side, side), torch.device("cpu"))
        return finished(trainer, folder, stop_at)


CASES = [(None, 4), (2, 1)]  # the first step with the discriminator, the step of the stop


@pytest.mark.parametrize(("gan_from", "stop_at"), [*CASES, (None, 1), (2, 4)] if THOROUGH else CASES)
def test_resumed_training_equals_uninterrupted(tmp_path, gan_from, stop_at):
    config = replace(QUICK, gan_from=gan_from)
    uninterrupted = train(tmp_path / "uninterrupted", config)
    train(tmp_path / "resumed", config, stop_at)
    resumed = train(tmp_path / "resumed", config)
    assert resumed.loop.progress.step == uninterrupted.loop.progress.step == 6
    for part, tensors in uninterrupted.tensors().items():
        assert all(torch.equal(value, resumed.tensors()[part][name]) for name, value in tensors.items())


def test_training_improves_reconstructions(tmp_path):
    before = CodecTrainer(SMALL, QUICK, tmp_path, images(), torch.device("cpu")).evaluate()
    after = train(tmp_path / "run", replace(QUICK, steps=60, warmup_steps=5, checkpoint_every=100)).evaluate()
    assert after["psnr"] > before["psnr"] + 3
    assert after["ssim"] > before["ssim"]


def test_training_with_all_losses(tmp_path):
    config = replace(QUICK, steps=2, batch_size=2, gan_from=1, perceptual=str(write_lpips(tmp_path)),
                     identity=str(write_moco(tmp_path, "")))  # fmt: skip
    trainer = train(tmp_path / "run", config)
    assert trainer.loss_names == ["L1", "LPIPS", "identity", "GAN", "KL"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [line for line in lines if "gradient_norm" in line]
    assert {"l1", "kl", "lpips", "identity", "fooled", "discriminator"} <= trained.keys()


def test_images_too_small_for_the_discriminator_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="32 pixels"):
        CodecTrainer(SMALL, replace(QUICK, gan_from=1), tmp_path, images(), torch.device("cpu"))
    with pytest.raises(TrainingError, match="too few"):
        CodecTrainer(SMALL, QUICK, tmp_path, images()[:1], torch.device("cpu"))


def test_epochs_have_each_image_once_and_no_heldout_ones(tmp_path):
    trainer = CodecTrainer(SMALL, QUICK, tmp_path, images(), torch.device("cpu"))

    def epoch(first: int) -> list[tuple]:
        steps = islice(trainer.batches(first), 9)  # 36 images
        return [tuple(image.flatten().tolist()) for batch, _ in steps for image in batch.images]

    first_epoch = epoch(0)
    heldout = {tuple(images()[n].flatten().tolist()) for n in trainer.heldout}
    assert len(set(first_epoch)) == 36
    assert not heldout & set(first_epoch)
    assert epoch(9) != first_epoch
    assert set(epoch(9)) == set(first_epoch)


# Commands

FIT = ("--size", "16x16", "--network.width", 8, "--network.channels", 4, "--training.steps", 4, "--training.batch_size", 4,
       "--training.checkpoint-every", 2, "--training.validate-every", 4)  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    """A folder with images, and a codec trained on them."""
    with TemporaryDirectory() as folder:
        write_photos(Path(folder) / "photos", 60)
        command("data", "fit-codec", "small", f"{folder}/photos", "--out", f"{folder}/codec", *FIT)
        yield Path(folder)


def test_fit_codec_writes_a_codec_and_a_page(fitted, capsys):
    about = read_json(fitted / "codec" / "codec.json")
    assert (about["kind"], about["channels"], about["downsampling"]) == ("autoencoder", 4, 4)
    assert about["losses"] == ["L1", "KL"]
    count = len(read_json(fitted / "codec" / "pictures.json")["heldout"])
    assert 0 < count == about["heldout"]["count"]
    assert (fitted / "codec" / "reconstructions.html").read_text().count("data:image/png;base64,") == 2 * count
    command("data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT)
    assert "PSNR" in capsys.readouterr().err
    other = ("--out", fitted / "codec", *FIT, "--limit", 30)
    assert "started with other images" in fails(capsys, 1, "data", "fit-codec", "small", fitted / "photos", *other)
    error = fails(capsys, 2, "data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT[:-1], 3)
    assert "training.validate_every 4, not 3" in error


def test_run_trains_with_a_fitted_autoencoder(fitted, tmp_path, capsys):
    prepared = ("data", "prepare", fitted / "photos", "--out", tmp_path / "data")
    command(*prepared, "--codec", fitted / "codec")
    data = open_prepared(tmp_path / "data")
    assert data.codec.kind == "autoencoder"
    assert data.shapes == [(4, 4)]
    command("train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY_FITTED)
    command("generate", tmp_path / "run", "red above blue", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "000.png").exists()
    shutil.copytree(fitted / "codec", tmp_path / "other")
    about = read_json(tmp_path / "other" / "codec.json")
    (tmp_path / "other" / "codec.json").write_text(json.dumps({**about, "sha256": "0"}))
    assert "SHA-256" in fails(capsys, 1, *prepared[:-1], tmp_path / "new", "--codec", tmp_path / "other")
    assert "codec is" in fails(capsys, 1, *prepared)
    assert "holds no codec" in fails(capsys, 1, *prepared[:-1], tmp_path / "more", "--codec", tmp_path)
    error = fails(capsys, 1, *prepared[:-1], tmp_path / "odd", "--codec", fitted / "codec", "--sizes", "18x16")
    assert "--sizes 18x16: width and height must be divisible by the codec's downsampling, 4" in error


@pytest.mark.parametrize(("args", "code", "message"), [
    (("medium", "PHOTOS"), 2, "small"), (("small",), 2, "name a source"), (("small", "nowhere/x/y"), 1, "does not exist"),
    (("small", "PHOTOS", "--size", "18x18"), 2, "multiples of 4"),
    (("small", "PHOTOS", "--size", "big"), 2, "--size must be width x height"),
    (("small", "PHOTOS", "--network.multipliers", "0"), 2, "multipliers"),
    (("small", "PHOTOS", "--training.steps", "0"), 2, "at least 1"),
    (("small", "topics"), 1, "no image"), (("small", "PHOTOS", "--training.perceptual", "nowhere"), 1, "nowhere"),
])  # fmt: skip
def test_invalid_input_is_a_one_line_error(fitted, tmp_path, capsys, args, code, message):
    typed = [str(fitted / "photos") if word == "PHOTOS" else word for word in args]
    size = () if "--size" in args else ("--size", "16x16")
    stderr = fails(capsys, code, "data", "fit-codec", *typed, *size, "--max-images", 50, "--out", tmp_path / "codec")
    assert message in stderr
