"""Imports before a command starts its work: nothing heavy, so that help and usage errors are fast."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.processes import PRELOADED, ROOT

# All commands in one new process: the exit code of each, and the packages that it adds to those imported before.
PROBE = """
import json, sys
known, results = set(sys.modules), []
def new_packages():
    global known
    before, known = known, set(sys.modules)
    added = {name.split(".")[0] for name in known - before} - sys.stdlib_module_names - {"transfusion"}
    return sorted(name for name in added if not name.startswith("_"))
import transfusion
results.append((0, new_packages()))
dir(transfusion)
from transfusion.cli import main
for arguments in json.loads(sys.argv[1]):
    code = 0
    try:
        main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    results.append((code, new_packages()))
print("results" + json.dumps(results))
"""
OPTIONS = {"tyro", "typeguard", "docstring_parser", "typing_extensions"}  # that read options
FILES = {  # that read images and tables
    "numpy", "PIL", "pyarrow", "cloudpickle", "cython_runtime", "fsspec", "absl", "zstandard",
}  # fmt: skip


def replace_name(argument: str, paths: dict[str, Path]) -> str:
    """An argument whose first part may be the name of a path."""
    name, slash, rest = argument.partition("/")
    return f"{paths.get(name, name)}{slash}{rest}"


def imports(*lines: str, cwd: Path = ROOT) -> list[tuple[int, set[str]]]:
    """Exit code and newly imported packages of `import transfusion`, then of each of these commands."""
    arguments, env = json.dumps([line.split() for line in lines]), {**os.environ, "PYTHONPATH": str(ROOT)}
    probe = subprocess.run([sys.executable, "-c", PROBE, arguments], cwd=cwd, env=env, capture_output=True, text=True)
    assert "Traceback" not in probe.stderr and probe.returncode == 0, probe.stderr
    return [(code, set(added)) for code, added in json.loads(probe.stdout.rpartition("results")[2])]


def test_package_help_and_version_import_nothing():
    assert imports("--help", "", "--version") == [(0, set()), (0, set()), (2, set()), (0, set())]


def test_help_of_commands_imports_nothing_heavy():
    helps = imports("train digits --help", "generate --help", "evaluate --help", "serve --help", "data prepare --help")
    assert all(code == 0 and added <= OPTIONS for code, added in helps)


WRONG = {  # arguments -> the exit code
    "trian": 2, "data prepair": 2, "data": 2, "train": 2, "train digit": 2, "train digits --model.widht 3": 2,
    "train digits --model.width many": 2, "train digits --model.heads 5": 2, "train 0.16b --data.sources shaps": 1,
    "train 0.16b": 1, "train small --data NOWHERE": 1, "train digits --from NOWHERE --out NEW": 1,
    "train digits --init-from NOWHERE --out NEW": 1, "train NOWHERE/run.json": 1, "demo --outt x": 2,
    "generate NOWHERE three": 1, "generate NOWHERE": 2, "generate NOWHERE three --steps 0": 2,
    "generate NOWHERE a --size big": 2, "generate NOWHERE three --sampler magic": 2, "evaluate NOWHERE": 1, "evaluate": 2,
    "evaluate --from NOWHERE/results.json": 1,
    "evaluate NOWHERE --tasks nonsense": 2, "evaluate NOWHERE --tasks choice --questions NOWHERE/a.jsonl": 1,
    "compare NOWHERE NEW": 1, "compare NOWHERE": 2,
    "report NOWHERE": 1, "report NOWHERE --devise cpu": 2, "export NOWHERE --out NEW": 1, "export NOWHERE": 2,
    "serve NOWHERE": 1,
    "serve NOWHERE --port 99999": 2, "serve NOWHERE --host 0.0.0.0": 2, "serve NOWHERE --limits.max-sequences 0": 2,
    "plan 7b --memory 24": 2, "plan 7b --gpus 0": 2, "plan 7b --training.batch-size many": 2, "plan 9b": 2,
    "plan small --data NOWHERE": 1,
    "data fit-codec smal a": 2, "generate runs/nowhere three": 1, "evaluate RUN --data NOWHERE": 1,
    "evaluate RUN --steps 0": 2, "evaluate NOWHERE --from RUN/run.json": 1,
    "evaluate RUN --from RUN/run.json --data NOWHERE": 1, "export RUN --out RUN": 1,
    "generate RUN three --device gpu": 2, "train digits --device cuda:x": 2,
}  # fmt: skip
WRONG_SOURCES = {
    "data validate NOWHERE": 1, "data inspect NOWHERE": 1, "data stats NOWHERE --tokenizer NOWHERE/tokenizer.json": 1,
    "data prepare NOWHERE --out NEW": 1, "data prepare digits --out NEW --like NOWHERE": 1, "data validate": 2,
    "data prepare digits --out NEW --codec NOWHERE": 1, "data prepare digits --out NEW --tokenizer NOWHERE": 1,
    "data fit-codec small NOWHERE": 1, "data fit-codec small digits --size 30x30": 2,
}  # fmt: skip


@pytest.mark.parametrize(("commands", "allowed"), [(WRONG, OPTIONS), (WRONG_SOURCES, OPTIONS | FILES)])
def test_usage_errors_import_nothing_heavy(tmp_path, commands, allowed):
    paths = {"NOWHERE": tmp_path / "nowhere", "NEW": tmp_path / "new", "RUN": tmp_path / "run"}
    for folder in ("run", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    lines = [" ".join(replace_name(word, paths) for word in line.split()) for line in commands]
    _, *results = imports(*lines, cwd=tmp_path)
    for (line, code), (exit_code, added) in zip(commands.items(), results, strict=True):
        assert exit_code == code, line
        assert added <= allowed, f"{line} imports {', '.join(sorted(added - allowed))}"


def test_config_and_runs_import_nothing_heavy():
    code = "import sys, transfusion.config, transfusion.paper; print('torch' in sys.modules or 'numpy' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "False", process.stderr


def test_imports_are_found():
    """Otherwise the tests above would test nothing."""
    (_, _), (code, added) = imports("plan 7b")
    assert code == 0
    assert "torch" in added


def test_preloaded_modules_exist():
    """The fork server ignores modules that it cannot import."""
    for name in PRELOADED:
        import_module(name)
