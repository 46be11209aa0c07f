"""Runs that start from a language model or from another run (promise 11)."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.documents import few, with_all_logits
from tests.llama import SPECIAL, write_llama, write_tokenizer
from tests.sources import write_photos
from tests.test_cli import TINY, TINY_FITTED, TINY_TRAINING, command, fails
from tests.test_model import decoders, run, sizes_of
from tests.test_parallel import tensors_of
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.start import LlamaStart
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, ModelConfig
from transfusion.data.sources import fit
from transfusion.disk import OpenError, read_json
from transfusion.inference.engine import Request, open_run
from transfusion.inference.text_mode import allowed_tokens
from transfusion.model.transfusion import Transfusion, build, build_uninitialized
from transfusion.parallel import SINGLE_PROCESS
from transfusion.sequence import Document, Row, Text, Vocabulary, collate, encode_document

SHAPES = ((4, 4),)
DIGITS = "--data.sources digits --data.mixture-weights 1 --training.preview-every 0".split()
FAST, FAST_FITTED = [*TINY, *DIGITS], [*TINY_FITTED, *DIGITS]
FAST_LLAMA = [*TINY_TRAINING, "--data.fit-documents", "100", *DIGITS]  # the folder decides sizes and tokenizer
NO_LEARNING = "--training.learning-rate 0 --training.min-learning-rate 0".split()  # weights do not change


def start_from(folder: Path, seed: int = 0) -> tuple[LlamaStart, Vocabulary, Transfusion]:
    """The start, vocabulary and starting weights of a run from this folder."""
    start = LlamaStart(str(folder))
    vocabulary = Vocabulary.build(start.tokenizer.size, SHAPES, 2, **start.tokenizer.markers)
    config = ModelConfig(vocab_size=vocabulary.size, latent_channels=3, qk_norm=True, post_norm=True)
    model = build_uninitialized(start.adapt_config(config))
    start.fill(model, seed, SINGLE_PROCESS)
    return start, vocabulary, model


@few
@given(decoders(), st.sampled_from((262, 300, 400)), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_logits_equal_transformers(config, rows, sharded, is_version_4, seed):
    """For any model size, RoPE scaling and number of files, in the format of transformers 4 or 5."""
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs = write_llama(folder, config, rows, "20KB" if sharded else "5GB")
        assert (folder / "model.safetensors").exists() != sharded
        if is_version_4:
            values = json.loads((folder / "config.json").read_text())
            rope = values.pop("rope_parameters")
            values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if config.rope_scaling is None else rope}
            (folder / "config.json").write_text(json.dumps(values))
        _, vocabulary, model = start_from(folder)
        assert sizes_of(replace(model.config, vocab_size=rows)) == sizes_of(replace(config, vocab_size=rows))
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(256, (50,), generator=generator).tolist()
        chunk = encode_document(Document((Text(tuple(tokens)),)), vocabulary, add_eos=False)
        batch = with_all_logits(collate([Row((chunk,))], len(chunk), vocabulary))
        ours = run(model, batch, [], []).logits
        with torch.no_grad():
            expected = theirs(torch.from_numpy(chunk.tokens)[None]).logits[0]
        assert expected.std() > 0.1  # not trivially equal
        n = vocabulary.num_text_tokens
        torch.testing.assert_close(ours[:, :n], expected[:, :n], rtol=0, atol=1e-4)


def test_weights_that_llama_lacks_start_as_in_any_run(tmp_path):
    """Rows of new token ids, and patch layers."""
    write_llama(tmp_path / "llama")
    start, vocabulary, model = start_from(tmp_path / "llama", seed=5)
    without_llama = build(model.config, 5)
    assert vocabulary.size > start.tokenizer.size == 262
    for name, parameter in model.named_parameters():
        expected = without_llama.get_parameter(name)
        if name in ("tokens.weight", "head.weight"):
            assert torch.equal(parameter[262:], expected[262:])
            assert not torch.equal(parameter[:262], expected[:262])
        else:
            assert torch.equal(parameter, expected) == name.startswith("patches.")


def test_special_tokens_are_used_and_cannot_be_typed(tmp_path):
    write_llama(tmp_path / "llama")
    start, vocabulary, _ = start_from(tmp_path / "llama")
    assert (vocabulary.bos, vocabulary.eos) == (260, 261)
    assert min(vocabulary.pad, vocabulary.eoi, *vocabulary.boi.values()) >= 262
    tokens = start.tokenizer.encode("".join(SPECIAL))
    assert max(tokens) < 260
    assert start.tokenizer.decode(tokens) == "".join(SPECIAL)


LLAMA_3, CHATML = (*SPECIAL, "<|eot_id|>"), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NAMED = {  # like published models: special tokens (ids from 260), files beside tokenizer.json, expected markers
    "by spelling": (LLAMA_3, {}, {"bos": 260, "eos": 261}),
    "bos by spelling": (LLAMA_3, {"config": {"eos_token_id": [262, 261]}}, {"bos": 260, "eos": 262, "other_eos_ids": [261]}),
    "DeepSeek": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        {"config": {"bos_token_id": 260, "eos_token_id": 261},
         "tokenizer_config": {"pad_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"}}},
        {"bos": 260, "eos": 261, "pad": 261},
    ),
    "SmolLM2": (
        CHATML, {"config": {"bos_token_id": 260, "eos_token_id": 260}, "tokenizer_config": {"bos_token": "<|endoftext|>"}},
        {"bos": 260, "eos": 260},
    ),
    "SmolLM2-Instruct": (
        CHATML,
        {"config": {"bos_token_id": 261, "eos_token_id": 262, "pad_token_id": 262},
         "tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}},
        {"bos": 261, "eos": 262, "pad": 262},
    ),
    "Yi-Chat": (
        ("<|startoftext|>", "<|endoftext|>", "<|im_end|>"),
        {"config": {"bos_token_id": 260, "eos_token_id": 261}, "generation_config": {"eos_token_id": 262}},
        {"bos": 260, "eos": 261, "other_eos_ids": [262]},
    ),
    "Llama-3-Instruct": (
        LLAMA_3,
        {"config": {"bos_token_id": 260, "eos_token_id": 261}, "generation_config": {"eos_token_id": [261, 262]},
         "tokenizer_config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}},
        {"bos": 260, "eos": 261, "other_eos_ids": [262]},
    ),
    "Qwen2": (  # without bos: eos separates documents
        CHATML, {"config": {"eos_token_id": 260}, "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"}},
        {"bos": 260, "eos": 260, "other_eos_ids": [262]},
    ),
    "early Llama": (
        ("<unk>", "<s>", "</s>"), {"config": {"bos_token_id": 261, "eos_token_id": 262, "pad_token_id": -1},
                                   "special_tokens_map": {"unk_token": "<unk>", "bos_token": {"content": "<s>"}}},
        {"bos": 261, "eos": 262},
    ),
    "Falcon3": (
        ("<|pad|>", "<|endoftext|>"), {"config": {"eos_token_id": 261, "bos_token_id": 261, "pad_token_id": 260}},
        {"bos": 261, "eos": 261, "pad": 260},
    ),
}  # fmt: skip


def write_named(folder: Path, special: tuple[str, ...], files: dict[str, dict]) -> Path:
    """A tokenizer.json, and the files that name its special tokens."""
    write_tokenizer(folder, special)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("model", NAMED)
def test_markers_are_those_that_the_folder_names(tmp_path, model):
    """As transformers reads the folder. It does not join all eos ids: each of those that it has must be among ours."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    special, files, expected = NAMED[model]
    tokenizer = Tokenizer.from_file(write_named(tmp_path, special, files))
    assert tokenizer.markers == expected
    vocabulary = Vocabulary.build(tokenizer.size, SHAPES, 2, **tokenizer.markers)
    assert {vocabulary.bos, *vocabulary.eos_ids} <= set(range(260, tokenizer.size))
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary
    assert vocabulary.tokenizer_markers == expected
    allowed = allowed_tokens(vocabulary)
    assert allowed[[*vocabulary.eos_ids]].all()  # also where one of them is bos or pad too
    never = {vocabulary.bos, vocabulary.pad, vocabulary.eoi} - {*vocabulary.eos_ids}
    assert not allowed[[*never]].any()
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.bos_token_id in (None, vocabulary.bos)
    assert theirs.eos_token_id in (None, *vocabulary.eos_ids)
    if "generation_config" in files:
        ids = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        assert {*(ids if isinstance(ids, list) else [ids])} <= {*vocabulary.eos_ids}


@pytest.mark.parametrize(("files", "words"), [
    ({"config": {"eos_token_id": 2}}, "config.json: eos_token_id is 2, which is no special token of tokenizer.json"),
    ({"generation_config": {"eos_token_id": [261, 263]}}, "generation_config.json: eos_token_id is 263, which is no"),
    ({"config": {"bos_token_id": -2}}, "bos_token_id is -2"), ({"config": {"bos_token_id": True}}, "bos_token_id is True"),
    ({"config": {"pad_token_id": 300}}, "pad_token_id is 300"), ({"config": {"eos_token_id": [[261]]}}, "is [261]"),
    ({"config": {"eos_token_id": 261.0}}, "is 261.0"), ({"config": {"eos_token_id": "261"}}, "is '261'"),
    ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "tokenizer_config.json: eos_token is '<|im_end|>', which is no"),
    ({"tokenizer_config": {"bos_token": ""}}, "bos_token is ''"), ({"tokenizer_config": {"bos_token": "a"}}, "is 'a'"),
    ({"special_tokens_map": {"pad_token": {"content": 7}}}, "special_tokens_map.json: pad_token is 7"),
    ({"config": {"bos_token_id": 260}, "tokenizer_config": {"bos_token": "<|eot_id|>"}},
     "names two tokens as bos, 260 in config.json and 262 in tokenizer_config.json: correct the wrong one"),
    ({"config": ["eos_token_id"]}, "does not hold a JSON object"),
])  # fmt: skip
def test_names_that_are_wrong_or_contradict_are_refused(tmp_path, files, words):
    with pytest.raises(OpenError, match=re.escape(words)) as caught:
        Tokenizer.from_file(write_named(tmp_path, LLAMA_3, files))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chat_model_ends_its_answer_as_in_transformers(tmp_path):
    """The likeliest token is the second of two eos ids, in the run and its export. Data prepared for it keep both ids."""
    llama = tmp_path / "llama"
    theirs = write_llama(llama)
    write_named(llama, LLAMA_3, {"generation_config": {"eos_token_id": [261, 262]}})
    start, vocabulary, _ = start_from(llama)
    tokens = torch.tensor([[vocabulary.bos, *start.tokenizer.encode("a house")]])
    with torch.no_grad():
        theirs.lm_head.weight[262] = theirs.model(tokens).last_hidden_state[0, -1]
        assert theirs(tokens).logits[0, -1].argmax() == 262
    theirs.save_pretrained(llama)
    write_named(llama, LLAMA_3, {"generation_config": {"eos_token_id": [261, 262]}})
    train(tmp_path / "run", "--training.steps", 1, *NO_LEARNING, "--init-from", llama)
    for folder in (tmp_path / "run", export(tmp_path / "run", tmp_path / "exported")):
        engine = open_run(folder, device="cpu")
        assert engine.vocabulary.eos_ids == (261, 262)
        greedy = engine.make_generation_config(temperature=0.0, max_tokens=4)
        ((answer,),) = engine.generate([Request(("a house",), allow_images=False, generation=greedy)])
        assert (answer.parts, answer.reason) == ([], "eos")
    write_photos(tmp_path / "photos", 40)
    for name, options in {"data": ("--tokenizer", llama / "tokenizer.json"), "like": ("--like", tmp_path / "run")}.items():
        command("data", "prepare", tmp_path / "photos", *options, "--out", tmp_path / name)
        config = DataConfig(prepared=(str(tmp_path / name),), seq_len=64)
        for tokenizer in (None, start.tokenizer):  # of a new run, and of one that starts from the language model
            prepared = fit(config, 2, 0, tokenizer).vocabulary
            assert (prepared.bos, prepared.eos_ids) == (vocabulary.bos, (261, 262))


def test_float16_weights_are_read(tmp_path):
    theirs = write_llama(tmp_path / "llama")
    theirs.half().save_pretrained(tmp_path / "llama")
    _, _, model = start_from(tmp_path / "llama")
    expected = theirs.model.layers[1].mlp.up_proj.weight
    assert model.transformer.blocks[1].feed_forward.up.weight.dtype == torch.float32
    assert torch.equal(model.transformer.blocks[1].feed_forward.up.weight, expected.float())


@pytest.mark.parametrize(("changed", "words"), [
    ({"model_type": "gpt2"}, "of type gpt2, not llama"),
    ({"attention_bias": True}, "attention biases"), ({"mlp_bias": True}, "MLP biases"),
    ({"hidden_act": "gelu"}, "the activation gelu"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type yarn"),
    ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type linear"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], not an object"), ({"rope_scaling": 3}, "rope_scaling is 3, not"),
    ({"quantization_config": {"bits": 4}}, "quantised weights"), ({"hidden_size": ...}, "'hidden_size' is missing"),
    ({"hidden_size": 64}, "embed_tokens.weight is (300, 32); config.json and the tokenizer require (300, 64)"),
    ({"num_hidden_layers": 1}, "has an unexpected tensor model.layers.1"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
    ({"num_key_value_heads": 3}, "not divisible"), ({"num_attention_heads": "four"}, "cannot be used"),
])  # fmt: skip
def test_unsupported_models_are_refused(tmp_path, capsys, changed, words):
    write_llama(tmp_path / "llama", **changed)
    message = fails(capsys, 1, "train", "digits", "--init-from", tmp_path / "llama", "--out", tmp_path / "run", *FAST_LLAMA)
    assert words in message
    assert not (tmp_path / "run").exists()


def test_folders_without_a_language_model_are_refused(tmp_path, capsys):
    write_llama(tmp_path / "llama")
    other_rows = tmp_path / "other"
    write_llama(other_rows)
    args = ("train", "digits", "--out", tmp_path / "run", *FAST_LLAMA, "--init-from")
    tensors = load_file(other_rows / "model.safetensors")
    for shape, rows in (((200, 32), 262), ((), 262), ((300,), 300), ((300, 32, 1), 300)):
        save_file(tensors | {"model.embed_tokens.weight": torch.zeros(shape)}, other_rows / "model.safetensors")
        message = fails(capsys, 1, *args, other_rows)
        assert f"is {shape}; config.json and the tokenizer require ({rows}, 32)" in message
    assert "there is no" in fails(capsys, 1, *args, tmp_path / "nowhere")
    (tmp_path / "llama" / "tokenizer.json").rename(tmp_path / "llama" / "tokenizer.txt")
    assert "has no tokenizer.json" in fails(capsys, 1, *args, tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "llama" / "pytorch_model.bin")
    assert "has no weights" in fails(capsys, 1, *args, tmp_path / "llama")
    assert "not both" in fails(capsys, 2, *args, tmp_path / "llama", "--from", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train(folder: Path, *options) -> dict[str, torch.Tensor]:
    """Train a tiny run on digits or prepared data: the tensors of its newest checkpoint."""
    if "--init-from" in options:
        tiny = TINY_TRAINING if "--data" in options else FAST_LLAMA
    else:
        tiny = TINY_FITTED if "--data" in options else FAST_FITTED if "--from" in options else FAST
    command("train", "digits", "--out", folder, *tiny, *options)
    return tensors_of(folder)


def test_run_from_a_language_model_resumes_like_any_other(tmp_path, capsys):
    """Its sizes come from the folder, which is not needed after the first checkpoint."""
    llama = tmp_path / "llama"
    write_llama(llama)
    expected = train(tmp_path / "whole", "--init-from", llama)
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
    assert_same(train(tmp_path / "killed", "--init-from", llama), expected)
    llama.rename(tmp_path / "elsewhere")
    assert_same(train(tmp_path / "stopped", "--init-from", llama), expected)
    args = ("train", "digits", "--out", tmp_path / "stopped", *FAST_LLAMA)
    assert "not from" in fails(capsys, 2, *args, "--init-from", tmp_path / "another")
    from_run = ("train", "digits", "--out", tmp_path / "stopped", *TINY_TRAINING, *DIGITS, "--from", llama)
    assert "not from" in fails(capsys, 2, *from_run)
    assert "seed is 0 in the folder" in fails(capsys, 2, *args, "--training.seed", 1)


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def test_prepared_data_must_have_the_tokenizer_of_the_language_model(tmp_path, capsys):
    llama = tmp_path / "llama"
    write_llama(llama)
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "other")
    command("data", "prepare", tmp_path / "photos", "--tokenizer", llama / "tokenizer.json", "--out", tmp_path / "mine")
    args = ("train", "digits", "--init-from", llama, "--out", tmp_path / "run", *TINY_TRAINING, "--data")
    assert "another tokenizer than the language model's" in fails(capsys, 1, *args, tmp_path / "other")
    command(*args, tmp_path / "mine", "--training.steps", 1)
    assert Tokenizer.from_file(tmp_path / "run" / "tokenizer.json").markers == {"bos": 260, "eos": 261}


# Starts from another run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A trained run to start from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train(folder)
    return folder


def select_part(tensors: dict[str, torch.Tensor], part: str = "ema") -> dict[str, torch.Tensor]:
    return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(f"{part} ")}


def test_run_starts_with_the_ema_tensors_of_another(base, tmp_path):
    """With learning rate 0 the weights stay the other run's; steps, data and optimizer are new."""
    expected = select_part(tensors_of(base))
    exported = export(base, tmp_path / "exported")
    for name, path in (("a", base), ("b", exported)):
        tensors = train(tmp_path / name, "--from", path, *NO_LEARNING, "--training.seed", 9)
        assert_same(select_part(tensors, "model"), expected)
        assert json.loads((tmp_path / name / "run.json").read_text())["notes"]["start"]["step"] == 4
    first, second = open_checkpoint(base), open_checkpoint(tmp_path / "a")
    assert first.vocabulary == second.vocabulary
    assert first.tokenizer.to_json() == second.tokenizer.to_json()
    assert not torch.equal(*(select_part(tensors_of(base), part)[" head.weight"] for part in ("model", "ema")))


def test_killed_run_without_checkpoint_starts_again_equally(base, tmp_path, capsys):
    start = Path(shutil.copytree(base, tmp_path / "base"))
    expected = train(tmp_path / "run", "--from", start)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert_same(train(tmp_path / "run", "--from", start), expected)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(start / "checkpoints" / "step-000004")
    (start / "checkpoints" / "latest").write_text("step-000002")
    capsys.readouterr()
    other = train(tmp_path / "run", "--from", start)
    assert f"starts from {start} at step 2, not from {start} at step 4" in capsys.readouterr().err
    assert_same(other, train(tmp_path / "other", "--from", start))


def test_runs_that_do_not_fit_are_refused_as_a_start(base, tmp_path, capsys):
    args = ("train", "digits", "--out", tmp_path / "run", *FAST_FITTED)
    assert "is not a run" in fails(capsys, 1, *args, "--from", tmp_path)
    message = fails(capsys, 1, *args, "--from", base, "--model.intermediate-size", 96)
    assert "model.intermediate_size is 64 in the folder, 96 in this command" in message
    other_args = ("train", "shapes", "--out", tmp_path / "run", *TINY_FITTED, "--from", base)
    assert "image channels" in fails(capsys, 1, *other_args)
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data")
    other_args = ("train", "digits", "--out", tmp_path / "run", *TINY_FITTED, "--from", base, "--data", tmp_path / "data")
    assert "another tokenizer or codec" in fails(capsys, 1, *other_args)
    assert not (tmp_path / "run").exists()
    command("train", "digits", "--out", tmp_path / "random", *FAST)
    message = fails(capsys, 2, "train", "digits", "--out", tmp_path / "random", *FAST_FITTED, "--from", base)
    assert "started from random weights, not from" in message


@pytest.mark.parametrize("like", ["data", "first", "exported"])
def test_run_is_fine_tuned_on_data_prepared_like_the_first(tmp_path, like):
    """Fine-tuning on data prepared --like the data of the first run, the run itself, or its export."""
    write_photos(tmp_path / "photos", 40)
    write_photos(tmp_path / "more", 44)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data")
    first = train(tmp_path / "first", "--data", tmp_path / "data", "--training.steps", 1)
    export(tmp_path / "first", tmp_path / "exported")
    command("data", "prepare", tmp_path / "more", "--like", tmp_path / like, "--out", tmp_path / "like")
    for name in ("tokenizer.json", "codec.safetensors"):
        assert (tmp_path / "like" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()
    assert read_json(tmp_path / "like" / "fitted.json") == read_json(tmp_path / "data" / "fitted.json")
    options = ("--data", tmp_path / "like", "--from", tmp_path / "first", *NO_LEARNING, "--training.steps", 1)
    assert_same(select_part(train(tmp_path / "second", *options), "model"), select_part(first))


def test_like_needs_a_run_or_prepared_data(tmp_path, capsys):
    write_photos(tmp_path / "photos", 20)
    write_llama(tmp_path / "llama")
    for like, words in (("llama", "neither a run's"), ("nowhere", "is not prepared data")):
        args = ("data", "prepare", tmp_path / "photos", "--like", tmp_path / like, "--out", tmp_path / "out")
        assert words in fails(capsys, 1, *args)
