"""Bad steps: no rank takes one, what was read is written down, what is usual outlives restarts, nothing hangs for ever."""

import json
import math
import statistics
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import processes
from tests.profile import examples
from tests.ranks import PATIENCE
from tests.test_cli import TINY, command, fails
from tests.test_parallel import AUTOENCODER, FITTING, whole
from tests.test_training import new_trainer, resumed, rows_of, stopping
from tests.tiny import small_run
from transfusion import objective
from transfusion.checkpoint.open import open_checkpoint, restore_newest
from transfusion.config import FaultToleranceConfig, Run
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.training import guard as guard_file
from transfusion.training.codec import CodecTrainer
from transfusion.training.guard import ENOUGH, REMEMBERED, Guard, TrainingError, watchdog

BAD = (math.nan, math.inf, -math.inf)


def a_run(steps: int = 8, skip: int = 0, spike: float | None = None, **training) -> Run:
    return replace(
        small_run(steps, 2, **training), fault_tolerance=FaultToleranceConfig(skip_nonfinite=skip, skip_spikes_above=spike)
    )


def train(
    ranks: Ranks, folder: Path, run: Run, bad: dict[int, float] = {}, on: int = 0,  # noqa: B006 (not written to)
    where: str = "loss", stop_at: int | None = None,
) -> tuple[dict[str, np.ndarray], str, int]:  # fmt: skip
    """Weights and all, why it ended and in which step. One rank's loss, or its gradient alone, is multiplied in the steps
    `bad` (counted from 1).
    """
    trainer = (resumed if (folder / "checkpoints").exists() else new_trainer)(folder, run, ranks=ranks)
    ranks.wait()
    losses, total = objective.compute_losses, objective.total_loss

    def factor() -> float:
        return bad.get(trainer.loop.progress.step + 1, 1.0) if ranks.rank == on and torch.is_grad_enabled() else 1.0

    def bad_losses(*args):
        found = losses(*args)
        return replace(found, text_sum=found.text_sum * factor()) if where == "loss" else found

    def bad_total(*args):
        return total(*args) * (factor() if where == "gradient" else 1.0)

    if stop_at is not None:
        stopping(trainer, stop_at)
    with mock.patch.object(objective, "compute_losses", bad_losses), mock.patch.object(objective, "total_loss", bad_total):
        try:
            said = str(trainer.train())
        except TrainingError as error:
            said = str(error)
    ranks.wait()
    return whole(trainer), said, trainer.loop.progress.step


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, expected[name]) for name, value in found.items())


def fault(folder: Path, step: int) -> dict:
    return json.loads((folder / "faults" / f"step-{step:06d}.json").read_text())


# What is not finite


@pytest.fixture(scope="module")
def undisturbed(pair, tmp_path_factory) -> tuple[list, list]:
    """Of each of two ranks: what it has learnt after two steps, and what it reads in the third."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return pair(train, folder / "run", a_run(), {}, 0, "loss", 2), pair(rows_read, folder / "read", a_run(), 3)


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize(("where", "factor", "reason"), [
    ("loss", math.nan, "the text loss is not finite"), ("loss", math.inf, "the text loss is not finite"),
    ("gradient", math.nan, "the gradient is not finite"), ("gradient", math.inf, "the gradient is not finite"),
])  # fmt: skip
def test_what_is_not_finite_on_one_rank_changes_no_weight_on_any(pair, undisturbed, tmp_path, on, where, factor, reason):
    """And the file about it names what both ranks read."""
    before, read = undisturbed
    found = pair(train, tmp_path / "run", a_run(), {3: factor}, on, where)
    for (tensors, said, step), (expected, _, _) in zip(found, before, strict=True):
        assert said.startswith(f"step 3: {reason}, so the step was not taken; ")
        assert len(said.splitlines()) == 1
        assert str(tmp_path / "run" / "faults" / "step-000003.json") in said
        assert step == 2
        assert same(tensors, expected)
    assert max(row["step"] for row in rows_of(tmp_path / "run")) == 2
    told = fault(tmp_path / "run", 3)
    assert (told["step"], told["reason"]) == (3, reason)
    assert told["read"] == [{"rank": rank, "rows": rows} for rank, rows in enumerate(read)]
    assert all(word.startswith("digits ") for rows in read for row in rows for word in row)
    assert read[0] != read[1]


def rows_read(ranks: Ranks, folder: Path, run: Run, step: int) -> list[list[str]]:
    """The documents of a rank's rows in that step, counted from 1."""
    reading = new_trainer(folder, run, ranks=ranks).read(None)
    for _ in range(step):
        parts, _ = next(reading)
    return [row for batch, _ in parts for row in batch.documents]


def test_so_many_steps_in_a_row_are_left_out_and_not_one_more(pair, tmp_path):
    """On both ranks alike; a step that is taken makes the count begin anew."""
    bad = dict.fromkeys((2, 3, 5, 6, 8), math.nan)
    (tensors, said, step), (others, _, _) = pair(train, tmp_path / "two", a_run(10, skip=2), bad, 1)
    assert (said, step) == ("True", 10)
    assert same(tensors, others)
    assert tensors["optimizer tokens.weight.step"] == 10 - len(bad)
    assert sorted(path.name for path in (tmp_path / "two" / "faults").iterdir()) == [f"step-{n:06d}.json" for n in bad]
    steps = [row["step"] for row in rows_of(tmp_path / "two") if "gradient_norm" in row]
    assert steps == list(range(1, 11))
    found = pair(train, tmp_path / "three", a_run(10, skip=2), dict.fromkeys((2, 4, 5, 6), math.nan), 1)
    assert [step for _, _, step in found] == [5, 5]
    assert all(said.startswith("step 6: the text loss is not finite") for _, said, _ in found)


def test_a_step_that_is_left_out_moves_nothing(tmp_path):
    stopped, _, _ = train(SINGLE_PROCESS, tmp_path / "one", a_run(), stop_at=4)
    found, said, step = train(SINGLE_PROCESS, tmp_path / "two", a_run(skip=3), dict.fromkeys((5, 6), math.inf), stop_at=6)
    assert (said, step) == ("False", 6)
    assert same(found, stopped)


@examples(60)
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 4), st.sampled_from(BAD), st.sampled_from(("norm", "value")))
def test_the_guard_counts_what_it_leaves_out_in_a_row(steps, skip, number, where):
    """For any order of good steps and bad ones."""
    with TemporaryDirectory() as folder:
        guard, row = Guard(FaultToleranceConfig(skip_nonfinite=skip), Path(folder), SINGLE_PROCESS), 0
        for step, good in enumerate(steps, 1):
            row = 0 if good else row + 1
            norm, value = (number, 1.0) if where == "norm" else (1.0, number)
            asked = step, 1.0 if good else norm, {"text_loss": 1.0 if good else value}, lambda: {"rows": []}
            if row > skip:
                with pytest.raises(TrainingError, match=f"^step {step}: "):
                    guard.accepts_update(*asked)
                break
            assert guard.accepts_update(*asked) == good
            assert guard.skipped == row
        assert guard.norms == [1.0] * sum(steps[: step if steps else 0])


def test_a_codec_that_is_not_finite_changes_nothing_and_names_its_pictures(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3)).astype(np.uint8)

    def trainer(folder: Path, fault_tolerance: FaultToleranceConfig) -> CodecTrainer:
        folder.mkdir(exist_ok=True)
        config = replace(FITTING, checkpoint_every=4)
        return CodecTrainer(AUTOENCODER, config, folder, pictures, torch.device("cpu"), SINGLE_PROCESS, fault_tolerance)

    one, read = trainer(tmp_path / "one", FaultToleranceConfig()), []
    real, before = one._terms, {}

    def terms(batch, *rest):
        found = real(batch, *rest)
        if one.loop.progress.step == 4:
            before.update(whole(one))
            found["l1"] = (1.0, found["l1"][1] * math.nan)
        return found

    def step(number, given, allows):
        read.append([int(n) for _, n in given.chosen])
        return CodecTrainer.step(one, number, given, allows)

    one._terms, one.step = terms, step
    with pytest.raises(TrainingError, match="step 5: the l1 is not finite"):
        one.train()
    assert same(whole(one), before)
    assert fault(tmp_path / "one", 5)["read"] == [{"pictures": read[4]}]
    again = trainer(tmp_path / "one", FaultToleranceConfig())
    assert restore_newest(tmp_path / "one", again.tensors(), SINGLE_PROCESS)[1]["step"] == 4


# Spikes


@pytest.fixture
def soon():
    """Eight norms are enough to call one a spike."""
    with mock.patch.object(guard_file, "ENOUGH", 8):
        yield


def test_a_spike_is_left_out_and_training_goes_on(soon, tmp_path):
    """Without it the weights would be others."""
    bad = {12: 1e4}
    found, said, _ = train(SINGLE_PROCESS, tmp_path / "one", a_run(16, skip=1, spike=20.0), bad)
    assert said == "True"
    assert found["optimizer tokens.weight.step"] == 15
    told = fault(tmp_path / "one", 12)
    assert told["reason"].endswith(")") and "a spike (usual: " in told["reason"]
    assert told["gradient_norm"] > 100
    taken, _, _ = train(SINGLE_PROCESS, tmp_path / "two", a_run(16, skip=1), bad)
    assert taken["optimizer tokens.weight.step"] == 16
    assert not (tmp_path / "two" / "faults").exists()
    assert not same(found, taken)


@pytest.mark.parametrize("stop_at", [9, 11, 12])
def test_what_is_usual_outlives_a_restart(soon, tmp_path, stop_at):
    """Resumed is undisturbed, though the spike comes sooner after the restart than norms are enough: bit for bit."""
    bad, run = {11: 1e4, 12: 1e4, 14: math.nan}, a_run(16, skip=2, spike=20.0)
    expected, said, _ = train(SINGLE_PROCESS, tmp_path / "one", run, bad)
    assert said == "True"
    assert expected["optimizer tokens.weight.step"] == 13
    train(SINGLE_PROCESS, tmp_path / "two", run, bad, stop_at=stop_at)
    found, said, _ = train(SINGLE_PROCESS, tmp_path / "two", run, bad)
    assert same(found, expected)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")


def test_how_many_were_left_out_in_a_row_outlives_a_restart(tmp_path):
    """Else a run that is started anew again and again would never give up."""
    run, bad = a_run(skip=2), dict.fromkeys(range(4, 9), math.nan)
    train(SINGLE_PROCESS, tmp_path, run, bad, stop_at=5)
    _, said, step = train(SINGLE_PROCESS, tmp_path, run, bad)
    assert said.startswith("step 6: ")
    assert step == 5


@examples(80)
@given(st.lists(st.floats(0.01, 100), max_size=REMEMBERED + 40), st.floats(0.1, 10), st.floats(0, 500))
def test_a_spike_is_so_many_deviations_above_the_mean_of_the_last(norms, spike, norm):
    guard = Guard(FaultToleranceConfig(skip_nonfinite=10**6, skip_spikes_above=spike), Path("nowhere"), SINGLE_PROCESS)
    guard.norms = norms[-REMEMBERED:]
    last = norms[-REMEMBERED:]
    reason = guard._reason(norm, {"text_loss": 1.0})
    if len(norms) < ENOUGH:
        assert reason is None
    else:
        limit = statistics.mean(last) + spike * statistics.pstdev(last)
        assert (reason is not None) == (norm > limit)


def test_only_the_last_norms_are_remembered_and_none_of_a_step_that_was_left_out(tmp_path):
    guard = Guard(FaultToleranceConfig(skip_nonfinite=1, skip_spikes_above=3.0), tmp_path, SINGLE_PROCESS)
    for step in range(300):
        guard.accepts_update(step, 1.0 + step % 2, {}, dict)
    assert not guard.accepts_update(300, 1e6, {}, dict)
    assert guard.norms == [1.0 + step % 2 for step in range(300 - REMEMBERED, 300)]


# Steps that never end

def it_hangs_here(model, step):
    if step == 2:
        threading.Event().wait()


def hang(folder: Path, watchdog: float) -> None:
    run = replace(small_run(4, checkpoint_every=1), fault_tolerance=FaultToleranceConfig(watchdog=watchdog))
    new_trainer(folder, run, it_hangs_here).train()


def test_a_process_that_hangs_is_ended_and_leaves_every_threads_stack(tmp_path):
    """What was saved before is there."""
    done = processes.run(hang, tmp_path, 4.0)
    path = tmp_path / "faults" / "stacks-rank-0.txt"
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == f"transfusion: no step has ended for 4 s; {path} says where it hangs"
    stacks = path.read_text()
    assert "it_hangs_here" in stacks
    assert "in watch" in stacks
    assert stacks.count("hread 0x") >= 3  # reading ahead, saving, watching and training
    assert open_checkpoint(tmp_path).step == 1


class Clock:
    """A time that stands still until it is moved, and says when it was looked at so often again."""

    def __init__(self):
        self.now, self.looks, self.looked = 0.0, 0, threading.Condition()

    def __call__(self) -> float:
        with self.looked:
            self.looks += 1
            self.looked.notify_all()
        return self.now

    def wait(self, looks: int) -> None:
        with self.looked:
            until = self.looks + looks
            assert self.looked.wait_for(lambda: self.looks >= until, PATIENCE)


def test_who_says_in_time_that_it_is_alive_is_left_alone(tmp_path):
    clock, codes, ended = Clock(), [], threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with mock.patch.object(guard_file.time, "monotonic", clock), mock.patch.object(guard_file.os, "_exit", end):
        with watchdog(0.05, tmp_path, 3) as alive:
            for _ in range(5):
                clock.now += 0.049
                clock.wait(3)
                alive()
            assert not codes
            clock.now += 0.051
            assert ended.wait(PATIENCE)
    assert codes[0] == 1
    assert (tmp_path / "faults" / "stacks-rank-3.txt").exists()


def test_nobody_watches_when_nobody_shall_and_none_when_it_is_over(tmp_path):
    before = set(threading.enumerate())
    with watchdog(0.0, tmp_path, 0):
        assert set(threading.enumerate()) <= before
    with watchdog(1000.0, tmp_path, 0):
        (watcher,) = set(threading.enumerate()) - before
    watcher.join(PATIENCE)
    assert not watcher.is_alive()


# What is asked for


@pytest.mark.parametrize(("option", "value", "words"), [
    ("--fault-tolerance.skip-nonfinite", -1, "--fault-tolerance.skip-nonfinite must not be negative, not -1"),
    ("--fault-tolerance.watchdog", -0.5, "--fault-tolerance.watchdog must not be negative, not -0.5"),
    ("--fault-tolerance.skip-spikes-above", 0, "--fault-tolerance.skip-spikes-above must be above 0, not 0.0"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_in_one_line(tmp_path, capsys, option, value, words):
    for asked in (("train", "digits", *TINY), ("data", "fit-codec", "small", "digits")):
        said = fails(capsys, 2, *asked, option, value, "--out", tmp_path / "out")
        assert words in " ".join(said.split())
        assert not (tmp_path / "out").exists()


def test_a_run_may_go_on_with_another_survival_and_another_layout(tmp_path, capsys):
    asked = ("train", "digits", *TINY, "--out", tmp_path)
    command(*asked)
    assert "training.max_grad_norm is 1.0 there, 2.0 here" in fails(capsys, 2, *asked, "--training.max-grad-norm", 2)
    command(
        *asked,
        "--fault-tolerance.skip-nonfinite",
        3,
        "--fault-tolerance.skip-spikes-above",
        4,
        "--fault-tolerance.watchdog",
        900,
        "--parallel.activation-checkpointing",
    )
    assert "is trained to its last step" in capsys.readouterr().err
