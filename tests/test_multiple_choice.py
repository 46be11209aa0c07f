"""Multiple choice: log probabilities equal a plain forward pass and lm_eval; accuracies are counted by hand."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tests import tiny
from tests.documents import with_all_logits
from tests.profile import examples
from transfusion import objective
from transfusion.data.built_in.topics import Topics
from transfusion.evaluation import harness, likelihood
from transfusion.evaluation.harness import HarnessModel, evaluate_tasks
from transfusion.evaluation.likelihood import encode_pair, likelihoods, rolling_likelihood
from transfusion.evaluation.multiple_choice import (
    LLAMA_SUITE,
    Question,
    answer_questions,
    continuation_questions,
    llama_suite,
    read_questions,
)
from transfusion.inference.engine import Engine
from transfusion.sequence import Chunk, Row, collate

few = examples(15)
words = st.text("a smldrwing é<>", max_size=30)
some_words = st.text("a smldrwing é<>", min_size=1, max_size=12)


def engine(context: int = 200, **options) -> Engine:
    """A tiny engine with the plain model, which records nothing."""
    plain = tiny.build_engine(context=context, **options)
    plain.model = plain.opened.model
    return plain


ENGINE, SHORT = engine(), engine(context=24)


@torch.no_grad()
def log_probs_after(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Log probabilities (L, V) after each id, the first at position 0, from one forward pass."""
    no_target = np.full(len(ids), -1)
    chunk = Chunk(np.array(ids), no_target, (), no_target > 0, np.zeros((len(ids), 2), np.int32))
    batch = with_all_logits(collate([Row((chunk,))], len(ids), engine.vocabulary))
    return engine.model(batch, [], []).logits.log_softmax(-1)


def argmax(engine: Engine, log_probs: torch.Tensor) -> list[int]:
    """The tokens of greedy decoding."""
    return log_probs.masked_fill(~engine.allowed_tokens, -torch.inf).argmax(-1).tolist()


# A continuation's log probability


@given(words, some_words)
@few
def test_log_probs_equal_a_plain_forward_pass(context, continuation):
    before, after = encode_pair(ENGINE, context, continuation)
    log_probs = log_probs_after(ENGINE, [ENGINE.vocabulary.bos, *before, *after])[len(before) : -1]
    (result,) = likelihoods(ENGINE, [(context, continuation)])
    expected = [float(row[token]) for row, token in zip(log_probs, after, strict=True)]
    assert result.log_probs == pytest.approx(expected, abs=1e-5)
    assert result.total == pytest.approx(math.fsum(expected), abs=1e-4)
    assert result.is_greedy == (argmax(ENGINE, log_probs) == list(after))


@given(st.lists(st.tuples(words, some_words), min_size=2, max_size=7), st.integers(1, 90), st.integers(1, 20))
@few
def test_batches_and_chunks_of_logits_do_not_change_log_probs(pairs, max_positions, chunk):
    alone = [likelihoods(ENGINE, [pair])[0] for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "MAX_POSITIONS", max_positions)
        patch.setattr(objective, "CPU_CHUNK", chunk)
        together = likelihoods(ENGINE, pairs)
    for single, batched in zip(alone, together, strict=True):
        assert single.log_probs == pytest.approx(batched.log_probs, abs=1e-5)
        assert single.is_greedy == batched.is_greedy


def test_rows_of_equal_length_share_a_forward_pass():
    calls = []

    class CountingEngine(Engine):
        def __init__(self, engine):
            self.__dict__ = dict(vars(engine))
            self.model = lambda batch, *rest: calls.append(tuple(batch.tokens.shape)) or engine.model(batch, *rest)

    pairs = [("a", "b" * n) for n in (3, 9, 3, 9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "MAX_POSITIONS", 20)
        likelihoods(CountingEngine(ENGINE), pairs)
    assert calls == [(2, 10), (2, 4)]


@given(words, words)
def test_encode_pair_keeps_every_token_once(context, continuation):
    before, after = encode_pair(ENGINE, context, continuation)
    tokenizer = ENGINE.opened.tokenizer
    assert before + after == tokenizer.encode(context + continuation)
    assert context.startswith(tokenizer.decode(before).rstrip("\ufffd"))
    assert after or not continuation


def test_space_belongs_to_the_next_word():
    encode = ENGINE.opened.tokenizer.encode
    expected = encode("a small"), encode(" house")
    assert encode_pair(ENGINE, "a small ", "house") == encode_pair(ENGINE, "a small", " house") == expected


def test_is_greedy_is_true_for_greedy_text_only():
    """With only some characters allowed: the most likely one at each step."""
    limited = engine()
    characters = {limited.opened.tokenizer.encode(character)[0]: character for character in "bqxyjv"}
    limited.allowed_tokens = torch.zeros_like(limited.allowed_tokens)
    limited.allowed_tokens[list(characters)] = True
    ids = [limited.vocabulary.bos, *limited.opened.tokenizer.encode("a small")]
    text = ""
    for _ in range(4):
        ids.append(argmax(limited, log_probs_after(limited, ids))[-1])
        text += characters[ids[-1]]
    results = likelihoods(limited, [("a small", text), ("a small", text[:-1] + "m")])
    assert [result.is_greedy for result in results] == [True, False]


# Equality with lm_eval


class ReferenceModel(TemplateLM):
    """lm_eval's own handling of texts, with a plain forward pass for each request."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    eot_token_id = property(lambda self: self.engine.vocabulary.bos)  # in place of an empty context

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return list(self.engine.opened.tokenizer.encode(string))

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [self.score([self.eot_token_id, *before] if before != [self.eot_token_id] else before, after)
                for _, before, after in requests]  # fmt: skip

    def score(self, before, after):
        ids = (before + after)[-(self.engine.max_positions + 1) :][:-1]
        log_probs = log_probs_after(self.engine, ids)[-len(after) :]
        total = sum(float(row[token]) for row, token in zip(log_probs, after, strict=True))
        return total, argmax(self.engine, log_probs) == after

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        totals = []
        for request in requests:
            ids = self.tok_encode(*request.args)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.engine.max_positions, context_len=1)
            totals.append(sum(self.score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def instances(request_type: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type, {}, args, n) for n, args in enumerate(arguments)]


@given(st.lists(st.tuples(words, st.text("bq xyjv", min_size=1, max_size=12).map(" {}".format)), min_size=1, max_size=5))
@few
def test_loglikelihood_equals_lm_eval(pairs):
    """Rows of 24: contexts of up to 60 bytes are truncated on the left, bos first."""
    requests = instances("loglikelihood", pairs)
    ours = HarnessModel(SHORT).loglikelihood(requests)
    theirs = ReferenceModel(SHORT).loglikelihood(requests, disable_tqdm=True)
    for (total, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert (total, greedy) == (pytest.approx(expected, abs=1e-4), expected_greedy)


@given(st.text("a smldrwing é<>", max_size=90))
@few
def test_loglikelihood_rolling_equals_lm_eval(text):
    requests = instances("loglikelihood_rolling", [(text,)])
    (ours,) = HarnessModel(SHORT).loglikelihood_rolling(requests)
    (theirs,) = ReferenceModel(SHORT).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(rolling_likelihood(SHORT, text).log_probs) == len(SHORT.opened.tokenizer.encode(text))


def engine_that_writes(text: str, **options) -> Engine:
    """After each character of `text` the engine generates the next one; after the last one it begins an image."""
    forced = tiny.build_engine(**options)
    encode, vocabulary = forced.opened.tokenizer.encode, forced.vocabulary
    ids = [encode(character)[0] for character in text]
    following = dict(zip(ids, [*ids[1:], next(iter(vocabulary.boi.values()))], strict=True))
    plain = forced.opened.model

    def forward_cached(tokens, position_ids, mask, cache, text_index, *rest):
        prediction = plain.forward_cached(tokens, position_ids, mask, cache, text_index, *rest)
        for row, token in enumerate(tokens.reshape(-1)[text_index].tolist()):
            prediction.logits[row, following.get(token, vocabulary.eos)] += 1e4
        return prediction

    forced.model = SimpleNamespace(forward_cached=forward_cached, config=plain.config)
    return forced


@pytest.mark.parametrize(("options", "expected"), [
    ({"until": ["\n"]}, "qxyjv"), ({"until": ["y"]}, "qx"), ({"until": ["jv", "xy"]}, "q"), ({"until": "v"}, "qxyj"),
    ({"until": ["y", "xy"]}, "q"),
    ({"until": [], "max_gen_toks": 3}, "qxy"), ({"until": ["yj"], "do_sample": False, "temperature": 0.7}, "qx"),
    ({}, "qxyjv"), ({"until": [""]}, "qxyjv"), ({"do_sample": True}, "qxyjv"),
])  # fmt: skip
def test_generate_until_ends_at_a_stop_string_an_image_or_the_limit(options, expected):
    model = HarnessModel(engine_that_writes("bqxyjv"))
    requests = instances("generate_until", [("a b", options), ("a house", options), ("b", options)])
    assert model.generate_until(requests) == [expected, "", expected]
    assert not model.engine.sequences


def test_long_prompt_is_truncated_on_the_left():
    model = HarnessModel(engine_that_writes("bqxyjv", context=24))
    (text,) = model.generate_until(instances("generate_until", [("é" * 40 + "b", {"until": ["j"], "max_gen_toks": 20})]))
    assert text == "qxy"
    assert len(model.engine.cache.lengths) and not model.engine.sequences


DOCUMENTS = [
    {"context": "a small", "choices": [" house", " drawing of a small house"], "answer": 0},
    {"context": "zwei", "choices": [" kleine Häuser", " small", " drawing"], "answer": 2},
    {"context": "a drawing of", "choices": ["q", " small house"], "answer": 1},
]


def test_lm_eval_and_the_built_in_metric_agree(tmp_path, monkeypatch):
    """lm_eval's `simple_evaluate` on a small task from a file; its acc_bytes is our accuracy per byte."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    task = {
        "task": "small", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_bytes")],
    }  # fmt: skip
    ours = answer_questions(ENGINE, read_questions(path))
    theirs = evaluate_tasks(ENGINE, [task])["small"]
    assert (theirs["acc"], theirs["acc_bytes"]) == (ours["accuracy"], ours["accuracy_per_byte"])
    assert ours["accuracy"] != ours["accuracy_per_byte"]
    assert evaluate_tasks(ENGINE, [task], limit=1)["small"]["acc"] == (ours["answers"][0]["chosen"] == 0)


def test_llama_suite_is_seven_tasks_and_their_mean(monkeypatch):
    calls = []

    def fake(engine, tasks, limit):
        calls.append((tasks, limit))
        return {task: {"acc": n / 10, "acc_norm": n / 5} for n, task in enumerate(tasks)}

    monkeypatch.setattr(harness, "evaluate_tasks", fake)
    values = llama_suite(ENGINE, limit=5)
    assert calls == [([task for task, _ in LLAMA_SUITE], 5)]
    assert values == pytest.approx({"hellaswag": 0, "piqa": 0.2, "social_iqa": 0.2, "winogrande": 0.3, "arc_easy": 0.8,
                                    "arc_challenge": 1.0, "boolq": 0.6, "mean": 3.1 / 7})  # fmt: skip


@pytest.mark.parametrize(("folder", "task", "metric"), [
    ("hellaswag", *LLAMA_SUITE[0]), ("piqa", *LLAMA_SUITE[1]), ("siqa", *LLAMA_SUITE[2]), ("winogrande", *LLAMA_SUITE[3]),
    ("arc", *LLAMA_SUITE[4]), ("arc", *LLAMA_SUITE[5]), ("super_glue/boolq", *LLAMA_SUITE[6]),
])  # fmt: skip
def test_lm_eval_has_the_llama_tasks_and_metrics(folder, task, metric):
    """Searched in its files: loading them all with lm_eval takes longer than the rest of this file."""
    files = (Path(lm_eval.__file__).parent / "tasks" / folder).glob("*.yaml")
    config = next(text for text in (file.read_text() for file in files) if re.search(rf"^task: {task}$", text, re.MULTILINE))
    assert f"metric: {metric}\n" in config or "include: arc_easy.yaml" in config


def test_missing_lm_eval_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "transfusion.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"needs lm_eval: pip install '.\[lm-eval\]'"):
        llama_suite(ENGINE)


def test_unreachable_hub_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\nand much more")

    monkeypatch.setattr(harness, "simple_evaluate", unreachable)
    with pytest.raises(ValueError, match=r"cannot load its questions: Couldn't reach 'Rowan/hellaswag' on the Hub$"):
        evaluate_tasks(ENGINE, [{"task": "hellaswag"}])


# The built-in metric


def test_most_likely_choice_in_total_and_per_byte():
    questions = [Question(document["context"], tuple(document["choices"]), document["answer"]) for document in DOCUMENTS]
    results = answer_questions(ENGINE, questions)
    for question, answer in zip(questions, results["answers"], strict=True):
        nats = [likelihoods(ENGINE, [(question.context, choice)])[0].total for choice in question.choices]
        assert answer["nats"] == pytest.approx(nats, abs=1e-4)
        assert answer["chosen"] == int(np.argmax(nats))
        per_byte = [total / len(choice.encode()) for total, choice in zip(nats, question.choices, strict=True)]
        assert answer["chosen_per_byte"] == int(np.argmax(per_byte))
    assert results["accuracy"] == sum(answer["chosen"] == answer["reference"] for answer in results["answers"]) / 3
    assert results["guessed"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert results["count"] == 3
    assert (results["answers"][2]["chosen"], results["answers"][2]["chosen_per_byte"]) == (0, 1)  # the total favours short


def test_no_question_is_refused():
    with pytest.raises(ValueError, match="at least one question"):
        answer_questions(ENGINE, [])


def test_questions_are_read_from_json_lines(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a", "choices": [" b", "c"], "answer": 1}\n'
                    '{"question": "Why?", "choices": ["So.", "No."], "answer": 0}\n')  # fmt: skip
    assert read_questions(path) == [
        Question("a", (" b", "c"), 1), Question("Question: Why?\nAnswer:", (" So.", " No."), 0),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [
    "", "{", "[1]", "7", '{"choices": ["a", "b"], "answer": 0}', '{"context": "a", "choices": ["a"], "answer": 0}',
    '{"context": "a", "choices": ["a", "b"], "answer": 2}', '{"context": "a", "choices": ["a", "b"], "answer": "a"}',
    '{"context": "a", "choices": ["a", "b"], "answer": -1}', '{"context": "a", "choices": ["a", ""], "answer": 0}',
    '{"context": "a", "choices": "ab", "answer": 0}', '{"context": 1, "choices": ["a", "b"], "answer": 0}',
    '{"context": "a", "choices": ["a", 2], "answer": 0}', '{"question": null, "choices": ["a", "b"], "answer": 0}',
    '{"context": "a", "choices": ["a", "b"], "answer": true}',
])  # fmt: skip
def test_wrong_line_is_named(tmp_path, wrong):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + wrong + "\n")
    with pytest.raises(ValueError, match="questions.jsonl, line 2 is not a question"):
        read_questions(path)


def test_missing_questions_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot read questions from .*: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_questions_from_held_out_text():
    texts = Topics("heldout").texts
    questions = continuation_questions(texts, 1000)
    assert len(questions) > 60
    assert questions[:10] == continuation_questions(texts, 10)
    right = [question.context + question.choices[question.answer] for question in questions]
    assert all(any(passage in text for text in texts) for passage in right)
    assert len(set(right)) == len(right)
    for question in questions:
        assert len(set(question.choices)) == 4
        wrong = [question.context + choice for n, choice in enumerate(question.choices) if n != question.answer]
        assert not any(passage in text for passage in wrong for text in texts)
    assert {question.answer for question in questions} == {0, 1, 2, 3}


def test_short_texts_give_no_question():
    assert continuation_questions(["a few words", "and a few more"], 5) == []
