"""The account of a source: what there is of each kind, what is read of it, and what is passed over, by reason.

The kinds are files (of a folder), members (of archives), records (rows, lines, annotations, pictures), and fields (values of
records). Of each kind, what is read and what is passed over add up to what there is: the account closes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_EXAMPLES = 3  # names kept for each reason
NUM_SHOWN_REASONS = 8  # of a kind, in the lines for people
MAX_REASONS = 40  # of a kind; records may have any number of different columns
OTHERS = "other reasons"


@dataclass
class Tally:
    """Things of one kind: how many there are, and what became of them."""

    total: int = 0
    read: Counter[str] = field(default_factory=Counter)  # read as -> number
    passed_over: Counter[str] = field(default_factory=Counter)  # reason -> number
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> names of the first ones

    @property
    def unexplained(self) -> int:
        """What there is, minus what is read or passed over: 0 when the account closes."""
        return self.total - self.read.total() - self.passed_over.total()

    def pass_over(self, reason: str, names: Sequence[str], count: int) -> None:
        if reason not in self.passed_over and len(self.passed_over) >= MAX_REASONS:
            reason = OTHERS
        self.passed_over[reason] += count
        examples = self.examples.setdefault(reason, [])
        examples += names[: NUM_EXAMPLES - len(examples)]

    def add(self, other: "Tally") -> None:
        self.total += other.total
        self.read.update(other.read)
        for reason, count in other.passed_over.items():
            self.pass_over(reason, other.examples.get(reason, ()), count)

    def to_json(self) -> dict[str, Any]:
        counts = {"total": self.total, "read": dict(self.read), "passed_over": dict(self.passed_over)}
        return {**counts, "examples": self.examples}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Tally":
        return cls(values["total"], Counter(values["read"]), Counter(values["passed_over"]), values["examples"])

    def reasons(self) -> Iterator[str]:
        """Each reason with its count and the first names, most frequent first."""
        reasons = [(reason, count) for reason, count in self.passed_over.most_common() if count]
        reasons += [("for an unknown reason", self.unexplained)] if self.unexplained else []
        for reason, count in reasons[:NUM_SHOWN_REASONS]:
            names = self.examples.get(reason, [])
            yield f"{count:,} {reason}" + (f": {', '.join(names)}{', ...' * (count > len(names))}" if names else "")
        if rest := sum(count for _, count in reasons[NUM_SHOWN_REASONS:]):
            yield f"{rest:,} for {counted(len(reasons) - NUM_SHOWN_REASONS, 'more reason')}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 picture", "1,204 pictures"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Account:
    """Counts of a source, or of a part of it. `find` counts things where they are listed; `read` and `pass_over` count them
    where it is decided what becomes of them. Accounts of parts are added up with `add`."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.forms: Counter[str] = Counter()  # of the documents
        self.notes = Tally()  # what is wrong with pictures that are read, as reasons
        self.named = bytearray()  # for each file of the source's listing: 1 if a record names it

    def find(self, kind: str, count: int = 1) -> None:
        self._tally(kind).total += count

    def read(self, kind: str, label: str, count: int = 1) -> None:
        """`count` things are read as `label`."""
        self._tally(kind).read[label] += count

    def pass_over(self, kind: str, reason: str, *names: str, count: int = 1) -> None:
        """`count` things are not read for this reason; `names`: of some of them."""
        self._tally(kind).pass_over(reason, names, count)

    def reject(self, kind: str, label: str, reason: str, name: str) -> None:
        """Something that was counted as read is passed over after all."""
        self._tally(kind).read[label] -= 1
        self.pass_over(kind, reason, name)

    def note(self, reason: str, name: str) -> None:
        """Something is wrong with a picture that is read, such as its EXIF data."""
        self.notes.total += 1
        self.notes.pass_over(reason, (name,), 1)

    def name_file(self, index: int) -> None:
        """A record names the file with this index in the source's listing."""
        self.named.extend(bytes(max(0, index + 1 - len(self.named))))
        self.named[index] = 1

    def add(self, other: "Account") -> None:
        for kind, tally in other.tallies.items():
            self._tally(kind).add(tally)
        self.notes.add(other.notes)
        self.forms.update(other.forms)
        for first, end in _runs(other.named):
            self.named.extend(bytes(max(0, end - len(self.named))))
            self.named[first:end] = b"\1" * (end - first)

    def check(self) -> None:
        """ValueError when it does not close."""
        for kind, tally in self.tallies.items():
            if tally.unexplained:
                counts = f"{tally.total:,} there, {tally.read.total():,} read, {tally.passed_over.total():,} passed over"
                raise ValueError(f"the account of {kind} does not close: {counts}")

    def lines(self) -> Iterator[str]:
        """For people: of each kind of which something is passed over, how much is read, and the reasons."""
        if len(self.forms) > 1:
            yield "forms of records: " + ", ".join(f"{count:,} {form}" for form, count in self.forms.most_common())
        for kind, tally in self.tallies.items():
            shown = list(tally.reasons())
            head = f"{kind}: {tally.read.total():,} of {tally.total:,} read; not read:"
            if shown and not any(tally.examples.values()):
                yield f"{head} {', '.join(shown)}"
            elif shown:
                yield head
                yield from (f"  {line}" for line in shown)
        if notes := list(self.notes.reasons()):
            yield "notes on pictures that are read:"
            yield from (f"  {line}" for line in notes)

    def to_json(self) -> dict[str, Any]:
        """As an object, for `from_json`."""
        kinds = {kind: tally.to_json() for kind, tally in self.tallies.items()}
        return {
            "kinds": kinds, "notes": self.notes.to_json(), "forms": dict(self.forms), "named": list(_runs(self.named)),
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Account":
        account = cls()
        for kind, tally in values["kinds"].items():
            account.tallies[kind] = Tally.from_json(tally)
        account.notes = Tally.from_json(values["notes"])
        account.forms.update(values["forms"])
        for first, end in values["named"]:
            account.named.extend(bytes(first - len(account.named)) + b"\1" * (end - first))
        return account

    def _tally(self, kind: str) -> Tally:
        if kind not in self.tallies:
            self.tallies[kind] = Tally()
        return self.tallies[kind]


def _runs(flags: bytearray) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of ones."""
    end = 0
    while (first := flags.find(1, end)) >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        yield first, end
