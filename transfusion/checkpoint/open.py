"""Opens runs for use: their weights, on a device. Files are verified before use, and nothing in them is ever executed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from transfusion.checkpoint.read import (
    RunDescription,
    check_exported,
    checkpoint_part,
    describe_run,
    fill_tensors,
    find_newest_checkpoint,
    read_step,
    verify_checkpoint,
)
from transfusion.checkpoint.start import load_with_base
from transfusion.disk import CONFIG, find_folder, is_exported, read_json
from transfusion.model.transfusion import Transfusion, build_on_meta, count_parameters
from transfusion.model.weights import load_weights
from transfusion.parallel import lower_precision, lower_weights, pick_device, precision


@dataclass
class OpenedRun(RunDescription):
    """A run with its weights, ready for use."""

    model: Transfusion
    step: int
    device: torch.device

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def precision(self) -> torch.dtype:
        """Dtype of matrix products, keys and values on this device."""
        return precision(self.device)

    def lower_precision(self):
        """The autocast context for forward passes."""
        return lower_precision(self.device)


def open_checkpoint(
    place: str | Path, weights: str = "ema", device: str = "auto", *, revision: str | None = None,
    local_files_only: bool = False,
) -> OpenedRun:  # fmt: skip
    """Open the newest checkpoint of a run: its averaged weights (EMA), or with weights="raw" the ones that training updates.

    `place` is a run's folder, or an exported run: a folder or `owner/name` on the hub, with the weights chosen at export;
    `revision` and `local_files_only` as in `find_folder`. Matrices are in the device's precision. OpenError when it cannot
    be opened.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, not {weights}")
    torch_device = pick_device(device)
    folder = find_folder(place, revision, local_files_only)
    description = describe_run(folder)
    if is_exported(folder):
        model = _build(description, torch_device)
        step = _load_exported(folder, model, weights)
        return OpenedRun(**vars(description), model=model, step=step, device=torch_device)
    checkpoint = find_newest_checkpoint(folder)
    verify_checkpoint(checkpoint)
    if description.run.lora.rank is None:
        model = _build(description, torch_device)
        fill_tensors(checkpoint, {checkpoint_part(weights): model.state_dict()})
    else:  # merged in float32: rounded weights would lose small changes
        model = load_with_base(description, checkpoint, weights, folder)
        model = lower_weights(model, precision(torch_device)).eval().to(torch_device)
    return OpenedRun(**vars(description), model=model, step=read_step(checkpoint), device=torch_device)


def _build(description: RunDescription, device: torch.device) -> Transfusion:
    """The model of a run without its weights; matrices are in the precision of the device."""
    model = lower_weights(build_on_meta(description.run.model), precision(device)).requires_grad_(False).eval()
    return model.to_empty(device=device)  # never with all weights in float32, twice the memory


def _load_exported(folder: Path, model: Transfusion, weights: str) -> int:
    """Load the weights of an exported run into the model. Returns their step."""
    check_exported(folder, weights)
    load_weights(folder, model)
    return read_json(folder / CONFIG)["weights"]["step"]
