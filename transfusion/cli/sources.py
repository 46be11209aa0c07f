"""Which sources were typed, and how they are to be read: what every data command shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from transfusion.cli.screen import UsageError
from transfusion.config import ShapesConfig

SOURCES = """\
SOURCE is a file or folder (pictures, .parquet, .tar, .jsonl, .json, .arrow, .txt; * stands for any letters), an address
(s3://, https://, hf://...), owner/name on Hugging Face's hub, or digits, shapes, topics, emoji, photographs, which need no
files; NAME=SOURCE names it. docs/data.md shows what the files may look like. inspect, stats and validate also take a folder
that `prepare` made."""

Sources = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]


@dataclass(frozen=True)
class Reading:
    form: str | None = None
    """What a record is: document, pair, text, image, conversation, messages, interleaved, mmc4, editing; else found out."""
    columns: tuple[str, ...] = ()
    """Whose columns are called otherwise: caption=blip_caption image=jpg ...; id= alone: do not read it."""
    pictures: str | None = None
    """The folder from which the paths of pictures are counted, if not that of the file that names them."""
    split: str = "train"
    """Which of several splits to read, where files or folders are named after them."""
    limit: int | None = None
    """Read only so many records of each source."""
    shapes_size: int = 32
    """Pixels along one side of the pictures of the source `shapes`."""
    shapes_level: int = 1
    """How much there is in them: 0 one thing, 1 also two in a relation, 2 up to four."""


def open_readers(sources: Sequence[str], reading: Reading, needed: bool = True) -> list:
    """Readers of all sources, as the options say. UsageError or ValueError in one line."""
    from transfusion.data.reading.readers import ReaderOptions, open_reader

    if needed and not sources:
        raise UsageError(f"name a source.\n{SOURCES}")
    columns = {}
    for pair in reading.columns:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours:
            raise UsageError(f"--columns takes ours=theirs, for example caption=alt_text, not {pair!r}")
        columns[ours] = theirs
    if reading.limit is not None and reading.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {reading.limit}")
    options = ReaderOptions(reading.form, columns, reading.pictures, reading.split, reading.limit,
                            ShapesConfig(reading.shapes_level, reading.shapes_size))  # fmt: skip
    return [open_reader(source, options) for source in sources]
