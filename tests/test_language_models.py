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
from tests.language_models import CLASSES, CONFIG, SPECIAL, edit, write_language_model, write_tokenizer
from tests.profile import examples
from tests.sources import write_photos
from tests.test_cli import TINY, TINY_FITTED, TINY_TRAINING, command, fails
from tests.test_model import decoders, run, sizes_of
from tests.test_parallel import tensors_of
from tests.tiny import Latents
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import OpenedRun, open_checkpoint
from transfusion.checkpoint.start import LanguageModelStart
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, GenerationConfig, ModelConfig, Run
from transfusion.data.sources import fit
from transfusion.disk import OpenError, read_json
from transfusion.inference.answer import Answer
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.inference.text_mode import allowed_tokens
from transfusion.model.language_model import EMBEDDING, HEAD
from transfusion.model.transfusion import Transfusion, build, build_uninitialized
from transfusion.model.weights import INDEX, SINGLE, Weights, write_weights
from transfusion.parallel import SINGLE_PROCESS
from transfusion.sequence import Document, Row, Text, Vocabulary, collate, encode_document

SHAPES = ((4, 4),)
DIGITS = "--data.sources digits --data.mixture-weights 1 --training.preview-every 0".split()
FAST, FAST_FITTED = [*TINY, *DIGITS], [*TINY_FITTED, *DIGITS]
FAST_LANGUAGE_MODEL = [*TINY_TRAINING, "--data.fit-documents", "100", *DIGITS]  # the folder decides sizes and tokenizer
NO_LEARNING = "--training.learning-rate 0 --training.min-learning-rate 0".split()  # weights do not change


def start_from(
    folder: Path | str, seed: int = 0, untied: str = "none",
) -> tuple[LanguageModelStart, Vocabulary, Transfusion]:  # fmt: skip
    """The start, vocabulary and starting weights of a run from this folder."""
    start = LanguageModelStart(str(folder))
    vocabulary = Vocabulary.build(start.tokenizer.size, SHAPES, 2, **start.tokenizer.markers)
    config = ModelConfig(vocab_size=vocabulary.size, latent_channels=3, qk_norm=True, post_norm=True, untied=untied)
    if untied != "none":
        config = replace(config, text_vocab_size=vocabulary.text_size)
    model = build_uninitialized(start.adapt_config(config))
    start.fill(model, seed, SINGLE_PROCESS)
    return start, vocabulary, model


def check_logits(folder: Path, seed: int = 0) -> Transfusion:
    """On text, the logits of a new run from this folder equal those of transformers. Returns its model."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _, vocabulary, model = start_from(folder)
    tokens = torch.randint(256, (50,), generator=torch.Generator().manual_seed(seed)).tolist()
    chunk = encode_document(Document((Text(tuple(tokens)),)), vocabulary, add_eos=False)
    batch = with_all_logits(collate([Row((chunk,))], len(chunk), vocabulary))
    ours = run(model, batch, [], []).logits
    with torch.no_grad():
        expected = theirs(torch.from_numpy(chunk.tokens)[None]).logits[0]
    assert expected.std() > 0.1  # not trivially equal
    n = vocabulary.num_text_tokens
    torch.testing.assert_close(ours[:, :n], expected[:, :n], rtol=0, atol=1e-4)
    return model


def as_version_4(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it: RoPE and dtype have other names."""
    values = read_json(folder / "config.json")
    rope = values["rope_parameters"]
    theta, scaling = rope.pop("rope_theta"), rope if rope["rope_type"] != "default" else None
    edit(folder, rope_parameters=..., rope_theta=theta, rope_scaling=scaling, dtype=..., torch_dtype=values["dtype"])


@few
@given(
    st.sampled_from([*CLASSES]), decoders(), st.sampled_from((262, 300, 400)), st.booleans(), st.booleans(),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.integers(0, 2**31),
)  # fmt: skip
def test_logits_equal_transformers(family, config, rows, sharded, is_version_4, dtype, seed):
    """For any family, size, RoPE scaling, dtype and number of files, in the format of transformers 4 or 5."""
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        write_language_model(folder, family, config, rows, "20KB" if sharded else "5GB", dtype)
        assert (folder / "model.safetensors").exists() != sharded
        if is_version_4:
            as_version_4(folder)
        model = check_logits(folder, seed)
        assert sizes_of(replace(model.config, vocab_size=rows)) == sizes_of(replace(config, vocab_size=rows))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


TIED, WIDE = replace(CONFIG, tie_word_embeddings=True), replace(CONFIG, width=64, heads=32, kv_heads=None)
LLAMA_3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
ODD_CONFIGS = {  # family, sizes, changes of config.json: as published files have them, or as other loaders failed on them
    "Llama 1": ("llama", replace(CONFIG, kv_heads=None), {
        "num_key_value_heads": ..., "head_dim": ..., "rms_norm_eps": ..., "rope_parameters": ..., "hidden_act": "swish",
        "architectures": ["LLaMAForCausalLM"], "pretraining_tp": 2, "tie_word_embeddings": ...}),
    "theta beside the object": (
        "qwen3", CONFIG, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}),
    "two RoPE objects": (
        "llama", CONFIG, {"rope_scaling": LLAMA_3_ROPE | {"rope_type": "llama3"}, "rope_theta": 5e5}),
    "older name of the type": ("qwen2", CONFIG, {
        "rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": LLAMA_3_ROPE | {"type": "llama3"}}),
    "Qwen2.5: a window that is not in use": (
        "qwen2", CONFIG, {"layer_types": ..., "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}),
    "a window for layers that there are not": (
        "qwen3", CONFIG, {"layer_types": ..., "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "a window, but full attention in all layers": ("qwen2", CONFIG, {
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "a window of a family without": ("llama", CONFIG, {
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "Qwen3: default width of a head": ("qwen3", replace(CONFIG, head_dim=128), {"head_dim": ...}),
    "Qwen2: default number of key heads": ("qwen2", WIDE, {"num_key_value_heads": ..., "head_dim": ...}),
    "Qwen3: default number of key heads": ("qwen3", WIDE, {"num_key_value_heads": ...}),
    "Mistral: default number of key heads": (
        "mistral", replace(CONFIG, heads=16, kv_heads=8), {"num_key_value_heads": ..., "head_dim": None}),
    "all features off": ("llama", TIED, {
        "attention_bias": False, "mlp_bias": False, "quantization_config": None, "rope_scaling": None,
        "partial_rotary_factor": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_odd_configs_are_read_as_in_transformers(tmp_path, case):
    family, config, changed = ODD_CONFIGS[case]
    write_language_model(tmp_path / "model", family, config, **changed)
    check_logits(tmp_path / "model")


def save_only_first_name(folder: Path, tensors: dict) -> None:
    """As `safetensors.torch.save_model` does with tied matrices."""
    renamed = {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()}
    save_file(renamed, folder / SINGLE, {"format": "pt"})


def save_twice(folder: Path, tensors: dict) -> None:
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / SINGLE, {"format": "pt"})


def save_frequencies(folder: Path, tensors: dict) -> None:
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / SINGLE, {"format": "pt"})


def leave_index(folder: Path, tensors: dict) -> None:
    """The index of a sharded model of which this one was made."""
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))


def save_other_file(folder: Path, tensors: dict) -> None:
    """As in the repositories of Mistral."""
    save_file({"tok_embeddings.weight": tensors[EMBEDDING]}, folder / "consolidated.safetensors")


@pytest.mark.parametrize("change", [save_only_first_name, save_twice, save_frequencies, leave_index, save_other_file])
def test_odd_files_are_read_as_in_transformers(tmp_path, change):
    write_language_model(tmp_path / "model", config=TIED)
    change(tmp_path / "model", load_file(tmp_path / "model" / SINGLE))
    check_logits(tmp_path / "model")


def test_weights_saved_over_others_are_read(tmp_path):
    """A network saved as one file and then as shards into the same folder, and the reverse."""
    for n, size in enumerate((10**9, 20_000, 10**9)):
        write_weights({"a": torch.full((9_000,), float(n)), "b": torch.zeros(9_000)}, tmp_path, size)
        assert Weights(tmp_path).read("a")[0] == n


@pytest.mark.parametrize("untied", ["none", "full"])
def test_weights_that_a_language_model_lacks_start_as_in_any_run(tmp_path, untied):
    """Patch layers, and rows of new token ids, which have the standard deviation of the other rows."""
    write_language_model(tmp_path / "model")
    start, vocabulary, model = start_from(tmp_path / "model", seed=5, untied=untied)
    random = build(model.config, 5)
    assert vocabulary.size > start.tokenizer.size == 262
    rows = {name: {} for name in ("tokens.weight", "head.weight")}  # old and new ones, by name
    for name, parameter in model.named_parameters():
        expected, vocab_weight = random.get_parameter(name), name.removeprefix("image_")
        if vocab_weight in rows:
            known = 262 if name == vocab_weight else 0
            rows[vocab_weight] |= {name: parameter[:known]} if known else {}
            ratio = parameter[known:] / expected[known:]
            torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
            rows[vocab_weight][f"new {name}"] = parameter[known:]
        else:
            assert torch.equal(parameter, expected) == name.startswith("patches.")
    for parts in rows.values():
        assert len(parts) == (2 if untied == "none" else 3)
        stds = [part.std().item() for part in parts.values()]
        assert stds == pytest.approx([stds[0]] * len(stds))


def test_special_tokens_are_used_and_cannot_be_typed(tmp_path):
    write_language_model(tmp_path / "model")
    start, vocabulary, _ = start_from(tmp_path / "model")
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
    "DeepSeek-R1-Distill-Qwen": (  # the tokenizer decides the bos
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        {"config": {"bos_token_id": 260, "eos_token_id": 260},
         "generation_config": {"bos_token_id": 261, "eos_token_id": 260},
         "tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"}}},
        {"bos": 261, "eos": 260},
    ),
    "Qwen3": (
        CHATML, {"config": {"bos_token_id": 260, "eos_token_id": 262},
                 "generation_config": {"bos_token_id": 260, "eos_token_id": [262, 260], "pad_token_id": 260},
                 "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}},
        {"bos": 260, "eos": 262, "pad": 260, "other_eos_ids": [260]},
    ),
    "Mistral": (
        ("<unk>", "<s>", "</s>"), {"config": {"bos_token_id": 261, "eos_token_id": 262},
                                   "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}},
        {"bos": 261, "eos": 262},
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
    ({"config": ["eos_token_id"]}, "does not hold a JSON object"),
])  # fmt: skip
def test_names_that_are_wrong_are_refused(tmp_path, files, words):
    with pytest.raises(OpenError, match=re.escape(words)) as caught:
        Tokenizer.from_file(write_named(tmp_path, LLAMA_3, files))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", CLASSES)
def test_generation_stops_where_transformers_stops(tmp_path, family):
    """Greedy decoding of letters, until the second of two eos ids is the likeliest."""
    config, special = replace(CONFIG, tie_word_embeddings=False), (*SPECIAL, "<|im_end|>")
    theirs, tokenizer = write_language_model(tmp_path / "model", family, config), write_tokenizer(tmp_path, special)
    prompt = torch.tensor([[260, *tokenizer.encode("a house")]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        letters = [tokenizer.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]
        theirs.lm_head.weight[[n for n in range(300) if n not in letters]] = 0
        *before, fifth = theirs.generate(prompt, **options)[0, prompt.shape[1] :][:5].tolist()
        theirs.lm_head.weight[262] = 1.01 * theirs.lm_head.weight[fifth]
    theirs.save_pretrained(tmp_path / "model")
    write_named(tmp_path / "model", special, {"generation_config": {"eos_token_id": [261, 262], "bos_token_id": 260}})
    theirs.generation_config.eos_token_id = [261, 262]
    *expected, last = theirs.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert last == 262 and expected and expected == before[: len(expected)]
    answer = answer_greedily(tmp_path / "model", 8)
    assert (answer.parts, answer.reason) == ([tokenizer.decode(expected)], "eos")


@pytest.mark.parametrize("family", CLASSES)
def test_greedy_text_is_that_of_transformers_without_ids_that_have_no_token(tmp_path, family):
    """The matrices of many models have more rows than their tokenizer has tokens."""
    theirs, num_tokens = write_language_model(tmp_path, family), (tokenizer := write_tokenizer(tmp_path)).size
    with torch.no_grad():
        theirs.lm_head.weight[num_tokens:] *= 10  # likely ids
    theirs.save_pretrained(tmp_path)
    prompt, length = torch.tensor([[260, *tokenizer.encode("a house")]]), 20
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    padded = [*range(num_tokens, theirs.lm_head.weight.shape[0])]
    free, expected = (theirs.generate(prompt, **options, suppress_tokens=suppressed)[0, prompt.shape[1] :].tolist()
                      for suppressed in (None, padded))  # fmt: skip
    assert max(free) >= num_tokens > max(expected) and len(expected) > 4
    assert answer_greedily(tmp_path, length).parts == [tokenizer.decode(n for n in expected if n != 261)]


def answer_greedily(folder: Path, max_tokens: int) -> Answer:
    """The text after "a house" of a new run from this folder."""
    start, vocabulary, model = start_from(folder)
    generation = GenerationConfig(temperature=0.0, max_tokens=max_tokens)
    run = Run("", model.config, data=DataConfig(seq_len=64), generation=generation)
    engine = Engine(OpenedRun("", run, start.tokenizer, Latents(), vocabulary, {}, model.eval(), 0, torch.device("cpu")))
    ((answer,),) = engine.generate([Request(("a house",), allow_images=False)])
    return answer


def test_run_from_the_hub_ends_its_answer_as_in_transformers(tmp_path, monkeypatch, capsys):
    """The likeliest token is the second of two eos ids, in the run and its export. Data prepared for it keep both ids."""
    folder, downloads = tmp_path / "snapshot", []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: downloads.append(name) or str(folder))
    theirs = write_language_model(folder, "qwen3")
    write_named(folder, LLAMA_3, {"generation_config": {"eos_token_id": [261, 262]}})
    start, vocabulary, _ = start_from("owner/name")
    tokens = torch.tensor([[vocabulary.bos, *start.tokenizer.encode("a house")]])
    with torch.no_grad():
        theirs.lm_head.weight[262] = theirs.model(tokens).last_hidden_state[0, -1]
        assert theirs(tokens).logits[0, -1].argmax() == 262
    theirs.save_pretrained(folder)
    write_named(folder, LLAMA_3, {"generation_config": {"eos_token_id": [261, 262]}})
    train(tmp_path / "run", "--training.steps", 1, *NO_LEARNING, "--init-from", "owner/name")
    note = read_json(tmp_path / "run" / "run.json")["notes"]["start"]
    assert note == {"kind": "language_model", "place": "owner/name", "name": "name", "step": None}
    assert {*downloads} == {"owner/name"}
    downloads.clear()
    train(tmp_path / "run", "--training.steps", 2, *NO_LEARNING, "--init-from", "owner/name")  # resumes
    assert not downloads
    for path in (tmp_path / "run", export(tmp_path / "run", tmp_path / "exported")):
        engine = open_run(path, device="cpu")
        assert engine.vocabulary.eos_ids == (261, 262)
        greedy = engine.make_generation_config(temperature=0.0, max_tokens=4)
        ((answer,),) = engine.generate([Request(("a house",), allow_images=False, generation=greedy)])
        assert (answer.parts, answer.reason) == ([], "eos")
    write_photos(tmp_path / "photos", 40)
    for name, options in {"data": ("--tokenizer", folder / "tokenizer.json"), "like": ("--like", tmp_path / "run")}.items():
        command("data", "prepare", tmp_path / "photos", *options, "--out", tmp_path / name)
        config = DataConfig(prepared=(str(tmp_path / name),), seq_len=64)
        for tokenizer in (None, start.tokenizer):  # of a new run, and of one that starts from the language model
            prepared = fit(config, 2, 0, tokenizer).vocabulary
            assert (prepared.bos, prepared.eos_ids) == (vocabulary.bos, (261, 262))


NOT_SUPPORTED = "which is not supported: "


@pytest.mark.parametrize(("family", "changed", "words"), [
    ("llama", {"model_type": "gpt2"}, f"model_type is 'gpt2', {NOT_SUPPORTED}supported are llama, mistral, qwen2, qwen3"),
    ("qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "model_type is 'qwen3_moe'"),
    ("llama", {"model_type": "smollm3"}, "model_type is 'smollm3'"), ("llama", {"model_type": ...}, "model_type is None"),
    ("llama", {"model_type": ["llama"]}, "model_type is ['llama']"),
    ("llama", dict.fromkeys(("model_type", "architectures", "hidden_size"), ...), "model_type is None"),
    ("llama", {"model_type": "transfusion"}, "is a run, not a language model: use --from"),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures is ['Qwen2ForSequenceClassification']"),
    ("mistral", {"architectures": ["MistralModel"]}, f"{NOT_SUPPORTED}a language model is a ForCausalLM"),
    ("llama", {"attention_bias": True}, f"attention_bias is True, {NOT_SUPPORTED}supported are the biases of"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"), ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("qwen2", {"hidden_act": "gelu"}, f"hidden_act is 'gelu', {NOT_SUPPORTED}supported is silu"),
    ("llama", {"hidden_act": None}, "hidden_act is None"), ("qwen2", {"is_causal": False}, "is_causal is False"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, f"rope_type is 'yarn', {NOT_SUPPORTED}supp"),
    ("qwen2", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1], not an object"),
    ("llama", {"rope_scaling": 3}, "rope_scaling is 3, not an object"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
     "rope_parameters.full_attention is {'rope_theta': 10000.0}, which is not supported: supported is one RoPE for all"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, which is not supported: supported is 1"),
    ("mistral", {"sliding_window": 4096},
     f"sliding_window is 4096, {NOT_SUPPORTED}set it to null if data.seq_len is at most 4096"),
    ("mistral", {"sliding_window": ...}, "sliding_window is 4096"),
    ("mistral", {"sliding_window": [None, 64]}, "sliding_window is [None, 64]"),
    ("qwen2", {"layer_types": ..., "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "is 64"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding_attent"),
    ("qwen3", {"layer_types": 7}, "layer_types is 7"), ("llama", {"architectures": 7}, "architectures is 7"),
    ("qwen2", {"layer_types": ..., "use_sliding_window": True, "max_window_layers": "4"}, "'<' not supported between"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not supported: save the"),
    ("llama", {"hidden_size": ...}, "'hidden_size' is missing"),
    ("llama", {"hidden_size": 64}, "embed_tokens.weight is (300, 32); config.json and the tokenizer require (300, 64)"),
    ("qwen3", {"head_dim": ...}, "q_proj.weight is (32, 32); config.json and the tokenizer require (512, 32)"),
    ("llama", {"num_hidden_layers": 1}, "has an unexpected tensor model.layers.1"),
    ("llama", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
    ("qwen2", {"model_type": "llama"}, "has an unexpected tensor model.layers.0.self_attn.k_proj.bias"),
    ("llama", {"model_type": "qwen2"}, "lacks the tensor model.layers.0.self_attn.k_proj.bias"),
    ("qwen3", {"model_type": "llama"}, "has an unexpected tensor model.layers.0.self_attn.k_norm.weight"),
    ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is not model.em"),
    ("llama", {"num_key_value_heads": 3}, "not divisible"), ("llama", {"num_attention_heads": "four"}, "a whole number"),
])  # fmt: skip
def test_unsupported_models_are_refused(tmp_path, family, changed, words):
    write_language_model(tmp_path / "model", family, **changed)
    with pytest.raises(OpenError, match=re.escape(words)) as caught:
        LanguageModelStart(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


odd_values = st.sampled_from((None, True, 0, -1, 7, 10**400, 1e-9, "4", [], ["full_attention"], [[1]], {}, {"type": 3}))
FIELDS = """model_type architectures hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act is_causal intermediate_size tie_word_embeddings rms_norm_eps rope_parameters rope_scaling rope_theta
    partial_rotary_factor attention_bias mlp_bias quantization_config layer_types sliding_window use_sliding_window
    max_window_layers""".split()
ROPE_FIELDS = "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in CLASSES}
    for family, folder in folders.items():
        write_language_model(folder, family)
    return folders


@examples(1_000, 200)
@given(
    st.sampled_from([*CLASSES]), st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=2),
    st.none() | st.dictionaries(st.sampled_from(ROPE_FIELDS), odd_values, min_size=1, max_size=3),
)  # fmt: skip
def test_any_value_of_a_field_is_read_or_refused_in_one_line(models, family, changed, rope):
    config = (models[family] / "config.json").read_text()
    rope_type = {"rope_type": "llama3"} | LLAMA_3_ROPE
    edit(models[family], **({} if rope is None else {"rope_parameters": rope_type | rope}) | changed)
    try:
        start_from(models[family])
    except OpenError as error:
        assert str(models[family]) in str(error) and "\n" not in str(error)
    finally:
        (models[family] / "config.json").write_text(config)


def test_folders_without_a_language_model_are_refused(tmp_path, capsys):
    write_language_model(tmp_path / "model")
    other_rows = tmp_path / "other"
    write_language_model(other_rows)
    args = ("train", "digits", "--out", tmp_path / "run", *FAST_LANGUAGE_MODEL, "--init-from")
    tensors = load_file(other_rows / "model.safetensors")
    for shape, rows in (((200, 32), 262), ((), 262), ((300,), 300), ((300, 32, 1), 300)):
        save_file(tensors | {"model.embed_tokens.weight": torch.zeros(shape)}, other_rows / "model.safetensors")
        message = fails(capsys, 1, *args, other_rows)
        assert f"is {shape}; config.json and the tokenizer require ({rows}, 32)" in message
        assert "fitting" not in message  # nothing is fitted to the data before
    assert "there is no" in fails(capsys, 1, *args, tmp_path / "nowhere")
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.txt")
    assert "has no tokenizer.json" in fails(capsys, 1, *args, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert "has no weights" in fails(capsys, 1, *args, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in fails(capsys, 1, *args, tmp_path / "model")
    assert "is a run, not a language model: use --from" in fails(capsys, 1, *args, "emoji")
    assert "not both" in fails(capsys, 2, *args, tmp_path / "model", "--from", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train(folder: Path, *options) -> dict[str, torch.Tensor]:
    """Train a tiny run on digits or prepared data: the tensors of its newest checkpoint."""
    if "--init-from" in options:
        tiny = TINY_TRAINING if "--data" in options else FAST_LANGUAGE_MODEL
    else:
        tiny = TINY_FITTED if "--data" in options else FAST_FITTED if "--from" in options else FAST
    command("train", "digits", "--out", folder, *tiny, *options)
    return tensors_of(folder)


def test_run_from_a_language_model_resumes_like_any_other(tmp_path, capsys):
    """Its sizes come from the folder, which is not needed after the first checkpoint."""
    folder = tmp_path / "model"
    write_language_model(folder)
    expected = train(tmp_path / "whole", "--init-from", folder)
    values = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (
        values["run"]["model"] | {"width": 32, "kv_heads": 2, "intermediate_size": 48, "qk_norm": False}
        == values["run"]["model"]
    )
    assert values["notes"]["start"]["place"] == str(folder)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-000004")
    (tmp_path / "stopped" / "checkpoints" / "latest").write_text("step-000002")
    shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")  # before its first checkpoint
    assert_same(train(tmp_path / "killed", "--init-from", folder), expected)
    folder.rename(tmp_path / "elsewhere")
    assert_same(train(tmp_path / "stopped", "--init-from", folder), expected)
    args = ("train", "digits", "--out", tmp_path / "stopped", *FAST_LANGUAGE_MODEL)
    assert "not from" in fails(capsys, 2, *args, "--init-from", tmp_path / "another")
    from_run = ("train", "digits", "--out", tmp_path / "stopped", *TINY_TRAINING, *DIGITS, "--from", folder)
    assert "not from" in fails(capsys, 2, *from_run)
    assert "seed is 0 in the folder" in fails(capsys, 2, *args, "--training.seed", 1)


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def test_prepared_data_must_have_the_tokenizer_of_the_language_model(tmp_path, capsys):
    folder = tmp_path / "model"
    write_language_model(folder)
    write_photos(tmp_path / "photos", 40)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "other")
    command("data", "prepare", tmp_path / "photos", "--tokenizer", folder / "tokenizer.json", "--out", tmp_path / "mine")
    args = ("train", "digits", "--init-from", folder, "--out", tmp_path / "run", *TINY_TRAINING, "--data")
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
    message = fails(capsys, 1, *args, "--from", base, "--model.intermediate-size", 96, "--model.untied", "full")
    assert message.endswith(" have other shapes: model.intermediate_size is 64 in the folder, 96 in this command\n")
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
    write_language_model(tmp_path / "model")
    for like, words in (("model", "neither a run's"), ("nowhere", "is not prepared data")):
        args = ("data", "prepare", tmp_path / "photos", "--like", tmp_path / like, "--out", tmp_path / "out")
        assert words in fails(capsys, 1, *args)
