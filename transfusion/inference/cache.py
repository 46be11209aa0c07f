"""Key-value cache for inference: one slot per guidance branch of a sequence."""

import torch
from torch import Tensor

from transfusion.config import ModelConfig

GROWTH = 64  # the capacity of slots grows in multiples of this


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
        copy, n = self.acquire(), self.lengths[slot]
        self.lengths[copy] = n
        self.keys[:, copy, :, :n] = self.keys[:, slot, :, :n]
        self.values[:, copy, :, :n] = self.values[:, slot, :, :n]
        return copy

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


class CacheView:
    """Some slots of a cache during one forward pass of `new` positions."""

    def __init__(self, cache: Cache, slots: list[int], new: int):
        self.cache, device = cache, cache.device
        lengths = [cache.lengths[slot] for slot in slots]
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.end = max(lengths) + new
        self.slots = torch.tensor(slots, device=device)[:, None]  # (B, 1)
        self.position_ids = self.lengths[:, None] + torch.arange(new, device=device)  # (B, new)
        # Adjacent slots are a slice, and slots of one length take one slice of positions: no copies.
        adjacent = slots == list(range(slots[0], slots[0] + len(slots)))
        self.rows = slice(slots[0], slots[0] + len(slots)) if adjacent else self.slots[:, 0]
        self.start = lengths[0] if adjacent and len(set(lengths)) == 1 else None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, new, h) after each slot's length. Returns keys and values up to the longest, (B, Hkv, end, h)."""
        return self._extend(self.cache.keys[layer], keys), self._extend(self.cache.values[layer], values)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        if self.start is not None:
            store[self.rows, :, self.start : self.end] = new
        else:
            store[self.slots, :, self.position_ids] = new.transpose(1, 2).to(store.dtype)
        return store[self.rows, :, : self.end].to(new.dtype)
