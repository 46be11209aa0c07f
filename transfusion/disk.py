"""Atomic file writes, JSON with checks, SHA-256, and checks of folders. Imports nothing heavy."""

import hashlib
import json
import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

RUN_FORMAT = 3  # of run.json, and of the config.json of an exported run; other formats are refused
RUN, CONFIG = "run.json", "config.json"  # in the folder of a run; in that of an exported run or of a network
ADAPTER_CONFIG = "adapter_config.json"  # in a folder that holds an adapter alone, in the format of peft
MODELS = Path(__file__).parent / "models"  # exported runs that are part of the package, each in a folder of its name


class OpenError(ValueError):
    """A file or folder that cannot be used; the message says why in one line."""


def run_name(folder: Path) -> str:
    """The name of the run in a folder: that of the folder, as `to_name` writes it."""
    return to_name(folder.resolve().name)


def to_name(text: str) -> str:
    """A text as the name of a run, in one word: letters and digits of any script, "_", "." and "-". Each group of other
    characters becomes "-", and none of them is first or last. "run" if nothing is left, as of the folder "/"."""
    text = unicodedata.normalize("NFC", text)
    word = "".join(c if c in "_.-" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return "-".join(word.split()).strip("-.") or "run"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has the new content or the old."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def open_to_others(path: Path) -> None:
    """Give a file or folder the permissions of a new one; temporary ones are private to the user."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_json(path: Path, values: dict) -> None:
    """Write an object as indented JSON, atomically."""
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object from a file. OpenError when it is missing or is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no file, not UTF-8, not JSON, or nested too deeply
        raise OpenError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise OpenError(f"{path} does not hold a JSON object")
    return values


def read_json_lines(path: Path) -> list[dict]:
    """The JSON objects of a file with one in each line, [] without a file. A line that is none is left out: the last one is
    incomplete after a crash. OpenError when the file cannot be read."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OpenError(f"cannot read {path}: {error.strerror}") from None
    values = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def read_checked(path: Path, digest: str) -> bytes:
    """The content of a file. OpenError when it is missing or its SHA-256 differs."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OpenError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")
    return content


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_format(folder: Path, values: dict, expected: int, fix: str) -> None:
    """OpenError when the JSON `values` of a folder are of another format; it names the version that wrote them."""
    if values.get("format") != expected:
        version = (values.get("versions") or {}).get("transfusion", "unknown")
        raise OpenError(f"{folder} has format {values.get('format')}, written by transfusion {version}; this version reads "
                        f"format {expected}: {fix}")  # fmt: skip


def check_run_format(folder: Path, values: dict) -> None:
    """The same for the run.json of a run and the config.json of an exported one."""
    check_format(folder, values, RUN_FORMAT, "use that version, or train again")


def packaged_models() -> list[str]:
    """The names of the models in the package."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{CONFIG}"))


def is_on_hub(place: str | Path) -> bool:
    """Is this the name of a repository on the hub, `owner/name`? Never a name whose path or parent folder exists locally."""
    path = Path(place)
    return not path.exists() and not path.parent.is_dir() and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(place)))


def find_folder(place: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A local folder, else the folder of a model in the package, else a snapshot of the hub's repository `owner/name`, only
    its safetensors and JSON files.

    revision: a branch, tag or commit of the repository; default main. local_files_only: use only the hub's local cache.
    OpenError when the hub does not have it or cannot be reached.
    """
    path = Path(place)
    if not path.exists() and str(place) in packaged_models():
        path = MODELS / path
    if not is_on_hub(path):
        if revision is not None:
            raise OpenError(f"{place} is not on the hub, so it has no revision {revision}: leave it out")
        return path
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(
            str(place), revision=revision, local_files_only=local_files_only, allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*/*", "consolidated*"],  # Mistral's repositories have all weights twice
        ))  # fmt: skip
    except errors.GatedRepoError:
        reason = "the hub gives access only to users whom its owner accepted (then hf auth login)"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private (then hf auth login)"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision}"
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the hub's local cache" + ("" if local_files_only else ", and the hub cannot be reached")
    except Exception as error:  # the hub's client raises many kinds
        reason = f"the hub says: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    raise OpenError(f"{place} cannot be opened: there is no such folder, and {reason}")


def is_exported(folder: Path) -> bool:
    """Was the folder written by `export`?"""
    return not (folder / RUN).exists() and (folder / CONFIG).exists()


def check_run(folder: Path) -> Path:
    """The folder, if it holds a run or an exported one. OpenError when it does not."""
    if not folder.exists():
        names = ", ".join(packaged_models()) or "none"
        raise OpenError(f"{folder} is not a run: there is no such folder (models in the package: {names}; a name on the hub "
                        "is owner/name)")  # fmt: skip
    if (folder / ADAPTER_CONFIG).exists():
        raise OpenError(f"{folder} holds an adapter alone, not a run: give the run that it was exported from, or export it "
                        "without --adapter")  # fmt: skip
    if not (folder / RUN).exists() and not is_exported(folder):
        hint = f" (in another folder, {folder} is the model in the package)" if str(folder) in packaged_models() else ""
        raise OpenError(f"{folder} is not a run: it has no {RUN}{hint}")
    return folder


def check_new(out: Path) -> None:
    """ValueError when this path exists, so that nothing is overwritten."""
    if out.exists():
        raise ValueError(f"{out} is there already: give another --out")


def check_codec(folder: Path) -> Path:
    """The folder, if `transfusion data fit-codec` wrote it. OpenError when it did not."""
    if not (folder / "codec.json").exists():
        raise OpenError(f"{folder} holds no codec: it has no codec.json (transfusion data fit-codec writes one)")
    return folder


def check_prepared(folder: Path) -> Path:
    """The folder, if `transfusion data prepare` wrote it completely. OpenError when it did not."""
    if not folder.exists():
        raise OpenError(f"{folder} is not prepared data: there is no such folder; if it was moved, give its new path (of a "
                        "run's data: --data DIR)")  # fmt: skip
    if not (folder / "dataset.json").exists():
        if (folder / "recipe.json").exists():
            raise OpenError(f"{folder} is not finished: run the same `transfusion data prepare` again")
        raise OpenError(f"{folder} is not prepared data: it has no dataset.json (transfusion data prepare SOURCE --out DIR "
                        "writes it)")  # fmt: skip
    return folder
