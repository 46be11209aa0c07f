"""Attention as plain batched matrix products, with a written backward pass, for short rows in training on a CPU."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(h) + attn_bias) v: q (B, H, Lq, h), k and v (B, Hkv, Lk, h), attn_bias (B, 1, Lq, Lk) without
    gradient -> (B, H, Lq, h). Each query needs a key. Equal to SDPA up to rounding; it keeps the
    (B, H, Lq, Lk) probabilities for the backward pass.

    SDPA's CPU kernel works on blocks of a few positions. Products of this size are slow in oneDNN; here each is one call.
    """
    return _Attention.apply(q, k, v, attn_bias)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor) -> Tensor:
        B, H, Lq, h = q.shape
        Hkv = k.shape[1]
        q = (q * h**-0.5).reshape(B * Hkv, -1, h)  # (B * Hkv, H / Hkv * Lq, h): heads that share keys are one product
        k, v = (x.reshape(B * Hkv, -1, h) for x in (k, v))  # (B * Hkv, Lk, h)
        scores = torch.bmm(q, k.mT)
        scores.view(B, H, Lq, -1).add_(attn_bias)
        probabilities = scores.softmax(-1)  # (B * Hkv, H / Hkv * Lq, Lk)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.heads = H, Hkv
        return torch.bmm(probabilities, v).view(B, H, Lq, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        (B, *_, h), (H, Hkv) = grad.shape, ctx.heads
        grad = grad.reshape(q.shape)
        grad_v = torch.bmm(probabilities.mT, grad)
        grad_probabilities = torch.bmm(grad, v.mT)
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(h**-0.5)
        grad_k = torch.bmm(grad_scores.mT, q)  # q is already scaled
        return grad_q.view(B, H, -1, h), grad_k.view(B, Hkv, -1, h), grad_v.view(B, Hkv, -1, h), None
