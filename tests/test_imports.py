"""What is imported before a command has understood what was typed: nothing heavy, so that a mistake is told at once."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.processes import PRELOADED, ROOT

# Each in one new process: what is typed, and which packages this adds to those of the lines before it.
PROBE = """
import json, sys
known, found = set(sys.modules), []
def new():
    global known
    before, known = known, set(sys.modules)
    added = {name.split(".")[0] for name in known - before} - sys.stdlib_module_names - {"transfusion"}
    return sorted(name for name in added if not name.startswith("_"))
import transfusion
found.append((0, new()))
dir(transfusion)
from transfusion.cli import main
for words in json.loads(sys.argv[1]):
    code = 0
    try:
        main(words)
    except SystemExit as exit_:
        code = exit_.code
    found.append((code, new()))
print("found" + json.dumps(found))
"""
OPTIONS = {"tyro", "typeguard", "docstring_parser", "typing_extensions"}  # what reads options
FILES = {"numpy", "PIL", "pyarrow", "cloudpickle", "cython_runtime", "fsspec", "absl"}  # what reads pictures and tables


def place_in(word: str, places: dict[str, Path]) -> str:
    """A word whose first part may stand for a place."""
    name, slash, rest = word.partition("/")
    return f"{places.get(name, name)}{slash}{rest}"


def imports(*lines: str, cwd: Path = ROOT) -> list[tuple[int, set[str]]]:
    """Exit code and newly imported packages of `import transfusion`, and then of each of these commands."""
    typed, env = json.dumps([line.split() for line in lines]), {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE, typed], cwd=cwd, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr
    return [(code, set(added)) for code, added in json.loads(done.stdout.rpartition("found")[2])]


def test_the_package_and_its_help_import_nothing():
    assert imports("--help", "") == [(0, set()), (0, set()), (2, set())]


WRONG = {  # what is typed -> the exit code
    "trian": 2, "data prepair": 2, "data": 2, "train": 2, "train digit": 2, "train digits --model.widht 3": 2,
    "train digits --model.width many": 2, "train digits --model.heads 5": 2, "train 0.16b --data.sources shaps": 1,
    "train 0.16b": 1, "train small --data NOWHERE": 1, "train digits --from NOWHERE --out NEW": 1,
    "train digits --init-from NOWHERE --out NEW": 1, "train NOWHERE/run.json": 1, "demo --outt x": 2,
    "generate NOWHERE three": 1, "generate NOWHERE": 2, "generate NOWHERE three --steps 0": 2,
    "generate NOWHERE a --size big": 2, "generate NOWHERE three --sampler magic": 2, "evaluate NOWHERE": 1, "evaluate": 2,
    "evaluate --from NOWHERE/results.json": 1,
    "evaluate NOWHERE --tasks nonsense": 2, "evaluate NOWHERE --questions NOWHERE/a.jsonl": 1, "report NOWHERE": 1,
    "report NOWHERE --devise cpu": 2, "export NOWHERE --out NEW": 1, "export NOWHERE": 2, "serve NOWHERE": 1,
    "serve NOWHERE --port 99999": 2, "serve NOWHERE --host 0.0.0.0": 2, "serve NOWHERE --limits.rows 0": 2,
    "plan 7b --memory 24": 2, "plan 7b --gpus 0": 2, "plan 7b --batch many": 2, "plan 9b": 2, "plan small --data NOWHERE": 1,
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


@pytest.mark.parametrize(("typed", "allowed"), [(WRONG, OPTIONS), (WRONG_SOURCES, OPTIONS | FILES)])
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(tmp_path, typed, allowed):
    places = {"NOWHERE": tmp_path / "nowhere", "NEW": tmp_path / "new", "RUN": tmp_path / "run"}
    for folder in ("run", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    lines = [" ".join(place_in(word, places) for word in line.split()) for line in typed]
    _, *found = imports(*lines, cwd=tmp_path)
    for (line, code), (exited, added) in zip(typed.items(), found, strict=True):
        assert exited == code, line
        assert added <= allowed, f"{line} imports {', '.join(sorted(added - allowed))}"


def test_config_and_runs_import_nothing_heavy_even_indirectly():
    code = "import sys, transfusion.config, transfusion.runs; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_an_import_is_found():
    """Else the tests above would test nothing."""
    (_, _), (code, added) = imports("plan 7b")
    assert code == 0
    assert "torch" in added


def test_what_processes_of_tests_are_forked_with_is_there():
    """The server passes over what it cannot import."""
    for name in PRELOADED:
        import_module(name)
