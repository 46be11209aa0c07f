"""Signals: which ones stop a run, its exit code, its status, and a terminal that is closed."""

import fcntl
import os
import platform
import select
import signal
import termios
import time
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.processes import Process
from tests.ranks import TIMEOUT
from tests.test_cli import TINY, command
from tests.test_training import new_trainer
from tests.test_vq import FIT
from tests.tiny import small_run
from transfusion import parallel
from transfusion.checkpoint.read import find_newest_checkpoint
from transfusion.disk import read_json
from transfusion.inference.engine import open_run
from transfusion.training.codec import CodecTrainer
from transfusion.training.signals import SIGNALS, exit_on_signal
from transfusion.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("default_signals")


def state_of(folder: Path) -> str:
    return read_json(folder / "status.json")["state"]


def exit_code(*arguments: object) -> int:
    """Of a command that a terminal starts."""
    processes.set_default_signals()
    try:
        command(*arguments)
    except SystemExit as exit_:
        return exit_.code
    return 0


def raise_in_step(patch: pytest.MonkeyPatch, trainer: type, step: int, number: int) -> None:
    """The process gets a signal in this step, counted from 1."""
    original = trainer.step

    def step_with_signal(self, done, *args):
        if done + 1 == step:
            signal.raise_signal(number)
        return original(self, done, *args)

    patch.setattr(trainer, "step", step_with_signal)


def test_stopped_run_exits_with_75_and_under_torchrun_with_0(tmp_path, monkeypatch):
    """The status tells a stopped run from a finished one."""
    train = "train", "digits", *TINY, "--out", tmp_path
    torchrun = {"TORCHELASTIC_RUN_ID": "1"}
    for step, number, environment, code in ((1, signal.SIGTERM, {}, 75), (2, signal.SIGUSR1, torchrun, 0)):
        with monkeypatch.context() as patch:
            raise_in_step(patch, Trainer, step, number)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert exit_code(*train) == code
        assert state_of(tmp_path) == "stopped"
        assert find_newest_checkpoint(tmp_path).name == f"step-{step:06d}"
    assert exit_code(*train) == 0
    assert state_of(tmp_path) == "finished"


def test_stopped_codec_exits_with_75(tmp_path, monkeypatch):
    fit = "data", "fit-codec", "small", "digits", "--out", tmp_path, *FIT
    with monkeypatch.context() as patch:
        raise_in_step(patch, CodecTrainer, 2, signal.SIGHUP)
        assert exit_code(*fit) == 75
    assert state_of(tmp_path) == "stopped"
    assert not (tmp_path / "codec.json").exists()
    assert exit_code(*fit) == 0
    assert state_of(tmp_path) == "finished"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", ["transfusion.parallel.pick_device", "transfusion.data.sources.name_sources"])
def test_signal_before_training_exits_at_once(tmp_path, monkeypatch, number, place):
    """Also before the folder exists."""
    def function(*args):
        signal.raise_signal(number)
        raise AssertionError("not reached")

    monkeypatch.setattr(place, function)
    folder = tmp_path / "run"
    assert exit_code("train", "digits", *TINY, "--out", folder) == 75
    assert state_of(folder) == "stopped" if place.endswith("name_sources") else not folder.exists()


@pytest.mark.parametrize("is_saved", [False, True])
def test_signal_that_is_repeated_does_not_change_the_exit_code(tmp_path, monkeypatch, is_saved):
    """A scheduler repeats it. From the first one before training, or from the last save, signals are ignored."""
    if is_saved:
        raise_in_step(monkeypatch, Trainer, 1, signal.SIGTERM)
    else:
        monkeypatch.setattr("transfusion.parallel.pick_device", lambda name: signal.raise_signal(signal.SIGTERM))
    assert exit_code("train", "digits", *TINY, "--out", tmp_path / "run") == 75
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}


def test_signal_after_another_process_has_stopped_leaves_its_error(monkeypatch):
    """torchrun signals the others as soon as one has ended; an exit code 0 would hide that."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConnectionError, match="another process"), exit_on_signal():
        try:
            raise ConnectionError("another process of this run has stopped")
        finally:
            signal.raise_signal(signal.SIGTERM)


def run_with_signal_to_rank_0_before_it_joins(*args: object) -> None:
    def pick_device(name: str) -> torch.device:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        return torch.device("cpu")

    parallel.pick_device = pick_device
    command(*args)


def test_signal_to_one_rank_before_training_stops_all(tmp_path):
    """Under torchrun. The others waited for ever for one that had ended."""
    output = processes.torchrun(
        run_with_signal_to_rank_0_before_it_joins, "train", "digits", *TINY, "--training.batch-size", 4, "--out", tmp_path
    )
    assert "stopped at step 0 and saved" in output and state_of(tmp_path) == "stopped"


@pytest.mark.parametrize("is_under_torchrun", [False, True])
def test_signal_ignored_from_the_start_stays_ignored_except_under_torchrun(tmp_path, monkeypatch, is_under_torchrun):
    """nohup ignores SIGHUP. torchrun does not ignore it: it passes it on, and kills processes that continue."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(os, "isatty", lambda stream: False)  # else the tests' own terminal is left
    if is_under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def on_preview(model, step):
        if step == 1:
            signal.raise_signal(signal.SIGHUP)

    trainer = new_trainer(tmp_path, small_run(3), on_preview)
    assert trainer.train() is not is_under_torchrun
    assert trainer.loop.progress.step == (1 if is_under_torchrun else 3)


def train_on_terminal(folder: Path, terminal: str) -> None:
    """Train as a command of a shell in this terminal, for much longer than the test."""
    os.setsid()
    file = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(file, termios.TIOCSCTTY, 0)
    for stream in range(3):
        os.dup2(file, stream)
    os.close(file)
    steps = "--training.steps", "--training.checkpoint-every", "--training.validate-every"
    options = [word for name in steps for word in (name, 100_000)]
    command("train", "digits", *TINY, *options, "--training.preview-every", 0, "--training.log-every", 1, "--out", folder)


def test_run_is_saved_when_its_terminal_is_closed(tmp_path):
    """The system sends SIGHUP, and every write to the terminal fails from then on."""
    ours, theirs = os.openpty()
    process, output = Process(train_on_terminal, tmp_path / "run", os.ttyname(theirs)), b""
    try:
        deadline = time.monotonic() + TIMEOUT
        while b"positions/s" not in output:  # of the progress bar
            assert process.poll() is None and time.monotonic() < deadline, output
            if select.select([ours], [], [], 1)[0]:
                output += os.read(ours, 65_536)
        os.close(ours)
        os.close(theirs)
        assert process.wait(TIMEOUT) == 75
    finally:
        process.kill()
    assert state_of(tmp_path / "run") == "stopped"
    assert find_newest_checkpoint(tmp_path / "run").name > "step-000000"


def print_released_memory(opened: Path, trained: Path) -> None:
    """The megabytes that return to the system of 200 freed ones, after a run was opened and after `train`."""
    import torch

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def print_released() -> None:
        tensors = [torch.zeros(10_000_000) for _ in range(5)]  # glibc maps blocks above 32 MiB by default
        before = resident()
        del tensors
        print(before - resident())

    open_run(opened, device="cpu")
    print_released()
    command("train", "digits", "--out", trained, *TINY)
    print_released()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_only_training_keeps_freed_memory(written, trained):
    process = processes.run(print_released_memory, written, trained)
    assert process.returncode == 0, process.stderr
    opened, after_training = map(float, process.stdout.split())
    assert opened > 150
    assert after_training < 50
