"""Files that are whole or as they were before, checked JSON, SHA-256, and what a folder holds. Imports nothing heavy."""

import hashlib
import json
import os
import re
from pathlib import Path

RUN, CONFIG = "run.json", "config.json"  # in the folder of a run; of an exported run, or of a network alone


class OpenError(ValueError):
    """What lies on the disk cannot be used; the message says why in one line."""


def write_whole(path: Path, content: bytes) -> None:
    """The file with all of this content, or as it was before."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def open_to_others(path: Path) -> None:
    """As readable as any new file or folder, whoever made it only for this user."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_json(path: Path, values: dict) -> None:
    """An object as JSON that a person can read: whole, or as it was before."""
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object from a file. OpenError when it is missing or is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no file, no text, no JSON, or JSON made to be too much
        raise OpenError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise OpenError(f"{path} does not hold a JSON object")
    return values


def read_checked(path: Path, digest: str) -> bytes:
    """The content of a file. OpenError when it is missing or its SHA-256 is another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OpenError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")
    return content


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read once and never held whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_folder(place: str | Path) -> Path:
    """The folder of this name, or else that of the hub's repository `owner/name`, of which only safetensors and JSON come.

    What is on this disk is never taken for a name on the hub, nor is what would lie in a folder of this disk. OpenError when
    the hub has nothing of that name, or is out of reach.
    """
    path = Path(place)
    if path.exists() or path.parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(place)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(place), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, or no such name: whatever the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OpenError(f"{place} is not a run: there is no such folder, and the hub says: {reason}") from None


def is_exported(folder: Path) -> bool:
    """Is it what `export` wrote, not a run's own folder?"""
    return not (folder / RUN).exists() and (folder / CONFIG).exists()


def check_run(folder: Path) -> Path:
    """This folder of a run, or of an exported one. OpenError when it is neither."""
    if not (folder / RUN).exists() and not is_exported(folder):
        raise OpenError(f"{folder} is not a run: it has no {RUN}")
    return folder


def check_new(out: Path) -> None:
    """ValueError when there is something of this name already, which would be lost."""
    if out.exists():
        raise ValueError(f"{out} is there already: give another --out")


def check_codec(folder: Path) -> Path:
    """This folder that `transfusion data fit-codec` made. OpenError when it is none."""
    if not (folder / "codec.json").exists():
        raise OpenError(f"{folder} holds no codec: it has no codec.json (transfusion data fit-codec makes one)")
    return folder


def check_prepared(folder: Path) -> Path:
    """This folder that `transfusion data prepare` made. OpenError when it is none, or is not finished."""
    if not (folder / "dataset.json").exists():
        what = "is not finished: the same `transfusion data prepare` goes on" if (folder / "recipe.json").exists() else (
            "is no prepared data: it has no dataset.json (transfusion data prepare SOURCE --out DIR makes one)")  # fmt: skip
        raise OpenError(f"{folder} {what}")
    return folder
