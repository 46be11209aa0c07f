"""The progress of training on the terminal: one line that fits its width, moves at every step and shows the time left."""

import sys
import time
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

MIN_BAR, MAX_BAR = 4, 40  # characters
GAP = 2  # between two parts of the line


class ProgressBar:
    """A bar on a terminal, elsewhere one line every ten seconds. With `shows` False nothing is printed.

    The line is: step, bar, time left, losses, speed, time elapsed. What does not fit the width is left out whole, from the
    end; the bar takes what is left.
    """

    INTERVAL = 10.0  # seconds between plain lines

    def __init__(self, steps: int, done: int, shows: bool = True):
        self.steps, self.step = steps, done
        self.start_time, self.first_time, self.first_step = time.monotonic(), None, None
        self.last_line = -self.INTERVAL
        self.losses = self.speed = ""
        self.console = Console(file=sys.stderr, quiet=not shows)
        self.live = Live(self, console=self.console, refresh_per_second=5) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def update(self, step: int, losses: str, speed: str) -> None:
        """Show the number of finished steps, the losses of the last one and the speed. Called after every step."""
        self.step, self.losses, self.speed = step, losses, speed
        if self.first_step is None:
            self.first_step, self.first_time = step, time.monotonic()
        if not self.live and (time.monotonic() - self.last_line >= self.INTERVAL or step == self.steps):
            self.last_line = time.monotonic()
            self.print_line("  ".join([f"step {step}/{self.steps}", *filter(None, (losses, speed)), self.time_left]))

    @property
    def time_left(self) -> str:
        """At the mean speed of the session. The first step does not count: it may compile."""
        if self.step >= self.steps:
            return "0:00:00 left"
        if self.first_step is None or self.step == self.first_step:
            return "-:--:-- left"
        seconds = (time.monotonic() - self.first_time) / (self.step - self.first_step) * (self.steps - self.step)
        return f"{format_time(seconds)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        step = f"step {self.step:>{len(str(self.steps))}}/{self.steps}"
        parts = [self.time_left, self.losses, self.speed, f"{format_time(time.monotonic() - self.start_time)} elapsed"]
        parts = list(filter(None, parts))
        while parts and _width(step, *parts) > options.max_width:
            parts.pop()
        space = options.max_width - _width(step, *parts) - GAP
        bar = [Bar(self.steps, self.step, width=min(space, MAX_BAR))] if space >= MIN_BAR else []
        cells = [Text(step), *bar, *map(Text, parts)]
        line = Table.grid(*[""] * len(cells), padding=(0, GAP, 0, 0), pad_edge=False)
        for column in line.columns:
            column.no_wrap = True
        line.add_row(*cells)
        yield line

    def print_line(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _width(*parts: str) -> int:
    return sum(map(len, parts)) + GAP * (len(parts) - 1)


def format_time(seconds: float) -> str:
    """h:mm:ss, with the days before it if there are any: 3 d 4:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
