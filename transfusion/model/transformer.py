"""The Llama block: RMSNorm, rotary attention, SwiGLU. Text and patches share every weight of it (section 3)."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion.config import ModelConfig, RopeScaling
from transfusion.model.mask import Mask


class Cache(Protocol):
    """Keys and values of earlier positions, for inference."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, Hkv, Lq, h) -> those of all positions so far (B, Hkv, Lk, h)."""


class Transformer(nn.Module):
    """(B, L, D) -> (B, L, D), normalised at the end."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.activation_checkpointing = (
            False  # in training: keep what goes into each block, and run it again in the backward pass
        )

    def forward(self, x: Tensor, position_ids: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        cos_sin = rope_cos_sin(position_ids, self.config, torch.promote_types(x.dtype, torch.float32))
        mask.prepare()
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos_sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos_sin, mask, cache)
        return self.norm(x)


class RMSNorm(nn.RMSNorm):
    """RMSNorm. PyTorch has no fused kernel for it on a CPU, so there its gradient is written out: four times as fast."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, self.weight, self.eps)
        return super().forward(x.to(self.weight.dtype))  # of two precisions there is no fused kernel


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        shrink = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        normal = x * shrink
        ctx.save_for_backward(normal, shrink, weight)
        return normal * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, shrink, weight = ctx.saved_tensors
        product = gradient * normal
        along = (product @ weight)[..., None] / normal.shape[-1]  # what only stretches x is lost
        inward = torch.addcmul(gradient * weight, normal, along, value=-1) * shrink
        return inward, product.reshape(-1, product.shape[-1]).sum(0), None


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.post_norm = config.post_norm

    def forward(self, x: Tensor, cos_sin: Tensor, mask: Mask, cache: Cache | None) -> Tensor:
        if self.post_norm:  # Swin's order: the residual stream is never scaled, what is added to it always is
            x = x + self.attention_norm(self.attention(x, cos_sin, mask, cache))
            return x + self.feed_forward_norm(self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), cos_sin, mask, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Attention(nn.Module):
    """Rotary attention under a mask; fewer keys and values than queries when kv_heads says so."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.size = layer, config.head_size
        self.heads, self.kv_heads = config.heads, config.num_kv_heads
        self.query = nn.Linear(config.width, self.heads * self.size, bias=False)
        self.key = nn.Linear(config.width, self.kv_heads * self.size, bias=False)
        self.value = nn.Linear(config.width, self.kv_heads * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, config.width, bias=False)
        self.q_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos_sin: Tensor, mask: Mask, cache: Cache | None) -> Tensor:
        B, L, _ = x.shape
        v = self.value(x).view(B, L, self.kv_heads, self.size).transpose(1, 2)  # (B, Hkv, L, h)
        q = (
            apply_rotary_emb(self.q_norm(self.query(x).view(B, L, self.heads, self.size)), cos_sin)
            .transpose(1, 2)
            .to(v.dtype)
        )
        k = (
            apply_rotary_emb(self.k_norm(self.key(x).view(B, L, self.kv_heads, self.size)), cos_sin)
            .transpose(1, 2)
            .to(v.dtype)
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(mask.attend(q, k, v).transpose(1, 2).reshape(B, L, -1))  # (B, L, D)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward_size, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward_size, bias=False)
        self.down = nn.Linear(config.feed_forward_size, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rope_cos_sin(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """What `rotate` multiplies by at each position (B, L) -> (2, B, L, 1, h), the same for all layers and heads."""
    half = torch.arange(0, config.head_size, 2, device=position_ids.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-half / config.head_size)  # (h / 2,)
    if config.rope_scaling is not None:
        frequency = scale_frequencies(frequency, config.rope_scaling)
    angle = position_ids[:, :, None, None].float() * frequency  # (B, L, 1, h / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def scale_frequencies(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3: slow frequencies are divided by `factor`, fast ones kept, those between are blended."""
    turns = scaling.original_length * frequency / (2 * math.pi)  # in the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def apply_rotary_emb(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate-half rotary positions on (B, L, H, h): each number turns with the one half a head away."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
