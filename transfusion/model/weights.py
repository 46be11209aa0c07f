"""Weights in a folder as others read them, safetensors and JSON alone: written, read."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transfusion.disk import OpenError, open_to_others, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of one file, at most


def write_weights(tensors: dict[str, Tensor], folder: Path, shard: int = SHARD) -> list[Path]:
    """model.safetensors, or so many shards of that size and their index: the files, all of them on the disk."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    files = []
    for name, held in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in held}, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        open_to_others(folder / name)
        files.append(folder / name)
    (folder / INDEX).unlink(missing_ok=True)  # of weights that lay there before
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        files.append(folder / INDEX)
    return files


class Weights:
    """The tensors of a folder by name, each read when it is asked for. OpenError when they are not there or not whole."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, {}
        if (folder / INDEX).exists():
            self._file_of = read_json(folder / INDEX).get("weight_map")
            if not isinstance(self._file_of, dict) or any(Path(str(n)).name != n for n in self._file_of.values()):
                raise OpenError(f"{folder / INDEX} does not say in which of its files each tensor lies")
        elif (folder / SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise OpenError(f"{folder} holds no weights: it has neither {SINGLE} nor {INDEX}")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        try:
            return self._of(name).get_tensor(name)
        except SafetensorError as error:
            raise OpenError(f"{self.folder / self._file_of[name]} does not hold {name}: {error}") from None

    def _of(self, name: str):
        return self._open(self._file_of[name])

    def _open(self, file: str):
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, "pt")
            except (OSError, SafetensorError) as error:
                raise OpenError(f"cannot read {self.folder / file}: {str(error).splitlines()[0]}") from None
        return self._files[file]


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill in all of a model's weights. OpenError when names or shapes are not those of the folder."""
    read_into(folder, model.state_dict(), "the model of its config.json")


@torch.no_grad()
def read_into(folder: Path, tensors: dict[str, Tensor], of: str) -> None:
    """Fill in these, which are all that a folder holds. OpenError when names or shapes differ from those `of` something."""
    held = Weights(folder)
    for name in sorted(held.names ^ tensors.keys()):
        wrong = "not one of its tensors" if name in held.names else "missing"
        raise OpenError(f"{folder} does not fit {of}: {name} is {wrong}")
    for name, tensor in tensors.items():
        if held.shape(name) != tuple(tensor.shape):
            raise OpenError(f"{folder} does not fit {of}: {name} is {held.shape(name)}, not {tuple(tensor.shape)}")
        tensor.copy_(held.read(name))
