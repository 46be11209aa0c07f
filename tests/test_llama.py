"""Promise 11: a run begins from a language model or from another run, and goes on like any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import few, with_all_logits
from tests.llama import SPECIAL, write_llama
from tests.sources import write_photos
from tests.test_cli import TINY, command, fails
from tests.test_model import decoders, run, sizes_of
from tests.test_parallel import weights_of
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.start import LlamaStart
from transfusion.codecs.text import Tokenizer
from transfusion.config import ModelConfig
from transfusion.disk import read_json
from transfusion.model.transfusion import Transfusion, build, build_uninitialized
from transfusion.parallel import SINGLE_PROCESS
from transfusion.sequence import Document, Row, Text, Vocabulary, collate, encode_document

SHAPES = ((4, 4),)
FAST = [*TINY, *"--data.sources digits --data.mixture-weights 1 --training.preview-every 0".split()]
STILL = "--training.learning-rate 0 --training.min-learning-rate 0".split()  # a run that learns nothing


def begun(folder: Path, seed: int = 0) -> tuple[LlamaStart, Vocabulary, Transfusion]:
    """What a run begins with."""
    start = LlamaStart(str(folder))
    vocabulary = Vocabulary.build(start.tokenizer.size, SHAPES, 2, **start.tokenizer.markers)
    other = ModelConfig(vocab_size=vocabulary.size, latent_channels=3, qk_norm=True, post_norm=True)
    model = build_uninitialized(start.model(other))
    start.fill(model, seed, SINGLE_PROCESS)
    return start, vocabulary, model


@few
@given(decoders(), st.sampled_from((262, 300, 400)), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_its_logits_are_those_of_transformers(config, rows, sharded, is_old, seed):
    """Grouped keys, tied or not, stretched or not, in one file or several, in the words of transformers 4 or 5."""
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs = write_llama(folder, config, rows, "20KB" if sharded else "5GB")
        assert (folder / "model.safetensors").exists() != sharded
        if is_old:
            about = json.loads((folder / "config.json").read_text())
            rope = about.pop("rope_parameters")
            about |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if config.rope_scaling is None else rope}
            (folder / "config.json").write_text(json.dumps(about))
        _, vocabulary, model = begun(folder)
        assert sizes_of(replace(model.config, vocab_size=rows)) == sizes_of(replace(config, vocab_size=rows))
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(256, (50,), generator=generator).tolist()
        chunk = encode_document(Document((Text(tuple(tokens)),)), vocabulary, ends=False)
        batch = with_all_logits(collate([Row((chunk,))], len(chunk), vocabulary))
        ours = run(model, batch, [], []).logits
        with torch.no_grad():
            expected = theirs(torch.from_numpy(chunk.tokens)[None]).logits[0]
        assert expected.std() > 0.1  # logits that say something
        n = vocabulary.num_text_tokens
        torch.testing.assert_close(ours[:, :n], expected[:, :n], rtol=0, atol=1e-4)


def test_what_it_has_not_begins_as_in_any_run(tmp_path):
    """Rows of new ids, and patches: by the seed and the parameter's name."""
    write_llama(tmp_path / "llama")
    start, vocabulary, model = begun(tmp_path / "llama", seed=5)
    fresh = build(model.config, 5)
    assert vocabulary.size > start.tokenizer.size == 262
    for name, parameter in model.named_parameters():
        expected = fresh.get_parameter(name)
        if name in ("tokens.weight", "head.weight"):
            assert torch.equal(parameter[262:], expected[262:])
            assert not torch.equal(parameter[:262], expected[:262])
        else:
            assert torch.equal(parameter, expected) == name.startswith("patches.")


def test_its_special_tokens_are_used_and_cannot_be_typed(tmp_path):
    write_llama(tmp_path / "llama")
    start, vocabulary, _ = begun(tmp_path / "llama")
    assert (vocabulary.bos, vocabulary.eos) == (260, 261)
    assert min(vocabulary.pad, vocabulary.eoi, *vocabulary.boi.values()) >= 262
    typed = start.tokenizer.encode("".join(SPECIAL))
    assert max(typed) < 260
    assert start.tokenizer.decode(typed) == "".join(SPECIAL)


def test_half_precision_is_read(tmp_path):
    theirs = write_llama(tmp_path / "llama")
    theirs.half().save_pretrained(tmp_path / "llama")
    _, _, model = begun(tmp_path / "llama")
    expected = theirs.model.layers[1].mlp.up_proj.weight
    assert model.transformer.blocks[1].feed_forward.up.weight.dtype == torch.float32
    assert torch.equal(model.transformer.blocks[1].feed_forward.up.weight, expected.float())


@pytest.mark.parametrize(("changed", "words"), [
    ({"model_type": "gpt2"}, "of type gpt2, and it must be llama"),
    ({"attention_bias": True}, "a bias in attention"), ({"mlp_bias": True}, "a bias in its MLP"),
    ({"hidden_act": "gelu"}, "the activation gelu"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type yarn"),
    ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions of type linear"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
    ({"quantization_config": {"bits": 4}}, "quantised weights"), ({"hidden_size": ...}, "'hidden_size' is missing"),
    ({"hidden_size": 64}, "embed_tokens.weight is (300, 32), and its config.json and tokenizer say (300, 64)"),
    ({"num_hidden_layers": 1}, "which a Llama has not"), ({"num_hidden_layers": 3}, "lacks model.layers.2"),
    ({"num_key_value_heads": 3}, "not a multiple"), ({"num_attention_heads": "four"}, "cannot be used"),
])  # fmt: skip
def test_what_cannot_be_begun_from(tmp_path, capsys, changed, words):
    write_llama(tmp_path / "llama", **changed)
    said = fails(capsys, 1, "train", "digits", "--init-from", tmp_path / "llama", "--out", tmp_path / "run", *FAST)
    assert words in said
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_no_language_model(tmp_path, capsys):
    write_llama(tmp_path / "llama")
    few_rows = tmp_path / "few"
    write_llama(few_rows, rows=200)
    begin = ("train", "digits", "--out", tmp_path / "run", *FAST, "--init-from")
    assert "(200, 32), and its config.json and tokenizer say (262, 32)" in fails(capsys, 1, *begin, few_rows)
    assert "there is no" in fails(capsys, 1, *begin, tmp_path / "nowhere")
    (tmp_path / "llama" / "tokenizer.json").rename(tmp_path / "llama" / "tokenizer.txt")
    assert "has no tokenizer.json" in fails(capsys, 1, *begin, tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "llama" / "pytorch_model.bin")
    assert "holds no weights" in fails(capsys, 1, *begin, tmp_path / "llama")
    assert "not both" in fails(capsys, 2, *begin, tmp_path / "llama", "--from", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train(folder: Path, *options) -> dict[str, torch.Tensor]:
    """Train a tiny run, on digits or on what is prepared; the tensors of its newest checkpoint."""
    command("train", "digits", "--out", folder, *(TINY if "--data" in options else FAST), *options)
    return weights_of(folder)


def test_a_run_from_a_language_model_goes_on_like_any_other(tmp_path, capsys):
    """Its sizes come from the folder, which is not needed once there is a checkpoint."""
    llama = tmp_path / "llama"
    write_llama(llama)
    whole = train(tmp_path / "whole", "--init-from", llama)
    values = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (
        values["run"]["model"] | {"width": 32, "kv_heads": 2, "intermediate_size": 48, "qk_norm": False}
        == values["run"]["model"]
    )
    assert values["notes"]["start"]["place"] == str(llama)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-000004")
    (tmp_path / "stopped" / "checkpoints" / "latest").write_text("step-000002")
    shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")  # before its first checkpoint
    same(train(tmp_path / "killed", "--init-from", llama), whole)
    llama.rename(tmp_path / "elsewhere")
    same(train(tmp_path / "stopped", "--init-from", llama), whole)
    asked = ("train", "digits", "--out", tmp_path / "stopped", *FAST)
    assert "not with" in fails(capsys, 2, *asked, "--init-from", tmp_path / "another")
    assert "not with" in fails(capsys, 2, *asked, "--from", llama)
    assert "seed is 0 there" in fails(capsys, 2, *asked, "--training.seed", 1)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_prepared_data_must_have_its_tokenizer(tmp_path, capsys):
    llama = tmp_path / "llama"
    write_llama(llama)
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "other")
    command("data", "prepare", tmp_path / "photos", "--tokenizer", llama / "tokenizer.json", "--out", tmp_path / "mine")
    asked = ("train", "digits", "--init-from", llama, "--out", tmp_path / "run", *TINY, "--data")
    assert "another tokenizer than the language model's" in fails(capsys, 1, *asked, tmp_path / "other")
    command(*asked, tmp_path / "mine", "--training.steps", 1)
    assert Tokenizer.from_file(tmp_path / "run" / "tokenizer.json").markers == {"bos": 260, "eos": 261}


# From another run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A trained run to begin from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train(folder)
    return folder


def averages(tensors: dict[str, torch.Tensor], part: str = "ema") -> dict[str, torch.Tensor]:
    return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(f"{part} ")}


def test_a_run_begins_with_the_average_of_another(base, tmp_path):
    """Without learning it stays what it began with; its steps, data and optimizer are its own."""
    expected = averages(weights_of(base))
    exported = export(base, tmp_path / "exported")
    for name, place in (("a", base), ("b", exported)):
        found = train(tmp_path / name, "--from", place, *STILL, "--training.seed", 9, "--data.tokenizer-size", 300)
        same(averages(found, "model"), expected)
        assert json.loads((tmp_path / name / "run.json").read_text())["notes"]["start"]["step"] == 4
    one, other = open_checkpoint(base), open_checkpoint(tmp_path / "a")
    assert one.vocabulary == other.vocabulary
    assert one.tokenizer.to_json() == other.tokenizer.to_json()
    assert not torch.equal(*(averages(weights_of(base), part)[" head.weight"] for part in ("model", "ema")))


def test_a_killed_run_begins_once_more_where_it_began(base, tmp_path, capsys):
    home = Path(shutil.copytree(base, tmp_path / "base"))
    whole = train(tmp_path / "run", "--from", home)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    same(train(tmp_path / "run", "--from", home), whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(home / "checkpoints" / "step-000004")
    (home / "checkpoints" / "latest").write_text("step-000002")
    said = fails(capsys, 1, "train", "digits", "--out", tmp_path / "run", *FAST, "--from", home)
    assert "was at step 4 when" in said


def test_runs_that_cannot_be_begun_from(base, tmp_path, capsys):
    begin = ("train", "digits", "--out", tmp_path / "run", *FAST)
    assert "is not a run" in fails(capsys, 1, *begin, "--from", tmp_path)
    said = fails(capsys, 1, *begin, "--from", base, "--model.intermediate-size", 96)
    assert "model.intermediate_size is 64 there, 96 here" in said
    asked = ("train", "shapes", "--out", tmp_path / "run", *TINY, "--from", base)
    assert "colours" in fails(capsys, 1, *asked)
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data")
    asked = ("train", "digits", "--out", tmp_path / "run", *TINY, "--from", base, "--data", tmp_path / "data")
    assert "another tokenizer or codec" in fails(capsys, 1, *asked)
    assert not (tmp_path / "run").exists()
    command("train", "digits", "--out", tmp_path / "anew", *FAST)
    assert "began anew, not with" in fails(capsys, 2, "train", "digits", "--out", tmp_path / "anew", *FAST, "--from", base)


@pytest.mark.parametrize("like", ["data", "first", "exported"])
def test_prepared_data_of_another_run_are_read(tmp_path, like):
    """Fine-tuning: on data prepared --like those that the run to begin from had, or like itself, exported or not."""
    write_photos(tmp_path / "photos", 40)
    write_photos(tmp_path / "more", 44)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data")
    first = train(tmp_path / "first", "--data", tmp_path / "data", "--training.steps", 1)
    export(tmp_path / "first", tmp_path / "exported")
    command("data", "prepare", tmp_path / "more", "--like", tmp_path / like, "--out", tmp_path / "like")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (tmp_path / "like" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()
    assert read_json(tmp_path / "like" / "fitted.json") == read_json(tmp_path / "data" / "fitted.json")
    options = ("--data", tmp_path / "like", "--from", tmp_path / "first", *STILL, "--training.steps", 1)
    same(averages(train(tmp_path / "second", *options), "model"), averages(first))


def test_data_cannot_be_prepared_like_anything(tmp_path, capsys):
    write_photos(tmp_path / "photos", 20)
    write_llama(tmp_path / "llama")
    for like, words in (("llama", "neither a run's"), ("nowhere", "is no prepared data")):
        asked = ("data", "prepare", tmp_path / "photos", "--like", tmp_path / like, "--out", tmp_path / "out")
        assert words in fails(capsys, 1, *asked)
