"""Training output: metrics.jsonl, and a progress bar on the terminal."""

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from transfusion.disk import write_whole


class MetricsWriter:
    """Appends JSON objects to metrics.jsonl, one per line, each with its step. Lines after `step`, from before a crash, are
    removed first; the file is replaced atomically. With `writes` False (other ranks than 0) nothing is written."""

    def __init__(self, path: Path, step: int, writes: bool = True):
        self.path, self.writes = path, writes
        if not writes:
            return
        lines = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write(self, step: int, **values) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of the file, [] without a file. A last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class ProgressBar:
    """A progress bar on a terminal, else one line every ten seconds. With `shows` False nothing is printed."""

    INTERVAL = 10.0  # seconds between plain lines

    def __init__(self, steps: int, done: int, shows: bool = True):
        self.steps, self.start_time, self.first_step = steps, time.monotonic(), done
        self.last_line = -self.INTERVAL
        self.console = Console(file=sys.stderr, quiet=not shows)
        self.bar = None
        if self.console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=24), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def update(self, step: int, description: str) -> None:
        """Show the step and its description."""
        if self.bar:
            self.bar.update(self.task, completed=step, description=description)
        elif time.monotonic() - self.last_line >= self.INTERVAL or step == self.steps:
            self.last_line = time.monotonic()
            left = (self.last_line - self.start_time) / max(1, step - self.first_step) * (self.steps - step)
            self.print_line(f"step {step}/{self.steps}  {description}  {left:.0f} s left")

    def print_line(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
