"""Weights that others trained, from a local file: safetensors, or a .pth of which nothing but tensors is read."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PICKLED = (".pt", ".pth", ".pth.tar")  # how the names of files end that torch.save wrote


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: of a .pth those at its top, or under `state_dict`. ValueError says what is wrong."""
    try:
        if not path.name.endswith(PICKLED):
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights in {path}: {str(error).splitlines()[0]}") from None
    except Exception:  # a damaged one raises whatever; torch's own words would advise to run what it holds
        raise ValueError(f"{path} holds more than tensors, or is damaged: nothing of it was run") from None
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    items = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def get_tensor(found: dict[str, Tensor], name: str, path: Path) -> Tensor:
    """One of the tensors of this file. ValueError when it is not there."""
    if name not in found:
        raise ValueError(f"{path} holds no {name}: it is not the network that is asked for")
    return found[name]


def load_frozen(network: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network with these weights, for use alone. ValueError when one has another shape."""
    try:
        network.load_state_dict({**network.state_dict(), **state})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)
