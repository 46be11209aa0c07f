"""The lock of a run's folder: one writer at a time, and status.json about it."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.processes import Process
from tests.ranks import TIMEOUT
from tests.test_cli import TINY, fails
from transfusion.disk import OpenError, read_json
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.training import lock as lock_module
from transfusion.training.lock import TrainingLock


def hold(folder: Path) -> None:
    with TrainingLock(folder, SINGLE_PROCESS):
        (folder / "checkpoints" / "step-000001.tmp").mkdir(parents=True)
        print("held", flush=True)
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that trains in tmp_path / "run"."""
    process, deadline = Process(hold, tmp_path / "run"), time.monotonic() + TIMEOUT
    while process.stdout != "held\n":
        assert process.poll() is None and time.monotonic() < deadline, process.stderr
        time.sleep(0.01)
    yield process
    process.kill()


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_second_process_is_refused_and_changes_nothing(holder, tmp_path, monkeypatch, capsys):
    """Of `train` and of `fit-codec`. A second one would remove the first one's unfinished checkpoint."""
    monkeypatch.setattr(lock_module, "WAIT", 0)
    folder = tmp_path / "run"
    before = contents(folder)
    for words in (("train", "digits", *TINY), ("data", "fit-codec", "small", "digits", "--size", "16x16")):
        line = fails(capsys, 1, *words, "--out", folder).splitlines()[-1]
        assert line == (f"transfusion: {folder}: process {holder.pid} on {socket.gethostname()} trains there: wait for its "
                        "end, stop it, or give another --out")  # fmt: skip
        assert contents(folder) == before


def test_lock_of_a_killed_process_is_free(holder, tmp_path):
    """Also when it is killed while the next one waits, as after a torchrun that was killed."""
    holder.kill()
    with TrainingLock(tmp_path / "run", SINGLE_PROCESS):
        status = read_json(tmp_path / "run" / "status.json")
        assert (status["state"], status["process"], status["host"]) == ("training", os.getpid(), socket.gethostname())


def test_status_is_how_training_ended(tmp_path):
    for finished in (False, True):
        with TrainingLock(tmp_path, SINGLE_PROCESS) as lock:
            assert lock.end(finished) is finished
        assert read_json(tmp_path / "status.json")["state"] == ("finished" if finished else "stopped")
    for error, line in ((ValueError("a line\nanother"), "a line"), (KeyboardInterrupt(), "KeyboardInterrupt")):
        with pytest.raises(type(error)), TrainingLock(tmp_path, SINGLE_PROCESS) as lock:
            lock.begin()
            raise error
        status = read_json(tmp_path / "status.json")
        assert (status["state"], status["error"]) == ("failed", line)


@pytest.mark.parametrize("error", [ValueError("refused"), SystemExit(75)])
def test_refused_command_leaves_the_status_of_an_earlier_one(tmp_path, error):
    """A script must not take a finished run for a failed one, because someone gave it a wrong option."""
    with TrainingLock(tmp_path, SINGLE_PROCESS) as lock:
        lock.end(finished=True)
    before = (tmp_path / "status.json").read_bytes()
    with pytest.raises(type(error)), TrainingLock(tmp_path, SINGLE_PROCESS):
        raise error
    assert (tmp_path / "status.json").read_bytes() == before
    with pytest.raises(type(error)), TrainingLock(tmp_path, SINGLE_PROCESS) as lock:
        lock.begin()
        raise error
    assert (tmp_path / "status.json").read_bytes() != before


def test_new_folder_is_removed_after_an_error_unless_it_has_files(tmp_path):
    for name in ("empty", "used"):
        with pytest.raises(ValueError), TrainingLock(tmp_path / name, SINGLE_PROCESS):  # noqa: B017, PT011
            if name == "used":
                (tmp_path / name / "run.json").write_text("{}")
            raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_only_the_main_rank_locks(tmp_path):
    with TrainingLock(tmp_path, Ranks(0, 2)), TrainingLock(tmp_path, Ranks(1, 2)) as other:
        assert other.end(True)
    assert read_json(tmp_path / "status.json")["state"] == "stopped"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_file_system_without_locks_is_one_line(tmp_path, monkeypatch, code):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OpenError) as error, TrainingLock(tmp_path, SINGLE_PROCESS):
        pass
    assert str(error.value).startswith(f"cannot lock {tmp_path / 'training.lock'}: {os.strerror(code)}; the folder must be")
