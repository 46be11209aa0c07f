"""A run as EleutherAI's harness (`lm_eval`) sees a language model: any of its tasks of text can be asked of it.

Imported only where the harness is asked for: it is an extra, `pip install '.[lm-eval]'` in a clone of the repository.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from transfusion.evaluation.likelihood import likelihoods, rolling_likelihood
from transfusion.inference.engine import Engine, ImageEvent, PreviewEvent, Request, TokenEvent

AT_ONCE = 16  # texts that are written together


def evaluate_tasks(engine: Engine, tasks: Sequence[str | dict], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """What the harness finds, without examples in the prompt: task -> metric -> value. `limit`: the first so many questions.

    A task is one of the harness's names, or a whole configuration. ValueError when the questions cannot be had.
    """
    has_names = any(isinstance(task, str) for task in tasks)
    known = TaskManager(include_defaults=has_names)  # it reads 14,000 files to learn its names
    try:
        found = simple_evaluate(
            HarnessModel(engine), tasks=list(tasks), num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=False,
            task_manager=known,
        )  # fmt: skip
    except OSError as error:  # no way to the hub, or no such data set there
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"lm_eval cannot load its questions: {reason}") from None
    return {
        task: {metric.removesuffix(",none"): value for metric, value in values.items()}
        for task, values in found["results"].items()
    }


class HarnessModel(LM):
    """The three things that the harness asks of a model. bos stands before every text, as in training."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: nats, and whether greedy writing would give it."""
        return [(it.total, it.is_greedy) for it in likelihoods(self.engine, [request.args for request in requests])]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts: nats."""
        return [rolling_likelihood(self.engine, *request.args).total for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the run writes until a stop string, eos, a drawing (which is no text) or as many tokens as asked."""
        asked = [request.args for request in requests]
        written = []
        for first in range(0, len(asked), AT_ONCE):
            written += self._write(asked[first : first + AT_ONCE])
        return written

    def _write(self, asked: Sequence[tuple[str, dict]]) -> list[str]:
        texts: dict[int, str] = {}
        stops: dict[int, list[str]] = {}
        for context, values in asked:
            wanted = normalize_gen_kwargs(values)
            number = self.engine.submit(self._request(context, wanted))
            texts[number], stops[number] = "", [stop for stop in wanted["until"] if stop]
        while self.engine.sequences:
            for event in self.engine.step():
                if isinstance(event, PreviewEvent | ImageEvent):
                    self.engine.cancel(event.request)
                elif isinstance(event, TokenEvent):
                    text = texts[event.request] = texts[event.request] + event.text
                    found = [text.index(stop) for stop in stops[event.request] if stop in text]
                    if found:
                        texts[event.request] = text[: min(found)]
                        self.engine.cancel(event.request)
        return list(texts.values())

    def _request(self, context: str, wanted: dict) -> Request:
        """The context loses its beginning where it leaves no room; at least half a row is left for it."""
        tokenizer, engine = self.engine.opened.tokenizer, self.engine
        tokens = min(wanted["max_gen_toks"], engine.context // 2)
        room = engine.context - tokens - 1  # bos
        while len(ids := tokenizer.encode(context)) > room:  # again, where what is left is cut into more tokens than before
            context = tokenizer.decode(ids[len(ids) - room :]).lstrip("\ufffd")
        temperature = wanted.get("temperature", 1.0) if wanted["do_sample"] else 0.0
        generation = replace(engine.run.generation, max_tokens=tokens, temperature=temperature)
        return Request(parts=(context,), generation=generation, previews=1)
