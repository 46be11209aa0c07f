"""Settings of `train` from files and options, --print-config, --dry-run, and what is refused before a run starts."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.profile import THOROUGH
from tests.test_cli import TINY, TINY_FITTED, command, fails
from tests.test_export import edit_json
from tests.test_run_folder import DECIDED, leaves, other_run
from transfusion import parallel
from transfusion.checkpoint.read import describe_run
from transfusion.cli import main
from transfusion.cli.measure import check_memory
from transfusion.cli.runs import Train
from transfusion.cli.screen import UsageError
from transfusion.cli.settings import parse_run, read_run, to_yaml
from transfusion.config import Run, to_json
from transfusion.disk import OpenError
from transfusion.runs import named_run


def run_of(*words: object) -> Run:
    """The run of `train` with these words."""
    chosen = read_run("train", [str(word) for word in words])
    return parse_run(Train, "train", chosen.run, chosen.arguments)[0]


# Files


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_written_settings_are_read_as_they_were(tmp_path, suffix):
    """With another value of every setting than the recipe's, except for a rank, which excludes some of them."""
    run = named_run("digits")
    for name in sorted({*leaves(run)} - DECIDED - {"data.sources", "data.mixture_weights", "lora.rank"}):
        run = other_run(run, name)
    path = tmp_path / f"my{suffix}"
    text = to_yaml(run)
    path.write_text(text if suffix == ".yaml" else json.dumps(yaml.safe_load(text)))
    assert run_of("--config", path) == run_of("digits", f"--config={path}") == run_of("digits", "--config", path) == run


def test_options_override_a_file_and_a_file_the_run(tmp_path):
    path = tmp_path / "my.yml"
    path.write_text("training:\n  steps: 7\n  learning_rate: 1e-3\nmodel: {width: 96}\n")
    digits = named_run("digits")
    expected = replace(digits, model=replace(digits.model, width=96),
                       training=replace(digits.training, steps=9, learning_rate=1e-3))  # fmt: skip
    assert run_of("digits", "--training.steps", 9, "--config", path) == expected


def test_recipe_is_the_one_that_the_other_settings_are_of(tmp_path):
    """The file's, or the RUN before --config; a file may also be RUN."""
    path = tmp_path / "my.yaml"
    path.write_text("recipe: small\nmodel: {width: 96}\n")
    for name, words in {"small": [path], "digits": ["digits", "--config", path]}.items():
        run = named_run(name)
        assert run_of(*words) == replace(run, model=replace(run.model, width=96))


def test_second_file_is_refused(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("recipe: small\n")
    for words in ([path, f"--config={path}"], ["digits", "--config", path, "--config", path]):
        with pytest.raises(UsageError, match="takes one file of settings, not .*my.yaml and .*my.yaml"):
            run_of(*words)


def test_data_in_a_file_replace_the_sources_of_the_run(tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps({"data": {"prepared": ["mine"], "mixture_weights": [1, 2]}}))
    data = run_of("digits", "--config", path).data
    assert (data.prepared, data.sources, data.mixture_weights) == (("mine",), (), (1.0, 2.0))
    path.write_text(json.dumps({"data": {"seq_len": 64}}))
    assert run_of("digits", "--config", path).data == replace(named_run("digits").data, seq_len=64)


def test_settings_of_a_trained_run_serve_as_a_file(trained, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, *_: not runs.append(run))
    command("train", "digits", "--config", trained / "run.json")
    run = json.loads((trained / "run.json").read_text())["run"]
    names = "vocab_size", "text_vocab_size", "latent_channels"
    decided = {name: getattr(named_run("digits").model, name) for name in names}
    assert json.loads(json.dumps(to_json(runs[0]))) == run | {"model": run["model"] | decided}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.yaml", "training: {lr: 1}", "a.yaml: unknown field training.lr"),
    ("a.yaml", "training: {steps: many}", "a.yaml: training.steps must be a whole number, not 'many'"),
    ("a.yaml", "training: 5", "a.yaml: training must be"), ("a.yaml", "model: {heads: 5}", "a.yaml: model.heads 5: width"),
    ("a.yaml", "", "a.yaml does not hold settings"), ("a.yaml", "- 1", "a.yaml does not hold settings"),
    ("a.yaml", "1: 2", "a.yaml: unknown field 1"), ("a.yaml", "a: [", "cannot read a.yaml: while parsing"),
    ("a.yaml", "recipe: 2024-13-45", "cannot read a.yaml: month must be"), ("a.yaml", "\x00", "cannot read a.yaml"),
    ("a.yaml", "a: !!python/object/apply:os.getcwd []", "cannot read a.yaml: could not determine a constructor"),
    ("a.yaml", "a: &a [*a]", "cannot read a.yaml: maximum recursion"), ("a.yaml", "[" * 500, "cannot read a.yaml"),
    ("a.json", "{", "cannot read a.json"), ("a.json", "[]", "a.json does not hold a JSON object"),
    ("b.yaml", "{}", "cannot read a.yaml: [Errno 2]"),
])  # fmt: skip
def test_unusable_file_is_one_line(tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    place = "a.yaml" if name == "b.yaml" else name
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits", "--config", place])
    stderr = capsys.readouterr().err
    assert exit_.value.code in (1, 2) and message in stderr and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_file_without_a_run_is_refused(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("recipe: other\n")
    with pytest.raises(UsageError, match="my.yaml names no recipe: give RUN before --config"):
        run_of("--config", path)
    with pytest.raises(UsageError, match="my.yaml: unknown field lr"):
        path.write_text("lr: 1\n")
        run_of("digits", "--config", path)
    with pytest.raises(OpenError, match="cannot read missing.yaml"):
        run_of("missing.yaml")


@pytest.mark.parametrize("words", [["{}"], ["{}/run.json"], ["digits", "--config", "{}/run.json"]])
def test_run_of_another_version_is_refused_with_its_format(written, tmp_path, words):
    folder = Path(shutil.copytree(written, tmp_path / "old"))
    edit_json(folder / "run.json", format=2, run={"name": "digits"})
    with pytest.raises(OpenError, match=f"{folder} has format 2, written by transfusion .*; this version reads format 3"):
        run_of(*(word.format(folder) for word in words))


def test_print_config_needs_no_data_and_is_a_file_for_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command("train", "small", "--training.steps", 7, "--print-config")
    Path("my.yaml").write_text(capsys.readouterr().out)
    small = named_run("small")
    expected = replace(small, training=replace(small.training, steps=7))
    assert run_of("my.yaml") == run_of("--config", "my.yaml") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


# A dry run


def test_dry_run_prints_the_plan_and_writes_nothing(trained, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    command("train", trained, "--training.steps", 9, "--dry-run")
    output = capsys.readouterr()
    assert "follows the schedule of 9 steps" in output.err and re.search(r"copy .*: text \d.*image \d", output.err)
    assert "Memory of each GPU" in output.out and "On this machine (cpu) it needs 0.0 GB of memory" in output.out
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    command("train", "7b", "--data", prepared / "prepared", "--dry-run")
    output = capsys.readouterr().out
    assert re.search(r"fits in 80 GB +no\n", output) and "7b does not fit; it would with" in output
    assert [*tmp_path.iterdir()] == []


def test_step_that_is_not_finite_is_one_line_without_a_file(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--data", prepared / "prepared", "--training.image-weight", "1e38", "--dry-run")
    stderr = fails(capsys, 2, "train", "small", *words).splitlines()[-1]
    assert stderr == ("transfusion: step 1: the gradient is not finite in a copy with one layer of width 64: use smaller "
                      "training settings")  # fmt: skip
    assert [*tmp_path.iterdir()] == []


DRAWN = {  # words after options, a row for each part of a run
    "--model.width": "32 48 64 100", "--model.heads": "1 2 3 4", "--model.kv-heads": "1 2 3", "--model.head-dim": "7 8 64",
    "--model.layers": "1 3 40", "--model.intermediate-size": "1 100", "--model.unet-width": "8 16 24 64 1000",
    "--model.patches": "linear unet codes", "--model.patch-size": "1 2 3 4 8", "--model.image-attention": "causal",
    "--model.image-rope": "2d",
    "--model.z-loss": "0 1e-4 1e30", "--model.norm-eps": "1e-12 0.1", "--model.rope-theta": "1 1e30",
    "--diffusion.noise-schedule": "cosine rectified_flow", "--diffusion.prediction": "epsilon velocity x0",
    "--diffusion.loss-space": "velocity", "--diffusion.t-distribution": "logit_normal", "--diffusion.t-shift": "0.001 1000",
    "--data.codec": "pixels block_pca", "--data.codec-block": "1 2 3 4 16", "--data.codec-components": "1 6 100",
    "--data.seq-len": "1 8 32 64 200", "--data.image-first": "0 1",
    "--data.image-first-max-t": "0 0.5", "--data.caption-dropout": "0 1", "--data.shuffle-block": "1 7",
    "--data.tokenizer-size": "256 300 1000000", "--data.mixture-weights": "1 1e-300 1e300",
    "--data.sources": "digits shapes topics photographs", "--data.shapes.size": "1 8 33", "--data.shapes.level": "0 2",
    "--training.optimizer": "muon", "--training.learning-rate": "0 1 1e30", "--training.max-grad-norm": "1e-30 1e30",
    "--training.text-lr-scale": "0 2", "--training.image-lr-scale": "0 2", "--training.transformer-lr-scale": "0 2",
    "--training.batch-size": "1 3 64", "--training.warmup-steps": "0 1000000", "--training.image-weight": "0 1e30",
    "--training.eps": "1e-20 1", "--training.ema-decay": "0 0.5", "--training.seed": "-1 9223372036854775807",
    "--parallel.cpu-matmul": "auto default bfloat16", "--parallel.shard": "hybrid", "--parallel.compile": "False None",
    "--parallel.micro-batch-size": "1 2 1000",
    "--generation.sampler": "euler dpm", "--fault-tolerance.skip-spikes-above": "1",
}  # fmt: skip
FLAGS = "--model.qk-norm", "--model.post-norm", "--model.tie-word-embeddings", "--data.clean-copies"
FITTED = "--data.codec", "--data.tokenizer", "--data.shapes", "--data.sources"  # not on prepared data


def draw_command(rng: random.Random, data: Path) -> list[str]:
    """A `train` command with some of these options, on built-in sources or on the prepared data."""
    is_prepared = rng.random() < 0.3
    words = [rng.choice(["digits", "digits", "shapes", "0.16b"] if not is_prepared else ["small", "shapes", "0.16b"])]
    words += ["--data", str(data)] if is_prepared else ["--data.fit-documents", rng.choice(["1", "50"])]
    options = [option for option in DRAWN if not (is_prepared and option.startswith(FITTED))]
    for option in rng.sample(options, rng.randint(1, 6)):
        words += [option, rng.choice(DRAWN[option].split())]
    return [*words, *(flag for flag in FLAGS if rng.random() < 0.2)]


@pytest.mark.slow
def test_drawn_commands_run_dry_or_are_refused_in_one_line(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, outcomes = random.Random(0), []
    for _ in range(100 if THOROUGH else 6):
        words = draw_command(rng, prepared / "prepared")
        try:
            command("train", *words, "--dry-run")
            outcomes.append("works")
        except SystemExit as exit_:
            outcomes.append(f"refused {exit_.code}")
        except BaseException as error:
            raise AssertionError(f"train {' '.join(words)} --dry-run") from error
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert ("nothing was written" in lines[-1]) == ("Disk" in output.out) == (outcomes[-1] == "works"), (words, lines)
        assert sum(line.startswith("transfusion: ") for line in lines) == (outcomes[-1] != "works"), (words, lines)
        assert len(lines) < 4 and "Traceback" not in output.err, (words, lines)
        assert [*tmp_path.iterdir()] == [], words
    assert {*outcomes} == {"works", "refused 1", "refused 2"} or not THOROUGH
    assert outcomes.count("works") >= len(outcomes) // 4, outcomes


# Refused at the start


def test_run_above_the_memory_is_refused_before_it_is_written(tmp_path, monkeypatch, capsys):
    """The line names a change with which it fits, if there is one."""
    words = ("train", "digits", *TINY, "--model.width", 64, "--training.batch-size", 16, "--out", tmp_path / "run")
    ways = {}
    for memory in (1_000_000, 11_000_000):
        monkeypatch.setattr("transfusion.cli.measure.device_memory", lambda device, memory=memory: memory)
        line, _, ways[memory] = fails(capsys, 2, *words).splitlines()[-1].partition(": use ")
        assert line == "transfusion: run needs 0.0 GB of memory for each process, and there are 0.0 GB"
        assert not (tmp_path / "run").exists()
    assert ways[1_000_000] == "a smaller run"
    command(*words, *ways[11_000_000].split(" or ")[0].split())
    assert (tmp_path / "run" / "run.json").exists()


def test_batch_that_the_processes_cannot_share_is_refused(trained, monkeypatch, capsys):
    """Also of a run that exists, which keeps its batch of two rows."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "--training.batch-size 2 is not divisible by 3 processes: use a batch size of 3, or 2 processes"
    assert fails(capsys, 2, "train", trained, "--dry-run").splitlines()[-1] == f"transfusion: {message}"
    with pytest.raises(UsageError, match=message):
        check_memory("trained", describe_run(trained).run, torch.device("cpu"))


def test_memory_of_a_cpu_is_that_of_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    whole = parallel.device_memory(torch.device("cpu"))
    assert 2**28 < whole < 2**45
    for text, expected in (("max\n", whole), (f"{2**62}\n", whole), ("123456\n", 123456)):
        (tmp_path / "memory.max").write_text(text)
        assert parallel.device_memory(torch.device("cpu")) == expected


@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_forgotten_data_are_refused_before_anything_is_fitted(tmp_path, monkeypatch, capsys, extra):
    monkeypatch.chdir(tmp_path)
    stderr = fails(capsys, 1, "train", "small", *TINY_FITTED, *extra)
    assert stderr.startswith("transfusion: this run names no data: give --data DIR") and stderr.count("\n") == 1
