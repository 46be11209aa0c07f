"""Models in the package: found by their names, never written to, complete, and small enough for the repository."""

import shutil
import tomllib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import transfusion
from experiments.emoji.packages import PACKAGES
from tests.serving import serving
from tests.sources import write_photos
from tests.test_cli import TINY_TRAINING, command, fails
from tests.test_export import edit_json
from transfusion import disk
from transfusion.checkpoint.export import export
from transfusion.disk import MODELS, OpenError, find_folder, packaged_models, read_json
from transfusion.inference.engine import open_run
from transfusion.model.transfusion import Transfusion

PACKAGE = Path(transfusion.__file__).parent
MAX_BYTES = 8_000_000  # of one model


@pytest.fixture(scope="session")
def made_model(made_once, written) -> Path:
    """The run of `written`, exported as the model `emoji`."""
    options = {"name": "emoji", "dtype": "float16", "license": "cc-by-sa-4.0"}
    return made_once("packaged", lambda folder: export(written, folder / "emoji", **options))


@pytest.fixture
def models(made_model, tmp_path, monkeypatch) -> Path:
    """The folder of the package's models with a stand-in, `emoji`. The working directory is a new folder."""
    copy = Path(shutil.copytree(made_model, tmp_path / "package" / "models"))
    monkeypatch.setattr(disk, "MODELS", copy)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return copy


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Found by name


def test_commands_find_a_model_by_its_name_and_do_not_change_it(models, capsys):
    before = contents(models)
    command("generate", "emoji", "three", "--num-images", 1, "--out", "drawn")
    command("evaluate", "emoji", "--tasks", "conditioning", "--count", 2)
    assert "conditioning" in read_json(Path("out/emoji/results.json"))["digits"]
    command("export", "emoji", "--out", "exported")
    command("generate", "exported", "three", "--num-images", 1, "--out", "again")
    assert Path("drawn/000.png").read_bytes() == Path("again/000.png").read_bytes()
    assert read_json(Path("drawn/output.json"))["calls"][0]["run"] == "emoji"
    assert "emoji is an exported run, without the losses of training" in fails(capsys, 1, "report", "emoji")
    assert contents(models) == before


def test_results_are_written_where_out_says_and_can_be_repeated(models, capsys):
    command("evaluate", "emoji", "--tasks", "conditioning", "--count", 2, "--out", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["results.json"] and not Path("out").exists()
    command("evaluate", "emoji", "--from", "mine/results.json")
    assert "all figures agree" in capsys.readouterr().err
    command("evaluate", "emoji", "--tasks", "captions", "--count", 2, "--out", "mine")
    assert set(read_json(Path("mine/results.json"))["digits"]) == {"conditioning", "captions"}  # earlier figures are kept
    assert "name nothing else" in fails(capsys, 2, "evaluate", "emoji", "--from", "mine/results.json", "--out", "other")
    shutil.copytree(models / "emoji", "local")
    command("evaluate", "local", "--tasks", "conditioning", "--count", 2)
    local, mine = (read_json(Path(folder) / "results.json")["digits"]["conditioning"] for folder in ("local", "mine"))
    assert local == mine


def test_model_on_the_hub_is_measured_too(models, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(models / "emoji"))
    before = contents(models)
    command("evaluate", "owner/name", "--tasks", "conditioning", "--count", 2)
    assert Path("out/owner/name/results.json").exists() and contents(models) == before


def test_training_and_data_start_from_a_model(models):
    write_photos(Path("photos"), 40)
    command("data", "prepare", "photos", "--like", "emoji", "--out", "data")
    model = "--model.width 32 --model.layers 2 --model.heads 2 --model.intermediate-size 48 --model.no-qk-norm".split()
    train = "train", "small", "--data", "data", "--from", "emoji", "--out", "run", *model, *TINY_TRAINING
    command(*train)
    command(*train)  # the same start
    notes = read_json(Path("run/run.json"))["notes"]["start"]
    assert (notes["place"], notes["name"], notes["step"]) == ("emoji", "emoji", 7)


def test_api_opens_and_serves_a_model(models, monkeypatch):
    engine = open_run("emoji")
    with serving(engine) as server, server.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["emoji"]
        body = {"model": "emoji", "prompt": "three", "n": 1, "seed": 0}
        assert client.post("/v1/images/generations", json=body).status_code == 200
    network = Transfusion.from_pretrained("emoji").state_dict()
    assert all(np.array_equal(value, network[name]) for name, value in engine.model.state_dict().items())
    opened = []
    monkeypatch.setattr("transfusion.inference.engine.open_run", lambda *place: opened.append(place[0]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("serve", "emoji")
    assert opened == [models / "emoji"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_local_path_wins(models, written, capsys, kind):
    if kind == "folder":
        shutil.copytree(written, "emoji")
        edit_json(Path("emoji/run.json"), run=read_json(Path("emoji/run.json"))["run"] | {"recipe": "mine"})
        assert open_run("emoji").run.recipe == "mine"
        shutil.rmtree("emoji")
        Path("emoji").mkdir()
    else:
        Path("emoji").touch()
    assert find_folder("emoji") == Path("emoji")
    expected = "emoji is not a run: it has no run.json (in another folder, emoji is the model in the package)"
    assert expected in fails(capsys, 1, "generate", "emoji", "three")


def test_unknown_name_lists_the_models(models, capsys):
    message = "emojy is not a run: there is no such folder (models in the package: emoji; a name on the hub is owner/name)"
    for words in ("generate emojy three", "serve emojy", "evaluate emojy", "train digits --from emojy", "report emojy"):
        assert message in fails(capsys, 1, *words.split())
    for name in ("", ".", "..", "../models/emoji", "Emoji", "./emoji"):
        assert find_folder(name) == Path(name)  # only the name itself
    with pytest.raises(OpenError, match="emoji is not on the hub, so it has no revision v1.0: leave it out"):
        open_run("emoji", revision="v1.0")
    command("--help")
    assert "Trained models in the package, for generate, serve and others: emoji." in capsys.readouterr().out
    shutil.rmtree(models)
    assert "(models in the package: none;" in fails(capsys, 1, "generate", "emoji", "three")


def test_tasks_without_their_data_are_one_line(models, written, tmp_path, capsys):
    """A run on prepared data, like the real model: its data are not in the package."""
    values = read_json(models / "emoji" / "config.json")
    edit_json(models / "emoji" / "config.json", notes=values["notes"] | {"prepared": "0" * 64})
    error = fails(capsys, 1, "evaluate", "emoji")
    assert "the training data of this run are not included in it: give them, or similar ones, with --data" in error
    assert "not prepared data" in fails(capsys, 1, "evaluate", "emoji", "--data", tmp_path)
    assert not Path("out").exists()


# What is in the package


def problems(folder: Path) -> list[str]:
    """What a model in the package lacks."""
    engine, card = open_run(folder), huggingface_hub.ModelCard((folder / "README.md").read_text())
    size = sum(path.stat().st_size for path in folder.iterdir())
    rules = {
        "its run is called like its folder, which is its name in the API": engine.opened.name == folder.name,
        "its weights are float16": read_json(folder / "config.json")["dtype"] == "float16",
        f"it has at most {MAX_BYTES} bytes": size <= MAX_BYTES,
        "its card has a licence": card.data.to_dict()["license"] != "unknown",
        "it has no folders and no results": all(path.is_file() and path.name != "results.json" for path in folder.iterdir()),
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_models_of_the_package_are_complete_and_small():
    assert {name: problems(MODELS / name) for name in packaged_models() if problems(MODELS / name)} == {}


@pytest.mark.parametrize("damage", ["name", "dtype", "size", "card", "results"])
def test_incomplete_model_is_found(models, written, damage):
    folder = models / "emoji"
    assert problems(folder) == []
    match damage:
        case "name":
            folder = folder.rename(models / "other")
        case "dtype":
            shutil.rmtree(folder)
            export(written, folder, name="emoji", license="cc-by-sa-4.0")
        case "size":
            (folder / "notes.txt").write_bytes(bytes(MAX_BYTES))
        case "card":
            card = folder / "README.md"
            card.write_text(card.read_text().replace("license: cc-by-sa-4.0", "license: unknown"))
        case "results":
            (folder / "results.json").write_text("{}")
    assert len(problems(folder)) == 1


@pytest.mark.parametrize("name", ["NOTICE", "experiments/emoji/about.md"])
def test_sources_of_emoji_are_named_with_their_versions(name):
    text = (PACKAGE.parent / name).read_text()
    assert [package.name for package in PACKAGES.values() if f"{package.name} {package.version}" not in text] == []


def test_installed_package_has_all_files():
    """package-data in pyproject.toml matches every file that is not code."""
    patterns = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    included = {path for pattern in patterns["transfusion"] for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files and files <= included
    assert any(Path("models/emoji/config.json").match(pattern) for pattern in patterns["transfusion"])
