"""What a run is called: its folder, wherever it is opened. Its recipe is a field."""

import os
import shutil
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.test_cli import TINY, command, fails
from tests.test_export import edit_json
from transfusion.checkpoint.export import export
from transfusion.checkpoint.read import describe_run
from transfusion.config import EvaluationConfig
from transfusion.disk import OpenError, read_json, run_name, to_name
from transfusion.evaluation.results import evaluate, repeat
from transfusion.inference.engine import open_run
from transfusion.report.compare import write_comparison
from transfusion.serving.limits import Limits
from transfusion.serving.served import ServedRun

WORDS = {  # folder -> name
    "my-digits": "my-digits", "digits_2": "digits_2", "7b.v2": "7b.v2", "größe": "größe", "हिन्दी": "हिन्दी", "数字": "数字",
    "my digits": "my-digits", "a\nb\x1b[31m": "a-b-31m", "second <b>": "second-b", "`a`|b": "a-b", ".hidden": "hidden",
    "a\udcff": "a", "😀": "run", "-": "run", "gro\u0308ße": "größe",
}  # fmt: skip


@pytest.mark.parametrize(("folder", "name"), WORDS.items())
def test_name_of_a_folder(folder, name):
    assert run_name(Path("/runs") / folder) == to_name(folder) == name


@given(st.text(st.characters(exclude_categories=())))
@example("")
def test_name_is_one_printable_word_and_stays_itself(text):
    name = to_name(text)
    assert name and name == to_name(name) == name.strip("-.") and name.isprintable() and not any(map(str.isspace, name))
    assert name.encode().decode() == name and not {*name} & {*"/\\<>`|&\"'?#%"}
    if text.isascii() and text.replace("_", "").isalnum():
        assert name == text


def test_relative_folders_and_links_have_the_name_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("mine")
    monkeypatch.chdir(tmp_path / "mine")
    names = {run_name(Path(place)) for place in (".", "", "inner/..", "../latest", "../mine/")}
    assert names == {"mine"} and run_name(Path("/")) == "run"


def test_renamed_run_is_called_as_its_folder_everywhere(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "my digits"))
    assert "name" not in read_json(folder / "run.json")["run"] and read_json(folder / "run.json")["run"]["recipe"] == "tiny"
    engine = open_run(folder)
    assert engine.opened.name == "my-digits"
    served = ServedRun(engine, Limits()).describe()
    assert (served["id"], served["recipe"]) == ("my-digits", "tiny")
    page = write_comparison([folder, written], tmp_path / "page.html").read_text()
    assert "<title>Comparison of my-digits and tiny</title>" in page
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "\n# my-digits\n" in card and "The recipe is `tiny`;" in card


def test_exported_run_keeps_its_name(written, tmp_path):
    """In a cache of the hub its folder is called by a hash."""
    for name in (None, "größe-2"):
        folder = export(written, tmp_path / f"{name}", name=name)
        moved = folder.rename(tmp_path / "0123abcd")
        assert describe_run(moved).name == (name or "tiny")
        again = export(moved, tmp_path / "again")
        assert describe_run(again).name == (name or "tiny") and describe_run(again).run.recipe == "tiny"
        shutil.rmtree(moved)
        shutil.rmtree(again)


@pytest.mark.parametrize("name", ["", "two words", "a/b", "-x", "x.", "a\n", "`a`", "../a", normalize("NFD", "größe")])
def test_name_of_more_than_one_word_is_refused(written, tmp_path, name):
    with pytest.raises(ValueError, match="name must be one word of letters, digits"):
        export(written, tmp_path / "out", name=name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("name", "expected"), [
    ("\x1b]0;owned\x07 <script>", "0-owned-script"), (None, ""), (5, ""), (["a"], ""),
])  # fmt: skip
def test_name_in_a_strange_config_is_a_word_or_one_line(exported, tmp_path, name, expected):
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    edit_json(folder / "config.json", name=name)
    if expected:
        assert describe_run(folder).name == expected
        return
    with pytest.raises(OpenError, match="config.json is damaged"):
        describe_run(folder)


def test_recipe_decides_the_folder_and_a_folder_keeps_its_recipe(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, path, *_: runs.append((run.recipe, str(path))) or True)
    Path("my.yaml").write_text("recipe: digits\n")
    for words in (["digits"], ["--config", "my.yaml"], ["digits", "--out", "mine"], [trained]):
        command("train", *words)
    assert runs == [("digits", "runs/digits")] * 2 + [("digits", "mine"), ("digits", str(trained))]
    Path("my.yaml").write_text("name: digits\n")
    assert "my.yaml: unknown field name" in fails(capsys, 2, "train", "digits", "--config", "my.yaml")
    monkeypatch.undo()
    error = fails(capsys, 2, "train", "shapes", "--out", trained, *TINY)
    assert f"{trained} has the recipe digits, not shapes: give another --out" in error


def test_figures_stay_when_a_folder_is_renamed_and_not_when_another_run_is_measured(trained, tmp_path):
    """Recipe, step and size of both runs are equal, as of two seeds."""

    def measure(folder: Path, out: Path, task: str) -> tuple[str, str, set[str]]:
        values = evaluate(open_run(folder), folder, EvaluationConfig(tasks=(task,), count=2), lambda line: None, out)
        return values["run"], values["recipe"], {*values["digits"]}

    first = Path(shutil.copytree(trained, tmp_path / "first"))
    assert measure(first, first, "conditioning") == ("first", "digits", {"conditioning"})
    second = first.rename(tmp_path / "second")
    assert measure(second, second, "drawings") == ("second", "digits", {"conditioning", "drawings"})
    third = Path(shutil.copytree(trained, tmp_path / "third"))
    assert measure(third, second, "drawings") == ("third", "digits", {"drawings"})
    assert repeat(open_run(second), second, second / "results.json", print_line=lambda line: None)[0] == []
