"""The memory that a piece of code needs, counted by its tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all storages that are created inside it and not yet freed."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self.storages = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.current)
        return output

    def _add(self, storage):
        if self.storages.get(id(storage)) is not storage:
            self.storages[id(storage)] = storage
            self.current += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int):
        self.current -= size
