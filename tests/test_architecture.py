"""Promise 9: who imports whom under transfusion/, and the house rules that a machine can check."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "transfusion"

GROUND = {"config", "runs", "sequence", "page", "chance", "disk", "weight_files"}  # everyone may import these
MAY_IMPORT = {  # room or file -> what else it may; a room's own files may import each other
    "chance": set(),
    "config": set(),
    "runs": {"config"},
    "disk": set(),
    "page": set(),
    "sequence": {"chance"},
    "weight_files": set(),
    "model": set(),
    "codecs": {"model.conv"},  # blocks of convolutions, where they are shared
    "diffusion": set(),
    "parallel": set(),
    "data": {"codecs"},
    "checkpoint": {"model", "codecs", "parallel"},
    "objective": {"diffusion"},
    "training": {"data", "objective", "diffusion", "codecs", "checkpoint", "model", "parallel"},
    "inference": {"checkpoint", "model", "diffusion", "codecs"},
    "evaluation": {"inference", "data", "objective", "diffusion", "parallel", "checkpoint"},
    "report": {"evaluation", "inference", "data", "checkpoint"},
    "plan": {"model", "parallel"},
}
TOP = {"cli", "__main__", "__init__"}  # may import anything; nothing imports them
NAMELESS = {"utils", "util", "common", "base", "manager", "helpers", "helper", "misc"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNPICKLING = {"torch.load", "torch.save"}
TENSORS_ONLY = "torch.load(path, map_location='cpu', weights_only=True)"  # once, in weight_files.py: it runs nothing
LONGEST_FILE, LONGEST_FUNCTION = 500, 80


@cache
def files() -> dict[str, ast.Module]:
    """Every file as `room.file` or `file`, parsed."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports_of(name: str, tree: ast.Module) -> set[str]:
    """Whatever a file imports, anywhere in it, by full name: `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ["transfusion", *name.split(".")]
            origin = ".".join([*here[: len(here) - node.level], *filter(None, [node.module])])
            origin = origin if node.level else node.module
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and _name(node.func) in ("importlib.import_module", "__import__"):
            found |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
    return found


def _name(node: ast.AST) -> str:
    """`a.b.c` as text."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def edges() -> dict[str, set[str]]:
    """file -> the files of ours that it imports."""
    known = {name.removesuffix(".__init__"): name for name in files()}
    found = {}
    for name, tree in files().items():
        ours = {
            target.partition(".")[2] for target in imports_of(name, tree) if target.startswith("transfusion.")
        }
        found[name] = {known[target] for target in ours if target in known} - {name}
    return found


def room_of(name: str) -> str:
    return name.split(".")[0]


def is_allowed(importer: str, imported: str) -> bool:
    one, other = room_of(importer), room_of(imported)
    if one in TOP or other in TOP:
        return one in TOP
    if one == other or (other in GROUND and one not in GROUND):
        return True
    return bool({other, imported} & MAY_IMPORT.get(one, set()))


# The edges


def test_every_import_goes_down():
    wrong = [
        f"{one} -> {other}"
        for one, others in edges().items()
        for other in others
        if not is_allowed(one, other)
    ]
    assert not wrong, f"the house allows no such import: {', '.join(sorted(wrong))}"


def test_every_room_is_on_the_plan():
    rooms = {room_of(name) for name in files()}
    assert rooms <= MAY_IMPORT.keys() | TOP, f"who may import {rooms - MAY_IMPORT.keys() - TOP}?"
    assert GROUND - {"page"} <= rooms  # the parser finds what is there
    assert sum(map(len, edges().values())) > 30


def test_no_file_imports_itself_around_a_corner():
    """Depth first: a file met again on the way down closes a circle."""
    found, done = edges(), set()

    def walk(name: str, way: tuple[str, ...]):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(found[name]):
                walk(other, (*way, name))
            done.add(name)

    for name in found:
        walk(name, ())


@pytest.mark.parametrize(("importer", "imported", "allowed"), [
    ("training.trainer", "inference.engine", False), ("inference.engine", "training.trainer", False),
    ("model.transformer", "diffusion", False), ("model.patches", "codecs.pixels", False),
    ("model.transfusion", "data.loader", False), ("codecs.text", "data.reading.readers", False),
    ("data.loader", "model.mask", False), ("data.loader", "parallel", False),
    ("sequence", "config", False), ("config", "chance", False), ("objective", "model.transfusion", False),
    ("report", "cli", False), ("cli", "training.trainer", True), ("model.mask", "sequence", True),
    ("codecs.vq", "model.conv", True), ("codecs.vq", "model.mask", False), ("sequence", "chance", True),
    ("data.loader", "data.packing", True), ("inference.engine", "checkpoint.open", True),
    ("data.prepare", "cli", False), ("cli.data", "data.prepare", True), ("data.store", "cli.screen", False),
])  # fmt: skip
def test_the_plan_says_what_the_design_says(importer, imported, allowed):
    assert is_allowed(importer, imported) == allowed


def test_imports_are_found_wherever_they_hide():
    code = """
import transfusion.model.mask
def late():
    from transfusion import diffusion
    from . import packing
    from ..codecs.text import Tokenizer
    importlib.import_module("transfusion.cli")
"""
    assert imports_of("data.loader", ast.parse(code)) >= {
        "transfusion.model.mask", "transfusion.diffusion", "transfusion.data.packing",
        "transfusion.codecs.text", "transfusion.cli",
    }  # fmt: skip


def test_config_imports_nothing_heavy_even_indirectly():
    heavy = {"torch", "numpy", "tokenizers", "PIL", "sklearn", "matplotlib", "grain"}
    code = f"import sys, transfusion.config; print(*sorted({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=HOUSE.parent, capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stdout + found.stderr


# The rules of style


@pytest.mark.parametrize("name", files())
def test_a_file_is_short_and_says_first_what_it_is_for(name):
    path = HOUSE / (name.replace(".", "/") + ".py")
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE
    if lines or path.name != "__init__.py":
        assert ast.get_docstring(files()[name])
        assert lines[0].startswith('"""')
        assert lines[0].strip('" ')  # on line one, not below it
    for node in ast.walk(files()[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} in {name} is too long"


def test_no_name_says_nothing():
    parts = {part for name in files() for part in name.split(".")}
    assert not parts & NAMELESS


def but_tensors(name: str, tree: ast.Module) -> list[ast.AST]:
    """All of a file but its one reading of tensors from a pickle, if it is the file that may."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == TENSORS_ONLY]
    allowed = {id(part) for call in calls[:1] for part in ast.walk(call)} if name == "weight_files" else set()
    return [node for node in ast.walk(tree) if id(node) not in allowed]


def unpickles(name: str, tree: ast.Module) -> list[str]:
    """What in this file could read or write a pickle, and possibly run what it holds."""
    imported = imports_of(name, tree)
    found = [module for module in imported if module.split(".")[0] in PICKLES or module in UNPICKLING]
    for node in but_tensors(name, tree):
        if isinstance(node, ast.Attribute) and _name(node) in UNPICKLING:
            found.append(_name(node))
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            found.append(node.arg)
    return found


@pytest.mark.parametrize("name", files())
def test_nothing_reads_or_writes_a_pickle(name):
    assert not unpickles(name, files()[name])


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "def f():\n    import dill", "torch.load('x')",
    "from torch import load", "read = torch.load", "f(x, allow_pickle=True)", "import joblib.hashing",
])  # fmt: skip
def test_a_pickle_is_found_however_it_is_spelt(code):
    assert unpickles("file", ast.parse(code))
    assert unpickles("weight_files", ast.parse(code))


def test_tensors_alone_are_read_from_a_pickle_in_one_place():
    assert not unpickles("weight_files", ast.parse(TENSORS_ONLY))
    assert unpickles("codecs.vq", ast.parse(TENSORS_ONLY))
    assert unpickles("weight_files", ast.parse(f"{TENSORS_ONLY}\n{TENSORS_ONLY}"))
    assert unpickles("weight_files", ast.parse(TENSORS_ONLY.replace("True", "False")))
    assert unpickles("weight_files", ast.parse(TENSORS_ONLY.replace(", weights_only=True", "")))
