"""Documents without their content: what `survey` counts of each. Read by one process or several, with the same result."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

from transfusion.codecs.text import Tokenizer
from transfusion.data.heldout import hash_document, hash_pixels, perceptual_hashes
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import Reader, Unit

SECONDS_ALONE = 1.0  # before more processes are started: each needs about half a second to import the readers
MAX_PROCESSES = 8  # each has about 100 MB, and the names of all files
BATCH_SIZE, BATCH_BYTES = 64, 2**20  # documents, and bytes of their pixels, that are hashed together


def count_processes() -> int:
    """The number of cores that this process may use, but at most `MAX_PROCESSES`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


class Summary(NamedTuple):
    """What is counted of a document."""

    where: str  # file and row
    name: str  # its id in the source, if any
    kinds: tuple[str, ...]  # of its segments: text or image
    characters: int
    tokens: int
    sizes: tuple[tuple[int, int], ...]  # (height, width) of its images
    image_hashes: tuple[int, ...] = ()
    perceptual_hashes: tuple[int, ...] = ()
    document_hash: int = 0
    split: str = ""  # "train" or "heldout" when its source declares it


@dataclass(frozen=True)
class Summarizer:
    """Reads units of a source as summaries. `tokenizer`: counts the tokens; `hashes`: whether the documents are hashed."""

    reader: Reader
    tokenizer: Tokenizer | None
    hashes: bool

    def read(self, units: Sequence[Unit], account: Account, processes: int) -> Iterator[Summary | Fault]:
        """All records of the units in order. If it takes longer than `SECONDS_ALONE`, this many processes share the units:
        only for local files, because other file systems may not be shared."""
        start = time.monotonic()
        for number, unit in enumerate(units):
            if processes > 1 and self.reader.is_local and time.monotonic() - start >= SECONDS_ALONE:
                yield from self._read_in_processes(units[number:], account, processes)
                return
            yield from self.summarize(self.reader.read(unit, account))

    def summarize(self, records: Iterable[RawDocument | Fault]) -> Iterator[Summary | Fault]:
        """Summaries of documents; faults stay. In batches: the processor's caches hold the code of one step at a time."""
        batch, size = [], 0
        for record in records:
            batch.append(record)
            if isinstance(record, RawDocument):
                size += sum(part.pixels.nbytes for part in record.segments if isinstance(part, RawImage))
            if len(batch) == BATCH_SIZE or size >= BATCH_BYTES:
                yield from self._summarize_batch(batch)
                batch, size = [], 0
        yield from self._summarize_batch(batch)

    def _summarize_batch(self, records: Sequence[RawDocument | Fault]) -> Iterator[Summary | Fault]:
        documents = [record for record in records if isinstance(record, RawDocument)] if self.hashes else ()
        pixels = [part.pixels for document in documents for part in document.segments if isinstance(part, RawImage)]
        image_hashes, perceptual = iter(list(map(hash_pixels, pixels))), iter(perceptual_hashes(pixels))
        for record in records:
            yield record if isinstance(record, Fault) else self._summarize_one(record, image_hashes, perceptual)

    def _summarize_one(self, document: RawDocument, image_hashes: Iterator[int], perceptual: Iterator[int]) -> Summary:
        kinds, sizes, characters, tokens = [], [], 0, 0
        for part in document.segments:
            if isinstance(part, RawText):
                kinds.append("text")
                characters += len(part.text)
                tokens += len(self.tokenizer.encode(part.text, part.parse_special)) if self.tokenizer else 0
            else:
                kinds.append("image")
                sizes.append(part.pixels.shape[:2])
        summary = Summary(
            document.where, document.name, tuple(kinds), characters, tokens, tuple(sizes), split=document.split
        )
        if not self.hashes:
            return summary
        own = tuple(islice(image_hashes, len(sizes)))
        return summary._replace(
            image_hashes=own, perceptual_hashes=tuple(islice(perceptual, len(sizes))),
            document_hash=hash_document(document, iter(own)),
        )  # fmt: skip

    def _read_in_processes(self, units: Sequence[Unit], account: Account, processes: int) -> Iterator[Summary | Fault]:
        """Process n of N reads the units n, n + N, ... and waits when it is a unit ahead, so memory is bounded."""
        context = multiprocessing.get_context("spawn")  # fork does not support the threads of torch and Arrow
        workers = []
        try:
            with _block_interrupts():
                for _ in range(min(processes, len(units))):
                    connection, other_end = context.Pipe()
                    process = context.Process(target=_work, args=(other_end,), daemon=True)
                    process.start()
                    other_end.close()
                    workers.append((process, connection))
            for number, (process, connection) in enumerate(workers):
                # not as arguments of the process: if it was killed while it starts, sending them would never end
                with _detect_end(process):
                    connection.send((self, units[number::processes]))
            for number in range(len(units)):
                process, connection = workers[number % processes]
                yield from _receive(process, connection, account)
        finally:
            for process, connection in workers:
                connection.close()
                process.kill()  # it only reads
                process.join()


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT here and in the processes that are started, also during their imports: the first process ends them."""
    resource_tracker.ensure_running()  # its start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _detect_end(process: multiprocessing.Process) -> Iterator[None]:
    """ChildProcessError if the process of a connection was killed."""
    try:
        yield
    except (EOFError, OSError):
        process.join()
        raise ChildProcessError(f"a process that reads the source ended with exit code {process.exitcode}") from None


def _receive(process: multiprocessing.Process, connection: Connection, account: Account) -> list[Summary | Fault]:
    """The summaries of the next unit of a process; its account is added to `account`. The error of the process if it fails,
    ChildProcessError if it was killed."""
    with _detect_end(process):
        result = connection.recv()
    if isinstance(result, Exception):
        raise result
    summaries, part = result
    account.add(part)
    return summaries


def _work(connection: Connection) -> None:
    """Receive a summarizer and its units, and send the summaries and the account of each unit, or an error."""
    try:
        summarizer, units = connection.recv()
    except (EOFError, OSError):  # the first process was killed
        return
    try:
        for unit in units:
            account = Account()
            connection.send((list(summarizer.summarize(summarizer.reader.read(unit, account))), account))
    except BrokenPipeError:  # the first process was killed
        pass
    except Exception as error:
        connection.send(error)
