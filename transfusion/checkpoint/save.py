"""Writes run.json with everything a run needs besides weights, and checkpoints, each complete or absent."""

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
from transfusion.disk import RUN, RUN_FORMAT, read_json, sha256_of, write_json, write_whole
from transfusion.model.weights import SINGLE
from transfusion.parallel import Ranks
from transfusion.sequence import Vocabulary

T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


def create_run_folder(
    folder: Path, run: Run, tokenizer: Tokenizer, codec: Codec, vocabulary: Vocabulary, notes: dict
) -> None:
    """Write all that a run needs besides weights: run.json, tokenizer.json, codec.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    codec_bytes = codec_to_bytes(codec)
    tokenizer_bytes = tokenizer.to_json().encode()
    values = {
        "format": RUN_FORMAT,
        "run": to_json(run),
        "vocabulary": vocabulary.to_json(),
        "config_sha256": hash_config(to_json(run), vocabulary.to_json()),
        "codec": {"kind": codec.kind, "sha256": hashlib.sha256(codec_bytes).hexdigest()},
        "tokenizer": {"sha256": hashlib.sha256(tokenizer_bytes).hexdigest()},
        "versions": versions(),
        "notes": notes,
    }  # fmt: skip
    write_whole(folder / "codec.safetensors", codec_bytes)
    write_whole(folder / "tokenizer.json", tokenizer_bytes)
    write_json(folder / RUN, values)


def update_settings(folder: Path, run: Run) -> None:
    """Replace the settings in run.json."""
    values = read_json(folder / RUN)
    values |= {"run": to_json(run), "config_sha256": hash_config(to_json(run), values["vocabulary"])}
    write_json(folder / RUN, values)


def versions() -> dict[str, str]:
    """The versions of transfusion, torch and Python."""
    return {"transfusion": version("open-transfusion"), "torch": torch.__version__, "python": platform.python_version()}


def hash_config(run: dict, vocabulary: dict) -> str:
    """The SHA-256 of the configs that the weights depend on: model, diffusion and vocabulary. It is over the JSON as
    written, before defaults are added, so that a field of a later version does not change it."""
    parts = [run.get("model"), run.get("diffusion"), vocabulary]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Saver:
    """Writes a run's checkpoints in the background. As a context manager it finishes the last one at exit.

    `save` copies the tensors and returns. A thread writes the copy into a temporary folder, on each rank its own part, and
    rank 0 renames the folder. SaveError is raised by the next `save` or `finish`, or at exit: then the failed checkpoint has
    been removed, and earlier ones are intact. The thread calls `reset_watchdog` whenever a file is written or hashed.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, reset_watchdog: Callable[[], None] = lambda: None):
        self.folder, self.keep_checkpoints, self.ranks, self.reset_watchdog = folder, keep, ranks, reset_watchdog
        self.thread, self.writing = ThreadPoolExecutor(1), None
        self.group = ranks.background  # collective: all ranks create it here

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.finish()
        except SaveError:
            if kind is None:  # else the first exception is raised
                raise
        finally:
            self.thread.shutdown()

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Save the present values as checkpoints/step-NNNNNN, and delete all but the newest `keep` checkpoints."""
        self.finish()
        copies = {part: {name: _copy_to_cpu(value) for name, value in values.items()} for part, values in tensors.items()}
        self.writing = self.thread.submit(self._write, step, copies, json.dumps(state, indent=2))

    def finish(self) -> None:
        """Wait until the current checkpoint is written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: str) -> None:
        folder = self.folder / "checkpoints"
        final = folder / f"step-{step:06d}"
        temporary = final.with_suffix(".tmp")
        try:
            self._run_on_all_ranks(lambda: self._create_temporary(temporary))
            digests = {}
            for part, values in tensors.items():
                self._write_part(temporary / part, values)
                self.reset_watchdog()
                # After each part: so no rank waits longer for another than for one file.
                digests |= ChainMap(*self._run_on_all_ranks(lambda part=part: self._hash_part(temporary, part)))
            self._run_on_all_ranks(lambda: self._publish(temporary, final, state, digests))
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # RuntimeError: another rank has stopped
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(
                f"could not save step {step} in {folder}: {_first_line(error)}; earlier checkpoints are intact"
            ) from None

    def _write_part(self, folder: Path, values: dict[str, Tensor]) -> None:
        """A single process writes one safetensors file; several ranks each write their shards with torch's DCP."""
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
            raise OSError(_first_line(next(iter(error.failures.values()))[0])) from None

    def _hash_part(self, temporary: Path, part: str) -> dict[str, str]:
        """The SHA-256 of this rank's share of a part's files, by name; they are on the disk then."""
        files = sorted((temporary / part).rglob("*.safetensors"))[self.ranks.rank :: self.ranks.world]
        return {path.relative_to(temporary).as_posix(): self._fsync_and_hash(path) for path in files}

    def _fsync_and_hash(self, path: Path) -> str:
        digest = fsync_and_hash(path)
        self.reset_watchdog()
        return digest

    def _run_on_all_ranks(self, function: Callable[[], T]) -> list[T]:
        """Call `function` on each rank and return all results. When it fails on one rank, all ranks raise OSError."""
        try:
            outcome = function(), None
        except OSError as error:
            outcome = None, _first_line(error)
        outcomes = [outcome]
        if self.group is not None:
            outcomes = [None] * self.ranks.world
            dist.all_gather_object(outcomes, outcome, group=self.group)
            self.reset_watchdog()
        for _, failure in outcomes:
            if failure is not None:
                raise OSError(failure)
        return [result for result, _ in outcomes]

    def _create_temporary(self, temporary: Path) -> None:
        if self.ranks.is_main:
            for leftover in temporary.parent.glob("step-*.tmp"):  # of killed saves
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _publish(self, temporary: Path, final: Path, state: str, digests: dict[str, str]) -> None:
        """Write state.json, the manifest and `latest`, rename the folder, and delete old checkpoints. Rank 0 only."""
        if not self.ranks.is_main:
            return
        (temporary / "state.json").write_text(state + "\n", encoding="utf-8")
        digests |= {"state.json": self._fsync_and_hash(temporary / "state.json")}
        (temporary / "manifest.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        self._fsync_and_hash(temporary / "manifest.json")
        previous = final.with_suffix(".old")  # an earlier save of the same step
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
            final.rename(previous)
        try:
            temporary.rename(final)
            write_whole(final.parent / "latest", final.name.encode())
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            if previous.exists():
                previous.rename(final)
            raise
        others = [path for path in list_checkpoints(self.folder) if path != final]
        for old in (*others[: max(0, len(others) + 1 - self.keep_checkpoints)], *final.parent.glob("step-*.old")):
            shutil.rmtree(old, ignore_errors=True)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded tensor, of this rank's shard."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor.detach().to("cpu", copy=True)
    from torch.distributed.tensor import DTensor  # the import takes a second; a single process does not need it

    if mesh.device_type != "cpu":
        mesh = _cpu_mesh(mesh)
    shard = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@cache
def _cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints by step. A step-NNNNNN.old is listed when the process died while it was being replaced."""
    checkpoints = {}
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):  # step-000001.old before step-000001
        match = re.fullmatch(r"step-(\d{6,})(\.old)?", path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    return [checkpoints[step] for step in sorted(checkpoints)]


def rename_damaged(path: Path) -> Path:
    """Rename a damaged checkpoint to step-NNNNNN.damaged, which is never opened; it is kept for inspection."""
    damaged = path.with_suffix(".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    return path.rename(damaged)


def fsync_and_hash(path: Path) -> str:
    """Wait until a file is on the disk, and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def _first_line(error: BaseException) -> str:
    """The error's message in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
