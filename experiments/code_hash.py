"""The hash of the code that a result depends on: the syntax trees of some modules and of all that they import, directly or
not, in their first lines or in a function.

Formatting, comments and docstrings do not change it, nor does the version of Python that reads the code; a changed constant,
name or message does. The versions of Python and of the libraries are not part of it; `run.json` names them.
"""

import ast
import hashlib
import sys
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOWING = "transfusion.report.write", "transfusion.page"  # modules that show results and change none


@cache
def hash_code(*modules: str) -> str:
    """8 hexadecimal digits for these modules of the repository, as they are at the first call."""
    return _read_hash(*modules)


def check_code(*modules: str) -> None:
    """Exit if these modules have changed since `hash_code` read them."""
    if _read_hash(*modules) != hash_code(*modules):
        sys.exit("the code has changed since this command started; start it again")


@cache
def find_modules(*modules: str) -> dict[str, Path]:
    """The files of these modules of the repository and of all that they import from it, by name."""
    finder = ModuleFinder([str(ROOT)], excludes=SHOWING)
    for module in modules:
        finder.import_hook(module)
    return {name: Path(module.__file__) for name, module in sorted(finder.modules.items()) if module.__file__}


def _read_hash(*modules: str) -> str:
    hashes = [(name, hash_source(path.read_bytes())) for name, path in find_modules(*modules).items()]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:8]


@cache
def hash_source(source: bytes) -> str:
    """The hash of the content of one file."""
    return hashlib.sha256(repr(_simplify(ast.parse(source))).encode()).hexdigest()


def _simplify(node: Any) -> Any:
    """A syntax tree as nested lists and tuples, without positions, docstrings, and what some versions of Python add: empty
    fields, and empty texts in f-strings."""
    if isinstance(node, list):
        return [_simplify(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.JoinedStr):
        return "JoinedStr", [_simplify(part) for part in node.values if getattr(part, "value", None) != ""]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return type(node).__name__, [(name, _simplify(value)) for name, value in fields]


def _is_docstring(node: Any) -> bool:
    """True for the docstring of a module, class, function or field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
