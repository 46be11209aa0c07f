"""Training: interrupted and resumed is uninterrupted, looking on changes nothing, and a small run learns."""

import errno
import hashlib
import math
import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache
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
from transfusion.checkpoint.open import OpenedRun, newest_checkpoint, open_checkpoint, restore_newest
from transfusion.checkpoint.save import SaveError, Saver
from transfusion.config import DataConfig, DigitsConfig, ModelConfig, Run, TrainingConfig
from transfusion.data.loader import Loader, heldout_batches
from transfusion.data.sources import open_sources
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.training.guard import TrainingError
from transfusion.training.metrics import Metrics, read_metrics
from transfusion.training.optimizer import learning_rate, update_ema
from transfusion.training.trainer import Trainer

some = examples(60)

STEPS = 6
CLOCK = ("seconds", "positions_per_second")  # the only values that depend on when


class Noted:
    """A loader that notes what it hands out; `change` may alter a batch, given how many came before it."""

    def __init__(self, loader: Loader, change=None):
        self.loader, self.change, self.read = loader, change, []

    def batches(self, start):
        for number, (batch, place) in enumerate(self.loader.batches(start)):
            batch = self.change(batch, number) if self.change else batch
            content = [batch.tokens, batch.position_ids, *(group.x0 for group in batch.groups)]
            self.read.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in content)).hexdigest())
            yield batch, place


def new_trainer(
    folder: Path, run: Run, look=None, change=None, ranks: Ranks = SINGLE_PROCESS, device: str = "cpu"
) -> Trainer:
    """A trainer as the command makes it, in a folder with a run.json."""
    run, encoder = prepared(run)
    if ranks.is_main and not (folder / "run.json").exists():
        begin_run(folder, run)
    by_four = replace(encoder, config=replace(run.data, rows=4))  # times of held-out images follow from their batch
    heldout = {s.name: heldout_batches(s, by_four, 6) for s in open_sources(run.data, "heldout")}
    with few_samples():
        loader = Noted(Loader(open_sources(run.data, "train"), encoder, ranks.rank, ranks.world), change)
    return Trainer(run, folder, loader, heldout, torch.device(device), ranks, look)


def resumed(folder: Path, run: Run, look=None, change=None, ranks: Ranks = SINGLE_PROCESS) -> Trainer:
    """A trainer that goes on from the newest checkpoint of a folder."""
    trainer = new_trainer(folder, run, look, change, ranks)
    trainer.loop.load_state(restore_newest(folder, trainer.tensors(), ranks)[1])
    return trainer


def looking(trainer: Trainer, look) -> Trainer:
    """`look(model, step)` is called after every step."""
    trainer.on_preview, trainer.loop.preview_every = look, 1
    return trainer


def stopping(trainer: Trainer, step: int) -> Trainer:
    """It is asked to stop at this step, as a signal asks it."""

    def look(model, now):
        trainer.loop.stop_asked |= now >= step

    return looking(trainer, look)


def rows_of(folder: Path) -> list[dict]:
    """What metrics.jsonl says, without the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def copied(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All its tensors as they are now: weights, average, moments."""
    parts = trainer.tensors().items()
    return {f"{part} {name}": value.clone() for part, values in parts for name, value in values.items()}


def same_tensors(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@cache
def uninterrupted(accumulate: int = 1):
    """Tensors, metrics, what was read and where it ended, of a run that nobody stopped."""
    with TemporaryDirectory() as folder:
        trainer = new_trainer(Path(folder), small_run(STEPS, accumulate=accumulate))
        assert trainer.train()
        read = trainer.loader.read[: STEPS * accumulate]
        return copied(trainer), rows_of(Path(folder)), read, trainer.loop.progress


# Interrupted and resumed equals uninterrupted


@examples(4)
@given(st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=3), st.sampled_from((1, 2)))
def test_stopped_and_resumed_is_as_if_nothing_had_been(stops, accumulate):
    run, read = small_run(STEPS, accumulate=accumulate), []
    with TemporaryDirectory() as folder:
        folder, done = Path(folder), 0
        for step in (*sorted(stops), STEPS):
            trainer = resumed(folder, run) if done else new_trainer(folder, run)
            assert trainer.loop.progress.step == done
            finished = stopping(trainer, step).train()
            assert (finished, trainer.loop.progress.step) == (step == STEPS, step)
            read += trainer.loader.read[: (step - done) * accumulate]
            done = step
        tensors, rows, batches, progress = uninterrupted(accumulate)
        same_tensors(copied(trainer), tensors)
        assert rows_of(folder) == rows
        assert read == batches
        for name in ("loader_state", "seen", "norms", "skipped"):
            assert getattr(trainer.loop.progress, name) == getattr(progress, name)


@pytest.mark.parametrize(("every", "crash", "begins_again"), [(2, 3, 2), (2, 4, 2), (1, 5, 4), (3, 5, 3)])
def test_crashed_and_resumed_is_as_if_nothing_had_been(tmp_path, every, crash, begins_again):
    """Steps after the newest checkpoint are done again, and their lines in metrics.jsonl written once."""

    def lights_out(model, step):
        if step == crash:
            raise RuntimeError("the lights went out")

    run = small_run(STEPS, checkpoint_every=every)
    with pytest.raises(RuntimeError, match="the lights"):
        new_trainer(tmp_path, run, lights_out).train()
    assert rows_of(tmp_path)[-1]["step"] == crash
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "text_lo')  # the line it was writing
    trainer = resumed(tmp_path, run)
    assert trainer.loop.progress.step == begins_again
    assert trainer.train()
    tensors, rows, batches, _ = uninterrupted()
    same_tensors(copied(trainer), tensors)
    assert rows_of(tmp_path) == rows
    assert trainer.loader.read[: STEPS - begins_again] == batches[begins_again:]


def test_a_run_stopped_before_its_first_step_is_as_if_nothing_had_been(tmp_path):
    trainer = new_trainer(tmp_path, small_run(STEPS))
    trainer.loop.stop_asked = True
    assert not trainer.train()
    trainer = resumed(tmp_path, small_run(STEPS))
    assert trainer.train()
    same_tensors(copied(trainer), uninterrupted()[0])
    assert rows_of(tmp_path) == uninterrupted()[1]


def test_a_finished_run_that_is_begun_again_changes_nothing(tmp_path):
    assert new_trainer(tmp_path, small_run(STEPS)).train()
    again = resumed(tmp_path, small_run(STEPS))
    assert again.train()
    same_tensors(copied(again), uninterrupted()[0])
    assert rows_of(tmp_path) == uninterrupted()[1]


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONG = small_run(100_000, validate_every=5)  # its rate falls as over 100,000 steps, wherever it is stopped


def train_long(folder: Path) -> None:
    sys.exit(40 + new_trainer(folder, LONG).train())


def test_a_real_signal_stops_it_after_its_step_and_it_goes_on_from_there(tmp_path):
    """SIGTERM, SIGINT and SIGUSR1 to processes of their own; each is compared with a run that nobody stopped."""
    processes = [Process(train_long, tmp_path / number.name) for number in SIGNALS]
    try:
        until, waiting = time.monotonic() + 90, dict(zip(SIGNALS, processes, strict=True))
        while waiting:
            for number, process in list(waiting.items()):
                if len(read_metrics(tmp_path / number.name / "metrics.jsonl")) > 3:
                    process.send_signal(number)
                    del waiting[number]
                assert process.poll() is None, process.stderr
            assert time.monotonic() < until
            time.sleep(0.01)
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    reached = []
    for number, process, words in zip(SIGNALS, processes, said, strict=True):
        assert process.returncode == 40, words  # train() said False
        trainer = resumed(tmp_path / number.name, LONG)
        step = trainer.loop.progress.step
        assert f"stopped at step {step} and saved" in words
        assert rows_of(tmp_path / number.name)[-1]["step"] == step
        stopping(trainer, step + 2).train()
        reached.append((step + 2, copied(trainer), rows_of(tmp_path / number.name)))
    check_along_the_way(tmp_path / "whole", reached)


def check_along_the_way(folder: Path, reached: list) -> None:
    """One run that nobody stopped passes through all these (step, tensors, metrics)."""
    trainer, passed = new_trainer(folder, LONG), {}

    def look(model, step):
        if step in [s for s, _, _ in reached]:
            passed[step] = copied(trainer), rows_of(folder)
        trainer.loop.stop_asked |= step >= max(s for s, _, _ in reached)

    looking(trainer, look).train()
    for step, tensors, rows in reached:
        same_tensors(tensors, passed[step][0])
        assert rows == passed[step][1]


def test_a_signal_asks_once_and_insists_the_second_time(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    def once(model, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    assert not new_trainer(tmp_path / "once", small_run(STEPS), once).train()
    assert newest_checkpoint(tmp_path / "once").name == "step-000002"

    def twice(model, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path / "twice", small_run(STEPS), twice).train()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_checkpoints_come_when_they_should_and_the_newest_are_kept(tmp_path):
    new_trainer(tmp_path, small_run(7, checkpoint_every=2, keep_checkpoints=3, validate_every=100)).train()
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert found == ["step-000004", "step-000006", "step-000007"]
    assert open_checkpoint(tmp_path).step == 7


def test_lines_after_the_checkpoint_are_cut_when_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in range(6):
        metrics.write(step, text_loss=step / 2)
    path.write_text(path.read_text() + '{"step": 6, "te')
    again = Metrics(path, 3)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    again.write(4, text_loss=9.0)
    assert read_metrics(path)[-1] == {"step": 4, "text_loss": 9.0}
    assert len(path.read_text().splitlines()) == 5


# What must not matter


def test_looking_on_does_not_change_what_is_learnt(tmp_path):
    """A preview that draws and captions with the engine: same weights, same metrics, same batches."""
    run, encoder = prepared(small_run(STEPS))
    drawn = []

    def draw(model, step):
        about = run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {}
        engine = Engine(OpenedRun(*about, model, step, torch.device("cpu")))
        torch.manual_seed(step)  # a preview may do as it likes with the common chance
        answers = engine.generate([Request(("three",), 2, seed=step), Request(("a",), seed=step)])
        drawn.append(answers[0][0].parts[0])

    trainer = new_trainer(tmp_path, run, draw)
    assert trainer.train()
    assert len(drawn) == STEPS + 1
    tensors, rows, batches, _ = uninterrupted()
    same_tensors(copied(trainer), tensors)
    assert rows_of(tmp_path) == rows
    assert trainer.loader.read[:STEPS] == batches


def learnt(folder: Path, run: Run) -> tuple[dict, list[dict]]:
    """How far each weight of a float64 model has moved, and the metrics."""
    trainer = new_trainer(folder, run, change=lambda batch, _: in_double(batch))
    trainer.model.double(), trainer.ema.double()
    trainer.heldout = {}
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return {name: value - start[name] for name, value in trainer.model.state_dict().items()}, rows_of(folder)


@pytest.mark.parametrize(("rows", "parts"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("sources", [("digits",), ("topics", "digits")])
def test_two_small_forward_passes_are_one_large(tmp_path, rows, parts, sources):
    """Counted over the whole step. Rows of `topics` hold no image, so some passes have none to learn.

    A large eps makes Adam's update smooth: else numbers near 0 would be turned into steps of one size.
    """
    run = small_run(4, eps=1.0, learning_rate=1.0, weight_decay=0.0, max_grad_norm=1e9)
    run = replace(run, data=replace(run.data, sources=sources))
    small = replace(run, data=replace(run.data, rows=rows), training=replace(run.training, accumulate=parts))
    large = replace(run, data=replace(run.data, rows=rows * parts))
    moved, metrics = learnt(tmp_path / "small", small)
    expected, expected_metrics = learnt(tmp_path / "large", large)
    for name, value in expected.items():
        assert (moved[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
        assert value.abs().max() > 1e-4  # all of it learns
    for row, other in zip(metrics, expected_metrics, strict=True):
        assert row.pop("heldout", None) == other.pop("heldout", None)  # nothing is held out here
        assert row == pytest.approx(other, rel=1e-5)


def test_held_out_losses_are_those_of_the_average_and_do_not_change_it(tmp_path):
    trainer = new_trainer(tmp_path, small_run(3))
    trainer.train()
    before = copied(trainer)
    found, words = trainer.evaluate_heldout()
    assert found == trainer.evaluate_heldout()[0]
    same_tensors(copied(trainer), before)
    assert rows_of(tmp_path)[-1]["heldout"] == found
    assert f"digits: text {found['digits']['text_loss']:.3f}" in words
    trainer.ema.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate_heldout()[0] != found


# One step


@some
@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 250))
def test_the_rate_rises_in_a_line_and_falls_along_half_a_cosine(step, warmup, more):
    config = TrainingConfig(steps=warmup + more, warmup_steps=warmup)
    found = learning_rate(step, config)
    if step < warmup:
        assert found == pytest.approx(3e-4 * (step + 1) / warmup)
    elif step >= config.steps:
        assert found == pytest.approx(1.5e-5)
    else:
        angle = math.pi * (step - warmup) / more
        assert found == pytest.approx(1.5e-5 + (3e-4 - 1.5e-5) * math.cos(angle / 2) ** 2)
        assert learning_rate(step + 1, config) < found


def test_the_paper_runs_rates():
    """Section 4.1: 4,000 steps up to 3e-4, then down to 1.5e-5 at step 250,000."""
    config = TrainingConfig()
    places = (0, 1_999, 3_999, 4_000, 127_000, 250_000)
    expected = (7.5e-8, 1.5e-4, 3e-4, 3e-4, 1.575e-4, 1.5e-5)
    assert [learning_rate(step, config) for step in places] == pytest.approx(expected)


def test_every_step_uses_and_reports_its_rate(tmp_path):
    run = small_run(5)
    trainer = new_trainer(tmp_path, run)
    used = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append([g["lr"] for g in trainer.optimizer.param_groups]), step())
    trainer.train()
    expected = [learning_rate(n, run.training) for n in range(5)]
    assert used == [[rate, rate] for rate in expected]
    assert [row["learning_rate"] for row in rows_of(tmp_path) if "learning_rate" in row] == expected


@some
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0, 0.9999))
def test_the_average_is_a_moving_average_that_forgets_the_start(values, decay):
    model, average = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(average.weight, 1e3)
    expected = 1e3
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        update_ema(average, model, step, decay)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        assert average.weight.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert model.weight.item() == value


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e25])  # whose square is no float32
@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_finite_is_an_error_and_no_step(tmp_path, poison, step):
    def change(batch, number):
        if number == step - 1:
            batch.groups[0].x0[0, 0, 0, 0] = poison
        return batch

    trainer = new_trainer(tmp_path, small_run(5, checkpoint_every=2), change=change)
    taken = {}
    looking(trainer, lambda model, now: taken.update({now: copied(trainer)}))
    with pytest.raises(TrainingError, match=rf"step {step}: the (text|image) loss is not finite") as raised:
        trainer.train()
    assert len(str(raised.value).splitlines()) == 1
    assert trainer.loop.progress.step == step - 1
    same_tensors(copied(trainer), taken[step - 1])
    assert max(row["step"] for row in rows_of(tmp_path)) == step - 1
    if step > 2:
        assert open_checkpoint(tmp_path).step == 2


def test_a_large_gradient_is_cut_to_the_norm_that_is_allowed(tmp_path):
    """The norm is reported as it was; the update is as if it had been 1e-3."""
    trainer = new_trainer(tmp_path, small_run(1, max_grad_norm=1e-3))
    seen = []
    step = trainer.optimizer.step

    def note():
        seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())
        step()

    trainer.optimizer.step = note
    trainer.train()
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)
    assert rows_of(tmp_path)[1]["gradient_norm"] > 0.1


def test_a_checkpoint_that_cannot_be_written_is_said_and_what_is_there_stays(tmp_path, monkeypatch):
    """In the background: the training that goes on meanwhile hears of it at the next checkpoint, or when it ends."""
    run, real = small_run(6, checkpoint_every=2), Saver._put_in_place

    def full(saver, aside, final, *rest):
        if final.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(saver, aside, final, *rest)

    monkeypatch.setattr(Saver, "_put_in_place", full)
    for failing, heard, kept in (("step-000004", 6, 2), ("step-000006", 6, 4)):
        trainer = new_trainer(tmp_path / failing, run)
        with pytest.raises(SaveError, match=f"could not save step {int(failing[5:])} in .*: No space left"):
            trainer.train()
        assert trainer.loop.progress.step == heard
        assert sorted(path.name for path in (tmp_path / failing / "checkpoints").glob("step-*"))[-1:] == [f"step-{kept:06d}"]
        assert open_checkpoint(tmp_path / failing).step == kept
    monkeypatch.undo()
    again = resumed(tmp_path / failing, run)
    assert again.loop.progress.step == 4
    assert again.train()
    same_tensors(copied(again), uninterrupted()[0])


def test_a_state_of_another_version_is_said_in_one_line(tmp_path):
    trainer = new_trainer(tmp_path, small_run(STEPS))
    with pytest.raises(TrainingError, match="another version's") as error:
        trainer.loop.load_state({"step": 3, "seconds": 1.0, "positions": 7, "place": {"block": 0, "row": 3}})
    assert len(str(error.value).splitlines()) == 1
    assert trainer.loop.progress.step == 0


@pytest.mark.parametrize("damage", ["model", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, damage):
    """They are done again, and end up in its place: as if nothing had been."""
    run = small_run(STEPS, checkpoint_every=2, keep_checkpoints=3)
    stopping(new_trainer(tmp_path, run), 5).train()
    for step in (5, 4):
        path = tmp_path / "checkpoints" / f"step-00000{step}" / damage
        path = next(path.iterdir()) if path.is_dir() else path
        path.write_bytes(path.read_bytes()[:-3])
    trainer = resumed(tmp_path, run)
    assert trainer.loop.progress.step == 2
    assert trainer.train()
    same_tensors(copied(trainer), uninterrupted()[0])
    assert rows_of(tmp_path) == uninterrupted()[1]
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [*(f"step-00000{n}" for n in (2, 4)), "step-000004.damaged", "step-000005.damaged", "step-000006"]
    assert resumed(tmp_path, run).loop.progress.step == STEPS


# It learns


@pytest.mark.slow
def test_a_small_run_learns_to_read_digits_and_to_draw_them(tmp_path):
    """In 100 steps on pairs, most of them image first; 6 seconds on one core.

    Measured on held-out scans, seeds 0 to 2: captions behind their image 0.15 to 0.17 nats per token (without it 1.21, all
    that can be had), images behind their captions 0.62 to 0.65; at the start 5.9 to 6.4 and 0.98 to 1.00.
    """
    run = small_run(100, warmup_steps=20, learning_rate=8e-3, ema_decay=0.95)
    data = replace(run.data, fit_documents=100, image_first=0.7, digits=DigitsConfig(interleaved=0.0))
    first, last = learnt_of_digits(tmp_path, run, data, replace(run.model, layers=2, patch_size=4), 100)
    assert last["captions"]["text_loss"] < 0.3 < 5 < first["captions"]["text_loss"]
    assert last["captions"]["text_loss"] < 0.4 * last["drawings"]["text_loss"]  # it is read from the image
    assert last["drawings"]["image_loss"] < 0.75 < 0.95 < first["drawings"]["image_loss"]


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all")
def test_a_small_run_learns_rows_of_scans_too(tmp_path):
    """217 thousand parameters, 700 steps, some of the documents several scans in turn; 25 seconds on one core.

    Measured on held-out scans: captions behind their image 0.53 nats per token (without it 1.06, all that can
    be had), images behind their captions 0.374; at the start 6.4 and 0.995. Room: 20 % and 12 %.
    """
    run = small_run(700, warmup_steps=30, learning_rate=5e-3, ema_decay=0.98)
    data = replace(run.data, fit_documents=400, image_first=0.35)
    first, last = learnt_of_digits(tmp_path, run, data, replace(run.model, layers=3), 297)
    assert last["captions"]["text_loss"] < 0.65 < 4 < first["captions"]["text_loss"]
    assert last["captions"]["text_loss"] < 0.7 * last["drawings"]["text_loss"]  # it is read from the image
    assert last["drawings"]["image_loss"] < 0.42 < 0.95 < first["drawings"]["image_loss"]


def learnt_of_digits(folder: Path, run: Run, data: DataConfig, model: ModelConfig, documents: int) -> list[dict]:
    """Held-out losses before and after training: of captions behind their images, and of images behind their captions."""
    data = replace(data, tokenizer_size=300, seq_len=128, rows=8, shuffle_block=512)
    model = replace(model, width=64, heads=4, intermediate_size=168, qk_norm=True)
    training = replace(run.training, validate_every=10_000)
    run, encoder = prepared(replace(run, data=data, model=model, training=training))
    (source,) = open_sources(run.data, "heldout")
    heldout = {
        name: heldout_batches(source, replace(encoder, config=replace(run.data, image_first=share)), documents)
        for name, share in (("captions", 1.0), ("drawings", 0.0))
    }
    begin_run(folder, run)
    loader = Loader(open_sources(run.data, "train"), encoder)
    Trainer(run, folder, loader, heldout, torch.device("cpu")).train()
    return [row["heldout"] for row in rows_of(folder) if "heldout" in row]


# Parts that learn faster, slower, or not at all

PARTS = {"text_lr_scale": ("tokens.", "head."), "image_lr_scale": ("patches.",), "transformer_lr_scale": ("transformer.",)}


def of_part(tensors: dict[str, torch.Tensor], rate: str) -> dict[str, torch.Tensor]:
    """Those of the raw and averaged weights, and of the optimizer."""
    return {name: value for name, value in tensors.items() if name.split(" ")[1].startswith(PARTS[rate])}


@pytest.mark.parametrize("frozen", PARTS)
def test_a_frozen_part_stays_bit_for_bit_as_it_began(tmp_path, frozen):
    """Weight decay does not touch it either, and it has no moments. All else learns; stopped and resumed it is the same."""
    run = small_run(STEPS, weight_decay=0.5, **{frozen: 0.0})
    trainer = new_trainer(tmp_path / "whole", run)
    before = copied(trainer)
    assert trainer.train()
    after = copied(trainer)
    same_tensors(of_part(after, frozen), of_part(before, frozen))
    assert {name.split(" ")[0] for name in of_part(after, frozen)} == {"model", "ema"}
    for other in PARTS.keys() - {frozen}:
        learnt = of_part(after, other)
        assert {name.split(" ")[0] for name in learnt} == {"model", "ema", "optimizer"}
        assert not any(torch.equal(value, before[name]) for name, value in learnt.items() if name.endswith("weight"))
    stopping(new_trainer(tmp_path / "stopped", run), 3).train()
    again = resumed(tmp_path / "stopped", run)
    assert again.train()
    same_tensors(copied(again), after)


@pytest.mark.parametrize("slower", PARTS)
def test_a_rate_scales_the_steps_of_its_part_alone(tmp_path, slower):
    """The first update of AdamW is proportional to the learning rate, decay and all."""
    steps = []
    for name, rate in (("plain", 1.0), ("slower", 0.25)):
        trainer = new_trainer(tmp_path / name, small_run(1, **{slower: rate}))
        before = copied(trainer)
        trainer.train()
        after = copied(trainer)
        steps.append({name: after[name] - before[name] for name in before if name.startswith("model")})
    for part in PARTS:
        for name, step in of_part(steps[0], part).items():
            expected = step * (0.25 if part == slower else 1.0)
            torch.testing.assert_close(steps[1][name], expected, rtol=1e-3, atol=1e-6)
            assert step.abs().max() > 1e-4 or not name.endswith("weight")


@pytest.mark.parametrize(("rates", "words"), [
    ({"text_lr_scale": -1.0}, "from 0 up"), ({"image_lr_scale": math.nan}, "from 0 up"),
    ({"transformer_lr_scale": math.inf}, "from 0 up"), (dict.fromkeys(PARTS, 0.0), "nothing would be learnt"),
])  # fmt: skip
def test_rates_that_make_no_sense(rates, words):
    with pytest.raises(ValueError, match=words):
        TrainingConfig(**rates)
