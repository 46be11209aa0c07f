"""benchmarks/gpu.sh: its parts run on a CPU, fail alone, and are written to one file. No test asserts a time."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.timing import Figure, Setting
from tests.processes import Process, context
from tests.profile import few_samples
from transfusion.config import DataConfig, Machines, ModelConfig, Run
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.plan import estimate_memory
from transfusion.runs import named_run

QUICK = Setting(torch.device("cpu"), quick=True)


def measure_well(setting: Setting) -> Iterator[Figure]:
    yield Figure("speed", 2.0, "things/s")


def measure_and_fail(setting: Setting) -> Iterator[Figure]:
    yield Figure("speed", 3.0, "things/s")
    raise RuntimeError("no memory\nmore lines")


def measure_and_crash(setting: Setting) -> Iterator[Figure]:
    yield Figure("speed", 4.0, "things/s")
    os.kill(os.getpid(), signal.SIGKILL)


def measure_for_ever(setting: Setting) -> Iterator[Figure]:
    yield Figure("process", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def test_gpu_parts_fail_alone(tmp_path, monkeypatch, capsys):
    """A part that raises, is killed or hangs keeps its figures, and the others are measured."""
    forked = context()
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda kind: forked)
    parts = {"fails": measure_and_fail, "crashes": measure_and_crash, "hangs": measure_for_ever, "good": measure_well}
    limits = {name: (part, 5 if name == "hangs" else 240) for name, part in parts.items()}
    path = tmp_path / "new" / "gpu.json"
    assert not gpu.main(gpu.Options(device="cpu", json=path), limits)
    results = json.loads(path.read_text())["parts"]
    assert {name: result["error"] for name, result in results.items()} == {
        "fails": "RuntimeError: no memory", "crashes": "the process ended with exit code -9",
        "hangs": "stopped after its limit of 5 s", "good": None,
    }  # fmt: skip
    assert [results[name]["figures"][0]["value"] for name in ("fails", "crashes", "good")] == [3.0, 4.0, 2.0]
    for figure in results["hangs"]["figures"]:  # none if the process did not start in time
        assert has_ended(int(figure["value"]))
    assert capsys.readouterr().out.splitlines()[-1].endswith("not complete: fails, crashes, hangs")
    assert gpu.main(gpu.Options(("good",), device="cpu", json=path), limits)
    assert not gpu.main(gpu.Options(device="cpu", json=path, seconds=0), limits)
    results = json.loads(path.read_text())["parts"]
    assert {result["error"] for result in results.values()} == {"not started: no time was left"}
    with pytest.raises(ValueError, match="there is no part 8b; the parts are fails, crashes, hangs, good"):
        gpu.main(gpu.Options(("8b",), device="cpu", json=path), limits)


def test_gpu_part_ends_with_its_program(tmp_path):
    """`timeout`, or a lost connection, ends only the program; a process left on the GPU would slow the next ones."""
    path = tmp_path / "gpu.json"
    program = Process(measure_hanging_part, path)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    program.kill()
    (figure,) = json.loads(path.read_text())["parts"]["hangs"]["figures"]
    assert has_ended(int(figure["value"]))


def measure_hanging_part(path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    gpu.multiprocessing.get_context = lambda kind: forked
    gpu.main(gpu.Options(device="cpu", json=path), {"hangs": (measure_for_ever, 600)})


def has_ended(pid: int) -> bool:
    """Within some seconds; a process that was killed may remain as a zombie."""
    deadline = time.monotonic() + 60
    with suppress(OSError):  # nothing remains of it
        while Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
    return time.monotonic() < deadline


def test_gpu_parts_fit_in_ten_minutes():
    assert sum(limit for _, limit in gpu.PARTS.values()) <= gpu.Options().seconds == 600


def test_gpu_part_measures_training_with_its_loader(monkeypatch):
    """On a CPU there is no data sheet and no memory of the device."""
    monkeypatch.setattr(gpu, "named_run", lambda name: Run(
        name, ModelConfig(width=32, layers=2, heads=2, intermediate_size=32), data=DataConfig(seq_len=512),
    ))  # fmt: skip
    with few_samples():
        speed, *flops, waiting, loading = gpu.measure_size("7b", QUICK, activation_checkpointing=True)
    assert speed.what == "7b, 2 layers, 8 x 512"
    assert [figure.unit for figure in flops] == ["GFLOP/s"] * 2
    assert all(0 < figure.value < math.inf for figure in (speed, *flops, waiting, loading))


def test_largest_run_fits_by_plan():
    run = named_run("7b")
    state = 20 * count_parameters(build_on_meta(run.model))
    assert gpu.largest_run(run, 3 * state) == replace(run, training=replace(run.training, batch_size=8))
    part = gpu.largest_run(run, state // 2)
    assert 1 < part.model.layers < 16 and part.training.batch_size in (4, 8)
    assert estimate_memory(part, Machines()).all <= state // 2
    model, training = replace(part.model, layers=part.model.layers + 1), replace(run.training, batch_size=4)
    more = replace(part, model=model, training=training)
    assert estimate_memory(more, Machines()).all > state // 2
    with pytest.raises(ValueError, match="7b: one layer with 4 rows does not fit in 1,000 bytes"):
        gpu.largest_run(run, 1_000)


@pytest.mark.parametrize("number", [1, 2])
def test_gpu_part_reports_its_tests(tmp_path, monkeypatch, number):
    monkeypatch.setattr(gpu, "TESTS", str(tmp_path / "test_it.py"))
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    assert {number} == 1\n")
    if number == 1:
        assert list(gpu.run_tests(QUICK))[0].beside.startswith("1 passed")
    else:
        with pytest.raises(RuntimeError, match="test_it.py: 1 failed"):
            list(gpu.run_tests(QUICK))


def test_gpu_script_runs_the_module(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    python.chmod(0o755)
    command = ["sh", str(Path(gpu.__file__).with_suffix(".sh")), "tests", "--seconds", "9"]
    output = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": str(python)}, cwd=tmp_path)
    assert output.stdout == f"{gpu.ROOT} -m benchmarks.gpu --device cuda tests --seconds 9\n"
