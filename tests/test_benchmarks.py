"""Every part of the benchmarks runs and reports valid figures. No test asserts a time."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import attention, compare, fixtures, gpu, training, worker
from benchmarks.__main__ import PARTS, Options, main
from benchmarks.timing import Figure, Setting, format_number, time_alternately
from benchmarks.training import train_and_read_memory
from tests.processes import context
from tests.profile import few_samples
from transfusion.config import DataConfig, Machines, ModelConfig, Run
from transfusion.model.mask import packed_mask
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.plan import estimate_memory
from transfusion.runs import SIZES, named_run
from transfusion.training.trainer import Trainer

CPU = torch.device("cpu")
QUICK = Setting(CPU, quick=True)


def short_run(name: str) -> Run:
    """A named run with few and short rows."""
    run = named_run(name)
    return replace(run, data=replace(run.data, fit_documents=100, seq_len=64, rows=2))


def memory_of_short_run(name: str) -> float | None:
    """Runs in a separate process, so it applies the patches again."""
    with mock.patch.object(training, "named_run", short_run), few_samples():
        return train_and_read_memory(name)


@pytest.mark.slow
def test_every_part_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "NUM_READS", 2)
    monkeypatch.setattr(training, "WARMUP_STEPS", 1)
    monkeypatch.setattr(training, "named_run", short_run)
    monkeypatch.setattr(training, "train_and_read_memory", memory_of_short_run)
    forked = context()
    monkeypatch.setattr(training.multiprocessing, "get_context", lambda kind: forked)
    threads = torch.get_num_threads()
    main(Options(device="cpu", quick=True, json=tmp_path / "new" / "all.json"))
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "new" / "all.json").read_text())
    assert written["parts"].keys() == PARTS.keys() - {"compare"}
    assert written["quick"]
    assert {"commit", "versions", "processor", "threads", "device", "load_at_start", "load_at_end"} <= written.keys()
    for part, figures in written["parts"].items():
        assert f"\n{part}\n" in printed
        assert any(figure["ratio"] for figure in figures), part
        for figure in figures:
            assert figure["what"].strip() in printed
            assert figure["beside"] if figure["value"] is None else 0 < figure["value"] < math.inf
            assert figure["ratio"] is None or (0 < figure["ratio"] < math.inf and figure["beside"])
    assert max(map(len, printed.splitlines()[2:-1])) <= 100
    assert torch.get_num_threads() == threads  # restored after loading


def test_functions_are_called_alternately():
    calls = []
    seconds = time_alternately({"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, 3, CPU, warmup=2)
    assert calls == [1, 2] * 5
    assert seconds.keys() == {"one", "two"}


def test_numbers_have_three_significant_digits():
    assert [format_number(v) for v in (0.01234, 0.5, 1, 9.876, 98.76, 987.6, 98765)] == [
        "0.0123", "0.500", "1.00", "9.88", "98.8", "988", "98,765"
    ]  # fmt: skip
    assert Figure("7b", beside="left out").format() == "  7b: left out"


# Training


def test_half_of_the_positions_are_patches():
    with few_samples(1024):
        loader = fixtures.make_paper_loader(seq_len=4096, rows=8)
    assert loader.encoder.vocabulary.size == SIZES["7b"].vocab_size
    batches = [batch for batch, _ in islice(loader.batches(), 3)]
    positions = sum(batch.positions for batch in batches)
    assert positions > 0.97 * 3 * 8 * 4096
    patches = sum(group.index.numel() for batch in batches for group in batch.groups)
    assert patches / positions == pytest.approx(0.5, abs=0.03)


def test_measured_step_is_the_trainers_step():
    model = ModelConfig(width=32, layers=1, heads=2, intermediate_size=32)
    run = Run("tiny", model, data=DataConfig(seq_len=512, rows=1))
    trainer = Trainer(run, Path(), fixtures.make_paper_loader(512, 1), {}, CPU)
    before = trainer.model.head.weight.clone()
    step, *ratios = training.measure_steps(trainer, QUICK)
    assert step.unit == "positions/s"
    assert [figure.beside for figure in ratios] == ["matmul rows x width x width", "its fastest matmul"] * 2
    assert not torch.equal(before, trainer.model.head.weight)


def test_rows_are_halved_until_they_fit(monkeypatch):
    def measure_steps(rows: int, setting: Setting) -> list[Figure]:
        if rows > 2:
            raise torch.OutOfMemoryError
        return [Figure(f"{rows} rows")]

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(training, "make_paper_trainer", lambda name, rows, device: rows)
    monkeypatch.setattr(training, "measure_steps", measure_steps)
    assert training.measure_largest_batch("1.4b", 8, QUICK) == (2, [Figure("2 rows")])
    rows, (left_out,) = training.measure_largest_batch("7b", 2, QUICK)
    assert rows == 0
    assert "126 GiB of state" in left_out.format() and "80.0 GiB" in left_out.format()


def test_make_causal_gives_a_causal_mask():
    batch, _ = next(fixtures.make_paper_loader(512, 2).batches())
    ((plain, _),) = training.make_causal([(batch, [])])
    assert torch.equal(
        packed_mask(plain.document_ids, plain.image_ids).dense, torch.ones(2, 1, 512, 512, dtype=torch.bool).tril()
    )
    assert not torch.equal(
        packed_mask(batch.document_ids, batch.image_ids).dense, packed_mask(plain.document_ids, plain.image_ids).dense
    )


def test_different_attention_output_is_an_error():
    batch, _ = next(fixtures.make_paper_loader(512, 1).batches())
    mask, tensors = packed_mask(batch.document_ids, batch.image_ids), [torch.randn(1, 2, 512, 16) for _ in range(4)]
    expected = attention.forward_backward(attention.dense_attention(mask.attn_bias), *tensors)
    attention.check_close(attention.forward_backward(mask.attend, *tensors), expected)
    plain = packed_mask(torch.zeros_like(batch.document_ids), batch.image_ids)
    with pytest.raises(RuntimeError, match="output differs"):
        attention.check_close(attention.forward_backward(plain.attend, *tensors), expected)


# One GPU in ten minutes


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


def has_ended(pid: int) -> bool:
    """Within some seconds; a process that was killed may remain as a zombie."""
    path, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while path.exists() and path.read_text().split(")")[-1].split()[0] != "Z" and time.monotonic() < deadline:
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
    assert gpu.largest_run(run, 3 * state) == replace(run, data=replace(run.data, rows=8))
    part = gpu.largest_run(run, state // 2)
    assert 1 < part.model.layers < 16 and part.data.rows in (4, 8)
    assert estimate_memory(part, Machines()).all <= state // 2
    more = replace(part, model=replace(part.model, layers=part.model.layers + 1), data=replace(run.data, rows=4))
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


# The comparison

PEER = """
from benchmarks.worker import serve_commands
serve_commands({{
    "about": lambda: {{"parameters": 7, "threads": 1, "versions": {{"transfusion-pytorch": "{version}"}}}},
    "train": lambda steps: [0.5] * steps,
    "draw": lambda: print("other output") or {{"seconds": 2.0, "passes": 7}},
    "memory": lambda: None,
}})
"""


def fake_python(folder: Path, code: str) -> Path:
    """An executable that ignores its arguments and runs this code."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(compare, "OURS", {"ours": ("64", "64")})


@pytest.mark.slow
def test_comparison_reports_both_workers(tmp_path, tiny_model):
    code = PEER.format(version=compare.VERSION)
    figures = list(compare.measure(replace(QUICK, peer_python=fake_python(tmp_path, code))))
    by_peer = [figure.value for figure in figures if figure.what.strip() == compare.PEER and figure.value]
    assert by_peer == [worker.POSITIONS / 0.5, 2.0, 2.0]
    ours = [figure for figure in figures if figure.what.strip() == "ours" and figure.value]
    assert [figure.unit for figure in ours] == ["positions/s", "s", "s"]
    assert ours[0].ratio == pytest.approx(ours[0].value / by_peer[0])
    assert ours[1].ratio == pytest.approx(2.0 / ours[1].value)
    heads = [figure.beside for figure in figures if figure.what.startswith("drawing")]
    assert heads == ["7 forward passes", "7 and 501 forward passes"]
    memory = [figure for figure in figures if "memory" in figure.what]
    assert memory[0].value is None and memory[0].beside


def test_wrong_peer_version_is_an_error(tmp_path, tiny_model):
    python = fake_python(tmp_path, PEER.format(version="0.19.4"))
    message = "python: the peer must be transfusion-pytorch 0.20.0, not transfusion-pytorch 0.19.4"
    with pytest.raises(ValueError, match=message):
        list(compare.measure(replace(QUICK, peer_python=python)))


def test_ended_worker_is_an_error(tmp_path):
    with worker.Worker([str(fake_python(tmp_path, 'raise SystemExit("no such package")'))], 1) as process:
        with pytest.raises(ValueError, match="python has ended; the last line of its output: no such package"):
            process.ask("about")


def test_our_workload_has_the_shared_size():
    size = worker.LATENT_SIZE
    loader = compare.RandomLoader(fixtures.Vocabulary.build(worker.VOCAB_SIZE, [(size, size)], patch_size=1))
    batch, _ = next(loader.batches())
    markers = 2 + 2 * 2  # bos, eos, and around each image boi, eoi
    assert batch.positions == worker.POSITIONS + worker.BATCH_SIZE * markers == batch.tokens.numel()
    (group,) = batch.groups
    assert tuple(group.x0.shape) == (2 * worker.BATCH_SIZE, worker.CHANNELS, size, size)
