"""Keys and values already computed. One slot per branch of a row; a slot's length says how much of it counts."""

import torch
from torch import Tensor

from transfusion.config import ModelConfig

GROWTH = 64  # slots are lengthened by whole multiples of this


class Cache:
    """Slots of keys and values for all layers.

    A forward pass writes behind a slot's length and reads up to what it wrote; only `advance` makes that count. So a
    denoising step leaves no trace, and what was written in vain is overwritten by whatever comes next.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32):
        self.layers, self.shape = config.layers, (config.num_kv_heads, config.size_of_head)
        self.device, self.dtype = device, dtype
        self.keys = self._empty(0, 0)  # (layers, slots, Hkv, capacity, h)
        self.values = self._empty(0, 0)
        self.lengths: list[int] = []
        self.free: list[int] = []

    def acquire(self) -> int:
        """An empty slot."""
        if not self.free:
            slots, more = len(self.lengths), max(8, len(self.lengths))
            self._resize(slots + more, self.keys.shape[3])
            self.lengths += [0] * more
            self.free = list(range(slots, slots + more))
        slot = min(self.free)  # low slots first: neighbours are read without a copy
        self.free.remove(slot)
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def advance(self, slot: int, positions: int) -> None:
        """The first `positions` of what was last written to this slot now count; below 0: so many of its last no more."""
        self.lengths[slot] += positions

    def copy(self, source: int, target: int) -> None:
        """Make one slot hold what another does."""
        n = self.lengths[target] = self.lengths[source]
        self.keys[:, target, :, :n] = self.keys[:, source, :, :n]
        self.values[:, target, :, :n] = self.values[:, source, :, :n]

    def view(self, slots: list[int], new: int) -> "CacheView":
        """These slots, each with room for `new` positions behind its length: what a forward pass takes."""
        longest = max(self.lengths[slot] for slot in slots) + new
        if longest > self.keys.shape[3]:
            self._resize(len(self.lengths), -(-longest // GROWTH) * GROWTH)
        return CacheView(self, slots, new)

    def _empty(self, slots: int, capacity: int) -> Tensor:
        # Zeros: what lies behind a slot's length is masked, but zero times infinity would still be not-a-number.
        heads, size = self.shape
        return torch.zeros(self.layers, slots, heads, capacity, size, device=self.device, dtype=self.dtype)

    def _resize(self, slots: int, capacity: int) -> None:
        for name in ("keys", "values"):
            old, grown = getattr(self, name), self._empty(slots, capacity)
            grown[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, grown)


class CacheView:
    """Some slots of a cache during one forward pass."""

    def __init__(self, cache: Cache, slots: list[int], new: int):
        self.cache, device = cache, cache.device
        lengths = [cache.lengths[slot] for slot in slots]
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.reach = max(lengths) + new
        first = slots[0]
        neighbours = slots == list(range(first, first + len(slots)))
        self.rows = slice(first, first + len(slots)) if neighbours else torch.tensor(slots, device=device)
        self.one_length = lengths[0] if len(set(lengths)) == 1 else None
        self.slot = torch.tensor(slots, device=device)[:, None]  # (B, 1)
        self.place = self.lengths[:, None] + torch.arange(new, device=device)  # (B, new)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, new, h) behind each slot's length; all keys and values up to the longest, (B, Hkv, reach, h)."""
        found = []
        for store, fresh in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            if self.one_length is not None and isinstance(self.rows, slice):
                store[self.rows, :, self.one_length : self.reach] = fresh
            else:
                store[self.slot, :, self.place] = fresh.transpose(1, 2).to(store.dtype)
            found.append(store[self.rows, :, : self.reach].to(keys.dtype))
        return found[0], found[1]
