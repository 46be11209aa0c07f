"""What is learnt: the next token of the text, and the noise in every image (section 3). Stands beside the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion import diffusion
from transfusion.chance import seed_from
from transfusion.config import DiffusionConfig
from transfusion.sequence import Batch, ImageGroup


@dataclass
class Draw:
    """The chance of one group of images: its times t (N,) and noise (N, C, Y, X)."""

    t: Tensor
    noise: Tensor


@dataclass
class Losses:
    """Sums, and what to divide them by; the trainer adds them up over micro-batches and ranks first."""

    text_sum: Tensor  # over all positions with next-token loss, an image's codes among them
    image_sum: Tensor
    code_sum: Tensor  # the codes' part of text_sum, to be told apart
    text_count: int
    image_count: int
    code_count: int

    @property
    def sums(self) -> Tensor:
        """(3,) text, image and code; without gradient."""
        return torch.stack([self.text_sum.detach(), self.image_sum.detach(), self.code_sum])


def draw(batch: Batch, config: DiffusionConfig) -> list[Draw]:
    """t and noise of every image, from its own key: on the CPU, in fp32, whatever the batch, rank or device."""
    return [_draw_group(group, config) for group in batch.groups]


def _draw_group(group: ImageGroup, config: DiffusionConfig) -> Draw:
    t = torch.empty(len(group.keys))
    noise = torch.empty_like(group.clean)
    for n, (key, max_time) in enumerate(zip(group.keys, group.max_time.tolist(), strict=True)):
        generator = torch.Generator().manual_seed(key)
        t[n] = diffusion.draw_time(generator, max_time, config)
        noise[n].normal_(generator=generator)
    return Draw(t, noise)


def draw_on_grid(batch: Batch, steps: int) -> list[Draw]:
    """For held-out losses: each image's own fixed noise, and its own fixed t, one of `steps` that divide 0 to 1 evenly."""
    draws = []
    for group in batch.groups:
        grid = (torch.tensor([seed_from(key, "held out") % steps for key in group.keys]) + 0.5) / steps
        noise = torch.stack([
            torch.empty(latent.shape).normal_(generator=torch.Generator().manual_seed(key))
            for latent, key in zip(group.clean, group.keys, strict=True)
        ])  # fmt: skip
        draws.append(Draw(grid * group.max_time, noise))
    return draws


def losses(model: nn.Module, batch: Batch, draws: list[Draw], config: DiffusionConfig, z_loss: float = 0.0) -> Losses:
    """Add the noise, ask the model, sum both losses: text over tokens, images over images of the mean over numbers."""
    device = batch.tokens.device
    draws = [Draw(d.t.to(device, non_blocking=True), d.noise.to(device, non_blocking=True)) for d in draws]
    noisy = [
        diffusion.add_noise(group.clean, d.noise, d.t, config) for group, d in zip(batch.groups, draws, strict=True)
    ]  # (N, C, Y, X) each
    said = model(batch, noisy, [d.t for d in draws])
    image_sum = torch.zeros((), device=device)
    for group, d, x, prediction in zip(batch.groups, draws, noisy, said.images, strict=True):
        error = diffusion.squared_error(group.clean, d.noise, x, prediction, d.t, config)  # (N,)
        image_sum = image_sum + (error * group.loss).sum()
    text = next_token_loss(said.logits, batch.text_target, z_loss)  # (T,)
    codes = text.detach()[batch.text_target >= batch.first_code] if batch.code_count else text.new_zeros(0)
    return Losses(text.sum(), image_sum, codes.sum(), *counts(batch))


def next_token_loss(logits: Tensor, target: Tensor, z_loss: float = 0.0) -> Tensor:
    """Of each token: logits (T, V), target (T,) -> (T,). `z_loss` is Chameleon's pull on the logits' normaliser."""
    logits = logits.float()
    loss = F.cross_entropy(logits, target, reduction="none")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss


def total(parts: Losses, text_count: int, image_count: int, image_weight: float) -> Tensor:
    """This part's share of the step's loss, given the counts over all parts and ranks."""
    return parts.text_sum / max(1, text_count) + image_weight * parts.image_sum / max(1, image_count)


def counts(batch: Batch) -> tuple[int, int, int]:
    """What the sums of its `Losses` are divided by."""
    return batch.text_count, batch.image_count, batch.code_count


def means(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Sums and counts of `Losses`, over whatever they were added up, as a person reads them: the text by itself in nats per
    token, and the images, denoised (over their numbers) or in nats per code."""
    (text, image, code), (texts, images, codes) = sums, counts
    values = {"text_loss": (text - code) / max(1, texts - codes)}
    return values | ({"image_loss": (image + code) / (images + codes)} if images + codes else {})
