"""Trains an autoencoder or its VQ twin on pictures: optimizer, checkpoints and resume are the model's (section 4.1)."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.chance import seed_from
from transfusion.checkpoint.save import save
from transfusion.codecs.autoencoder import (
    Network,
    PatchDiscriminator,
    build_network,
    discriminator_loss,
    init_convolutions,
    to_unit,
)  # fmt: skip
from transfusion.codecs.perceptual import Identity, Perceptual
from transfusion.codecs.vq import QuantisedNetwork
from transfusion.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.training.codebook import Keeper, use_of
from transfusion.training.metrics import Metrics, Screen
from transfusion.training.optimizer import build_optimizer, learning_rate, optimizer_tensors, update_average
from transfusion.training.signals import listening
from transfusion.training.trainer import TrainingError

SMALLEST = 32  # pixels along a side: the discriminator's patches have to fit in
LOOK = 32  # held-out pictures in one forward pass


@dataclass
class CodecProgress:
    """How far a codec is: all that is not a tensor."""

    step: int = 0
    seconds: float = 0.0
    pictures: int = 0  # seen so far


class CodecTrainer:
    """One autoencoder, with a codebook or without.

    `pictures` are (n, Y, X, colours) uint8, which may lie on the disk; chance holds some of them out.
    """

    def __init__(
        self, network: AutoencoderConfig, config: CodecTrainingConfig, folder: Path, pictures: np.ndarray,
        device: torch.device,
    ):  # fmt: skip
        self.config, self.folder, self.pictures, self.device = config, folder, pictures, device
        held = min(config.heldout, max(1, len(pictures) // 10))
        mixed = np.random.default_rng(seed_from(config.seed, "heldout")).permutation(len(pictures))
        self.seen, self.heldout = mixed[held:], np.sort(mixed[:held])  # numbers of pictures
        if not len(self.seen):
            raise TrainingError(f"{len(pictures)} pictures are too few to train on")
        kind = Network if network.codes is None else QuantisedNetwork
        self.network = build_network(network, config.seed, kind).to(device)
        self.average = build_network(network, config.seed, kind).to(device).requires_grad_(False)
        self.optimizer = build_optimizer(self.network, config)
        self.keeper = None if network.codes is None else Keeper(self.network, self.average, self.optimizer, config)
        self.perceptual = Perceptual.from_file(Path(config.perceptual)).to(device) if config.perceptual else None
        self.identity = Identity.from_file(Path(config.identity)).to(device) if config.identity else None
        self.discriminator = None
        if config.gan_from is not None:
            if min(pictures.shape[1:3]) < SMALLEST:
                raise TrainingError(f"the patch discriminator needs pictures of {SMALLEST} pixels a side, or no gan_from")
            self.discriminator = PatchDiscriminator(network.colours)
            init_convolutions(self.discriminator, config.seed)
            self.discriminator.to(device)
            self.discriminator_optimizer = build_optimizer(self.discriminator, config)
        self.progress = CodecProgress()
        self.stop_asked = False

    @property
    def losses(self) -> list[str]:
        """What it learns from, by name."""
        extra = {"LPIPS": self.perceptual, "identity": self.identity, "GAN": self.discriminator}
        return ["L1", *(name for name, part in extra.items() if part is not None), *self.network.loss_names]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint stores or fills in, by part and name."""
        parts = {
            "model": self.network.state_dict(), "average": self.average.state_dict(),
            "optimizer": optimizer_tensors(self.network, self.optimizer),
        }  # fmt: skip
        if self.keeper is not None:
            parts["codebook"] = self.keeper.tensors()
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator.state_dict()
            parts["discriminator_optimizer"] = optimizer_tensors(self.discriminator, self.discriminator_optimizer)
        return parts

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint whose tensors have been filled in."""
        self.progress = CodecProgress(**state)

    def save(self) -> Path:
        """A checkpoint of this moment."""
        return save(self.folder, self.progress.step, self.tensors(), asdict(self.progress), self.config.keep)

    def train(self) -> bool:
        """Up to the last step. False when a signal stopped it before; it is saved either way."""
        config, progress = self.config, self.progress
        metrics = Metrics(self.folder / "metrics.jsonl", progress.step)
        with listening(self), Screen(config.steps, progress.step) as screen, ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._batch, progress.step)
            shown = replace(progress)
            while progress.step < config.steps and not self.stop_asked:
                begun = time.monotonic()
                batch = coming.result()
                coming = ahead.submit(self._batch, progress.step + 1)
                values = self._step(batch.to(self.device))
                progress.step += 1
                progress.pictures += len(batch)
                progress.seconds += time.monotonic() - begun
                if progress.step % config.log_every == 0 or progress.step == config.steps:
                    speed = (progress.pictures - shown.pictures) / (progress.seconds - shown.seconds)
                    shown = replace(progress)
                    metrics.write(progress.step, **values, pictures_per_second=round(speed, 1), seconds=progress.seconds)
                    screen.show(progress.step, f"L1 {values['l1']:.4f}{_use(values)}  {speed:,.0f} pictures/s")
                if progress.step % config.validate_every == 0 or progress.step == config.steps:
                    found = self.hold_out()
                    metrics.write(progress.step, heldout=found)
                    quality = f"PSNR {found['psnr']:.2f} dB  SSIM {found['ssim']:.4f}{_use(found)}"
                    screen.say(f"step {progress.step}  held out  {quality}")
                if progress.step % config.checkpoint_every == 0 and progress.step < config.steps:
                    self.save()
            self.save()
            if self.stop_asked:
                screen.say(f"stopped at step {progress.step} and saved: the same command goes on from here")
        return progress.step >= config.steps

    def _batch(self, step: int) -> Tensor:
        """The pictures of one step, (rows, Y, X, colours) uint8. Each epoch has an order of its own, from the seed alone."""
        n, rows = len(self.seen), self.config.rows
        chosen = []
        for place in range(step * rows, (step + 1) * rows):
            epoch, within = divmod(place, n)
            chosen.append(self.seen[_order(self.config.seed, epoch, n)[within]])
        return torch.from_numpy(np.stack([self.pictures[i] for i in chosen]))

    def _step(self, batch: Tensor) -> dict[str, float]:
        """One update of the network, then, when it has joined in, one of the discriminator."""
        config, step = self.config, self.progress.step
        real = to_unit(batch)  # (N, colours, Y, X)
        adversarial = self.discriminator is not None and step >= config.gan_from
        chance = torch.Generator().manual_seed(seed_from(config.seed, "codec noise", step))
        learnt = self.network.losses(real, chance, config)
        made = learnt.made  # (N, colours, Y, X)
        terms = {"l1": (1.0, (real - made).abs().mean()), **learnt.terms}  # weight and value
        if self.perceptual is not None:
            terms["lpips"] = 1.0, self.perceptual(_coloured(real), _coloured(made)).mean()
        if self.identity is not None:
            terms["identity"] = config.identity_weight, self.identity(_coloured(real), _coloured(made)).mean()
        if adversarial:
            self.discriminator.requires_grad_(False)
            terms["fooled"] = config.gan_weight, -self.discriminator(made).mean()
        norm = self._update(self.network, self.optimizer, sum(weight * value for weight, value in terms.values()))
        values = {name: value.item() for name, (_, value) in terms.items()} | {"gradient_norm": norm}
        update_average(self.average, self.network, step, config.average)
        if self.keeper is not None:
            values |= self.keeper.tend(step, learnt.latents, learnt.codes)
        if adversarial:
            self.discriminator.requires_grad_(True)
            said = discriminator_loss(self.discriminator(real), self.discriminator(made.detach()))
            self._update(self.discriminator, self.discriminator_optimizer, said)
            values["discriminator"] = said.item()
        return values

    def _update(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.clip).item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {self.progress.step + 1}: the gradient is not finite, so the step was not taken; "
                "the last checkpoint is whole. A lower training.learning_rate may help"
            )
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def sample_pictures(self, most: int = 2_000) -> list[np.ndarray]:
        """Some of the pictures that it learns from, evenly spread: for the statistics of its latents."""
        return [self.pictures[i] for i in self.seen[:: -(-len(self.seen) // most)]]

    @torch.no_grad()
    def hold_out(self) -> dict[str, float]:
        """PSNR in dB and SSIM of the held-out pictures, through the averaged network's codes, or the mode of its latents.

        With a codebook also the share of its codes that they use, and the perplexity.
        """
        psnr = ssim = 0.0
        counts = None if self.keeper is None else torch.zeros_like(self.keeper.idle)  # (codes,)
        for first in range(0, len(self.heldout), LOOK):
            real = to_unit(torch.from_numpy(self.pictures[self.heldout[first : first + LOOK]]).to(self.device))
            encoded = self.average.encode(real)  # (n, C, Y / f, X / f), or codes (n, Y / f, X / f)
            made = self.average.decode(encoded).clamp(-1, 1)  # (n, colours, Y, X)
            psnr += float(peak_signal_to_noise(real, made).sum())
            ssim += float(structural_similarity(real, made).sum())
            if counts is not None:
                counts += torch.bincount(encoded.flatten(), minlength=len(counts))
        found = {"psnr": psnr / len(self.heldout), "ssim": ssim / len(self.heldout), "count": len(self.heldout)}
        return found if counts is None else found | use_of(counts)


def _use(values: dict[str, float]) -> str:
    """How much of the codebook is in use, in words; nothing when there is none."""
    return f"  codes {values['codes_used']:.0%} (perplexity {values['perplexity']:,.0f})" if "codes_used" in values else ""


def peak_signal_to_noise(one: Tensor, other: Tensor) -> Tensor:
    """PSNR of pictures between -1 and 1, in dB: (N,)."""
    return 10 * torch.log10(4 / (one - other).square().flatten(1).mean(1).clamp(min=1e-12))


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of pictures between -1 and 1, mean over colours, 11 x 11 Gaussian windows: (N,)."""
    colours = one.shape[1]
    side = torch.arange(11, device=one.device, dtype=one.dtype) - 5
    line = torch.exp(-side.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(colours, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=colours)

    a, b = (one + 1) / 2, (other + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.flatten(1).mean(1)


@lru_cache(maxsize=2)  # the epoch in hand, and the next
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed_from(seed, "order", epoch)).permutation(n)


def _coloured(pictures: Tensor) -> Tensor:
    """Grey pictures three times, for networks that know colours only."""
    return pictures.expand(-1, 3, -1, -1)
