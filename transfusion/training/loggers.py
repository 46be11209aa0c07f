"""Loggers beside metrics.jsonl: TensorBoard and Weights & Biases (W&B). Each gets the same lines."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from transfusion.config import LoggerName
from transfusion.disk import run_name, write_whole

Value = int | float | str


class Logger(Protocol):
    """Gets every line of metrics.jsonl, on the main process only."""

    def write(self, step: int, values: dict[str, Value]) -> None:
        """A line after this step."""

    def close(self, failed: bool) -> None:
        """The session ends, with an error if `failed`."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """ValueError when the package of a logger is not installed. Imports nothing."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, which the logger itself may have made
            raise ValueError(f"--log {name} needs {name}: pip install '.[{name}]' in a clone of the repository")


def open_loggers(names: Sequence[LoggerName], folder: Path, step: int, settings: dict[str, Any]) -> list[Logger]:
    """The loggers of a run in its folder, for the lines after `step`."""
    loggers = {
        "tensorboard": lambda: TensorBoardLogger(folder, step), "wandb": lambda: WandbLogger(folder, settings),
    }  # fmt: skip
    return [loggers[name]() for name in dict.fromkeys(names)]


class TensorBoardLogger:
    """Event files in the folder tensorboard/: numbers as scalars, words as texts. A resumed run adds a file, whose first
    record hides the lines after the checkpoint: each step is shown once."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = step + 1 if step else 0
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=20)

    def write(self, step: int, values: dict[str, Value]) -> None:
        for name, value in values.items():
            add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
            add(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandbLogger:
    """A run of W&B, whose id is kept in wandb/id.txt, so that a resumed run continues it; WANDB_MODE=offline works without
    an account. The x axis is the field `step`, because W&B's own may not go back to a checkpoint.

    ValueError with W&B's reason when it cannot start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import wandb

        path = folder / "wandb" / "id.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, token_hex(8).encode())
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "transfusion"), name=run_name(folder), dir=str(folder),
                id=path.read_text(encoding="utf-8"), resume="allow", config=settings,
                settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--log wandb: {reason}; run wandb login, or set WANDB_MODE=offline") from None
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, Value]) -> None:
        self.run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
