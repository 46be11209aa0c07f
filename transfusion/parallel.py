"""Where a run computes: the device, and the numbers it computes with."""

import contextlib

import torch


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
