"""A run on disk, written: run.json with what it needs to be used, and checkpoints that are whole or not there."""

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transfusion.codecs.codec import Codec, codec_to_bytes
from transfusion.codecs.text import Tokenizer
from transfusion.config import Run, to_json
from transfusion.disk import RUN, sha256_of, write_json, write_whole
from transfusion.model.weights import SINGLE
from transfusion.parallel import Ranks
from transfusion.sequence import Vocabulary

FORMAT = 2  # of a run's folder; another number is refused
T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def create_run_folder(
    folder: Path, run: Run, tokenizer: Tokenizer, codec: Codec, vocabulary: Vocabulary, notes: dict
) -> None:
    """Write all that a run needs besides weights: run.json, tokenizer.json, codec.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = codec_to_bytes(codec)
    text = tokenizer.to_json()
    values = {
        "format": FORMAT,
        "run": to_json(run),
        "vocabulary": vocabulary.to_json(),
        "config_sha256": hash_config(to_json(run), vocabulary.to_json()),
        "codec": {"kind": codec.kind, "sha256": hashlib.sha256(encoded).hexdigest()},
        "tokenizer": {"sha256": hashlib.sha256(text.encode()).hexdigest()},
        "versions": versions(),
        "notes": notes,
    }  # fmt: skip
    write_whole(folder / "codec.safetensors", encoded)
    write_whole(folder / "tokenizer.json", text.encode())
    write_json(folder / RUN, values)


def versions() -> dict[str, str]:
    """Of what writes it."""
    return {"transfusion": version("open-transfusion"), "torch": torch.__version__, "python": platform.python_version()}


def hash_config(run: dict, vocabulary: dict) -> str:
    """The SHA-256 of all that the weights mean nothing without; what may be edited by hand (generation, say) is left out.

    Of what run.json says, not of what is made of it: a field that a later version adds changes no earlier run.
    """
    parts = [run.get("model"), run.get("diffusion"), vocabulary]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Saver:
    """Writes a run's checkpoints while it goes on. Leave its `with` and the last one is written.

    `save` copies what it is given and returns; a thread writes the copy aside, each rank its own part, and rank 0 puts it in
    place. SaveError comes out of the next `save`, `finish` or the `with`: then nothing of that checkpoint is left, and
    earlier ones are whole.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep_checkpoints, self.ranks = folder, keep, ranks
        self.thread, self.writing = ThreadPoolExecutor(1), None
        self.group = ranks.background  # made here, by all ranks at once

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.finish()
        except SaveError:
            if kind is None:  # else what went wrong first is told
                raise
        finally:
            self.thread.shutdown()

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Take a checkpoint of this moment, checkpoints/step-NNNNNN; of those that are there the newest `keep` stay."""
        self.finish()
        staged = {part: {name: _staged(value) for name, value in values.items()} for part, values in tensors.items()}
        self.writing = self.thread.submit(self._write, step, staged, json.dumps(state, indent=2))

    def finish(self) -> None:
        """Wait until what was begun is written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: str) -> None:
        place = self.folder / "checkpoints"
        final = place / f"step-{step:06d}"
        aside = final.with_suffix(".tmp")
        try:
            self._agree(lambda: self._begin(aside))
            for part, values in tensors.items():
                self._write_part(aside / part, values)
            files = sorted(path for path in aside.rglob("*.safetensors"))[self.ranks.rank :: self.ranks.world]
            digests = self._agree(lambda: {path.relative_to(aside).as_posix(): fsync_and_hash(path) for path in files})
            self._agree(lambda: self._put_in_place(aside, final, state, dict(ChainMap(*digests))))
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # RuntimeError: a rank that is gone
            if self.ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            why = f"could not save step {step} in {place}: {_reason(error)}; earlier checkpoints are whole"
            raise SaveError(why) from None

    def _write_part(self, folder: Path, values: dict[str, Tensor]) -> None:
        """One process: a safetensors file like any other. Several: each rank the shards that it holds, by torch's DCP."""
        if self.group is None:
            folder.mkdir()
            (folder / SINGLE).write_bytes(to_safetensors({name: value.contiguous() for name, value in values.items()}))
            return
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with warnings.catch_warnings(action="ignore"):
                writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
                dcp.save(values, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:  # a BaseException
            raise OSError(_reason(next(iter(error.failures.values()))[0])) from None

    def _agree(self, do: Callable[[], T]) -> list[T]:
        """What each rank's `do` gives, on all of them; when one fails all of them do."""
        try:
            done, failed = do(), None
        except OSError as error:
            done, failed = None, _reason(error)
        if self.group is None:
            found = [(done, failed)]
        else:
            found = [None] * self.ranks.world
            dist.all_gather_object(found, (done, failed), group=self.group)
        for _, failed in found:
            if failed is not None:
                raise OSError(failed)
        return [done for done, _ in found]

    def _begin(self, aside: Path) -> None:
        if self.ranks.is_main:
            for left in aside.parent.glob("step-*.tmp"):  # by saves that were killed
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)

    def _put_in_place(self, aside: Path, final: Path, state: str, digests: dict[str, str]) -> None:
        if not self.ranks.is_main:
            return
        (aside / "state.json").write_text(state + "\n")
        digests |= {"state.json": fsync_and_hash(aside / "state.json")}
        (aside / "manifest.json").write_text(json.dumps(digests, indent=2) + "\n")
        fsync_and_hash(aside / "manifest.json")
        before = final.with_suffix(".old")  # this step, saved once already
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        try:
            aside.rename(final)
            write_whole(final.parent / "latest", final.name.encode())
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            if before.exists():
                before.rename(final)
            raise
        others = [path for path in list_checkpoints(self.folder) if path != final]
        for old in (*others[: max(0, len(others) + 1 - self.keep_checkpoints)], *final.parent.glob("step-*.old")):
            shutil.rmtree(old, ignore_errors=True)


def _staged(tensor: Tensor) -> Tensor:
    """A copy on the CPU: of what is sharded, of this rank's part."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor.detach().to("cpu", copy=True)
    from torch.distributed.tensor import DTensor  # takes a second, which one process alone need not spend

    if mesh.device_type != "cpu":
        mesh = _on_cpu(mesh)
    part = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@cache
def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints by step. One that was being replaced when its process died counts under its old name."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):  # step-000001.old before step-000001
        match = re.fullmatch(r"step-(\d{6,})(\.old)?", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def set_aside(path: Path) -> Path:
    """Give a checkpoint that is not whole a name under which nothing looks for it; a look at it may still help."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def fsync_and_hash(path: Path) -> str:
    """Wait until a file is on the disk, and take its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def _reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
