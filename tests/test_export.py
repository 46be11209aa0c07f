"""An exported run: the same drawings and text as the run's own folder, whole or not there, and nothing in it but data."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import transfusion
from tests.test_cli import command, fails
from transfusion.checkpoint import export as module
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.disk import OpenError
from transfusion.inference.answer import Answer, Answers
from transfusion.inference.engine import Request, open_run
from transfusion.model.transfusion import Transfusion

REQUESTS = [Request(("three",), num_images=2, seed=1), Request(("a",), seed=2), Request(num_images=1, seed=3)]


@pytest.fixture(scope="module")
def run(written) -> Path:
    return written


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """One that may be spoiled."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def answers_of(place, weights: str = "ema") -> list[list]:
    """What it writes and draws, parts and reasons."""
    found = open_run(place, weights).generate(REQUESTS)
    return [[(*answer.parts, answer.reason) for answer in answers] for answers in found]


def same(one: list[list], other: list[list]) -> bool:
    parts = [[part for answers in side for answer in answers for part in answer] for side in (one, other)]
    return len(parts[0]) == len(parts[1]) and all(map(np.array_equal, *parts))


def spoil(path: Path, **values) -> None:
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The same as the run


def test_it_writes_and_draws_what_the_run_does(run, exported):
    expected = answers_of(run)
    assert any(isinstance(part, str) for part in expected[1][0][:-1])
    assert same(answers_of(exported), expected)
    assert not same(answers_of(run, "raw"), expected)  # the comparison can fail


def test_many_small_files_are_one_model(run, tmp_path):
    out = export(run, tmp_path / "deep" / "out", shard=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in out.glob("model*.safetensors")} == set(index.values())
    assert len(set(index.values())) > 2
    assert same(answers_of(out), answers_of(run))


def test_raw_weights_are_exported_when_they_are_asked_for(run, exported, tmp_path):
    out = export(run, tmp_path / "raw", "raw")
    expected = answers_of(run, "raw")
    assert same(answers_of(out), expected)
    assert same(answers_of(out, "raw"), expected)
    with pytest.raises(OpenError, match="--weights raw"):
        open_run(exported, "raw")


def test_it_says_what_it_is(run, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "codec.safetensors",
                     "README.md"}  # fmt: skip
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Transfusion"], "transfusion")
    assert config["weights"]["step"] == open_checkpoint(exported).step == 7
    generation = json.loads((run / "run.json").read_text())["run"]["generation"]
    assert json.loads((exported / "generation_config.json").read_text()) == generation
    assert open_checkpoint(exported).run == open_checkpoint(run).run


def test_generation_defaults_may_be_edited(copied):
    spoil(copied / "generation_config.json", steps=2, guidance_scale=1.0)
    assert open_run(copied).run.generation.steps == 2
    spoil(copied / "generation_config.json", steps=0)
    with pytest.raises(OpenError, match="steps must be at least 1"):
        open_run(copied)


def test_where_data_lie_on_this_machine_stays_at_home(run, tmp_path):
    home = shutil.copytree(run, tmp_path / "run")
    values = json.loads((home / "run.json").read_text())
    values["run"]["data"] |= {"prepared": ["/home/me/secret"], "sources": ["photos"]}
    start = {"kind": "run", "place": "/home/me/secret/base", "name": "base", "step": 3}
    spoil(home / "run.json", run=values["run"], notes={"start": start})
    out = export(home, tmp_path / "out")
    assert "It began from base." in (out / "README.md").read_text()
    assert not any(b"secret" in path.read_bytes() for path in out.iterdir())
    assert "photos (100% of the positions)" in (out / "README.md").read_text()


def test_the_card_has_the_figures(run, tmp_path):
    assert "has not been measured" in (export(run, tmp_path / "before") / "README.md").read_text()
    home = shutil.copytree(run, tmp_path / "run")
    results = {"step": 7, "digits": {"captions": {"exact": 0.9697, "documents": 2970}}, "manifest": [{"torch": "9.9"}]}
    (home / "results.json").write_text(json.dumps(results))
    card = (export(home, tmp_path / "after") / "README.md").read_text()
    assert "| digits captions exact | 0.9697 |" in card
    assert "| digits captions documents | 2,970 |" in card
    assert '"torch": "9.9"' in card
    assert "| manifest" not in card
    assert card.startswith("---\nlibrary_name: transfusion\n")


# Whole, or not there


def test_nothing_is_left_of_one_that_failed(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_card", full)
    with pytest.raises(OSError, match="no space left"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "codec.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_found(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(OpenError, match=f"{name} was changed since"):
        open_run(copied)


def test_what_is_not_whole_is_refused(copied):
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    with pytest.raises(OpenError, match="holds other.safetensors, which its config.json does not name"):
        open_run(copied)
    (copied / "other.safetensors").unlink()
    with pytest.raises(OpenError, match="model.safetensors is missing"):
        open_run(copied)
    config = json.loads((copied / "config.json").read_text())
    spoil(copied / "config.json", weights=config["weights"] | {"sha256": {"../x.safetensors": "0"}})
    with pytest.raises(OpenError, match="lies outside"):
        open_run(copied)
    spoil(copied / "config.json", weights=[])
    with pytest.raises(OpenError, match="does not say what weights"):
        open_run(copied)
    config["run"]["model"]["layers"] = 1
    spoil(copied / "config.json", run=config["run"])
    with pytest.raises(OpenError, match="no longer those of its weights"):
        open_run(copied)
    spoil(copied / "config.json", model_type="llama")
    with pytest.raises(OpenError, match="of type llama, not transfusion"):
        open_run(copied)


def test_an_index_cannot_point_elsewhere(run, tmp_path):
    out = export(run, tmp_path / "out", shard=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"tokens.weight": "../../x.safetensors"}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OpenError, match="has no valid weight_map"):
        Transfusion.from_pretrained(out)


# The hub


def test_a_name_on_the_hub_is_fetched_without_anything_that_could_run(exported, tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "owner/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all")
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert same(answers_of("owner/name"), answers_of(exported))
    assert asked == [("owner/name", ["*.json", "*.safetensors"])]
    with pytest.raises(OpenError, match="there is no such folder, and the hub says: no network$"):
        open_run("owner/other")
    before = len(asked)
    shutil.copytree(exported, tmp_path / "owner" / "name")
    open_run("owner/name")  # what is on this disk is never taken for a name on the hub
    with pytest.raises(OpenError, match="is not a run"):
        open_run(tmp_path / "nowhere")
    assert len(asked) == before


# The network alone


def test_the_network_alone(run, exported, tmp_path):
    model = Transfusion.from_pretrained(exported)
    expected = open_checkpoint(run).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = transfusion.Transfusion.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    with pytest.raises(OpenError, match="a network alone"):
        open_run(tmp_path)


def test_the_network_is_pushed_as_it_is_saved(exported, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, name, private, exist_ok):
            sent["made"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path):
            sent[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Transfusion.from_pretrained(exported).push_to_hub("owner/name", private=True)
    assert sent == {"made": ("owner/name", True, True), "owner/name": ["config.json", "model.safetensors"]}


# What a person types and sees


def test_export_and_generate_from_the_command_line(run, tmp_path, capsys):
    command("export", run, "--out", tmp_path / "out")
    assert "hf upload" in capsys.readouterr().err
    for name, place in (("a", run), ("b", tmp_path / "out")):
        command("generate", place, "three", "--num-images", 1, "--seed", 5, "--out", tmp_path / name)
    a, b = (json.loads((tmp_path / name / "output.json").read_text())["answers"] for name in "ab")
    assert a == b
    assert (tmp_path / "a" / "000.png").read_bytes() == (tmp_path / "b" / "000.png").read_bytes()
    assert "is there already" in fails(capsys, 1, "export", run, "--out", tmp_path / "out")
    assert "is not a run" in fails(capsys, 1, "export", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert "--out" in fails(capsys, 2, "export", run)


def test_a_notebook_shows_pictures_and_plain_text(run):
    (answers,) = transfusion.open_run(run).generate([transfusion.Request(num_images=2)])
    assert isinstance(answers, Answers)
    assert answers._repr_html_().count("<img src=\"data:image/png;base64,") == 2
    shown = Answer(["<b>not bold</b>", np.zeros((4, 4, 3), np.uint8)])._repr_html_()
    assert "&lt;b&gt;not bold&lt;/b&gt;" in shown
    assert shown.count("<img") == 1


def test_what_lies_beside_the_new_folder_is_left_alone_and_others_may_read_it(run, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("kept")
    export(run, tmp_path / "out")
    assert (tmp_path / "out.tmp" / "mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tmp"}
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()} == {usual}
