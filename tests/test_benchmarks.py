"""Every part of the benchmarks runs and reports valid figures. No test asserts a time."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import attention, before, compare, fixtures, loss, training, worker
from benchmarks.__main__ import PARTS, Options, main
from benchmarks.timing import Figure, Setting, format_number, time_alternately
from benchmarks.training import train_and_read_memory
from tests.processes import context
from tests.profile import few_samples
from transfusion.config import DataConfig, ModelConfig, Run, TrainingConfig
from transfusion.model.mask import packed_mask
from transfusion.parallel import CPUINFO, cpu_flags, has_cpu_bfloat16
from transfusion.runs import SIZES, named_run
from transfusion.sequence import collate
from transfusion.training.trainer import Trainer

CPU = torch.device("cpu")
QUICK = Setting(CPU, quick=True)
HAS_AMX = "amx_tile" in cpu_flags(CPUINFO)  # oneDNN computes float32 in bfloat16


def short_run(name: str) -> Run:
    """A recipe with few and short rows."""
    run = named_run(name)
    data, training = replace(run.data, fit_documents=100, seq_len=64), replace(run.training, batch_size=2)
    return replace(run, data=data, training=training)


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
            is_growth = figure["what"].startswith("  memory of one more")  # of a few pictures: below the noise
            smallest = -math.inf if is_growth else 0
            assert figure["beside"] if figure["value"] is None else smallest < figure["value"] < math.inf
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
        loader = fixtures.make_paper_loader(seq_len=4096, batch_size=8)
    assert loader.encoder.vocabulary.size == SIZES["7b"].vocab_size
    batches = [collate(rows, 4096, loader.vocabulary) for rows, _ in islice(loader.batches(), 3)]
    positions = sum(batch.positions for batch in batches)
    assert positions > 0.97 * 3 * 8 * 4096
    patches = sum(group.index.numel() for batch in batches for group in batch.groups)
    assert patches / positions == pytest.approx(0.5, abs=0.03)


def test_measured_step_is_the_trainers_step():
    model = ModelConfig(width=32, layers=1, heads=2, intermediate_size=32)
    run = Run("tiny", model, data=DataConfig(seq_len=512), training=TrainingConfig(batch_size=1))
    trainer = Trainer(run, Path(), fixtures.make_paper_loader(512, 1), {}, CPU)
    weight = trainer.model.head.weight.clone()
    step, *others = training.measure_steps(trainer, QUICK)
    assert step.unit == "positions/s"
    kinds = ["float32 matmul, torch.mm", "float32 matmul, oneDNN", "bfloat16 matmul"]
    kinds = [kind for kind, exists in zip(kinds, (True, not HAS_AMX, has_cpu_bfloat16()), strict=True) if exists]
    steps, shares, products = ([f for f in others if f.what.strip() in names] for names in (
        ("a step",), ("FLOPs of the actual batch", "standard FLOPs, 6 N + 12 l w L"), kinds,
    ))  # fmt: skip
    assert [figure.beside for figure in steps] == [
        f"cpu_matmul {choice}" for choice in ("default", "bfloat16")[: 1 + has_cpu_bfloat16()]
    ]
    assert [figure.beside for figure in shares] == kinds * 2
    assert [figure.what.strip() for figure in products] == kinds
    for share in shares:  # of the product that is reported
        (product,) = (figure for figure in products if figure.what.strip() == share.beside)
        assert share.ratio == pytest.approx(share.value / product.value)
    assert len(others) == len(steps + shares + products)
    assert not torch.equal(weight, trainer.model.head.weight)
    assert trainer.run.parallel.cpu_matmul == "auto"


@pytest.mark.skipif(HAS_AMX, reason="with AMX oneDNN computes float32 in bfloat16")
def test_products_are_of_the_kind_that_they_are_named_after(monkeypatch):
    seen = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((
        a.dtype, torch.backends.mkldnn.matmul.fp32_precision)) or multiply(a, b, out=out))  # fmt: skip
    for (kind, shape), function in training.matmul_functions(short_run("digits"), CPU).items():
        seen.clear()
        function()
        dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
        assert seen == [(dtype, "bf16" if kind.endswith("oneDNN") else "none")] * training.NUM_MATMULS
        assert shape in training.matmul_shapes(short_run("digits"))


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
    batch = fixtures.make_paper_batch(512, 2)
    ((plain, _),) = training.make_causal([(batch, [])])
    assert torch.equal(
        packed_mask(plain.document_ids, plain.image_ids).dense, torch.ones(2, 1, 512, 512, dtype=torch.bool).tril()
    )
    assert not torch.equal(
        packed_mask(batch.document_ids, batch.image_ids).dense, packed_mask(plain.document_ids, plain.image_ids).dense
    )


def test_different_attention_output_is_an_error():
    batch = fixtures.make_paper_batch(512, 1)
    mask, tensors = packed_mask(batch.document_ids, batch.image_ids), [torch.randn(1, 2, 512, 16) for _ in range(4)]
    expected = attention.forward_backward(attention.dense_attention(mask.attn_bias), *tensors)
    attention.check_close(attention.forward_backward(mask.attend, *tensors), expected)
    plain = packed_mask(torch.zeros_like(batch.document_ids), batch.image_ids)
    with pytest.raises(RuntimeError, match="output differs"):
        attention.check_close(attention.forward_backward(plain.attend, *tensors), expected)


def test_different_gradients_of_the_loss_are_an_error():
    gradients = [torch.ones(2, 3), torch.ones(4, 3)]
    loss.check_close(gradients, [gradient.clone() for gradient in gradients])
    with pytest.raises(RuntimeError, match="gradient of lm_head differs"):
        loss.check_close(gradients, [gradients[0], 1.001 * gradients[1]])


# An earlier commit


MAIN = """
import json, sys
part, path = sys.argv[1], sys.argv[sys.argv.index("--json") + 1]
assert sys.argv[2:4] == ["--device", "cpu"] and "--quick" in sys.argv
open("{log}", "a").write(part + " {number}\\n")
if part == "failing": sys.exit("damaged")
figure = lambda what, value, unit: dict(what=what, value=value, unit=unit)
json.dump(dict(parts={{part: [
    figure("x: a step", {number} * 10, "positions/s"), figure("  x: a step", 7, "positions/s"),
    figure("time", {number}, "ms"), figure("only {number}", 1, "s"), figure("left out", None, ""),
]}}), open(path, "w"))
"""


@pytest.fixture
def two_commits(tmp_path, monkeypatch):
    """A checkout whose benchmarks measure 2, after a commit in which they measured 1; and the log of their calls."""

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    root, log = tmp_path / "checkout", tmp_path / "log"
    (root / "benchmarks").mkdir(parents=True)
    git("init", "-q")
    for number in (1, 2):
        for name in ("__init__.py", "drawing.py", "failing.py"):
            (root / "benchmarks" / name).touch()
        (root / "benchmarks" / "__main__.py").write_text(MAIN.format(log=log, number=number))
        git("add", "-A")
        git("commit", "-q", "-m", f"{number}")
    monkeypatch.setattr(before, "ROOT", root)
    return log


def test_earlier_commit_takes_turns_with_this_one(two_commits, monkeypatch):
    monkeypatch.setattr(Setting, "pick", lambda self, full, quick: full)
    figures = list(before.measure("drawing", "HEAD~1", QUICK))
    assert two_commits.read_text().split() == ["drawing", "1", "drawing", "2"] * 3
    assert figures == [
        Figure("x: a step", 20, "positions/s", 2.0, "commit HEAD~1"), Figure("time", 2, "ms", 0.5, "commit HEAD~1"),
    ]  # fmt: skip


def test_earlier_commit_that_cannot_be_measured_is_an_error(two_commits):
    with pytest.raises(ValueError, match="^--before nothing: .*nothing"):
        list(before.measure("drawing", "nothing", QUICK))
    with pytest.raises(ValueError, match="^--before HEAD~1: this commit has no part sampling; leave it out$"):
        list(before.measure("sampling", "HEAD~1", QUICK))
    assert not two_commits.exists()  # nothing was measured
    with pytest.raises(ValueError, match="have failed: damaged$"):
        list(before.measure("failing", "HEAD~1", QUICK))


# The comparison

PEER = """
from benchmarks.worker import serve_commands
step_seconds = [0.5]
serve_commands({{
    "about": lambda: {{"parameters": 7, "threads": 1, "versions": {{"transfusion-pytorch": "{version}"}}}},
    "onednn": lambda enabled: step_seconds.append(0.25 if enabled else 0.5),
    "train": lambda steps: step_seconds[-1:] * steps,
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
def test_comparison_reports_both_workers(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(compare, "onednn_is_faster", lambda: True)
    code = PEER.format(version=compare.VERSION)
    figures = list(compare.measure(replace(QUICK, peer_python=fake_python(tmp_path, code))))
    by_peer = [figure.value for figure in figures if figure.what.strip() == compare.PEER and figure.value]
    assert by_peer == [worker.POSITIONS / 0.25, 2.0, 2.0]  # with the faster products
    ours = [figure for figure in figures if figure.what.strip() == "ours" and figure.value]
    assert [figure.unit for figure in ours] == ["positions/s", "s", "s"]
    assert ours[0].ratio == pytest.approx(ours[0].value / by_peer[0])
    assert ours[1].ratio == pytest.approx(2.0 / ours[1].value)
    heads = [figure.beside for figure in figures if figure.what.startswith("drawing")]
    assert heads == ["7 forward passes", "7 and 41 forward passes"]
    memory = [figure for figure in figures if "memory" in figure.what]
    assert memory[0].value is None and memory[0].beside


class TimedWorker:
    """A worker whose step takes 1 s, or these seconds in oneDNN."""

    def __init__(self, onednn_seconds: float):
        self.seconds, self.is_onednn = (1.0, onednn_seconds), 0

    def ask(self, line: str):
        name, *numbers = line.split()
        if name == "onednn":
            self.is_onednn = int(*numbers)
        return [self.seconds[self.is_onednn]] * int(*numbers or [0])


@pytest.mark.parametrize("onednn_seconds", [0.5, 2.0])
@pytest.mark.parametrize("is_used", [True, False])
def test_peer_has_the_products_that_are_faster_for_it(monkeypatch, is_used, onednn_seconds):
    monkeypatch.setattr(compare, "onednn_is_faster", lambda: is_used)
    workers = {compare.PEER: TimedWorker(onednn_seconds), "ours": TimedWorker(1.0)}
    figures = {figure.what.strip(): figure for figure in compare.measure_training(workers, QUICK)}
    assert figures["ours"].ratio == (min(1.0, onednn_seconds) if is_used else 1.0)
    in_onednn = figures.get(f"{compare.PEER}, products in oneDNN")
    assert (in_onednn.ratio if is_used else in_onednn) == (1 / onednn_seconds if is_used else None)
    assert not workers[compare.PEER].is_onednn


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
    batch = collate(next(loader.batches())[0], loader.seq_len, loader.vocabulary)
    markers = 2 + 2 * 2  # bos, eos, and around each image boi, eoi
    assert batch.positions == worker.POSITIONS + worker.BATCH_SIZE * markers == batch.tokens.numel()
    (group,) = batch.groups
    assert tuple(group.x0.shape) == (2 * worker.BATCH_SIZE, worker.CHANNELS, size, size)
