"""Runs in lm_eval: samples, generation options, long texts, its command line. Likelihoods are in test_multiple_choice.py."""

import json
import sys

import datasets
import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing

from tests import tiny
from tests.llama import SPECIAL, write_llama
from tests.profile import THOROUGH, examples
from tests.test_llama import NO_LEARNING, train
from transfusion.checkpoint.export import export
from transfusion.codecs.text import Tokenizer
from transfusion.evaluation import harness
from transfusion.evaluation.harness import HarnessModel
from transfusion.evaluation.likelihood import encode_pair, likelihoods, rolling_likelihood
from transfusion.inference.engine import Engine, open_run

SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}


def text_engine(context: int = 200, **options) -> Engine:
    """An engine that writes neither eos nor images."""
    return tiny.build_engine(lambda v: {id_: -1e4 for id_ in (v.eos, *v.boi.values())}, context=context, **options)


def requests(*args: tuple, kind: str = "generate_until") -> list[Instance]:
    return [Instance(kind, {}, arguments, n) for n, arguments in enumerate(args)]


def generate(model: HarnessModel, contexts: list[str], **options) -> list[str]:
    return model.generate_until(requests(*((context, SAMPLED | options) for context in contexts)))


# Samples


def test_samples_of_one_text_differ_and_are_reproducible():
    """Whatever the batches are. lm_eval repeats one request for each sample, and sets torch's seed to that of --seed."""
    contexts = ["a small"] * 4 + ["zwei"] * 2
    torch.manual_seed(1234)
    texts = generate(HarnessModel(text_engine()), contexts)
    assert len(set(texts)) == len(texts)
    for batch_size in (1, "auto", "auto:4"):
        assert generate(HarnessModel(text_engine(), batch_size=batch_size), contexts) == texts
    model = HarnessModel(text_engine(), batch_size="auto", max_batch_size=2)
    assert model.batch_size == 2
    assert generate(model, contexts) == texts
    assert generate(model, contexts[::-1]) == [*texts[4:], *texts[:4]][:2] + texts[:4]
    torch.manual_seed(5)
    assert not {*generate(model, contexts)} & {*texts}


def test_options_of_a_task_are_obeyed(caplog):
    model = HarnessModel(text_engine())
    greedy = generate(model, ["a small"], do_sample=False, temperature=0.7)
    for options in ({"temperature": 0.0}, {"top_p": 1e-6}, {"do_sample": None, "temperature": 0.0}):
        assert generate(model, ["a small"], **options) == greedy
    assert generate(model, ["a small"], top_p=1.0) != greedy
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        model.engine.model.calls.clear()
        model.generate_until(requests(("a small", {"do_sample": True, "until": [], name: 3})))
        assert [call.kind for call in model.engine.model.calls] == ["prefill", *["decode"] * 3]
    generate(model, ["a small", "zwei"], top_k=5)
    assert [record.message for record in caplog.records if "top_k" in record.message] == [
        "the generation option top_k is not supported: it is ignored"
    ]


@given(st.text("a smldrwing", min_size=1, max_size=12), st.data())
@examples(20, quick=8)
def test_text_ends_before_a_stop_string_wherever_it_is_cut_into_tokens(context, data):
    model = HarnessModel(text_engine())
    (whole,) = generate(model, [context])
    if not whole:
        return
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
    assert generate(model, [context], until=["never there", stop]) == [whole[: whole.index(stop)]]
    assert not model.engine.sequences


def test_failed_text_is_not_a_short_text():
    """It is an error, and the other texts of the batch do not stay in the engine."""
    model = HarnessModel(text_engine())
    add_token, calls = model.engine._add_token, iter(range(100))
    model.engine._add_token = lambda *args: 1 / 0 if next(calls) == 2 else add_token(*args)
    with pytest.raises(RuntimeError, match="request 1 failed: ZeroDivisionError"):
        generate(model, ["a small", "zwei"], max_gen_toks=20)
    assert not model.engine.sequences


# Long texts


def sentencepiece_like() -> Tokenizer:
    """Like Llama 2's: a space before each text, which decoding removes. So decoding and encoding never ends in fewer ids."""
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    tokenizer.train_from_iterator(["a small drawing of a small house"] * 3, trainer)
    return Tokenizer.from_json(tokenizer.to_str())


TEXTS = {"words": "a small drawing of a house. " * 20, "lines": "\n" * 90, "digits": "12345 " * 30, "bytes": "é" * 90,
         "spaces": "   " * 60}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("max_gen_toks", [5, 100])
def test_prompt_longer_than_a_row_is_cut_by_ids(text, max_gen_toks):
    """It keeps the last ids: all that leave room for the answer, and at least half a row."""
    for tokenizer in (sentencepiece_like(), tiny.tokenizer()):
        model = HarnessModel(text_engine(context=40, text=tokenizer))
        generate(model, [text], max_gen_toks=max_gen_toks)
        read = model.engine.model.calls[0].tokens[0].tolist()
        expected = max(40 - max_gen_toks - 1, 20)
        assert read == [model.engine.vocabulary.bos, *tokenizer.encode(text)[-expected:]]
        num_tokens = sum(call.kind == "decode" for call in model.engine.model.calls)
        assert num_tokens == min(max_gen_toks, 40 - len(read))


def test_continuation_longer_than_a_row_is_scored_in_several_rows(caplog):
    short = tiny.build_engine(context=24)
    short.model = short.opened.model
    text = " drawing of a small house" * 3
    assert len(encode_pair(short, "", text)[1]) > 24
    (alone,), rolling = likelihoods(short, [("", text)]), rolling_likelihood(short, text)
    assert alone.log_probs == pytest.approx(rolling.log_probs, abs=1e-5)
    pairs = [("a small", text), ("a small", " house"), ("zwei", text)]
    together = likelihoods(short, pairs)
    for pair, result in zip(pairs, together, strict=True):
        assert len(result.log_probs) == len(encode_pair(short, *pair)[1])  # each token once
        assert result.log_probs == pytest.approx(likelihoods(short, [pair])[0].log_probs, abs=1e-5)
    values = HarnessModel(short).loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])
    assert [total for total, _ in values] == pytest.approx([result.total for result in together], abs=1e-4)
    assert [record.message for record in caplog.records] == [
        "2 of 3 continuations are longer than a row, 24 positions: each is scored in several rows"
    ]


# The same figures as lm_eval's own model of transformers


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[HarnessModel, LM]:
    """An exported run that started from a Llama, and lm_eval's model of the same weights: the run's rows of image tokens are
    added to the Llama, which is told not to write them."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("both")
    llama, written = folder / "llama", folder / "written"
    theirs = write_llama(llama, rows=262)
    tokenizer = HFTokenizer.from_file(str(llama / "tokenizer.json"))  # like Llama 3's: bos before each text
    tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 260)])
    tokenizer.save(str(llama / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (llama / "tokenizer_config.json").write_text(json.dumps(names))
    train(folder / "run", "--training.steps", 1, *NO_LEARNING, "--init-from", llama)
    engine = open_run(export(folder / "run", folder / "exported"), device="cpu")
    theirs.resize_token_embeddings(engine.vocabulary.size, mean_resizing=False)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[262:] = engine.opened.model.tokens.weight[262:]
        theirs.lm_head.weight[262:] = engine.opened.model.head.weight[262:]
    theirs.generation_config.suppress_tokens = [*range(262, engine.vocabulary.size)]
    theirs.save_pretrained(written)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (written / name).write_bytes((llama / name).read_bytes())
    options = {"device": "cpu", "dtype": "float32", "max_length": engine.max_positions, "batch_size": 3}
    return HarnessModel(engine), HFLM(str(written), **options)


PAIRS = [("a small", " house"), ("", "a house"), ("zwei kleine ", "Häuser"), ("a long " * 40, " house of")]


def test_loglikelihood_equals_that_of_transformers(both):
    """Also after an empty context, with a space at its end, and after one longer than a row."""
    ours, theirs = (model.loglikelihood(requests(*PAIRS, kind="loglikelihood")) for model in both)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    (greedy,) = both[0].generate_until(requests(("a small", GREEDY | {"max_gen_toks": 2})))
    pairs = requests(("a small", greedy), ("a small", " house"), kind="loglikelihood")
    assert [[is_greedy for _, is_greedy in model.loglikelihood(pairs)] for model in both] == [[True, False]] * 2


def test_rolling_loglikelihood_equals_that_of_transformers(both, monkeypatch):
    """With `add_bos_token=False`: by default lm_eval puts two bos before such a text, and scores the second."""
    ours, theirs = both
    texts = requests(("a small house",), ("é" * 150,), ("",), kind="loglikelihood_rolling")
    monkeypatch.setattr(theirs, "add_bos_token", False)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-4)


GREEDY = {"do_sample": False, "max_gen_toks": 24, "until": []}


def test_greedy_text_equals_that_of_transformers(both):
    """To the limit, and to a stop string that it has."""
    ours, theirs = both
    contexts = ["a small", "zwei", "q", "house house house"]
    whole = requests(*((context, GREEDY) for context in contexts))
    texts = ours.generate_until(whole)
    assert texts == theirs.generate_until(whole)
    assert min(map(len, texts)) > 8 and len(set(texts)) == len(texts)
    stops = [text[5:7] for text in texts]
    stopped = requests(*((context, GREEDY | {"until": [stop]}) for context, stop in zip(contexts, stops, strict=True)))
    expected = [text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)]
    assert ours.generate_until(stopped) == theirs.generate_until(stopped) == expected


# lm_eval's command line

TASKS = {
    "samples": {
        "output_type": "generate_until", "repeats": 4, "generation_kwargs": SAMPLED | {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "choices": {
        "output_type": "multiple_choice", "doc_to_choice": ["one", "two"], "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


def run_lm_eval(monkeypatch, folder, model_args: str, *options, defaults: bool = False) -> None:
    """Run lm_eval's command line in this process on two tasks of `folder`. `defaults`: first read the names of lm_eval's own
    14,000 tasks, as always; it takes 20 s."""
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in ("one", "two", "six")))
    for name, task in TASKS.items():
        values = {
            "task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_target": "{{question}}", **task,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # its handler would outlive this test
    if not defaults:
        manager = lm_eval.tasks.TaskManager
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    args = ["--model", "transfusion", "--model_args", model_args, "--batch_size", "auto"]
    tasks = ["--tasks", *(str(folder / f"{name}.yaml") for name in TASKS)]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *args, *tasks, *map(str, options)])
    harness.main()


def test_command_line_measures_a_run(monkeypatch, tmp_path, capsys, written):
    options = ("--num_fewshot", 1, "--limit", 2, "--output_path", tmp_path / "out", "--log_samples")
    run_lm_eval(monkeypatch, tmp_path, f"pretrained={written}", *options, defaults=THOROUGH)
    assert "samples" in capsys.readouterr().out
    (folder,) = (tmp_path / "out").iterdir()
    results = json.loads(next(folder.glob("results_*.json")).read_text())
    assert {name: results["n-samples"][name]["effective"] for name in TASKS} == {"samples": 2, "choices": 2}
    lines = next(folder.glob("samples_samples_*.jsonl")).read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [len(sample["resps"][0]) for sample in samples] == [4, 4]
    assert len({text for sample in samples for text in sample["resps"][0]}) > 4
    assert all("\n\n" in sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples)  # an example, and the question


@pytest.mark.parametrize(("options", "model_args", "words"), [
    (["--apply_chat_template"], "pretrained={run}", "that lm_eval can apply: leave out --apply_chat_template"),
    ([], "pretrained=nowhere", "nowhere is not a run: there is no such folder"), ([], "run=x", "run is unknown"),
    ([], "weights=raw", "--model_args needs pretrained=RUN"),
    (["--device", "toaster"], "pretrained={run}", "cannot compute on device 'toaster'"),
    (["--batch_size", "0"], "pretrained={run}", "--batch_size must be auto or at least 1, not 0"),
    (["--batch_size", "x"], "pretrained={run}", "--batch_size must be auto or at least 1, not x"),
    ([], "pretrained={run},weights=best", "weights must be ema or raw, not best"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(monkeypatch, tmp_path, written, options, model_args, words):
    with pytest.raises(SystemExit) as caught:
        run_lm_eval(monkeypatch, tmp_path, model_args.format(run=written), *options)
    assert words in str(caught.value)
    assert str(caught.value).startswith("transfusion: ")
    assert len(str(caught.value).splitlines()) == 1


def test_chat_templates_are_refused_in_python_too():
    model = HarnessModel(text_engine())
    for ask in (lambda: model.tokenizer_name, lambda: model.chat_template(True)):
        with pytest.raises(ValueError, match="a run has no chat template"):
            ask()
