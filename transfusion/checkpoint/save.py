"""A run on disk, written: run.json with what it needs to be used, and checkpoints that are whole or not there."""

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from transfusion.codecs.codec import Codec, codec_to_bytes
from transfusion.codecs.text import Tokenizer
from transfusion.config import Run, to_json
from transfusion.disk import sha256_of, write_json, write_whole
from transfusion.sequence import Vocabulary

FORMAT = 1  # of a run's folder; another number is refused


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def begin(folder: Path, run: Run, tokenizer: Tokenizer, codec: Codec, vocabulary: Vocabulary, notes: dict) -> None:
    """Write all that a run needs besides weights: run.json, tokenizer.json, codec.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = codec_to_bytes(codec)
    text = tokenizer.to_json()
    values = {
        "format": FORMAT,
        "run": to_json(run),
        "vocabulary": vocabulary.to_json(),
        "meaning": meaning(to_json(run), vocabulary.to_json()),
        "codec": {"kind": codec.kind, "sha256": hashlib.sha256(encoded).hexdigest()},
        "tokenizer": {"sha256": hashlib.sha256(text.encode()).hexdigest()},
        "versions": {
            "transfusion": version("transfusion"), "torch": torch.__version__, "python": platform.python_version(),
        },
        "notes": notes,
    }  # fmt: skip
    write_whole(folder / "codec.safetensors", encoded)
    write_whole(folder / "tokenizer.json", text.encode())
    write_json(folder / "run.json", values)


def meaning(run: dict, vocabulary: dict) -> str:
    """The SHA-256 of all that the weights mean nothing without; what may be edited by hand (generation, say) is left out.

    Of what run.json says, not of what is made of it: a field that a later version adds changes no earlier run.
    """
    parts = [run.get("model"), run.get("diffusion"), vocabulary]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int) -> Path:
    """Write checkpoints/step-NNNNNN aside, then put it in place; delete all but the newest `keep`.

    SaveError when it does not work out (a full disk, say): then nothing of it is left, and earlier ones are whole.
    """
    place = folder / "checkpoints"
    final = place / f"step-{step:06d}"
    aside, before = final.with_suffix(".tmp"), final.with_suffix(".old")  # `before`: this step, saved once already
    swapped = False
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for part, values in tensors.items():
            with warnings.catch_warnings(action="ignore"):  # it warns that one process is one process
                dcp.save(values, storage_writer=HuggingFaceStorageWriter(aside / part, save_distributed=True), no_dist=True)
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (aside / "manifest.json").write_text(json.dumps(_manifest(aside), indent=2) + "\n")
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        aside.rename(final)
        swapped = True
        write_whole(place / "latest", final.name.encode())
    except (OSError, CheckpointException) as error:  # CheckpointException is a BaseException
        shutil.rmtree(final if swapped else aside, ignore_errors=True)
        if before.exists() and not final.exists():
            before.rename(final)
        raise SaveError(f"could not save step {step} in {place}: {_reason(error)}; earlier checkpoints are whole") from None
    others = [path for path in list_checkpoints(folder) if path != final]
    for old in (*others[: max(0, len(others) + 1 - keep)], *place.glob("step-*.old")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints by step. One that was being replaced when its process died counts under its old name."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):  # step-000001.old before step-000001
        match = re.fullmatch(r"step-(\d{6,})(\.old)?", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below, by its path; each is on the disk before its checkpoint gets its name."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = sha256_of(path)
    return found


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
