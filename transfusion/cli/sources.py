"""The sources of a data command and how they are read."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from transfusion.cli.ignored import changed, refuse
from transfusion.cli.screen import UsageError
from transfusion.config import SceneLevel, SceneSize, ShapesConfig
from transfusion.fields import PositiveInt

SOURCES = """\
SOURCE is a file or folder (images, .parquet, .tar, .jsonl, .json, .arrow, .txt; * matches any characters), an address
(s3://, https://, hf://...), owner/name on Hugging Face's hub, or a built-in source: digits, shapes, topics,
photographs. NAME=SOURCE names it. docs/data.md describes the files. inspect, stats and validate also take a folder that
`prepare` wrote."""


@dataclass(frozen=True)
class Reading:
    """The sources, and how their records are read."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")] = ()
    """Sources to read; transfusion data --help describes them."""
    form: str | None = None
    """Form of records: document, pair, text, image, conversation, messages, interleaved, mmc4, editing; else detected."""
    columns: tuple[str, ...] = ()
    """Other names of columns, for example caption=blip_caption image=jpg; id= alone means that there is no such column."""
    pictures: str | None = None
    """Folder of the images that a file names; the file's own folder if not set."""
    split: str | None = None
    """The only split to read, or all; if not set, train for training, and validation or test as the held-out documents."""
    limit: PositiveInt | None = None
    """Largest number of records to read of each source; all if not set."""
    shapes_size: SceneSize = 32
    """Side of the images of the source `shapes`, in pixels."""
    shapes_level: SceneLevel = 1
    """Content of an image of `shapes`: 0 is one object, 1 also two objects in a relation, 2 up to four objects;
    3 is one shaded object with continuous hue, size and place."""


def open_readers(reading: Reading, required: bool = True) -> list:
    """A reader for each source. UsageError or ValueError in one line."""
    from transfusion.data.reading.readers import ReaderOptions, open_reader

    if required and not reading.sources:
        raise UsageError(f"name a source.\n{SOURCES}")
    given = changed(Reading(), replace(reading, sources=()))
    has_shapes = any(source.rpartition("=")[2] == "shapes" for source in reading.sources)
    refuse(given, [(not has_shapes, "shapes_size shapes_level", "without the source shapes")])
    columns = {}
    for pair in reading.columns:
        field, equals, column = pair.partition("=")
        if not equals or not field:
            raise UsageError(f"--columns takes FIELD=COLUMN, for example caption=alt_text, not {pair!r}")
        columns[field] = column
    options = ReaderOptions(reading.form, columns, reading.pictures, reading.split, reading.limit,
                            ShapesConfig(reading.shapes_level, reading.shapes_size))  # fmt: skip
    return [open_reader(source, options) for source in reading.sources]
