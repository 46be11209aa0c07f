"""Processes for tests, forked from a server that has imported torch and the package, which saves import time.

Tests of the start itself use `subprocess` instead: the README's server, torchrun, the imports.
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
PRELOADED = [  # packages, this package, and test modules whose functions are executed in processes
    "sklearn.datasets", "sklearn.model_selection", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.launcher.api", "transfusion.cli.run_folder", "transfusion.cli.data",
    "transfusion.data.prepare", "transfusion.report.write", "transfusion.training.codec", "tests.test_cli_data",
    "tests.test_guard",
]  # fmt: skip


@cache
def context() -> multiprocessing.context.ForkServerContext:
    """The fork server. It starts in the repository; each process has the environment of its test."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    cwd, path = os.getcwd(), os.environ.get("PYTHONPATH")
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(cwd)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return server


class Process:
    """A process that executes `do(*arguments)`, with the interface of `subprocess.Popen`; its output goes to files.

    Its exit code is that of a script: the code of SystemExit, 1 after a traceback, else 0.
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
        """The output so far."""
        return self._read("out")

    @property
    def stderr(self) -> str:
        return self._read("err")

    def _read(self, name: str) -> str:
        path = Path(self.folder.name) / name
        return path.read_text() if path.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. subprocess.TimeoutExpired after `timeout` seconds."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a process of a test", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and stderr, after the process has ended."""
        self.wait(timeout)
        return self.stdout, self.stderr


def run(do: Callable, *arguments, timeout: float = 300, **options) -> Process:
    """A process that has ended. It is killed after `timeout` seconds."""
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
    set_default_signals()
    torch.set_num_threads(1)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    do(*arguments)


def torchrun(do: Callable, *arguments, processes: int = 2, restarts: int = 0) -> str:
    """As `torchrun --nproc-per-node`: its agent starts processes that each execute `do(*arguments)`.

    Returns the stderr of these processes, without the agent's lines.
    """
    agent = run(torchrun_agent, do, arguments, processes, restarts)
    assert agent.returncode == 0, agent.stderr
    return "\n".join(line for line in agent.stderr.splitlines() if not re.match(r"[IWE]\d{4} [\d:.]+ \d+ ", line))


def torchrun_agent(do: Callable, arguments: tuple, processes: int, restarts: int) -> None:
    """The work of torchrun's own process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic_launch(LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(time.monotonic_ns()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    ), _reset_signals)(do, *arguments)  # fmt: skip


def _reset_signals(do: Callable, *arguments) -> None:
    """Execute with default signal handlers: a process that torchrun starts does not inherit them."""
    set_default_signals()
    do(*arguments)


def set_default_signals() -> None:
    """Handlers as of a process that a terminal starts. With nohup, or in the background of a script, some are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
