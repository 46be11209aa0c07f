"""The training loss: next-token loss on text and codes, denoising loss on latents (section 3). Independent of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transfusion import diffusion
from transfusion.config import DiffusionConfig
from transfusion.seeding import derive_seed
from transfusion.sequence import Batch, ImageGroup

CHUNK, CPU_CHUNK = 2048, 256  # positions whose logits exist at one time


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
    tokens: Tensor | None = None  # (T,) detached: the loss of each position in text_sum
    images: Sequence[Tensor] = ()  # (N,) detached, for each group: the loss of each image in image_sum
    predictions: Sequence[Tensor] = ()  # (N, C, Y, X) detached, for each group: what the image head predicted

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
    text_loss = partial(next_token_loss, target=batch.text_target, z_loss=z_loss)
    text, predictions = model(batch, x_t, [s.t for s in samples], text_loss)
    image_sum, images = torch.zeros((), device=device), []
    for group, s, group_x_t, predicted in zip(batch.groups, samples, x_t, predictions, strict=True):
        error = diffusion.squared_error(group.x0, s.noise, group_x_t, predicted, s.t, config) * group.loss  # (N,)
        image_sum = image_sum + error.sum()
        images.append(error.detach())
    codes = text.tokens[batch.text_target >= batch.first_code] if batch.code_count else text.tokens.new_zeros(0)
    predictions = [predicted.detach() for predicted in predictions]
    return Losses(text.sum, image_sum, codes.sum(), *loss_counts(batch), text.tokens, images, predictions)


def velocity_errors_by_t(
    batch: Batch, samples: list[NoiseSample], predictions: Sequence[Tensor], config: DiffusionConfig, bins: int
) -> Tensor:
    """(2, bins) float64: sums of the velocity errors of images with a loss, and their number, by t in equal parts of 0 to 1.
    The predictions are those of `compute_losses` for this batch and these samples."""
    sums = torch.zeros(2, bins, dtype=torch.float64)
    for group, s, predicted in zip(batch.groups, samples, predictions, strict=True):
        x0, noise, t = (value.to(predicted.device) for value in (group.x0, s.noise, s.t))
        x_t = diffusion.add_noise(x0, noise, t, config)
        errors = diffusion.velocity_error(x0, noise, x_t, predicted, t, config).cpu().double()  # (N,)
        has_loss, bin_numbers = group.loss.cpu(), (s.t.cpu() * bins).long().clamp(max=bins - 1)  # (N,)
        values = torch.stack([errors, torch.ones_like(errors)])  # (2, N)
        sums.index_add_(1, bin_numbers[has_loss], values[:, has_loss])
    return sums


class TextLoss(NamedTuple):
    """The sum, which has the gradient, and the loss of each token (T,), which has none. In nats."""

    sum: Tensor
    tokens: Tensor


def chunk_size(device: torch.device) -> int:
    """Positions whose logits are computed at one time. A GPU needs more of them: each chunk reads and writes the gradient of
    the whole head, and its products are faster than its memory."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def next_token_loss(hidden: Tensor, lm_head: Tensor, target: Tensor, z_loss: float = 0.0) -> TextLoss:
    """Cross entropy of the logits hidden @ lm_head.T for target (T,), from hidden (T, D) and lm_head (V, D). `z_loss` weighs
    Chameleon's log(Z)^2 (2405.09818). Products are in the dtype of autocast or of hidden, all else at least in float32.

    The logits of only one chunk of positions exist at a time. While they do, the gradients are computed too, as in Liger
    (2410.10989), so that no product is computed twice. Hence only one backward pass is possible.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not torch.is_grad_enabled():
        hidden, lm_head = hidden.detach(), lm_head.detach()
    return TextLoss(*_NextTokenLoss.apply(hidden, lm_head, target, z_loss, dtype))


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, lm_head: Tensor, target: Tensor, z_loss: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        size = chunk_size(hidden.device)
        lower_head, wide = lm_head.to(dtype), torch.promote_types(dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)  # (T,)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # (T, D)
        grad_head = torch.zeros_like(lm_head, dtype=wide) if needs_head else None  # (V, D)
        for begin in range(0, len(hidden), size):
            part = slice(begin, begin + size)
            lower_hidden = hidden[part].to(dtype)  # (C, D)
            losses[part], grad = _loss_and_gradient(lower_hidden @ lower_head.T, target[part, None], z_loss, wide)
            grad = grad.to(dtype)
            if needs_hidden:
                grad_hidden[part] = grad @ lower_head
            if needs_head and dtype == wide:
                grad_head.addmm_(grad.T, lower_hidden)
            elif needs_head:
                grad_head += grad.T @ lower_hidden
            del grad  # before the next logits
        ctx.save_for_backward(grad_hidden, grad_head.to(lm_head.dtype) if needs_head else None)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors  # scaled in place: a copy of the second may be a gigabyte
        return *(None if grad is None else grad.mul_(grad_sum) for grad in (grad_hidden, grad_head)), None, None, None


def _loss_and_gradient(logits: Tensor, target: Tensor, z_loss: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The losses (C,) of logits (C, V) for target (C, 1), and their gradients in the logits (C, V), both in `wide`."""
    log_probs = logits.log_softmax(-1, dtype=wide)
    target_log_probs = log_probs.gather(1, target)  # (C, 1)
    log_z = logits.gather(1, target) - target_log_probs  # (C, 1)
    grad = log_probs.exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * log_z
    grad.scatter_add_(1, target, torch.full_like(log_z, -1))
    return (z_loss * log_z.square() - target_log_probs)[:, 0], grad


def total_loss(losses: Losses, text_count: int, image_count: int, image_weight: float) -> Tensor:
    """This micro-batch's share of the loss of the step. The counts are those of all micro-batches and ranks."""
    return losses.text_sum / max(1, text_count) + image_weight * losses.image_sum / max(1, image_count)


def loss_counts(batch: Batch) -> tuple[int, int, int]:
    """Positions with text loss, images with denoising loss, and codes: the divisors of the sums of `Losses`."""
    return batch.text_count, batch.image_count, batch.code_count


def sum_by_source(batch: Batch, tokens: Tensor, images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """(S, 3): for each source in `names` the sums over its text positions, its images and its codes, as in `Losses.sums`.
    `tokens` (T,) has a value for each position with text loss, `images` (N,) one for each image of a group; they may be on
    another device than the batch. Other sources are left out."""
    numbers = {name: n for n, name in enumerate(names)}
    table = [[numbers.get(entry.rpartition(" ")[0], len(names)) for entry in row] for row in batch.documents]
    width = max([1, *map(len, table)])
    chunk_sources = torch.tensor([row + [0] * (width - len(row)) for row in table])  # (B, width)
    sources = chunk_sources.gather(1, batch.document_ids.clamp(min=0).long()).flatten()  # (B * L,)
    sums = tokens.new_zeros(len(names) + 1, 3)

    def move(index: Tensor) -> Tensor:
        """To the device of the values. From pinned memory, because a copy from other memory may wait for the GPU's work."""
        index = index.pin_memory() if tokens.is_cuda else index
        return index.to(tokens.device, non_blocking=tokens.is_cuda)

    def add(column: int, positions: Tensor, values: Tensor) -> None:
        sums[:, column].index_add_(0, move(sources[positions]), values.to(sums.dtype))

    add(0, batch.text_index, tokens)
    for group, values in zip(batch.groups, images, strict=True):
        add(1, group.index[:, 0], values)
    if batch.code_count:
        add(2, batch.text_index, tokens * move(batch.text_target >= batch.first_code))
    return sums[:-1]


def mean_losses(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Mean losses for logging, from sums and counts of text, image and code. text_loss: nats per text token. image_loss:
    mean squared error of latents, or nats per code."""
    (text, image, code), (texts, images, codes) = sums, counts
    values = {"text_loss": (text - code) / max(1, texts - codes)}
    return values | ({"image_loss": (image + code) / (images + codes)} if images + codes else {})
