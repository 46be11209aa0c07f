"""The VQ twin of the autoencoder: the nearest code, where gradients go, the revival of codes, and its use as a codec."""

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
from transfusion.codecs.autoencoder import Network, build_network, encode_raw, to_unit
from transfusion.codecs.codec import codec_from_bytes, codec_of, codec_to_bytes, encode_many
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.vq import VQ, QuantisedNetwork, nearest, straight_through
from transfusion.disk import read_json
from transfusion.training.codebook import CodebookReviver, use_of
from transfusion.training.codec import CodecTrainer
from transfusion.training.optimizer import build_optimizer, optimizer_tensors

SMALL = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1, codes=16)
QUICK = CodecTrainingConfig(
    steps=8, batch_size=4, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=4, validate_every=4,
    log_every=1, heldout=4,
    revive_after=2,
)  # fmt: skip
torch.set_num_threads(1)


@cache
def pictures(count: int = 40) -> np.ndarray:
    return np.stack([picture(n)[1] for n in range(count)])  # (count, 16, 16, 3)


@cache
def codec(seed: int = 0) -> VQ:
    return VQ(build_network(SMALL, seed, QuantisedNetwork))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The network


def test_the_papers_network_has_a_codebook_of_16384_codes_and_otherwise_the_autoencoders_parameters():
    config = AutoencoderConfig(codes=16_384)
    with torch.device("meta"):
        network, twin = QuantisedNetwork(config), Network(config)
    assert network.codebook.shape == (16_384, 8)
    count, of_twin = (sum(p.numel() for p in one.parameters()) for one in (network, twin))
    # The twin's last two convolutions make 16 channels, mean and variance, where this one's make 8.
    spared = 8 * (512 * 9 + 1) + (16 * 16 + 16) - (8 * 8 + 8)
    assert count == of_twin - spared + 16_384 * 8
    assert {name: p.shape for name, p in network.decoder.named_parameters()} == {
        name: p.shape for name, p in twin.decoder.named_parameters()}  # fmt: skip


def test_without_a_number_of_codes_there_is_no_such_network():
    with pytest.raises(ValueError, match=r"network\.codes"):
        QuantisedNetwork(replace(SMALL, codes=None))
    with pytest.raises(ValueError, match="at least 2"):
        replace(SMALL, codes=1)


@examples(40)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(2, 70), st.integers(1, 9), st.sampled_from((1, 64, 2**25)))
def test_the_nearest_code_is_the_nearest(seed, n, codes, channels, at_once):
    latents, codebook = drawn(seed, n, channels), drawn(seed + 1, codes, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vq, "DISTANCES", at_once)
        found = nearest(latents, codebook)  # (n,)
    distances = (latents[:, None].double() - codebook.double()).square().sum(2)  # (n, codes)
    chosen = distances.gather(1, found[:, None])[:, 0]  # (n,)
    assert found.dtype == torch.int64
    assert (chosen <= distances.min(1).values + 1e-5).all()  # another only where single precision cannot tell


def test_a_latent_on_a_code_gets_that_code_and_comes_back_from_its_grid_in_place():
    network = codec().network
    seen = to_unit(torch.from_numpy(pictures(3)))  # (3, 3, 16, 16)
    grid = network.encoder(seen)  # (3, 4, 8, 8)
    codes = network.encode(seen)  # (3, 8, 8)
    assert codes.shape == (3, 8, 8)
    for n, y, x in ((0, 0, 0), (1, 7, 2), (2, 3, 5)):
        assert codes[n, y, x] == (network.codebook - grid[n, :, y, x]).square().sum(1).argmin()
    assert torch.equal(nearest(network.codebook, network.codebook), torch.arange(16))


# Gradients


@examples(20)
@given(st.integers(0, 2**31))
def test_the_straight_through_gradient_is_the_identitys(seed):
    """Of any function of the chosen codes: the latents get what the codes would, and the codes get nothing."""
    latents, chosen = drawn(seed, 6, 4).requires_grad_(), drawn(seed + 1, 6, 4).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * drawn(seed + 2, 6, 4)).tanh().square().sum()

    passed = straight_through(latents, chosen)  # (6, 4)
    torch.testing.assert_close(passed, chosen)
    through, to_codes = torch.autograd.grad(loss(passed), (latents, chosen), allow_unused=True)
    at = passed.detach().requires_grad_()
    assert torch.equal(through, torch.autograd.grad(loss(at), at)[0])
    assert to_codes is None


def gradients(network: QuantisedNetwork, loss: torch.Tensor) -> set[str]:
    """The parts of the network that a loss moves."""
    network.zero_grad()
    loss.backward(retain_graph=True)
    return {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_loss_moves_what_it_should():
    network = build_network(SMALL, 0, QuantisedNetwork)
    real = to_unit(torch.from_numpy(pictures(4)))  # (4, 3, 16, 16)
    learnt = network.losses(real, torch.Generator(), QUICK)
    assert gradients(network, (learnt.reconstruction - real).abs().mean()) == {"encoder", "decoder"}
    assert gradients(network, learnt.terms["codebook"][1]) == {"codebook"}
    used = network.codebook.grad.any(1)  # (16,)
    assert torch.equal(used, torch.bincount(learnt.codes, minlength=16) > 0)
    assert gradients(network, learnt.terms["commitment"][1]) == {"encoder"}
    weights = {name: weight for name, (weight, _) in learnt.terms.items()}
    assert weights == {"codebook": 1.0, "commitment": 0.25}
    again = network.losses(real, torch.Generator(), replace(QUICK, commitment=3.0, codebook_weight=2.0))
    assert {name: weight for name, (weight, _) in again.terms.items()} == {"codebook": 2.0, "commitment": 3.0}


def test_what_is_learnt_from_is_what_the_codec_gives_back():
    """Training's pass and encode, then decode, agree."""
    network = codec().network
    real = to_unit(torch.from_numpy(pictures(4)))  # (4, 3, 16, 16)
    learnt = network.losses(real, torch.Generator(), QUICK)
    assert torch.equal(learnt.codes, network.encode(real).flatten())
    torch.testing.assert_close(learnt.reconstruction, network.decode(network.encode(real)), rtol=1e-4, atol=1e-4)


# The use of codes


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any))
def test_perplexity_is_between_one_and_the_number_of_codes_in_use(counts):
    use = use_of(torch.tensor(counts))
    in_use = sum(count > 0 for count in counts)
    assert use["codes_used"] == pytest.approx(in_use / len(counts))
    assert 1 - 1e-9 <= use["perplexity"] <= in_use + 1e-9
    assert use_of(torch.tensor([7] * 5 + [0]))["perplexity"] == pytest.approx(5)


def keeper(revive_after: int = 3) -> CodebookReviver:
    network, average = (build_network(SMALL, 0, QuantisedNetwork) for _ in range(2))
    optimizer = build_optimizer(network, QUICK)
    optimizer_tensors(network, optimizer)  # as they are after a first update
    found = CodebookReviver(network, average.requires_grad_(False), optimizer, replace(QUICK, revive_after=revive_after))
    found.idle.zero_()
    return found


@examples(15)
@given(st.integers(0, 2**31), st.integers(0, 15))
def test_a_dead_code_is_revived_where_it_is_missed_and_comes_into_use(seed, dead):
    kept = keeper()
    codebook, state = kept.network.codebook, kept.optimizer.state[kept.network.codebook]
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment].fill_(1.0)
    with torch.no_grad():
        codebook[dead] = 1e3  # nothing is near it
    before = codebook.detach().clone()  # (16, 4)
    others = torch.tensor([n for n in range(16) if n != dead])  # (15,)
    latents = torch.cat([before[others], before[others] + 0.01 * drawn(seed, 15, 4)])  # (30, 4)
    for step in range(3):
        codes = nearest(latents, codebook.detach())  # (30,)
        assert dead not in codes
        assert kept.revived == 0
        kept.update(step, latents, codes)
    assert kept.revived == 1
    assert (latents == codebook[dead]).all(1).any()  # it lies on one of them
    assert not (before[others] == codebook[dead]).all(1).any()  # on one that had no code of its own
    assert torch.equal(codebook[others], before[others])
    assert torch.equal(kept.ema.codebook[dead], codebook[dead])
    assert not state["exp_avg"][dead].any()
    assert state["exp_avg"][others].all()
    assert dead in nearest(latents, codebook.detach())
    kept.update(3, latents, nearest(latents, codebook.detach()))
    assert kept.revived == 1


def test_revival_follows_from_the_seed_and_the_step_alone():
    latents = drawn(0, 50, 4)

    def revived(step: int, spent: int) -> torch.Tensor:
        kept = keeper(1)
        torch.manual_seed(spent)
        kept.update(step, latents, torch.zeros(50, dtype=torch.int64))
        return kept.network.codebook.detach()  # (16, 4)

    assert torch.equal(revived(5, 0), revived(5, 1))
    assert not torch.equal(revived(5, 0), revived(6, 0))


def test_more_dead_codes_than_latents_that_miss_one_wait_their_turn():
    kept = keeper(1)
    on_it, off = kept.network.codebook.detach()[:1].clone(), drawn(0, 2, 4)
    latents = torch.cat([on_it, on_it, off])  # (4, 4)
    kept.update(0, latents, torch.zeros(4, dtype=torch.int64))
    assert kept.revived == 2
    assert (kept.idle > 0).sum() == 13
    kept.update(1, on_it, torch.zeros(1, dtype=torch.int64))  # nobody misses a code
    assert kept.revived == 2


# Training


def train(
    folder: Path, config: CodecTrainingConfig = QUICK, stop_at: int | None = None, network: AutoencoderConfig = SMALL,
) -> CodecTrainer:  # fmt: skip
    folder.mkdir(exist_ok=True)
    trainer = CodecTrainer(network, config, folder, pictures(), torch.device("cpu"))
    return finished(trainer, folder, stop_at)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [1, 5])
def test_interrupted_and_resumed_is_uninterrupted_while_codes_are_revived(tmp_path, stop_at):
    many = replace(SMALL, codes=128)  # more than these pictures need, so that some are dead again and again
    whole = train(tmp_path / "whole", network=many)
    steps = {line["step"]: line for line in lines(tmp_path / "whole") if "revived" in line}
    assert steps[8]["revived"] > steps[stop_at]["revived"] > 0  # before it stops, and after
    train(tmp_path / "half", stop_at=stop_at, network=many)
    half = train(tmp_path / "half", network=many)
    assert half.loop.progress.step == whole.loop.progress.step == 8
    for part, tensors in whole.tensors().items():
        assert all(torch.equal(value, half.tensors()[part][name]) for name, value in tensors.items())
    again = {line["step"]: line for line in lines(tmp_path / "half") if "revived" in line}
    assert all(again[step][name] == steps[step][name] for step in steps for name in ("l1", "codes_used", "revived"))


def test_it_learns_and_uses_its_codes(tmp_path):
    config = replace(QUICK, steps=60, warmup_steps=5, checkpoint_every=100, revive_after=10)
    before = CodecTrainer(SMALL, config, tmp_path, pictures(), torch.device("cpu")).quality()
    trainer = train(tmp_path / "run", config)
    after, seen = trainer.quality(), [line["l1"] for line in lines(tmp_path / "run") if "l1" in line]
    assert trainer.losses == ["L1", "codebook", "commitment"]
    assert np.mean(seen[-5:]) < 0.5 * np.mean(seen[:5])
    assert after["psnr"] > before["psnr"] + 3
    assert after["codes_used"] >= 0.5
    assert after["perplexity"] > 2
    assert lines(tmp_path / "run")[-1]["heldout"] == after
    codes = np.stack(VQ(trainer.ema).encode_many(list(pictures()[trainer.heldout])))  # (4, 8, 8)
    assert after["codes_used"] == len(np.unique(codes)) / 16


# As a codec


def test_a_codec_on_the_disk_is_the_same():
    again = codec_from_bytes("vq", codec_to_bytes(codec()))
    one = pictures()[3]
    codes = codec().encode(one)  # (8, 8)
    assert (codes.shape, codes.dtype) == ((8, 8), np.int64)
    assert np.array_equal(again.encode(one), codes)
    assert np.array_equal(again.decode(codes), codec().decode(codes))
    assert codec().decode(codes).shape == one.shape
    assert np.array_equal(again.codebook, codec().codebook)
    assert (again.channels, again.codes, again.downsampling, again.image_channels, again.codebook.shape) == (
        4,
        16,
        2,
        3,
        (16, 4),
    )


def test_pictures_of_many_sizes_are_encoded_each_in_its_place():
    mixed = [picture(n, *size)[1] for n, size in enumerate(((16, 16), (32, 16), (16, 16), (16, 8)))]
    for one, codes in zip(mixed, encode_many(codec(), mixed), strict=True):
        assert codes.shape == (one.shape[0] // 2, one.shape[1] // 2)
        assert (codes == codec().encode(one)).mean() > 0.95  # rounding may turn a near tie
    with pytest.raises(ValueError, match="15x16"):
        codec().encode(pictures()[0][:, :15])


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_code_that_is_not_in_the_codebook_is_refused(wrong):
    with pytest.raises(ValueError, match="between 0 and 15"):
        codec().decode(np.array([[0, wrong]]))


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("config"), lambda t: t.pop("codebook"), lambda t: t.update(codebook=np.zeros((3, 4), np.float32)),
    lambda t: t.update(config=np.frombuffer(b"{}", np.uint8)),
])  # fmt: skip
def test_a_damaged_codec_is_refused_in_words(damage):
    tensors = codec().tensors()
    damage(tensors)
    with pytest.raises(ValueError):
        codec_of("vq", tensors)


def test_a_network_on_meta_needs_no_memory_to_say_its_size():
    with torch.device("meta"):
        network = QuantisedNetwork(AutoencoderConfig(codes=16_384))
        codes = network.encode(torch.empty(1, 3, 256, 256))  # (1, 32, 32)
    assert codes.shape == (1, 32, 32)


def test_the_autoencoder_encodes_its_mode_as_ever():
    network = build_network(replace(SMALL, codes=None), 0)
    found = encode_raw(network, list(pictures(2)))  # (2, 4, 8, 8)
    expected = network.encoder(to_unit(torch.from_numpy(pictures(2))))[:, :4]  # (2, 4, 8, 8)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-6)


# As commands

FIT = ("--size", "16x16", "--network.width", 8, "--network.channels", 4, "--network.codes", 32, "--training.steps", 4,
       "--training.batch_size", 4, "--training.checkpoint-every", 2, "--training.validate-every", 4)  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    """A folder of pictures, and a codec of theirs."""
    with TemporaryDirectory() as folder:
        write_photos(Path(folder) / "photos", 60)
        command("data", "fit-codec", "small", f"{folder}/photos", "--out", f"{folder}/codec", *FIT)
        yield Path(folder)


def test_fit_codec_makes_a_vq_codec_and_a_page(fitted, capsys):
    about = read_json(fitted / "codec" / "codec.json")
    assert (about["kind"], about["channels"], about["downsampling"], about["codes"]) == ("vq", 4, 4, 32)
    assert about["losses"] == ["L1", "codebook", "commitment"]
    assert 0 < about["heldout"]["codes_used"] <= 1
    assert 1 <= about["heldout"]["perplexity"] <= 32
    page = (fitted / "codec" / "reconstructions.html").read_text()
    assert page.count("data:image/png;base64,") == 12
    assert "one of 32 codes" in page
    assert "perplexity" in page
    made = codec_from_bytes("vq", (fitted / "codec" / "codec.safetensors").read_bytes())
    assert made.decode(made.encode(pictures()[0])).shape == (16, 16, 3)
    command("data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT)
    assert "perplexity" in capsys.readouterr().err
    said = fails(capsys, 2, "data", "fit-codec", "small", fitted / "photos", "--out", fitted / "codec", *FIT,
                 "--network.codes", 16)  # fmt: skip
    assert "network.codes 32, not 16" in said


def test_a_fit_from_before_there_were_codebooks_goes_on(fitted, tmp_path, capsys):
    """A field that its fit.json lacks is taken for its default."""
    fit = ("data", "fit-codec", "small", fitted / "photos", "--out", tmp_path / "codec", *FIT[:6], *FIT[8:])
    command(*fit)
    about = read_json(tmp_path / "codec" / "fit.json")
    for part, name in (("network", "codes"), ("training", "commitment"), ("training", "revive_after")):
        del about[part][name]
    (tmp_path / "codec" / "fit.json").write_text(json.dumps(about))
    command(*fit)
    assert "network.codes None, not 32" in fails(capsys, 2, *fit, "--network.codes", 32)
