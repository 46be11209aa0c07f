"""Built-in sources to records, which are documents already."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transfusion.config import BUILT_IN, DigitsConfig, ShapesConfig
from transfusion.data.built_in.digits import Digits
from transfusion.data.built_in.photographs import Photographs
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.raw import RawDocument
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import Span

MAX_HELDOUT = 500  # documents of a source


class BuiltInContainer:
    """A built-in source, whose records are documents: first the held-out ones, then the training ones."""

    def __init__(self, name: str, shapes: ShapesConfig, limit: int | None):
        """`limit`: of its records."""
        self.train, heldout = (open_built_in(name, split, shapes=shapes) for split in ("train", "heldout"))
        limit = MAX_HELDOUT if limit is None else min(MAX_HELDOUT, limit // 20)
        self.heldout = [heldout[n] for n in range(min(len(heldout), limit))]

    def versions(self) -> list[tuple[str, Any]]:
        """What its documents depend on besides this package."""
        return sorted(self.train.describe().items()) if hasattr(self.train, "describe") else []

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        rows = len(self.heldout) + len(self.train)
        for first in range(0, rows, max_rows):
            yield Span("", first, min(max_rows, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, RawDocument]]:
        for row in range(span.first, span.first + span.rows):
            is_heldout = row < len(self.heldout)
            document = self.heldout[row] if is_heldout else self.train[row - len(self.heldout)]
            split = "heldout" if is_heldout else "train"
            yield f"{split}:{document.id}", replace(document, split=split)


def open_built_in(
    name: str, split: str, digits: DigitsConfig = DigitsConfig(), shapes: ShapesConfig = ShapesConfig()  # noqa: B008
) -> Any:
    """A built-in source by its name. ValueError for an unknown name."""
    match name:
        case "digits":
            return Digits(split, digits.interleaved)
        case "shapes":
            return Shapes(level=shapes.level, size=shapes.size, split=split)
        case "topics":
            return Topics(split)
        case "photographs":
            return Photographs(split)
        case _:
            raise ValueError(f"there is no source {name!r}; there are {', '.join(BUILT_IN)}")
