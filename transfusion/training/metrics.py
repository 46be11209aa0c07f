"""metrics.jsonl: one flat JSON object per line, whose names docs/training.md explains. The loggers get the same lines."""

import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from transfusion.disk import read_json_lines, write_whole
from transfusion.training.loggers import Logger, Value


class MetricsWriter:
    """Appends JSON objects to metrics.jsonl, one per line, each with its step. Lines after `step`, from before a crash, are
    removed first; the file is replaced atomically. With `writes` False (other ranks than 0) nothing is written. Leaving its
    context closes the loggers."""

    def __init__(self, path: Path, step: int, writes: bool = True, loggers: Sequence[Logger] = ()):
        self.path, self.writes, self.loggers = path, writes, loggers
        if not writes:
            return
        lines = [line for line in read_json_lines(path) if line["step"] <= step] if step else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def __enter__(self):
        return self

    def __exit__(self, error: type[BaseException] | None, *_):
        for logger in self.loggers:
            logger.close(failed=error is not None)

    def write(self, step: int, **values: Value) -> None:
        """A line with numbers and words. Numbers that are not finite are left out, because JSON has none."""
        if not self.writes:
            return
        values = {name: value for name, value in values.items() if isinstance(value, str) or math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for logger in self.loggers:
            logger.write(step, values)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: that torch allocated on a GPU, or that this process had resident in the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
