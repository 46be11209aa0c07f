"""A part that fails ends only the samples that need it; nothing is left behind."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import test_chameleon
from tests.profile import examples
from tests.serving import serving
from tests.test_engine import assert_no_slot_is_lost, draw_now_and_then, generation, never_end, run_to_end
from tests.tiny import SIZES, build_engine, picture, tokenizer
from transfusion.inference import chameleon, image_mode, text_mode
from transfusion.inference import engine as engine_module
from transfusion.inference.engine import Engine
from transfusion.inference.request import FinishEvent, ImageEvent, Request, TokenEvent

some = examples(100, quick=10)
few = examples(25, quick=6)


class Fault(BaseException):
    """Raised by a part that fails in these tests. Not an Exception: nor is a panic of a library in Rust."""


@contextmanager
def failing_at(owner, name: str, call_number: int):
    """owner.name raises a Fault in its call of this number (from 1), and only then."""
    original, count = getattr(owner, name), 0

    def fail_once(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call_number:
            raise Fault(f"call {count} of {name}\nand a second line")
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, fail_once):
        yield


def by_sample(events) -> dict[tuple[int, int], list]:
    samples = defaultdict(list)
    for event in events:
        samples[event.request_id, event.sample_index].append(event)
    return samples


def assert_same_events(events, expected_events) -> None:
    """Equal tokens, texts and reasons; images within 1e-4."""
    assert [type(event) for event in events] == [type(event) for event in expected_events]
    for event, expected in zip(events, expected_events, strict=True):
        match event:
            case TokenEvent():
                assert (event.token, event.text) == (expected.token, expected.text)
            case ImageEvent():
                np.testing.assert_allclose(event.pixels, expected.pixels, rtol=0, atol=1e-4)
            case FinishEvent():
                assert event == expected


def submit_requests(engine: Engine, size: tuple[int, int]) -> None:
    """Free text and requested images, with one, two and three guidance branches."""
    engine.submit(Request(("a",), seed=1))
    engine.submit(Request(("b",), num_images=3, size=size, seed=2))
    engine.submit(Request(("c", *PICTURES[engine.uses_image_codes]), seed=3, negative_prompt="d"))
    engine.submit(Request(("e",), seed=4, generation=replace(engine.run.generation, guidance_scale=1.0)))
    edit = replace(engine.run.generation, image_guidance_scale=1.5)
    engine.submit(Request((*PICTURES[engine.uses_image_codes], "f"), 2, seed=5, size=size, generation=edit))


@cache
def undisturbed_events(kind: str) -> dict[tuple[int, int], list]:
    """Of these requests, by sample."""
    build, size = ENGINES[kind]
    engine = build()
    submit_requests(engine, size)
    return by_sample(run_to_end(engine))


PICTURES = {False: [picture((4, 4), 0)], True: [np.full((4, 4, 1), 3, np.uint8)]}


def build_ddpm_engine() -> Engine:
    """Its sampler adds noise: that of a pass which is repeated must not be sampled again."""
    engine = build_engine(draw_now_and_then)
    engine.run = replace(engine.run, generation=replace(engine.run.generation, sampler="ddpm"))
    return engine


def build_codes_engine() -> Engine:
    """Every sixth token is a boi."""
    engine = test_chameleon.build_engine(guidance_scale=2.0, temperature=1.0)
    engine.allowed_tokens[: engine.vocabulary.num_text_tokens] = False
    engine.allowed_tokens[97:107] = True
    return engine


ENGINES = {
    "latents": (build_ddpm_engine, SIZES[1]),
    "codes": (build_codes_engine, (4, 4)),
}
FAULTS = {
    "begin_image": lambda engine: chameleon if engine.uses_image_codes else image_mode,
    "fork": lambda engine: engine.cache,
    "acquire": lambda engine: engine.cache,
    "decode": lambda engine: engine.opened.codec,
    "encode_document": lambda engine: engine_module,
    "commit": lambda engine: engine.cache,
    "forward_cached": lambda engine: engine.model,
    "sample_tokens": lambda engine: text_mode,
    "guide": lambda engine: image_mode,
    "apply_updates": lambda engine: image_mode,
}
OF_SEVERAL = ("forward_cached", "commit", "sample_tokens", "guide", "apply_updates")  # calls for several sequences at once


@pytest.mark.parametrize("kind", ENGINES)
@some
@given(st.sampled_from(sorted(FAULTS)), st.integers(1, 25))
def test_failing_call_ends_the_samples_of_one_request_only(kind, name, call_number):
    """The others get what they get without the fault."""
    build, size = ENGINES[kind]
    engine, expected = build(), undisturbed_events(kind)
    submit_requests(engine, size)
    with failing_at(FAULTS[name](engine), name, call_number):
        samples = by_sample(run_to_end(engine))
    assert samples.keys() == expected.keys()
    failed = set()
    for sample, events in samples.items():
        assert [isinstance(event, FinishEvent) for event in events] == [False] * (len(events) - 1) + [True]
        if events[-1].reason == "error":
            failed.add(sample[0])
            assert events[-1].message == f"Fault: call {call_number} of {name}"
            assert_same_events(events[:-1], expected[sample][: len(events) - 1])
        else:
            assert_same_events(events, expected[sample])
    assert len(failed) <= 1
    assert_no_slot_is_lost(engine)


@pytest.mark.parametrize("kind", ENGINES)
def test_failing_calls_happen(kind):
    """The test above is only valid if each part is called, and ends a request by failing."""
    build, size = ENGINES[kind]
    for name in FAULTS.keys() - set(OF_SEVERAL):
        engine = build()
        submit_requests(engine, size)
        with failing_at(FAULTS[name](engine), name, 2):
            assert any(isinstance(event, FinishEvent) and event.reason == "error" for event in run_to_end(engine)), name


@pytest.mark.parametrize(("kind", "name"), [
    (kind, name) for kind in ENGINES for name in OF_SEVERAL if (kind, name) != ("codes", "apply_updates")
])  # fmt: skip
def test_forward_pass_that_fails_once_is_repeated(kind, name):
    """Its sequences, one by one, get the same results; also if the cache was partly written."""
    build, size = ENGINES[kind]
    engine, expected = build(), undisturbed_events(kind)
    submit_requests(engine, size)
    number = 2 if name in ("guide", "apply_updates") else 3  # of a call for several sequences
    with failing_at(FAULTS[name](engine), name, number), mock.patch.object(engine_module, "log") as log:
        samples = by_sample(run_to_end(engine))
    assert log.warning.call_count == 1
    for sample, events in expected.items():
        assert_same_events(samples[sample], events)


@few
@given(st.integers(1, 5), st.integers(0, 6))
def test_sequence_that_breaks_every_forward_pass_ends_alone(victim, steps):
    """It does from some step on; each pass with one of its slots fails."""
    engine, expected = build_ddpm_engine(), undisturbed_events("latents")
    submit_requests(engine, SIZES[1])
    events = [event for _ in range(steps) for event in engine.step()]
    forward = engine.model.forward_cached

    def fail(tokens, position_ids, mask, cache, *args):
        slots = {slot for sequence in engine.sequences if sequence.request_id == victim for slot in sequence.all_slots}
        if slots & set(cache.slots[:, 0].tolist()):
            raise Fault
        return forward(tokens, position_ids, mask, cache, *args)

    engine.model.forward_cached = fail
    samples = by_sample(events + run_to_end(engine))
    assert samples.keys() == expected.keys()
    for sample, events in samples.items():
        if sample[0] == victim and events[-1].reason == "error":
            assert_same_events(events[:-1], expected[sample][: len(events) - 1])
        else:
            assert_same_events(events, expected[sample])
    assert_no_slot_is_lost(engine)


@few
@given(st.integers(0, 6))
def test_model_that_always_fails_ends_all(steps):
    engine = build_engine(draw_now_and_then)
    submit_requests(engine, SIZES[1])
    events = [event for _ in range(steps) for event in engine.step()]
    with mock.patch.object(engine.model, "forward_cached", side_effect=Fault("always")):
        last_events = engine.step()
        assert not engine.sequences
    assert {event.reason for event in last_events} == {"error"}
    assert by_sample(events + last_events).keys() == undisturbed_events("latents").keys()
    assert_no_slot_is_lost(engine)
    submit_requests(engine, SIZES[0])
    assert "error" not in {event.reason for event in run_to_end(engine) if isinstance(event, FinishEvent)}


def test_branch_without_prompt_that_cannot_be_read_loses_no_slot():
    """bos and boi are read once for all images, when the first one begins."""
    engine = build_engine()
    forward, vocabulary = engine.model.forward_cached, engine.vocabulary

    def fail(tokens, *args):
        if tokens.tolist() == [[vocabulary.bos, vocabulary.boi[SIZES[0]]]]:
            raise Fault
        return forward(tokens, *args)

    engine.submit(Request(("ab",), 2, size=SIZES[0]))
    with mock.patch.object(engine.model, "forward_cached", fail):
        assert [event.reason for event in run_to_end(engine)] == ["error", "error"]
    assert_no_slot_is_lost(engine)


def test_update_that_fails_at_a_step_ends_its_image():
    """The other image of the same forward passes gets the noise that it gets without the fault."""
    engine, undisturbed = build_ddpm_engine(), build_ddpm_engine()
    for each in (engine, undisturbed):
        each.submit(Request(("a",), 2, generation=generation(each, steps=4)))
    engine.step()
    victim = engine.sequences[0].phase.image
    victim.updates = (*victim.updates[:2], None, None)
    images, expected = ([e for e in run_to_end(each) if e.sample_index == 1] for each in (engine, undisturbed))
    assert_same_events(images, expected)


def test_sample_whose_logits_are_not_finite_ends():
    engine = build_engine()
    victim, other = (engine.submit(Request(("a",), seed=seed)) for seed in range(2))
    forward = engine.model.forward_cached

    def spoil(tokens, position_ids, mask, cache, *args):
        prediction = forward(tokens, position_ids, mask, cache, *args)
        slots = {slot for sequence in engine.sequences if sequence.request_id == victim for slot in sequence.slots}
        for row, slot in enumerate(cache.slots[:, 0].tolist()):
            if slot in slots:
                prediction.logits[row, 5] = torch.nan
        return prediction

    with mock.patch.object(engine.model, "forward_cached", spoil):
        finished = [event for event in run_to_end(engine) if isinstance(event, FinishEvent)]
    messages = {event.request_id: event.message for event in finished}
    assert "the logits are not finite" in messages[victim]
    assert messages[other] == ""


def test_cache_entries_that_are_not_finite_do_not_stay_behind():
    """An id has a damaged embedding. Its request fails; later ones that never have this id use the same slot, beside longer
    ones: a mask gives old entries weight zero, but zero times NaN is NaN."""
    (damaged,) = tokenizer().encode("~")
    engine = build_engine(lambda vocabulary: {**never_end(vocabulary), damaged: -1000.0})
    engine.model.model.tokens.weight[damaged] = torch.nan
    options = generation(engine, max_tokens=20)
    failing = engine.submit(Request(("a~~",), generation=options))
    for length in (10, 20, 30, 40, 50):  # more lengths than groups without a mask
        engine.submit(Request(("a" * length,), generation=options, allow_images=False))
    events = [*engine.step(), *engine.step()]
    assert [event.request_id for event in events if isinstance(event, FinishEvent)] == [failing]
    engine.submit(Request(("b",), generation=options, allow_images=False))
    assert engine.sequences[-1].slots == [0]
    assert not [event.message for event in run_to_end(engine) if isinstance(event, FinishEvent) and event.reason == "error"]


def test_image_that_is_not_finite_is_an_error():
    engine = build_engine()
    victim, other = (engine.submit(Request((text,), 1)) for text in "ab")
    forward = engine.model.forward_cached

    def spoil(tokens, position_ids, mask, cache, *args):
        prediction = forward(tokens, position_ids, mask, cache, *args)
        slots = {slot for sequence in engine.sequences if sequence.request_id == victim for slot in sequence.slots}
        for row, slot in enumerate(cache.slots[:, 0].tolist()):
            if slot in slots and prediction.images:
                prediction.images[0][row, 0, 0, 0] = torch.nan
        return prediction

    with mock.patch.object(engine.model, "forward_cached", spoil):
        events = run_to_end(engine)
    assert [event.request_id for event in events if isinstance(event, ImageEvent)] == [other]
    messages = {event.request_id: event.message for event in events if isinstance(event, FinishEvent)}
    assert "the image is not finite" in messages[victim] and messages[other] == ""


@pytest.mark.parametrize("name", ["forward_cached", "sample_tokens"])
def test_interrupt_leaves_nothing_behind(name):
    engine = build_engine(draw_now_and_then)
    submit_requests(engine, SIZES[0])
    with mock.patch.object(FAULTS[name](engine), name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.step()
    assert_no_slot_is_lost(engine)


# generate


def test_generate_raises_when_a_sample_fails_and_leaves_nothing_behind():
    engine = build_engine()
    requests = [Request(("a",), 1), Request(("b",), 2)]
    with failing_at(image_mode, "begin_image", 2), pytest.raises(RuntimeError, match="request 2 failed: Fault: call 2 of"):
        engine.generate(requests)
    assert_no_slot_is_lost(engine)
    assert [len(answers) for answers in engine.generate(requests)] == [1, 2]


@pytest.mark.parametrize("call_number", [1, 2, 3])
def test_generate_without_memory_for_the_cache_leaves_nothing_behind(call_number):
    engine = build_engine()
    requests = [Request(("a", *PICTURES[False]), 1, generation=generation(engine, image_guidance_scale=1.5))] * 2
    with failing_at(engine.cache, "acquire", call_number), pytest.raises(Fault):
        engine.generate(requests)
    assert_no_slot_is_lost(engine)


def test_refused_request_leaves_nothing_behind_in_generate():
    """Nothing is generated for the requests before it."""
    engine = build_engine()
    with pytest.raises(ValueError, match="the request is empty"):
        engine.generate([Request(("a",), 1), Request()])
    assert not engine.model.calls
    assert_no_slot_is_lost(engine)
    ((answer,),) = engine.generate([Request(("a",), 1)])
    assert answer.reason == "image"


# The server


def test_text_that_cannot_be_encoded_is_answered_by_500():
    engine = build_engine()
    encode = engine.opened.tokenizer.encode

    def fail(text: str, parse_special: bool = False):
        if text == "b":
            raise Fault("a secret")
        return encode(text, parse_special)

    with serving(engine) as server, server.client() as client, mock.patch.object(engine.opened.tokenizer, "encode", fail):
        answer = client.post("/v1/images/generations", json={"prompt": "a", "negative_prompt": "b"})
        assert answer.status_code == 500
        assert "a text could not be encoded" in answer.json()["error"]["message"]
        assert "secret" not in answer.text
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_request_that_cannot_be_started_is_answered_by_500():
    engine = build_engine()
    prepare = engine._prepare

    def fail(request):
        if request.seed == 13:
            raise Fault("a secret")
        return prepare(request)

    with serving(engine) as server, server.client() as client, mock.patch.object(engine, "_prepare", fail):
        answer = client.post("/v1/completions", json={"prompt": "a", "seed": 13})
        assert answer.status_code == 500
        assert "the request could not be started" in answer.json()["error"]["message"]
        assert "secret" not in answer.text
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_failing_request_is_answered_by_500_and_the_others_are_not_disturbed():
    engine = build_engine(lambda v: {v.eos: -1e4})
    add_token = engine._add_token

    def fail(sequence, sampled, events):
        if sequence.request.seed == 13 and sequence.num_sampled_tokens == 2:
            raise Fault("a secret")
        add_token(sequence, sampled, events)

    def body(seed: int) -> dict:
        return {"prompt": "a", "seed": seed, "max_tokens": 5}

    with serving(engine) as server, server.client() as client:
        expected = client.post("/v1/completions", json=body(14)).json()["choices"][0]["text"]
        engine._add_token = fail
        with client.stream("POST", "/v1/completions", json=body(14) | {"stream": True, "max_tokens": 100}) as other:
            for stream in (False, True):
                failed = client.post("/v1/completions", json=body(13) | {"stream": stream})
                assert failed.status_code == (200 if stream else 500)  # a stream has begun with its first token
                assert "the engine failed at this request; other requests continue" in failed.text
                assert "secret" not in failed.text
            text = "".join(other.iter_lines())
            assert "error" not in text
            assert "[DONE]" in text
        assert client.post("/v1/completions", json=body(14)).json()["choices"][0]["text"] == expected
        assert server.scheduler.engine is engine
        assert server.is_idle()
