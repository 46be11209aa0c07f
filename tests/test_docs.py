"""The documentation: each page is in the site's navigation; the options and messages on it exist in the code."""

import ast
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from torch.distributed.run import parse_args as parse_torchrun

from transfusion.cli import main
from transfusion.codecs.config import CodecTrainingConfig
from transfusion.config import Run
from transfusion.disk import run_name

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOT_PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PAGES = sorted(path for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb"))


class SiteLoader(yaml.SafeLoader):
    """mkdocs.yml reads environment variables with !ENV."""


SiteLoader.add_constructor("!ENV", lambda loader, node: "")


def nav_pages(entries: list) -> list[str]:
    pages = []
    for entry in entries:
        (content,) = entry.values()
        pages += [content] if isinstance(content, str) else nav_pages(content)
    return pages


def test_navigation_has_every_page_once():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), SiteLoader)  # noqa: S506 (a SafeLoader)
    pages = nav_pages(site["nav"])
    assert sorted(pages) == sorted([*ROOT_PAGES, *(path.name for path in PAGES)])
    assert all((ROOT / path).exists() for path in ROOT_PAGES.values())


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.name)
def test_links_to_files_exist(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    )  # fmt: skip
    targets = re.findall(r"\]\(([^\s()#:]+)(?:#[^\s()]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def run_options() -> set[str]:
    """Every option of a run: --training.learning-rate and so on."""

    def options(kind: type, prefix: str) -> set[str]:
        hints = get_type_hints(kind)
        names = set()
        for field in fields(kind):
            name = prefix + field.name.replace("_", "-")
            names |= {name} | (options(hints[field.name], f"{name}.") if is_dataclass(hints[field.name]) else set())
        return names

    return options(Run, "--")


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_options_of_runs_exist(path):
    known = run_options()
    groups = "|".join(sorted(option[2:] for option in known if f"{option}." in " ".join(known)))
    mentioned = {match[0] for match in re.finditer(rf"--(?:{groups})\.[a-z0-9.-]*[a-z0-9]", path.read_text())}
    codec = {"--training." + field.name.replace("_", "-") for field in fields(CodecTrainingConfig)}  # of fit-codec
    assert mentioned - known - codec - {"--training.lr"} == set()  # (the misspelt option of troubleshooting.md)


@pytest.mark.parametrize("name", ["train digits", "data prepare", "data fit-codec small", "evaluate"])
def test_torchrun_passes_options_on(name, capsys):
    """torchrun refuses an option if several of its own options begin with it. --log is such an option; the docs say so."""
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    options = {*re.findall(r"(?<!\S)--[a-z][a-z0-9.-]*", capsys.readouterr().out)} - {"--log"}
    assert len(options) > 5
    for option in options:
        words = "--nproc-per-node", "2", "-m", "transfusion", *name.split(), option, "1"
        assert parse_torchrun(words).training_script_args == [*words[4:]]


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_torchrun_lines_are_read_by_torchrun(path):
    for line in re.findall(r"^torchrun ((?:(?!\.\.\.).)*-m transfusion .*)$", path.read_text(), re.MULTILINE):
        words = shlex.split(line.partition("#")[0])
        begin = words.index("transfusion") + 1
        assert parse_torchrun(words).training_script_args == words[begin:]


@cache
def messages() -> list[list[str]]:
    """The strings of the package that can be messages, each as its parts between the fields."""
    strings = []
    for path in (ROOT / "transfusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            constants = node.values if isinstance(node, ast.JoinedStr) else [node]
            parts = [part.value for part in constants if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if sum(map(len, parts)) >= 20:
                strings.append(parts)
    return strings


def has_in_order(line: str, parts: list[str]) -> bool:
    start = 0
    for part in parts:
        start = line.find(part, start) + len(part)
        if start < len(part):
            return False
    return True


@pytest.mark.parametrize("line", [
    line for block in re.findall(r"```text\n(.*?)```", (DOCS / "troubleshooting.md").read_text(), re.DOTALL)
    for line in block.splitlines()
])  # fmt: skip
def test_messages_in_troubleshooting_are_in_the_code(line):
    assert any(has_in_order(line, parts) for parts in messages())


def text_of(path: Path) -> str:
    """A page's text; of a notebook with the output of its cells."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join(
        "".join(lines) for cell in cells
        for lines in (cell["source"], *(output.get("text", ()) for output in cell.get("outputs", ())))
    )  # fmt: skip


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_steps_are_shown_as_training_prints_them(path):
    lines = re.findall(r"^step \d+/\d+ .*$", text_of(path), re.M)
    assert [line for line in lines if not re.search(r"  [\d,]+ positions/s  (\d+:\d\d:\d\d|-:--:--) left$", line)] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_requests_name_the_run_that_is_served(path):
    """As /v1 knows it: a page that serves a run and asks for a model asks for the name of its folder."""
    text = text_of(path)
    served = {run_name(Path(folder)) for folder in re.findall(r"^transfusion serve (\S+)", text, re.M)}
    asked = {*re.findall(r'"model": "([\w.-]+)"|\bmodel="([\w.-]+)"', text)}
    assert not served or {a or b for a, b in asked} <= served
