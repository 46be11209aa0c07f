"""A run as a model of EleutherAI's `lm_eval`, for all its text tasks, in Python and on lm_eval's own command line:

    python -m transfusion.evaluation.harness --model transfusion --model_args pretrained=runs/mine --tasks hellaswag

lm_eval is an extra, `pip install '.[lm-eval]'` in a clone of the repository; only this file imports it.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import warning_once

from transfusion.evaluation.likelihood import likelihoods, rolling_likelihood
from transfusion.inference.engine import Engine, open_run
from transfusion.inference.request import ImageEvent, PreviewEvent, Request, TokenEvent, raise_if_failed
from transfusion.seeding import derive_seed
from transfusion.sequence import Text

log = logging.getLogger("transfusion")
BATCH_SIZE = 16  # default of texts that are generated together
GENERATION_OPTIONS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}  # of lm_eval; others are ignored
NO_CHAT_TEMPLATE = "a run has no chat template that lm_eval can apply: leave out --apply_chat_template"


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


@register_model("transfusion")
class HarnessModel(LM):
    """lm_eval's three request types. As in training, bos precedes every text.

    pretrained: a run, as for `open_run`, or an engine. device: cuda:0, lm_eval's default, means auto where there is no CUDA.
    batch_size: texts that are generated together; "auto": max_batch_size. ValueError for other arguments.
    """

    def __init__(
        self, pretrained: str | Engine | None = None, weights: str = "ema", device: str = "auto",
        batch_size: int | str = "auto", max_batch_size: int = BATCH_SIZE, **others: Any,
    ):  # fmt: skip
        super().__init__()
        if others or pretrained is None:
            problem = f"{next(iter(others))} is unknown" if others else "needs pretrained=RUN"
            raise ValueError(f"--model_args {problem}: use pretrained, weights, device and batch_size")
        size = max_batch_size if str(batch_size).startswith("auto") else batch_size
        if not re.fullmatch(r"0*[1-9]\d*", str(size)):
            raise ValueError(f"--batch_size must be auto or at least 1, not {size}")
        self.batch_size = int(size)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"
        self.engine = pretrained if isinstance(pretrained, Engine) else open_run(str(pretrained), weights, device)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): nats, and whether greedy decoding gives the continuation."""
        results = likelihoods(self.engine, [request.args for request in requests])
        row = self.engine.max_positions
        if num_long := sum(len(it.log_probs) > row for it in results):
            log.warning("%d of %d continuations are longer than a row, %d positions: each is scored in several rows",
                        num_long, len(results), row)  # fmt: skip
        return [(it.total, it.is_greedy) for it in results]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For each whole text: nats."""
        return [rolling_likelihood(self.engine, *request.args).total for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generated texts, each up to a stop string, eos, the begin of an image, the maximum number of tokens, or the end of
        a row. Requests with the same text are samples of it: their seeds are derived from the text, their number, and
        lm_eval's --seed (of torch)."""
        counts: Counter[str] = Counter()
        prepared = []
        for context, values in (request.args for request in requests):
            options = normalize_gen_kwargs(values)
            seed = derive_seed(torch.initial_seed(), "lm_eval", context, counts[context])
            counts[context] += 1
            prepared.append((self._to_request(context, options, seed), [stop for stop in options["until"] if stop]))
        batches = (prepared[first : first + self.batch_size] for first in range(0, len(prepared), self.batch_size))
        return [text for batch in batches for text in self._generate(batch)]

    @property
    def tokenizer_name(self) -> str:
        raise ValueError(NO_CHAT_TEMPLATE)

    def chat_template(self, chat_template: bool | str = False) -> str:
        raise ValueError(NO_CHAT_TEMPLATE)

    def _generate(self, batch: Sequence[tuple[Request, list[str]]]) -> list[str]:
        """The text of each request, up to its first stop string."""
        stops, texts = {}, {}
        try:
            for request, strings in batch:
                request_id = self.engine.submit(request)
                stops[request_id], texts[request_id] = strings, ""
            while self.engine.sequences:
                for event in self.engine.step():
                    raise_if_failed(event)
                    if isinstance(event, PreviewEvent | ImageEvent):
                        self.engine.cancel(event.request_id)
                    elif isinstance(event, TokenEvent):
                        text = texts[event.request_id] = texts[event.request_id] + event.text
                        ends = [text.index(stop) for stop in stops[event.request_id] if stop in text]
                        if ends:
                            texts[event.request_id] = text[: min(ends)]
                            self.engine.cancel(event.request_id)
        finally:
            for request_id in stops:
                self.engine.cancel(request_id)
        return list(texts.values())

    def _to_request(self, context: str, options: dict, seed: int) -> Request:
        """A context that leaves no room for max_gen_toks is truncated at its beginning; it keeps at least half a row."""
        for name in sorted(options.keys() - GENERATION_OPTIONS):
            warning_once(log, f"the generation option {name} is not supported: it is ignored")
        row, max_tokens = self.engine.max_positions, options["max_gen_toks"]
        ids = self.engine.opened.tokenizer.encode(context)
        ids = ids[-max(row - max_tokens - 1, row // 2) :]  # bos takes one position
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        generation = replace(
            self.engine.run.generation, max_tokens=max_tokens, temperature=temperature, top_p=options.get("top_p", 1.0)
        )
        return Request(parts=(Text(ids),), seed=seed, generation=generation, preview_every=1)


def main() -> None:
    """lm_eval's command line, with the model `transfusion`. Errors of runs and of tasks are one line."""
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"transfusion: {next(iter(str(error).strip().splitlines()), type(error).__name__)}")


if __name__ == "__main__":
    main()
