"""What every command shares: reading what was typed, saying things, and how far long work is."""

import difflib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import tyro

Device = Annotated[str, tyro.conf.arg(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")]


class UsageError(ValueError):
    """What was typed cannot be done; the message says why in one line."""


def parse(kind: type, name: str, arguments: list[str], default=tyro.MISSING_NONPROP):
    """The dataclass that was typed. --help, and values that an option cannot have, are told in tyro's words, exit code 2."""
    try:
        prog = f"transfusion {name}"
        found, unknown = tyro.cli(kind, default=default, args=arguments, prog=prog, return_unknown_args=True)
    except ValueError as error:  # what a config says of numbers that do not go together
        raise UsageError(str(error)) from None
    for word in unknown:
        is_option = word.startswith("-")
        wrong = f"there is no option {word}{nearest(word, _options(kind))}" if is_option else f"nothing takes {word!r} here"
        raise UsageError(f"{wrong}; transfusion {name} --help lists what there is")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device := getattr(found, "device", "auto")):
        raise UsageError(f"there is no device {device}; there are auto, cpu, cuda, cuda:0, cuda:1 ... and mps")
    return found


def _options(kind: type, prefix: str = "--") -> Iterator[str]:
    """The options of a dataclass, and of those in it."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        named = next((one.name for one in about if getattr(one, "name", None) is not None), name.replace("_", "-"))
        if is_dataclass(inner):
            yield from _options(inner, f"{prefix}{named}." if named else prefix)
        else:
            yield prefix + named


def nearest(word: str, known) -> str:
    """A hint at what may have been meant."""
    found = difflib.get_close_matches(word, known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def check_there(*places: str | Path | None) -> None:
    """FileNotFoundError when one of these files and folders is not there: before anything heavy is imported."""
    for place in places:
        if place is not None and not Path(place).exists():
            raise FileNotFoundError(f"there is no {place}")


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
