"""Who may attend to whom. The whole rule is one interval of keys per query; only this file knows that.

A query sees the keys of its own document up to itself, and all of its own image (section 3, figure 4): row i sees
keys lo[i] <= k < hi[i], with lo the start of its document and hi = max(i + 1, the end of its image).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # of FlexAttention


@dataclass(eq=False)
class Mask:
    """What every query may see, and the attention under it. Build one with a function below."""

    lo: Tensor  # (B, Lq) int32
    hi: Tensor  # (B, Lq) int32
    keys: int

    @property
    def flex(self) -> bool:
        """Is it FlexAttention's? On CUDA, for whole rows of whole blocks; else it is SDPA's.

        (FlexAttention cannot train on a CPU; SDPA with a mask has no fast kernel on CUDA.)
        """
        return self.lo.device.type == "cuda" and self.lo.shape[1] == self.keys and self.keys % BLOCK == 0

    def prepare(self) -> None:
        """Make what `attend` needs, once for all layers, and before they are compiled: a compiler that traces
        `torch.compile` leaves it out, and a plain FlexAttention would be remembered that holds all pairs in memory.
        """
        if self.flex:
            _compiled_flex()
        _ = self.blocks if self.flex else self.attn_bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, Lq, h), k and v (B, Hkv, Lk, h) -> (B, H, Lq, h)."""
        if self.flex:
            return _compiled_flex()(q, k, v, block_mask=self.blocks, enable_gqa=k.shape[1] != q.shape[1])
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.attn_bias.to(q.dtype), enable_gqa=k.shape[1] != q.shape[1]
        )

    @cached_property
    def dense(self) -> Tensor:
        """(B, 1, Lq, Lk) bool."""
        k = torch.arange(self.keys, device=self.lo.device)
        return ((k >= self.lo[..., None]) & (k < self.hi[..., None]))[:, None]

    @cached_property
    def attn_bias(self) -> Tensor:
        """(B, 1, Lq, Lk) float32, 0 or minus infinity: what SDPA would make of `dense` in every layer anew."""
        return torch.zeros(self.dense.shape, device=self.lo.device).masked_fill_(~self.dense, -torch.inf)

    @cached_property
    def blocks(self):
        """FlexAttention's BlockMask, straight from the intervals: no (L, L) mask is ever made. Lq = Lk, whole blocks."""
        from torch.nn.attention.flex_attention import BlockMask

        B, L = self.lo.shape
        n = L // BLOCK
        lo, hi = self.lo.view(B, n, BLOCK), self.hi.view(B, n, BLOCK)
        begin = torch.arange(n, device=lo.device)[None, None, None] * BLOCK  # (1, 1, 1, n) first key of each block
        some = ((lo[..., None] < begin + BLOCK) & (hi[..., None] > begin)).any(2)  # (B, n, n)
        full = ((lo[..., None] <= begin) & (hi[..., None] >= begin + BLOCK)).all(2)  # (B, n, n)
        flat_lo, flat_hi = self.lo, self.hi

        def may_see(b, h, q, k):
            return (k >= flat_lo[b, q]) & (k < flat_hi[b, q])

        return BlockMask.from_kv_blocks(
            *_list(some & ~full), *_list(full), BLOCK_SIZE=BLOCK, mask_mod=may_see, seq_lengths=(L, L)
        )

    def count_pairs(self, real: Tensor) -> int:
        """How many query-key pairs there are among real queries (B, Lq) bool: what attention costs, padding aside."""
        return int(((self.hi - self.lo) * real).sum())


def packed_mask(document_ids: Tensor, image_ids: Tensor, image_attention: str = "bidirectional") -> Mask:
    """The mask of packed rows: which document and which image (negative: none) each position belongs to, both (B, L)."""
    B, L = document_ids.shape
    i = torch.arange(L, device=document_ids.device, dtype=torch.int32).expand(B, L)
    lo = torch.where(_changes(document_ids), i, 0).cummax(1).values
    hi = i + 1
    if image_attention == "bidirectional":
        last = _changes(image_ids.flip(1)).flip(1)  # the last position of each run of one image
        end = torch.where(last, i + 1, L).flip(1).cummin(1).values.flip(1)
        hi = torch.where(image_ids >= 0, end, hi)
    return Mask(lo.int(), hi.int(), L)


def cached_mask(lengths: Tensor, new: int, image_ids: Tensor | None = None, image_attention: str = "bidirectional") -> Mask:
    """The mask of `new` positions per row after `lengths` (B,) cached ones; `image` (B, new) as in `packed`.

    Keys are counted from the start of each row's document; what lies beyond a row's own end is never seen.
    """
    i = torch.arange(new, device=lengths.device, dtype=torch.int32)
    if image_ids is None:
        hi = i.expand(len(lengths), new) + 1
    else:
        hi = packed_mask(torch.zeros_like(image_ids), image_ids, image_attention).hi
    hi = hi + lengths[:, None].int()
    return Mask(torch.zeros_like(hi), hi, int(lengths.max()) + new)


def _changes(run: Tensor) -> Tensor:
    first = torch.ones_like(run[:, :1], dtype=torch.bool)
    return torch.cat([first, run[:, 1:] != run[:, :-1]], 1)  # (B, L)


def _list(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, n) bool -> how many key blocks each query block has (B, 1, n), and which, those first (B, 1, n, n)."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[:, None], order.int()[:, None]


_flex = None


def _compiled_flex():
    """One compiled instance for the whole process: several are slower."""
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex
