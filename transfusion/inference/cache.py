"""Key-value cache for inference: one slot per guidance branch of a sequence."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.config import ModelConfig
from transfusion.model.mask import Mask

GROWTH = 64  # the capacity of slots grows in multiples of this
MAX_RUNS = 4  # of rows that attend without a mask, in as many calls: more calls take longer than a mask


class Cache:
    """Slots of keys and values for all layers.

    A forward pass writes after the committed length of a slot, and reads all positions up to the last one written. Only
    `commit` changes the length. Uncommitted entries, for example of a denoising step, are overwritten by the next pass.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32):
        self.layers, self.shape = config.layers, (config.num_kv_heads, config.head_size)
        self.device, self.dtype = device, dtype
        self.keys = self._allocate(0, 0)  # (layers, slots, Hkv, capacity, h)
        self.values = self._allocate(0, 0)
        self.lengths: list[int] = []
        self.free: list[int] = []

    def acquire(self) -> int:
        """An empty slot."""
        if not self.free:
            slots, more = len(self.lengths), max(8, len(self.lengths))
            self._resize(slots + more, self.keys.shape[3])
            self.lengths += [0] * more
            self.free = list(range(slots, slots + more))
        slot = min(self.free)  # low slots first: adjacent slots are read without a copy
        self.free.remove(slot)
        self.lengths[slot] = 0
        with torch.inference_mode():  # it was written in this mode
            for store in (self.keys, self.values):  # a sequence that failed may have left NaN, see `_allocate`
                store[:, slot] = 0
        return slot

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def commit(self, slot: int, positions: int) -> None:
        """Commit the first `positions` of the entries just written."""
        self.lengths[slot] += positions

    def truncate(self, slot: int, positions: int) -> None:
        """Remove the last `positions` of the committed entries."""
        self.lengths[slot] -= positions

    def fork(self, slot: int) -> int:
        """A new slot with the same content."""
        return self.acquire_with(*self.content(slot))

    def content(self, slot: int) -> tuple[Tensor, Tensor]:
        """The committed keys and values of a slot, (layers, Hkv, n, h) each."""
        return self.keys[:, slot, :, : self.lengths[slot]], self.values[:, slot, :, : self.lengths[slot]]

    def acquire_with(self, keys: Tensor, values: Tensor) -> int:
        """A new slot with the content that another one had."""
        slot, n = self.acquire(), keys.shape[2]
        self.keys[:, slot, :, :n], self.values[:, slot, :, :n] = keys, values
        self.lengths[slot] = n
        return slot

    def view(self, slots: list[int], new: int) -> "CacheView":
        """Returns the cache argument of a forward pass: these slots, each with room for `new` positions after its length."""
        longest = max(self.lengths[slot] for slot in slots) + new
        if longest > self.keys.shape[3]:
            self._resize(len(self.lengths), -(-longest // GROWTH) * GROWTH)
        return CacheView(self, slots, new)

    def _allocate(self, slots: int, capacity: int) -> Tensor:
        # Zeros, not uninitialised memory: masked entries have weight zero, but zero times infinity is NaN.
        heads, size = self.shape
        return torch.zeros(self.layers, slots, heads, capacity, size, device=self.device, dtype=self.dtype)

    def _resize(self, slots: int, capacity: int) -> None:
        for name in ("keys", "values"):
            old, new = getattr(self, name), self._allocate(slots, capacity)
            new[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, new)


class Run(NamedTuple):
    """Consecutive rows of a forward pass whose slots are adjacent and have equal lengths: slices, which need no copies."""

    rows: slice
    slots: slice
    length: int


class CacheView:
    """Some slots of a cache during one forward pass of `new` positions."""

    def __init__(self, cache: Cache, slots: list[int], new: int):
        self.cache, self.new, device = cache, new, cache.device
        lengths = [cache.lengths[slot] for slot in slots]
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.end = max(lengths) + new
        self.slots = torch.tensor(slots, device=device)[:, None]  # (B, 1)
        self.position_ids = self.lengths[:, None] + torch.arange(new, device=device)  # (B, new)
        self.runs = list(_find_runs(slots, lengths))
        adjacent = slots == list(range(slots[0], slots[0] + len(slots)))
        self.rows = slice(slots[0], slots[0] + len(slots)) if adjacent else self.slots[:, 0]

    @property
    def needs_no_mask(self) -> bool:
        """If every query attends to all keys of its row: are there few enough runs for one attention call each?"""
        return len(self.runs) <= MAX_RUNS

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """Attention of new queries q (B, H, new, h) to the keys of their slots, after writing the new ones, k and v
        (B, Hkv, new, h): under a mask, or to all of them."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if mask is not None:
            return mask.attend(q, self._extend(keys, k), self._extend(values, v))
        attended = []
        for rows, slots, length in self.runs:
            end = length + self.new
            keys[slots, :, length:end], values[slots, :, length:end] = k[rows], v[rows]
            run_keys, run_values = keys[slots, :, :end].to(q.dtype), values[slots, :, :end].to(q.dtype)
            attended.append(
                F.scaled_dot_product_attention(q[rows], run_keys, run_values, enable_gqa=k.shape[1] != q.shape[1])
            )
        return torch.cat(attended)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        """Write (B, Hkv, new, h) after each slot's length. Returns the entries up to the longest, (B, Hkv, end, h)."""
        store[self.slots, :, self.position_ids] = new.transpose(1, 2).to(store.dtype)
        return store[self.rows, :, : self.end].to(new.dtype)


def _find_runs(slots: list[int], lengths: list[int]) -> Iterator[Run]:
    first = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[row - 1] + 1 or lengths[row] != lengths[first]:
            yield Run(slice(first, row), slice(slots[first], slots[first] + row - first), lengths[first])
            first = row
