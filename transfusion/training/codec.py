"""Trains an autoencoder or its VQ twin on pictures; loop, checkpoints, resume and ranks are the model's (section 4.1)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codecs.autoencoder import (
    AutoencoderOutput,
    Network,
    PatchDiscriminator,
    build_network,
    discriminator_loss,
    init_convolutions,
    to_unit,
)  # fmt: skip
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.perceptual import Identity, Perceptual
from transfusion.codecs.vq import QuantisedNetwork
from transfusion.config import FaultToleranceConfig
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.seeding import derive_seed
from transfusion.training.codebook import CodebookReviver, use_of
from transfusion.training.guard import TrainingError
from transfusion.training.loop import Loop
from transfusion.training.optimizer import build_optimizer, learning_rate, optimizer_tensors, update_ema

SMALLEST = 32  # pixels along a side: the discriminator's patches have to fit in
SMALLEST_SEEN = 11, 16  # the same for SSIM's window, and for LPIPS' network
LOOK = 32  # held-out pictures in one forward pass


@dataclass
class Read:
    """Pictures of a step: their numbers, counted over all steps and among the pictures, and their pixels."""

    chosen: list[tuple[int, int]]
    pictures: Tensor  # (n, Y, X, channels) uint8


class CodecTrainer:
    """One autoencoder, with a codebook or without.

    `pictures` are (n, Y, X, channels) uint8, which may lie on the disk; `heldout` says which of them are only looked at, and
    where it says none, chance holds some out. Every rank holds all
    weights (there are few), and takes its share of a step's pictures.
    """

    seen_in = "pictures"

    def __init__(
        self, network: AutoencoderConfig, config: CodecTrainingConfig, folder: Path, pictures: np.ndarray,
        device: torch.device, ranks: Ranks = SINGLE_PROCESS, fault_tolerance: FaultToleranceConfig = FaultToleranceConfig(),  # noqa: B008
        heldout: Sequence[int] = (),
    ):  # fmt: skip
        self.config, self.pictures, self.device, self.ranks = config, pictures, device, ranks
        smallest = SMALLEST_SEEN[config.perceptual is not None]
        if min(pictures.shape[1:3]) < smallest:
            with_it = " with LPIPS" if config.perceptual else ""
            raise TrainingError(f"pictures of {smallest} pixels a side or more are needed{with_it}: give a larger --size")
        if config.batch_size % ranks.world:
            raise TrainingError(
                f"training.batch_size {config.batch_size} cannot be shared out evenly among {ranks.world} processes"
            )
        self.seen, self.heldout = _split(len(pictures), heldout, config)  # numbers of pictures
        self.held_by_source = len(heldout) > 0
        if not len(self.seen):
            raise TrainingError(f"{len(pictures)} pictures are too few to train on")
        kind = Network if network.codes is None else QuantisedNetwork
        self.network = build_network(network, config.seed, kind).to(device)
        self.ema = build_network(network, config.seed, kind).to(device).requires_grad_(False)
        self.optimizer = build_optimizer(self.network, config)
        self.codebook_reviver = (
            None if network.codes is None else CodebookReviver(self.network, self.ema, self.optimizer, config)
        )
        self.perceptual = Perceptual.from_file(Path(config.perceptual)).to(device) if config.perceptual else None
        self.identity = Identity.from_file(Path(config.identity)).to(device) if config.identity else None
        self.discriminator = None
        if config.gan_from is not None:
            if min(pictures.shape[1:3]) < SMALLEST:
                raise TrainingError(f"the patch discriminator needs pictures of {SMALLEST} pixels a side, or no gan_from")
            self.discriminator = PatchDiscriminator(network.image_channels)
            init_convolutions(self.discriminator, config.seed)
            self.discriminator.to(device)
            self.discriminator_optimizer = build_optimizer(self.discriminator, config)
        self.loop = Loop(self, config, fault_tolerance, folder, ranks)

    @property
    def losses(self) -> list[str]:
        """What it learns from, by name."""
        extra = {"LPIPS": self.perceptual, "identity": self.identity, "GAN": self.discriminator}
        return ["L1", *(name for name, part in extra.items() if part is not None), *self.network.loss_names]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint stores or fills in, by part and name."""
        parts = {
            "model": self.network.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.network, self.optimizer),
        }  # fmt: skip
        if self.codebook_reviver is not None:
            parts["codebook"] = self.codebook_reviver.tensors()
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator.state_dict()
            parts["discriminator_optimizer"] = optimizer_tensors(self.discriminator, self.discriminator_optimizer)
        return parts

    def train(self) -> bool:
        """Up to the last step. False when a signal stopped it before; it is saved either way."""
        return self.loop.run()

    def read(self, place: int | None) -> Iterator[tuple[Read, int]]:
        """This rank's pictures of each step. Each epoch has an order of its own, from the seed alone."""
        step, (n, rows) = place or 0, (len(self.seen), self.config.batch_size)
        while True:
            chosen = []
            for number in range(step * rows, (step + 1) * rows)[self.ranks.rank :: self.ranks.world]:
                epoch, within = divmod(number, n)
                chosen.append((number, self.seen[_order(self.config.seed, epoch, n)[within]]))
            step += 1
            yield Read(chosen, torch.from_numpy(np.stack([self.pictures[i] for _, i in chosen]))), step

    def step(self, number: int, read: Read, allows: Callable[..., bool]) -> tuple[dict[str, float], int]:
        """One update of the network and, when it has joined in, of the discriminator."""
        config = self.config
        real = to_unit(read.pictures.to(self.device))  # (n, image_channels, Y, X)
        adversarial = self.discriminator is not None and number >= config.gan_from
        for optimizer in self._optimizers(adversarial):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, config)
        keys = [derive_seed(config.seed, "codec noise", row) for row, _ in read.chosen]
        learnt = self.network.losses(real, keys, config)
        terms = self._terms(real, learnt, adversarial)
        norm = self._gradient(self.network, sum(weight * value for weight, value in terms.values()))
        values = {name: value.item() for name, (_, value) in terms.items()}
        if adversarial:
            said = discriminator_loss(self.discriminator(real), self.discriminator(learnt.reconstruction.detach()))
            values |= {"discriminator_norm": self._gradient(self.discriminator, said), "discriminator": said.item()}
        values = dict(zip(values, self.ranks.sum(*(one / self.ranks.world for one in values.values())), strict=True))
        if allows(number + 1, norm, values, lambda: {"pictures": [int(i) for _, i in read.chosen]}):
            for optimizer in self._optimizers(adversarial):
                optimizer.step()
            update_ema(self.ema, self.network, number, config.ema_decay)
            if self.codebook_reviver is not None:
                values |= self.codebook_reviver.update(number, *map(self._of_all_ranks, (learnt.latents, learnt.codes)))
        for optimizer in self._optimizers(adversarial):
            optimizer.zero_grad()
        return values | {"gradient_norm": norm}, config.batch_size

    def _of_all_ranks(self, pixels: Tensor) -> Tensor:
        """Latent pixels of a step's pictures, (n, ...), in the order of one rank that has all of them."""
        pictures = self.config.batch_size // self.ranks.world
        return self.ranks.interleave(pixels.unflatten(0, (pictures, -1))).flatten(0, 1)

    def _optimizers(self, adversarial: bool) -> list[torch.optim.Optimizer]:
        return [self.optimizer, self.discriminator_optimizer] if adversarial else [self.optimizer]

    def _terms(self, real: Tensor, learnt: AutoencoderOutput, adversarial: bool) -> dict[str, tuple[float, Tensor]]:
        """What the network's loss is the sum of, by name: weight and value, each a mean over pictures."""
        config, made = self.config, learnt.reconstruction  # (n, image_channels, Y, X)
        terms = {"l1": (1.0, (real - made).abs().mean()), **learnt.terms}
        if self.perceptual is not None:
            terms["lpips"] = 1.0, self.perceptual(_coloured(real), _coloured(made)).mean()
        if self.identity is not None:
            terms["identity"] = config.identity_weight, self.identity(_coloured(real), _coloured(made)).mean()
        if adversarial:
            self.discriminator.requires_grad_(False)
            terms["fooled"] = config.gan_weight, -self.discriminator(made).mean()
            self.discriminator.requires_grad_(True)
        return terms

    def _gradient(self, network: nn.Module, loss: Tensor) -> float:
        """The mean gradient over all ranks, cut to its largest norm; says what that was before."""
        loss.backward()
        self.ranks.average([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        return torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm).item()

    def describe(self, values: dict[str, float]) -> str:
        return f"L1 {values['l1']:.4f}{_use(values)}"

    def preview(self, step: int) -> None:
        """There is none: the page of reconstructions is made in the end."""

    def sample_pictures(self, most: int = 2_000) -> list[np.ndarray]:
        """Some of the pictures that it learns from, evenly spread: for the statistics of its latents."""
        return [self.pictures[i] for i in self.seen[:: -(-len(self.seen) // most)]]

    def evaluate_heldout(self) -> tuple[dict, str]:
        found = self.quality()
        return found, f"PSNR {found['psnr']:.2f} dB  SSIM {found['ssim']:.4f}{_use(found)}"

    @torch.no_grad()
    def quality(self) -> dict[str, float]:
        """PSNR in dB and SSIM of the held-out pictures, through the averaged network's codes, or the mode of its latents.

        With a codebook also the share of its codes that they use, and the perplexity.
        """
        psnr = ssim = 0.0
        counts = None if self.codebook_reviver is None else torch.zeros_like(self.codebook_reviver.idle)  # (codes,)
        for first in range(0, len(self.heldout), LOOK):
            real = to_unit(torch.from_numpy(self.pictures[self.heldout[first : first + LOOK]]).to(self.device))
            encoded = self.ema.encode(real)  # (n, C, Y / f, X / f), or codes (n, Y / f, X / f)
            made = self.ema.decode(encoded).clamp(-1, 1)  # (n, image_channels, Y, X)
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
    """SSIM (Wang et al. 2004) of pictures between -1 and 1, mean over channels, 11 x 11 Gaussian windows: (N,)."""
    image_channels = one.shape[1]
    side = torch.arange(11, device=one.device, dtype=one.dtype) - 5
    line = torch.exp(-side.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(image_channels, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=image_channels)

    a, b = (one + 1) / 2, (other + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.flatten(1).mean(1)


def _split(count: int, heldout: Sequence[int], config: CodecTrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to learn from, and to look at: of those that their source holds out, else of all, in an order of chance."""
    mixed = np.random.default_rng(derive_seed(config.seed, "heldout")).permutation(count)
    if len(heldout):
        held = np.isin(mixed, heldout)
        return mixed[~held], np.sort(mixed[held][: config.heldout])
    most = min(config.heldout, max(1, count // 10))
    return mixed[most:], np.sort(mixed[:most])


@lru_cache(maxsize=2)  # the epoch in hand, and the next
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n)


def _coloured(pictures: Tensor) -> Tensor:
    """Grey pictures three times, for networks that take three channels."""
    return pictures.expand(-1, 3, -1, -1)
