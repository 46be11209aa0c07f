"""Weights in a folder, in the layout of `transformers`: safetensors, and a JSON index when there are several files."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transfusion.disk import OpenError, open_to_others, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # of one file


def write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Write model.safetensors, or shards of at most `max_shard_bytes` and their index. The paths, all fsynced."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    paths = []
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        open_to_others(folder / name)
        paths.append(folder / name)
    (folder / (SINGLE if split.is_sharded else INDEX)).unlink(missing_ok=True)  # from earlier weights in this folder
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        paths.append(folder / INDEX)
    return paths


class Weights:
    """The tensors of a folder by name; each is read on request. As in `transformers`, the single file is preferred to the
    index of several. OpenError when one is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, {}
        if (folder / SINGLE).exists():
            self._file_names = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (folder / INDEX).exists():
            self._file_names = read_json(folder / INDEX).get("weight_map")
            names = self._file_names.values() if isinstance(self._file_names, dict) else [None]
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise OpenError(f"{folder / INDEX} has no valid weight_map from tensor names to files")
        else:
            raise OpenError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} exists")

    @property
    def names(self) -> set[str]:
        return set(self._file_names)

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted({*self._file_names.values()})]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def _file(self, name: str):
        """The open file of a tensor. OpenError when the index names a file that lacks it."""
        file = self._open(self._file_names[name])
        if name not in set(file.keys()):
            raise OpenError(f"{self.folder / self._file_names[name]} has no tensor {name}, which {INDEX} names")
        return file

    def _open(self, file_name: str):
        if file_name not in self._files:
            try:
                self._files[file_name] = safe_open(self.folder / file_name, "pt")
            except (OSError, SafetensorError) as error:
                raise OpenError(f"cannot read {self.folder / file_name}: {str(error).splitlines()[0]}") from None
        return self._files[file_name]


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load all weights of a model. OpenError when names or shapes differ."""
    read_into(folder, model.state_dict(), "the model of its config.json")


@torch.no_grad()
def read_into(folder: Path, tensors: dict[str, Tensor], owner: str) -> None:
    """Read all tensors of a folder into these. OpenError, which names their `owner`, when names or shapes differ."""
    weights = Weights(folder)
    for name in sorted(weights.names ^ tensors.keys()):
        problem = "unexpected" if name in weights.names else "missing"
        raise OpenError(f"{folder} does not fit {owner}: {name} is {problem}")
    for name, tensor in tensors.items():
        shape, expected = weights.shape(name), tuple(tensor.shape)
        if shape != expected:
            raise OpenError(f"{folder} does not fit {owner}: {name} has shape {shape}, not {expected}")
        tensor.copy_(weights.read(name))
