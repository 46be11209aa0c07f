"""What every command shares: reading what was typed, saying things, and how far long work is."""

import difflib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import tyro

Device = Annotated[str, tyro.conf.arg(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")]


class UsageError(ValueError):
    """What was typed cannot be done; the message says why in one line."""


def parse(kind: type, name: str, arguments: list[str], default=tyro.MISSING_NONPROP):
    """The dataclass that was typed; its own words for --help and mistakes, exit code 2."""
    try:
        return tyro.cli(kind, default=default, args=arguments, prog=f"transfusion {name}")
    except ValueError as error:  # what a config says of numbers that do not go together
        raise UsageError(str(error)) from None


def nearest(word: str, known) -> str:
    """A hint at what may have been meant."""
    found = difflib.get_close_matches(word, known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fail(error: Exception, code: int) -> None:
    say(f"transfusion: {error}")
    sys.exit(code)


@contextmanager
def progress(what: str, quiet: bool = False) -> Iterator:
    """Gives `tick(done, total)`: a bar on a terminal, elsewhere a line every ten seconds; `quiet`: nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if quiet:
        yield lambda done, total: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(), TextColumn("left"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.monotonic()

        def tick(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                say(f"{what}: {done:,} of {total:,}")

        yield tick
