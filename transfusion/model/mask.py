"""The attention mask: intervals of keys per query. No other file depends on this form.

Query i attends to keys lo[i] <= k < hi[i]: lo is the start of its document, hi = max(i + 1, the end of its image)
(section 3, figure 4). In a noisy copy of an image hi is the first patch of the clean image, and a second interval is the
copy itself. Copies stand behind their document, so nothing else attends to them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.model.attention import attention

BLOCK_SIZE = 128  # queries and keys of one block of FlexAttention's BlockMask
MAX_PLAIN_KEYS = 512  # of plain products, which keep all probabilities: of longer rows they would be most of the memory


class Interval(NamedTuple):
    """Keys lo <= k < hi of each query; none if hi <= lo."""

    lo: Tensor  # (B, Lq) int32
    hi: Tensor  # (B, Lq) int32


@dataclass(eq=False)
class Mask:
    """The keys of each query, and attention under this mask. Create it with `packed_mask` or `cached_mask`."""

    intervals: tuple[Interval, ...]  # one, or two with noisy copies; those of a query have no key in common
    num_keys: int  # Lk

    @property
    def device(self) -> torch.device:
        return self.intervals[0].lo.device

    @property
    def uses_flex(self) -> bool:
        """FlexAttention on CUDA if Lq = Lk is a multiple of BLOCK_SIZE, else SDPA. FlexAttention cannot train on a CPU; SDPA
        with a mask has no fast kernel on CUDA."""
        num_queries = self.intervals[0].lo.shape[1]
        return self.device.type == "cuda" and num_queries == self.num_keys and self.num_keys % BLOCK_SIZE == 0

    @cached_property
    def uses_plain_products(self) -> bool:
        """`attention` instead of SDPA: short rows on a CPU where float32 products go to oneDNN (see `parallel`). SDPA takes
        three to four times as long there."""
        goes_to_onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        return goes_to_onednn and self.device.type == "cpu" and self.num_keys <= MAX_PLAIN_KEYS

    def prepare(self, dtype: torch.dtype = torch.float32) -> None:
        """Decide the kernel and build the mask of `attend` once for all layers, for queries of this dtype, and compile
        flex_attention before any compiled block runs. First traced from inside a compiled block, dynamo inlines the eager
        version, which materialises the L x L scores."""
        if self.uses_flex:
            _compiled_flex()
            _ = self.block_mask
        else:
            _, self.attn_bias = self.uses_plain_products, self.attn_bias.to(dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, Lq, h), k and v (B, Hkv, Lk, h) -> (B, H, Lq, h)."""
        if self.uses_flex:
            return _compiled_flex()(q, k, v, block_mask=self.block_mask, enable_gqa=k.shape[1] != q.shape[1])
        if self.uses_plain_products and q.dtype == torch.float32:
            return attention(q, k, v, self.attn_bias)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.attn_bias.to(q.dtype), enable_gqa=k.shape[1] != q.shape[1]
        )

    @cached_property
    def dense(self) -> Tensor:
        """(B, 1, Lq, Lk) bool: may this query attend to this key?"""
        k = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        (lo, hi), *second = self.intervals
        dense = (k >= lo[..., None]).logical_and_(k < hi[..., None])  # (B, Lq, Lk)
        for lo, hi in second:  # of few queries
            b, q = (hi > lo).nonzero(as_tuple=True)
            dense[b, q] |= (k >= lo[b, q, None]) & (k < hi[b, q, None])
        return dense[:, None]

    @cached_property
    def attn_bias(self) -> Tensor:
        """(B, 1, Lq, Lk) float32, 0 or -inf: additive bias for SDPA, built once for all layers. `prepare` casts it."""
        return torch.zeros(self.dense.shape, device=self.device).masked_fill_(~self.dense, -torch.inf)

    @cached_property
    def block_mask(self):
        """FlexAttention's BlockMask, built from the intervals without an (L, L) mask. Lq = Lk, a multiple of BLOCK_SIZE."""
        from torch.nn.attention.flex_attention import BlockMask, or_masks

        def inside(lo: Tensor, hi: Tensor):
            return lambda b, h, q, k: (k >= lo[b, q]) & (k < hi[b, q])

        any_pair, all_pairs = self._blocks_with_pairs()
        mask_mod, *second = (inside(*interval) for interval in self.intervals)
        return BlockMask.from_kv_blocks(
            *_block_indices(any_pair & ~all_pairs), *_block_indices(all_pairs), BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=or_masks(mask_mod, *second) if second else mask_mod, seq_lengths=(self.num_keys, self.num_keys),
        )  # fmt: skip

    def _blocks_with_pairs(self) -> tuple[Tensor, Tensor]:
        """(B, n, n) bool, query block by key block: has it an unmasked pair, and are all of its pairs unmasked?"""
        B, L = self.intervals[0].lo.shape
        n = L // BLOCK_SIZE
        begin = torch.arange(n, device=self.device) * BLOCK_SIZE  # (n,) first key of each block
        changes = torch.zeros(B, n, n + 1, dtype=torch.int32, device=self.device)  # of the number of queries with a pair
        all_pairs = torch.zeros(B, n, n, dtype=torch.bool, device=self.device)
        for lo, hi in self.intervals:
            lo, hi = lo.view(B, n, BLOCK_SIZE), hi.view(B, n, BLOCK_SIZE)
            has_keys = (hi > lo).int()
            changes.scatter_add_(2, (lo // BLOCK_SIZE).long(), has_keys)
            changes.scatter_add_(2, ((hi + BLOCK_SIZE - 1) // BLOCK_SIZE).long(), -has_keys)
            # No key block is full by the first interval of some queries and by the second of others.
            all_pairs |= (lo.amax(2)[..., None] <= begin) & (hi.amin(2)[..., None] >= begin + BLOCK_SIZE)
        return changes.cumsum(2)[..., :n] > 0, all_pairs

    def count_pairs(self, queries: Tensor) -> int:
        """Number of unmasked query-key pairs of these queries (B, Lq) bool: the cost of attention."""
        return sum(int(((hi - lo) * queries).sum()) for lo, hi in self.intervals)


def packed_mask(
    document_ids: Tensor, image_ids: Tensor, image_attention: str = "bidirectional", clean_starts: Tensor | None = None
) -> Mask:
    """The mask of packed rows, from the document and image (negative: not in an image) of each position, both (B, L).
    `clean_starts` (B, L): in a noisy copy the first position of the clean image, else negative; None: no copies."""
    B, L = document_ids.shape
    i = torch.arange(L, device=document_ids.device, dtype=torch.int32).expand(B, L)
    lo = torch.where(_changes(document_ids), i, 0).cummax(1).values
    hi = i + 1
    if image_attention == "bidirectional":
        last = _changes(image_ids.flip(1)).flip(1)  # (B, L) the last position of each image
        end = torch.where(last, i + 1, L).flip(1).cummin(1).values.flip(1)
        hi = torch.where(image_ids >= 0, end, hi)
    if clean_starts is None:
        return Mask((Interval(lo.int(), hi.int()),), L)
    is_copy = clean_starts >= 0
    copy_lo = torch.where(_changes(image_ids), i, 0).cummax(1).values * is_copy
    before = Interval(lo.int(), torch.where(is_copy, clean_starts, hi).int())
    return Mask((before, Interval(copy_lo.int(), (hi * is_copy).int())), L)


def cached_mask(lengths: Tensor, new: int, image_ids: Tensor | None = None, image_attention: str = "bidirectional") -> Mask:
    """The mask of `new` positions per row after `lengths` (B,) cached ones; `image_ids` (B, new) as in `packed_mask`. A row
    is one document, and its key 0 is the start of the document. Keys after the end of a shorter row are masked."""
    i = torch.arange(new, device=lengths.device, dtype=torch.int32)
    if image_ids is None:
        hi = i.expand(len(lengths), new) + 1
    else:
        hi = packed_mask(torch.zeros_like(image_ids), image_ids, image_attention).intervals[0].hi
    hi = hi + lengths[:, None].int()
    return Mask((Interval(torch.zeros_like(hi), hi),), int(lengths.max()) + new)


def _changes(ids: Tensor) -> Tensor:
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat([first, ids[:, 1:] != ids[:, :-1]], 1)  # (B, L)


def _block_indices(is_selected: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, n) bool -> for each query block: the number of selected key blocks (B, 1, n); all, these first (B, 1, n, n)."""
    order = is_selected.int().argsort(dim=-1, descending=True, stable=True)
    return is_selected.sum(-1).int()[:, None], order.int()[:, None]


_flex = None


def _compiled_flex():
    """flex_attention, compiled once per process: several compiled instances are slower."""
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex
