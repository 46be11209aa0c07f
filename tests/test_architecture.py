"""Promise 9: the allowed imports under transfusion/, and the rules of style that can be checked automatically."""

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "transfusion"

GROUND = {  # all may import these
    "fields", "config", "chat", "runs", "paper", "sequence", "page", "seeding", "disk", "foreign_weights",
}  # fmt: skip
MAY_IMPORT = {  # subpackage or file -> further allowed imports; files of a subpackage may import each other
    "seeding": set(),
    "fields": set(),
    "config": {"fields"},
    "chat": {"config"},
    "runs": {"config"},
    "paper": {"runs"},
    "disk": set(),
    "page": set(),
    "sequence": {"seeding"},
    "foreign_weights": set(),
    "model": set(),
    "codecs": {"model.conv"},  # shared convolution blocks
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
    "plan": {"model", "objective", "parallel"},
}
TOP = {"cli", "__main__", "__init__"}  # may import anything; nothing imports them
VAGUE_NAMES = {"utils", "util", "common", "base", "manager", "helpers", "helper", "misc"}
PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLE_FUNCTIONS = {"torch.load", "torch.save"}
TENSORS_ONLY = "torch.load(path, map_location='cpu', weights_only=True)"  # allowed once, in foreign_weights.py
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80


@cache
def files() -> dict[str, ast.Module]:
    """Every file by its name, `subpackage.file` or `file`, parsed."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(), str(path))
    return trees


def imports_of(name: str, tree: ast.Module) -> set[str]:
    """The imports of a file, anywhere in it, by full name: `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            path = ["transfusion", *name.split(".")]
            origin = ".".join([*path[: len(path) - node.level], *filter(None, [node.module])])
            origin = origin if node.level else node.module
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and _name(node.func) in ("importlib.import_module", "__import__"):
            names |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
    return names


def _name(node: ast.AST) -> str:
    """`a.b.c` as text."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def edges() -> dict[str, set[str]]:
    """file -> the files of the package that it imports."""
    known = {name.removesuffix(".__init__"): name for name in files()}
    imports = {}
    for name, tree in files().items():
        targets = {
            target.partition(".")[2] for target in imports_of(name, tree) if target.startswith("transfusion.")
        }
        imports[name] = {known[target] for target in targets if target in known} - {name}
    return imports


def part_of(name: str) -> str:
    return name.split(".")[0]


def is_allowed(importer: str, imported: str) -> bool:
    source, target = part_of(importer), part_of(imported)
    if source in TOP or target in TOP:
        return source in TOP
    if importer.startswith("data.built_in.") and target == "data":
        return imported == "data.raw" or imported.startswith("data.built_in.")
    if source == target or (target in GROUND and source not in GROUND):
        return True
    return bool({target, imported} & MAY_IMPORT.get(source, set()))


# Imports


def test_imports_are_allowed_and_without_cycles():
    imports = edges()
    parts = {part_of(name) for name in imports}
    assert parts <= MAY_IMPORT.keys() | TOP, f"MAY_IMPORT lacks {parts - MAY_IMPORT.keys() - TOP}"
    assert GROUND - {"page"} <= parts and sum(map(len, imports.values())) > 30  # the parser finds imports
    wrong = [f"{name} -> {other}" for name, others in imports.items() for other in others if not is_allowed(name, other)]
    assert not wrong, f"not allowed: {', '.join(sorted(wrong))}"
    assert not cycles(imports)


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """Import cycles, by depth-first search: a file that is already on the path closes a cycle."""
    done, closed = set(), []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            closed.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(imports[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in imports:
        visit(name, ())
    return closed


FORBIDDEN = [
    ("training.trainer", "inference.engine"), ("inference.engine", "training.trainer"), ("model.transformer", "diffusion"),
    ("model.patches", "codecs.pixels"), ("model.transfusion", "data.loader"), ("codecs.text", "data.reading.readers"),
    ("data.loader", "model.mask"), ("data.loader", "parallel"), ("sequence", "config"), ("config", "seeding"),
    ("objective", "model.transfusion"), ("report", "cli"), ("codecs.vq", "model.mask"), ("data.prepare", "cli"),
    ("data.store", "cli.screen"), ("inference.engine", "serving.app"), ("data.built_in.digits", "data.prepare"),
]  # fmt: skip
ALLOWED = [
    ("cli", "training.trainer"), ("model.mask", "sequence"), ("codecs.vq", "model.conv"), ("sequence", "seeding"),
    ("data.loader", "data.packing"), ("inference.engine", "checkpoint.open"), ("cli.data", "data.prepare"),
    ("serving.app", "inference.engine"), ("data.built_in.shapes", "data.raw"),
]  # fmt: skip


def test_rules_of_imports():
    assert [pair for pair in FORBIDDEN if is_allowed(*pair)] == []
    assert [pair for pair in ALLOWED if not is_allowed(*pair)] == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


def test_all_forms_of_imports_are_found():
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


# Style


def test_files_are_short_and_have_a_docstring():
    for name, tree in files().items():
        assert not {*name.split(".")} & VAGUE_NAMES, name
        lines = (PACKAGE / (name.replace(".", "/") + ".py")).read_text().splitlines()
        assert len(lines) <= MAX_FILE_LINES, name
        if lines or not name.endswith("__init__"):
            assert ast.get_docstring(tree), name
            assert lines[0].startswith('"""') and lines[0].strip('" '), name  # on line one, not below it
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        assert [node.name for node in functions if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES] == [], name


def without_allowed_load(name: str, tree: ast.Module) -> list[ast.AST]:
    """The nodes of a file, without the one allowed load of tensors from a pickle."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == TENSORS_ONLY]
    allowed = {id(part) for call in calls[:1] for part in ast.walk(call)} if name == "foreign_weights" else set()
    return [node for node in ast.walk(tree) if id(node) not in allowed]


def find_pickles(name: str, tree: ast.Module) -> list[str]:
    """The names in a file that read or write pickles, which can execute code."""
    imported = imports_of(name, tree)
    names = [module for module in imported if module.split(".")[0] in PICKLE_MODULES or module in PICKLE_FUNCTIONS]
    for node in without_allowed_load(name, tree):
        if isinstance(node, ast.Attribute) and _name(node) in PICKLE_FUNCTIONS:
            names.append(_name(node))
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            names.append(node.arg)
    return names


ROOTS = PACKAGE, PACKAGE.parent / "benchmarks", PACKAGE.parent / "experiments"
TEXT_CODE = [
    "path.read_text()", "path.write_text('a')", "path.open()", "path.open('w')", "open(path)", "open(path, 'a')",
    "gzip.open(path, 'wt', 1)",
]  # fmt: skip
OTHER_CODE = [
    "path.read_text(encoding='utf-8')", "path.open('rb')", "path.open('w', encoding='utf-8')", "open(path, 'xb')",
    "self.files.open(path)", "tarfile.open(fileobj=file)", "os.open(path, os.O_RDWR)", "path.read_bytes()",
]  # fmt: skip


def find_text_without_encoding(tree: ast.Module) -> list[int]:
    """The lines that open a text file without an encoding: then the locale decides."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name, values = _name(node.func).split(".")[-1], [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        modes = [value for value in values if re.fullmatch("[rwaxtb+]+", str(value))]
        is_bare = not node.keywords and len(node.args) == isinstance(node.func, ast.Name)  # path.open() or open(path)
        is_text = any("b" not in mode for mode in modes) or is_bare
        if name in ("read_text", "write_text") or (name == "open" and is_text):
            lines.append(node.lineno)
    return lines


def test_text_files_are_utf8():
    assert all(find_text_without_encoding(ast.parse(code)) for code in TEXT_CODE)
    assert not any(find_text_without_encoding(ast.parse(code)) for code in OTHER_CODE)
    trees = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for root in ROOTS for path in root.rglob("*.py")}
    assert {str(path): lines for path, tree in trees.items() if (lines := find_text_without_encoding(tree))} == {}


PICKLE_CODE = [
    "import pickle", "from pickle import loads", "def f():\n    import dill", "torch.load('x')",
    "from torch import load", "read = torch.load", "f(x, allow_pickle=True)", "import joblib.hashing",
]  # fmt: skip


def test_no_pickles():
    assert {name: pickles for name, tree in files().items() if (pickles := find_pickles(name, tree))} == {}


def test_pickles_are_found_except_one_load_of_tensors():
    for code in PICKLE_CODE:
        assert find_pickles("file", ast.parse(code)) and find_pickles("foreign_weights", ast.parse(code)), code
    assert not find_pickles("foreign_weights", ast.parse(TENSORS_ONLY))
    assert find_pickles("codecs.vq", ast.parse(TENSORS_ONLY))
    assert find_pickles("foreign_weights", ast.parse(f"{TENSORS_ONLY}\n{TENSORS_ONLY}"))
    assert find_pickles("foreign_weights", ast.parse(TENSORS_ONLY.replace("True", "False")))
    assert find_pickles("foreign_weights", ast.parse(TENSORS_ONLY.replace(", weights_only=True", "")))
