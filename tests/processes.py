"""Processes for tests: forked from one that has torch and the package imported, so that none of them pays for imports.

Where the start itself is tested, tests use `subprocess` instead: README's server, torchrun, the list of imports.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRELOADED = [  # besides this package's own files, and what the functions of tests lie in
    "sklearn.datasets", "sklearn.model_selection", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.launcher.api", "transfusion.cli.runs", "transfusion.cli.data",
    "transfusion.data.prepare", "transfusion.report", "transfusion.training.codec", "tests.test_cli_data",
    "tests.test_guard",
]  # fmt: skip


@cache
def context() -> multiprocessing.context.ForkServerContext:
    """Where processes come from. It is started in the repository; each process takes the environment of its test."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    here, path = os.getcwd(), os.environ.get("PYTHONPATH")
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return found


class Process:
    """A process that does `do(*arguments)` and writes to files what it prints; otherwise like a `subprocess.Popen`.

    Its exit code is that of a script: what SystemExit says, 1 after a traceback, and 0.
    """

    def __init__(self, do: Callable, *arguments, largest_file: int | None = None):
        self.folder = tempfile.TemporaryDirectory()
        self.process = context().Process(target=_do, args=(do, arguments, self.folder.name, dict(os.environ), largest_file))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    @property
    def stdout(self) -> str:
        """What it has printed until now."""
        return self._read("out")

    @property
    def stderr(self) -> str:
        return self._read("err")

    def _read(self, name: str) -> str:
        path = Path(self.folder.name) / name
        return path.read_text() if path.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it ends at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; subprocess.TimeoutExpired when it has none by then."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a process of a test", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it has printed, and its errors, when it has ended."""
        self.wait(timeout)
        return self.stdout, self.stderr


def run(do: Callable, *arguments, timeout: float = 300, **options) -> Process:
    """The same, ended. It is killed when it takes longer than this."""
    process = Process(do, *arguments, **options)
    try:
        process.wait(timeout)
    finally:
        process.kill()
    return process


def _do(do: Callable, arguments: tuple, folder: str, environment: dict[str, str], largest_file: int | None) -> None:
    import torch

    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    do(*arguments)


def torchrun(do: Callable, *arguments, processes: int = 2, restarts: int = 0) -> str:
    """What `torchrun --nproc-per-node` does: its agent, over processes that each do `do(*arguments)`.

    Returns what these have printed as errors, without the agent's own lines.
    """
    done = run(torchrun_agent, do, arguments, processes, restarts)
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if not re.match(r"[IWE]\d{4} [\d:.]+ \d+ ", line))


def torchrun_agent(do: Callable, arguments: tuple, processes: int, restarts: int) -> None:
    """What the process of torchrun itself does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic_launch(LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(time.monotonic_ns()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    ), _begin_anew)(do, *arguments)  # fmt: skip


def _begin_anew(do: Callable, *arguments) -> None:
    """A process that torchrun starts has not inherited its handlers of signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    do(*arguments)
