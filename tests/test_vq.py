"""The VQ codec: nearest codes, gradients of each loss, the revival of codes, and its use as a codec."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.sources import picture, write_photos
from tests.test_cli import command, fails
from tests.tiny import finished
from transfusion.codecs import vq
from transfusion.codecs.autoencoder import AutoencoderNetwork, build_network, encode_raw, from_uint8
from transfusion.codecs.codec import codec_from_bytes, codec_from_tensors, codec_to_bytes, encode_many
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.vq import VQ, QuantisedNetwork, find_nearest_codes, straight_through
from transfusion.disk import read_json
from transfusion.training.codebook import CodebookReviver, measure_usage
from transfusion.training.codec import CodecTrainer
from transfusion.training.optimizer import build_optimizer, optimizer_tensors

SMALL = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1, codes=16)
QUICK = CodecTrainingConfig(
    steps=8, batch_size=4, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=4, validate_every=4,
    log_every=1, heldout=4, revive_after=2,
)  # fmt: skip
torch.set_num_threads(1)


@cache
def images(count: int = 40) -> np.ndarray:
    return np.stack([picture(n)[1] for n in range(count)])  # (count, 16, 16, 3)


@cache
def codec(seed: int = 0) -> VQ:
    return VQ(build_network(SMALL, seed, QuantisedNetwork))


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The network


def test_network_of_the_paper_is_the_autoencoder_with_16384_codes():
    config = AutoencoderConfig(codes=16_384)
    with torch.device("meta"):
        network, autoencoder = QuantisedNetwork(config), AutoencoderNetwork(config)
    assert network.codebook.shape == (16_384, 8)
    size, autoencoder_size = (sum(p.numel() for p in module.parameters()) for module in (network, autoencoder))
    # The last two convolutions of the autoencoder's encoder have 16 channels, mean and variance; here they have 8.
    difference = 8 * (512 * 9 + 1) + (16 * 16 + 16) - (8 * 8 + 8)
    assert size == autoencoder_size - difference + 16_384 * 8
    assert {name: p.shape for name, p in network.decoder.named_parameters()} == {
        name: p.shape for name, p in autoencoder.decoder.named_parameters()}  # fmt: skip


def test_network_without_codes_is_refused():
    with pytest.raises(ValueError, match=r"network\.codes"):
        QuantisedNetwork(replace(SMALL, codes=None))
    with pytest.raises(ValueError, match="at least 2"):
        replace(SMALL, codes=1)


@examples(40)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(2, 70), st.integers(1, 9), st.sampled_from((1, 64, 2**25)))
def test_nearest_codes_have_the_smallest_distance(seed, n, codes, channels, max_distances):
    latents, codebook = randn(seed, n, channels), randn(seed + 1, codes, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vq, "MAX_DISTANCES", max_distances)
        nearest = find_nearest_codes(latents, codebook)  # (n,)
    distances = (latents[:, None].double() - codebook.double()).square().sum(2)  # (n, codes)
    chosen = distances.gather(1, nearest[:, None])[:, 0]  # (n,)
    assert nearest.dtype == torch.int64
    assert (chosen <= distances.min(1).values + 1e-5).all()  # up to float32 rounding


def test_encode_gives_the_nearest_code_at_each_latent_pixel():
    network = codec().network
    batch = from_uint8(torch.from_numpy(images(3)))  # (3, 3, 16, 16)
    grid = network.encoder(batch)  # (3, 4, 8, 8)
    codes = network.encode(batch)  # (3, 8, 8)
    assert codes.shape == (3, 8, 8)
    for n, y, x in ((0, 0, 0), (1, 7, 2), (2, 3, 5)):
        assert codes[n, y, x] == (network.codebook - grid[n, :, y, x]).square().sum(1).argmin()
    assert torch.equal(find_nearest_codes(network.codebook, network.codebook), torch.arange(16))


# Gradients


@examples(20)
@given(st.integers(0, 2**31))
def test_straight_through_passes_the_gradient_to_the_latents(seed):
    """For any function of the quantised latents; the codes get no gradient."""
    latents, quantised = randn(seed, 6, 4).requires_grad_(), randn(seed + 1, 6, 4).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * randn(seed + 2, 6, 4)).tanh().square().sum()

    output = straight_through(latents, quantised)  # (6, 4)
    torch.testing.assert_close(output, quantised)
    latent_grad, code_grad = torch.autograd.grad(loss(output), (latents, quantised), allow_unused=True)
    leaf = output.detach().requires_grad_()
    assert torch.equal(latent_grad, torch.autograd.grad(loss(leaf), leaf)[0])
    assert code_grad is None


def parts_with_gradient(network: QuantisedNetwork, loss: torch.Tensor) -> set[str]:
    """The parts of the network that get a gradient from this loss."""
    network.zero_grad()
    loss.backward(retain_graph=True)
    return {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_loss_has_gradients_for_its_part_only():
    network = build_network(SMALL, 0, QuantisedNetwork)
    real = from_uint8(torch.from_numpy(images(4)))  # (4, 3, 16, 16)
    output = network.compute_losses(real, [], QUICK)
    assert parts_with_gradient(network, (output.reconstruction - real).abs().mean()) == {"encoder", "decoder"}
    assert parts_with_gradient(network, output.terms["codebook"][1]) == {"codebook"}
    used = network.codebook.grad.any(1)  # (16,)
    assert torch.equal(used, torch.bincount(output.codes, minlength=16) > 0)
    assert parts_with_gradient(network, output.terms["commitment"][1]) == {"encoder"}
    weights = {name: weight for name, (weight, _) in output.terms.items()}
    assert weights == {"codebook": 1.0, "commitment": 0.25}
    again = network.compute_losses(real, [], replace(QUICK, commitment=3.0, codebook_weight=2.0))
    assert {name: weight for name, (weight, _) in again.terms.items()} == {"codebook": 2.0, "commitment": 3.0}


def test_training_pass_equals_encode_and_decode():
    network = codec().network
    real = from_uint8(torch.from_numpy(images(4)))  # (4, 3, 16, 16)
    output = network.compute_losses(real, [], QUICK)
    assert torch.equal(output.codes, network.encode(real).flatten())
    torch.testing.assert_close(output.reconstruction, network.decode(network.encode(real)), rtol=1e-4, atol=1e-4)


# Usage of the codebook


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any))
def test_perplexity_is_between_one_and_the_number_of_codes_in_use(counts):
    usage = measure_usage(torch.tensor(counts))
    in_use = sum(count > 0 for count in counts)
    assert usage["codes_used"] == pytest.approx(in_use / len(counts))
    assert 1 - 1e-9 <= usage["perplexity"] <= in_use + 1e-9
    assert measure_usage(torch.tensor([7] * 5 + [0]))["perplexity"] == pytest.approx(5)


def new_reviver(revive_after: int = 3) -> CodebookReviver:
    network, ema = (build_network(SMALL, 0, QuantisedNetwork) for _ in range(2))
    optimizer = build_optimizer(network, QUICK)
    optimizer_tensors(network, optimizer)  # creates the moments
    reviver = CodebookReviver(network, ema.requires_grad_(False), optimizer, replace(QUICK, revive_after=revive_after))
    reviver.idle.zero_()
    return reviver


@examples(15)
@given(st.integers(0, 2**31), st.integers(0, 15))
def test_dead_code_moves_to_a_latent_without_code_and_is_used(seed, dead):
    reviver = new_reviver()
    codebook, state = reviver.network.codebook, reviver.optimizer.state[reviver.network.codebook]
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment].fill_(1.0)
    with torch.no_grad():
        codebook[dead] = 1e3  # far from all latents
    before = codebook.detach().clone()  # (16, 4)
    others = torch.tensor([n for n in range(16) if n != dead])  # (15,)
    latents = torch.cat([before[others], before[others] + 0.01 * randn(seed, 15, 4)])  # (30, 4)
    for step in range(3):
        codes = find_nearest_codes(latents, codebook.detach())  # (30,)
        assert dead not in codes
        assert reviver.revived == 0
        reviver.update(step, latents, codes)
    assert reviver.revived == 1
    assert (latents == codebook[dead]).all(1).any()  # it equals a latent
    assert not (before[others] == codebook[dead]).all(1).any()  # one that no code equals
    assert torch.equal(codebook[others], before[others])
    assert torch.equal(reviver.ema.codebook[dead], codebook[dead])
    assert not state["exp_avg"][dead].any()
    assert state["exp_avg"][others].all()
    assert dead in find_nearest_codes(latents, codebook.detach())
    reviver.update(3, latents, find_nearest_codes(latents, codebook.detach()))
    assert reviver.revived == 1


def test_revival_depends_on_seed_and_step_only():
    latents = randn(0, 50, 4)

    def revived(step: int, global_seed: int) -> torch.Tensor:
        reviver = new_reviver(1)
        torch.manual_seed(global_seed)
        reviver.update(step, latents, torch.zeros(50, dtype=torch.int64))
        return reviver.network.codebook.detach()  # (16, 4)

    assert torch.equal(revived(5, 0), revived(5, 1))
    assert not torch.equal(revived(5, 0), revived(6, 0))


def test_dead_codes_beyond_the_latents_without_code_stay_dead():
    reviver = new_reviver(1)
    equal, different = reviver.network.codebook.detach()[:1].clone(), randn(0, 2, 4)
    latents = torch.cat([equal, equal, different])  # (4, 4)
    reviver.update(0, latents, torch.zeros(4, dtype=torch.int64))
    assert reviver.revived == 2
    assert (reviver.idle > 0).sum() == 13
    reviver.update(1, equal, torch.zeros(1, dtype=torch.int64))  # the latent equals its code
    assert reviver.revived == 2


# Training


def train(
    folder: Path, config: CodecTrainingConfig = QUICK, stop_at: int | None = None, network: AutoencoderConfig = SMALL,
) -> CodecTrainer:  # fmt: skip
    folder.mkdir(exist_ok=True)
    trainer = CodecTrainer(network, config, folder, images(), torch.device("cpu"))
    return finished(trainer, folder, stop_at)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [1, 5])
def test_resumed_training_with_revived_codes_equals_uninterrupted(tmp_path, stop_at):
    network = replace(SMALL, codes=128)  # more than these images need, so that codes die again and again
    uninterrupted = train(tmp_path / "uninterrupted", network=network)
    expected = {line["step"]: line for line in metrics_of(tmp_path / "uninterrupted") if "revived" in line}
    assert expected[8]["revived"] > expected[stop_at]["revived"] > 0  # before the stop, and after
    train(tmp_path / "resumed", stop_at=stop_at, network=network)
    resumed = train(tmp_path / "resumed", network=network)
    assert resumed.loop.progress.step == uninterrupted.loop.progress.step == 8
    for part, tensors in uninterrupted.tensors().items():
        assert all(torch.equal(value, resumed.tensors()[part][name]) for name, value in tensors.items())
    steps = {line["step"]: line for line in metrics_of(tmp_path / "resumed") if "revived" in line}
    assert all(steps[step][name] == expected[step][name] for step in expected for name in ("l1", "codes_used", "revived"))


def test_training_improves_reconstructions_and_uses_codes(tmp_path):
    config = replace(QUICK, steps=60, warmup_steps=5, checkpoint_every=100, revive_after=10)
    before = CodecTrainer(SMALL, config, tmp_path, images(), torch.device("cpu")).evaluate()
    trainer = train(tmp_path / "run", config)
    after, l1 = trainer.evaluate(), [line["l1"] for line in metrics_of(tmp_path / "run") if "l1" in line]
    assert trainer.loss_names == ["L1", "codebook", "commitment"]
    assert np.mean(l1[-5:]) < 0.5 * np.mean(l1[:5])
    assert after["psnr"] > before["psnr"] + 3
    assert after["codes_used"] >= 0.5
    assert after["perplexity"] > 2
    last = [line for line in metrics_of(tmp_path / "run") if "heldout_psnr" in line][-1]
    assert {name.removeprefix("heldout_"): value for name, value in last.items() if name.startswith("heldout_")} == after
    codes = np.stack(VQ(trainer.ema).encode_many(list(images()[trainer.heldout])))  # (4, 8, 8)
    assert after["codes_used"] == len(np.unique(codes)) / 16


# As a codec


def test_codec_is_the_same_after_saving_and_loading():
    again = codec_from_bytes("vq", codec_to_bytes(codec()))
    image = images()[3]
    codes = codec().encode(image)  # (8, 8)
    assert (codes.shape, codes.dtype) == ((8, 8), np.int64)
    assert np.array_equal(again.encode(image), codes)
    assert np.array_equal(again.decode(codes), codec().decode(codes))
    assert codec().decode(codes).shape == image.shape
    assert np.array_equal(again.codebook, codec().codebook)
    assert (again.channels, again.codes, again.downsampling, again.image_channels) == (4, 16, 2, 3)
    assert again.codebook.shape == (16, 4)


def test_images_of_several_sizes_are_encoded_in_order():
    mixed = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 16), (16, 8)))]
    for image, codes in zip(mixed, encode_many(codec(), mixed), strict=True):
        assert codes.shape == (image.shape[0] // 2, image.shape[1] // 2)
        assert (codes == codec().encode(image)).mean() > 0.95  # rounding may decide between two close codes
    with pytest.raises(ValueError, match="15x16"):
        codec().encode(images()[0][:, :15])


@pytest.mark.parametrize("wrong", [-1, 16])
def test_code_outside_the_codebook_is_refused(wrong):
    with pytest.raises(ValueError, match="between 0 and 15"):
        codec().decode(np.array([[0, wrong]]))


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("config"), lambda t: t.pop("codebook"), lambda t: t.update(codebook=np.zeros((3, 4), np.float32)),
    lambda t: t.update(config=np.frombuffer(b"{}", np.uint8)),
])  # fmt: skip
def test_damaged_codec_is_refused(damage):
    tensors = codec().tensors()
    damage(tensors)
    with pytest.raises(ValueError):
        codec_from_tensors("vq", tensors)


def test_network_on_the_meta_device_gives_shapes():
    with torch.device("meta"):
        network = QuantisedNetwork(AutoencoderConfig(codes=16_384))
        codes = network.encode(torch.empty(1, 3, 256, 256))  # (1, 32, 32)
    assert codes.shape == (1, 32, 32)


def test_autoencoder_without_codes_encodes_the_mode():
    network = build_network(replace(SMALL, codes=None), 0)
    latents = encode_raw(network, list(images(2)))  # (2, 4, 8, 8)
    expected = network.encoder(from_uint8(torch.from_numpy(images(2))))[:, :4]  # (2, 4, 8, 8)
    np.testing.assert_allclose(latents, expected.detach(), atol=1e-6)


# Commands

FIT = ("--size", "16x16", "--network.width", 8, "--network.channels", 4, "--network.codes", 32, "--training.steps", 4,
       "--training.batch_size", 4, "--training.checkpoint-every", 2, "--training.validate-every", 4)  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    """A folder with images, and a codec trained on them."""
    with TemporaryDirectory() as folder:
        write_photos(Path(folder) / "photos", 60)
        command("data", "fit-codec", "small", f"{folder}/photos", "--out", f"{folder}/codec", *FIT)
        yield Path(folder)


def test_fit_codec_writes_a_vq_codec_and_a_page(fitted, capsys):
    about = read_json(fitted / "codec" / "codec.json")
    assert (about["kind"], about["channels"], about["downsampling"], about["codes"]) == ("vq", 4, 4, 32)
    assert about["losses"] == ["L1", "codebook", "commitment"]
    assert 0 < about["heldout"]["codes_used"] <= 1
    assert 1 <= about["heldout"]["perplexity"] <= 32
    page = (fitted / "codec" / "reconstructions.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * about["heldout"]["count"]
    assert "one of 32 codes" in page
    assert "perplexity" in page
    loaded = codec_from_bytes("vq", (fitted / "codec" / "codec.safetensors").read_bytes())
    assert loaded.decode(loaded.encode(images()[0])).shape == (16, 16, 3)
    command("data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT)
    assert "perplexity" in capsys.readouterr().err
    error = fails(capsys, 2, "data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT,
                  "--network.codes", 16)  # fmt: skip
    assert "network.codes 32, not 16" in error


def test_fit_json_without_newer_fields_resumes(fitted, tmp_path, capsys):
    """A field that fit.json lacks has its default."""
    fit = ("data", "fit-codec", "small", fitted / "photos", "--out", tmp_path / "codec", *FIT[:6], *FIT[8:])
    command(*fit)
    about = read_json(tmp_path / "codec" / "fit.json")
    for part, name in (("network", "codes"), ("training", "commitment"), ("training", "revive_after")):
        del about[part][name]
    (tmp_path / "codec" / "fit.json").write_text(json.dumps(about))
    command(*fit)
    assert "network.codes None, not 32" in fails(capsys, 2, *fit, "--network.codes", 32)
