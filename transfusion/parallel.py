"""Where work is done: the device, the numbers it computes with, and the processes that share it."""

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the best there is: cuda, then mps, then cpu. ValueError when the named one is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def lower_precision(device: torch.device):
    """The context for forward passes: bfloat16 where the hardware is fast at it (CUDA), float32 elsewhere.

    Weights, losses and the optimizer stay in float32. On a CPU without bfloat16 units a step would be 20 times slower.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Ranks:
    """The processes that do one piece of work together: which of them this is, and a way to wait for the others."""

    rank: int = 0
    world: int = 1

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls):
        """Those that torchrun started, while it is open; this process alone, where it did not."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            yield cls()
            return
        threading.Thread(target=_end_with_parent, daemon=True).start()
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        try:
            yield cls(dist.get_rank(), world)
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all of them have come here. ConnectionError when one of them has stopped instead."""
        if self.world > 1:
            try:
                dist.barrier()
            except RuntimeError:
                raise ConnectionError("another process of this work has stopped; what it said tells why") from None


def _end_with_parent() -> None:
    """torchrun ends its processes when it ends; killed, it cannot, and they would wait for one another for days."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
