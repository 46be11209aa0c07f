"""Reads the folders of runs: their descriptions and their checkpoints. Files are verified before use; none is executed."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from transfusion.checkpoint.save import hash_config, list_checkpoints, rename_damaged
from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.text import Tokenizer
from transfusion.config import ChatLayout, Run, from_json
from transfusion.disk import (
    CONFIG,
    RUN,
    OpenError,
    check_run,
    check_run_format,
    is_exported,
    read_checked,
    read_json,
    run_name,
    sha256_of,
    to_name,
)  # fmt: skip
from transfusion.model.transfusion import read_config
from transfusion.model.weights import SINGLE, read_into
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.sequence import Vocabulary

GENERATION = "generation_config.json"  # of an exported run: its generation defaults, which users may edit


@dataclass
class RunDescription:
    """A run without its weights. `name`: that of its folder; of an exported run, the one that it was exported with."""

    name: str
    run: Run
    tokenizer: Tokenizer
    codec: Codec
    vocabulary: Vocabulary
    notes: dict

    @property
    def chat(self) -> ChatLayout | None:
        """The layout of conversations that it was trained with; None if its data had none."""
        return from_json(ChatLayout, self.notes["chat"]) if self.notes.get("chat") else None


def check_exported(folder: Path, weights: str) -> None:
    """OpenError when a weights file of an exported run has changed, or it does not have the requested weights."""
    about = read_json(folder / CONFIG).get("weights")
    if not isinstance(about, dict) or not isinstance(about.get("sha256"), dict) or not isinstance(about.get("step"), int):
        raise OpenError(f"{folder / CONFIG} has no valid field weights: export the run again")
    if weights == "raw" and about.get("kind") != "raw":
        raise OpenError(f"{folder} was exported with the averaged weights only: export the run with --weights raw")
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in (*about["sha256"], "codec.safetensors"):
            raise OpenError(f"{folder} contains {path.name}, which its config.json does not list")
    for name, digest in about["sha256"].items():
        _check_digest(folder, name, digest)


def checkpoint_part(weights: str) -> str:
    """The part of a checkpoint with these weights: "ema" -> ema, "raw" -> model."""
    return "ema" if weights == "ema" else "model"


def read_step(checkpoint: Path) -> int:
    """The step of a checkpoint. OpenError if its state.json has no step."""
    step = read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise OpenError(f"{checkpoint / 'state.json'} has no valid step")
    return step


def describe_run(folder: Path) -> RunDescription:
    """Read run.json (config.json of an exported run), the tokenizer and the codec. OpenError when they are missing, changed
    or of another format."""
    path = check_run(folder) / RUN
    if is_exported(folder):
        path = folder / CONFIG
        read_config(folder)
    values = read_json(path)
    if "format" not in values and is_exported(folder):
        raise OpenError(f"{folder} is a network without tokenizer and codec: open it with Transfusion.from_pretrained")
    check_run_format(folder, values)
    try:
        if is_exported(folder):
            values["run"]["generation"] = read_json(folder / GENERATION)
        run = from_json(Run, values["run"])
        vocabulary = Vocabulary.from_json(values["vocabulary"])
        if values["config_sha256"] != hash_config(values["run"], values["vocabulary"]):
            raise OpenError(f"{path}: model, diffusion or vocabulary were changed and no longer match the weights")
        text = read_checked(folder / "tokenizer.json", values["tokenizer"]["sha256"]).decode()
        tokenizer = Tokenizer.from_json(text, vocabulary.tokenizer_markers)
        codec_bytes = read_checked(folder / "codec.safetensors", values["codec"]["sha256"])
        codec = codec_from_bytes(values["codec"]["kind"], codec_bytes)
        name = to_name(values["name"]) if is_exported(folder) else run_name(folder)
        return RunDescription(name, run, tokenizer, codec, vocabulary, values["notes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{path} is damaged: {error!r}") from None
    except OpenError:
        raise
    except ValueError as error:
        raise OpenError(f"{path}: {error}") from None


def find_newest_checkpoint(folder: Path) -> Path:
    """The folder of the newest checkpoint. OpenError if the folder has no checkpoint."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise OpenError(f"{folder} has no checkpoint yet")
    latest = folder / "checkpoints" / "latest"
    name = latest.read_bytes().strip() if latest.is_file() else b""
    return next((path for path in checkpoints if path.stem.encode() == name), checkpoints[-1])  # stem: it may end in .old


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint at this step; None: of the newest. OpenError if the folder does not have it."""
    newest = find_newest_checkpoint(folder)
    if step is None or read_step(newest) == step:
        return newest
    steps = {int(path.stem.partition("-")[2]): path for path in list_checkpoints(folder)}
    if step not in steps:
        raise OpenError(f"{folder} has no checkpoint of step {step}, only of step {', '.join(map(str, steps))}")
    return steps[step]


def check_adapter(checkpoint: Path, state: dict, base_sha256: str | None) -> None:
    """OpenError unless the checkpoint, with this state.json, has an adapter to these base weights; None: all weights."""
    if state.get("base_sha256") != base_sha256:
        raise OpenError(f"{checkpoint} belongs to another run: its adapter was trained on other weights than those that "
                        "this run started from")  # fmt: skip


def verify_checkpoint(checkpoint: Path, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Check every file against its recorded SHA-256. OpenError names the first missing or changed file. Each rank hashes its
    share of the files."""
    manifest = read_json(checkpoint / "manifest.json")
    tensor_files = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*.safetensors"))]
    for name in ("state.json", *tensor_files):
        if name not in manifest:
            raise OpenError(f"{checkpoint} contains {name}, which its manifest does not list")
    for number, (name, digest) in enumerate(manifest.items()):
        _check_digest(checkpoint, name, digest, hashes=number % ranks.world == ranks.rank)


def _check_digest(folder: Path, name: str, digest: str, hashes: bool = True) -> None:
    """OpenError when a file is missing, is outside the folder, or (with `hashes`) has another SHA-256."""
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise OpenError(f"{folder}: its list of files names {name}, which is outside the folder")
    if not path.is_file():
        raise OpenError(f"{folder} is incomplete: {name} is missing")
    if hashes and sha256_of(path) != digest:
        raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")


def restore_newest(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks, report: Callable[[str], None] = print
) -> tuple[Path, dict] | None:
    """Load the newest intact checkpoint into these tensors, on all ranks. Returns its folder and its state.json.

    None when there is no checkpoint. A damaged checkpoint is renamed and the one before it is used; rank 0 calls `report`.
    The number of ranks may differ from the one that saved. OpenError when all checkpoints are damaged.
    """
    names = ranks.broadcast([path.name for path in list_checkpoints(folder)][::-1])
    for name in names:
        path = folder / "checkpoints" / name
        damage = _find_damage(path, ranks)
        if damage is None:
            fill_tensors(path, tensors, ranks)
            return path, read_json(path / "state.json")
        if ranks.is_main:
            report(f"{damage}: it was renamed to {rename_damaged(path).name}, and the checkpoint before it is used")
        ranks.barrier()
    if names:
        raise OpenError(f"no checkpoint of {folder} is intact: all were renamed to *.damaged; the same command starts again")
    return None


def _find_damage(path: Path, ranks: Ranks) -> str | None:
    """The error of `verify_checkpoint` on any rank, or None; each rank hashes its share of the files."""
    try:
        verify_checkpoint(path, ranks)
        error_text = None
    except OpenError as error:
        error_text = str(error)
    return next((text for text in ranks.gather(error_text) if text is not None), None)


def fill_tensors(checkpoint: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks = SINGLE_PROCESS) -> None:
    """Load each part into these tensors, in place. OpenError when a name or shape differs from the checkpoint's."""
    for part, values in tensors.items():
        folder = checkpoint / part
        if ranks.world == 1 and (folder / SINGLE).exists():
            read_into(folder, values, "this run")
        else:
            _read_shards(folder, values, single_process=ranks.world == 1)


def _read_shards(folder: Path, values: dict[str, torch.Tensor], single_process: bool) -> None:
    """Load a part that several ranks wrote with torch's DCP. The import takes a second, so it is done only here."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=single_process)
    except (CheckpointException, OSError, ValueError, RuntimeError, SafetensorError) as error:
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        raise OpenError(f"{folder} does not fit this run: {str(cause).splitlines()[0]}") from None
