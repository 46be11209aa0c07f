"""The progress of long work in named parts, in which an engine generates."""

from collections.abc import Callable, Iterable, Iterator

from transfusion.inference.engine import Engine

OnProgress = Callable[[int, int, str], None]


def ignore(done: int, total: int, part: str) -> None:
    """Shows no progress."""


def follow(engine: Engine, names: Iterable[str], on_progress: OnProgress) -> Iterator[str]:
    """Each name, to be worked on before the next is taken. `on_progress` gets the number of finished parts, the number of
    all, and the name of the present one with its finished answers of `engine.generate`, again after each answer."""
    names = list(names)
    for number, name in enumerate(names):
        on_progress(number, len(names), name)
        num_answers = 0

        def on_answer() -> None:
            nonlocal num_answers
            num_answers += 1
            on_progress(number, len(names), f"{name}, {num_answers:,} answers")  # noqa: B023 (called in this iteration)

        engine.on_answer = on_answer
        try:
            yield name
        finally:
            engine.on_answer = None
