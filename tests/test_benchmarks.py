"""The benchmarks run, every part of them, and measure what they say; no test asserts a time."""

import json
import math
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import attention, compare, made, sides, training
from benchmarks.__main__ import PARTS, Options, main
from benchmarks.measuring import Figure, Setting, in_turn, number
from benchmarks.training import memory_of_training
from tests.processes import context
from tests.profile import few_samples
from transfusion.config import DataConfig, ModelConfig, Run
from transfusion.model.mask import packed_mask
from transfusion.runs import SIZES, named_run
from transfusion.training.trainer import Trainer

CPU = torch.device("cpu")
QUICK = Setting(CPU, quick=True)


def short(name: str) -> Run:
    """A named run on few and short rows."""
    run = named_run(name)
    return replace(run, data=replace(run.data, fit_documents=100, seq_len=64, rows=2))


def memory_of_short(name: str) -> float | None:
    """Runs in a separate process, so it applies the patches again."""
    with mock.patch.object(training, "named_run", short), few_samples():
        return memory_of_training(name)


@pytest.mark.slow
def test_every_part_runs_and_is_told_in_a_table_and_a_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "READS", 2)
    monkeypatch.setattr(training, "WARM", 1)
    monkeypatch.setattr(training, "named_run", short)
    monkeypatch.setattr(training, "memory_of_training", memory_of_short)
    forked = context()
    monkeypatch.setattr(training.multiprocessing, "get_context", lambda kind: forked)
    threads = torch.get_num_threads()
    main(Options(device="cpu", quick=True, json=tmp_path / "new" / "all.json"))
    said, written = capsys.readouterr().out, json.loads((tmp_path / "new" / "all.json").read_text())
    assert written["parts"].keys() == PARTS.keys() - {"compare"}
    assert written["quick"]
    assert {"commit", "versions", "processor", "threads", "device", "load_at_start", "load_at_end"} <= written.keys()
    for part, figures in written["parts"].items():
        assert f"\n{part}\n" in said
        assert any(figure["ratio"] for figure in figures), part
        for figure in figures:
            assert figure["what"].strip() in said
            assert figure["beside"] if figure["value"] is None else 0 < figure["value"] < math.inf
            assert figure["ratio"] is None or (0 < figure["ratio"] < math.inf and figure["beside"])
    assert max(map(len, said.splitlines()[2:-1])) <= 100
    assert torch.get_num_threads() == threads  # loading gives back what it took


def test_things_take_turns_and_what_warms_up_does_not_count():
    done = []
    seconds = in_turn({"one": lambda: done.append(1), "two": lambda: done.append(2)}, 3, CPU, warm=2)
    assert done == [1, 2] * 5
    assert seconds.keys() == {"one", "two"}


def test_numbers_have_three_digits_that_count():
    assert [number(v) for v in (0.01234, 0.5, 1, 9.876, 98.76, 987.6, 98765)] == [
        "0.0123", "0.500", "1.00", "9.88", "98.8", "988", "98,765"
    ]  # fmt: skip
    assert Figure("7b", beside="left out").line() == "  7b: left out"


# Training


def test_half_of_the_papers_positions_are_patches():
    with few_samples(1024):
        loader = made.paper_loader(seq_len=4096, rows=8)
    assert loader.encoder.vocabulary.size == SIZES["7b"].vocab_size
    batches = [batch for batch, _ in islice(loader.batches(), 3)]
    positions = sum(batch.positions for batch in batches)
    assert positions > 0.97 * 3 * 8 * 4096
    patches = sum(group.index.numel() for batch in batches for group in batch.groups)
    assert patches / positions == pytest.approx(0.5, abs=0.03)


def test_the_papers_documents_are_trained_on_by_the_trainers_own_step():
    model = ModelConfig(width=32, layers=1, heads=2, intermediate_size=32)
    run = Run("tiny", model, data=DataConfig(seq_len=512, rows=1))
    trainer = Trainer(run, Path(), made.paper_loader(512, 1), {}, CPU)
    before = trainer.model.head.weight.clone()
    step, *shares = training.figures(trainer, QUICK)
    assert step.unit == "positions/s"
    assert [share.beside for share in shares] == ["bare rows x width x width", "its fastest bare product"] * 2
    assert not torch.equal(before, trainer.model.head.weight)


def test_rows_are_halved_until_they_fit(monkeypatch):
    def figures(rows: int, setting: Setting) -> list[Figure]:
        if rows > 2:
            raise torch.OutOfMemoryError
        return [Figure(f"{rows} rows")]

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(training, "paper_sized", lambda name, rows, device: rows)
    monkeypatch.setattr(training, "figures", figures)
    assert training.as_many_rows_as_fit("1.4b", 8, QUICK) == (2, [Figure("2 rows")])
    rows, (left_out,) = training.as_many_rows_as_fit("7b", 2, QUICK)
    assert rows == 0
    assert "126 GiB of state" in left_out.line() and "80.0 GiB" in left_out.line()


def test_without_documents_and_images_the_mask_is_causal():
    batch, _ = next(made.paper_loader(512, 2).batches())
    ((plain, _),) = training.causal([(batch, [])])
    assert torch.equal(
        packed_mask(plain.document_ids, plain.image_ids).dense, torch.ones(2, 1, 512, 512, dtype=torch.bool).tril()
    )
    assert not torch.equal(
        packed_mask(batch.document_ids, batch.image_ids).dense, packed_mask(plain.document_ids, plain.image_ids).dense
    )


def test_attention_that_is_another_is_found():
    batch, _ = next(made.paper_loader(512, 1).batches())
    mask, given = packed_mask(batch.document_ids, batch.image_ids), [torch.randn(1, 2, 512, 16) for _ in range(4)]
    true = attention.both_ways(attention.dense(mask.attn_bias), *given)
    attention.check(attention.both_ways(mask.attend, *given), true)
    plain = packed_mask(torch.zeros_like(batch.document_ids), batch.image_ids)
    with pytest.raises(RuntimeError, match="output differs"):
        attention.check(attention.both_ways(plain.attend, *given), true)


# The comparison

PEER = """
from benchmarks.sides import obey
obey({{
    "about": lambda: {{"parameters": 7, "threads": 1, "versions": {{"transfusion-pytorch": "{version}"}}}},
    "train": lambda steps: [0.5] * steps,
    "draw": lambda: print("here too") or {{"seconds": 2.0, "passes": 7}},
    "memory": lambda: None,
}})
"""


def peer(folder: Path, code: str) -> Path:
    """Something that can be called like a python, and runs this instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(compare, "OURS", {"ours": ("64", "64")})


@pytest.mark.slow
def test_both_sides_do_as_they_are_told(tmp_path, tiny):
    code = PEER.format(version=compare.VERSION)
    found = list(compare.measure(replace(QUICK, peer_python=peer(tmp_path, code))))
    by_peer = [figure.value for figure in found if figure.what.strip() == compare.PEER and figure.value]
    assert by_peer == [sides.POSITIONS / 0.5, 2.0, 2.0]
    ours = [figure for figure in found if figure.what.strip() == "ours" and figure.value]
    assert [figure.unit for figure in ours] == ["positions/s", "s", "s"]
    assert ours[0].ratio == pytest.approx(ours[0].value / by_peer[0])
    assert ours[1].ratio == pytest.approx(2.0 / ours[1].value)
    heads = [figure.beside for figure in found if figure.what.startswith("drawing")]
    assert heads == ["7 forward passes", "7 and 501 forward passes"]
    memory = [figure for figure in found if "memory" in figure.what]
    assert memory[0].value is None and memory[0].beside


def test_the_wrong_peer_is_one_line(tmp_path, tiny):
    with pytest.raises(ValueError, match="must be transfusion-pytorch 0.20.0, and .*python has transfusion-pytorch 0.19.4"):
        list(compare.measure(replace(QUICK, peer_python=peer(tmp_path, PEER.format(version="0.19.4")))))


def test_a_side_that_stops_says_why(tmp_path):
    with sides.Worker([str(peer(tmp_path, 'raise SystemExit("no such package")'))], 1) as worker:
        with pytest.raises(ValueError, match="python has stopped; the last that it said: no such package"):
            worker.ask("about")


def test_both_sides_do_the_same_work():
    ours = compare.Sequences(made.Vocabulary.build(sides.VOCABULARY, [(sides.SIDE, sides.SIDE)], patch_size=1))
    batch, _ = next(ours.batches())
    markers = 2 + 2 * 2  # bos, eos, and around each image boi, eoi
    assert batch.positions == sides.POSITIONS + sides.SEQUENCES * markers == batch.tokens.numel()
    (group,) = batch.groups
    assert tuple(group.x0.shape) == (2 * sides.SEQUENCES, sides.CHANNELS, sides.SIDE, sides.SIDE)
