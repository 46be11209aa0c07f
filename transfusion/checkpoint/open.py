"""A run on disk, read: checked first, and nothing in it is ever executed."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from transfusion.checkpoint.save import FORMAT, hash_config, list_checkpoints, set_aside
from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.text import Tokenizer
from transfusion.config import Run, from_json
from transfusion.disk import (
    CONFIG,
    RUN,
    OpenError,
    check_run,
    find_folder,
    is_exported,
    read_checked,
    read_json,
    sha256_of,
)  # fmt: skip
from transfusion.model.transfusion import Transfusion, build_uninitialized, count_parameters, read_config
from transfusion.model.weights import SINGLE, load_weights, read_into
from transfusion.parallel import SINGLE_PROCESS, Ranks, lower_precision, lower_weights, pick_device, precision
from transfusion.sequence import Vocabulary

GENERATION = "generation_config.json"  # of an exported run: its defaults, which may be edited by hand


@dataclass
class RunDescription:
    """A run without its weights."""

    run: Run
    tokenizer: Tokenizer
    codec: Codec
    vocabulary: Vocabulary
    notes: dict


@dataclass
class OpenedRun(RunDescription):
    """A run ready for use."""

    model: Transfusion
    step: int
    device: torch.device

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def precision(self) -> torch.dtype:
        """Of its products, keys and values on this device."""
        return precision(self.device)

    def lower_precision(self):
        """The context for forward passes in that precision."""
        return lower_precision(self.device)


def open_checkpoint(place: str | Path, weights: str = "ema", device: str = "auto") -> OpenedRun:
    """The newest checkpoint of a run: its moving average, or with weights="raw" what training goes on from.

    Or a run that was exported, a folder or `owner/name` on the hub, with the weights that were chosen then. Matrices are in
    the precision that the device computes in. OpenError when it is none of these.
    """
    chosen = pick_device(device)
    folder = find_folder(place)
    described = describe_run(folder)
    model = build_uninitialized(described.run.model, chosen).requires_grad_(False)
    if is_exported(folder):
        step = _read_exported(folder, model, weights)
    else:
        found = newest_checkpoint(folder)
        verify_checkpoint(found)
        fill_tensors(found, {weights_part(weights): model.state_dict()})
        step = step_of(found)
    lower_weights(model, chosen)
    return OpenedRun(**vars(described), model=model.eval(), step=step, device=chosen)


def _read_exported(folder: Path, model: Transfusion, weights: str) -> int:
    """Fill in the weights that were exported: the step from which they are."""
    check_exported(folder, weights)
    load_weights(folder, model)
    return read_json(folder / CONFIG)["weights"]["step"]


def check_exported(folder: Path, weights: str) -> None:
    """Every file of weights is as it was written, and they are those that are asked for. OpenError when not."""
    held = read_json(folder / CONFIG).get("weights")
    if not isinstance(held, dict) or not isinstance(held.get("sha256"), dict) or not isinstance(held.get("step"), int):
        raise OpenError(f"{folder / CONFIG} does not say what weights there are")
    if weights == "raw" and held.get("kind") != "raw":
        raise OpenError(f"{folder} was exported with the moving average alone: export the run with --weights raw")
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in (*held["sha256"], "codec.safetensors"):
            raise OpenError(f"{folder} holds {path.name}, which its config.json does not name")
    for name, digest in held["sha256"].items():
        _check_digest(folder, name, digest)


def weights_part(weights: str) -> str:
    """The part of a checkpoint that holds the moving average, or the raw weights."""
    return "ema" if weights == "ema" else "model"


def step_of(checkpoint: Path) -> int:
    """After which step it was written. OpenError when it does not say."""
    step = read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise OpenError(f"{checkpoint / 'state.json'} does not say which step it is")
    return step


def describe_run(folder: Path) -> RunDescription:
    """What run.json and the files beside it say, or config.json where the run was exported.

    OpenError when they are missing, changed or of another format.
    """
    path = check_run(folder) / RUN
    if is_exported(folder):
        path = folder / CONFIG
        read_config(folder)
    values = read_json(path)
    if "format" not in values and is_exported(folder):
        raise OpenError(f"{folder} holds a network alone, without tokenizer and codec: Transfusion.from_pretrained opens it")
    if values.get("format") != FORMAT:
        written = (values.get("versions") or {}).get("transfusion", "unknown")
        raise OpenError(
            f"{folder} was written in format {values.get('format')} by transfusion {written}; this one reads format {FORMAT}"
        )
    try:
        if is_exported(folder):
            values["run"]["generation"] = read_json(folder / GENERATION)
        run = from_json(Run, values["run"])
        vocabulary = Vocabulary.from_json(values["vocabulary"])
        if values["config_sha256"] != hash_config(values["run"], values["vocabulary"]):
            raise OpenError(f"{path}: model, diffusion or vocabulary are no longer those of its weights")
        text = read_checked(folder / "tokenizer.json", values["tokenizer"]["sha256"])
        encoded = read_checked(folder / "codec.safetensors", values["codec"]["sha256"])
        codec = codec_from_bytes(values["codec"]["kind"], encoded)
        return RunDescription(run, Tokenizer.from_json(text.decode()), codec, vocabulary, values["notes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{path} is damaged: {error!r}") from None
    except OpenError:
        raise
    except ValueError as error:
        raise OpenError(f"{path}: {error}") from None


def newest_checkpoint(folder: Path) -> Path:
    """The folder of the newest checkpoint. OpenError when there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise OpenError(f"{folder} has no checkpoint yet")
    latest = folder / "checkpoints" / "latest"
    named = latest.read_bytes().strip() if latest.is_file() else b""
    return next((path for path in found if path.stem.encode() == named), found[-1])  # the stem: it may be an .old one


def verify_checkpoint(checkpoint: Path, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Every file is there and has the SHA-256 of the day it was written. OpenError names the first that has not.

    With several ranks each takes the digests of its share.
    """
    manifest = read_json(checkpoint / "manifest.json")
    read = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*.safetensors"))]
    for name in ("state.json", *read):
        if name not in manifest:
            raise OpenError(f"{checkpoint} holds {name}, which its manifest does not name")
    for number, (name, digest) in enumerate(manifest.items()):
        _check_digest(checkpoint, name, digest, reads=number % ranks.world == ranks.rank)


def _check_digest(folder: Path, name: str, digest: str, reads: bool = True) -> None:
    """OpenError when a file of the folder is missing, lies outside, or (if it is read) is not as it was written."""
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise OpenError(f"{folder}: its list of files names {name}, which lies outside")
    if not path.is_file():
        raise OpenError(f"{folder} is not whole: {name} is missing")
    if reads and sha256_of(path) != digest:
        raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")


def restore_newest(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks, say: Callable[[str], None] = print
) -> tuple[Path, dict] | None:
    """Read the newest whole checkpoint into these, on all ranks: its folder and its state.json. None when there is none yet.

    One that was changed since it was written is set aside, and the one before is taken; `say` is told. Tensors that were
    saved by any number of ranks are read by any other. OpenError when there were some and none is whole.
    """
    found = ranks.broadcast([path.name for path in list_checkpoints(folder)][::-1])
    for name in found:
        path = folder / "checkpoints" / name
        broken = _check_together(path, ranks)
        if broken is None:
            fill_tensors(path, tensors, ranks)
            return path, read_json(path / "state.json")
        if ranks.is_main:
            say(f"{broken}: it is set aside as {set_aside(path).name}, and the checkpoint before it is taken")
        ranks.wait()
    if found:
        raise OpenError(f"no checkpoint of {folder} is whole: all are set aside, and the same command begins anew")
    return None


def _check_together(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, by `verify`; each rank reads its share of the files."""
    try:
        verify_checkpoint(path, ranks)
        broken = None
    except OpenError as error:
        broken = str(error)
    return next((one for one in ranks.gather(broken) if one is not None), None)


def fill_tensors(checkpoint: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks = SINGLE_PROCESS) -> None:
    """Read each part's tensors into these, in place. OpenError when a name or shape is not the checkpoint's."""
    for part, values in tensors.items():
        folder = checkpoint / part
        if ranks.world == 1 and (folder / SINGLE).exists():
            read_into(folder, values, "this run")
        else:
            _read_shards(folder, values, alone=ranks.world == 1)


def _read_shards(folder: Path, values: dict[str, torch.Tensor], alone: bool) -> None:
    """Each rank its part of what several wrote, or one process all of it, by torch's DCP, which takes a second to import."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=alone)
    except (CheckpointException, OSError, ValueError, RuntimeError, SafetensorError) as error:
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        raise OpenError(f"{folder} does not fit this run: {str(cause).splitlines()[0]}") from None
