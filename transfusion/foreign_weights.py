"""Reads weights of other projects from a local file: safetensors, or a .pth from which only tensors are loaded."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PICKLED = (".pt", ".pth", ".pth.tar")  # suffixes of files that torch.save wrote


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; of a .pth those at the top level or under `state_dict`. ValueError says what failed."""
    try:
        if not path.name.endswith(PICKLED):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights in {path}: {str(error).splitlines()[0]}") from None
    except Exception:  # damaged files raise many types; torch's own message recommends weights_only=False
        raise ValueError(f"{path} is damaged or holds other objects than tensors: no code in it was executed") from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def get_tensor(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    """The named tensor of the file `path`. ValueError when it is missing."""
    if name not in tensors:
        raise ValueError(f"{path} has no tensor {name}: it holds the weights of another network")
    return tensors[name]


def load_frozen(network: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network with these weights, in eval mode and without gradients. ValueError when a shape differs."""
    try:
        network.load_state_dict({**network.state_dict(), **state})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)
