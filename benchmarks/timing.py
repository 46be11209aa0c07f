"""Timing of alternatives, the figures of the table, and the description of the machine."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Setting:
    """Settings of every part. `quick`: minimal work, as a test; the figures are meaningless. `world`: ranks of which one
    reads data."""

    device: torch.device
    quick: bool = False
    peer_python: Path | None = None
    world: int = 64

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full, quick):
        return quick if self.quick else full


@dataclass(frozen=True)
class Figure:
    """One line of the table: `what` was measured, its value, and how many times as fast it is as `beside`.

    Both are measured in the same call. Without a value nothing was measured, and `beside` contains the reason.
    """

    what: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    beside: str = ""

    def format(self) -> str:
        """The line, at most 100 columns."""
        if self.value is None:
            return f"  {self.what}: {self.beside}"
        ratio = "" if self.ratio is None else format_number(self.ratio)
        return f"  {self.what:<41}{format_number(self.value):>9} {self.unit:<12}{ratio:>6}  {self.beside}".rstrip()


def memory_figure(name: str, peak: float | None) -> Figure:
    """The peak memory of a process in MiB; None if the system does not report it."""
    return Figure(name, peak, "MiB", beside="" if peak else "not reported by this system")


TABLE_HEAD = f"{'':<43}{'measured':>9} {'':<12}{'times':>6}  the speed of"


def format_number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including work queued on the device."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def time_alternately(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each function. Every round calls all of them, so a slow phase of the machine affects all.

    The first `warmup` rounds are not counted.
    """
    seconds = {name: [] for name in functions}
    for round_index in range(warmup + rounds):
        for name, function in functions.items():
            elapsed = time_call(function, device)
            if round_index >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe_machine(setting: Setting) -> dict:
    """Commit, hardware, versions and load."""
    cuda = setting.cuda
    return {
        "commit": git_commit(), "begun": time.strftime("%Y-%m-%d %H:%M:%S%z"), "quick": setting.quick,
        "device": torch.cuda.get_device_name(setting.device) if cuda else str(setting.device),
        "processor": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": version("numpy")},
        "load_at_start": load_average(),
    }  # fmt: skip


def load_average() -> list[float]:
    """The mean number of runnable processes over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def git_commit() -> str:
    """The commit, with "-dirty" if files have changed since. Empty outside of a git checkout."""
    process = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip()


def cpu_name() -> str:
    """The model name of the CPU, or its architecture where /proc/cpuinfo is missing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
