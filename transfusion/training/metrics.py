"""What training says of itself: lines in metrics.jsonl, and a bar on the screen."""

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Metrics:
    """Appends one JSON object per line, each with its step; lines after a crash are cut off when the run goes on.

    On ranks but the first (`writes` False) nothing is written.
    """

    def __init__(self, path: Path, step: int, writes: bool = True):
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **values) -> None:
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All whole lines; none when there is no file. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class ProgressBar:
    """A progress bar on a terminal; elsewhere a line every ten seconds; on ranks but the first (`shows` False) nothing."""

    EVERY = 10.0  # seconds between plain lines

    def __init__(self, steps: int, done: int, shows: bool = True):
        self.steps, self.begun, self.first = steps, time.monotonic(), done
        self.last_line = -self.EVERY
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

    def show(self, step: int, line: str) -> None:
        """How far it is and what there is to say of it."""
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        elif time.monotonic() - self.last_line >= self.EVERY or step == self.steps:
            self.last_line = time.monotonic()
            left = (self.last_line - self.begun) / max(1, step - self.first) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {line}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
