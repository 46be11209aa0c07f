"""transfusion data validate | inspect | stats | prepare: what people have, looked at and made ready."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.codec import fit_codec
from transfusion.cli.screen import UsageError, check_there, fail, nearest, parse, progress, say
from transfusion.cli.sources import SOURCES, Reading, Sources, open_readers
from transfusion.config import PrepareConfig
from transfusion.disk import CONFIG, RUN, check_codec, check_prepared

VERBS = {
    "validate": "read everything once and list what cannot be used, by file and row",
    "inspect": "show documents as a page with thumbnails",
    "stats": "count texts, tokens, images, lengths and sizes, per source",
    "prepare": "encode everything once, for training",
    "fit-codec": "train an autoencoder on pictures, for prepare --codec",
}
SHOWN = 10  # faults that are named on the screen

@dataclass(frozen=True)
class Validate:
    """Read everything once and list what cannot be used, by file and row. Exit code 1 when there is any fault."""

    sources: Sources = ()
    """What to read; see transfusion data --help."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    faults: Path | None = None
    """A file for all faults, one JSON object a line; on the screen are the first ten of each source."""


@dataclass(frozen=True)
class Inspect:
    """Show the first documents of a source (or some of a prepared folder) as a page with thumbnails."""

    sources: Sources = ()
    """What to read; see transfusion data --help."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    count: int = 24
    """Documents of each source."""
    out: Path = Path("inspect.html")
    """The page."""


@dataclass(frozen=True)
class Stats:
    """Count texts, tokens, images, lengths and sizes, per source."""

    sources: Sources = ()
    """What to read; see transfusion data --help."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    tokenizer: Path | None = None
    """A tokenizer.json to count tokens with; without it one is trained on the first documents, as prepare does."""


@dataclass(frozen=True)
class Prepare:
    """Encode everything once: text into ids, pictures into latents. The same command again goes on where it stopped.

    Under torchrun the work is spread over its processes; the result is the same.
    """

    out: Path
    """The folder to make."""
    sources: Sources = ()
    """What to read; see transfusion data --help."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


def data(arguments: list[str]) -> None:
    """Do one of the five."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion data COMMAND SOURCE... [options]\n")
        print(*(f"  {verb:11}{what}" for verb, what in VERBS.items()), sep="\n")
        print(f"\n{SOURCES}\ntransfusion data COMMAND --help lists every option.")
        sys.exit(0 if arguments else 2)
    verb, rest = arguments[0], arguments[1:]
    match verb:
        case "validate":
            validate(parse(Validate, "data validate", rest))
        case "inspect":
            inspect(parse(Inspect, "data inspect", rest))
        case "stats":
            stats(parse(Stats, "data stats", rest))
        case "prepare":
            prepare(parse(Prepare, "data prepare", rest))
        case "fit-codec":
            fit_codec(rest)
        case _:
            raise UsageError(f"there is no command data {verb}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")


def validate(asked: Validate) -> None:
    """Faults to the screen and, if asked for, to a file."""
    prepared, readers = _open(asked)

    from transfusion.data.survey import survey

    if asked.faults:
        asked.faults.parent.mkdir(parents=True, exist_ok=True)
    for folder in prepared:
        folder.verify()
        print(f"{folder.folder}: every shard is as it was written")
    lines, total = [], 0
    for reader in readers:
        first = []

        def hear(fault, first=first, reader=reader) -> None:
            lines.append({"source": reader.name, "kind": fault.kind, "where": fault.where, "message": fault.message})
            first.extend([f"    {fault}"] if len(first) < SHOWN else ())

        with progress(f"reading {reader.name}") as tick:
            found = survey(reader, None, hear, tick)
        total += found.faults.total()
        documents, faults = found.documents.total(), found.faults.total()
        print(f"{found.name}: {found.records:,} records, {documents:,} documents, {faults:,} faults")
        for line in (*(f"  {count:,} {kind}" for kind, count in found.faults.most_common()), *first):
            print(line)
    if asked.faults:
        asked.faults.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if total:
        fail(ValueError(f"{total:,} faults{f', all in {asked.faults}' if asked.faults else ''}"), 1)


def inspect(asked: Inspect) -> None:
    """The page."""
    if asked.count < 1:
        raise UsageError(f"--count must be at least 1, not {asked.count}")
    prepared, readers = _open(asked)

    from transfusion.data.inspect import show_prepared, show_source
    from transfusion.page import Page

    page = Page(", ".join([*(folder.folder.name for folder in prepared), *(reader.name for reader in readers)]), "Documents")
    for folder in prepared:
        show_prepared(page, folder, asked.count)
    for reader in readers:
        show_source(page, reader, asked.count)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    say(f"wrote {page.write(asked.out)}")


def stats(asked: Stats) -> None:
    """One table a source."""
    check_there(asked.tokenizer)
    prepared, readers = _open(asked)

    from transfusion.codecs.text import Tokenizer
    from transfusion.data.fitting import train_tokenizer
    from transfusion.data.survey import first_texts, survey, survey_prepared

    if asked.tokenizer is not None:
        tokenizer = Tokenizer.from_file(asked.tokenizer)
    elif readers:
        say("training a tokenizer on the first documents, to count tokens with")
        tokenizer = train_tokenizer(first_texts(readers, PrepareConfig().fit_documents), None)
    found = [one for folder in prepared for one in survey_prepared(folder)]
    for reader in readers:
        with progress(f"reading {reader.name}") as tick:
            found.append(survey(reader, tokenizer, on_progress=tick))
    for one in found:
        print(one.name)
        print(*(f"  {what:14}{how_much}" for what, how_much in one.rows()), sep="\n")


def prepare(asked: Prepare) -> None:
    """A prepared folder, made or gone on with; under torchrun by all its processes."""
    check_there(asked.config.tokenizer)
    if asked.config.like is not None and not any((Path(asked.config.like) / name).exists() for name in (RUN, CONFIG)):
        check_prepared(Path(asked.config.like))
    codec = asked.config.codec
    if codec not in ("auto", "pixels", "block_pca") and codec.count("/") != 1 and not (Path(codec) / CONFIG).exists():
        check_codec(Path(codec))
    readers = open_readers(asked.sources, asked.reading)

    from transfusion.data import prepare as preparing
    from transfusion.parallel import Ranks

    with Ranks.of_torchrun() as ranks:
        first = ranks.rank == 0
        for reader in readers if first else ():
            say(reader.describe())
        existed = (asked.out / "dataset.json").exists()
        with progress("preparing", quiet=not first) as tick:
            about = preparing.prepare(
                readers, asked.config, asked.out, ranks.rank, ranks.world, ranks.barrier, tick, say if first else _nothing
            )
    if first:
        sizes = ", ".join("{}x{}".format(*size) for size in about["sizes"])
        say(f"{asked.out} {'was prepared already' if existed else 'is prepared'}: tokenizer of "
            f"{about['tokenizer']['size']:,} ids, codec {about['codec']['kind']}, pictures of {sizes}")  # fmt: skip
        for name, source in about["sources"].items():
            documents, faults = source["documents"], Counter(source["faults"])
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in faults.items())
            left_out = f"; {faults.total():,} left out ({kinds}): see {asked.out / 'quarantine.jsonl'}" if faults else ""
            say(f"  {name}: {documents['train']:,} to train on, {documents['heldout']:,} held out{left_out}")


def _nothing(line: str) -> None:
    """What the other processes say."""


def _open(asked: Validate | Inspect | Stats) -> tuple[list, list]:
    """The prepared folders among the sources, and readers of the others."""
    prepared = [source for source in asked.sources if os.path.exists(os.path.join(source, "recipe.json"))]
    others = [source for source in asked.sources if source not in prepared]
    readers = open_readers(others, asked.reading, needed=not prepared)
    for reader in readers:
        say(reader.describe())
    if not prepared:
        return [], readers
    from transfusion.data.store import open_prepared

    return [open_prepared(Path(folder)) for folder in prepared], readers
