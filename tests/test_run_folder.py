"""Resuming a run: by its folder, with free and fixed settings, with the same data, and before the first checkpoint."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load
from safetensors.torch import save as to_safetensors

from tests.test_cli import command, fails
from tests.tiny import begin_run, run_tensors, save, small_run, tokenizer
from transfusion.checkpoint.read import describe_run
from transfusion.cli.run_folder import RunFolder
from transfusion.cli.screen import UsageError
from transfusion.config import DataConfig, RopeScaling, Run
from transfusion.data.built_in import digits
from transfusion.data.sources import hash_sources
from transfusion.data.store import open_prepared
from transfusion.disk import OpenError, read_json, write_json
from transfusion.training.optimizer import get_learning_rate

FREE = {  # what a run with a checkpoint may change, beside all of generation, parallel and fault_tolerance
    "training.steps", "training.checkpoint_every", "training.keep_checkpoints", "training.validate_every",
    "training.preview_every", "training.log_every", "training.log",
}  # fmt: skip
DECIDED = {  # by the data, or tested below
    "recipe", "model.vocab_size", "model.text_vocab_size", "model.latent_channels", "data.prepared",
}  # fmt: skip
VALUES = (  # one of these is another valid value of any field
    4, 2, 1, 64, 96, 300, 0, 0.01, 0.3, 0.7, 1.5, True, False, (0.5, 0.6), "muon", "hybrid", "bfloat16", "dpm", "linear",
    "unet", "causal", "x0", "epsilon", "velocity", "rectified_flow", "logit_normal", "block_pca", (1.0,), ("shapes",),
    RopeScaling(), ("wandb",), "full", "fresh", "text", "2d",
)  # fmt: skip


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    """The names of all settings, such as "model.width"."""
    for f in fields(config):
        value = getattr(config, f.name)
        yield from leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]


def with_value(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


def other_run(run: Run, name: str) -> Run:
    """The run with another valid value of this setting."""
    for value in VALUES:
        try:
            other = with_value(run, name, value)
        except ValueError:
            continue
        if other != run:
            return other
    raise AssertionError(f"VALUES has no other value for {name}")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with a checkpoint at step 2 of 4, as `train` writes it, without training."""
    draft = RunFolder.draft(small_run(), tmp_path / "run", None)
    draft.write()
    save(draft.path, 2, run_tensors(draft.run, 0), {"step": 2})
    return draft.path


def test_every_setting_is_free_or_refused_with_from(folder):
    run, free = describe_run(folder).run, set()
    for name in sorted({*leaves(run)} - DECIDED):
        other = other_run(run, name)
        try:
            assert RunFolder.draft(other, folder, None).run == other
            free.add(name)
        except UsageError as error:
            assert f"({name} is " in str(error) and f"--from {folder} with another --out" in str(error), name
            assert "\n" not in str(error)
    assert {name for name in free if name.split(".")[0] not in ("generation", "parallel", "fault_tolerance")} == FREE
    assert {n for n in leaves(run) if n.startswith(("generation.", "parallel.", "fault_tolerance."))} <= free
    assert describe_run(folder).run == run  # a draft writes nothing


def test_another_run_in_the_folder_is_refused(folder):
    with pytest.raises(UsageError, match="has the recipe tiny, not other"):
        RunFolder.draft(replace(describe_run(folder).run, recipe="other"), folder, None)


def test_changed_settings_are_written_and_named_in_one_line(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run = describe_run(folder).run
    RunFolder.draft(run, folder, None).write()
    assert capsys.readouterr().err == "" and (folder / "run.json").read_bytes() == before["run.json"]
    longer = replace(run, training=replace(run.training, steps=7), generation=replace(run.generation, steps=9))
    RunFolder.draft(longer, folder, None).write()
    changes, schedule = capsys.readouterr().err.splitlines()
    assert changes.endswith("resumes with other settings: training.steps is 4 in the folder, 7 in this command; "
                            "generation.steps is 3 in the folder, 9 in this command")  # fmt: skip
    assert schedule == "from here on the learning rate follows the schedule of 7 steps"
    assert RunFolder.open(folder).run == longer
    changed = {name for name in before if (folder / name).read_bytes() != before[name]}
    assert changed == {"run.json"}


def test_steps_below_the_checkpoint_are_refused(folder):
    run = describe_run(folder).run
    assert RunFolder.draft(replace(run, training=replace(run.training, steps=2)), folder, None).run.training.steps == 2
    with pytest.raises(UsageError, match="--training.steps 1: .* is at step 2 already; give at least 2"):
        RunFolder.draft(replace(run, training=replace(run.training, steps=1)), folder, None)


def test_folder_in_place_of_run_is_resumed_and_made_longer(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "renamed")
    command("train", "renamed")
    assert "renamed is trained to its last step, 4" in capsys.readouterr().err
    command("train", "renamed", "--training.steps", 6, "--training.log-every", 1)
    assert "follows the schedule of 6 steps" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]
    rows = [json.loads(line) for line in Path("renamed/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    config = describe_run(Path("renamed")).run.training
    assert config.steps == 6 and (Path("renamed") / "checkpoints" / "step-000006").is_dir()
    assert {step: rates[step] for step in (5, 6)} == {step: get_learning_rate(step - 1, config) for step in (5, 6)}
    message = fails(capsys, 2, "train", "renamed", "--training.learning-rate", 0.5)
    assert "training.learning_rate is 0.003 in the folder, 0.5 in this command" in message


def test_folder_with_another_out_gives_its_settings_to_a_new_run(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, out, *_: not calls.append((run, out)))
    command("train", folder, "--out", tmp_path / "other", "--training.learning-rate", 0.5)
    command("train", folder)
    assert [out for _, out in calls] == [tmp_path / "other", folder]
    assert [run.training.learning_rate for run, _ in calls] == [0.5, 3e-3]


def test_resumed_run_keeps_its_loggers(folder, monkeypatch):
    """Until the command names others, or none."""
    calls = []

    def train_run(run, path, device):
        RunFolder.draft(run, path, None).write()
        return not calls.append(run.training.log)

    monkeypatch.setattr("transfusion.cli.runs.train_run", train_run)
    monkeypatch.setattr("transfusion.cli.runs.check_loggers", lambda names: None)
    for words in (("--log", "tensorboard", "wandb"), (), ("--training.log", "wandb"), ("--log",), ()):
        command("train", folder, *words)
    assert calls == [("tensorboard", "wandb"), ("tensorboard", "wandb"), ("wandb",), (), ()]


@pytest.mark.parametrize("what", ["nothing", "exported"])
def test_folder_without_a_run_is_one_line(what, exported, tmp_path, capsys):
    place, message = {"nothing": (tmp_path, "is not a run: it has no run.json"),
                      "exported": (exported, "is an exported run: give it with --from")}[what]  # fmt: skip
    stderr = fails(capsys, 1 if what == "nothing" else 2, "train", place)
    assert message in stderr and stderr.count("\n") == 1


def test_moved_data_keep_the_sources_and_weights_of_the_run(folder, prepared, tmp_path, monkeypatch):
    run, calls = describe_run(folder).run, []
    data = replace(run.data, prepared=("/gone",), sources=("texts", "photos"), mixture_weights=(0.9, 0.1))
    values = read_json(folder / "run.json")
    write_json(folder / "run.json", values | {"run": values["run"] | {"data": vars(data) | {
        "digits": vars(data.digits), "shapes": vars(data.shapes)}}})  # fmt: skip
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, *_: not calls.append(run.data))
    command("train", folder, "--data", prepared / "prepared")
    write_json(tmp_path / "moved.json", {"data": {"prepared": [str(prepared / "prepared")]}})
    command("train", folder, "--config", tmp_path / "moved.json")
    command("train", folder, "--data", prepared / "prepared", "--out", tmp_path / "other")
    place = (str(prepared / "prepared"),)
    moved = replace(data, prepared=place)
    assert calls == [moved, moved, replace(moved, sources=(), mixture_weights=())]


# Before the first checkpoint


def test_without_a_checkpoint_the_corrected_settings_are_taken(tmp_path, capsys):
    run = begin_run(tmp_path)
    corrected = replace(run, model=replace(run.model, width=64), training=replace(run.training, learning_rate=0.5))
    draft = RunFolder.draft(corrected, tmp_path, None)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == (f"{tmp_path} has no checkpoint, so it takes this command's settings: model.width is 32 in the folder, "
                    "64 in this command; training.learning_rate is 0.003 in the folder, 0.5 in this command")  # fmt: skip
    assert describe_run(tmp_path).run == run
    draft.write()
    assert describe_run(tmp_path).run == draft.run == corrected
    RunFolder.draft(corrected, tmp_path, None)
    assert "no checkpoint" not in capsys.readouterr().err


def test_folder_without_a_checkpoint_keeps_its_start(folder, tmp_path, monkeypatch):
    draft = RunFolder.draft(describe_run(folder).run, tmp_path / "tuned", ("run", str(folder)))
    draft.write()
    calls = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda *args: not calls.append(args[3:]))
    command("train", tmp_path / "tuned")
    command("train", tmp_path / "tuned", "--out", tmp_path / "other")
    assert calls == [(("run", str(folder)),), ()]


# The same data


def test_changed_built_in_source_is_refused(folder, monkeypatch):
    run = describe_run(folder).run
    monkeypatch.setattr(digits, "NAMES", (*digits.NAMES[:9], "neuf"))
    with pytest.raises(UsageError, match="the built-in source digits has other documents than those of .*run.json"):
        RunFolder.draft(run, folder, None)


def test_hash_of_a_built_in_source_depends_on_texts_and_pixels(monkeypatch):
    config = DataConfig(sources=("digits", "shapes", "topics", "photographs"))
    before = hash_sources(config)
    assert len({*before.values()}) == 4 and hash_sources(config) == before
    scans, labels = digits.load_scans("train")
    changed = np.array(scans)
    changed[5, 0, 0] ^= 1
    monkeypatch.setattr(digits, "load_scans", lambda split: (changed, labels))
    assert {name for name, digest in hash_sources(config).items() if digest != before[name]} == {"digits"}


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared / "prepared", tmp_path / "data"))


def test_prepared_data_are_compared_by_content(folder, data, tmp_path):
    """Not by where they came from or which version wrote them. Skipped rows are content: they are not trained on."""
    run = replace(describe_run(folder).run, data=DataConfig(prepared=(str(data),), sources=("photos", "texts"), seq_len=256))
    draft = RunFolder.draft(run, tmp_path / "photos", None)
    draft.write()
    save(draft.path, 2, run_tensors(draft.run, 0), {"step": 2})
    metadata = read_json(data / "dataset.json")
    metadata["versions"]["transfusion"] = "9"
    metadata["sources"]["photos"]["address"] = "/elsewhere/photos"
    write_json(data / "dataset.json", metadata)
    assert RunFolder.draft(run, draft.path, None).run == draft.run
    metadata["sources"]["photos"]["shards"][1]["skipped"] = {"train": [0]}
    write_json(data / "dataset.json", metadata)
    with pytest.raises(UsageError, match="does not hold the data of .*photos has other documents"):
        RunFolder.draft(run, draft.path, None)
    tensors = load((data / "codec.safetensors").read_bytes())
    codec = to_safetensors({name: 2 * values for name, values in tensors.items()})
    text = tokenizer().to_json().encode()
    for name, key, content in (("codec.safetensors", "codec", codec), ("tokenizer.json", "tokenizer", text)):
        before = (data / name).read_bytes()
        (data / name).write_bytes(content)
        other = metadata | {key: metadata[key] | {"sha256": hashlib.sha256(content).hexdigest()}}
        write_json(data / "dataset.json", other)
        with pytest.raises(UsageError, match="does not hold the data of .*it has another tokenizer or codec"):
            RunFolder.draft(run, draft.path, None)
        (data / name).write_bytes(before)


def test_damaged_latents_are_named_whenever_they_are_read(data, monkeypatch):
    path = data / "photos" / "train-00001.arrow"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\xff\x7f" * 32  # NaN in float16; the file is valid Arrow
    path.write_bytes(content)
    monkeypatch.setattr("transfusion.data.store.MAX_OPEN_SHARDS", 1)
    source = open_prepared(data).source("photos", "train")
    first, second = (shard["documents"]["train"] for shard in source.metadata["shards"][:2])
    damaged = {}
    for _ in range(2):
        for id_ in range(len(source)):
            try:
                source[id_]
            except OpenError as error:
                damaged[id_] = str(error)
    assert 1 <= len(damaged) <= 2  # the others of this shard can be read
    assert all(first <= id_ < first + second for id_ in damaged)
    message = f"{path} was changed after it was written: document .* is damaged .*; transfusion data validate {data} checks"
    assert all(re.match(message, error) for error in damaged.values())
