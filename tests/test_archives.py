"""Archives: which members are one record, for names with any dots, and in bounded memory."""

import io
import tarfile
import tracemalloc
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.make import write_tar
from tests.profile import examples
from tests.test_account import count_members
from transfusion.data.reading import archives
from transfusion.data.reading.account import Account
from transfusion.data.reading.archives import READ_SUFFIXES, TarArchives
from transfusion.data.reading.files import Files

names = st.lists(st.sampled_from((
    "a.png", "a.txt", "a.1.png", "a.1.txt", "a.2.png", "a.2.png", "a.2.cls", "a.mask.npy", "a.3.x.txt", "b.1.png", "b.png",
    "x/a.1.png", ".hidden", "c",
)), max_size=14)  # fmt: skip

long_runs = st.lists(st.sampled_from(("a.1.png", "a.1.txt", "a.2.png", "a.3.png", "a.4.txt", "a.png", "a.txt", "b.png")),
                     min_size=5, max_size=12)  # fmt: skip


def open_tar(path, members) -> TarArchives:
    write_tar(path, members)
    return TarArchives(Files.from_address(str(path)), [str(path)])


def read(container: TarArchives, max_rows: int) -> tuple[list, dict]:
    account = Account()
    spans = list(container.spans(max_rows, account))
    return [(where, str(record)) for span in spans for where, record in container.records(span)], account.to_json()["kinds"]


def group_whole_runs(names: list[str]) -> list[set[str]]:
    """WebDataset's rule, with each run of one beginning in memory: the names of each record."""
    runs: list[list[str]] = []
    for name in names:
        if name.startswith(".") or not {name.partition(".")[2], name.rpartition(".")[2]} & {*READ_SUFFIXES}:
            continue
        if not runs or runs[-1][0].partition(".")[0] != name.partition(".")[0]:
            runs.append([])
        runs[-1].append(name)
    records: list[set[str]] = []
    for run in runs:
        is_plain = any(name.partition(".")[2] in READ_SUFFIXES for name in run)
        last = None
        for name in run:
            key = name.partition(".")[0] if is_plain else name.rpartition(".")[0]
            if key != last:
                records.append(set())
            records[-1].add(name)
            last = key
    return records


@examples(200)
@given(names)
def test_members_of_one_key_are_one_record(tmp_path_factory, names):
    path = tmp_path_factory.getbasetemp() / "keys.tar"
    container = open_tar(path, [(name, name.encode()) for name in names])
    groups = [group for group in container._groups(str(path), 0, read=False) if group.contents]
    expected = group_whole_runs(names)
    assert len(groups) == len(expected)
    assert all({*group.names.values()} <= record for group, record in zip(groups, expected, strict=True))


@examples(200)
@given(long_runs, st.integers(1, 3), st.sampled_from((15, 1000)))
def test_records_do_not_depend_on_where_reading_starts(tmp_path_factory, names, max_ahead, max_bytes):
    """Also where the rest of a long run is not looked at."""
    path = tmp_path_factory.getbasetemp() / "starts.tar"
    container = open_tar(path, [(name, name.encode()) for name in names])
    with patch.multiple(archives, MAX_AHEAD=max_ahead, MAX_BYTES_AHEAD=max_bytes):
        records, account = read(container, 1)
        assert read(container, 3) == read(container, 1000) == (records, account)
    members = account.get("members", {"total": 0, "read": {}, "passed_over": {}})
    assert members["total"] == count_members([path])
    assert sum(members["read"].values()) + sum(members["passed_over"].values()) == members["total"]


@pytest.mark.parametrize(("first", "count", "size", "num_records", "limit"), [
    ("img.0.jpg", 1000, 20_000, 1001, 3_500_000), ("img.jpg", 2500, 0, 2, 400_000), ("img.0.npy", 2500, 0, 1, 400_000),
])  # fmt: skip
def test_members_with_one_beginning_are_not_held_in_memory(first, count, size, num_records, limit, tmp_path):
    suffix, buffer = first.rpartition(".")[2], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in (first, *(f"img.{n}.{suffix}" for n in range(1, count)), "last.txt"):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    container = TarArchives(Files.from_address(str(tmp_path / "a.tar")), [str(tmp_path / "a.tar")])
    del buffer
    tracemalloc.start()
    found = sum(1 for span in container.spans(100, Account()) for _ in container.records(span))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == num_records
    assert peak < limit
