"""Training: a resumed run equals an uninterrupted one, previews change nothing, and a small run learns."""

import errno
import hashlib
import math
import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.documents import in_double
from tests.processes import Process
from tests.profile import THOROUGH, examples, few_samples
from tests.tiny import begin_run, prepared, small_run
from transfusion.checkpoint.open import OpenedRun, open_checkpoint
from transfusion.checkpoint.read import find_newest_checkpoint, restore_newest
from transfusion.checkpoint.save import SaveError, Saver
from transfusion.config import DataConfig, DigitsConfig, FaultToleranceConfig, ModelConfig, Run, TrainingConfig
from transfusion.data.loader import Loader, heldout_batches
from transfusion.data.sources import open_sources
from transfusion.disk import read_json_lines
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import SINGLE_PROCESS, Ranks, rows_per_pass
from transfusion.training.guard import Guard, TrainingError
from transfusion.training.metrics import MetricsWriter
from transfusion.training.optimizer import build_optimizer, get_learning_rate, update_ema, update_weights
from transfusion.training.signals import SIGNALS
from transfusion.training.trainer import Trainer

some = examples(60)

STEPS = 6
CLOCK = "data_wait_share", "peak_memory_bytes", "tflops_exact", "tflops_usual", "positions_per_second"


class RecordingLoader:
    """A loader that records the hashes of its rows, one for each step."""

    def __init__(self, loader: Loader):
        self.loader, self.vocabulary, self.hashes = loader, loader.vocabulary, []

    def batches(self, start):
        for rows, state in self.loader.batches(start):
            chunks = [chunk for row in rows for chunk in row.chunks]
            arrays = [array for c in chunks for array in (c.tokens, c.targets, *(i.image.content for i in c.images))]
            self.hashes.append(hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
            yield rows, state


def new_trainer(
    folder: Path, run: Run, on_preview=None, change=None, ranks: Ranks = SINGLE_PROCESS, device: str = "cpu"
) -> Trainer:
    """A trainer as the command builds it, in a folder with a run.json. It calls `on_preview(model, step)`, and
    `change(batch, number)` may alter each micro-batch."""
    run, encoder = prepared(run)
    if ranks.is_main and not (folder / "run.json").exists():
        begin_run(folder, run)
    ranks.barrier()  # as the command does: the other ranks read the folder
    num_rows = rows_per_pass(run, ranks.world)
    heldout = {s.name: heldout_batches(s, encoder, 6, num_rows) for s in open_sources(run.data, "heldout")}
    sources = open_sources(run.data, "train")
    with few_samples():
        loader = RecordingLoader(Loader(sources, encoder, run.training.batch_size, ranks.rank, ranks.world))
    on_preview = on_preview and without_watchdog(on_preview)
    trainer = Trainer(run, folder, loader, heldout, torch.device(device), ranks, on_preview)
    if change:
        original, numbers = trainer._collate, count()
        trainer._collate = lambda rows: change(original(rows), next(numbers))
    return trainer


def without_watchdog(on_preview):
    return lambda model, step, reset_watchdog: on_preview(model, step)


def resumed_trainer(folder: Path, run: Run, on_preview=None, change=None, ranks: Ranks = SINGLE_PROCESS) -> Trainer:
    """A trainer that resumes from the newest checkpoint of a folder."""
    trainer = new_trainer(folder, run, on_preview, change, ranks)
    trainer.loop.load_state(restore_newest(folder, trainer.tensors(), ranks)[1])
    return trainer


def preview_every_step(trainer: Trainer, on_preview) -> Trainer:
    """`on_preview(model, step)` is called after every step."""
    trainer.on_preview, trainer.loop.preview_every = without_watchdog(on_preview), 1
    return trainer


def stop_at_step(trainer: Trainer, step: int) -> Trainer:
    """Requests a stop at this step, as a signal does."""

    def on_preview(model, now):
        trainer.loop.stop_requested |= now >= step

    return preview_every_step(trainer, on_preview)


def metrics_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl with figures, without what depends on time."""
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if line.get("event") in (None, "skip")]
    return [{k: v for k, v in line.items() if k not in CLOCK and not k.startswith("seconds")} for line in lines]


def copy_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all its tensors: weights, EMA, moments."""
    parts = trainer.tensors().items()
    return {f"{part} {name}": value.clone() for part, values in parts for name, value in values.items()}


def assert_same_tensors(actual: dict, expected: dict) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@cache
def uninterrupted(micro_batch_size: int | None = None):
    """Tensors, metrics, hashes of batches and progress of an uninterrupted run."""
    with TemporaryDirectory() as folder:
        trainer = new_trainer(Path(folder), small_run(STEPS, micro_batch_size=micro_batch_size))
        assert trainer.train()
        return copy_tensors(trainer), metrics_of(Path(folder)), trainer.loader.hashes[:STEPS], trainer.loop.progress


# A resumed run equals an uninterrupted one


@examples(4)
@given(st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=3), st.sampled_from((None, 3)))
def test_stopped_and_resumed_run_equals_uninterrupted(stops, micro_batch_size):
    run, hashes = small_run(STEPS, micro_batch_size=micro_batch_size), []
    with TemporaryDirectory() as folder:
        folder, last_step = Path(folder), 0
        for step in (*sorted(stops), STEPS):
            trainer = resumed_trainer(folder, run) if last_step else new_trainer(folder, run)
            assert trainer.loop.progress.step == last_step
            finished = stop_at_step(trainer, step).train()
            assert (finished, trainer.loop.progress.step) == (step == STEPS, step)
            hashes += trainer.loader.hashes[: step - last_step]
            last_step = step
        tensors, metrics, expected_hashes, progress = uninterrupted(micro_batch_size)
        assert_same_tensors(copy_tensors(trainer), tensors)
        assert metrics_of(folder) == metrics
        assert hashes == expected_hashes
        for name in ("loader_state", "num_seen", "grad_norms", "num_consecutive_skips"):
            assert getattr(trainer.loop.progress, name) == getattr(progress, name)


@pytest.mark.parametrize(("every", "crash", "resumes_at"), [(2, 3, 2), (2, 4, 2), (1, 5, 4), (3, 5, 3)])
def test_crashed_and_resumed_run_equals_uninterrupted(tmp_path, every, crash, resumes_at):
    """Steps after the newest checkpoint are repeated; metrics.jsonl has each of them once."""

    def power_failure(model, step):
        if step == crash:
            raise RuntimeError("power failure")

    run = small_run(STEPS, checkpoint_every=every)
    with pytest.raises(RuntimeError, match="power failure"):
        new_trainer(tmp_path, run, power_failure).train()
    assert metrics_of(tmp_path)[-1]["step"] == crash
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "text_lo')  # a truncated line
    trainer = resumed_trainer(tmp_path, run)
    assert trainer.loop.progress.step == resumes_at
    assert trainer.train()
    tensors, metrics, hashes, _ = uninterrupted()
    assert_same_tensors(copy_tensors(trainer), tensors)
    assert metrics_of(tmp_path) == metrics
    assert trainer.loader.hashes[: STEPS - resumes_at] == hashes[resumes_at:]


def test_run_stopped_before_its_first_step_equals_uninterrupted(tmp_path):
    trainer = new_trainer(tmp_path, small_run(STEPS))
    trainer.loop.stop_requested = True
    assert not trainer.train()
    trainer = resumed_trainer(tmp_path, small_run(STEPS))
    assert trainer.train()
    assert_same_tensors(copy_tensors(trainer), uninterrupted()[0])
    assert metrics_of(tmp_path) == uninterrupted()[1]


def test_training_a_finished_run_again_changes_nothing(tmp_path):
    assert new_trainer(tmp_path, small_run(STEPS)).train()
    again = resumed_trainer(tmp_path, small_run(STEPS))
    assert again.train()
    assert_same_tensors(copy_tensors(again), uninterrupted()[0])
    assert metrics_of(tmp_path) == uninterrupted()[1]


LONG = small_run(100_000, validate_every=5)  # never reaches its last step here


def train_long(folder: Path) -> None:
    sys.exit(40 + new_trainer(folder, LONG).train())


def test_run_stopped_by_a_real_signal_resumes(tmp_path):
    """Each signal to a separate process; each is compared with an uninterrupted run."""
    processes = [Process(train_long, tmp_path / number.name) for number in SIGNALS]
    try:
        deadline, waiting = time.monotonic() + 90, dict(zip(SIGNALS, processes, strict=True))
        while waiting:
            for number, process in list(waiting.items()):
                if len(read_json_lines(tmp_path / number.name / "metrics.jsonl")) > 3:
                    process.send_signal(number)
                    del waiting[number]
                assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.01)
        outputs = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    reached = []
    for number, process, output in zip(SIGNALS, processes, outputs, strict=True):
        assert process.returncode == 40, output  # train() returned False
        trainer = resumed_trainer(tmp_path / number.name, LONG)
        step = trainer.loop.progress.step
        assert f"stopped at step {step} and saved" in output
        assert metrics_of(tmp_path / number.name)[-1]["step"] == step
        stop_at_step(trainer, step + 2).train()
        reached.append((step + 2, copy_tensors(trainer), metrics_of(tmp_path / number.name)))
    check_passes_through(tmp_path / "uninterrupted", reached)


def check_passes_through(folder: Path, reached: list) -> None:
    """One uninterrupted run passes through all these (step, tensors, metrics)."""
    trainer, passed = new_trainer(folder, LONG), {}

    def on_preview(model, step):
        if step in [s for s, _, _ in reached]:
            passed[step] = copy_tensors(trainer), metrics_of(folder)
        trainer.loop.stop_requested |= step >= max(s for s, _, _ in reached)

    preview_every_step(trainer, on_preview).train()
    for step, tensors, metrics in reached:
        assert_same_tensors(tensors, passed[step][0])
        assert metrics == passed[step][1]


def test_first_signal_stops_and_second_ctrl_c_interrupts(default_signals, tmp_path):
    handlers = [signal.getsignal(number) for number in SIGNALS]

    def once(model, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    assert not new_trainer(tmp_path / "once", small_run(STEPS), once).train()
    assert find_newest_checkpoint(tmp_path / "once").name == "step-000002"

    def scheduler_and_torchrun(model, step):
        """Both pass the signal on."""
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    assert not new_trainer(tmp_path / "passed-on", small_run(STEPS), scheduler_and_torchrun).train()
    assert find_newest_checkpoint(tmp_path / "passed-on").name == "step-000000"

    def twice(model, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path / "twice", small_run(STEPS), twice).train()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_checkpoints_are_written_on_schedule_and_the_newest_stay(tmp_path):
    new_trainer(tmp_path, small_run(7, checkpoint_every=2, keep_checkpoints=3, validate_every=100)).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-000004", "step-000006", "step-000007"]
    assert open_checkpoint(tmp_path).step == 7


@pytest.mark.parametrize("tail", [b'{"step": 6, "te', b"\0" * 50, b"\xff\xfe", b"[1]\n5\n", b"[" * 10_000])
def test_metrics_after_the_checkpoint_are_removed_on_resume(tmp_path, tail):
    """A crash may leave any bytes at the end, which are removed too."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsWriter(path, 0)
    for step in range(6):
        metrics.write(step, text_loss=step / 2)
    path.write_bytes(path.read_bytes() + tail)
    assert [line["step"] for line in read_json_lines(path)] == [0, 1, 2, 3, 4, 5]
    again = MetricsWriter(path, 3)
    assert [line["step"] for line in read_json_lines(path)] == [0, 1, 2, 3]
    again.write(4, text_loss=9.0)
    assert read_json_lines(path)[-1] == {"step": 4, "text_loss": 9.0}
    assert len(path.read_text().splitlines()) == 5


def test_metrics_are_never_rewritten_in_place(tmp_path, monkeypatch):
    """A process that reads the file has the old or the new lines, and so has the next run after a crash."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsWriter(path, 0)
    for step in range(6):
        metrics.write(step, text_loss=step / 2)
    before = path.read_text()
    with path.open() as reader, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            MetricsWriter(path, 3)
        assert path.read_text() == before
        patch.undo()
        MetricsWriter(path, 3)
        assert reader.read() == before
    assert path.read_text() == "".join(before.splitlines(keepends=True)[:4])


# What must have no effect


def test_previews_do_not_change_training(tmp_path):
    """A preview that draws and captions with the engine: same weights, same metrics, same batches."""
    run, encoder = prepared(small_run(STEPS))
    images = []

    def draw(model, step):
        description = "tiny", run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {}
        engine = Engine(OpenedRun(*description, model, step, torch.device("cpu")))
        torch.manual_seed(step)  # a preview may change the global generator
        answers = engine.generate([Request(("three",), 2, seed=step), Request(("a",), seed=step)])
        images.append(answers[0][0].parts[0])

    trainer = new_trainer(tmp_path, run, draw)
    assert trainer.train()
    assert len(images) == STEPS + 1
    tensors, metrics, hashes, _ = uninterrupted()
    assert_same_tensors(copy_tensors(trainer), tensors)
    assert metrics_of(tmp_path) == metrics
    assert trainer.loader.hashes[:STEPS] == hashes


def train_in_double(folder: Path, run: Run) -> tuple[dict, list[dict]]:
    """The change of each weight of a float64 model, and the metrics."""
    trainer = new_trainer(folder, run, change=lambda batch, _: in_double(batch))
    trainer.model.double(), trainer.ema.double()
    trainer.heldout = {}
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return {name: value - first[name] for name, value in trainer.model.state_dict().items()}, metrics_of(folder)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("sources", [("digits",), ("topics", "digits")])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, micro_batch_size, sources):
    """Losses are divided by the counts of the whole step. Rows of `topics` have no image, so some batches have none.

    A large eps makes Adam's update smooth: else gradients near 0 would give steps of the full size.
    """
    smooth = {"eps": 1.0, "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
    runs = [small_run(4, micro_batch_size=size, **smooth) for size in (micro_batch_size, None)]
    small, large = (replace(run, data=replace(run.data, sources=sources)) for run in runs)
    sizes = [len(batch.tokens) for batch, _ in next(new_trainer(tmp_path / "small", small).batches(None))[0]]
    assert sizes == {1: [1, 1, 1, 1], 3: [3, 1]}[micro_batch_size]
    changes, metrics = train_in_double(tmp_path / "small", small)
    expected, expected_metrics = train_in_double(tmp_path / "large", large)
    for name, value in expected.items():
        assert (changes[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
        assert value.abs().max() > 1e-4  # every parameter is trained
    for line, expected_line in zip(metrics, expected_metrics, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-5)


def test_heldout_losses_are_of_the_ema_and_do_not_change_it(tmp_path):
    trainer = new_trainer(tmp_path, small_run(3))
    trainer.train()
    before = copy_tensors(trainer)
    losses, text = trainer.evaluate_heldout(lambda: None)
    assert losses == trainer.evaluate_heldout(lambda: None)[0]
    assert_same_tensors(copy_tensors(trainer), before)
    assert metrics_of(tmp_path)[-1] == {"step": 3, **{f"heldout_{name}": value for name, value in losses.items()}}
    assert f"digits: text {losses['text_loss/digits']:.3f}" in text
    trainer.ema.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate_heldout(lambda: None)[0] != losses


# One step


def test_step_never_waits_for_the_device(tmp_path, monkeypatch):
    """On the meta device, where reading a value raises an error, and for which there is no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    trainer = new_trainer(tmp_path, small_run(micro_batch_size=2))
    micro_batches, _ = next(trainer.batches(None))
    meta = torch.device("meta")
    trainer.device, trainer.model, trainer.ema = meta, trainer.model.to(meta), trainer.ema.to(meta)
    trainer.optimizer = build_optimizer(trainer.model, trainer.run.training)
    trainer.optimizer.defaults["fused"], trainer.optimizer.step = True, lambda: None  # PyTorch has none for this device
    guard = Guard(FaultToleranceConfig(skip_spikes_above=3.0), tmp_path, SINGLE_PROCESS, meta)
    read = trainer.step(0, micro_batches, trainer.count(micro_batches), guard)
    assert trainer.optimizer.found_inf.device == meta
    with pytest.raises(NotImplementedError, match="meta"):
        read()


@pytest.mark.parametrize("fused", [True, False])
def test_update_is_a_step_of_the_optimizer_or_changes_nothing(fused):
    """Also in its first step, and no gradient of a rejected update reaches the moments."""
    weights = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]
    ours, plain = (torch.optim.AdamW([weight], lr=0.1, fused=fused) for weight in weights)
    for gradient in (math.nan, 1.0, math.inf, 5.0, 2.0):
        weights[0].grad, is_applied = torch.full((3, 4), gradient), gradient in (1.0, 2.0)
        update_weights(ours, torch.tensor(is_applied))
        if is_applied:
            weights[1].grad = weights[0].grad.clone()
            plain.step()
        assert torch.equal(*weights)


@pytest.mark.parametrize(("checkpoint_every", "expected"), [
    (100, "queue 1, queue 2, read 1, queue 3, read 2, queue 4, read 3, read 4"),
    (2, "queue 1, queue 2, read 1, read 2, save 2, queue 3, queue 4, read 3, read 4, save 4"),
])  # fmt: skip
def test_step_is_read_after_the_next_is_queued_and_before_a_checkpoint(tmp_path, checkpoint_every, expected):
    trainer, events = new_trainer(tmp_path, small_run(4, checkpoint_every=checkpoint_every, validate_every=100)), []
    original_step, original_save = trainer.step, trainer.loop._save

    def step(number, *args):
        read = original_step(number, *args)
        events.append(f"queue {number + 1}")
        return lambda: events.append(f"read {number + 1}") or read()

    trainer.step = step
    trainer.loop._save = lambda saver: events.append(f"save {trainer.loop.progress.step}") or original_save(saver)
    trainer.train()
    assert ", ".join(event for event in events if checkpoint_every == 2 or "save" not in event) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_in_pinned_memory(tmp_path, monkeypatch, device):
    """Batch and noise, all tensors."""
    trainer, pinned = new_trainer(tmp_path, small_run(micro_batch_size=2)), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    trainer.device = torch.device(device)
    micro_batches, _ = next(trainer.batches(None))
    parts = [part for batch, noise in micro_batches for part in (batch, *batch.groups, *noise)]
    values = [value for part in parts for value in vars(part).values()]
    values += [value for batch, _ in micro_batches for value in batch.sides]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20
    assert {id(tensor) for tensor in tensors if device == "cuda"} == {id(tensor) for tensor in pinned}


@some
@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 250))
def test_learning_rate_is_linear_warmup_then_half_a_cosine(step, warmup, more):
    config = TrainingConfig(steps=warmup + more, warmup_steps=warmup)
    learning_rate = get_learning_rate(step, config)
    if step < warmup:
        assert learning_rate == pytest.approx(3e-4 * (step + 1) / warmup)
    elif step >= config.steps:
        assert learning_rate == pytest.approx(1.5e-5)
    else:
        angle = math.pi * (step - warmup) / more
        assert learning_rate == pytest.approx(1.5e-5 + (3e-4 - 1.5e-5) * math.cos(angle / 2) ** 2)
        assert get_learning_rate(step + 1, config) < learning_rate


def test_learning_rates_of_the_paper():
    """Section 4.1: 4,000 steps of warm-up to 3e-4, then down to 1.5e-5 at step 250,000."""
    config = TrainingConfig()
    steps = (0, 1_999, 3_999, 4_000, 127_000, 250_000)
    expected = (7.5e-8, 1.5e-4, 3e-4, 3e-4, 1.575e-4, 1.5e-5)
    assert [get_learning_rate(step, config) for step in steps] == pytest.approx(expected)


def test_every_step_uses_and_logs_its_learning_rate(tmp_path):
    run = small_run(5)
    trainer = new_trainer(tmp_path, run)
    used = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append([g["lr"] for g in trainer.optimizer.param_groups]), step())
    trainer.train()
    expected = [get_learning_rate(n, run.training) for n in range(5)]
    assert used == [[rate, rate] for rate in expected]
    assert [line["learning_rate"] for line in metrics_of(tmp_path) if "learning_rate" in line] == expected


@some
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0, 0.9999))
def test_ema_is_a_moving_average_that_soon_replaces_the_start(values, decay):
    model, ema = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(ema.weight, 1e3)
    expected = 1e3
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        update_ema(ema, model, step, decay, torch.tensor(True))
        step_decay = min(decay, (1 + step) / (10 + step))
        expected = step_decay * expected + (1 - step_decay) * value
        assert ema.weight.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert model.weight.item() == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])  # the square of 1e25 overflows float32
@pytest.mark.parametrize("step", [1, 3])
def test_non_finite_loss_raises_and_applies_no_update(tmp_path, bad, step):
    def change(batch, number):
        if number == step - 1:
            with_loss = batch.groups[0].loss.nonzero()[0]
            batch.groups[0].x0[with_loss, 0, 0, 0] = bad
        return batch

    trainer = new_trainer(tmp_path, small_run(5, checkpoint_every=2), change=change)
    after_step = {}
    preview_every_step(trainer, lambda model, now: after_step.update({now: copy_tensors(trainer)}))
    with pytest.raises(TrainingError, match=rf"step {step}: the (text|image) loss is not finite") as raised:
        trainer.train()
    assert len(str(raised.value).splitlines()) == 1
    assert trainer.loop.progress.step == step - 1
    assert_same_tensors(copy_tensors(trainer), after_step[step - 1])
    assert max(line["step"] for line in metrics_of(tmp_path)) == step - 1
    if step > 2:
        assert open_checkpoint(tmp_path).step == 2


def test_large_gradients_are_clipped_to_max_grad_norm(tmp_path):
    """The logged norm is the one before clipping."""
    trainer = new_trainer(tmp_path, small_run(1, max_grad_norm=1e-3))
    norms = []
    step = trainer.optimizer.step

    def record_and_step():
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())
        step()

    trainer.optimizer.step = record_and_step
    trainer.train()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert metrics_of(tmp_path)[1]["gradient_norm"] > 0.1


def test_failed_save_raises_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    """Saving is in the background: the error is raised at the next checkpoint, or at the end."""
    run, publish = small_run(6, checkpoint_every=2), Saver._publish

    def disk_full(saver, temporary, final, *rest):
        if final.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(saver, temporary, final, *rest)

    monkeypatch.setattr(Saver, "_publish", disk_full)
    for failing, raised_at, saved in (("step-000004", 6, 2), ("step-000006", 6, 4)):
        trainer = new_trainer(tmp_path / failing, run)
        with pytest.raises(SaveError, match=f"could not save step {int(failing[5:])} in .*: No space left"):
            trainer.train()
        assert trainer.loop.progress.step == raised_at
        names = sorted(path.name for path in (tmp_path / failing / "checkpoints").glob("step-*"))
        assert names[-1:] == [f"step-{saved:06d}"]
        assert open_checkpoint(tmp_path / failing).step == saved
    monkeypatch.undo()
    again = resumed_trainer(tmp_path / failing, run)
    assert again.loop.progress.step == 4
    assert again.train()
    assert_same_tensors(copy_tensors(again), uninterrupted()[0])


def test_state_of_another_version_is_refused_in_one_line(tmp_path):
    trainer = new_trainer(tmp_path, small_run(STEPS))
    with pytest.raises(TrainingError, match="another version") as error:
        trainer.loop.load_state({"step": 3, "seconds": 1.0, "positions": 7, "place": {"block": 0, "row": 3}})
    assert len(str(error.value).splitlines()) == 1
    assert trainer.loop.progress.step == 0


@pytest.mark.parametrize("damage", ["model", "state.json", "manifest.json"])
def test_damaged_checkpoint_is_replaced_by_repeating_its_steps(tmp_path, damage):
    """The run resumes from the checkpoint before, and equals an uninterrupted one."""
    run = small_run(STEPS, checkpoint_every=2, keep_checkpoints=3)
    stop_at_step(new_trainer(tmp_path, run), 5).train()
    for step in (5, 4):
        path = tmp_path / "checkpoints" / f"step-00000{step}" / damage
        path = next(path.iterdir()) if path.is_dir() else path
        path.write_bytes(path.read_bytes()[:-3])
    trainer = resumed_trainer(tmp_path, run)
    assert trainer.loop.progress.step == 2
    assert trainer.train()
    assert_same_tensors(copy_tensors(trainer), uninterrupted()[0])
    assert metrics_of(tmp_path) == uninterrupted()[1]
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [*(f"step-00000{n}" for n in (2, 4)), "step-000004.damaged", "step-000005.damaged", "step-000006"]
    assert resumed_trainer(tmp_path, run).loop.progress.step == STEPS


# A small run learns


@pytest.mark.slow
def test_small_run_learns_to_caption_and_draw_digits(tmp_path):
    """In 100 steps on pairs, most of them image first; 6 seconds on one core.

    Measured on held-out scans, seeds 0 to 2: captions after their image 0.15 to 0.17 nats per token (without it 1.21, the
    entropy of the captions), images after their caption 0.62 to 0.65; at the start 5.9 to 6.4 and 0.98 to 1.00.
    """
    run = small_run(100, warmup_steps=20, learning_rate=8e-3, ema_decay=0.95)
    data = replace(run.data, fit_documents=100, image_first=0.7, digits=DigitsConfig(interleaved=0.0))
    first, last = train_on_digits(tmp_path, run, data, replace(run.model, layers=2, patch_size=4), 100)
    assert last["heldout_text_loss/captions"] < 0.3 < 5 < first["heldout_text_loss/captions"]
    assert last["heldout_text_loss/captions"] < 0.4 * last["heldout_text_loss/drawings"]  # the image is used
    assert last["heldout_image_loss/drawings"] < 0.75 < 0.95 < first["heldout_image_loss/drawings"]


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all")
def test_small_run_learns_documents_of_several_scans(tmp_path):
    """217 thousand parameters, 700 steps, some documents with several captioned scans; 25 seconds on one core.

    Measured on held-out scans: captions after their image 0.53 nats per token (without it 1.06, the entropy of the
    captions), images after their caption 0.374; at the start 6.4 and 0.995. Margins: 20 % and 12 %.
    """
    run = small_run(700, warmup_steps=30, learning_rate=5e-3, ema_decay=0.98)
    data = replace(run.data, fit_documents=400, image_first=0.35)
    first, last = train_on_digits(tmp_path, run, data, replace(run.model, layers=3), 297)
    assert last["heldout_text_loss/captions"] < 0.65 < 4 < first["heldout_text_loss/captions"]
    assert last["heldout_text_loss/captions"] < 0.7 * last["heldout_text_loss/drawings"]  # the image is used
    assert last["heldout_image_loss/drawings"] < 0.42 < 0.95 < first["heldout_image_loss/drawings"]


def train_on_digits(folder: Path, run: Run, data: DataConfig, model: ModelConfig, documents: int) -> list[dict]:
    """Held-out losses before and after training: of captions after their images, and of images after their captions."""
    data = replace(data, tokenizer_size=300, seq_len=128, shuffle_block=512)
    model = replace(model, width=64, heads=4, intermediate_size=168, qk_norm=True)
    training = replace(run.training, batch_size=8, validate_every=10_000)
    run, encoder = prepared(replace(run, data=data, model=model, training=training))
    (source,) = open_sources(run.data, "heldout")
    heldout = {
        name: heldout_batches(source, replace(encoder, config=replace(run.data, image_first=share)), documents, 8)
        for name, share in (("captions", 1.0), ("drawings", 0.0))
    }
    begin_run(folder, run)
    loader = Loader(open_sources(run.data, "train"), encoder, 8)
    Trainer(run, folder, loader, heldout, torch.device("cpu")).train()
    return [line for line in metrics_of(folder) if any(name.startswith("heldout") for name in line)]


# Parts with another learning rate, or frozen

PARTS = {"text_lr_scale": ("tokens.", "head."), "image_lr_scale": ("patches.",), "transformer_lr_scale": ("transformer.",)}


def select_part(tensors: dict[str, torch.Tensor], lr_scale: str) -> dict[str, torch.Tensor]:
    """The raw and averaged weights and the optimizer state of the part with this option."""
    return {name: value for name, value in tensors.items() if name.split(" ")[1].startswith(PARTS[lr_scale])}


@pytest.mark.parametrize("frozen", PARTS)
def test_frozen_part_never_changes(tmp_path, frozen):
    """Bit for bit, in spite of weight decay, and it has no moments. The other parts are trained, also after a resume."""
    run = small_run(STEPS, weight_decay=0.5, **{frozen: 0.0})
    trainer = new_trainer(tmp_path / "uninterrupted", run)
    before = copy_tensors(trainer)
    assert trainer.train()
    after = copy_tensors(trainer)
    assert_same_tensors(select_part(after, frozen), select_part(before, frozen))
    assert {name.split(" ")[0] for name in select_part(after, frozen)} == {"model", "ema"}
    for other in PARTS.keys() - {frozen}:
        trained = select_part(after, other)
        assert {name.split(" ")[0] for name in trained} == {"model", "ema", "optimizer"}
        assert not any(torch.equal(value, before[name]) for name, value in trained.items() if name.endswith("weight"))
    stop_at_step(new_trainer(tmp_path / "stopped", run), 3).train()
    again = resumed_trainer(tmp_path / "stopped", run)
    assert again.train()
    assert_same_tensors(copy_tensors(again), after)


@pytest.mark.parametrize("slower", PARTS)
def test_lr_scale_scales_the_updates_of_its_part_only(tmp_path, slower):
    """The first update of AdamW, with weight decay, is proportional to the learning rate."""
    updates = []
    for name, lr_scale in (("default", 1.0), ("slower", 0.25)):
        trainer = new_trainer(tmp_path / name, small_run(1, **{slower: lr_scale}))
        before = copy_tensors(trainer)
        trainer.train()
        after = copy_tensors(trainer)
        updates.append({name: after[name] - before[name] for name in before if name.startswith("model")})
    for part in PARTS:
        for name, update in select_part(updates[0], part).items():
            expected = update * (0.25 if part == slower else 1.0)
            torch.testing.assert_close(updates[1][name], expected, rtol=1e-3, atol=1e-6)
            assert update.abs().max() > 1e-4 or not name.endswith("weight")


@pytest.mark.parametrize(("lr_scales", "message"), [
    ({"text_lr_scale": -1.0}, "at least 0"), ({"image_lr_scale": math.nan}, "finite number"),
    ({"transformer_lr_scale": math.inf}, "finite number"), (dict.fromkeys(PARTS, 0.0), "nothing would be trained"),
])  # fmt: skip
def test_invalid_lr_scales_are_refused(lr_scales, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**lr_scales)
