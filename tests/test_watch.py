"""Watching a run: the lines of metrics.jsonl, TensorBoard and W&B, and the progress bar."""

import io
import json
import re
import resource
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture
from rich.console import Console

from tests import processes
from tests.documents import VOCABULARY, documents
from tests.profile import examples
from tests.test_cli import TINY, command, fails
from tests.test_pictures import find_tile
from tests.test_training import new_trainer, resumed_trainer, stop_at_step
from tests.tiny import small_run
from transfusion import objective
from transfusion.config import DataConfig, Run, from_json
from transfusion.data.loader import read_pairs
from transfusion.data.sources import open_raw
from transfusion.disk import read_json, read_json_lines
from transfusion.model.flops import count_training_flops
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.parallel import Ranks
from transfusion.sequence import Row, collate, encode_document
from transfusion.training import loggers, progress_bar
from transfusion.training.metrics import MetricsWriter
from transfusion.training.progress_bar import ProgressBar, format_time

ROOT = Path(__file__).parent.parent
TWO_SOURCES = DataConfig(sources=("digits", "topics"), seq_len=128, tokenizer_size=260, fit_documents=20)


# The lines


def test_every_name_is_flat_and_documented(trained):
    table = (ROOT / "docs" / "training.md").read_text().partition("## Watching a run")[2].partition("```")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    lines = read_json_lines(trained / "metrics.jsonl")
    names = {name: value for line in lines for name, value in line.items()}
    assert all(isinstance(value, int | float | str) for value in names.values())
    general = {re.sub(r"/(digits|topics)(/t0\.[1-9]5)?", r"/SOURCE\2", name) for name in names} - {"step"}
    general -= {f"heldout_velocity_error_by_t/SOURCE/t0.{n}5" for n in range(1, 10)}  # the table has the first one
    assert general <= documented
    assert documented - general <= {"mfu_exact", "mfu_usual", "reason"}  # a CPU has no known peak; no update was rejected
    events = [line["event"] for line in lines if "event" in line]
    assert (events[0], events[-1]) == ("start", "finish") and {*events[1:-1]} == {"preview", "checkpoint"}


@examples(60, quick=15)
@given(st.lists(st.lists(documents(), max_size=3), min_size=1, max_size=3), st.integers(0, 99))
def test_losses_by_source_are_the_parts_of_the_whole(rows, seed):
    """Counted item by item, for documents of the sources a and b in any order."""
    rows = [Row(tuple(encode_document(document, VOCABULARY) for document in row)) for row in rows]
    batch = collate(rows, max(sum(map(len, row.chunks)) for row in rows) + 3, VOCABULARY)
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.rand(batch.text_count, generator=rng, dtype=torch.float64)
    images = [torch.rand(len(group.keys), generator=rng, dtype=torch.float64) for group in batch.groups]
    expected = {"a": [0.0] * 3, "b": [0.0] * 3}

    def add(column: int, position: int, value: float) -> None:
        b, n = divmod(position, batch.tokens.shape[1])
        expected[rows[b].chunks[int(batch.document_ids[b, n])].source][column] += value

    for position, value in zip(batch.text_index.tolist(), tokens.tolist(), strict=True):
        add(0, position, value)
    for group, values in zip(batch.groups, images, strict=True):
        for position, value in zip(group.index[:, 0].tolist(), values.tolist(), strict=True):
            add(1, position, value)
    for names in (("b", "a"), ("a",), ("no", "b")):
        sums = objective.sum_by_source(batch, tokens, images, names)
        assert sums.tolist() == [pytest.approx(expected.get(name, [0.0] * 3)) for name in names]


def test_losses_of_sources_and_exact_flops_in_a_step(tmp_path):
    run = small_run(2, log_every=2)
    trainer = new_trainer(tmp_path, replace(run, data=replace(TWO_SOURCES, shuffle_block=24)))
    flops = []
    original = trainer.count
    trainer.count = lambda read: flops.append(count_training_flops(read[0][0], trainer.run.model)) or original(read)
    trainer.train()
    (line,) = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if "text_loss" in line]
    losses = [line["text_loss/digits"], line["text_loss/topics"]]
    assert min(losses) < line["text_loss"] < max(losses)
    assert line["image_loss/digits"] == pytest.approx(line["image_loss"], rel=1e-6)
    assert "image_loss/topics" not in line
    assert line["tflops_exact"] * 1e12 * line["seconds"] == pytest.approx(sum(flops), rel=1e-6)  # of both steps
    parts = [line[f"seconds/{part}"] for part in ("data", "ranks", "step", "device")]
    assert min(parts) > 0 and line["data_wait_share"] == pytest.approx(parts[0] / sum(parts))
    assert {"mfu_exact", "mfu_usual"}.isdisjoint(line)  # the peak of a CPU is not known
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 0.5 * most < line["peak_memory_bytes"] <= most


def test_mfu_is_the_share_of_the_peak_of_all_processes(tmp_path, monkeypatch):
    """Exact, and usual: 6 N + 12 layers width length for each position."""
    monkeypatch.setattr("transfusion.training.trainer.find_peak_tflops", lambda device: 50.0)
    trainer = new_trainer(tmp_path, small_run())
    trainer.ranks = Ranks(0, 4)
    values, model = trainer.measure_speed((9, 9, 9, 6 * 10**12, 3000), 2.0), trainer.run.model
    usual = 6 * count_parameters(build_on_meta(model)) + 12 * model.layers * model.width * trainer.run.data.seq_len
    assert values["positions_per_second"] == 1500
    assert (values["tflops_exact"], values["mfu_exact"]) == (3.0, 3.0 / 200)
    assert values["tflops_usual"] == pytest.approx(1500 * usual / 1e12)
    assert values["mfu_usual"] == pytest.approx(1500 * usual / 1e12 / 200)


def test_rejected_update_is_an_event_and_not_finite_numbers_are_left_out(tmp_path):
    run = small_run(3, log_every=10)
    run = replace(run, fault_tolerance=replace(run.fault_tolerance, skip_nonfinite=1))

    def change(batch, number):
        for group in batch.groups if number == 1 else ():
            group.x0[:] = float("nan")
        return batch

    new_trainer(tmp_path, run, change=change).train()
    (line,) = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if line.get("event") == "skip"]
    assert (line["step"], line["reason"]) == (2, "the text loss is not finite")
    assert "text_loss" not in line and line["learning_rate"] > 0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


# Loggers


def train_twice(folder: Path, names: tuple[str, ...]) -> None:
    """A run of four steps that stops at step 2 and resumes there, with lines of step 3 that were written before a crash."""
    run = small_run(4, log=names)
    stop_at_step(new_trainer(folder, run), 2).train()
    lost = loggers.open_loggers(names, folder, 2, {})
    with MetricsWriter(folder / "metrics.jsonl", 2, loggers=lost) as metrics:
        metrics.write(3, text_loss=1000.0)
    resumed_trainer(folder, run).train()


def test_tensorboard_has_the_lines_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_twice(tmp_path, ("tensorboard",))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    for name in ("text_loss", "text_loss/digits", "heldout_image_loss/digits", "learning_rate"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    steps = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("event/text_summary")]
    assert steps == [(line["step"], line["event"]) for line in lines if "event" in line]


def wandb_records(path: Path) -> Iterator:
    """The records of an offline run: 7 bytes, then LevelDB's log format, blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part = data[at + 7 : at + 7 + length]
        at, record = at + 7 + length, part if kind in (1, 2) else record + part  # 1: whole, 2: first
        if kind in (1, 4):  # 4: last
            yield Record.FromString(record)


class FakeRun:
    """What our logger uses of a W&B run."""

    def __init__(self):
        self.metrics, self.lines, self.exit_code = [], [], None

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.lines.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(monkeypatch) -> list[tuple[dict, FakeRun]]:
    """The arguments and the run of each call of a fake `wandb.init`: W&B itself takes seconds to start."""
    started = []

    def init(**options):
        started.append((options, FakeRun()))
        return started[-1][1]

    fake = SimpleNamespace(init=init, Settings=dict, errors=SimpleNamespace(Error=type("Error", (Exception,), {})))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


def test_wandb_gets_the_lines_under_one_id(fake_wandb, tmp_path):
    train_twice(tmp_path, ("wandb",))
    options, runs = zip(*fake_wandb, strict=True)
    (id_,) = {option["id"] for option in options}
    assert id_ == (tmp_path / "wandb" / "id.txt").read_text()
    same = {(option["resume"], option["name"], option["dir"]) for option in options}
    assert same == {("allow", tmp_path.name, str(tmp_path))}
    assert [run.metrics for run in runs] == [[("*", "step")]] * 3 and options[0]["config"]["training"]["steps"] == 4
    assert [run.exit_code for run in runs] == [0, 0, 0]
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    split = next(n for n, line in enumerate(lines) if line.get("event") == "resume")
    assert [*runs[0].lines, *runs[2].lines] == lines and len(runs[0].lines) == split


def test_wandb_run_of_training_that_fails_has_failed(fake_wandb, tmp_path):
    with pytest.raises(ZeroDivisionError):
        new_trainer(tmp_path, small_run(2, log=("wandb",)), on_preview=lambda model, step: 1 / 0).train()
    assert [run.exit_code for _, run in fake_wandb] == [1]


def test_wandb_that_does_not_start_is_one_line(fake_wandb, tmp_path):
    def init(**options):
        raise sys.modules["wandb"].errors.Error("no API key\nconfigured")

    sys.modules["wandb"].init = init
    with pytest.raises(ValueError, match="^--log wandb: no API key configured; run wandb login, or set WANDB_MODE=offline$"):
        loggers.open_loggers(("wandb",), tmp_path, 0, {})


def test_wandb_offline_keeps_its_id_after_a_resume(tmp_path, monkeypatch):
    """With W&B itself, in a process for each part: of several runs in one process it may lose the last."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    for steps in (2, 4):
        options = ("--training.preview-every", 0, "--log", "wandb", "--training.steps", steps)
        process = processes.run(command, "train", "digits", "--out", run, *TINY, *options)
        assert process.returncode == 0, process.stderr
    (id_,) = {folder.name.split("-")[3] for folder in (run / "wandb").glob("offline-run-*")}
    assert id_ == (run / "wandb" / "id.txt").read_text()
    history, settings = [], {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("history"):
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
    own = {"_step", "_runtime", "_timestamp"}
    assert [{k: v for k, v in line.items() if k not in own} for line in history] == read_json_lines(run / "metrics.jsonl")
    assert settings["training"]["steps"] == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_one_line_before_the_run_begins(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    line = fails(capsys, 1, "train", "digits", "--out", tmp_path / "run", "--log", name)
    assert line == f"transfusion: --log {name} needs {name}: pip install '.[{name}]' in a clone of the repository\n"
    assert not (tmp_path / "run").exists()
    assert "must be one of tensorboard, wandb" in fails(capsys, 2, "train", "digits", "--log", "csv")


def test_folder_of_the_name_is_not_the_package(tmp_path, monkeypatch):
    """W&B writes a folder `wandb`, which Python would import as an empty package."""
    (tmp_path / "madeup").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--log madeup needs madeup"):
        loggers.check_loggers(("madeup",))
    (tmp_path / "madeup" / "__init__.py").touch()
    loggers.check_loggers(("madeup",))


# Previews


def test_preview_has_the_held_out_pictures(trained):
    """The first of each caption, above what was drawn from it."""
    run = from_json(Run, read_json(trained / "run.json")["run"])
    pairs = [pair for source in open_raw(run.data, "heldout") for pair in read_pairs(source, 256)]
    scans = {caption: pixels for _, caption, pixels in reversed(pairs)}
    sheet = np.asarray(Picture.open(trained / "samples" / "step-000004.png"))
    top = sheet[: 96 + 12]
    places = [find_tile(top, scans[caption], 96) for caption in [*dict.fromkeys(caption for _, caption, _ in pairs)][:10]]
    assert len(places) == 10 and len({y for y, _ in places}) == 1
    assert [x for _, x in places] == sorted({x for _, x in places})  # in the order of the data
    assert sheet.shape[0] > 3 * 96 + 14


# The progress bar


def shown(bar: ProgressBar, width: int) -> str:
    """What a terminal of this width shows of the bar: all lines."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(bar)
    return console.file.getvalue().rstrip("\n")


def filled(steps: int, step: int, losses: str, speed: str, monkeypatch) -> ProgressBar:
    """A bar at this step, an hour after the first one."""
    clock = iter([0.0, 5.0])
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(clock, 3605.0))
    bar = ProgressBar(steps, 0)
    bar.update(1, "", "")
    bar.step, bar.losses, bar.speed = step, losses, speed
    return bar


@pytest.mark.parametrize(("width", "expected"), [
    (60, "step 1300/2000  {bar}  0:32:20 left  text 1.232  image 0.890"),
    (80, "step 1300/2000  {bar}  0:32:20 left  text 1.232  image 0.890  1,071 positions/s"),
    (130, "step 1300/2000  {bar}  0:32:20 left  text 1.232  image 0.890  1,071 positions/s  1:00:05 elapsed"),
])  # fmt: skip
def test_bar_is_whole_at_common_widths(width, expected, monkeypatch):
    bar = filled(2000, 1300, "text 1.232  image 0.890", "1,071 positions/s", monkeypatch)
    before, _, after = expected.partition("{bar}")
    line = shown(bar, width).rstrip()
    assert line.startswith(before) and line.endswith(after) and len(line) <= width
    assert re.fullmatch("━{2,26}[╸╺]? *", line.removeprefix(before).removesuffix(after))


@examples(40, quick=3)
@given(st.integers(1, 10**7), st.floats(0, 1), st.sampled_from(["", "L1 0.12", "text 1.2  image 0.9"]))
def test_bar_is_one_line_of_whole_parts_at_any_width(steps, share, losses):
    with mock.patch.object(progress_bar.time, "monotonic", lambda: 7.0):  # a busy machine may take seconds
        bar = ProgressBar(steps, 0)
        bar.update(round(share * steps), losses, "12,345 positions/s")
        step = f"step {bar.step:>{len(str(steps))}}/{steps}"
        parts = [part for part in (bar.time_left, losses, "12,345 positions/s", "0:00:00 elapsed") if part]
        for width in range(len(step), 140, 2):
            line = shown(bar, width)
            assert "\n" not in line and "…" not in line and line.startswith(step) and len(line) <= width
            present = [part in line for part in parts]
            assert present == sorted(present, reverse=True)  # the first parts are kept
            rest = line.removeprefix(step)
            for part in parts:
                rest = rest.replace(part, "")
            assert set(rest) <= set("━╸╺ ")  # no part is cut


def test_bar_moves_at_every_step(tmp_path, monkeypatch):
    """Also in the steps without a line of metrics."""
    steps = []
    original = ProgressBar.update
    monkeypatch.setattr(ProgressBar, "update", lambda bar, *values: steps.append(values) or original(bar, *values))
    new_trainer(tmp_path, small_run(5, log_every=4)).train()
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5]
    assert all(re.fullmatch(r"text \d\.\d{3}  image \d\.\d{3}", losses) for _, losses, _ in steps)
    assert all(re.fullmatch(r"[\d,]+ positions/s", speed) for *_, speed in steps)


def test_times():
    assert [format_time(s) for s in (0, 59.6, 3661, 90061)] == ["0:00:00", "0:01:00", "1:01:01", "1 d 1:01:01"]
