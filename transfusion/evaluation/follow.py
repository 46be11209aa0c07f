"""The progress of long work in named parts, in which an engine generates."""

from collections.abc import Callable, Iterable, Iterator

from transfusion.inference.engine import Engine

OnProgress = Callable[[int, int, str], None]


def ignore(done: int, total: int, part: str) -> None:
    """Shows no progress."""


def follow(engine: Engine, names: Iterable[str], on_progress: OnProgress) -> Iterator[str]:
    """Each name, to be worked on before the next is taken. `on_progress` gets the number of finished parts, the number of
    all, and the name of the present one with its finished answers of `engine.generate`, again after each of its steps."""
    names = list(names)
    for number, name in enumerate(names):
        on_progress(number, len(names), name)
        num_answers = 0

        def on_step(num_finished: int) -> None:
            nonlocal num_answers
            num_answers += num_finished
            on_progress(number, len(names), f"{name}, {num_answers:,} answers")  # noqa: B023 (called in this iteration)

        before, engine.on_step = engine.on_step, on_step
        try:
            yield name
        finally:
            engine.on_step = before
