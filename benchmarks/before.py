"""This checkout against an earlier commit: each runs its own `python -m benchmarks PART` in processes that take turns."""

import io
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import ROOT, Figure, Setting

Key = tuple[str, str]  # what was measured, and its unit


def measure(part: str, commit: str, setting: Setting) -> Iterator[Figure]:
    """The figures of a part that both measure, with the ratio to those of `commit`: medians over rounds in which each runs
    the part once. ValueError when there is no such commit, or when a part cannot be measured."""
    values = {"before": defaultdict(list), "now": defaultdict(list)}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"before": Path(temporary, "checkout"), "now": ROOT}
        check_out(commit, folders["before"])
        if not (folders["before"] / "benchmarks" / f"{part}.py").exists():
            raise ValueError(f"--before {commit}: this commit has no part {part}; leave it out")
        for _ in range(setting.pick(3, 1)):
            for name, folder in folders.items():
                for key, value in run_part(part, folder, Path(temporary, "figures.json"), setting).items():
                    values[name][key].append(value)
    both = [key for key in values["now"] if key in values["before"]]
    if not both:
        raise ValueError(f"--before {commit}: part {part} has no figure in common with this checkout")
    for what, unit in both:
        before, now = (statistics.median(values[name][what, unit]) for name in ("before", "now"))
        is_speed = unit.endswith("/s")  # otherwise less is better: time, memory
        yield Figure(what, now, unit, now / before if is_speed else before / now, f"commit {commit}")


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit into a new folder, and nothing into the repository."""
    process = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if process.returncode:
        raise ValueError(f"--before {commit}: {last_line(process.stderr)}")
    with tarfile.open(fileobj=io.BytesIO(process.stdout)) as archive:
        archive.extractall(folder, filter="data")


def run_part(part: str, folder: Path, figures: Path, setting: Setting) -> dict[Key, float]:
    """The first figure of each name that the benchmarks in this folder measure."""
    command = [sys.executable, "-m", "benchmarks", part, "--device", str(setting.device), "--json", str(figures)]
    command += ["--quick"] if setting.quick else []
    command += ["--peer-python", str(setting.peer_python)] if setting.peer_python else []
    process = subprocess.run(command, cwd=folder, capture_output=True)
    if process.returncode:
        raise ValueError(f"the benchmarks in {folder} have failed: {last_line(process.stderr)}")
    values = {}
    for figure in json.loads(figures.read_text(encoding="utf-8"))["parts"][part]:
        if figure["value"]:
            values.setdefault((figure["what"].strip(), figure["unit"]), figure["value"])
    return values


def last_line(output: bytes) -> str:
    """The last line with a word; some messages are in a box."""
    lines = output.decode(errors="replace").splitlines()
    return next((line.strip(" │") for line in reversed(lines) if re.search(r"\w", line)), "no output")
