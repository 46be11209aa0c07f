"""Log probabilities of sampled tokens and of prompts equal those of forward passes without a cache."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import test_chameleon
from tests.documents import SHAPES
from tests.profile import examples
from tests.test_engine import assert_no_slot_is_lost, draw_now_and_then, generation, run_to_end
from tests.tiny import build_engine, picture, prompt_segments, uncached
from transfusion.evaluation.likelihood import likelihoods, rolling_likelihood
from transfusion.inference import text_mode
from transfusion.inference.request import ImageEvent, PromptEvent, Request, TokenEvent
from transfusion.sequence import Image, Text

few = examples(12, quick=5)
seeds = st.integers(0, 2**31)
words = st.text("ab é<>", min_size=1, max_size=6)
prompts = st.lists(words | st.builds(picture, st.sampled_from(SHAPES), seeds), min_size=1, max_size=4)


def plain_engine():
    """Without added logits, so that `transfusion.evaluation` can use it."""
    engine = build_engine()
    engine.model = engine.model.model
    return engine


def close(value: float):
    return pytest.approx(value, abs=1e-5)


@few
@given(prompts, st.sampled_from((0.0, 1.0)), st.integers(0, 5), seeds)
def test_logprobs_of_sampled_tokens_are_those_of_an_uncached_pass(parts, temperature, num_top, seed):
    engine = build_engine(lambda v: draw_now_and_then(v) | {v.eoi: 5.0, v.size - 1: 5.0})  # likely, but never sampled
    options = generation(engine, temperature=temperature, top_p=0.9)
    engine.submit(Request(parts, seed=seed, generation=options, logprobs=num_top))
    segments, tokens = list(prompt_segments(parts)), []
    for event in run_to_end(engine):
        if isinstance(event, TokenEvent):
            logits = uncached(engine, [*segments, Text(tuple(tokens))])[0][-1] + engine.model.bias
            expected = logits.log_softmax(-1)
            token, logprob, top = event.logprob
            assert (token, logprob) == (event.token, close(float(expected[token])))
            values, ids = expected.masked_fill(~engine.allowed_tokens, -torch.inf).topk(num_top)
            assert [id_ for id_, _ in top] == ids.tolist()
            assert [value for _, value in top] == [close(value) for value in values.tolist()]
            if temperature == 0 and num_top:
                assert top[0][0] == token
            tokens.append(token)
        elif isinstance(event, ImageEvent):
            segments += [Text(tuple(tokens)), Image(event.pixels.transpose(2, 0, 1).copy())]
            tokens = []


@few
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_prompt_logprobs_equal_the_likelihoods_of_the_evaluation(pairs):
    """Each prompt alone, and all in one batch with a request without log probabilities."""
    engine = plain_engine()
    for before, after in pairs:
        engine.submit(Request(before + after, prompt_logprobs=True, logprobs=1))
    engine.submit(Request("a"))
    events = [event for event in run_to_end(engine) if isinstance(event, PromptEvent)]
    assert len(events) == len(pairs)
    for event, (before, after), expected in zip(events, pairs, likelihoods(engine, pairs), strict=True):
        ids = engine.opened.tokenizer.encode(before + after)
        assert [entry.token for entry in event.logprobs] == list(ids)
        whole = rolling_likelihood(engine, before + after).log_probs
        assert [entry.logprob for entry in event.logprobs] == [close(value) for value in whole]
        continuation = event.logprobs[len(ids) - len(expected.log_probs) :]
        assert sum(entry.logprob for entry in continuation) == pytest.approx(expected.total, abs=1e-4)
        assert all(entry.top[0][0] == entry.token for entry in continuation) == expected.is_greedy


@few
@given(prompts, st.none() | st.integers(1, 3))
def test_prompt_logprobs_come_once_with_one_entry_for_each_position(parts, num_images):
    engine = build_engine()
    engine.submit(Request(parts, num_images, prompt_logprobs=True, generation=generation(engine, max_tokens=2)))
    first, *others = run_to_end(engine)
    assert isinstance(first, PromptEvent)
    assert not any(isinstance(event, PromptEvent) for event in others)
    assert first.sample_index == 0
    segments = prompt_segments(parts)
    logits = uncached(engine, segments)[0] + engine.model.bias
    expected, vocabulary = [], engine.vocabulary
    for segment in segments:
        if isinstance(segment, Text):
            expected += segment.tokens
        else:
            expected += [vocabulary.boi[segment.shape], *[None] * vocabulary.num_patches(segment.shape), None]
    expected += [None] * (num_images is not None)  # the forced boi
    assert [entry and entry.token for entry in first.logprobs] == expected
    for position, entry in enumerate(first.logprobs):
        if entry is not None:
            assert entry.logprob == close(float(logits[position].log_softmax(-1)[entry.token]))
    assert_no_slot_is_lost(engine)


def test_prompt_logprobs_of_codes():
    """Codes are tokens with text loss."""
    engine, vocabulary = test_chameleon.build_engine(), test_chameleon.VOCABULARY
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    engine.submit(Request(("a", pixels), prompt_logprobs=True))
    (event, *_) = run_to_end(engine)
    ids = [*engine.opened.tokenizer.encode("a"), vocabulary.boi[2, 3], *(vocabulary.first_code + n for n in range(6))]
    assert [entry and entry.token for entry in event.logprobs] == [*ids, None]
    for n, entry in enumerate(event.logprobs[:-1]):
        logits = test_chameleon.logits_after(engine, (), ids[:n])
        assert entry.logprob == close(float(logits.log_softmax(-1)[ids[n]]))


@few
@given(st.lists(prompts, min_size=1, max_size=4), st.integers(0, 20))
def test_logits_of_many_prompts_are_limited(prompt_list, positions):
    """More forward passes give the same log probabilities."""
    engine, events = build_engine(), {}
    for limit in (2**28, positions * engine.vocabulary.size):
        engine.model.calls.clear()
        ids = [engine.submit(Request(parts, prompt_logprobs=True)) for parts in prompt_list]
        with mock.patch("transfusion.inference.engine.MAX_LOGITS", limit):
            events[limit] = [event.logprobs for event in engine.step() if isinstance(event, PromptEvent)]
        num_logits = [len(call.prediction.logits) for call in engine.model.calls if call.kind == "prefill"]
        assert all(len(call.slots) == 1 or num <= limit // engine.vocabulary.size
                   for call, num in zip(engine.model.calls, num_logits, strict=False))  # fmt: skip
        for request_id in ids:
            engine.cancel(request_id)
    for entries, expected in zip(*events.values(), strict=True):
        assert [entry and entry.logprob for entry in entries] == [entry and close(entry.logprob) for entry in expected]


def test_without_log_probabilities_there_is_no_more_work():
    engine = build_engine(draw_now_and_then)
    engine.submit(Request("a"))
    with mock.patch.object(text_mode, "token_logprobs", side_effect=AssertionError):
        events = run_to_end(engine)
    assert all(event.logprob is None for event in events if isinstance(event, TokenEvent))
    assert {len(call.prediction.logits) for call in engine.model.calls} <= {0, 1}
