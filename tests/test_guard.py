"""Bad updates: no rank applies one, the batch is recorded, the guard's state survives restarts, and hangs are ended."""

import json
import math
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import processes
from tests.profile import examples
from tests.ranks import TIMEOUT
from tests.test_cli import TINY, command, fails
from tests.test_parallel import AUTOENCODER, FITTING, gather_tensors
from tests.test_training import metrics_of, new_trainer, resumed_trainer, stop_at_step
from tests.tiny import small_run
from transfusion import objective
from transfusion.checkpoint import save as save_module
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.read import describe_run, restore_newest
from transfusion.checkpoint.save import Saver
from transfusion.cli.preview import previewer
from transfusion.config import FaultToleranceConfig, Run
from transfusion.data.sources import open_raw
from transfusion.inference.engine import Engine
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.training import guard as guard_module
from transfusion.training.codec import CodecTrainer
from transfusion.training.guard import MIN_NORM_HISTORY, NORM_HISTORY, Guard, TrainingError, watchdog

BAD = (math.nan, math.inf, -math.inf)


def a_run(steps: int = 8, skip: int = 0, spike: float | None = None, **training) -> Run:
    return replace(
        small_run(steps, **training), fault_tolerance=FaultToleranceConfig(skip_nonfinite=skip, skip_spikes_above=spike)
    )


def train(
    ranks: Ranks, folder: Path, run: Run, factors: dict[int, float] = {}, on: int = 0,  # noqa: B006 (not written to)
    where: str = "loss", stop_at: int | None = None,
) -> tuple[dict[str, np.ndarray], str, int]:  # fmt: skip
    """All tensors, the result or error as text, and the last step.

    In the steps of `factors` (counted from 1) the loss of rank `on`, or only its gradient, is multiplied by its factor.
    """
    trainer = (resumed_trainer if (folder / "checkpoints").exists() else new_trainer)(folder, run, ranks=ranks)
    ranks.barrier()
    compute_losses, total_loss = objective.compute_losses, objective.total_loss
    original_step, numbers = trainer.step, []

    def step(number, *args):
        numbers.append(number + 1)
        return original_step(number, *args)

    def factor() -> float:
        return factors.get(numbers[-1], 1.0) if ranks.rank == on and torch.is_grad_enabled() and numbers else 1.0

    def bad_losses(*args):
        losses = compute_losses(*args)
        return replace(losses, text_sum=losses.text_sum * factor()) if where == "loss" else losses

    def bad_total(*args):
        return total_loss(*args) * (factor() if where == "gradient" else 1.0)

    trainer.step = step
    if stop_at is not None:
        stop_at_step(trainer, stop_at)
    with mock.patch.object(objective, "compute_losses", bad_losses), mock.patch.object(objective, "total_loss", bad_total):
        try:
            outcome = str(trainer.train())
        except TrainingError as error:
            outcome = str(error)
    ranks.barrier()
    return gather_tensors(trainer), outcome, trainer.loop.progress.step


def same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, expected[name]) for name, value in actual.items())


def read_fault(folder: Path, step: int) -> dict:
    return json.loads((folder / "faults" / f"step-{step:06d}.json").read_text())


# Non-finite values


@pytest.fixture(scope="module")
def undisturbed(pair, tmp_path_factory) -> tuple[list, list]:
    """Of each of two ranks: its tensors after two steps, and the documents of its third batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return pair(train, folder / "run", a_run(), {}, 0, "loss", 2), pair(documents_of_batch, folder / "read", a_run(), 3)


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize(("where", "factor", "reason"), [
    ("loss", math.nan, "the text loss is not finite"), ("loss", math.inf, "the text loss is not finite"),
    ("gradient", math.nan, "the gradient is not finite"), ("gradient", math.inf, "the gradient is not finite"),
])  # fmt: skip
def test_non_finite_value_on_one_rank_changes_no_weight_on_any(pair, undisturbed, tmp_path, on, where, factor, reason):
    """The fault file lists the documents of both ranks."""
    before, documents = undisturbed
    outcomes = pair(train, tmp_path / "run", a_run(), {3: factor}, on, where)
    for (tensors, error, step), (expected, _, _) in zip(outcomes, before, strict=True):
        assert error.startswith(f"step 3: {reason}, so the update was not applied; ")
        assert len(error.splitlines()) == 1
        assert str(tmp_path / "run" / "faults" / "step-000003.json") in error
        assert step == 2
        assert same(tensors, expected)
    assert max(line["step"] for line in metrics_of(tmp_path / "run")) == 2
    fault = read_fault(tmp_path / "run", 3)
    assert (fault["step"], fault["reason"]) == (3, reason)
    assert fault["batches"] == [{"rank": rank, "rows": rows} for rank, rows in enumerate(documents)]
    assert all(document.startswith("digits ") for rows in documents for row in rows for document in row)
    assert documents[0] != documents[1]


def documents_of_batch(ranks: Ranks, folder: Path, run: Run, step: int) -> list[list[str]]:
    """The documents of a rank's rows in that step, counted from 1."""
    batches = new_trainer(folder, run, ranks=ranks).batches(None)
    for _ in range(step):
        micro_batches, _ = next(batches)
    return [row for batch, _ in micro_batches for row in batch.documents]


def test_skip_nonfinite_limits_skipped_updates_in_a_row(pair, tmp_path):
    """On both ranks; an applied update resets the count."""
    factors = dict.fromkeys((2, 3, 5, 6, 8), math.nan)
    (tensors, outcome, step), (tensors_1, _, _) = pair(train, tmp_path / "two", a_run(10, skip=2), factors, 1)
    assert (outcome, step) == ("True", 10)
    assert same(tensors, tensors_1)
    assert tensors["optimizer tokens.weight.step"] == 10 - len(factors)
    assert sorted(path.name for path in (tmp_path / "two" / "faults").iterdir()) == [f"step-{n:06d}.json" for n in factors]
    steps = [line["step"] for line in metrics_of(tmp_path / "two") if "learning_rate" in line]
    assert steps == list(range(1, 11))
    outcomes = pair(train, tmp_path / "three", a_run(10, skip=2), dict.fromkeys((2, 4, 5, 6), math.nan), 1)
    assert [step for _, _, step in outcomes] == [5, 5]
    assert all(error.startswith("step 6: the text loss is not finite") for _, error, _ in outcomes)


def test_skipped_update_changes_no_tensor(tmp_path):
    expected, _, _ = train(SINGLE_PROCESS, tmp_path / "one", a_run(), stop_at=4)
    factors = dict.fromkeys((5, 6), math.inf)
    tensors, outcome, step = train(SINGLE_PROCESS, tmp_path / "two", a_run(skip=3), factors, stop_at=6)
    assert (outcome, step) == ("False", 6)
    assert same(tensors, expected)


@examples(60)
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 4), st.sampled_from(BAD), st.sampled_from(("norm", "value")))
def test_guard_counts_skipped_updates_in_a_row(steps, skip, number, where):
    """For any order of good and bad updates."""
    with TemporaryDirectory() as folder:
        guard, num_skipped = new_guard(Path(folder), skip_nonfinite=skip), 0
        for step, good in enumerate(steps, 1):
            num_skipped = 0 if good else num_skipped + 1
            norm, value = (number, 1.0) if where == "norm" else (1.0, number)
            update = (1.0, 1.0) if good else (norm, value)
            if num_skipped > skip:
                with pytest.raises(TrainingError, match=f"^step {step}: "):
                    is_applied(guard, step, *update)
                break
            assert is_applied(guard, step, *update) == good
            assert guard.state[1] == num_skipped
        assert guard.state[0] == [1.0] * sum(steps[: step if steps else 0])


def new_guard(folder: Path = Path("nowhere"), **config) -> Guard:
    return Guard(FaultToleranceConfig(**config), folder, SINGLE_PROCESS, torch.device("cpu"))


def is_applied(guard: Guard, step: int, norm: float, loss: float = 1.0) -> bool:
    """The guard's decision on an update, also reported."""
    verdict = guard.judge(torch.tensor([norm, loss])).tolist()
    guard.report(step, verdict, norm, {"text_loss": loss}, {"rows": []})
    return verdict[0] == 0


def test_non_finite_codec_loss_changes_nothing_and_lists_the_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3)).astype(np.uint8)

    def new_codec_trainer(folder: Path, fault_tolerance: FaultToleranceConfig) -> CodecTrainer:
        folder.mkdir(exist_ok=True)
        config = replace(FITTING, checkpoint_every=4)
        return CodecTrainer(AUTOENCODER, config, folder, images, torch.device("cpu"), SINGLE_PROCESS, fault_tolerance)

    trainer, indices = new_codec_trainer(tmp_path / "one", FaultToleranceConfig()), []
    loss_terms, before = trainer._loss_terms, {}

    def bad_terms(*args):
        terms = loss_terms(*args)
        if trainer.loop.progress.step == 4:
            before.update(gather_tensors(trainer))
            terms["l1"] = (1.0, terms["l1"][1] * math.nan)
        return terms

    def step(number, batch, *args):
        indices.append([int(n) for _, n in batch.chosen])
        return CodecTrainer.step(trainer, number, batch, *args)

    trainer._loss_terms, trainer.step = bad_terms, step
    with pytest.raises(TrainingError, match="step 5: the l1 is not finite"):
        trainer.train()
    assert same(gather_tensors(trainer), before)
    assert read_fault(tmp_path / "one", 5)["batches"] == [{"pictures": indices[4]}]
    again = new_codec_trainer(tmp_path / "one", FaultToleranceConfig())
    assert restore_newest(tmp_path / "one", again.tensors(), SINGLE_PROCESS)[1]["step"] == 4


# Spikes


@pytest.fixture
def short_history():
    """Eight norms are enough to define a spike."""
    with mock.patch.object(guard_module, "MIN_NORM_HISTORY", 8):
        yield


def test_spike_is_skipped_and_training_continues(short_history, tmp_path):
    """Without the option the spike is applied, and the weights differ."""
    factors = {12: 1e4}
    tensors, outcome, _ = train(SINGLE_PROCESS, tmp_path / "one", a_run(16, skip=1, spike=20.0), factors)
    assert outcome == "True"
    assert tensors["optimizer tokens.weight.step"] == 15
    fault = read_fault(tmp_path / "one", 12)
    assert fault["reason"].endswith(")") and "is a spike (mean " in fault["reason"]
    assert fault["gradient_norm"] > 100
    unguarded, _, _ = train(SINGLE_PROCESS, tmp_path / "two", a_run(16, skip=1), factors)
    assert unguarded["optimizer tokens.weight.step"] == 16
    assert not (tmp_path / "two" / "faults").exists()
    assert not same(tensors, unguarded)


@pytest.mark.parametrize("stop_at", [9, 11, 12])
def test_norm_history_survives_a_restart(short_history, tmp_path, stop_at):
    """Bit for bit, though the spike comes before MIN_NORM_HISTORY steps after the restart."""
    factors, run = {11: 1e4, 12: 1e4, 14: math.nan}, a_run(16, skip=2, spike=20.0)
    expected, outcome, _ = train(SINGLE_PROCESS, tmp_path / "one", run, factors)
    assert outcome == "True"
    assert expected["optimizer tokens.weight.step"] == 13
    train(SINGLE_PROCESS, tmp_path / "two", run, factors, stop_at=stop_at)
    tensors, _, _ = train(SINGLE_PROCESS, tmp_path / "two", run, factors)
    assert same(tensors, expected)
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")


def test_number_of_skipped_updates_survives_a_restart(tmp_path):
    """Otherwise a run that is restarted repeatedly would never stop."""
    run, factors = a_run(skip=2), dict.fromkeys(range(4, 9), math.nan)
    train(SINGLE_PROCESS, tmp_path, run, factors, stop_at=5)
    _, error, step = train(SINGLE_PROCESS, tmp_path, run, factors)
    assert error.startswith("step 6: ")
    assert step == 5


@examples(80)
@given(st.integers(0, NORM_HISTORY + 40), st.integers(0, 100), st.floats(0.1, 10), st.floats(0, 500))
def test_spike_is_deviations_above_the_mean_of_the_last_norms(count, seed, spike, norm):
    norms = np.random.default_rng(seed).uniform(0.01, 100, count).tolist()
    guard, history = new_guard(skip_spikes_above=spike), norms[-NORM_HISTORY:]
    guard.load_state(norms, 0)
    num_skips, mean, std = guard.judge(torch.tensor([norm, 1.0])).tolist()
    if len(norms) < MIN_NORM_HISTORY:
        assert not num_skips
    else:
        assert (mean, std) == pytest.approx((statistics.mean(history), statistics.pstdev(history)), rel=1e-5)
        limit = mean + spike * std
        assert num_skips == (norm > limit) or norm == pytest.approx(limit, rel=1e-6)


def test_history_has_the_last_norms_of_applied_updates_only(tmp_path):
    guard = new_guard(tmp_path, skip_nonfinite=1, skip_spikes_above=3.0)
    for step in range(300):
        assert is_applied(guard, step, 1.0 + step % 2)
    assert not is_applied(guard, 300, 1e6)
    assert guard.state == ([1.0 + step % 2 for step in range(300 - NORM_HISTORY, 300)], 1)


# Steps that hang


def hang(folder: Path, watchdog: float) -> None:
    """In step 2, once step 1 is saved. The watchdog's time stands still before: a busy machine may need any time for it."""
    start = time.monotonic()
    guard_module.time = SimpleNamespace(monotonic=lambda: start)

    def hang_here(model, step):
        if step == 2:
            while not (folder / "checkpoints" / "step-000001").exists():
                time.sleep(0.01)
            guard_module.time = time
            threading.Event().wait()

    run = replace(small_run(4, checkpoint_every=1), fault_tolerance=FaultToleranceConfig(watchdog=watchdog))
    new_trainer(folder, run, hang_here).train()


def test_watchdog_ends_a_hanging_process_and_writes_all_stacks(tmp_path):
    """Earlier checkpoints stay."""
    result = processes.run(hang, tmp_path, 4.0)
    path = tmp_path / "faults" / "stacks-rank-0.txt"
    assert result.returncode == 1, result.stderr
    last_line = result.stderr.splitlines()[-1]
    assert last_line == f"transfusion: training made no progress for 4 s; {path} has the stacks of all threads"
    stacks = path.read_text()
    assert "hang_here" in stacks
    assert "in watch" in stacks
    assert stacks.count("hread 0x") >= 3  # of training, prefetching, saving and the watchdog
    assert open_checkpoint(tmp_path).step == 1


class Clock:
    """The watchdog's clock, whose time is set by the test. `wait` returns after a number of further reads by its thread."""

    def __init__(self):
        self.now, self.num_reads, self.condition = 0.0, 0, threading.Condition()

    def monotonic(self) -> float:
        with self.condition:
            self.num_reads += threading.current_thread().name == "watchdog"
            self.condition.notify_all()
        return self.now

    def wait(self, reads: int) -> None:
        with self.condition:
            target = self.num_reads + reads
            assert self.condition.wait_for(lambda: self.num_reads >= target, TIMEOUT)


def test_watchdog_only_ends_a_process_without_calls_to_alive(tmp_path):
    clock, codes, exited = Clock(), [], threading.Event()

    def exit_with(code: int) -> None:
        codes.append(code)
        exited.set()

    with mock.patch.object(guard_module, "time", clock), mock.patch.object(guard_module.os, "_exit", exit_with):
        with watchdog(0.05, tmp_path, 3) as reset_watchdog:
            for _ in range(5):
                clock.now += 0.049
                clock.wait(3)
                reset_watchdog()
            assert not codes
            clock.now += 0.051
            assert exited.wait(TIMEOUT)
    assert codes[0] == 1
    assert (tmp_path / "faults" / "stacks-rank-3.txt").exists()


@pytest.mark.parametrize("slow", ["files", "evaluation", "previews"])
def test_slow_parts_of_saves_evaluation_and_previews_feed_the_watchdog(tmp_path, slow):
    """Each part takes nine tenths of the watchdog's time, so two parts together take more than it allows."""
    clock, codes, parts = Clock(), [], []

    def slow_down(function):
        def call(*args):
            clock.now += 0.09
            clock.wait(3)  # one read may have begun before
            parts.append(function.__name__)
            return function(*args)

        return call

    run = replace(small_run(2, checkpoint_every=2), fault_tolerance=FaultToleranceConfig(watchdog=0.1))
    trainer = new_trainer(tmp_path, run)
    run_folder = SimpleNamespace(path=tmp_path, description=describe_run(tmp_path))
    trainer.on_preview = previewer(run_folder, open_raw(run.data, "heldout"), torch.device("cpu"), SINGLE_PROCESS)
    trainer.loop.preview_every = 2
    trainer.heldout = {name: batches[:1] * 3 for name, batches in trainer.heldout.items()}
    places = {
        "files": [(save_module, "to_safetensors"), (save_module, "fsync_and_hash")],
        "evaluation": [(objective, "sample_noise_on_grid")], "previews": [(Engine, "step")],
    }  # fmt: skip
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(guard_module, "time", clock))
        patches.enter_context(mock.patch.object(guard_module.os, "_exit", codes.append))
        for owner, name in places[slow]:
            patches.enter_context(mock.patch.object(owner, name, slow_down(getattr(owner, name))))
        assert trainer.train()
    assert len(parts) > 5
    assert not codes


def save_and_record(ranks: Ranks, folder: Path) -> list[str]:
    """The parts of a save, the waits for other ranks and the calls to the watchdog, each when it ends."""
    events = []

    def record(name: str, owner, attribute: str):
        original = getattr(owner, attribute)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            events.append(name)
            return result

        patches.enter_context(mock.patch.object(owner, attribute, call))

    with ExitStack() as patches:
        record("write", Saver, "_write_part")
        record("hash", save_module, "fsync_and_hash")
        record("wait", save_module.dist, "all_gather_object")
        with Saver(folder, 2, ranks, lambda: events.append("reset")) as saver:
            saver.save(1, {part: {"weight": torch.zeros(4)} for part in ("model", "ema")}, {"step": 1})
    return events


def test_every_file_and_every_wait_for_another_rank_feeds_the_watchdog(pair, tmp_path):
    (tmp_path / "run").mkdir()
    events, other_events = pair(save_and_record, tmp_path / "run")
    assert {*events} == {"write", "hash", "wait", "reset"} and {*other_events} == {"write", "wait", "reset"}  # equal weights
    for event, after in (*pairwise(events), *pairwise(other_events)):
        assert "reset" in (event, after)
    assert events[-1] == other_events[-1] == "reset"


def test_watchdog_thread_exists_only_while_enabled_and_open(tmp_path):
    before = set(threading.enumerate())
    with watchdog(0.0, tmp_path, 0):
        assert set(threading.enumerate()) <= before
    with watchdog(1000.0, tmp_path, 0):
        (thread,) = set(threading.enumerate()) - before
    thread.join(TIMEOUT)
    assert not thread.is_alive()


# Options


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--fault-tolerance.skip-nonfinite", -1, "--fault-tolerance.skip-nonfinite must be at least 0, not -1"),
    ("--fault-tolerance.watchdog", -0.5, "--fault-tolerance.watchdog must be at least 0, not -0.5"),
    ("--fault-tolerance.skip-spikes-above", 0, "--fault-tolerance.skip-spikes-above must be above 0, not 0.0"),
])  # fmt: skip
def test_invalid_fault_tolerance_options_are_refused(tmp_path, capsys, option, value, message):
    for args in (("train", "digits", *TINY), ("data", "fit-codec", "small", "digits")):
        error = fails(capsys, 2, *args, option, value, "--out", tmp_path / "out")
        assert message in " ".join(error.split())
        assert not (tmp_path / "out").exists()


def test_run_resumes_with_other_fault_tolerance_and_parallel_options(tmp_path, capsys):
    args = ("train", "digits", *TINY, "--out", tmp_path)
    command(*args)
    message = fails(capsys, 2, *args, "--training.max-grad-norm", 2)
    assert "training.max_grad_norm is 1.0 in the folder, 2.0 in this command" in message
    command(*args, "--fault-tolerance.skip-nonfinite", 3, "--fault-tolerance.skip-spikes-above", 4,
            "--fault-tolerance.watchdog", 900, "--parallel.activation-checkpointing")  # fmt: skip
    assert "is trained to its last step" in capsys.readouterr().err
