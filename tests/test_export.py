"""Exported runs: the same output as the run's folder, complete or absent, data only, and their model cards."""

import json
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoTokenizer

import transfusion
from tests.test_cli import command, fails
from transfusion.checkpoint import export as export_module
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.codecs.text import Tokenizer
from transfusion.disk import OpenError
from transfusion.inference.answer import Answer, Answers
from transfusion.inference.engine import Request, open_run
from transfusion.model.transfusion import Transfusion
from transfusion.model.weights import Weights
from transfusion.sequence import Document, Row, Text, collate, encode_document

REQUESTS = [Request(("three",), num_images=2, seed=1), Request(("a",), seed=2), Request(num_images=1, seed=3)]


@pytest.fixture(scope="module")
def run(written) -> Path:
    return written


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def answers_of(source, weights: str = "ema") -> list[list]:
    """The parts and the finish reason of each answer."""
    return [[(*answer.parts, answer.reason) for answer in answers]
            for answers in open_run(source, weights).generate(REQUESTS)]  # fmt: skip


def same(actual: list[list], expected: list[list]) -> bool:
    parts = [[part for answers in side for answer in answers for part in answer] for side in (actual, expected)]
    return len(parts[0]) == len(parts[1]) and all(map(np.array_equal, *parts))


def edit_json(path: Path, **values) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The same as the run


def test_exported_run_gives_the_same_answers(run, exported):
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


def test_raw_weights_are_exported_on_request(run, exported, tmp_path):
    out = export(run, tmp_path / "raw", "raw")
    expected = answers_of(run, "raw")
    assert same(answers_of(out), expected)
    assert same(answers_of(out, "raw"), expected)
    with pytest.raises(OpenError, match="--weights raw"):
        open_run(exported, "raw")


def test_exported_folder_has_the_expected_files_and_config(run, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "codec.safetensors",
                     "tokenizer_config.json", "README.md"}  # fmt: skip
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Transfusion"], "transfusion")
    assert config["weights"]["step"] == open_checkpoint(exported).step == 7
    generation = json.loads((run / "run.json").read_text())["run"]["generation"]
    assert json.loads((exported / "generation_config.json").read_text()) == generation
    assert open_checkpoint(exported).run == open_checkpoint(run).run


@pytest.mark.parametrize("text", ["a three \u20ac", "<|bos|> x <|eos|>", " ", "\n\n a", "<|pad|>"])
def test_transformers_tokenizes_as_training_did(exported, text):
    transformers_tokenizer, opened = AutoTokenizer.from_pretrained(exported), open_checkpoint(exported)
    ids = transformers_tokenizer(text, add_special_tokens=False).input_ids
    assert tuple(ids) == opened.tokenizer.encode(text) and transformers_tokenizer.decode(ids) == text
    for marker in ("bos", "eos", "pad"):
        assert getattr(transformers_tokenizer, f"{marker}_token_id") == getattr(opened.vocabulary, marker)


def test_the_tokenizer_of_an_exported_run_can_be_used_again(exported):
    tokenizer = Tokenizer.from_file(exported / "tokenizer.json")
    assert tokenizer.markers == {} and tokenizer.size == open_checkpoint(exported).vocabulary.num_text_tokens


def test_generation_defaults_can_be_edited(copy):
    edit_json(copy / "generation_config.json", steps=2, guidance_scale=1.0)
    assert open_run(copy).run.generation.steps == 2
    edit_json(copy / "generation_config.json", steps=0)
    with pytest.raises(OpenError, match="steps must be at least 1"):
        open_run(copy)


def test_paths_on_this_machine_are_not_exported(run, tmp_path):
    home = shutil.copytree(run, tmp_path / "run")
    values = json.loads((home / "run.json").read_text())
    values["run"]["data"] |= {"prepared": ["/home/me/secret"], "sources": ["photos"]}
    start = {"kind": "run", "place": "/home/me/secret/base", "name": "base", "step": 3}
    edit_json(home / "run.json", run=values["run"], notes={"start": start})
    out = export(home, tmp_path / "out")
    assert "It began from base." in (out / "README.md").read_text()
    assert not any(b"secret" in path.read_bytes() for path in out.iterdir())
    assert "photos (100% of the positions)" in (out / "README.md").read_text()


def test_model_card_has_the_results(run, tmp_path):
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


def test_model_card_has_metadata_and_sections(run, tmp_path):
    """The hub reads the header."""
    home = shutil.copytree(run, tmp_path / "run")
    start = {"kind": "llama", "place": "/models/base", "name": "base", "step": None}
    edit_json(home / "run.json", notes={"start": start})
    card = huggingface_hub.ModelCard((export(home, tmp_path / "out") / "README.md").read_text())
    header = card.data.to_dict()
    assert (header["license"], header["library_name"], header["pipeline_tag"]) == ("unknown", "transfusion", "any-to-any")
    assert card.data.tags == ["transfusion", "text-to-image", "image-to-text"]
    sections = dict(section.split("\n\n", 1) for section in card.text.split("\n## ")[1:])
    assert list(sections) == ["How to use it", "Intended use", "Limitations", "Training data", "Licence", "Results"]
    opened = open_checkpoint(run)
    assert f"{opened.step:,} steps and has {opened.parameters:,} parameters" in sections["Limitations"]
    assert "no safety training and no filter" in sections["Limitations"]
    assert "It began from base." in sections["Training data"]
    assert "it depends on the training data and on the licence of base" in sections["Licence"]


def test_model_card_has_the_licence_and_the_text_about_the_model(run, tmp_path, capsys):
    text = "Draws digits in one style.\n\n## Sources\n\n| digits | CC BY 4.0 |\n"
    (tmp_path / "about.md").write_text(f"\n{text}\n")
    options = "--license", "cc-by-sa-4.0", "--about", tmp_path / "about.md", "--name", "numbers"
    command("export", run, "--out", tmp_path / "out", *options)
    card = huggingface_hub.ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.to_dict()["license"] == "cc-by-sa-4.0"
    assert "\n# numbers\n" in card.text and open_run(tmp_path / "out").opened.name == "numbers"
    assert f"moving average (EMA).\n\n{text}\n## How to use it\n" in card.text
    assert "## Licence\n\nThe weights are licensed under `cc-by-sa-4.0`.\n\n## Results" in card.text
    for wrong in ("CC BY", "x\ntags: []", ""):
        error = fails(capsys, 1, "export", run, "--out", tmp_path / "new", "--license", wrong)
        assert "license must be as the hub names it, such as apache-2.0 or cc-by-sa-4.0, not " in error
    assert "name must be one word" in fails(capsys, 1, "export", run, "--out", tmp_path / "new", "--name", "a b")
    assert "there is no" in fails(capsys, 1, "export", run, "--out", tmp_path / "new", "--about", tmp_path / "nowhere")
    (tmp_path / "about.md").write_bytes(b"\xff")
    assert "is not a text file in UTF-8" in fails(capsys, 1, "export", run, "--out", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


# Complete or absent


def test_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export_module, "write_card", disk_full)
    with pytest.raises(OSError, match="no space left"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_not_changed(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "codec.safetensors", "tokenizer.json"])
def test_flipped_bit_is_detected(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(OpenError, match=f"{name} was changed since"):
        open_run(copy)


def test_incomplete_or_changed_folder_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    with pytest.raises(OpenError, match="contains other.safetensors, which its config.json does not list"):
        open_run(copy)
    (copy / "other.safetensors").unlink()
    with pytest.raises(OpenError, match="model.safetensors is missing"):
        open_run(copy)
    config = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", weights=config["weights"] | {"sha256": {"../x.safetensors": "0"}})
    with pytest.raises(OpenError, match="is outside"):
        open_run(copy)
    edit_json(copy / "config.json", weights=[])
    with pytest.raises(OpenError, match="has no valid field weights"):
        open_run(copy)
    config["run"]["model"]["layers"] = 1
    edit_json(copy / "config.json", run=config["run"])
    with pytest.raises(OpenError, match="no longer match the weights"):
        open_run(copy)
    edit_json(copy / "config.json", model_type="llama")
    with pytest.raises(OpenError, match="of type llama, not transfusion"):
        open_run(copy)


@pytest.mark.parametrize(("file", "words"), [
    ("../../x.safetensors", "has no valid weight_map"), (7, "has no valid weight_map"), (["a"], "has no valid weight_map"),
    ("config.json", "cannot read .*config.json"), ("nowhere.safetensors", "cannot read .*nowhere.safetensors"),
    ("another", "has no tensor tokens.weight, which model.safetensors.index.json names"),
])  # fmt: skip
def test_index_that_names_a_wrong_file_is_one_line(run, tmp_path, file, words):
    out = export(run, tmp_path / "out", shard=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    another = next(name for name in index["weight_map"].values() if name != index["weight_map"]["tokens.weight"])
    index["weight_map"] |= {"tokens.weight": another if file == "another" else file}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OpenError, match=words):
        Transfusion.from_pretrained(out)
    with pytest.raises(OpenError, match=words):
        Weights(out).read("tokens.weight")


# The hub


def test_hub_download_fetches_only_json_and_safetensors(exported, tmp_path, monkeypatch):
    downloads = []

    def download(name, **options):
        downloads.append((name, options))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    files = {"allow_patterns": ["*.json", "*.safetensors"]}
    assert same(answers_of("owner/name"), answers_of(exported))
    for opening in (open_run, Transfusion.from_pretrained):
        opening("owner/name", revision="v1.0", local_files_only=True)
    default = ("owner/name", files | {"revision": None, "local_files_only": False})
    assert downloads == [default, *[("owner/name", files | {"revision": "v1.0", "local_files_only": True})] * 2]
    shutil.copytree(exported, tmp_path / "owner" / "name")
    open_run("owner/name")  # an existing folder is never looked up on the hub
    with pytest.raises(OpenError, match="is not a run: there is no such folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(OpenError, match="owner/name is not on the hub, so it has no revision v1.0"):
        open_run("owner/name", revision="v1.0")
    assert len(downloads) == 3


@pytest.mark.parametrize(("error", "words"), [
    (errors.GatedRepoError("403 Client Error.\n\nmore", response=mock.Mock(headers={})),
     "the hub gives access only to users whom its owner accepted (then hf auth login)"),
    (errors.RepositoryNotFoundError("401 Client Error. (Request ID: x)", response=mock.Mock(headers={})),
     "the hub has no such repository, or it is private (then hf auth login)"),
    (errors.RevisionNotFoundError("404 Client Error. (Request ID: x)", response=mock.Mock(headers={})),
     "the repository has no revision v9"),
    (errors.LocalEntryNotFoundError("Got: ConnectError\nmore"),
     "it is not in the hub's local cache, and the hub cannot be reached"),
    (OSError("disk full\nmore"), "the hub says: disk full"), (RuntimeError(), "the hub says: RuntimeError"),
])  # fmt: skip
def test_every_failure_of_the_hub_is_one_line(tmp_path, monkeypatch, error, words):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))
    monkeypatch.chdir(tmp_path)
    for opening in (open_run, Transfusion.from_pretrained):
        with pytest.raises(OpenError) as caught:
            opening("owner/name", revision="v9")
        assert str(caught.value) == f"owner/name is not a run: there is no such folder, and {words}"


def test_name_that_is_not_in_the_cache_is_one_line(tmp_path, monkeypatch):
    """The hub's own client, without network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenError, match="and it is not in the hub's local cache$"):
        Transfusion.from_pretrained("owner-of-nothing/name", local_files_only=True)


# The network without tokenizer and codec


def test_network_is_saved_and_loaded(run, exported, tmp_path):
    model = Transfusion.from_pretrained(exported)
    expected = open_checkpoint(run).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = transfusion.Transfusion.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    with pytest.raises(OpenError, match="a network without tokenizer and codec"):
        open_run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", torch.float64, None])
def test_network_is_loaded_in_the_given_dtype(exported, tmp_path, dtype):
    """Default float32, also from a file with another dtype; the predictions of all agree."""
    expected = Transfusion.from_pretrained(exported)
    expected.bfloat16().save_pretrained(tmp_path)
    expected.float()  # rounded to bfloat16
    model = Transfusion.from_pretrained(tmp_path, dtype=dtype, device=torch.device("cpu"))
    weights_dtype = {"float16": torch.float16, None: torch.float32}.get(dtype, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {weights_dtype}
    chunk = encode_document(Document((Text((1, 2, 3)),)), open_run(exported).vocabulary)
    batch = collate([Row((chunk,))], len(chunk), open_run(exported).vocabulary)
    with torch.no_grad():
        logits, true = (network(batch, [], []).logits.double() for network in (model, expected))
    assert true.std() > 0.1
    torch.testing.assert_close(logits, true, rtol=0, atol=max(1e-5, 30 * torch.finfo(weights_dtype).eps))


@pytest.mark.parametrize("dtype", ["auto", "int8", "nn", torch.int64, 16])
def test_other_dtypes_are_refused(exported, dtype):
    with pytest.raises(ValueError, match="dtype must be a floating one, such as torch.bfloat16 or 'bfloat16', not "):
        Transfusion.from_pretrained(exported, dtype=dtype)


def test_folder_of_a_trained_run_gets_a_hint(run, tmp_path):
    with pytest.raises(OpenError, match="is a run with checkpoints: open it with transfusion.open_run"):
        Transfusion.from_pretrained(run)
    with pytest.raises(OpenError, match="cannot read .*nowhere/config.json"):
        Transfusion.from_pretrained(tmp_path / "nowhere")


def test_network_is_pushed_to_the_hub(exported, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, name, private, exist_ok):
            pushed["created"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path):
            pushed[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Transfusion.from_pretrained(exported).push_to_hub("owner/name", private=True)
    assert pushed == {"created": ("owner/name", True, True), "owner/name": ["config.json", "model.safetensors"]}


# Commands and notebooks


def test_export_and_generate_commands(run, tmp_path, capsys):
    command("export", run, "--out", tmp_path / "out")
    assert "hf upload" in capsys.readouterr().err
    for name, source in (("a", run), ("b", tmp_path / "out")):
        command("generate", source, "three", "--num-images", 1, "--seed", 5, "--out", tmp_path / name)
    a, b = (json.loads((tmp_path / name / "output.json").read_text())["calls"][0]["answers"] for name in "ab")
    assert a == b
    assert (tmp_path / "a" / "000.png").read_bytes() == (tmp_path / "b" / "000.png").read_bytes()
    assert "is there already" in fails(capsys, 1, "export", run, "--out", tmp_path / "out")
    assert "is not a run" in fails(capsys, 1, "export", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert "--out" in fails(capsys, 2, "export", run)


def test_notebook_shows_images_and_escaped_text(run):
    (answers,) = transfusion.open_run(run).generate([transfusion.Request(num_images=2)])
    assert isinstance(answers, Answers)
    assert answers._repr_html_().count("<img src=\"data:image/png;base64,") == 2
    html = Answer(["<b>not bold</b>", np.zeros((4, 4, 3), np.uint8)])._repr_html_()
    assert "&lt;b&gt;not bold&lt;/b&gt;" in html
    assert html.count("<img") == 1


def test_other_folders_are_not_changed_and_files_have_the_usual_permissions(run, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("kept")
    export(run, tmp_path / "out")
    assert (tmp_path / "out.tmp" / "mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tmp"}
    (tmp_path / "plain").touch()
    usual_mode = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()} == {usual_mode}


def test_exported_run_of_another_version_is_refused_with_its_version(copy, tmp_path, capsys):
    values = json.loads((copy / "config.json").read_text())
    model = values["run"]["model"]
    model["hidden"] = model.pop("intermediate_size")  # a field of 0.1.0
    edit_json(copy / "config.json", format=1, versions={"transfusion": "0.1.0"}, run=values["run"])
    message = "has format 1, written by transfusion 0.1.0; this version reads format 3"
    for opening in (open_run, Transfusion.from_pretrained):
        with pytest.raises(OpenError, match=message):
            opening(copy)
    assert message in fails(capsys, 1, "train", "digits", "--from", copy, "--out", tmp_path / "run")
    assert message in fails(capsys, 1, "data", "prepare", "digits", "--like", copy, "--out", tmp_path / "data")
