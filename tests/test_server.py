"""The server: OpenAI's client, requests that join and leave the batch, limits, access, and the command."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image as Picture
from pydantic import ValidationError

from tests.abuse import (
    CHAT,
    DRAW,
    EDIT,
    TEXT,
    assert_clear_error,
    assert_works,
    form_request,
    make_picture,
    make_png,
    malformed,
    to_data_url,
    valid_body,
)
from tests.lazy import Lazy
from tests.profile import examples
from tests.serving import TIMEOUT, Gate, serving, wait_until
from tests.test_chameleon import build_engine as engine_with_codes
from transfusion.codecs.pictures import read_picture, to_pixels
from transfusion.inference.engine import Engine, PreviewEvent, Request, open_run
from transfusion.serving.hosts import is_local
from transfusion.serving.limits import Limits
from transfusion.serving.schemas import ChatRequest, CompletionRequest, StrictModel
from transfusion.serving.served import ServedRun

openai = Lazy("openai")

SMALL_LIMITS = Limits(max_sequences=4, waiting=4, n=3)


@pytest.fixture(scope="module")
def run(written) -> Path:
    return written


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run).opened


@pytest.fixture
def engine(opened) -> Engine:
    """An engine whose run claims that it was trained on edits."""
    return Engine(replace(opened, notes={"edits": True}))


@pytest.fixture(scope="module")
def server(opened):
    """Shared by many tests; each leaves it idle."""
    with serving(Engine(replace(opened, notes={"edits": True}))) as server:
        yield server


@pytest.fixture
def client(server):
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    wait_until(server.is_idle)


def decode_pixels(encoded: str) -> np.ndarray:
    """From a data: URL, or from base64."""
    return np.asarray(Picture.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2]))))[..., None]


def generate_alone(opened, request: Request) -> list[list]:
    """The engine's answer to this request alone: the parts of each sample."""
    (answers,) = Engine(opened).generate([request])
    return [answer.parts for answer in answers]


def assert_same_parts(parts: list, expected: list) -> None:
    """Equal text, and pixels within 2 of 255. An incomplete character at the end of a text is ignored: streams drop it."""
    assert len(parts) == len(expected)
    for part, expected_part in zip(parts, expected, strict=True):
        if isinstance(expected_part, str):
            assert part.rstrip("\ufffd") == expected_part.rstrip("\ufffd")
        else:
            assert np.abs(part.astype(int) - expected_part).max() <= 2


def read_pixels(opened, encoded: bytes) -> np.ndarray:
    return to_pixels(read_picture(encoded), [(8, 8)], opened.codec.image_channels)


def message_parts(message) -> list:
    """Text and pixels of an answer, in order."""
    images = getattr(message, "images", [])
    parts = getattr(message, "parts", [{"type": "text", "text": message.content}])
    parts = [p["text"] if p["type"] == "text" else decode_pixels(images[p["image"]]["image_url"]["url"]) for p in parts]
    return [part for part in parts if not isinstance(part, str) or part]


def find_mixed_request(opened, text: str, **options) -> Request:
    """A request without num_images, with the first seed whose answer has text and an image."""
    for seed in range(200):
        request = Request((text,), seed=seed, generation=replace(opened.run.generation, **options))
        part_types = {type(part) for part in generate_alone(opened, request)[0]}
        if part_types == {str, np.ndarray}:
            return request
    raise AssertionError("no seed draws")


# OpenAI's client


def test_chat_with_text_and_pictures_returns_text(client, opened):
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": to_data_url(make_picture())}}]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": content}]
    response = client.chat.completions.create(model="tiny", messages=messages, seed=5, max_tokens=6, temperature=0.7)
    generation = replace(opened.run.generation, max_tokens=6, temperature=0.7)
    request = Request(("ba", read_pixels(opened, make_picture())), seed=5, generation=generation, allow_images=False)
    assert_same_parts([response.choices[0].message.content], generate_alone(opened, request)[0])
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.usage.prompt_tokens == len(Engine(opened).opened.tokenizer.encode("ba")) + 1 + 16 + 2
    assert 0 < response.usage.completion_tokens <= 6


def test_chat_returns_text_and_images_in_order(client, opened):
    request = find_mixed_request(opened, "one", max_tokens=12)
    expected = generate_alone(opened, request)[0]
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "one"}], "modalities": ["text", "image"],
        "seed": request.seed, "max_completion_tokens": 12,
    }  # fmt: skip
    response = client.chat.completions.create(**body)
    assert_same_parts(message_parts(response.choices[0].message), expected)
    streamed, num_previews, finish_reason = [], 0, None
    body |= {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"preview_every": 1}}
    for chunk in client.chat.completions.create(**body):
        if not chunk.choices:
            assert chunk.usage == response.usage
            continue
        delta, finish_reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
        num_previews += hasattr(delta, "preview")
        if hasattr(delta, "images"):
            streamed += [decode_pixels(image["image_url"]["url"]) for image in delta.images]
        elif delta.content:
            if not streamed or not isinstance(streamed[-1], str):
                streamed.append("")
            streamed[-1] += delta.content
    assert_same_parts(streamed, expected)
    assert finish_reason == response.choices[0].finish_reason
    assert num_previews == opened.run.generation.steps * sum(isinstance(part, np.ndarray) for part in expected)


def test_an_answer_can_be_sent_back(client, opened):
    request = find_mixed_request(opened, "one", max_tokens=12)
    first = {"role": "user", "content": "one"}
    body = {"model": "tiny", "seed": request.seed, "max_tokens": 12}
    answer = client.chat.completions.create(messages=[first], modalities=["text", "image"], **body).choices[0].message
    response = client.chat.completions.create(messages=[first, answer.model_dump(), first], **body)
    parts = ["one", *message_parts(answer), "one"]
    merged = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    request = replace(request, parts=tuple(merged), allow_images=False)
    assert_same_parts([response.choices[0].message.content], generate_alone(opened, request)[0])


def test_modalities_select_text_or_images(client, opened):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "seed": 3, "max_tokens": 12}
    text = client.chat.completions.create(**body, n=3)
    assert all(not hasattr(choice.message, "images") for choice in text.choices)
    assert len({choice.message.content for choice in text.choices}) == 3
    images = client.chat.completions.create(**body, n=2, modalities=["image"])
    expected = generate_alone(opened, Request(("one",), 2, 3))
    for choice, parts in zip(images.choices, expected, strict=True):
        assert choice.message.content is None
        assert_same_parts(message_parts(choice.message), parts)


def test_completions(client, opened):
    body = {"model": "tiny", "prompt": ["a", "bc"], "n": 2, "seed": 7, "max_tokens": 5}
    response = client.completions.create(**body)
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    generation = replace(opened.run.generation, max_tokens=5)
    for n, prompt in enumerate(body["prompt"]):
        request = Request((prompt,), seed=7, generation=generation, allow_images=False)
        assert_same_parts([response.choices[2 * n].text], generate_alone(opened, request)[0])
    streamed = [""] * 4
    for chunk in client.completions.create(**body, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in response.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_word(client, stream):
    body = {"model": "tiny", "prompt": "a", "seed": 1, "max_tokens": 12}
    full_text = client.completions.create(**body).choices[0].text
    stop = full_text[len(full_text) // 2 :][:3]
    response = client.completions.create(**body, stop=["\0never", stop], stream=stream)
    if stream:
        chunks = list(response)
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = response.choices[0].text, response.choices[0].finish_reason
    assert (text, reason) == (full_text[: full_text.index(stop)], "stop")


def test_images_equal_the_engines(client, opened):
    body = {"model": "tiny", "prompt": "three", "n": 2, "size": "8x8"}
    extra_body = {"seed": 4, "num_inference_steps": 2, "guidance_scale": 1.5}
    response = client.images.generate(**body, extra_body=extra_body)
    generation = replace(opened.run.generation, steps=2, guidance_scale=1.5)
    expected = generate_alone(opened, Request(("three",), 2, 4, generation))
    for image, parts in zip(response.data, expected, strict=True):
        assert_same_parts([decode_pixels(image.b64_json)], parts)
    assert response.usage.output_tokens == 2 * 16
    assert response.usage.input_tokens_details.image_tokens == 0
    assert response.seed == 4


def test_streamed_previews_precede_the_image(client, opened):
    events = list(client.images.generate(prompt="three", stream=True, partial_images=2, extra_body={"seed": 4, "steps": 9}))
    *previews, last = events
    assert [event.type for event in previews] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in previews] == [0, 1]
    assert last.type == "image_generation.completed"
    generation = replace(opened.run.generation, steps=9)
    assert_same_parts([decode_pixels(last.b64_json)], generate_alone(opened, Request(("three",), 1, 4, generation))[0])
    options = {"seed": 4, "steps": 9, "preview_every": 2}
    events = list(client.images.generate(prompt="three", stream=True, extra_body=options))
    assert [event.step for event in events[:-1]] == [2, 4, 6, 8]


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_edits_equal_the_engines(client, opened, num_pictures):
    response = client.images.edit(image=[make_picture()] * num_pictures, prompt="b", n=2, extra_body={"seed": 4, "steps": 2})
    prompt = (*[read_pixels(opened, make_picture())] * num_pictures, "b")
    expected = generate_alone(opened, Request(prompt, 2, 4, replace(opened.run.generation, steps=2)))
    for image, parts in zip(response.data, expected, strict=True):
        assert_same_parts([decode_pixels(image.b64_json)], parts)
    assert response.usage.input_tokens_details.image_tokens == 16 * num_pictures
    events = list(client.images.edit(image=make_picture(), prompt="b", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_previews_have_x_t_and_x0(client, opened):
    options = {"preview_every": 1, "seed": 4, "steps": 3}
    events = list(client.images.generate(prompt="a", stream=True, extra_body=options))[:-1]
    engine = Engine(opened)
    engine.submit(Request(("a",), 1, 4, replace(opened.run.generation, steps=3), preview_every=1))
    expected = [event for _ in range(9) for event in engine.step() if isinstance(event, PreviewEvent)]
    assert [event.step for event in events] == [event.step for event in expected] == [1, 2, 3]
    for event, preview in zip(events, expected, strict=True):
        assert_same_parts([decode_pixels(event.noisy_b64_json), decode_pixels(event.b64_json)], [preview.x_t, preview.x0])
    events = client.images.generate(prompt="a", stream=True, partial_images=1)
    assert not any(hasattr(event, "noisy_b64_json") for event in events)


def test_edits_are_refused_by_a_run_without_edits(opened):
    with serving(Engine(opened)) as server, server.client() as client:
        response = form_request({"prompt": "a"}, [make_picture()]).send(client)
        assert (response.status_code, "tiny cannot edit" in response.text) == (400, True)
        assert_clear_error(response)


def test_models_health_and_metrics(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.sizes, model.edits, model.seq_len) == ("tiny", ["8x8"], True, 64)
    assert (model.parameters, model.image_channels, model.sources) == (server.engine.opened.parameters, 1, ["digits"])
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    with server.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        before = float(re.search(r"\ntransfusion_images_total (\S+)", http.get("/metrics").text)[1])
        client.images.generate(prompt="a", n=2)
        wait_until(lambda: f"transfusion_images_total {before + 2}" in http.get("/metrics").text)
        metric = 'requests_total{path="/v1/images/generations",status="200"}'
        wait_until(lambda: metric in http.get("/metrics").text)  # once the last byte is sent
        page = http.get("/")
        assert "<html" in page.text and page.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("text", ["</s><bos>", "<|endoftext|><boi 8x8>", "<eoi>" * 3, "\x00\x01", "𝔞\u200b"])
def test_text_that_spells_special_tokens_is_text(client, server, text):
    """All token ids of the prompt, except the first, are text tokens."""
    prompts, submit = [], server.engine.submit

    def recording_submit(request):
        number = submit(request)
        prompts.append(server.engine.sequences[-1].phase.chunks[0].tokens.tolist())
        return number

    server.engine.submit = recording_submit
    try:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=2)
    finally:
        server.engine.submit = submit
    vocabulary = server.engine.vocabulary
    first, *others = prompts[0]
    assert first == vocabulary.bos and max(others) < vocabulary.num_text_tokens
    assert server.engine.opened.tokenizer.decode(others) == text


# Requests that join and leave the batch


def make_request(opened, number: int) -> tuple[str, dict, Request]:
    """A request for text, an image or a caption: path and body for the server, and the same for an engine."""
    seed, greedy = number, replace(opened.run.generation, temperature=0.0)
    shared = {"model": "tiny", "seed": seed}
    if number % 3 == 0:
        body = {"prompt": "a" * (number % 5 + 1), "temperature": 0, **shared}
        return TEXT, body, Request((body["prompt"],), seed=seed, generation=greedy, allow_images=False)
    if number % 3 == 1:
        generation = replace(opened.run.generation, steps=number % 4 + 1)
        body = {"prompt": "three", "n": number % 2 + 1, "steps": number % 4 + 1, **shared}
        return DRAW, body, Request(("three",), number % 2 + 1, seed, generation)
    content = [{"type": "image_url", "image_url": {"url": to_data_url(make_picture())}}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **shared}
    return CHAT, body, Request((read_pixels(opened, make_picture()),), seed=seed, generation=greedy, allow_images=False)


def test_concurrent_requests_equal_single_requests(opened):
    with serving(Engine(opened)) as server, server.client() as client, ThreadPoolExecutor(8) as pool:
        requests = [make_request(opened, number) for number in range(24)]
        answers = list(pool.map(lambda request: client.post(request[0], json=request[1]).json(), requests))
        wait_until(server.is_idle)
    for (path, _, request), answer in zip(requests, answers, strict=True):
        expected = generate_alone(opened, request)
        if path == DRAW:
            for image, parts in zip(answer["data"], expected, strict=True):
                assert_same_parts([decode_pixels(image["b64_json"])], parts)
        else:
            (choice,) = answer["choices"]
            text = choice["text"] if path == TEXT else choice["message"]["content"]
            assert_same_parts([text], expected[0] or [""])


def post_in_thread(client: httpx2.Client, path: str, **body) -> tuple[threading.Thread, list]:
    """The response is in the list when the thread has ended."""
    responses = []
    thread = threading.Thread(target=lambda: responses.append(client.post(path, json=valid_body(path) | body)))
    thread.start()
    return thread, responses


def test_a_short_text_does_not_wait_for_drawings(engine):
    """Images use three of four sequences, more of them wait, and a text is finished before any image."""
    gate = Gate(engine)
    with serving(engine, SMALL_LIMITS) as server, server.client() as client:
        drawings = [post_in_thread(client, DRAW, n=2, steps=50, seed=n) for n in range(3)]
        wait_until(lambda: server.num_requests == 3)
        gate.allow(1)
        wait_until(lambda: (len(server.scheduler.running), len(server.scheduler.waiting)) == (1, 2))
        thread, responses = post_in_thread(client, TEXT, max_tokens=1)
        wait_until(lambda: server.num_requests == 4)
        gate.allow(5)
        thread.join()
        assert responses[0].status_code == 200
        assert not any(images for _, images in drawings)
        gate.open()
        for thread, images in drawings:
            thread.join()
            assert images[0].status_code == 200
        wait_until(server.is_idle)


def test_texts_do_not_block_images(engine):
    """While an image waits, texts get only a quarter of the sequences, so the image starts."""
    gate = Gate(engine)
    with serving(engine, SMALL_LIMITS) as server, server.client() as client:
        texts = [post_in_thread(client, TEXT, max_tokens=3, seed=n) for n in range(4)]
        wait_until(lambda: server.num_requests == 4)
        gate.allow(1)
        image_thread, image_responses = post_in_thread(client, DRAW, n=3, steps=1)
        wait_until(lambda: server.has_image_request())  # `submitted` alone is empty again if the engine has just taken it
        gate.allow(1)
        texts += [post_in_thread(client, TEXT, max_tokens=12, seed=9 + n) for n in range(3)]
        gate.open()
        image_thread.join()
        assert image_responses[0].status_code == 200
        for thread, responses in texts:
            thread.join()
            assert responses[0].status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, DRAW])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_ends_its_sequences_within_one_step(engine, path, stream):
    gate = Gate(engine)
    body = valid_body(path) | {"n": 2, "stream": stream}
    body |= {"steps": 50, "preview_every": 1} if path == DRAW and stream else {"steps": 50} if path == DRAW else {}
    body |= {"max_tokens": 40} if path != DRAW else {}
    with serving(engine, SMALL_LIMITS) as server:
        disconnect = threading.Event()
        args = path, json.dumps(body).encode(), 20 if stream else 0, disconnect
        thread = threading.Thread(target=server.send_and_disconnect, args=args)
        thread.start()
        wait_until(lambda: server.scheduler.running)
        gate.allow(3)
        disconnect.set()
        thread.join()
        wait_until(lambda: all(request.is_cancelled for request in server.scheduler.running.values()))
        steps_taken = gate.steps_taken
        gate.permits.release()  # the step that was about to start
        wait_until(server.is_idle)
        assert gate.steps_taken <= steps_taken + 1
        with server.client() as client:
            gate.open()
            assert_works(client)


def test_fifty_disconnects_leave_no_sequences(engine):
    with serving(engine, Limits(max_sequences=8)) as server:
        for number in range(50):
            path = (CHAT, DRAW)[number % 2]
            options = {"steps": 900, "preview_every": 1} if path == DRAW else {"max_tokens": 40}
            body = valid_body(path) | {"stream": True} | options
            server.send_and_disconnect(path, json.dumps(body).encode(), 1 + number)
        wait_until(server.is_idle)
        with server.client() as client:
            assert_works(client)
            assert len(engine.cache.lengths) <= 32  # slots


# Limits


def test_requests_above_a_limit_are_refused(server):
    with server.client() as client:
        for path, body, words in [
            (DRAW, {"n": 9}, "n must be at most 8"), (DRAW, {"steps": 1001}, "steps must be at most 1000"),
            (TEXT, {"max_tokens": 40_000}, "max_tokens must be at most 32,768"),
            (TEXT, {"prompt": "ab" * 1025}, "2,050 characters"),
            (TEXT, {"prompt": ["a"] * 9}, "the request has 9 prompts with 1 choices each: it may have 8 in all"),
            (TEXT, {"prompt": "a" * 70}, "positions"),
            (DRAW, {"size": "1024x1024"}, "size 1024x1024 is not supported: send 8x8"),
            (DRAW, {"partial_images": 1}, "need stream: true"),
            (CHAT, {"messages": [{"role": "user"}]}, "the request is empty"),
        ]:  # fmt: skip
            response = client.post(path, json=valid_body(path) | body)
            assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
            assert_clear_error(response)


@pytest.mark.parametrize(("path", "body", "words"), [
    (TEXT, {"prompt": ["a"] * 30_000}, "prompt has 30,000 elements; at most 256 are allowed"),
    (TEXT, {"prompt": "a", "stop": [1] * 30_000}, "stop has 30,000 elements; at most 4 are allowed"),
    (TEXT, {"prompt": "a"} | {f"x{n}": 1 for n in range(30_000)}, "an object has 30,001 fields; at most 64 are allowed"),
    (CHAT, {"messages": [{}] * 15_000}, "messages has 15,000 elements; at most 256 are allowed"),
    (CHAT, {"messages": [{}] * 256}, "messages[0].role is missing"),
    *[(CHAT, {"messages": [{"role": "user", name: [{}] * 15_000}]}, f"messages[0].{name} has 15,000 elements")
      for name in ("content", "images", "parts")],
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "modalities": [1] * 30_000}, "modalities has 30,000 elements"),
])  # fmt: skip
def test_a_long_list_costs_one_error(server, path, body, words):
    with server.client() as client:
        response = client.post(path, json=body)
        assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
        assert_clear_error(response)
    with pytest.raises(ValidationError) as caught:
        (CompletionRequest if path == TEXT else ChatRequest).model_validate(body)
    assert caught.value.error_count() <= 2


def test_every_list_in_a_request_has_a_limit():
    """Includes lists that are added later."""

    def find_lists(schema) -> list[dict]:
        if isinstance(schema, list):
            return list(chain.from_iterable(map(find_lists, schema)))
        if not isinstance(schema, dict):
            return []
        this = [schema] if schema.get("type") == "list" else []
        return this + find_lists([*schema.values()])

    models = [model for model in StrictModel.__subclasses__() if model.__module__ == StrictModel.__module__]
    models += [ChatRequest, CompletionRequest]
    lists = [schema for model in models for schema in find_lists(model.__pydantic_core_schema__)]
    assert len(lists) > 5 and all(schema.get("fail_fast") for schema in lists)


@pytest.mark.parametrize("path", [TEXT, DRAW])
def test_a_body_without_pictures_has_a_smaller_limit(server, path):
    with server.client() as client:
        response = client.post(path, json=valid_body(path) | {"user": "a" * 2**20})
        assert (response.status_code, "1,048,576 bytes" in response.text) == (413, True)
        assert_clear_error(response)


@pytest.mark.parametrize("has_length", [True, False])
def test_a_body_that_is_too_large_is_refused(engine, has_length):
    with serving(engine, Limits(body_bytes=10_000)) as server, server.client() as client:
        body = json.dumps(valid_body(TEXT) | {"prompt": "a" * 30_000}).encode()
        content = body if has_length else (body[n : n + 1000] for n in range(0, len(body), 1000))
        response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert_clear_error(response)
        assert_works(client)


def test_a_slow_body_times_out(engine):
    """The rest of the body is sent after the server has answered."""
    with serving(engine, Limits(client_timeout=1)) as server, server.client() as client, server.client() as other:
        def slow_body():
            yield b"{"
            metric = f'requests_total{{path="{TEXT}",status="408"}} 1.0'
            wait_until(lambda: metric in other.get("/metrics").text)
            yield b"}"

        response = client.post(TEXT, content=slow_body(), headers={"content-type": "application/json"})
        assert response.status_code == 408
        assert_clear_error(response)
        assert_works(client)


def test_a_full_queue_returns_429(engine):
    gate = Gate(engine)
    with serving(engine, SMALL_LIMITS) as server, server.client() as client:
        requests = [post_in_thread(client, TEXT, seed=n) for n in range(8)]
        wait_until(lambda: server.num_requests == 8)
        response = client.post(TEXT, json=valid_body(TEXT))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert_clear_error(response)
        assert client.get("/health").status_code == 200
        gate.open()
        for thread, responses in requests:
            thread.join()
            assert responses[0].status_code == 200


def test_rejected_clients_do_not_use_up_the_limit(engine):
    """More clients without the key than the limit, with bodies that never end: each gets 401, and its connection closes."""
    limits = replace(SMALL_LIMITS, client_timeout=1000)
    with serving(engine, limits, api_key="secret") as server, server.client() as client, ExitStack() as stack:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{{".encode()
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(12)]
        for connection in connections:
            connection.sendall(head)
        headers = {"authorization": "Bearer secret"}
        assert client.post(TEXT, headers=headers, json=valid_body(TEXT)).status_code == 200
        for connection in connections:
            connection.settimeout(TIMEOUT)
            with connection.makefile("rb") as file:
                response = file.read().lower()  # until the connection closes
            assert response.startswith(b"http/1.1 401") and b"connection: close" in response


def test_a_disconnect_during_a_form_logs_no_error(engine, caplog):
    request = form_request({"prompt": "a"}, [make_picture()])
    with serving(engine) as server, server.client() as client:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                f"POST {EDIT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {request.content_type}\r\n"
                f"Content-Length: 100000\r\n\r\n".encode() + request.body[:200]
            )
        metric = f'requests_total{{path="{EDIT}",status="499"}} 1.0'
        wait_until(lambda: metric in client.get("/metrics").text)
    assert not caplog.records


def test_limits_apply_to_the_defaults(opened):
    with serving(Engine(opened), Limits(steps=2, tokens=1)) as server, server.client() as client:
        defaults = client.get("/v1/models").json()["data"][0]["generation"]
        assert (defaults["steps"], defaults["max_tokens"]) == (2, 1) < (opened.run.generation.steps, 1)
        for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
            assert client.post(path, json=body | {"seed": 1}).json()["usage"]["completion_tokens"] <= 1
        body = {"prompt": "a", "stream": True, "preview_every": 1}
        assert client.post(DRAW, json=body).text.count("event: image_generation.partial_image") == 2


def test_an_image_of_codes_has_one_step_per_code(opened):
    with serving(engine_with_codes()) as server, server.client() as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["image_steps"] == {"3x2": 6, "4x4": 16}
        body = {"prompt": "a", "size": "4x4", "stream": True, "partial_images": 3, "seed": 1}
        steps = re.findall(r'"step":\s*(\d+)', client.post(DRAW, json=body).text)
        assert steps == ["4", "8", "12"]
        for path, body in ((DRAW, {"prompt": "a", "steps": 5}), (CHAT, valid_body(CHAT) | {"steps": 5})):
            response = client.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "steps")
            assert_clear_error(response)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_deadline_fails(engine, stream):
    gate = Gate(engine)
    with serving(engine, Limits(deadline=0.3)) as server, server.client() as client:
        thread, responses = post_in_thread(client, DRAW, steps=900, stream=stream)
        thread.join(0.6)
        gate.open()
        thread.join()
        assert responses[0].status_code == 504
        assert responses[0].json()["error"]["type"] == "server_error"
        wait_until(server.is_idle)


def test_the_deadline_begins_when_a_request_arrives(engine, monkeypatch):
    """Not when its pictures are decoded and its text is tokenized: both may wait for other requests."""
    with serving(engine, Limits(deadline=0.3)) as server, server.client() as client:
        original = ServedRun.parse_completion

        async def parse(served, body):
            await asyncio.sleep(0.5)
            return await original(served, body)

        monkeypatch.setattr(ServedRun, "parse_completion", parse)
        assert client.post(TEXT, json=valid_body(TEXT)).status_code == 504


def test_a_failed_step_fails_only_its_requests(opened):
    engine = Engine(opened)
    engine.step = lambda: 1 / 0
    with serving(engine) as server, server.client() as client:
        response = client.post(TEXT, json=valid_body(TEXT))
        assert response.status_code == 500
        assert "ZeroDivision" not in response.text and "Traceback" not in response.text
        assert server.engine is not engine
        assert_works(client)


def test_malformed_requests_get_a_clear_error(server):
    """`python -m tests.abuse` sends 2,000 and measures the memory."""
    with server.client() as client:

        @settings(examples(120), suppress_health_check=list(HealthCheck))
        @given(malformed)
        def send(request):
            assert_clear_error(request.send(client))

        send()
        assert_works(client)
    wait_until(server.is_idle)


# Access


def test_every_path_but_health_and_the_page_needs_the_key(engine):
    with serving(engine, api_key="secret-é") as server, server.client() as client:
        paths = [("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/none"),
                 *[("POST", path) for path in (CHAT, TEXT, DRAW, EDIT)]]  # fmt: skip
        basic = "Basic " + base64.b64encode(b"me:wrong").decode()
        for authorization in (None, "Bearer wrong", "Bearer", "Bearer secret", "Basic !", basic, "secret-é".encode()):
            headers = {} if authorization is None else {"authorization": authorization}
            for method, path in paths:
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401, (authorization, path)
                assert_clear_error(response)
        for path in ("/health", "/", "/index.html", "/main.js"):
            assert client.get(path).status_code == 200
        for authorization in ("Bearer secret-é", "Basic " + base64.b64encode("me:secret-é".encode()).decode()):
            headers = {"authorization": authorization.encode()}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.post(TEXT, headers=headers, json=valid_body(TEXT)).status_code == 200


def test_other_sites_are_refused(server):
    with server.client() as client:
        for origin in ("https://example.org", "null", "http://127.0.0.1:1", "http://localhost.example.org", "http://["):
            response = client.post(TEXT, json=valid_body(TEXT), headers={"origin": origin})
            assert response.status_code == 403
            assert_clear_error(response)
            assert "access-control-allow-origin" not in response.headers
        assert client.post(TEXT, json=valid_body(TEXT), headers={"origin": server.url}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example.org"}).status_code == 403
        assert client.get("/v1/models", headers={"host": f"localhost:{server.port}"}).status_code == 200


@pytest.mark.parametrize(("host", "expected"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("", False), ("192.168.1.2", False), ("example.org", False),
])  # fmt: skip
def test_is_local(host, expected):
    assert is_local(host) == expected


def test_pictures_above_the_limit_are_not_decoded(engine):
    with serving(engine, Limits(pixels=24 * 16)) as server, server.client() as client:
        def post(content: bytes) -> httpx2.Response:
            part = {"type": "image_url", "image_url": {"url": to_data_url(content)}}
            return client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})

        assert post(make_picture()).status_code == 200
        message = post(make_png(25, 16)).json()["error"]["message"]
        assert "25x16 pixels" in message and "limit is 384" in message


# The command


def start_server(run: Path, *options: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0", *options], stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def test_the_readmes_requests_work_and_sigterm_finishes_responses(run, tmp_path, monkeypatch):
    """The README's commands on a free port. After SIGTERM a running response is finished."""
    section = re.search(r"\n## Serve\n(.*?)\n## ", Path("README.md").read_text(), re.DOTALL)[1]
    curl, python = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("", "python"))
    assert "transfusion serve runs/digits" in curl
    process = start_server(run)
    try:
        base_url = re.search(r"http://\S+", process.stderr.readline())[0]
        request = re.search(r"curl (\S+) -H '([\w-]+): (\S+)'\s+-d '(.*?)'", curl.replace("\\\n", ""), re.DOTALL)
        response = httpx2.post(
            request[1].replace("http://127.0.0.1:8000", base_url).replace("localhost:8000", base_url),
            headers={request[2]: request[3]}, content=request[4].replace("digits", "tiny"), timeout=60,
        )  # fmt: skip
        assert response.status_code == 200, response.text
        monkeypatch.chdir(tmp_path)
        exec(python.replace("http://127.0.0.1:8000", base_url).replace('"digits"', '"tiny"'), {})
        with httpx2.Client(base_url=base_url, timeout=60) as client:
            body = valid_body(DRAW) | {"steps": 200, "stream": True, "preview_every": 50}
            with client.stream("POST", DRAW, json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert any("image_generation.completed" in line for line in lines)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("options", "environment", "words"), [
    (("--host", "0.0.0.0"), {}, "--api-key"), (("--api-key", " "), {}, "the API key is empty"),
    ((), {"TRANSFUSION_API_KEY": ""}, "the API key is empty"),
    (("--limits.max-sequences", "0"), {}, "limits.max-sequences must be at least 1"),
    (("--limits.shutdown-grace", "inf"), {}, "--limits.shutdown-grace must be"),
    (("--limits.shutdown-grace", "nan"), {}, "--limits.shutdown-grace must be"),
    (("--host", "no.such.host.invalid", "--api-key", "a"), {}, "cannot listen at no.such.host.invalid"),
    (("--host", "a..b", "--api-key", "a"), {}, "cannot listen at a..b, port 8000: this is not the name of a host"),
    (("--port", "99999"), {}, "--port must be between 0 and 65,535"), (("--port", "x"), {}, "port"),
])  # fmt: skip
def test_serve_reports_errors_in_one_line(run, capsys, monkeypatch, options, environment, words):
    from transfusion.cli import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(run), *options])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert words in output.err + output.out and "Traceback" not in output.err
