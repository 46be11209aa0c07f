"""A run on disk, read: checked first, and nothing in it is ever executed."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from transfusion.checkpoint.save import FORMAT, list_checkpoints, meaning, set_aside
from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.text import Tokenizer
from transfusion.config import Run, from_json
from transfusion.disk import OpenError, read_checked, read_json, sha256_of
from transfusion.model.transfusion import Transfusion, count_parameters, empty
from transfusion.parallel import ALONE, Ranks, lower_precision, lower_weights, pick_device, precision
from transfusion.sequence import Vocabulary


@dataclass
class Described:
    """A run without its weights."""

    run: Run
    tokenizer: Tokenizer
    codec: Codec
    vocabulary: Vocabulary
    notes: dict


@dataclass
class Opened(Described):
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


def open_checkpoint(folder: Path, weights: str = "average", device: str = "auto") -> Opened:
    """The newest checkpoint of a run: its moving average, or with weights="raw" what training goes on from.

    Its matrices are in the precision that the device computes in.
    """
    chosen = pick_device(device)
    described = describe(folder)
    found = newest(folder)
    verify(found)
    model = empty(described.run.model, chosen).requires_grad_(False)
    fill(found, {"average" if weights == "average" else "model": model.state_dict()})
    lower_weights(model, chosen)
    step = read_json(found / "state.json").get("step")
    if not isinstance(step, int):
        raise OpenError(f"{found / 'state.json'} does not say which step it is")
    return Opened(**vars(described), model=model.eval(), step=step, device=chosen)


def describe(folder: Path) -> Described:
    """What run.json and the files beside it say. OpenError when they are missing, changed or of another format."""
    if not (folder / "run.json").exists():
        raise OpenError(f"{folder} is not a run: it has no run.json")
    values = read_json(folder / "run.json")
    if values.get("format") != FORMAT:
        written = (values.get("versions") or {}).get("transfusion", "unknown")
        raise OpenError(
            f"{folder} was written in format {values.get('format')} by transfusion {written}; this one reads format {FORMAT}"
        )
    try:
        run = from_json(Run, values["run"])
        vocabulary = Vocabulary.from_json(values["vocabulary"])
        if values["meaning"] != meaning(values["run"], values["vocabulary"]):
            raise OpenError(f"{folder / 'run.json'}: model, diffusion or vocabulary are no longer those of its weights")
        text = read_checked(folder / "tokenizer.json", values["tokenizer"]["sha256"])
        encoded = read_checked(folder / "codec.safetensors", values["codec"]["sha256"])
        codec = codec_from_bytes(values["codec"]["kind"], encoded)
        return Described(run, Tokenizer.from_json(text.decode()), codec, vocabulary, values["notes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{folder / 'run.json'} is damaged: {error!r}") from None
    except OpenError:
        raise
    except ValueError as error:
        raise OpenError(f"{folder / 'run.json'}: {error}") from None


def newest(folder: Path) -> Path:
    """The folder of the newest checkpoint. OpenError when there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise OpenError(f"{folder} has no checkpoint yet")
    latest = folder / "checkpoints" / "latest"
    named = latest.read_bytes().strip() if latest.is_file() else b""
    return next((path for path in found if path.stem.encode() == named), found[-1])  # the stem: it may be an .old one


def verify(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Every file is there and has the SHA-256 of the day it was written. OpenError names the first that has not.

    With several ranks each takes the digests of its share.
    """
    manifest = read_json(checkpoint / "manifest.json")
    read = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*.safetensors"))]
    for name in ("state.json", *read):
        if name not in manifest:
            raise OpenError(f"{checkpoint} holds {name}, which its manifest does not name")
    for number, (name, digest) in enumerate(manifest.items()):
        path = checkpoint / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise OpenError(f"{checkpoint}: its manifest names {name}, which lies outside")
        if not path.is_file():
            raise OpenError(f"{checkpoint} is not whole: {name} is missing")
        if number % ranks.world == ranks.rank and sha256_of(path) != digest:
            raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")


def restore(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks, say: Callable[[str], None] = print
) -> tuple[Path, dict] | None:
    """Read the newest whole checkpoint into these, on all ranks: its folder and its state.json. None when there is none yet.

    One that was changed since it was written is set aside, and the one before is taken; `say` is told. Tensors that were
    saved by any number of ranks are read by any other. OpenError when there were some and none is whole.
    """
    found = ranks.tell([path.name for path in list_checkpoints(folder)][::-1])
    for name in found:
        path = folder / "checkpoints" / name
        broken = _check_together(path, ranks)
        if broken is None:
            fill(path, tensors, ranks)
            return path, read_json(path / "state.json")
        if ranks.first:
            say(f"{broken}: it is set aside as {set_aside(path).name}, and the checkpoint before it is taken")
        ranks.wait()
    if found:
        raise OpenError(f"no checkpoint of {folder} is whole: all are set aside, and the same command begins anew")
    return None


def _check_together(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, by `verify`; each rank reads its share of the files."""
    try:
        verify(path, ranks)
        broken = None
    except OpenError as error:
        broken = str(error)
    return next((one for one in ranks.gather(broken) if one is not None), None)


def fill(checkpoint: Path, tensors: dict[str, dict[str, torch.Tensor]], ranks: Ranks = ALONE) -> None:
    """Read each part's tensors into these, in place. OpenError when a name or shape is not the checkpoint's."""
    for part, values in tensors.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(values, storage_reader=HuggingFaceStorageReader(checkpoint / part), no_dist=ranks.world == 1)
        except (CheckpointException, OSError, ValueError, RuntimeError, SafetensorError) as error:
            failures = getattr(error, "failures", None)
            cause = next(iter(failures.values()))[0] if failures else error
            raise OpenError(f"{checkpoint / part} does not fit this run: {str(cause).splitlines()[0]}") from None
