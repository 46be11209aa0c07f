"""The account of a source: what there is of each kind, what is read of it, and what is passed over, by reason.

The kinds are files (of a folder), members (of archives), records (rows, lines, annotations, pictures), and fields (values of
records). Of each kind, what is read and what is passed over add up to what there is: the account closes.
"""

from collections import Counter
from collections.abc import Iterator
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


class Account:
    """Counts of a source, or of a part of it. `find` counts things where they are listed; `read` and `pass_over` count them
    where it is decided what becomes of them. Accounts of parts are added up with `add`."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.forms: Counter[str] = Counter()  # of the documents
        self.named = bytearray()  # for each file of the source's listing: 1 if a record names it

    def find(self, kind: str, count: int = 1) -> None:
        self._tally(kind).total += count

    def read(self, kind: str, label: str, count: int = 1) -> None:
        """`count` things are read as `label`."""
        self._tally(kind).read[label] += count

    def pass_over(self, kind: str, reason: str, *names: str, count: int = 1) -> None:
        """`count` things are not read for this reason; `names`: of some of them."""
        tally = self._tally(kind)
        if reason not in tally.passed_over and len(tally.passed_over) >= MAX_REASONS:
            reason = OTHERS
        tally.passed_over[reason] += count
        examples = tally.examples.setdefault(reason, [])
        examples += names[: NUM_EXAMPLES - len(examples)]

    def reject(self, kind: str, label: str, reason: str, name: str) -> None:
        """Something that was counted as read is passed over after all."""
        self._tally(kind).read[label] -= 1
        self.pass_over(kind, reason, name)

    def name_file(self, index: int) -> None:
        """A record names the file with this index in the source's listing."""
        self.named.extend(bytes(max(0, index + 1 - len(self.named))))
        self.named[index] = 1

    def add(self, other: "Account") -> None:
        for kind, tally in other.tallies.items():
            self.find(kind, tally.total)
            self._tally(kind).read.update(tally.read)
            for reason, count in tally.passed_over.items():
                self.pass_over(kind, reason, *tally.examples.get(reason, ()), count=count)
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
            reasons = [(reason, count) for reason, count in tally.passed_over.most_common() if count]
            reasons += [("for an unknown reason", tally.unexplained)] if tally.unexplained else []
            shown = []
            for reason, count in reasons[:NUM_SHOWN_REASONS]:
                names = tally.examples.get(reason, [])
                more = ", ..." if count > len(names) else ""
                shown.append(f"{count:,} {reason}" + (f": {', '.join(names)}{more}" if names else ""))
            if rest := sum(count for _, count in reasons[NUM_SHOWN_REASONS:]):
                shown.append(f"{rest:,} for {len(reasons) - NUM_SHOWN_REASONS} more reasons")
            head = f"{kind}: {tally.read.total():,} of {tally.total:,} read; not read:"
            if shown and not any(tally.examples.values()):
                yield f"{head} {', '.join(shown)}"
            elif shown:
                yield head
                yield from (f"  {line}" for line in shown)

    def to_json(self) -> dict[str, Any]:
        """As an object, for `from_json`."""
        kinds = {kind: {"total": tally.total, "read": dict(tally.read), "passed_over": dict(tally.passed_over),
                        "examples": tally.examples} for kind, tally in self.tallies.items()}  # fmt: skip
        return {"kinds": kinds, "forms": dict(self.forms), "named": list(_runs(self.named))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Account":
        account = cls()
        for kind, tally in values["kinds"].items():
            account.tallies[kind] = Tally(tally["total"], Counter(tally["read"]), Counter(tally["passed_over"]),
                                          tally["examples"])  # fmt: skip
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
