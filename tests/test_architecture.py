"""Promise 9: who imports whom under transfusion/, and the house rules that a machine can check."""

import ast
from functools import cache
from pathlib import Path

HOUSE = Path(__file__).parent.parent / "transfusion"

GROUND = {"config", "runs", "sequence", "page", "seeding", "disk", "foreign_weights"}  # everyone may import these
MAY_IMPORT = {  # room or file -> what else it may; a room's own files may import each other
    "seeding": set(),
    "config": set(),
    "runs": {"config"},
    "disk": set(),
    "page": set(),
    "sequence": {"seeding"},
    "foreign_weights": set(),
    "model": set(),
    "codecs": {"model.conv"},  # blocks of convolutions, where they are shared
    "diffusion": set(),
    "parallel": set(),
    "data": {"codecs"},
    "checkpoint": {"model", "codecs", "parallel"},
    "objective": {"diffusion"},
    "training": {"data", "objective", "diffusion", "codecs", "checkpoint", "model", "parallel"},
    "inference": {"checkpoint", "model", "diffusion", "codecs"},
    "serving": {"inference", "checkpoint", "codecs"},
    "evaluation": {"inference", "data", "objective", "diffusion", "parallel", "checkpoint"},
    "report": {"evaluation", "inference", "data", "checkpoint"},
    "plan": {"model", "parallel"},
}
TOP = {"cli", "__main__", "__init__"}  # may import anything; nothing imports them
NAMELESS = {"utils", "util", "common", "base", "manager", "helpers", "helper", "misc"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNPICKLING = {"torch.load", "torch.save"}
TENSORS_ONLY = "torch.load(path, map_location='cpu', weights_only=True)"  # once, in foreign_weights.py: it runs nothing
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


def test_every_import_goes_down_and_none_goes_in_a_circle():
    found = edges()
    rooms = {room_of(name) for name in found}
    assert rooms <= MAY_IMPORT.keys() | TOP, f"who may import {rooms - MAY_IMPORT.keys() - TOP}?"
    assert GROUND - {"page"} <= rooms and sum(map(len, found.values())) > 30  # the parser finds what is there
    wrong = [f"{one} -> {other}" for one, others in found.items() for other in others if not is_allowed(one, other)]
    assert not wrong, f"the house allows no such import: {', '.join(sorted(wrong))}"
    assert not circles(found)


def circles(found: dict[str, set[str]]) -> list[str]:
    """Ways from a file back to itself. Depth first: one that is met again on the way down closes a circle."""
    done, closed = set(), []

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            closed.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(found[name]):
                walk(other, (*way, name))
            done.add(name)

    for name in found:
        walk(name, ())
    return closed


FORBIDDEN = [
    ("training.trainer", "inference.engine"), ("inference.engine", "training.trainer"), ("model.transformer", "diffusion"),
    ("model.patches", "codecs.pixels"), ("model.transfusion", "data.loader"), ("codecs.text", "data.reading.readers"),
    ("data.loader", "model.mask"), ("data.loader", "parallel"), ("sequence", "config"), ("config", "seeding"),
    ("objective", "model.transfusion"), ("report", "cli"), ("codecs.vq", "model.mask"), ("data.prepare", "cli"),
    ("data.store", "cli.screen"),
]  # fmt: skip
ALLOWED = [
    ("cli", "training.trainer"), ("model.mask", "sequence"), ("codecs.vq", "model.conv"), ("sequence", "seeding"),
    ("data.loader", "data.packing"), ("inference.engine", "checkpoint.open"), ("cli.data", "data.prepare"),
]  # fmt: skip


def test_the_rules_are_those_of_the_design():
    assert [pair for pair in FORBIDDEN if is_allowed(*pair)] == []
    assert [pair for pair in ALLOWED if not is_allowed(*pair)] == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


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


# The rules of style


def test_files_are_short_and_say_first_what_they_are_for():
    for name, tree in files().items():
        assert not {*name.split(".")} & NAMELESS, name
        lines = (HOUSE / (name.replace(".", "/") + ".py")).read_text().splitlines()
        assert len(lines) <= LONGEST_FILE, name
        if lines or not name.endswith("__init__"):
            assert ast.get_docstring(tree), name
            assert lines[0].startswith('"""') and lines[0].strip('" '), name  # on line one, not below it
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        assert [node.name for node in functions if node.end_lineno - node.lineno >= LONGEST_FUNCTION] == [], name


def but_tensors(name: str, tree: ast.Module) -> list[ast.AST]:
    """All of a file but its one reading of tensors from a pickle, if it is the file that may."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == TENSORS_ONLY]
    allowed = {id(part) for call in calls[:1] for part in ast.walk(call)} if name == "foreign_weights" else set()
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


PICKLED = [
    "import pickle", "from pickle import loads", "def f():\n    import dill", "torch.load('x')",
    "from torch import load", "read = torch.load", "f(x, allow_pickle=True)", "import joblib.hashing",
]  # fmt: skip


def test_nothing_reads_or_writes_a_pickle():
    assert {name: found for name, tree in files().items() if (found := unpickles(name, tree))} == {}


def test_a_pickle_is_found_however_it_is_spelt_but_for_tensors_alone_in_one_place():
    for code in PICKLED:
        assert unpickles("file", ast.parse(code)) and unpickles("foreign_weights", ast.parse(code)), code
    assert not unpickles("foreign_weights", ast.parse(TENSORS_ONLY))
    assert unpickles("codecs.vq", ast.parse(TENSORS_ONLY))
    assert unpickles("foreign_weights", ast.parse(f"{TENSORS_ONLY}\n{TENSORS_ONLY}"))
    assert unpickles("foreign_weights", ast.parse(TENSORS_ONLY.replace("True", "False")))
    assert unpickles("foreign_weights", ast.parse(TENSORS_ONLY.replace(", weights_only=True", "")))
