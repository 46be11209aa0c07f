"""What all commands share: errors, lines on the terminal, and the progress of long work."""

import difflib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE = 10.0  # seconds between two lines of progress


class UsageError(Exception):
    """A command that is wrong as typed; the message is one line. Not a ValueError, which tyro would print in a box."""


def nearest(word: str, known) -> str:
    """A suggestion of similar known words, or nothing."""
    matches = difflib.get_close_matches(word, sorted(known), n=2)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def check_exists(*paths: str | Path | None) -> None:
    """FileNotFoundError when one of these files and folders does not exist. Called before anything heavy is imported."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}")


def print_status(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def fail(error: Exception, code: int) -> None:
    """Print an error and exit."""
    print_status(f"transfusion: {error}")
    sys.exit(code)


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator:
    """Yields `on_progress(done, total, part="")`, where `part` names what is under way: a bar as wide as the terminal,
    elsewhere a line every `PAUSE` seconds, nothing if `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if quiet:
        yield lambda done, total, part="": None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[left]}"))  # fmt: skip
        with Progress(*columns, console=console, transient=True, expand=True) as bar:
            task = bar.add_task(label, total=None, left="")
            yield lambda done, total, part="": bar.update(
                task, completed=done, total=total, description=part or label, left="left"
            )
    else:
        last = time.monotonic()

        def on_progress(done: int, total: int, part: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= PAUSE:
                last = time.monotonic()
                print_status(f"{label}: {done:,} of {total:,}{part and f', now {part}'}")

        yield on_progress
