"""Trains an autoencoder or a VQ codec on images, with the same loop, checkpoints and ranks as a model (section 4.1)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.codecs.autoencoder import (
    AutoencoderNetwork,
    AutoencoderOutput,
    PatchDiscriminator,
    build_network,
    discriminator_loss,
    from_uint8,
    init_convolutions,
)  # fmt: skip
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.codecs.perceptual import LPIPS, IdentityLoss
from transfusion.codecs.vq import QuantisedNetwork
from transfusion.config import FaultToleranceConfig, LoggerName
from transfusion.parallel import SINGLE_PROCESS, Ranks, share_batch
from transfusion.seeding import derive_seed
from transfusion.training.codebook import CodebookReviver, measure_usage
from transfusion.training.guard import Guard, TrainingError
from transfusion.training.loop import Loop
from transfusion.training.optimizer import build_optimizer, get_learning_rate, optimizer_tensors, update_ema

MIN_SIDE_SSIM, MIN_SIDE_LPIPS, MIN_SIDE_GAN = 11, 16, 32  # pixels: the window, VGG's poolings, the discriminator's patches
EVAL_BATCH_SIZE = 32  # held-out images in one forward pass


@dataclass
class ImageBatch:
    """This rank's images of a step: for each its number in training order and its index, and the pixels."""

    chosen: list[tuple[int, int]]
    images: Tensor  # (n, Y, X, channels) uint8


class CodecTrainer:
    """Trains one autoencoder, with or without a codebook.

    `images` are (n, Y, X, channels) uint8 and may be memory-mapped. `heldout` are the indices that are not trained on; when
    it is empty, a random part is held out. Every rank has all weights and takes its share of a step's images.
    """

    unit = "pictures"

    def __init__(
        self, network: AutoencoderConfig, config: CodecTrainingConfig, folder: Path, images: np.ndarray,
        device: torch.device, ranks: Ranks = SINGLE_PROCESS, fault_tolerance: FaultToleranceConfig = FaultToleranceConfig(),  # noqa: B008
        heldout: Sequence[int] = (), loggers: Sequence[LoggerName] = (),
    ):  # fmt: skip
        self.config, self.images, self.device, self.ranks = config, images, device, ranks
        self.settings = {"network": asdict(network), "training": asdict(config)}
        _check_sizes(config, images, ranks)
        self.train_indices, self.heldout = _split(len(images), heldout, config)
        self.source_has_heldout = len(heldout) > 0
        if not len(self.train_indices):
            raise TrainingError(f"{len(images)} images are too few to train on; give more")
        kind = AutoencoderNetwork if network.codes is None else QuantisedNetwork
        self.network = build_network(network, config.seed, kind).to(device)
        self.ema = build_network(network, config.seed, kind).to(device).requires_grad_(False)
        self.optimizer = build_optimizer(self.network, config)
        self.codebook_reviver = (
            None if network.codes is None else CodebookReviver(self.network, self.ema, self.optimizer, config)
        )
        self.perceptual = LPIPS.from_file(Path(config.perceptual)).to(device) if config.perceptual else None
        self.identity = IdentityLoss.from_file(Path(config.identity)).to(device) if config.identity else None
        self.discriminator = None
        if config.gan_from is not None:
            self.discriminator = PatchDiscriminator(network.image_channels)
            init_convolutions(self.discriminator, config.seed)
            self.discriminator.to(device)
            self.discriminator_optimizer = build_optimizer(self.discriminator, config)
        self.loop = Loop(self, config, fault_tolerance, folder, ranks, device, loggers=loggers)

    @property
    def loss_names(self) -> list[str]:
        """The losses that it is trained with."""
        optional = {"LPIPS": self.perceptual, "identity": self.identity, "GAN": self.discriminator}
        return ["L1", *(name for name, loss in optional.items() if loss is not None), *self.network.loss_names]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a checkpoint saves and restores, by part and name."""
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
        """Train to the last step. False when a signal stopped it earlier; both save a checkpoint."""
        return self.loop.run()

    def batches(self, loader_state: int | None) -> Iterator[tuple[ImageBatch, int]]:
        """This rank's images of each step. The order of each epoch follows from the seed."""
        step, (n, batch_size) = loader_state or 0, (len(self.train_indices), self.config.batch_size)
        while True:
            chosen = []
            for number in range(step * batch_size, (step + 1) * batch_size)[self.ranks.rank :: self.ranks.world]:
                epoch, position = divmod(number, n)
                chosen.append((number, self.train_indices[_order(self.config.seed, epoch, n)[position]]))
            step += 1
            yield ImageBatch(chosen, torch.from_numpy(np.stack([self.images[i] for _, i in chosen]))), step

    def count(self, batch: ImageBatch) -> tuple[int]:
        """This rank's images."""
        return (len(batch.chosen),)

    def measure_speed(self, counts: Sequence[float], seconds: float) -> dict[str, float]:
        """Images per second of all ranks."""
        return {f"{self.unit}_per_second": round(counts[0] / seconds, 1)}

    def step(
        self, number: int, batch: ImageBatch, counts: Sequence[int], guard: Guard
    ) -> Callable[[], dict[str, float]]:
        """One update of the network and, from step `gan_from` on, of the discriminator."""
        config = self.config
        images = from_uint8(batch.images.to(self.device))  # (n, image_channels, Y, X)
        adversarial = self.discriminator is not None and number >= config.gan_from
        for optimizer in self._optimizers(adversarial):
            for group in optimizer.param_groups:
                group["lr"] = get_learning_rate(number, config)
        seeds = [derive_seed(config.seed, "codec noise", row) for row, _ in batch.chosen]
        output = self.network.compute_losses(images, seeds, config)
        terms = self._loss_terms(images, output, adversarial)
        grad_norm = self._backward(self.network, sum(weight * value for weight, value in terms.values()))
        values = {name: value.item() for name, (_, value) in terms.items()}
        if adversarial:
            loss = discriminator_loss(self.discriminator(images), self.discriminator(output.reconstruction.detach()))
            values |= {"discriminator_norm": self._backward(self.discriminator, loss), "discriminator": loss.item()}
        values = dict(zip(values, self.ranks.sum(*(value / self.ranks.world for value in values.values())), strict=True))
        losses = dict(values)
        verdict = guard.judge(torch.tensor([grad_norm, *losses.values()], device=self.device))
        if applied := verdict[0] == 0:
            for optimizer in self._optimizers(adversarial):
                optimizer.step()
            update_ema(self.ema, self.network, number, config.ema_decay, applied)
            if self.codebook_reviver is not None:
                values |= self.codebook_reviver.update(number, *map(self._gather_latents, (output.latents, output.codes)))
        for optimizer in self._optimizers(adversarial):
            optimizer.zero_grad()

        def read() -> dict[str, float]:
            pictures = {"pictures": [int(i) for _, i in batch.chosen]}
            reason = guard.report(number + 1, verdict.tolist(), grad_norm, losses, pictures)
            event = {"event": "skip", "reason": reason} if reason else {}
            return {**values, "gradient_norm": grad_norm, "learning_rate": get_learning_rate(number, config), **event}

        return read

    def _gather_latents(self, latents: Tensor) -> Tensor:
        """Latent pixels (or their codes) of a step from all ranks, (n, ...), in the order of a single process."""
        batch_size = self.config.batch_size // self.ranks.world
        return self.ranks.interleave(latents.unflatten(0, (batch_size, -1))).flatten(0, 1)

    def _optimizers(self, adversarial: bool) -> list[torch.optim.Optimizer]:
        return [self.optimizer, self.discriminator_optimizer] if adversarial else [self.optimizer]

    def _loss_terms(self, images: Tensor, output: AutoencoderOutput, adversarial: bool) -> dict[str, tuple[float, Tensor]]:
        """The terms of the network's loss by name: weight and value. Each value is a mean over images."""
        config, reconstruction = self.config, output.reconstruction  # (n, image_channels, Y, X)
        terms = {"l1": (1.0, (images - reconstruction).abs().mean()), **output.terms}
        rgb = images.expand(-1, 3, -1, -1), reconstruction.expand(-1, 3, -1, -1)  # grey images three times
        if self.perceptual is not None:
            terms["lpips"] = 1.0, self.perceptual(*rgb).mean()
        if self.identity is not None:
            terms["identity"] = config.identity_weight, self.identity(*rgb).mean()
        if adversarial:
            self.discriminator.requires_grad_(False)
            terms["fooled"] = config.gan_weight, -self.discriminator(reconstruction).mean()
            self.discriminator.requires_grad_(True)
        return terms

    def _backward(self, network: nn.Module, loss: Tensor) -> float:
        """Mean gradients over all ranks, clipped to max_grad_norm. Returns the norm before clipping."""
        loss.backward()
        self.ranks.average_gradients([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        return torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm).item()

    def describe(self, values: dict[str, float]) -> str:
        return f"L1 {values['l1']:.4f}{_describe_usage(values)}"

    def preview(self, step: int, reset_watchdog: Callable[[], None]) -> None:
        """A codec has no previews; `fit-codec` writes a page of reconstructions at the end."""

    def sample_images(self, limit: int = 2_000) -> list[np.ndarray]:
        """At most `limit` training images, evenly spaced, for the statistics of the latents."""
        return [self.images[i] for i in self.train_indices[:: -(-len(self.train_indices) // limit)]]

    def evaluate_heldout(self, reset_watchdog: Callable[[], None]) -> tuple[dict, str]:
        values = self.evaluate(reset_watchdog)
        return values, f"PSNR {values['psnr']:.2f} dB  SSIM {values['ssim']:.4f}{_describe_usage(values)}"

    @torch.no_grad()
    def evaluate(self, reset_watchdog: Callable[[], None] = lambda: None) -> dict[str, float]:
        """PSNR in dB and SSIM of the averaged network on the held-out images, from codes or from the latents' mode. With a
        codebook also the share of codes in use, and their perplexity. `reset_watchdog` is called after each batch."""
        psnr_sum = ssim_sum = 0.0
        counts = None if self.codebook_reviver is None else torch.zeros_like(self.codebook_reviver.idle)  # (codes,)
        for first in range(0, len(self.heldout), EVAL_BATCH_SIZE):
            index = self.heldout[first : first + EVAL_BATCH_SIZE]
            images = from_uint8(torch.from_numpy(self.images[index]).to(self.device))
            encoded = self.ema.encode(images)  # (n, C, Y / f, X / f), or codes (n, Y / f, X / f)
            reconstruction = self.ema.decode(encoded).clamp(-1, 1)  # (n, image_channels, Y, X)
            psnr_sum += float(psnr(images, reconstruction).sum())
            ssim_sum += float(ssim(images, reconstruction).sum())
            if counts is not None:
                counts += torch.bincount(encoded.flatten(), minlength=len(counts))
            reset_watchdog()
        count = len(self.heldout)
        values = {"psnr": psnr_sum / count, "ssim": ssim_sum / count, "count": count}
        return values if counts is None else values | measure_usage(counts)


def _describe_usage(values: dict[str, float]) -> str:
    """The usage of the codebook as text; empty without a codebook."""
    return f"  codes {values['codes_used']:.0%} (perplexity {values['perplexity']:,.0f})" if "codes_used" in values else ""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (N, C, Y, X) in [-1, 1], in dB: (N,)."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of images (N, C, Y, X) in [-1, 1], 11 x 11 Gaussian windows, mean over channels: (N,)."""
    channels = a.shape[1]
    offsets = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(channels, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    a, b = (a + 1) / 2, (b + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.flatten(1).mean(1)


def _check_sizes(config: CodecTrainingConfig, images: np.ndarray, ranks: Ranks) -> None:
    """TrainingError when the images are too small for the losses, ValueError when the ranks cannot share the batch."""
    side, min_side = min(images.shape[1:3]), MIN_SIDE_LPIPS if config.perceptual else MIN_SIDE_SSIM
    if side < min_side:
        loss = "LPIPS" if config.perceptual else "SSIM"
        raise TrainingError(f"{loss} needs images of at least {min_side} pixels a side: give a larger --size")
    share_batch(config.batch_size, ranks.world)
    if config.gan_from is not None and side < MIN_SIDE_GAN:
        raise TrainingError(f"the discriminator needs images of at least {MIN_SIDE_GAN} pixels a side: give a larger "
                            "--size, or leave training.gan_from unset")  # fmt: skip


def _split(count: int, heldout: Sequence[int], config: CodecTrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, in random order, and at most `config.heldout` sorted held-out indices. The held-out ones are from
    `heldout`, or without it a random tenth at most of all images."""
    shuffled = np.random.default_rng(derive_seed(config.seed, "heldout")).permutation(count)
    if len(heldout):
        is_heldout = np.isin(shuffled, heldout)
        return shuffled[~is_heldout], np.sort(shuffled[is_heldout][: config.heldout])
    num_heldout = min(config.heldout, max(1, count // 10))
    return shuffled[num_heldout:], np.sort(shuffled[:num_heldout])


@lru_cache(maxsize=2)  # the current epoch and the next
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n)
