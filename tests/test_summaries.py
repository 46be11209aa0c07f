"""`survey` reads a source in one process or in several, with the same result."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import shutil
import signal
from itertools import islice
from multiprocessing import resource_tracker, spawn
from multiprocessing.context import SpawnProcess

import pytest

from tests.layouts import LAYOUTS, Layout, picture, write
from transfusion.data import summaries, survey
from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import ReaderOptions, open_reader
from transfusion.data.summaries import Summarizer
from transfusion.data.survey import Duplicates


def survey_in(path, processes: int, **options) -> tuple:
    """Everything that a survey tells about a source."""
    duplicates, faults = Duplicates(), []
    result = survey.survey(
        open_reader(str(path), ReaderOptions(**options)), None, lambda fault: faults.append((fault.kind, str(fault))),
        duplicates=duplicates, processes=processes,
    )  # fmt: skip
    return {**vars(result), "account": result.account.to_json()}, str(duplicates), duplicates.documents, faults


def write_source(path) -> None:
    """Texts and pictures, some of them twice. Some ids are in several units, and a picture is missing."""
    pictures = {f"pictures/{number}.png": picture(number) for number in range(4)}
    records = [{"id": number % 17, "image": f"pictures/{number % 5}.png", "caption": f"caption {number % 3}"}
               if number % 2 else {"text": f"text {number % 7}"} for number in range(40)]  # fmt: skip
    write(path, {**pictures, "records.jsonl": records})


@pytest.fixture
def children(monkeypatch):
    """Reading uses several processes. A function that lists them; other tests may have some of their own."""
    monkeypatch.setattr(summaries, "SECONDS_ALONE", 0)
    monkeypatch.setattr(survey, "UNIT_SIZE", 3)
    others = multiprocessing.active_children()
    return lambda: [process for process in multiprocessing.active_children() if process not in others]


def test_several_processes_give_the_same_result(children, tmp_path):
    write_source(tmp_path)
    alone = survey_in(tmp_path, 1)
    assert survey_in(tmp_path, 3) == alone
    assert children() == []
    kinds = {kind for kind, _ in alone[-1]}
    assert kinds == {"duplicate id", "missing image"} and alone[0]["documents"].total() > 20


def test_processes_are_started_only_after_a_second_and_for_local_files(monkeypatch, tmp_path):
    monkeypatch.setattr(survey, "UNIT_SIZE", 3)
    monkeypatch.setattr(Summarizer, "_read_in_processes", lambda *arguments: pytest.fail("it starts processes"))
    write_source(tmp_path)
    survey_in(tmp_path, 2)
    monkeypatch.setattr(summaries, "SECONDS_ALONE", 0)
    survey_in(tmp_path, 1)
    survey.survey(open_reader("shapes", ReaderOptions(limit=60)), None, processes=2)


@pytest.fixture
def items(children, tmp_path):
    """Summaries of a source that two processes read."""
    write_source(tmp_path)
    reader = open_reader(str(tmp_path))
    return Summarizer(reader, None, hashes=False).read(reader.units(1), Account(), processes=2)


def test_an_error_of_a_process_is_raised_and_all_processes_end(items, children, tmp_path):
    os.unlink(tmp_path / "records.jsonl")  # before the processes read it
    (tmp_path / "records.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        list(items)
    assert children() == []


def test_a_killed_process_is_an_error(children, tmp_path):
    write(tmp_path, {"records.jsonl": [{"text": f"text {number}"} for number in range(3_000)]})  # more than a pipe holds
    reader = open_reader(str(tmp_path))
    items = Summarizer(reader, None, hashes=False).read(reader.units(1), Account(), processes=2)
    assert len(list(islice(items, 2))) == 2
    for process in children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="exit code -9"):
        list(items)
    assert children() == []


def test_processes_end_when_reading_stops_early(items, children):
    """Also those that do nothing: they would end by themselves when they send."""
    next(items)
    for process in children():
        os.kill(process.pid, signal.SIGSTOP)
    items.close()
    assert children() == []


def test_an_interrupt_of_a_process_that_starts_changes_nothing(children, monkeypatch, tmp_path):
    """Ctrl-C reaches all processes of a terminal. Those that still import would print a traceback."""
    write_source(tmp_path)
    alone = survey_in(tmp_path, 1)

    def start(process, original=SpawnProcess.start) -> None:
        original(process)
        os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", start)
    assert survey_in(tmp_path, 3) == alone


def test_a_process_that_ends_while_it_starts_is_an_error(children, monkeypatch, tmp_path):
    """Also if what it gets does not fit into the buffer of a pipe."""
    write_source(tmp_path)
    reader = open_reader(str(tmp_path))
    reader.name = "n" * 2**22
    resource_tracker.ensure_running()  # not with the next executable
    monkeypatch.setattr(spawn, "_python_exe", os.fsencode(shutil.which("false")))
    items = Summarizer(reader, None, hashes=False).read(reader.units(1), Account(), processes=2)
    with pytest.raises(ChildProcessError, match="exit code 1"):
        list(items)
    assert children() == []


def compressed(name: str, compress) -> Layout:
    content = compress(b"".join(b'{"text": "%d"}\n' % number for number in range(5)))
    return Layout("", name, "", "", {name: content}, [])


COMPRESSED = [compressed("a.jsonl.gz", gzip.compress), compressed("a.jsonl.bz2", bz2.compress),
              compressed("a.jsonl.xz", lzma.compress)]  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, *COMPRESSED], ids=lambda layout: layout.data)
def test_reader_of_every_layout_can_be_sent(layout: Layout, tmp_path):
    """Also after it has been used."""
    write(tmp_path, layout.files)
    reader = open_reader(str(tmp_path), ReaderOptions(**layout.options))
    result = read_all(reader)
    assert read_all(send(reader)) == result


def send(value):
    """What a process gets that this value is sent to."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.send(value)
    return receiver.recv()


def read_all(reader) -> tuple:
    account, summarizer = Account(), Summarizer(reader, None, hashes=True)
    items = [item for unit in reader.units(2) for item in summarizer.summarize(reader.read(unit, account))]
    reader.close_account(account)
    return [str(item) for item in items], json.dumps(account.to_json())


def test_fault_can_be_sent_to_a_process():
    fault = send(Fault("cut short", "it ends", "a.jsonl:3"))
    assert (fault.kind, fault.message, fault.where) == ("cut short", "it ends", "a.jsonl:3")
    assert str(fault) == "a.jsonl:3: it ends"
