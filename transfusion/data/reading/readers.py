"""Readers: a path, an address or a name -> documents and faults, unit by unit.

A unit is a number of records that one process prepares into one shard. Units depend only on the files. The split of a
record is that of its column, its folder in an archive, or its file, in this order.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transfusion.config import BUILT_IN, ChatLayout, ShapesConfig
from transfusion.data.raw import Fault, RawDocument
from transfusion.data.reading.account import Account, counted
from transfusion.data.reading.built_in import BuiltInContainer
from transfusion.data.reading.choose import choose_containers
from transfusion.data.reading.columns import (
    CONVERSATIONS,
    FORMS,
    Form,
    describe_record,
    detect_form,
    form_among,
    read_columns,
    rename_columns,
)  # fmt: skip
from transfusion.data.reading.container import Container, Span
from transfusion.data.reading.conversations import unread_keys
from transfusion.data.reading.files import Files
from transfusion.data.reading.folders import PictureFolder, find_beside
from transfusion.data.reading.images import RecordImageReader
from transfusion.data.reading.listing import Listing
from transfusion.data.reading.records import split_captions, to_document
from transfusion.data.reading.splits import (
    ALL,
    canonical,
    describe_missing_split,
    split_of_name,
    split_of_record,
    uses_of_splits,
)  # fmt: skip
from transfusion.data.reading.values import has_words, printable

NUM_SAMPLES = 100  # records that are read to detect their form


@dataclass(frozen=True)
class ReaderOptions:
    """How a source is read."""

    form: Form | None = None  # of its records; None: detected
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> its column; "": not read
    image_root: str | None = None  # the folder that image paths are relative to
    split: str | None = None  # the only one to read; None: train for training, validation or test to be held out
    limit: int | None = None  # number of records
    shapes: ShapesConfig = ShapesConfig()


@dataclass(frozen=True)
class Unit:
    """Records that are prepared together, of one container."""

    spans: tuple[Span, ...]
    container: Container
    split: str  # of their files, "" without one

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)


class Reader:
    """A source of documents. `name` is its name in a data set and in the configuration of a run."""

    def __init__(
        self, name: str, address: str, containers: Mapping[str, Container], options: ReaderOptions,
        files: Files | None = None, listing: Listing | None = None,
    ):  # fmt: skip
        """`containers`: by the split of their files, "" without one."""
        self.name, self.address, self.containers, self.options = name, address, containers, options
        self.files, self.listing = files, listing
        self.split = options.split and canonical(options.split)
        self.forms: set[Form] = set()  # of the first records
        self.columns: set[str] = set()  # that the most frequent one reads
        self.unread_texts: list[str] = []  # columns of images that may be captions
        self.has_split_column = False  # in the first records
        self.listed = Account()  # of what `units` lists
        self.uses: dict[str, str] = {}  # of splits, see `uses_of_splits`
        self.form = options.form if files is None else self._detect_form()

    @property
    def declares_split(self) -> bool:
        """Whether each of its documents is declared as training or held-out. Known after `units`."""
        return self.files is None or "heldout" in self.uses.values()

    @property
    def is_local(self) -> bool:
        """Whether its files are on this machine's disks."""
        return self.files is not None and self.files.is_local

    def units(self, max_rows: int) -> list[Unit]:
        """All records in order, in units of about `max_rows` records at most. ValueError if there are no records."""
        listed = Account()
        units = [unit for split, limit in self._limits().items() for unit in self._units_of(split, max_rows, limit, listed)]
        if not units:
            raise ValueError(f"{self.address} has no records")
        listed.find("records", sum(unit.rows for unit in units))
        self.listed = listed
        found = self._find_splits(units)
        self.uses = uses_of_splits(found, self.split)
        if self.files is not None and all(self.uses.get(split, "heldout") == "heldout" for split in found):
            limit = self.options.limit
            part = self.address if limit is None else f"the first {counted(limit, 'record')} of {self.address}"
            raise ValueError(describe_missing_split(self.split or "train", part, found))
        return units

    def _limits(self) -> dict[str, int | None]:
        """The largest number of records of each container. Of those that are held out, it is a twentieth of the limit."""
        limit, (first, *others) = self.options.limit, self.containers
        heldout = 0 if limit is None or not others else min(limit - 1, -(-limit // 20))
        return {first: None if limit is None else limit - heldout, **dict.fromkeys(others, limit and heldout)}

    def _units_of(self, split: str, max_rows: int, limit: int | None, listed: Account) -> Iterator[Unit]:
        """The units of one container. With a limit it is listed record by record: what is behind the limit is not in the
        account."""
        container, pending, remaining = self.containers[split], [], limit
        for span in container.spans(max_rows if limit is None else 1, listed) if limit != 0 else ():
            if remaining is not None:
                span = replace(span, rows=min(span.rows, remaining))
                remaining -= span.rows
            if pending and sum(earlier.rows for earlier in pending) + span.rows > max_rows:
                yield Unit(tuple(pending), container, split)
                pending = []
            if pending and pending[-1].continues_in(span):
                pending[-1] = replace(pending[-1], rows=pending[-1].rows + span.rows)
            else:
                pending.append(span)
            if remaining == 0:
                break
        if pending:
            yield Unit(tuple(pending), container, split)
        if remaining == 0 and self.listing is not None:
            for index in self._files_behind(container, pending[-1] if pending else None):
                self.listing.decide(index, "behind the limit of records")

    def _files_behind(self, container: Container, last: Span | None) -> Iterator[int]:
        """The files of a container that are not reached: those behind the last span, or all."""
        if isinstance(container, PictureFolder):
            for index in container.indices[last.first + last.rows if last else 0 :]:
                yield from (index, *find_beside(self.listing, index))
        else:
            for path in islice(container.paths, list(container.paths).index(last.path) + 1 if last else 0, None):
                yield self.listing.index_of(path)

    def _find_splits(self, units: Sequence[Unit]) -> set[str]:
        """The splits of all records. A column of splits must be read to the end: the last rows may be those held out."""
        spans = [(unit, span) for unit in units for span in unit.spans]
        found = {self._split_of({}, unit.split or span.split) for unit, span in spans}
        if self.has_split_column and self.split not in (*found, "train", ALL):
            found = {
                self._split_of({} if isinstance(record, Fault) else rename_columns(record, self.options.columns),
                               unit.split or span.split)
                for unit, span in spans for _, record in unit.container.records(span)
            }  # fmt: skip
        return found

    def _split_of(self, record: dict, split: str) -> str:
        """The split of a record, or `split`, that of its file or folder."""
        return "" if self.split == ALL else split_of_record(record, self.split or "train") or split

    def describe_splits(self) -> str:
        """What its splits are for, or "" if they need no words. Known after `units`."""
        heldout = next((split for split, use in self.uses.items() if use == "heldout"), None)
        if heldout:
            return f"the split {heldout} is held out"
        name = self.address.rstrip("/").rpartition("/")[2]
        only = self.split or split_of_name(name, "train", is_anywhere=True) or ALL
        if only in ("train", ALL):
            return ""
        return f"only the split {only} is read, and it is for training; in one source with train it is held out"

    def read(
        self, unit: Unit, account: Account | None = None, chat: ChatLayout = ChatLayout()  # noqa: B008 (frozen)
    ) -> Iterator[RawDocument | Fault]:
        """The unit's documents in order; a fault instead of each record that cannot be read. What becomes of each record is
        counted in the account. `chat`: see `to_document`."""
        account = Account() if account is None else account
        for span in unit.spans:
            notes: list[tuple[str, str]] = []  # on images of the current record, with their names
            images = self._image_reader(unit.container, span, account, notes)
            for where, record in unit.container.records(span):
                for item in self._read_record(printable(where), record, unit.split or span.split, images, account, chat):
                    if isinstance(item, Fault):
                        item = Fault(item.kind, printable(item.message), item.where or printable(where))
                        account.pass_over("records", item.kind, item.where)
                    else:
                        account.read("records", "document")
                    yield item
                while notes:
                    note, name = notes.pop()
                    account.note(note, printable(name or where))

    def close_account(self, account: Account) -> None:
        """Add what is known from listing the files to the account of all units. After that it is closed."""
        account.add(self.listed)
        if self.listing is not None:
            self.listing.count(account)
        account.named = bytearray()

    def _image_reader(
        self, container: Container, span: Span, account: Account, notes: list[tuple[str, str]]
    ) -> RecordImageReader | None:
        """A reader of the images of a span's records; the account lists which files they name."""
        def name_file(path: str) -> None:
            if (index := self.listing.index_of(path)) is not None:
                account.name_file(index)

        if self.files is None:
            return None
        files, is_folder = container.files, isinstance(container, PictureFolder)
        on_file: Callable[[str], None] = (lambda path: None) if is_folder else name_file
        path = span.path or f"{files.root}/."
        return RecordImageReader.of(files, path, on_file, lambda *note: notes.append(note))

    def _read_record(
        self, where: str, record: Any, split: str, images: RecordImageReader | None, account: Account, chat: ChatLayout
    ) -> Iterator[RawDocument | Fault]:
        """The documents of a record, several if it has several captions; a fault if it has none. `split`: of its file."""
        if isinstance(record, RawDocument):
            yield replace(record, where=where)
            return
        if isinstance(record, Fault):
            yield record
            return
        if record.get("status") == "failed_to_download" and "key" in record:  # written by img2dataset
            account.pass_over("records", "not downloaded by img2dataset", where)
            return
        renamed = rename_columns(record, self.options.columns)
        if (split := self._split_of(renamed, split)) not in self.uses:
            account.pass_over("records", "of another split", where)
            return
        try:
            form = self.options.form or form_among(renamed, self.form, self.columns)
            parts = split_captions(renamed, form)
        except Fault as fault:
            yield fault
            return
        account.find("records", len(parts) - 1)
        self._count_fields(renamed, form, account)
        for number, part in enumerate(parts, 1):
            place = where if len(parts) == 1 else f"{where} caption {number}"
            try:
                document = to_document(form, part, images, chat, place)
            except Fault as fault:
                yield Fault(fault.kind, fault.message, place)
            except RecursionError:
                yield Fault("bad JSON", "it is nested too deeply", place)
            else:
                account.forms[form] += 1
                yield replace(document, split=self.uses[split])

    def _count_fields(self, record: dict, form: Form, account: Account) -> None:
        """Count the values of a record, by column: what is read of it, and what is not."""
        names = [name for name, value in record.items() if value is not None]
        read = read_columns(record, form)
        unread = [*(name for name in names if name not in read), *(unread_keys(record) if form in CONVERSATIONS else ())]
        account.find("fields", len(read) + len(unread))
        account.read("fields", "value", len(read))
        for name in unread:
            account.pass_over("fields", f"in {printable(name)[:40]!r}")

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of its files: it differs after any file is changed, added or renamed. For a
        built-in source: over the Python version that its documents depend on."""
        digest = hashlib.sha256()
        built_in = self.containers.get("")
        for version in built_in.versions() if self.files is None else self.files.versions(self.listing):
            digest.update(repr(version).encode())
        return digest.hexdigest()

    def has_conversations(self) -> bool:
        """Whether a record is read as a conversation. If the first records do not show one, all are searched."""
        if self.options.form is not None or self.files is None:
            return self.form in CONVERSATIONS
        if not self.forms.isdisjoint(CONVERSATIONS):
            return True
        records = (record for _, record in islice(self._records(), self.options.limit) if isinstance(record, dict))
        return any(describe_record(rename_columns(record, self.options.columns))[0] in CONVERSATIONS for record in records)

    def _records(self) -> Iterator[tuple[str, Any]]:
        """(where, record or fault) of all of them, read in small spans: for as many of the first ones as are needed."""
        return (item for container in self.containers.values() for span in container.spans(NUM_SAMPLES, Account())
                for item in container.records(span))  # fmt: skip

    def describe(self) -> str:
        """How it is read, in one line."""
        if self.files is None:
            hint = f"; the local path of this name is ./{self.address}" if os.path.exists(self.address) else ""
            return f"{self.name}: built in{hint}"
        columns = f" ({', '.join(map(printable, sorted(self.columns)))})" if self.columns else ""
        texts = ", ".join(map(printable, self.unread_texts))
        hint = f"; warning: the text in {texts} is not read: --columns caption=NAME chooses the captions" if texts else ""
        return f"{self.name}: records are read as {self.form}{columns}{hint}"

    def _detect_form(self) -> Form:
        """The configured form, or the most frequent one of the first records. ValueError when no record has a form."""
        counts: Counter[Form] = Counter()
        columns: dict[Form, set[str]] = {}
        texts: Counter[str] = Counter()  # columns with several words that images have and do not read
        faults: list[Fault] = []
        all_columns: set[str] = set()
        for where, record in islice(self._records(), NUM_SAMPLES):
            try:
                if isinstance(record, Fault):
                    raise record
                all_columns.update(record)
                renamed = rename_columns(record, self.options.columns)
                self.has_split_column |= split_of_record(renamed, self.split or "train") is not None
                form = self.options.form or detect_form(renamed)
                counts[form] += 1
                read = set(read_columns(renamed, form))
                columns.setdefault(form, read - {"id"})
                if form == "image":
                    texts.update(name for name in renamed.keys() - read if has_words(renamed[name]))
            except Fault as fault:
                faults.append(Fault(fault.kind, printable(fault.message), printable(where)))
        missing = [name for name in self.options.columns.values() if name and name not in all_columns]
        if all_columns and missing:
            existing = printable(", ".join(sorted(all_columns)))
            raise ValueError(f"{self.address} has no column {missing[0]!r}, only {existing}")
        if self.options.form is None and not counts:
            if faults:
                raise ValueError(f"{self.address}: no record can be read; the first fault: {faults[0]}")
            raise ValueError(f"{self.address} has no records")
        form = self.options.form or counts.most_common(1)[0][0]
        self.forms = {*counts}
        self.columns = columns.get(form, set())
        self.unread_texts = sorted(name for name, count in texts.items() if form == "image" and 2 * count > counts[form])
        return form


def open_reader(source: str, options: ReaderOptions = ReaderOptions()) -> Reader:  # noqa: B008 (frozen)
    """A reader of `[name=]source`: a path, an fsspec address, `owner/name` on the hub, or one of `BUILT_IN`. ValueError or
    OSError, in one line, when it does not exist or is not supported."""
    name, equals, address = source.partition("=")
    if not equals or "/" in name or "." in name or os.path.exists(source):
        name, address = "", source
    if name and not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"{name!r} is not a valid source name: use letters, digits, - and _")
    if name in BUILT_IN and address != name:
        raise ValueError(f"{name} is the name of a built-in source: choose another name for {address}")
    if options.form is not None and options.form not in FORMS:
        raise ValueError(f"there is no form {options.form!r}; use one of {', '.join(FORMS)}")
    if address in BUILT_IN:
        return Reader(name or address, address, {"": BuiltInContainer(address, options.shapes, options.limit)}, options)
    files = Files.from_address(address, options.image_root)
    listing = files.list()
    containers, columns = choose_containers(files, listing, address, options.split, options.columns)
    options = replace(options, columns=columns)
    return Reader(name or _derive_name(address), address, containers, options, files, listing)


def _derive_name(address: str) -> str:
    """A short name for a source that is valid as a folder name."""
    last = address.rstrip("/").partition("*")[0].rstrip("/").rpartition("/")[2]
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in last.split(".")[0])
    name = name.strip("_") or "data"
    return f"my_{name}" if name in BUILT_IN else name
