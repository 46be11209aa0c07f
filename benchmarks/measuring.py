"""How things are measured: alternatives in turn, medians, figures beside other figures, and the machine they belong to."""

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
    """What every part is told. quick: the least work that still does everything; its figures mean nothing."""

    device: torch.device
    quick: bool = False
    peer_python: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full, quick):
        return quick if self.quick else full


@dataclass(frozen=True)
class Figure:
    """One line of the table: a speed or a time, and how many times as fast that is as `beside`, measured in the same call.

    Without a value it was not measured, and `beside` says why.
    """

    what: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    beside: str = ""

    def line(self) -> str:
        """100 columns at most."""
        if self.value is None:
            return f"  {self.what}: {self.beside}"
        ratio = "" if self.ratio is None else number(self.ratio)
        return f"  {self.what:<41}{number(self.value):>9} {self.unit:<12}{ratio:>6}  {self.beside}".rstrip()


def memory(what: str, peak: float | None) -> Figure:
    """What a process has held at most, in MiB."""
    return Figure(what, peak, "MiB", beside="" if peak else "this system does not tell")


HEAD = f"{'':<43}{'measured':>9} {'':<12}{'times':>6}  the speed of"


def number(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until it is done, on the device too."""
    begun = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm: int = 1) -> dict[str, float]:
    """Seconds that each takes, the median of so many rounds in which they take turns: what slows the machine slows all.

    The first `warm` rounds do not count.
    """
    seconds = {name: [] for name in ways}
    for number_ in range(warm + rounds):
        for name, way in ways.items():
            found = timed(way, device)
            if number_ >= warm:
                seconds[name].append(found)
    return {name: statistics.median(found) for name, found in seconds.items()}


def machine(setting: Setting) -> dict:
    """What the figures belong to."""
    cuda = setting.cuda
    return {
        "commit": commit(), "begun": time.strftime("%Y-%m-%d %H:%M:%S%z"), "quick": setting.quick,
        "device": torch.cuda.get_device_name(setting.device) if cuda else str(setting.device),
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": version("numpy")},
        "load_at_start": load(),
    }  # fmt: skip


def load() -> list[float]:
    """Processes that wanted to run, over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def commit() -> str:
    """What is measured; "-dirty" where it was changed since. Empty where this is no checkout."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def processor() -> str:
    """Its name, as far as the system tells."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
