"""transfusion data validate | inspect | stats | prepare: check, show, count and encode training data."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.codec import fit_codec
from transfusion.cli.ignored import changed, check_prepare, refuse
from transfusion.cli.options import Device, parse
from transfusion.cli.screen import UsageError, check_exists, fail, nearest, print_status, progress
from transfusion.cli.sources import SOURCES, Reading, open_readers
from transfusion.config import ChatLayout
from transfusion.data.config import PrepareConfig
from transfusion.disk import CONFIG, RUN, check_codec, check_prepared, find_folder
from transfusion.fields import PositiveInt

NUM_SHOWN = 10  # faults of each source that are printed


@dataclass(frozen=True)
class Validate:
    """Read all records and list the unusable ones by file and row. Exit code 1 when there is one, or no document."""

    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    faults: Path | None = None
    """File for all faults as JSON lines; not written if not set; the first ten of each source are printed anyway."""


@dataclass(frozen=True)
class Inspect:
    """Show the first documents of a source, or some of a prepared folder, on a page with thumbnails."""

    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    count: PositiveInt = 24
    """Number of documents of each source."""
    out: Path = Path("inspect.html")
    """File of the page."""


@dataclass(frozen=True)
class Stats:
    """Count texts, tokens, images, lengths and sizes, per source."""

    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    tokenizer: Path | None = None
    """The tokenizer.json that counts tokens; if not set, a tokenizer is trained on the first documents, as in prepare."""


@dataclass(frozen=True)
class Prepare:
    """Encode all documents once: text into ids, images into latents. The same command resumes it. Under torchrun all
    processes share the work, with the same result."""

    out: Path
    """Folder of the prepared data."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)
    device: Device = "auto"


def validate(args: Validate) -> None:
    """Print the faults, and write all of them to the file of --faults if it is set."""
    folders, readers = _open(args)

    from transfusion.data.leaks import count_leaks
    from transfusion.data.reading.account import counted
    from transfusion.data.summaries import count_processes
    from transfusion.data.survey import Duplicates, survey

    if args.faults:
        args.faults.parent.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        folder.verify()
        print(f"{folder.folder}: all shards match their SHA-256")
    if folders:
        print(*count_leaks([(folder.folder, folder.metadata) for folder in folders]).lines(), sep="\n")
    records, total, empty, duplicates = [], 0, [], Duplicates()
    for reader in readers:
        lines = []

        def on_fault(fault, lines=lines, reader=reader) -> None:
            records.append({"source": reader.name, "kind": fault.kind, "where": fault.where, "message": fault.message})
            lines.extend([f"    {fault}"] if len(lines) < NUM_SHOWN else ())

        with progress(f"reading {reader.name}") as on_progress:
            counts = survey(reader, None, on_fault, on_progress, duplicates, count_processes())
        documents, faults = counts.documents.total(), counts.faults.total()
        total += faults
        empty += [] if documents else [counts.name]
        numbers = {"record": counts.records, "document": documents, "fault": faults}
        print(f"{counts.name}: {', '.join(counted(number, noun) for noun, number in numbers.items())}")
        if splits := reader.describe_splits():
            print(f"  {splits}")
        if heldout := counts.splits["heldout"]:
            print(f"  {counted(documents - heldout, 'document')} for training, {heldout:,} held out")
        print_account(counts.account, print)
        for line in ("  the first faults:", *lines) if lines else ():
            print(line)
    if readers:
        print(duplicates)
    if in_both := duplicates.in_both_splits():
        print(in_both)
    if args.faults:
        args.faults.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if empty and not total:
        fail(ValueError(f"{', '.join(empty)}: no documents"), 1)
    if total:
        fail(ValueError(f"{counted(total, 'fault')}{f', all in {args.faults}' if args.faults else ''}"), 1)


def inspect(args: Inspect) -> None:
    """Write the page."""
    folders, readers = _open(args)

    from transfusion.data.inspect import show_prepared, show_source
    from transfusion.page import Page

    page = Page(", ".join([*(folder.folder.name for folder in folders), *(reader.name for reader in readers)]), "Documents")
    for folder in folders:
        show_prepared(page, folder, args.count)
    for reader in readers:
        print_account(show_source(page, reader, args.count), print_status)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print_status(f"wrote {page.write(args.out)}")


def stats(args: Stats) -> None:
    """Print one table for each source."""
    check_exists(args.tokenizer)
    folders, readers = _open(args)
    if args.tokenizer is not None and not readers:
        raise UsageError("--tokenizer has no effect on prepared folders, which are encoded")

    from transfusion.codecs.text import Tokenizer
    from transfusion.data.fitting import train_tokenizer
    from transfusion.data.summaries import count_processes
    from transfusion.data.survey import first_texts, survey, survey_prepared

    if args.tokenizer is not None:
        tokenizer = Tokenizer.from_file(args.tokenizer)
    elif readers:
        print_status("training a tokenizer on the first documents, to count tokens with")
        tokenizer = train_tokenizer(first_texts(readers, PrepareConfig().fit_documents), None)
    surveys = [source for folder in folders for source in survey_prepared(folder)]
    for reader in readers:
        with progress(f"reading {reader.name}") as on_progress:
            surveys.append(survey(reader, tokenizer, on_progress=on_progress, processes=count_processes()))
    for source in surveys:
        print(source.name)
        print(*(f"  {name:14}{value}" for name, value in source.rows()), sep="\n")
        print_account(source.account, print)


def prepare(args: Prepare) -> None:
    """Create a prepared folder or resume it; under torchrun with all its processes."""
    like, codec = args.config.like, args.config.codec
    check_prepare(args.config)
    check_exists(args.config.tokenizer)
    if like is not None and not any(((folder := find_folder(like)) / name).exists() for name in (RUN, CONFIG)):
        check_prepared(folder)
    if codec not in ("auto", "pixels", "block_pca") and codec.count("/") != 1 and not (Path(codec) / CONFIG).exists():
        check_codec(Path(codec))
    texts = {name: text.replace("\\n", "\n") for name, text in asdict(args.config.chat).items()}  # no shell needs quotes
    config = replace(args.config, chat=ChatLayout(**texts))
    readers = open_readers(args.reading)

    from transfusion.data import prepare as preparation
    from transfusion.data.leaks import Leaks
    from transfusion.data.reading.account import Account
    from transfusion.parallel import Ranks, pick_device

    device = pick_device(args.device, shared=True)
    with Ranks.of_torchrun() as ranks:
        is_main = ranks.rank == 0
        for reader in readers if is_main else ():
            print_status(reader.describe())
        existed = (args.out / "dataset.json").exists()
        with progress("preparing", quiet=not is_main) as on_progress:
            dataset = preparation.prepare(
                readers, config, args.out, ranks.rank, ranks.world, ranks.barrier, on_progress,
                print_status if is_main else lambda line: None, device,
            )  # fmt: skip
    if is_main:
        sizes = ", ".join("{}x{}".format(*size) for size in dataset["sizes"])
        print_status(f"{args.out} {'was prepared already' if existed else 'is prepared'}: tokenizer of "
            f"{dataset['tokenizer']['size']:,} ids, codec {dataset['codec']['kind']}, pictures of {sizes}")  # fmt: skip
        for name, source in dataset["sources"].items():
            documents, faults = source["documents"], Counter(source["faults"])
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in faults.items())
            left_out = f"; {faults.total():,} left out ({kinds}): see {args.out / 'quarantine.jsonl'}" if faults else ""
            print_status(f"  {name}: {documents['train']:,} to train on, {documents['heldout']:,} held out{left_out}")
            print_account(Account.from_json(source["account"]), print_status, "    ")
            if not documents["heldout"]:
                print_status(f"  warning: nothing of {name} is held out, so it has no held-out figures: add documents or "
                             "raise --heldout")  # fmt: skip
        for line in Leaks(**dataset["leaks"]).lines():
            print_status(f"  {line}")


def print_account(account, write: Callable[[str], None], indent: str = "  ") -> None:
    """Print what was passed over, by reason."""
    for line in account.lines():
        write(indent + line)


def _open(args: Validate | Inspect | Stats) -> tuple[list, list]:
    """The prepared folders among the sources, and readers of the others."""
    prepared = [source for source in args.reading.sources if os.path.exists(os.path.join(source, "recipe.json"))]
    others = tuple(source for source in args.reading.sources if source not in prepared)
    given = changed(Reading(), replace(args.reading, sources=()))
    refuse(given, [(not others, " ".join(given), "on prepared folders: their records are read already")])
    readers = open_readers(replace(args.reading, sources=others), required=not prepared)
    for reader in readers:
        print_status(reader.describe())
    if not prepared:
        return [], readers
    from transfusion.data.store import open_prepared

    return [open_prepared(Path(folder)) for folder in prepared], readers


COMMANDS = {  # -> the function, the class of its options, and a description
    "validate": (validate, Validate, "read all records and list the unusable ones by file and row"),
    "inspect": (inspect, Inspect, "show documents on a page with thumbnails"),
    "stats": (stats, Stats, "count texts, tokens, images, lengths and sizes, per source"),
    "prepare": (prepare, Prepare, "encode all documents once, for training"),
    "fit-codec": (fit_codec, None, "train an autoencoder on images, for prepare --codec"),
}


def data(arguments: list[str]) -> None:
    """Execute one of the commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion data COMMAND SOURCE... [options]\n")
        print(*(f"  {command:11}{description}" for command, (_, _, description) in COMMANDS.items()), sep="\n")
        print(f"\n{SOURCES}\ntransfusion data COMMAND --help lists every option.")
        sys.exit(0 if arguments else 2)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UsageError(f"there is no command data {command}{nearest(command, COMMANDS)}; there are {known}")
    execute, options, _ = COMMANDS[command]
    execute(parse(options, f"data {command}", rest) if options else rest)
