"""Multiple choice by rank: of several continuations, is the right one the likeliest? (section 4.1: the suite of Llama)

A question is never answered in words: each choice is scored behind the same context, and the likeliest one is taken, by its
log probability and by that per byte (which does not favour short ones). The suite of Llama's seven tasks goes through
`lm_eval`; questions in a file, or made from held-out text, need nothing but the run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transfusion.evaluation.likelihood import likelihoods
from transfusion.inference.engine import Engine
from transfusion.seeding import derive_seed

# lm_eval's names, and the metric: by length, as Llama's paper (2302.13971) ranks, where lm_eval has that (for social_iqa it
# has not, of winogrande the scored text is the same for both choices, and boolq asks for yes or no).
LLAMA_SUITE = (
    ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("social_iqa", "acc"), ("winogrande", "acc"),
    ("arc_easy", "acc_norm"), ("arc_challenge", "acc_norm"), ("boolq", "acc"),
)  # fmt: skip
CONTEXT, CONTINUATION = 160, 60  # letters of a question that is made from text, about
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A context, continuations of it as they stand behind it (with the space before them), and which one is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def llama_suite(engine: Engine, limit: int | None = None) -> dict:
    """Accuracy on each of the seven tasks, no examples in the prompt, and their mean; `limit`: the first so many questions.

    The questions come from the hub. ValueError when `lm_eval` is not installed, or the hub cannot be reached.
    """
    try:
        from transfusion.evaluation.harness import evaluate_tasks
    except ImportError:
        raise ValueError("the suite of Llama needs lm_eval: pip install '.[lm-eval]' in a clone of the repository") from None
    found = evaluate_tasks(engine, [task for task, _ in LLAMA_SUITE], limit)
    shares = {task: float(found[task][metric]) for task, metric in LLAMA_SUITE}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def choose(engine: Engine, questions: Sequence[Question]) -> dict:
    """Shares of questions whose right choice is the likeliest, as a whole and per byte, and what a guess would have right.

    ValueError when there is no question, or a choice is longer than a row.
    """
    if not questions:
        raise ValueError("multiple choice needs at least one question")
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    scores = iter(it.total for it in likelihoods(engine, pairs))
    answers = []
    for number, question in enumerate(questions):
        nats = [next(scores) for _ in question.choices]
        per_byte = [score / len(choice.encode()) for score, choice in zip(nats, question.choices, strict=True)]
        answers.append({
            "question": number, "is": question.answer, "chosen": nats.index(max(nats)),
            "chosen_per_byte": per_byte.index(max(per_byte)), "nats": nats,
        })  # fmt: skip
    count = len(questions)
    return {
        "accuracy": sum(it["chosen"] == it["is"] for it in answers) / count,
        "accuracy_per_byte": sum(it["chosen_per_byte"] == it["is"] for it in answers) / count,
        "guessed": sum(1 / len(question.choices) for question in questions) / count,
        "count": count, "answers": answers,
    }  # fmt: skip


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines: {"context": text, "choices": [texts], "answer": n}, n from 0.

    With "question" instead of "context" the prompt is as lm_eval writes it: "Question: ...", and "Answer:" before a choice.
    ValueError names the file and the wrong line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"cannot read questions from {path}: {reason}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(_to_question(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{path}, line {number} is no question: it must be {{"context" or "question": text, "choices": [two or '
                f'more], "answer": the number of the right one, from 0}}, not {line[:80]}'
            ) from None
    return questions


def _to_question(values: dict) -> Question:
    """ValueError and its like when the values are no question."""
    asked = "question" in values
    context = f"Question: {values['question']}\nAnswer:" if asked else values["context"]
    choices, answer = values["choices"], values["answer"]
    texts = [values["question"] if asked else context, *choices]
    if not all(isinstance(text, str) for text in texts) or not all(choices) or len(choices) < 2 or type(choices) is not list:
        raise ValueError("texts are missing")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError("the answer is none of the choices")
    return Question(context, tuple(f" {choice}" if asked else choice for choice in choices), answer)


def continuation_questions(texts: Sequence[str], count: int) -> list[Question]:
    """At most `count` questions out of held-out texts: how does this passage go on? The others are how others go on.

    Passages of about 160 letters and continuations of about 60 stand side by side in a text, cut where a word begins.
    Which other passages, and the place of the right one among the choices, follow from the question's number.
    """
    passages = [found for text in texts for found in _passages(text)]
    endings = list(dict.fromkeys(ending for _, ending in passages))
    questions = []
    for number, (context, right) in enumerate(passages if len(endings) >= CHOICES else ()):
        others = sorted((ending for ending in endings if ending != right), key=lambda it: derive_seed("choices", number, it))
        answer = derive_seed("answer", number) % CHOICES
        choices = others[: CHOICES - 1]
        questions.append(Question(context, (*choices[:answer], right, *choices[answer:]), answer))
    return sorted(questions, key=lambda it: derive_seed("questions", it.context))[:count]


def _passages(text: str) -> list[tuple[str, str]]:
    """(context, continuation) side by side; the rest of the text is too short for another pair."""
    found, begin = [], 0
    while (middle := text.find(" ", begin + CONTEXT)) >= 0 and (end := text.find(" ", middle + CONTINUATION)) >= 0:
        found.append((text[begin:middle], text[middle:end]))
        begin = end
    return found
