"""Multiple choice by likelihood (the paper's section 4.1: the Llama evaluation suite).

Nothing is generated: each choice is scored as a continuation of the same context. The answer is the choice with the highest
log probability, or, without favouring short ones, the highest log probability per byte. The seven tasks of the Llama suite
use `lm_eval`; questions from a file or from held-out text need only the run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transfusion.evaluation.likelihood import likelihoods
from transfusion.inference.engine import Engine
from transfusion.seeding import derive_seed

# (task, metric) in lm_eval. Normalised by length as in Llama's paper (2302.13971) where possible: lm_eval lacks it for
# social_iqa, winogrande scores the same text for both choices, and boolq's choices are yes and no.
LLAMA_SUITE = (
    ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("social_iqa", "acc"), ("winogrande", "acc"),
    ("arc_easy", "acc_norm"), ("arc_challenge", "acc_norm"), ("boolq", "acc"),
)  # fmt: skip
CONTEXT_SIZE, CONTINUATION_SIZE = 160, 60  # characters of a question from held-out text, approximately
NUM_CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations (each with its leading space), and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def llama_suite(engine: Engine, limit: int | None = None) -> dict:
    """Zero-shot accuracy on each of the seven tasks, and their mean. `limit`: the number of questions per task. The
    questions come from the hub. ValueError if `lm_eval` is not installed or the hub cannot be reached."""
    try:
        from transfusion.evaluation.harness import evaluate_tasks
    except ImportError:
        raise ValueError("the Llama suite needs lm_eval: pip install '.[lm-eval]' in a clone of the repository") from None
    results = evaluate_tasks(engine, [task for task, _ in LLAMA_SUITE], limit)
    accuracies = {task: float(results[task][metric]) for task, metric in LLAMA_SUITE}
    return accuracies | {"mean": sum(accuracies.values()) / len(accuracies)}


def answer_questions(engine: Engine, questions: Sequence[Question]) -> dict:
    """Accuracy by log probability and by log probability per byte, and the accuracy of a random guess. ValueError without a
    question, or if a choice is longer than a row."""
    if not questions:
        raise ValueError("multiple choice needs at least one question")
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    totals = iter(likelihood.total for likelihood in likelihoods(engine, pairs))
    answers = []
    for number, question in enumerate(questions):
        nats = [next(totals) for _ in question.choices]
        per_byte = [total / len(choice.encode()) for total, choice in zip(nats, question.choices, strict=True)]
        answers.append({
            "question": number, "reference": question.answer, "chosen": nats.index(max(nats)),
            "chosen_per_byte": per_byte.index(max(per_byte)), "nats": nats,
        })  # fmt: skip
    count = len(questions)
    return {
        "accuracy": sum(it["chosen"] == it["reference"] for it in answers) / count,
        "accuracy_per_byte": sum(it["chosen_per_byte"] == it["reference"] for it in answers) / count,
        "guessed": sum(1 / len(question.choices) for question in questions) / count,
        "count": count, "answers": answers,
    }  # fmt: skip


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines: {"context": text, "choices": [texts], "answer": n}, n from 0. With "question" instead of
    "context" the prompt has lm_eval's format: "Question: ...", and "Answer:" before the choice. ValueError names the file
    and the wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read questions from {path}: {reason}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(_to_question(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{path}, line {number} is not a question: it must be {{"context" or "question": text, "choices": [two or '
                f'more], "answer": the number of the right one, from 0}}, not {line[:80]}'
            ) from None
    return questions


def _to_question(values: dict) -> Question:
    """ValueError, KeyError, ... if the values are not a question."""
    has_question = "question" in values
    context = f"Question: {values['question']}\nAnswer:" if has_question else values["context"]
    choices, answer = values["choices"], values["answer"]
    texts = [values["question"] if has_question else context, *choices]
    if not all(isinstance(text, str) for text in texts) or not all(choices) or len(choices) < 2 or type(choices) is not list:
        raise ValueError("texts are missing")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError("the answer is not the number of a choice")
    return Question(context, tuple(f" {choice}" if has_question else choice for choice in choices), answer)


def continuation_questions(texts: Sequence[str], count: int) -> list[Question]:
    """At most `count` questions from held-out texts: which continuation belongs to this passage? A passage has about 160
    characters and its continuation about 60; both end at a word boundary. The wrong choices are continuations of other
    passages. They and the position of the right one are a function of the question's number."""
    passages = [passage for text in texts for passage in _passages(text)]
    endings = list(dict.fromkeys(ending for _, ending in passages))
    questions = []
    for number, (context, right) in enumerate(passages if len(endings) >= NUM_CHOICES else ()):
        others = sorted((ending for ending in endings if ending != right), key=lambda it: derive_seed("choices", number, it))
        answer = derive_seed("answer", number) % NUM_CHOICES
        choices = others[: NUM_CHOICES - 1]
        questions.append(Question(context, (*choices[:answer], right, *choices[answer:]), answer))
    return sorted(questions, key=lambda it: derive_seed("questions", it.context))[:count]


def _passages(text: str) -> list[tuple[str, str]]:
    """Consecutive (context, continuation) pairs; the rest of the text is too short for another pair."""
    pairs, begin = [], 0
    while (middle := text.find(" ", begin + CONTEXT_SIZE)) >= 0 and (end := text.find(" ", middle + CONTINUATION_SIZE)) >= 0:
        pairs.append((text[begin:middle], text[middle:end]))
        begin = end
    return pairs
