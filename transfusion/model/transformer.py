"""The Llama transformer: RMSNorm, rotary attention, SwiGLU. Text and patches share the weights (section 3), or not."""

import math
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from transfusion.config import ModelConfig, RopeScaling
from transfusion.model.mask import Mask
from transfusion.model.untied import Routing
from transfusion.sequence import Sides


class Cache(Protocol):
    """Keys and values of earlier positions, for inference."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """Attention of q (B, H, Lq, h) to the cached positions and the new ones, k and v (B, Hkv, Lq, h): under a mask, or
        without one to all of them. -> (B, H, Lq, h)."""


class Transformer(nn.Module):
    """Blocks and a final norm: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.image_norm = RMSNorm(config.width, config.norm_eps) if config.untied == "full" else None
        self.activation_checkpointing = False  # in training: recompute the activations of a block in its backward pass

    def forward(
        self, x: Tensor, position_ids: Tensor, mask: Mask | None, sides: Sides, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states x (B, L, D) at the positions of `rotary_positions`."""
        cos_sin = rope_cos_sin(position_ids, self.config, torch.promote_types(x.dtype, torch.float32))
        if mask is not None:
            mask.prepare(self._query_dtype(x))
        routing = Routing(sides)
        # As all other blocks get it, so that one compiled graph is of all.
        parts = routing.arrange([x.flatten(0, 1)], 1 if self.config.untied == "none" else len(routing.used))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                parts = checkpoint(block, parts, routing, cos_sin, mask, cache, use_reentrant=False)
            else:
                parts = block(parts, routing, cos_sin, mask, cache)
        normed = routing.apply(routing.select(self.norm, self.image_norm), parts)
        return routing.arrange(normed, 1)[0].view(x.shape)

    def _query_dtype(self, x: Tensor) -> torch.dtype:
        """That of the output of linear layers."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.norm.weight.dtype


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of the weight; on a CPU half precision is computed in float32.

    PyTorch has no fused CPU kernel for it: with the gradient below, forward and backward take a quarter to 60 % of the time.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x.to(self.weight.dtype))  # the fused kernel needs one dtype
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, weight, self.eps).to(self.weight.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inv_rms = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)  # (..., 1)
        normed = x * inv_rms
        ctx.save_for_backward(normed, inv_rms, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inv_rms, weight = ctx.saved_tensors
        grad_normed = grad * normed
        along = (grad_normed @ weight)[..., None] / normed.shape[-1]  # (..., 1)
        # RMSNorm is scale-invariant: remove the component of the gradient along x.
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(inv_rms)
        grad_weight = grad_normed.reshape(-1, grad_normed.shape[-1]).sum(0)
        return grad_x, grad_weight, None


class Block(nn.Module):
    """Attention and feed-forward, each with a norm; with `untied` also those of image positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.post_norm = layer, config.post_norm
        norm = partial(RMSNorm, config.width, config.norm_eps)
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.image_attention = self.image_attention_norm = self.image_feed_forward = self.image_feed_forward_norm = None
        if config.untied == "full":
            self.image_attention, self.image_attention_norm = Attention(config), norm()
        if config.untied != "none":
            self.image_feed_forward, self.image_feed_forward_norm = FeedForward(config), norm()

    def forward(
        self, x: list[Tensor], routing: Routing, cos_sin: Tensor, mask: Mask | None, cache: Cache | None
    ) -> list[Tensor]:
        """Hidden states as `Routing` has them: (B * L, D) in one tensor or in two."""
        layers = routing.select(self.attention, self.image_attention)
        norms = routing.select(self.attention_norm, self.image_attention_norm)
        x = self._add(x, routing, norms, lambda x: self._attend(x, routing, layers, cos_sin, mask, cache))
        layers = routing.select(self.feed_forward, self.image_feed_forward)
        norms = routing.select(self.feed_forward_norm, self.image_feed_forward_norm)
        return self._add(x, routing, norms, lambda x: routing.apply(layers, x))

    def _add(self, x: list[Tensor], routing: Routing, norms: list[nn.Module], sublayer) -> list[Tensor]:
        """x + f(norm(x)), or with post-norm (Swin v2, Chameleon) x + norm(f(x)), which is on the branch."""
        x = routing.arrange(x, len(norms))
        added = routing.apply(norms, sublayer(x)) if self.post_norm else sublayer(routing.apply(norms, x))
        return [part + change for part, change in zip(x, added, strict=True)]

    def _attend(
        self, x: list[Tensor], routing: Routing, layers: list["Attention"], cos_sin: Tensor, mask: Mask | None,
        cache: Cache | None,
    ) -> list[Tensor]:  # fmt: skip
        """Attention of all positions to each other, whose queries, keys, values and outputs are those of their side."""
        B, L = cos_sin.shape[1:3]
        projected = zip(*(layer.project(part) for layer, part in zip(layers, x, strict=True)), strict=True)
        q, k, v = (routing.arrange([*parts], 1)[0].unflatten(0, (B, L)) for parts in projected)  # (B, L, H or Hkv, h)
        v = v.transpose(1, 2)  # (B, Hkv, L, h)
        q = apply_rotary_emb(q, cos_sin).transpose(1, 2).to(v.dtype)  # (B, H, L, h)
        k = apply_rotary_emb(k, cos_sin).transpose(1, 2).to(v.dtype)  # (B, Hkv, L, h)
        attended = mask.attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v, mask)  # (B, H, L, h)
        attended = attended.transpose(1, 2).reshape(B * L, -1)
        return routing.apply([layer.out for layer in layers], [attended])


class Attention(nn.Module):
    """The projections of attention. With fewer kv_heads than heads: grouped-query attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_size
        self.heads, self.kv_heads = config.heads, config.num_kv_heads
        self.query = nn.Linear(config.width, self.heads * self.head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, H, h), keys and values (n, Hkv, h) of hidden states (n, D), without positions."""
        q = self.q_norm(self.query(x).view(-1, self.heads, self.head_dim))
        k = self.k_norm(self.key(x).view(-1, self.kv_heads, self.head_dim))
        return q, k, self.value(x).view(-1, self.kv_heads, self.head_dim)


class FeedForward(nn.Module):
    """SwiGLU (2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward_size, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward_size, bias=False)
        self.down = nn.Linear(config.feed_forward_size, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary_positions(position_ids: Tensor, grid_offsets: Tensor | np.ndarray, config: ModelConfig) -> Tensor:
    """The positions by which queries and keys turn: `position_ids` (B, L), or with `image_rope` 2d positions by row and by
    column (B, L, 2), which differ from them by `grid_offsets` (B, L, 2) or (L, 2)."""
    if config.image_rope == "1d":
        return position_ids
    return position_ids[..., None] + torch.as_tensor(grid_offsets, device=position_ids.device)


def rope_cos_sin(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """The factors of `apply_rotary_emb`: `rotary_positions` -> (2, B, L, 1, h), equal for all layers and heads.

    Frequency i of h / 2 is theta^(-2i / h). With `image_rope` 2d the even ones turn by row and the odd ones by column, as in
    Pixtral (2410.07073): both have high and low frequencies, and where row = column the rotation is that of 1d.
    """
    even = torch.arange(0, config.head_size, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-even / config.head_size)  # (h / 2,)
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    axes = {"1d": 1, "2d": 2}[config.image_rope]
    positions = position_ids.view(*position_ids.shape[:2], 1, 1, axes).float()
    angles = (positions * frequencies.view(-1, axes)).flatten(-2)  # (B, L, 1, h / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between the two."""
    turns = scaling.original_length * frequencies / (2 * math.pi)  # in the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    weight = ((turns - low) / (high - low)).clamp(0, 1)  # of the unscaled frequency
    return frequencies * (weight + (1 - weight) / scaling.factor)


def apply_rotary_emb(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, L, H, h), rotate-half form (2104.09864): rotates the pairs (i, i + h / 2)."""
    cos, sin = cos_sin
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
