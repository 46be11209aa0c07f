"""A run as a model of EleutherAI's `lm_eval`, for all its text tasks.

Only imported if lm_eval is needed: it is an extra, `pip install '.[lm-eval]'` in a clone of the repository.
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

BATCH_SIZE = 16  # texts that are generated together


def evaluate_tasks(engine: Engine, tasks: Sequence[str | dict], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """lm_eval's results, zero-shot: task -> metric -> value. `limit`: the number of questions per task. A task is a name of
    lm_eval's, or a whole configuration. ValueError if its questions cannot be loaded."""
    has_names = any(isinstance(task, str) for task in tasks)
    manager = TaskManager(include_defaults=has_names)  # reads 14,000 files to learn the names
    try:
        output = simple_evaluate(
            HarnessModel(engine), tasks=list(tasks), num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=False,
            task_manager=manager,
        )  # fmt: skip
    except OSError as error:  # the hub is unreachable, or lacks the data set
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"lm_eval cannot load its questions: {reason}") from None
    return {
        task: {metric.removesuffix(",none"): value for metric, value in values.items()}
        for task, values in output["results"].items()
    }


class HarnessModel(LM):
    """lm_eval's three request types. As in training, bos precedes every text."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): nats, and whether greedy decoding gives the continuation."""
        return [(it.total, it.is_greedy) for it in likelihoods(self.engine, [request.args for request in requests])]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For each whole text: nats."""
        return [rolling_likelihood(self.engine, *request.args).total for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generated texts, each up to a stop string, eos, the begin of an image, or the maximum number of tokens."""
        args = [request.args for request in requests]
        batches = (args[first : first + BATCH_SIZE] for first in range(0, len(args), BATCH_SIZE))
        return [text for batch in batches for text in self._generate(batch)]

    def _generate(self, batch: Sequence[tuple[str, dict]]) -> list[str]:
        texts: dict[int, str] = {}
        stops: dict[int, list[str]] = {}
        for context, values in batch:
            options = normalize_gen_kwargs(values)
            request_id = self.engine.submit(self._to_request(context, options))
            texts[request_id], stops[request_id] = "", [stop for stop in options["until"] if stop]
        while self.engine.sequences:
            for event in self.engine.step():
                if isinstance(event, PreviewEvent | ImageEvent):
                    self.engine.cancel(event.request_id)
                elif isinstance(event, TokenEvent):
                    text = texts[event.request_id] = texts[event.request_id] + event.text
                    ends = [text.index(stop) for stop in stops[event.request_id] if stop in text]
                    if ends:
                        texts[event.request_id] = text[: min(ends)]
                        self.engine.cancel(event.request_id)
        return list(texts.values())

    def _to_request(self, context: str, options: dict) -> Request:
        """A context that is too long is truncated at its beginning; it keeps at least half a row."""
        tokenizer, engine = self.engine.opened.tokenizer, self.engine
        max_tokens = min(options["max_gen_toks"], engine.max_positions // 2)
        room = engine.max_positions - max_tokens - 1  # bos
        while len(ids := tokenizer.encode(context)) > room:  # repeat: the shorter text may have more tokens than expected
            context = tokenizer.decode(ids[len(ids) - room :]).lstrip("\ufffd")
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        generation = replace(engine.run.generation, max_tokens=max_tokens, temperature=temperature)
        return Request(parts=(context,), generation=generation, preview_every=1)
