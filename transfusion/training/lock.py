"""One writer in a run's folder: a lock, and beside it status.json, with who trains there or how training ended."""

import os
import shutil
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from transfusion.disk import OpenError, read_json, write_json
from transfusion.parallel import Ranks

LOCK, STATUS = "training.lock", "status.json"
WAIT = 10.0  # seconds for a process that is just ending, such as one whose torchrun was killed


class TrainingLock:
    """While open, no other process and no other torchrun job can train in the folder. Only the main rank takes the lock; the
    system releases it when the process ends, whatever ends it.

    status.json has the process, its host, the time, and the state: training, then finished or stopped (see `end`), or failed
    with the error. An error before `begin` leaves the status of an earlier process. After a kill the state is still
    training. New folders in which an error leaves nothing else are removed.
    OpenError when another process trains in the folder.
    """

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.is_main, self.state = folder, ranks.is_main, "stopped"
        self.created = [path for path in (folder, *folder.parents) if not path.exists()]  # by __enter__
        self.lock, self.before = FileLock(folder / LOCK), None

    def __enter__(self) -> "TrainingLock":
        if not self.is_main:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=WAIT)
        except Timeout:
            raise OpenError(f"{self.folder}: {self._describe_owner()} trains there: wait for its end, stop it, or give "
                            "another --out") from None  # fmt: skip
        except OSError as error:
            raise OpenError(f"cannot lock {self.folder / LOCK}: {error.strerror or error}; the folder must be writable, on "
                            "a file system with locks") from None  # fmt: skip
        with suppress(OpenError):
            self.before = read_json(self.folder / STATUS)
        self._write("training")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if not self.is_main:
            return
        try:
            if error is not None and self.before is not None:
                write_json(self.folder / STATUS, self.before)
            elif error is None or isinstance(error, SystemExit):  # a signal before training
                self._write(self.state)
            elif self.created and {path.name for path in self.folder.iterdir()} <= {LOCK, STATUS}:
                shutil.rmtree(self.folder)
                for parent in self.created[1:]:
                    if not any(parent.iterdir()):
                        parent.rmdir()
            else:
                self._write("failed", error=(str(error) or kind.__name__).splitlines()[0])
        except OSError:
            if error is None:  # else the first error is raised
                raise
        finally:
            self.lock.release()

    def begin(self) -> None:
        """Training begins: from here on an error is the state of the folder."""
        self.before = None

    def end(self, finished: bool) -> bool:
        """Set the state to finished or stopped. Returns `finished`."""
        self.state = "finished" if finished else "stopped"
        return finished

    def _write(self, state: str, **values: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        write_json(self.folder / STATUS, {"state": state, **owner, "time": now, **values})

    def _describe_owner(self) -> str:
        """Which process has the lock. It writes status.json right after it took it."""
        try:
            owner = read_json(self.folder / STATUS)
        except OpenError:
            return "another process"
        return f"process {owner.get('process')} on {owner.get('host')}"
