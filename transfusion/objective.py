"""The training loss: next-token loss on text and codes, denoising loss on latents (section 3). Independent of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion import diffusion
from transfusion.config import DiffusionConfig
from transfusion.seeding import derive_seed
from transfusion.sequence import Batch, ImageGroup


@dataclass
class NoiseSample:
    """t (N,) and noise (N, C, Y, X) of one group of images."""

    t: Tensor
    noise: Tensor

    def pin_memory(self) -> "NoiseSample":
        """In pinned (page-locked) memory."""
        return NoiseSample(self.t.pin_memory(), self.noise.pin_memory())


@dataclass
class Losses:
    """Sums and their counts. The trainer adds both over micro-batches and ranks before it divides."""

    text_sum: Tensor  # over all positions with next-token loss, codes included
    image_sum: Tensor
    code_sum: Tensor  # the part of text_sum that is on codes, for logging
    text_count: int
    image_count: int
    code_count: int

    @property
    def sums(self) -> Tensor:
        """(3,) text, image and code, detached."""
        return torch.stack([self.text_sum.detach(), self.image_sum.detach(), self.code_sum])


def sample_noise(batch: Batch, config: DiffusionConfig) -> list[NoiseSample]:
    """t and noise of every image, from its key, on the CPU in float32: equal for any batch, rank or device."""
    return [_sample_group(group, config) for group in batch.groups]


def _sample_group(group: ImageGroup, config: DiffusionConfig) -> NoiseSample:
    t = torch.empty(len(group.keys))
    noise = torch.empty_like(group.x0)
    for n, (key, max_t) in enumerate(zip(group.keys, group.max_t.tolist(), strict=True)):
        generator = torch.Generator().manual_seed(key)
        t[n] = diffusion.sample_t(generator, max_t, config)
        noise[n].normal_(generator=generator)
    return NoiseSample(t, noise)


def sample_noise_on_grid(batch: Batch, steps: int) -> list[NoiseSample]:
    """For held-out losses: fixed noise for each image, and as its t one of `steps` evenly spaced values, also fixed."""
    samples = []
    for group in batch.groups:
        grid = (torch.tensor([derive_seed(key, "held out") % steps for key in group.keys]) + 0.5) / steps
        noise = torch.stack([
            torch.empty(latent.shape).normal_(generator=torch.Generator().manual_seed(key))
            for latent, key in zip(group.x0, group.keys, strict=True)
        ])  # fmt: skip
        samples.append(NoiseSample(grid * group.max_t, noise))
    return samples


def compute_losses(
    model: nn.Module, batch: Batch, samples: list[NoiseSample], config: DiffusionConfig, z_loss: float = 0.0
) -> Losses:
    """Add the noise, run the model, sum both losses: over tokens, and over images the mean squared error of each."""
    device = batch.tokens.device
    samples = [NoiseSample(s.t.to(device, non_blocking=True), s.noise.to(device, non_blocking=True)) for s in samples]
    x_t = [
        diffusion.add_noise(group.x0, s.noise, s.t, config) for group, s in zip(batch.groups, samples, strict=True)
    ]  # (N, C, Y, X) each
    prediction = model(batch, x_t, [s.t for s in samples])
    image_sum = torch.zeros((), device=device)
    for group, s, group_x_t, predicted in zip(batch.groups, samples, x_t, prediction.images, strict=True):
        error = diffusion.squared_error(group.x0, s.noise, group_x_t, predicted, s.t, config)  # (N,)
        image_sum = image_sum + (error * group.loss).sum()
    text = next_token_loss(prediction.logits, batch.text_target, z_loss)  # (T,)
    codes = text.detach()[batch.text_target >= batch.first_code] if batch.code_count else text.new_zeros(0)
    return Losses(text.sum(), image_sum, codes.sum(), *loss_counts(batch))


def next_token_loss(logits: Tensor, target: Tensor, z_loss: float = 0.0) -> Tensor:
    """Cross entropy of logits (T, V) for target (T,): (T,). `z_loss` weighs Chameleon's log(Z)^2 (2405.09818)."""
    logits = logits.float()
    loss = F.cross_entropy(logits, target, reduction="none")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss


def total_loss(losses: Losses, text_count: int, image_count: int, image_weight: float) -> Tensor:
    """This micro-batch's share of the loss of the step. The counts are those of all micro-batches and ranks."""
    return losses.text_sum / max(1, text_count) + image_weight * losses.image_sum / max(1, image_count)


def loss_counts(batch: Batch) -> tuple[int, int, int]:
    """Positions with text loss, images with denoising loss, and codes: the divisors of the sums of `Losses`."""
    return batch.text_count, batch.image_count, batch.code_count


def mean_losses(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Mean losses for logging, from sums and counts of text, image and code. text_loss: nats per text token. image_loss:
    mean squared error of latents, or nats per code."""
    (text, image, code), (texts, images, codes) = sums, counts
    values = {"text_loss": (text - code) / max(1, texts - codes)}
    return values | ({"image_loss": (image + code) / (images + codes)} if images + codes else {})
