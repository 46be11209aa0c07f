"""Multiple choice: log probabilities equal a plain forward pass and lm_eval's arithmetic; the rest is counted by hand."""

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
from transfusion.data.built_in.topics import Topics
from transfusion.evaluation import harness, likelihood
from transfusion.evaluation.harness import HarnessModel, evaluate_tasks
from transfusion.evaluation.likelihood import likelihoods, rolling_likelihood, split
from transfusion.evaluation.multiple_choice import (
    LLAMA_SUITE,
    Question,
    choose,
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
    """A tiny one whose model keeps no notes."""
    found = tiny.engine(context=context, **options)
    found.model = found.opened.model
    return found


ENGINE, SHORT = engine(), engine(context=24)


@torch.no_grad()
def said_after(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Log probabilities (L, V) after each of these ids, the first at position 0, by one forward pass over all of them."""
    nothing = np.full(len(ids), -1)
    chunk = Chunk(np.array(ids), nothing, (), nothing > 0)
    batch = with_all_logits(collate([Row((chunk,))], len(ids), engine.vocabulary))
    return engine.model(batch, [], []).logits.log_softmax(-1)


def argmax(engine: Engine, said: torch.Tensor) -> list[int]:
    """What greedy writing takes."""
    return said.masked_fill(~engine.allowed_tokens, -torch.inf).argmax(-1).tolist()


# A continuation's log probability


@given(words, some_words)
@few
def test_every_token_is_that_of_a_plain_forward_pass(context, continuation):
    before, after = split(ENGINE, context, continuation)
    said = said_after(ENGINE, [ENGINE.vocabulary.bos, *before, *after])[len(before) : -1]
    (found,) = likelihoods(ENGINE, [(context, continuation)])
    expected = [float(of[token]) for of, token in zip(said, after, strict=True)]
    assert found.tokens == pytest.approx(expected, abs=1e-5)
    assert found.total == pytest.approx(math.fsum(expected), abs=1e-4)
    assert found.is_greedy == (argmax(ENGINE, said) == list(after))


@given(st.lists(st.tuples(words, some_words), min_size=2, max_size=7), st.integers(1, 90))
@few
def test_alone_or_in_a_batch_it_is_the_same(pairs, positions):
    alone = [likelihoods(ENGINE, [pair])[0] for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "POSITIONS", positions)
        together = likelihoods(ENGINE, pairs)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == pytest.approx(other.tokens, abs=1e-5)
        assert one.is_greedy == other.is_greedy


def test_rows_of_one_length_share_a_forward_pass():
    calls = []

    class Counted(Engine):
        def __init__(self, other):
            self.__dict__ = dict(vars(other))
            self.model = lambda batch, *rest: calls.append(tuple(batch.tokens.shape)) or other.model(batch, *rest)

    pairs = [("a", "b" * n) for n in (3, 9, 3, 9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "POSITIONS", 20)
        likelihoods(Counted(ENGINE), pairs)
    assert calls == [(2, 10), (2, 4)]


@given(words, words)
def test_nothing_is_lost_or_scored_twice_where_a_text_is_split(context, continuation):
    before, after = split(ENGINE, context, continuation)
    tokenizer = ENGINE.opened.tokenizer
    assert before + after == tokenizer.encode(context + continuation)
    assert context.startswith(tokenizer.decode(before).rstrip("\ufffd"))
    assert after or not continuation


def test_a_space_goes_with_the_word_behind_it():
    encode = ENGINE.opened.tokenizer.encode
    assert split(ENGINE, "a small ", "house") == split(ENGINE, "a small", " house") == (encode("a small"), encode(" house"))


def test_greedy_writing_is_known_when_it_is_met():
    """Where only some letters may be written, the likeliest of them one after another."""
    limited = engine()
    letters = {limited.opened.tokenizer.encode(letter)[0]: letter for letter in "bqxyjv"}
    limited.allowed_tokens = torch.zeros_like(limited.allowed_tokens)
    limited.allowed_tokens[list(letters)] = True
    ids = [limited.vocabulary.bos, *limited.opened.tokenizer.encode("a small")]
    text = ""
    for _ in range(4):
        ids.append(argmax(limited, said_after(limited, ids))[-1])
        text += letters[ids[-1]]
    found = likelihoods(limited, [("a small", text), ("a small", text[:-1] + "m")])
    assert [it.is_greedy for it in found] == [True, False]


def test_a_continuation_that_no_row_holds_is_told():
    assert len(likelihoods(SHORT, [("", "x" * 24)])[0].tokens) == 24
    with pytest.raises(ValueError, match="a continuation of 25 tokens is longer than a row of this run, 24"):
        likelihoods(SHORT, [("", "x" * 25)])


# As the harness does it


class Plain(TemplateLM):
    """The harness's own handling of texts, around plain forward passes of one request at a time."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    eot_token_id = property(lambda self: self.engine.vocabulary.bos)  # stands before an empty context

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return list(self.engine.opened.tokenizer.encode(string))

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [self.score([self.eot_token_id, *before] if before != [self.eot_token_id] else before, after)
                for _, before, after in requests]  # fmt: skip

    def score(self, before, after):
        kept = (before + after)[-(self.engine.context + 1) :][:-1]
        said = said_after(self.engine, kept)[-len(after) :]
        total = sum(float(of[token]) for of, token in zip(said, after, strict=True))
        return total, argmax(self.engine, said) == after

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        found = []
        for request in requests:
            ids = self.tok_encode(*request.args)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.engine.context, context_len=1)
            found.append(sum(self.score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


@given(st.lists(st.tuples(words, st.text("bq xyjv", min_size=1, max_size=12).map(" {}".format)), min_size=1, max_size=5))
@few
def test_requests_of_any_length_are_cut_and_scored_as_lm_eval_does(pairs):
    """Rows of 24: contexts of up to 60 bytes lose their beginnings, bos first."""
    asked = instances("loglikelihood", pairs)
    mine, plain = HarnessModel(SHORT).loglikelihood(asked), Plain(SHORT).loglikelihood(asked, disable_tqdm=True)
    for (total, greedy), (expected, expected_greedy) in zip(mine, plain, strict=True):
        assert (total, greedy) == (pytest.approx(expected, abs=1e-4), expected_greedy)


@given(st.text("a smldrwing é<>", max_size=90))
@few
def test_whole_texts_roll_by_as_in_lm_eval(text):
    asked = instances("loglikelihood_rolling", [(text,)])
    (mine,), (plain,) = HarnessModel(SHORT).loglikelihood_rolling(asked), Plain(SHORT).loglikelihood_rolling(asked)
    assert mine == pytest.approx(plain, abs=1e-3)
    assert len(rolling_likelihood(SHORT, text).tokens) == len(SHORT.opened.tokenizer.encode(text))


def writes(text: str, **options) -> Engine:
    """An engine that goes on with the next letter of this text behind each letter; behind the last one it wants to draw."""
    found = tiny.engine(**options)
    encode, vocabulary = found.opened.tokenizer.encode, found.vocabulary
    ids = [encode(letter)[0] for letter in text]
    following = dict(zip(ids, [*ids[1:], next(iter(vocabulary.boi.values()))], strict=True))
    plain = found.opened.model

    def forward_cached(tokens, position_ids, mask, cache, text_index, *rest):
        prediction = plain.forward_cached(tokens, position_ids, mask, cache, text_index, *rest)
        for row, token in enumerate(tokens.reshape(-1)[text_index].tolist()):
            prediction.logits[row, following.get(token, vocabulary.eos)] += 1e4
        return prediction

    found.model = SimpleNamespace(forward_cached=forward_cached, config=plain.config)
    return found


@pytest.mark.parametrize(("values", "written"), [
    ({"until": ["\n"]}, "qxyjv"), ({"until": ["y"]}, "qx"), ({"until": ["jv", "xy"]}, "q"), ({"until": "v"}, "qxyj"),
    ({"until": [], "max_gen_toks": 3}, "qxy"), ({"until": ["yj"], "do_sample": False, "temperature": 0.7}, "qx"),
    ({}, "qxyjv"), ({"until": [""]}, "qxyjv"), ({"do_sample": True}, "qxyjv"),
])  # fmt: skip
def test_it_writes_until_a_stop_a_drawing_or_the_length(values, written):
    model = HarnessModel(writes("bqxyjv"))
    asked = instances("generate_until", [("a b", values), ("a house", values), ("b", values)])
    assert model.generate_until(asked) == [written, "", written]
    assert not model.engine.sequences


def test_a_prompt_that_is_too_long_loses_its_beginning():
    model = HarnessModel(writes("bqxyjv", context=24))
    (text,) = model.generate_until(instances("generate_until", [("é" * 40 + "b", {"until": ["j"], "max_gen_toks": 20})]))
    assert text == "qxy"
    assert len(model.engine.cache.lengths) and not model.engine.sequences


DOCUMENTS = [
    {"context": "a small", "choices": [" house", " drawing of a small house"], "answer": 0},
    {"context": "zwei", "choices": [" kleine Häuser", " small", " drawing"], "answer": 2},
    {"context": "a drawing of", "choices": ["q", " small house"], "answer": 1},
]


def test_lm_eval_and_the_built_in_measure_agree(tmp_path, monkeypatch):
    """lm_eval's own `simple_evaluate` on a small task in a file; acc_bytes is what we call per byte."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    task = {
        "task": "small", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_bytes")],
    }  # fmt: skip
    mine = choose(ENGINE, read_questions(path))
    found = evaluate_tasks(ENGINE, [task])["small"]
    assert (found["acc"], found["acc_bytes"]) == (mine["accuracy"], mine["accuracy_per_byte"])
    assert mine["accuracy"] != mine["accuracy_per_byte"]
    assert evaluate_tasks(ENGINE, [task], limit=1)["small"]["acc"] == (mine["answers"][0]["chosen"] == 0)


def test_the_suite_of_llama_is_seven_tasks_and_their_mean(monkeypatch):
    asked = []

    def found(engine, tasks, limit):
        asked.append((tasks, limit))
        return {task: {"acc": n / 10, "acc_norm": n / 5} for n, task in enumerate(tasks)}

    monkeypatch.setattr(harness, "evaluate_tasks", found)
    values = llama_suite(ENGINE, limit=5)
    assert asked == [([task for task, _ in LLAMA_SUITE], 5)]
    assert values == pytest.approx({"hellaswag": 0, "piqa": 0.2, "social_iqa": 0.2, "winogrande": 0.3, "arc_easy": 0.8,
                                    "arc_challenge": 1.0, "boolq": 0.6, "mean": 3.1 / 7})  # fmt: skip


@pytest.mark.parametrize(("folder", "task", "metric"), [
    ("hellaswag", *LLAMA_SUITE[0]), ("piqa", *LLAMA_SUITE[1]), ("siqa", *LLAMA_SUITE[2]), ("winogrande", *LLAMA_SUITE[3]),
    ("arc", *LLAMA_SUITE[4]), ("arc", *LLAMA_SUITE[5]), ("super_glue/boolq", *LLAMA_SUITE[6]),
])  # fmt: skip
def test_lm_eval_has_these_tasks_and_metrics(folder, task, metric):
    """Looked up in its files: to have it read all of them takes longer than the rest of this file."""
    files = (Path(lm_eval.__file__).parent / "tasks" / folder).glob("*.yaml")
    found = next(text for text in (file.read_text() for file in files) if re.search(rf"^task: {task}$", text, re.MULTILINE))
    assert f"metric: {metric}\n" in found or "include: arc_easy.yaml" in found


def test_without_lm_eval_it_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "transfusion.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"needs lm_eval: pip install '.\[lm-eval\]'"):
        llama_suite(ENGINE)


def test_no_way_to_the_questions_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\nand much more")

    monkeypatch.setattr(harness, "simple_evaluate", unreachable)
    with pytest.raises(ValueError, match=r"cannot load its questions: Couldn't reach 'Rowan/hellaswag' on the Hub$"):
        evaluate_tasks(ENGINE, [{"task": "hellaswag"}])


# The built-in measure


def test_the_likeliest_choice_is_chosen_by_sum_and_by_byte():
    questions = [Question(it["context"], tuple(it["choices"]), it["answer"]) for it in DOCUMENTS]
    found = choose(ENGINE, questions)
    for question, answer in zip(questions, found["answers"], strict=True):
        nats = [likelihoods(ENGINE, [(question.context, choice)])[0].total for choice in question.choices]
        assert answer["nats"] == pytest.approx(nats, abs=1e-4)
        assert answer["chosen"] == int(np.argmax(nats))
        per_byte = [score / len(choice.encode()) for score, choice in zip(nats, question.choices, strict=True)]
        assert answer["chosen_per_byte"] == int(np.argmax(per_byte))
    assert found["accuracy"] == sum(it["chosen"] == it["is"] for it in found["answers"]) / 3
    assert found["guessed"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert found["count"] == 3
    assert (found["answers"][2]["chosen"], found["answers"][2]["chosen_per_byte"]) == (0, 1)  # the sum likes what is short


def test_no_question_is_told():
    with pytest.raises(ValueError, match="at least one question"):
        choose(ENGINE, [])


def test_questions_are_read_from_lines_of_json(tmp_path):
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
def test_a_line_that_is_no_question_is_named(tmp_path, wrong):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + wrong + "\n")
    with pytest.raises(ValueError, match="questions.jsonl, line 2 is no question"):
        read_questions(path)


def test_no_file_of_questions_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot read questions from .*: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_held_out_text_makes_questions_of_its_own():
    texts = Topics("heldout").texts
    questions = continuation_questions(texts, 1000)
    assert len(questions) > 60
    assert questions[:10] == continuation_questions(texts, 10)
    right = [question.context + question.choices[question.answer] for question in questions]
    assert all(any(passage in text for text in texts) for passage in right)
    assert len(set(right)) == len(right)
    for question in questions:
        assert len(set(question.choices)) == 4
        wrong = [question.context + it for n, it in enumerate(question.choices) if n != question.answer]
        assert not any(passage in text for passage in wrong for text in texts)
    assert {question.answer for question in questions} == {0, 1, 2, 3}


def test_too_little_text_makes_no_question():
    assert continuation_questions(["a few words", "and a few more"], 5) == []
