"""Files that are whole or as they were before, JSON that is checked, and the SHA-256 that tells a changed file."""

import hashlib
import json
import os
from pathlib import Path


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
