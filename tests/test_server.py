"""The server: OpenAI's client as its judge, requests that join and leave, and what it withstands."""

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
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from pydantic import ValidationError

from tests.abuse import CHAT, DRAW, EDIT, TEXT, fine, form, is_clear, malformed, picture, png, url, valid
from tests.lazy import Lazy
from tests.profile import examples
from tests.serving import Gate, serving, until
from tests.test_chameleon import build_engine as engine_with_codes
from transfusion.cli.serve import is_local
from transfusion.codecs.pictures import read_picture, to_pixels
from transfusion.inference.engine import Engine, PreviewEvent, Request, open_run
from transfusion.serving.answers import EventReader
from transfusion.serving.app import Stream
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics
from transfusion.serving.middleware import LimitsMiddleware
from transfusion.serving.schemas import ChatRequest, CompletionRequest, Strict

openai = Lazy("openai")

FEW = Limits(rows=4, waiting=4, n=3)


@pytest.fixture(scope="module")
def run(written) -> Path:
    return written


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run).opened


@pytest.fixture
def engine(opened) -> Engine:
    """That edits: as if it had been trained to."""
    return Engine(replace(opened, notes={"edits": True}))


@pytest.fixture(scope="module")
def server(opened):
    """One that many tests ask, each leaving nothing behind."""
    with serving(Engine(replace(opened, notes={"edits": True}))) as server:
        yield server


@pytest.fixture
def client(server):
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    until(server.settled)


def pixels_of(encoded: str) -> np.ndarray:
    """Of a data: URL, or base64 alone."""
    return np.asarray(Picture.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2]))))[..., None]


def alone(opened, request: Request) -> list[list]:
    """What the engine answers when nothing else is asked: the parts of each draw."""
    (answers,) = Engine(opened).generate([request])
    return [answer.parts for answer in answers]


def same(found: list, expected: list) -> None:
    """Text to the letter, pixels within 2 of 255. Letters that an answer's end cuts in two are in no stream of text."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert one.rstrip("\ufffd") == other.rstrip("\ufffd")
        else:
            assert np.abs(one.astype(int) - other).max() <= 2


def given_pixels(opened, encoded: bytes) -> np.ndarray:
    return to_pixels(read_picture(encoded), [(8, 8)], opened.codec.image_channels)


def said_of(message) -> list:
    """Text and pixels of an answer, in order."""
    images = getattr(message, "images", [])
    parts = getattr(message, "parts", [{"type": "text", "text": message.content}])
    found = [p["text"] if p["type"] == "text" else pixels_of(images[p["image"]]["image_url"]["url"]) for p in parts]
    return [part for part in found if not isinstance(part, str) or part]


def draws_after(opened, text: str, **options) -> Request:
    """A free run that writes and draws: the first seed that does both."""
    for seed in range(200):
        request = Request((text,), seed=seed, generation=replace(opened.run.generation, **options))
        kinds = {type(part) for part in alone(opened, request)[0]}
        if kinds == {str, np.ndarray}:
            return request
    raise AssertionError("no seed draws")


# OpenAI's client


def test_text_and_pictures_go_in_and_text_comes_out(client, opened):
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url(picture())}}]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": content}]
    found = client.chat.completions.create(model="tiny", messages=messages, seed=5, max_tokens=6, temperature=0.7)
    generation = replace(opened.run.generation, max_tokens=6, temperature=0.7)
    request = Request(("ba", given_pixels(opened, picture())), seed=5, generation=generation, allow_images=False)
    same([found.choices[0].message.content], alone(opened, request)[0])
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.prompt_tokens == len(Engine(opened).opened.tokenizer.encode("ba")) + 1 + 16 + 2
    assert 0 < found.usage.completion_tokens <= 6


def test_text_and_images_come_out_in_order_whole_and_streamed(client, opened):
    request = draws_after(opened, "one", max_tokens=12)
    expected = alone(opened, request)[0]
    ask = {
        "model": "tiny", "messages": [{"role": "user", "content": "one"}], "modalities": ["text", "image"],
        "seed": request.seed, "max_completion_tokens": 12,
    }  # fmt: skip
    whole = client.chat.completions.create(**ask)
    same(said_of(whole.choices[0].message), expected)
    streamed, previews, last = [], 0, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options=options, extra_body={"preview_every": 1}):
        if not chunk.choices:
            assert chunk.usage == whole.usage
            continue
        delta, last = chunk.choices[0].delta, chunk.choices[0].finish_reason
        previews += hasattr(delta, "preview")
        if hasattr(delta, "images"):
            streamed += [pixels_of(image["image_url"]["url"]) for image in delta.images]
        elif delta.content:
            if not streamed or not isinstance(streamed[-1], str):
                streamed.append("")
            streamed[-1] += delta.content
    same(streamed, expected)
    assert last == whole.choices[0].finish_reason
    assert previews == opened.run.generation.steps * sum(isinstance(part, np.ndarray) for part in expected)


def test_an_answer_can_be_given_back(client, opened):
    request = draws_after(opened, "one", max_tokens=12)
    first = {"role": "user", "content": "one"}
    ask = {"model": "tiny", "seed": request.seed, "max_tokens": 12}
    answer = client.chat.completions.create(messages=[first], modalities=["text", "image"], **ask).choices[0].message
    found = client.chat.completions.create(messages=[first, answer.model_dump(), first], **ask)
    said = ["one", *said_of(answer), "one"]
    joined = []
    for part in said:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    same([found.choices[0].message.content], alone(opened, replace(request, parts=tuple(joined), allow_images=False))[0])


def test_modalities_decide_what_may_come_out(client, opened):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "seed": 3, "max_tokens": 12}
    text = client.chat.completions.create(**ask, n=3)
    assert all(not hasattr(choice.message, "images") for choice in text.choices)
    assert len({choice.message.content for choice in text.choices}) == 3
    images = client.chat.completions.create(**ask, n=2, modalities=["image"])
    expected = alone(opened, Request(("one",), 2, 3))
    for choice, parts in zip(images.choices, expected, strict=True):
        assert choice.message.content is None
        same(said_of(choice.message), parts)


def test_completions(client, opened):
    ask = {"model": "tiny", "prompt": ["a", "bc"], "n": 2, "seed": 7, "max_tokens": 5}
    found = client.completions.create(**ask)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    generation = replace(opened.run.generation, max_tokens=5)
    for n, prompt in enumerate(ask["prompt"]):
        request = Request((prompt,), seed=7, generation=generation, allow_images=False)
        same([found.choices[2 * n].text], alone(opened, request)[0])
    streamed = [""] * 4
    for chunk in client.completions.create(**ask, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in found.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_word(client, stream):
    ask = {"model": "tiny", "prompt": "a", "seed": 1, "max_tokens": 12}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    found = client.completions.create(**ask, stop=["\0never", stop], stream=stream)
    if stream:
        chunks = list(found)
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = found.choices[0].text, found.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


@given(st.lists(st.text("ab", max_size=3), max_size=6), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_words_are_found_however_the_text_is_cut(pieces, stops):
    reading, shown, stopped = EventReader(None, stops, None), "", False
    for piece in pieces:
        text, stopped = reading._until_stop(reading.held.pop(0, "") + piece, 0)
        shown += text
        if stopped:
            break
    shown += "" if stopped else reading.held.pop(0, "")
    whole = "".join(pieces)
    places = [place for place in map(whole.find, stops) if place >= 0]
    assert stopped == bool(places)
    if not stopped:
        assert shown == whole
    else:
        assert not any(stop in shown for stop in stops)
        assert whole.startswith(shown) and any(whole[len(shown) :].startswith(stop) for stop in stops)


def test_images(client, opened):
    ask = {"model": "tiny", "prompt": "three", "n": 2, "size": "8x8"}
    own = {"seed": 4, "num_inference_steps": 2, "guidance_scale": 1.5}
    found = client.images.generate(**ask, extra_body=own)
    generation = replace(opened.run.generation, steps=2, guidance_scale=1.5)
    expected = alone(opened, Request(("three",), 2, 4, generation))
    for image, parts in zip(found.data, expected, strict=True):
        same([pixels_of(image.b64_json)], parts)
    assert found.usage.output_tokens == 2 * 16
    assert found.usage.input_tokens_details.image_tokens == 0
    assert found.seed == 4


def test_images_on_their_way(client, opened):
    found = list(client.images.generate(prompt="three", stream=True, partial_images=2, extra_body={"seed": 4, "steps": 9}))
    *partial, last = found
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert last.type == "image_generation.completed"
    generation = replace(opened.run.generation, steps=9)
    same([pixels_of(last.b64_json)], alone(opened, Request(("three",), 1, 4, generation))[0])
    every = list(client.images.generate(prompt="three", stream=True, extra_body={"seed": 4, "steps": 9, "preview_every": 2}))
    assert [event.step for event in every[:-1]] == [2, 4, 6, 8]


@pytest.mark.parametrize("pictures", [1, 2])
def test_edits(client, opened, pictures):
    found = client.images.edit(image=[picture()] * pictures, prompt="b", n=2, extra_body={"seed": 4, "steps": 2})
    parts = (*[given_pixels(opened, picture())] * pictures, "b")
    expected = alone(opened, Request(parts, 2, 4, replace(opened.run.generation, steps=2)))
    for image, wanted in zip(found.data, expected, strict=True):
        same([pixels_of(image.b64_json)], wanted)
    assert found.usage.input_tokens_details.image_tokens == 16 * pictures
    events = list(client.images.edit(image=picture(), prompt="b", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_every_preview_shows_the_noise_and_what_is_expected(client, opened):
    options = {"preview_every": 1, "seed": 4, "steps": 3}
    events = list(client.images.generate(prompt="a", stream=True, extra_body=options))[:-1]
    alone = Engine(opened)
    alone.submit(Request(("a",), 1, 4, replace(opened.run.generation, steps=3), previews=1))
    expected = [event for _ in range(9) for event in alone.step() if isinstance(event, PreviewEvent)]
    assert [event.step for event in events] == [event.step for event in expected] == [1, 2, 3]
    for event, other in zip(events, expected, strict=True):
        same([pixels_of(event.noisy_b64_json), pixels_of(event.b64_json)], [other.x_t, other.x0])
    few = client.images.generate(prompt="a", stream=True, partial_images=1)
    assert not any(hasattr(event, "noisy_b64_json") for event in few)


def test_a_run_that_cannot_edit_says_so(opened):
    with serving(Engine(opened)) as server, server.client() as client:
        answer = form({"prompt": "a"}, [picture()]).to(client)
        assert (answer.status_code, "tiny cannot edit" in answer.text) == (400, True)
        is_clear(answer)


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
        assert f"transfusion_images_total {before + 2}" in http.get("/metrics").text
        counted = 'requests_total{path="/v1/images/generations",status="200"}'
        until(lambda: counted in http.get("/metrics").text)  # once the last byte is sent
        page = http.get("/")
        assert "<html" in page.text and page.headers["content-security-policy"].startswith("default-src 'self'")


def test_what_clients_send_by_default_is_taken_and_what_cannot_be_done_is_not(client):
    ask = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "model": "tiny"}
    client.chat.completions.create(
        **ask, user="me", metadata={}, store=False, service_tier="auto", frequency_penalty=0, presence_penalty=0.0,
        logit_bias={}, response_format={"type": "text"}, tools=[],
    )  # fmt: skip
    client.images.generate(prompt="a", quality="auto", background="auto", moderation="low", output_format="png", user="me")
    for one in ({"frequency_penalty": 1}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"logprobs": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ask, **one)
        assert caught.value.param == next(iter(one))
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.images.generate(prompt="a", response_format="url")


@pytest.mark.parametrize("text", ["</s><bos>", "<|endoftext|><boi 8x8>", "<eoi>" * 3, "\x00\x01", "𝔞\u200b"])
def test_text_that_spells_special_tokens_is_text(client, server, text):
    """Every id that goes in, but the first, is a text's own."""
    seen, submit = [], server.engine.submit

    def watched(request):
        number = submit(request)
        seen.append(server.engine.sequences[-1].phase.chunk.tokens.tolist())
        return number

    server.engine.submit = watched
    try:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=2)
    finally:
        server.engine.submit = submit
    vocabulary = server.engine.vocabulary
    first, *others = seen[0]
    assert first == vocabulary.bos and max(others) < vocabulary.num_text_tokens
    assert server.engine.opened.tokenizer.decode(others) == text


# Requests that join and leave


def mixed(opened, number: int) -> tuple[str, dict, Request]:
    """A request to write, to draw or to caption, and the same for an engine."""
    seed, greedy = number, replace(opened.run.generation, temperature=0.0)
    shared = {"model": "tiny", "seed": seed}
    if number % 3 == 0:
        body = {"prompt": "a" * (number % 5 + 1), "temperature": 0, **shared}
        return TEXT, body, Request((body["prompt"],), seed=seed, generation=greedy, allow_images=False)
    if number % 3 == 1:
        generation = replace(opened.run.generation, steps=number % 4 + 1)
        body = {"prompt": "three", "n": number % 2 + 1, "steps": number % 4 + 1, **shared}
        return DRAW, body, Request(("three",), number % 2 + 1, seed, generation)
    content = [{"type": "image_url", "image_url": {"url": url(picture())}}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **shared}
    return CHAT, body, Request((given_pixels(opened, picture()),), seed=seed, generation=greedy, allow_images=False)


def test_many_at_once_get_what_each_gets_alone(opened):
    with serving(Engine(opened)) as server, server.client() as client, ThreadPoolExecutor(8) as pool:
        asked = [mixed(opened, number) for number in range(24)]
        answers = list(pool.map(lambda one: client.post(one[0], json=one[1]).json(), asked))
        until(server.settled)
    for (path, _, request), answer in zip(asked, answers, strict=True):
        expected = alone(opened, request)
        if path == DRAW:
            for image, parts in zip(answer["data"], expected, strict=True):
                same([pixels_of(image["b64_json"])], parts)
        else:
            (choice,) = answer["choices"]
            same([choice["text"] if path == TEXT else choice["message"]["content"]], expected[0] or [""])


def later(client: httpx2.Client, path: str, **body) -> tuple[threading.Thread, list]:
    """Asked in a thread; the answer is in the list when it has come."""
    found = []
    thread = threading.Thread(target=lambda: found.append(client.post(path, json=valid(path) | body)))
    thread.start()
    return thread, found


def test_a_short_text_does_not_wait_for_drawings(engine):
    """Images hold three rows of four, more of them wait, and a text is written before any is done."""
    gate = Gate(engine)
    with serving(engine, FEW) as server, server.client() as client:
        drawings = [later(client, DRAW, n=2, steps=50, seed=n) for n in range(3)]
        until(lambda: server.asked == 3)
        gate.let(1)
        until(lambda: (len(server.scheduler.flows), len(server.scheduler.waiting)) == (1, 2))
        text, found = later(client, TEXT, max_tokens=1)
        until(lambda: server.asked == 4)
        gate.let(5)
        text.join()
        assert found[0].status_code == 200
        assert not any(images for _, images in drawings)
        gate.open()
        for thread, images in drawings:
            thread.join()
            assert images[0].status_code == 200
        until(server.settled)


def test_texts_do_not_shut_images_out(engine):
    """While an image waits, texts get no more than their quarter of the rows, and it gets its turn."""
    gate = Gate(engine)
    with serving(engine, FEW) as server, server.client() as client:
        texts = [later(client, TEXT, max_tokens=3, seed=n) for n in range(4)]
        until(lambda: server.asked == 4)
        gate.let(1)
        drawing, image = later(client, DRAW, n=3, steps=1)
        until(lambda: server.scheduler.arrived)
        gate.let(1)
        texts += [later(client, TEXT, max_tokens=12, seed=9 + n) for n in range(3)]
        gate.open()
        drawing.join()
        assert image[0].status_code == 200
        for thread, found in texts:
            thread.join()
            assert found[0].status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, DRAW])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows_within_one_step(engine, path, stream):
    gate = Gate(engine)
    body = valid(path) | {"n": 2, "stream": stream}
    body |= {"steps": 50, "preview_every": 1} if path == DRAW and stream else {"steps": 50} if path == DRAW else {}
    body |= {"max_tokens": 40} if path != DRAW else {}
    with serving(engine, FEW) as server:
        now = threading.Event()
        thread = threading.Thread(target=server.vanish, args=(path, json.dumps(body).encode(), 20 if stream else 0, now))
        thread.start()
        until(lambda: server.scheduler.flows)
        gate.let(3)
        now.set()
        thread.join()
        until(lambda: all(flow.left for flow in server.scheduler.flows.values()))
        taken = gate.taken
        gate.turns.release()  # the step that was about to be taken
        until(server.settled)
        assert gate.taken <= taken + 1
        with server.client() as client:
            gate.open()
            fine(client)


def test_fifty_clients_that_vanish_leave_nothing_behind(engine):
    with serving(engine, Limits(rows=8)) as server:
        for number in range(50):
            path = (CHAT, DRAW)[number % 2]
            long = {"steps": 900, "preview_every": 1} if path == DRAW else {"max_tokens": 40}
            body = valid(path) | {"stream": True} | long
            server.vanish(path, json.dumps(body).encode(), 1 + number)
        until(server.settled)
        with server.client() as client:
            fine(client)
            assert len(engine.cache.lengths) <= 32  # slots


# Limits


def test_what_is_too_much_is_refused_before_any_work(server):
    with server.client() as client:
        for path, body, word in [
            (DRAW, {"n": 9}, "n must be at most 8"), (DRAW, {"steps": 1001}, "steps must be at most 1000"),
            (TEXT, {"max_tokens": 40_000}, "max_tokens must be at most 32,768"),
            (TEXT, {"prompt": "ab" * 1025}, "2,050 letters"),
            (TEXT, {"prompt": ["a"] * 9}, "n must be at most 8"), (TEXT, {"prompt": "a" * 70}, "positions"),
            (DRAW, {"size": "16x16"}, "size must be auto or one that this run draws: 8x8"),
            (DRAW, {"partial_images": 1}, "only with stream"),
            (CHAT, {"messages": [{"role": "user"}]}, "the request is empty"),
        ]:  # fmt: skip
            answer = client.post(path, json=valid(path) | body)
            assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text
            is_clear(answer)


@pytest.mark.parametrize(("path", "body", "words"), [
    (TEXT, {"prompt": [1] * 100_000}, "prompt has 100,000 elements; at most 256 are read"),
    (TEXT, {"prompt": "a", "stop": [1] * 100_000}, "stop has 100,000 elements; at most 4 are read"),
    (TEXT, {"prompt": "a"} | {f"x{n}": 1 for n in range(50_000)}, "an object has 50,001 fields; at most 64 are read"),
    (CHAT, {"messages": [{}] * 100_000}, "messages has 100,000 elements; at most 256 are read"),
    (CHAT, {"messages": [{}] * 256}, "messages[0].role is missing"),
    *[(CHAT, {"messages": [{"role": "user", name: [{}] * 100_000}]}, f"messages[0].{name} has 100,000 elements")
      for name in ("content", "images", "parts")],
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "modalities": [1] * 100_000}, "modalities has 100,000 elements"),
])  # fmt: skip
def test_a_long_list_costs_one_error_not_one_for_each_element(server, path, body, words):
    with server.client() as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
        is_clear(answer)
    with pytest.raises(ValidationError) as caught:
        (CompletionRequest if path == TEXT else ChatRequest).model_validate(body)
    assert caught.value.error_count() <= 2


def test_every_list_that_may_be_sent_is_short():
    """A list that is added later is found here."""

    def lists(schema) -> list[dict]:
        if isinstance(schema, list):
            return [found for one in schema for found in lists(one)]
        if not isinstance(schema, dict):
            return []
        own = [schema] if schema.get("type") == "list" else []
        return own + [found for one in schema.values() for found in lists(one)]

    kinds = [kind for kind in Strict.__subclasses__() if kind.__module__ == Strict.__module__]
    found = [one for kind in (*kinds, ChatRequest, CompletionRequest) for one in lists(kind.__pydantic_core_schema__)]
    assert len(found) > 5 and all(one.get("fail_fast") for one in found)


@pytest.mark.parametrize("path", [TEXT, DRAW])
def test_a_body_without_pictures_is_small(server, path):
    with server.client() as client:
        answer = client.post(path, json=valid(path) | {"user": "a" * 2**20})
        assert (answer.status_code, "1,048,576 bytes" in answer.text) == (413, True)
        is_clear(answer)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_not_kept(engine, declared):
    with serving(engine, Limits(body_bytes=10_000)) as server, server.client() as client:
        body = json.dumps(valid(TEXT) | {"prompt": "a" * 30_000}).encode()
        content = body if declared else (body[n : n + 1000] for n in range(0, len(body), 1000))
        answer = client.post(TEXT, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        is_clear(answer)
        fine(client)


def test_a_body_that_does_not_come_is_not_waited_for(engine):
    with serving(engine, Limits(client_timeout=0.2)) as server, server.client() as client:
        def slow():
            yield b"{"
            until(lambda: False) if stopped.wait(5) is None else None
            yield b"}"

        stopped = threading.Event()
        threading.Timer(1, stopped.set).start()
        answer = client.post(TEXT, content=slow(), headers={"content-type": "application/json"})
        assert answer.status_code == 408
        is_clear(answer)
        fine(client)


def test_a_client_that_takes_nothing_is_left():
    """The answer's generator is closed, and its place is free again."""
    closed = []

    async def lines():
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            closed.append(True)

    async def app(scope, receive, send):
        await receive()
        await Stream(lines())(scope, receive, send)

    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        await asyncio.sleep(0 if messages else 60)
        return messages.pop()

    async def send(message):
        await asyncio.sleep(60 if message["type"] == "http.response.body" else 0)

    door = LimitsMiddleware(app, Limits(client_timeout=0.05), Metrics())
    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(door(scope, receive, send), 30))
    assert closed and (door.in_flight, door.held_bytes) == (0, 0)


def test_a_full_queue_says_come_back_later(engine):
    gate = Gate(engine)
    with serving(engine, FEW) as server, server.client() as client:
        asked = [later(client, TEXT, seed=n) for n in range(8)]
        until(lambda: server.asked == 8)
        answer = client.post(TEXT, json=valid(TEXT))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        is_clear(answer)
        assert client.get("/health").status_code == 200
        gate.open()
        for thread, found in asked:
            thread.join()
            assert found[0].status_code == 200


def test_who_is_turned_away_takes_no_place_of_those_who_are_let_in(engine):
    """More clients without the key than there are places, whose bodies never end; each is told no, and soon let go."""
    with serving(engine, FEW, api_key="secret") as server, server.client() as client, ExitStack() as stack:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{{".encode()
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(12)]
        for stranger in strangers:
            stranger.sendall(head)
        known = {"authorization": "Bearer secret"}
        assert client.post(TEXT, headers=known, json=valid(TEXT)).status_code == 200
        for stranger in strangers:
            stranger.settimeout(10)  # less than the patience that others get
            with stranger.makefile("rb") as answer:
                said = answer.read().lower()  # to the connection's end
            assert said.startswith(b"http/1.1 401") and b"connection: close" in said


def test_a_client_that_vanishes_while_it_sends_a_form_is_no_fault(engine, caplog):
    sent = form({"prompt": "a"}, [picture()])
    with serving(engine) as server, server.client() as client:
        with socket.create_connection(("127.0.0.1", server.port)) as place:
            place.sendall(
                f"POST {EDIT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {sent.kind}\r\n"
                f"Content-Length: 100000\r\n\r\n".encode() + sent.body[:200]
            )
        counted = f'requests_total{{path="{EDIT}",status="499"}} 1.0'
        until(lambda: counted in client.get("/metrics").text)
    assert not caplog.records


def test_what_nobody_asks_for_stays_within_the_limits_too(opened):
    with serving(Engine(opened), Limits(steps=2, tokens=1)) as server, server.client() as client:
        usual = client.get("/v1/models").json()["data"][0]["generation"]
        assert (usual["steps"], usual["max_tokens"]) == (2, 1) < (opened.run.generation.steps, 1)
        for path, words in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
            assert client.post(path, json=words | {"seed": 1}).json()["usage"]["completion_tokens"] <= 1
        body = {"prompt": "a", "stream": True, "preview_every": 1}
        assert client.post(DRAW, json=body).text.count("event: image_generation.partial_image") == 2


def test_images_of_codes_have_as_many_steps_as_codes(opened):
    with serving(engine_with_codes()) as server, server.client() as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["image_steps"] == {"3x2": 6, "4x4": 16}
        body = {"prompt": "a", "size": "4x4", "stream": True, "partial_images": 3, "seed": 1}
        found = re.findall(r'"step":\s*(\d+)', client.post(DRAW, json=body).text)
        assert found == ["4", "8", "12"]
        for path, asked in ((DRAW, {"prompt": "a", "steps": 5}), (CHAT, valid(CHAT) | {"steps": 5})):
            answer = client.post(path, json=asked)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")
            is_clear(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(engine, stream):
    gate = Gate(engine)
    with serving(engine, Limits(deadline=0.3)) as server, server.client() as client:
        thread, found = later(client, DRAW, steps=900, stream=stream)
        thread.join(0.6)
        gate.open()
        thread.join()
        assert found[0].status_code == 504
        assert found[0].json()["error"]["type"] == "server_error"
        until(server.settled)


def test_a_step_that_fails_fails_its_requests_alone(opened):
    engine = Engine(opened)
    engine.step = lambda: 1 / 0
    with serving(engine) as server, server.client() as client:
        answer = client.post(TEXT, json=valid(TEXT))
        assert answer.status_code == 500
        assert "ZeroDivision" not in answer.text and "Traceback" not in answer.text
        assert server.engine is not engine
        fine(client)


def test_malformed_requests_get_one_clear_sentence_and_it_still_serves(server):
    """`python -m tests.abuse` sends 2,000, and looks at the memory."""
    with server.client() as client:

        @settings(examples(120), suppress_health_check=list(HealthCheck))
        @given(malformed)
        def send(sent):
            is_clear(sent.to(client))

        send()
        fine(client)
    until(server.settled)


# Who may ask


def test_a_key_is_asked_for_on_every_path_but_health_and_the_page(engine):
    with serving(engine, api_key="secret-é") as server, server.client() as client:
        paths = [("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/none"),
                 *[("POST", path) for path in (CHAT, TEXT, DRAW, EDIT)]]  # fmt: skip
        basic = base64.b64encode(b"me:wrong").decode()
        for said in (None, "Bearer wrong", "Bearer", "Bearer secret", "Basic !", f"Basic {basic}", "secret-é".encode()):
            headers = {} if said is None else {"authorization": said}
            for method, path in paths:
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (said, path)
                is_clear(answer)
        for path in ("/health", "/", "/index.html", "/main.js"):
            assert client.get(path).status_code == 200
        for said in ("Bearer secret-é", "Basic " + base64.b64encode("me:secret-é".encode()).decode()):
            headers = {"authorization": said.encode()}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.post(TEXT, headers=headers, json=valid(TEXT)).status_code == 200


def test_other_sites_may_not_ask(server):
    with server.client() as client:
        own = server.url
        for origin in ("https://example.org", "null", "http://127.0.0.1:1", "http://localhost.example.org", "http://["):
            answer = client.post(TEXT, json=valid(TEXT), headers={"origin": origin})
            assert answer.status_code == 403
            is_clear(answer)
            assert "access-control-allow-origin" not in answer.headers
        assert client.post(TEXT, json=valid(TEXT), headers={"origin": own}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example.org"}).status_code == 403
        assert client.get("/v1/models", headers={"host": f"localhost:{server.port}"}).status_code == 200


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("", False), ("192.168.1.2", False), ("example.org", False),
])  # fmt: skip
def test_which_addresses_are_this_machine_alone(host, local):
    assert is_local(host) == local


def test_pictures_larger_than_allowed_are_not_decoded(engine):
    with serving(engine, Limits(pixels=24 * 16)) as server, server.client() as client:
        def ask(content: bytes) -> httpx2.Response:
            part = {"type": "image_url", "image_url": {"url": url(content)}}
            return client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})

        assert ask(picture()).status_code == 200
        assert "at most 384 are read" in ask(png(25, 16)).json()["error"]["message"]


# The command


def command(run: Path, *options: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0", *options], stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def test_the_readmes_server_answers_the_readmes_requests_and_ends_well(run, tmp_path, monkeypatch):
    """What the README shows, on a free port. SIGTERM lets an answer under way come to its end."""
    section = re.search(r"\n## Serve\n(.*?)\n## ", Path("README.md").read_text(), re.DOTALL)[1]
    curl, python = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("", "python"))
    assert "transfusion serve runs/digits" in curl
    process = command(run)
    try:
        base = re.search(r"http://\S+", process.stderr.readline())[0]
        sent = re.search(r"curl (\S+) -H '([\w-]+): (\S+)'\s+-d '(.*?)'", curl.replace("\\\n", ""), re.DOTALL)
        answer = httpx2.post(
            sent[1].replace("http://127.0.0.1:8000", base).replace("localhost:8000", base), headers={sent[2]: sent[3]},
            content=sent[4].replace("digits", "tiny"), timeout=60,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        monkeypatch.chdir(tmp_path)
        exec(python.replace("http://127.0.0.1:8000", base).replace('"digits"', '"tiny"'), {})
        with httpx2.Client(base_url=base, timeout=60) as client:
            body = valid(DRAW) | {"steps": 200, "stream": True, "preview_every": 50}
            with client.stream("POST", DRAW, json=body) as answer:
                lines = answer.iter_lines()
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
    (("--limits.rows", "0"), {}, "limits.rows must be at least 1"),
    (("--limits.shutdown-grace", "inf"), {}, "limits.shutdown_grace must be"),
    (("--limits.shutdown-grace", "nan"), {}, "limits.shutdown_grace must be"),
    (("--host", "no.such.host.invalid", "--api-key", "a"), {}, "cannot listen at no.such.host.invalid"),
    (("--port", "99999"), {}, "0 to 65535"), (("--port", "x"), {}, "port"),
])  # fmt: skip
def test_what_cannot_be_served_is_said_in_one_line(run, capsys, monkeypatch, options, environment, words):
    from transfusion.cli import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(run), *options])
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert words in said.err + said.out and "Traceback" not in said.err
