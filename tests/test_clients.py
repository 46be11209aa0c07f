"""Clients that people have: what they send by default is answered, or refused in one sentence; pages of other sites."""

import asyncio
import base64
import io
import json
import socket
import string
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from PIL import Image as PILImage
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tests import tiny
from tests.abuse import (
    CHAT,
    DRAW,
    EDIT,
    TEXT,
    assert_clear_error,
    form_request,
    make_picture,
    to_data_url,
    valid_body,
)
from tests.drawn_requests import send_drawn
from tests.lazy import Lazy
from tests.profile import THOROUGH, examples
from tests.serving import TIMEOUT, Gate, serving, wait_until
from transfusion.codecs.pictures import to_pixels
from transfusion.codecs.text import Tokenizer
from transfusion.evaluation.likelihood import likelihoods
from transfusion.evaluation.multiple_choice import Question, answer_questions
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.inference.request import TokenLogprob
from transfusion.sequence import Vocabulary
from transfusion.serving import answers
from transfusion.serving.hosts import parse_origin
from transfusion.serving.limits import Limits
from transfusion.serving.logprobs import CompletionLogprobs, TokenNames
from transfusion.serving.pictures import _decode_data_url
from transfusion.serving.served import nearest_size

completions = Lazy("lm_eval.models.openai_completions")
openai, langchain, messages, litellm = map(Lazy, ("openai", "langchain_openai", "langchain_core.messages", "litellm"))

PICTURE = {"type": "image_url", "image_url": {"url": to_data_url(make_picture())}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

SITE = "https://chat.example.org"
PREFLIGHT = {"origin": SITE, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, x-stainless-os"}  # fmt: skip


@pytest.fixture(scope="module")
def opened(written):
    return open_run(written).opened


@pytest.fixture(scope="module")
def server(opened):
    """Of a run that claims that it was trained on edits. Shared by many tests; each leaves it idle."""
    with serving(Engine(replace(opened, notes={"edits": True}))) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
    wait_until(server.is_idle)


def ask(client: httpx2.Client, path: str, **fields) -> httpx2.Response:
    """The answer to a valid request with these fields changed; an edit is sent as a form."""
    if path == EDIT:
        return form_request({"prompt": "b", "steps": "1", "seed": "1"} | fields, [make_picture()]).send(client)
    return client.post(path, json=valid_body(path) | fields)


def read_picture(url_or_base64: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(url_or_base64.rpartition(",")[2])))


@pytest.fixture
def local_only(monkeypatch):
    """Clients connect to this machine only: some read price lists or send traces."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.delenv("LANGCHAIN_TRACING_V2", raising=False)
    connect = socket.socket.connect

    def connect_locally(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


# Clients


def test_openai_maps_errors_to_its_exceptions(client, server):
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for error, changes in (
        (openai.NotFoundError, {"model": "gpt-4o"}), (openai.BadRequestError, {"tools": [TOOL]}),
        (openai.BadRequestError, {"response_format": {"type": "json_object"}}), (openai.BadRequestError, {"n": 99}),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            api.chat.completions.create(**body | changes)
        assert caught.value.param == next(iter(changes)) and "\n" not in caught.value.message
    with pytest.raises(openai.BadRequestError, match="mask is not supported"):
        api.images.edit(image=make_picture(), mask=make_picture(), prompt="a")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4o")


def test_openai_maps_the_status_of_a_full_or_locked_server(opened):
    engine = Engine(opened)
    gate = Gate(engine)
    with serving(engine, Limits(max_sequences=1, waiting=0), api_key="secret") as server, ThreadPoolExecutor(1) as pool:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "seed": 1}
        running = pool.submit(api.completions.create, **body)
        wait_until(lambda: server.num_requests)
        with pytest.raises(openai.RateLimitError):
            api.completions.create(**body)
        gate.open()
        assert running.result().choices
        assert api.with_options(max_retries=5).completions.create(**body).choices  # it waits as Retry-After demands
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="wrong").models.list()


def test_openai_draws_and_edits_in_every_form(client, server):
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options = {"prompt": "a", "model": "tiny", "n": 2, "size": "auto", "quality": "auto", "extra_body": {"steps": 1}}
    drawn = api.images.generate(**options, output_format="webp", response_format="url", background="auto")
    assert [read_picture(image.url).format for image in drawn.data] == ["WEBP"] * 2
    edited = api.images.edit(image=[make_picture()] * 2, **options, output_format="jpeg")
    assert [read_picture(image.b64_json).format for image in edited.data] == ["JPEG"] * 2
    assert (drawn.output_format, edited.output_format, drawn.size) == ("webp", "jpeg", "8x8")
    last = list(api.images.generate(**options, stream=True, partial_images=0))[-1]
    assert read_picture(last.b64_json).format == "PNG"


@pytest.mark.slow
def test_langchain(client, server, local_only):
    options = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "max_tokens": 4}
    model = langchain.ChatOpenAI(**options, seed=1, temperature=0.5, stop=["\0"])
    expected = ask(client, CHAT, max_tokens=4, temperature=0.5).json()
    answer = model.invoke("three")
    assert answer.content == expected["choices"][0]["message"]["content"]
    assert answer.usage_metadata["total_tokens"] == expected["usage"]["total_tokens"]
    assert "".join(chunk.content for chunk in model.stream("three")) == answer.content
    assert [it.content for it in model.batch(["three", "three"])] == [answer.content] * 2
    assert asyncio.run(model.ainvoke("three")).content == answer.content
    history = [messages.SystemMessage("a"), messages.HumanMessage([{"type": "text", "text": "b"}, PICTURE]),
               messages.AIMessage("c"), messages.HumanMessage("d")]  # fmt: skip
    assert model.invoke(history).usage_metadata["input_tokens"] > 16
    assert model.bind_tools([]).invoke("three").content == answer.content
    for method in ("json_schema", "json_mode", "function_calling"):
        with pytest.raises(openai.BadRequestError, match="(response_format|tools) is not supported: leave it out"):
            model.with_structured_output(TOOL["function"] | {"title": "f"}, method=method).invoke("a")
    tool_call = {"name": "f", "args": {}, "id": "1"}
    called = [messages.AIMessage("", tool_calls=[tool_call]), messages.ToolMessage("b", tool_call_id="1")]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].tool_calls is not supported"):
        model.invoke(called)


@pytest.mark.slow
def test_litellm(client, server, local_only):
    options = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0}
    chat = {"messages": [{"role": "user", "content": "three"}], "max_tokens": 4, "seed": 1} | options
    expected = ask(client, CHAT, max_tokens=4).json()["choices"][0]["message"]["content"]
    assert litellm.completion(**chat).choices[0].message.content == expected
    chunks = litellm.completion(**chat, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    drawn = litellm.completion(**chat, modalities=["image"]).choices[0].message
    assert read_picture(drawn.images[0]["image_url"]["url"]).size == (8, 8)
    for message in (drawn, drawn.model_dump()):  # sent back
        chat["messages"] = [{"role": "user", "content": "three"}, message]
        assert litellm.completion(**chat).usage.prompt_tokens > 16
    text = {"prompt": "three", "max_tokens": 4, "seed": 1} | options
    expected = ask(client, TEXT, max_tokens=4).json()["choices"][0]["text"]
    assert litellm.text_completion(**text).choices[0].text == expected
    assert "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True)) == expected
    images = litellm.image_generation(prompt="a", n=2, size="8x8", quality="auto", **options)
    assert [read_picture(image.b64_json).size for image in images.data] == [(8, 8)] * 2
    assert read_picture(litellm.image_edit(image=make_picture(), prompt="a", **options).data[0].b64_json).size == (8, 8)
    for error, changes in (
        (litellm.NotFoundError, {"model": "openai/none"}), (litellm.BadRequestError, {"tools": [TOOL]}),
        (litellm.BadRequestError, {"response_format": {"type": "json_object"}}),
    ):  # fmt: skip
        with pytest.raises(error, match="there is no model" if "model" in changes else next(iter(changes))):
            litellm.completion(**chat | changes)


WEB_UI = [  # what Open WebUI sends: a conversation, the requests in the background for its title and tags, a drawing
    (CHAT, {"stream": True, "model": "tiny", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [
        {"type": "text", "text": "three"}, PICTURE]}], "stream_options": {"include_usage": True}, "max_tokens": 2}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "### Task:\na title"}], "stream": False,
            "max_completion_tokens": 2}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "tags"}], "stream": False, "max_tokens": 2,
            "metadata": {"task": "tags_generation", "chat_id": "1"}}),
    (DRAW, {"model": "tiny", "prompt": "three", "n": 1, "size": "8x8", "response_format": "b64_json"}),
    (DRAW, {"model": "tiny", "prompt": "three", "n": 1}),
]  # fmt: skip
LIBRE_CHAT = [  # what LibreChat sends: a conversation, its title, the drawing tools for two models
    (CHAT, {"model": "tiny", "user": "65f0", "stream": True, "temperature": 1, "top_p": 1, "presence_penalty": 0,
            "frequency_penalty": 0, "stream_options": {"include_usage": True}, "max_tokens": 2,
            "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "three"}]}),
    (CHAT, {"model": "tiny", "temperature": 0.2, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 2,
            "stream": False, "user": "1", "messages": [{"role": "user", "content": "a title"}], "stop": ["||>", "\nUser:"]}),
    (DRAW, {"model": "tiny", "prompt": "three", "quality": "standard", "style": "vivid", "size": "auto", "n": 1}),
    (DRAW, {"model": "tiny", "prompt": "three", "n": 1, "background": "auto", "output_format": "webp",
            "output_compression": 100, "quality": "auto", "size": "auto"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [*WEB_UI, *LIBRE_CHAT])
def test_requests_of_front_ends_are_answered(client, path, body):
    response = client.post(path, json=body, headers={"authorization": "Bearer none"}, params={"api-version": "2024"})
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"total_tokens"' in response.text


def test_forms_of_front_ends_are_answered(client):
    """Open WebUI's edit of one picture and of several, LibreChat's edit."""
    picture = "a.png", make_picture(), "image/png"
    for name, count, fields in (
        ("image", 1, {"n": "1", "response_format": "b64_json"}), ("image[]", 2, {"background": "auto"}),
        ("image[]", 1, {"quality": "auto", "size": "auto"}),
    ):  # fmt: skip
        response = client.post(EDIT, data={"model": "tiny", "prompt": "three"} | fields, files=[(name, picture)] * count)
        assert response.status_code == 200 and read_picture(response.json()["data"][0]["b64_json"]).size == (8, 8)


def test_front_ends_list_the_models_with_and_without_a_key(client):
    for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "Bearer"}):
        (model,) = client.get("/v1/models", headers=headers).json()["data"]
        assert {"id": "tiny", "object": "model", "owned_by": "transfusion"}.items() <= model.items()


# What is accepted


@pytest.mark.parametrize(("path", "fields"), [
    *[(path, {"user": "me", "metadata": {}, "store": False, "service_tier": "auto", "n": 1, "stream": None, "model": "tiny",
              "safety_identifier": "x", "unknown": None}) for path in (CHAT, TEXT, DRAW)],
    (CHAT, {"tools": [], "functions": [], "tool_choice": "none", "function_call": "auto", "parallel_tool_calls": True}),
    (CHAT, {"max_tokens": 2, "max_completion_tokens": 2}), (CHAT, {"max_tokens": None, "max_completion_tokens": 2}),
    (CHAT, {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
            "logprobs": False, "top_logprobs": None, "stream_options": {"include_usage": True}, "reasoning_effort": "none"}),
    (CHAT, dict.fromkeys(("max_completion_tokens", "temperature", "top_p", "stop", "tools", "tool_choice", "response_format",
                          "modalities", "stream_options", "logprobs", "steps", "guidance_scale", "logit_bias"))),
    (CHAT, {"messages": [{"role": "user", "content": "three", "name": "me", "tool_calls": [], "function_call": None,
                          "refusal": "no", "reasoning_content": "b", "annotations": [], "audio": None}]}),
    (CHAT, {"steps": 1, "num_inference_steps": 1}),
    (TEXT, {"best_of": 2, "n": 2}), (TEXT, {"best_of": 1, "suffix": "", "presence_penalty": 0}),
    (DRAW, {"quality": "auto", "size": "auto", "background": "auto", "moderation": "auto", "output_format": "png"}),
    (DRAW, {"quality": "standard", "style": "vivid", "background": "opaque", "moderation": "low", "frame_count": 1}),
    (DRAW, {"steps": 1, "num_inference_steps": 1}), (DRAW, {"steps": None, "num_inference_steps": 1}),
    (EDIT, {"quality": "auto", "size": "auto", "background": "auto", "input_fidelity": "low", "n": "1", "user": "me",
            "response_format": "b64_json", "output_format": "png", "output_compression": "100", "num_inference_steps": "1"}),
])  # fmt: skip
def test_fields_without_effect_change_nothing(client, path, fields):
    responses = ask(client, path), ask(client, path, **fields)
    assert responses[1].status_code == 200, responses[1].text
    plain, other = ((answer.get("choices") or answer["data"])[0] for answer in (response.json() for response in responses))
    assert plain == other


# What is refused


@pytest.mark.parametrize(("path", "fields", "message"), [
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported: leave it out, or send []"),
    (CHAT, {"tool_choice": "required"}, 'tool_choice "required" is not supported: leave it out, or send "none" or "auto"'),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice is not supported: leave it out"),
    (CHAT, {"response_format": {"type": "json_object"}}, 'is not supported: leave it out, or send {"type": "text"}'),
    (CHAT, {"logit_bias": {"1": 5}}, "logit_bias is not supported: leave it out, or send {}"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty 0.5 is not supported: leave it out, or send 0"),
    (TEXT, {"frequency_penalty": -1}, "frequency_penalty -1 is not supported: leave it out, or send 0"),
    (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens and max_completion_tokens are the same option"),
    (CHAT, {"moderation": {"mode": "block"}}, "moderation is not supported"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]},
     "messages[0].role should be 'system', 'developer', 'user' or 'assistant', not \"tool\""),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls is not supported"),
    (TEXT, {"best_of": 3, "n": 2}, "best_of must be equal to n"), (TEXT, {"suffix": "b"}, 'suffix "b" is not supported'),
    (DRAW, {"steps": 1, "num_inference_steps": 2}, "steps and num_inference_steps are the same option: send one of them"),
    (DRAW, {"steps": None, "num_inference_steps": 0}, "num_inference_steps should be greater than or equal to 1, not 0"),
    (DRAW, {"steps": None, "num_inference_steps": 2000}, "num_inference_steps must be at most 1000"),
    (DRAW, {"n": "3"}, 'n should be a valid integer, not "3"'),
    (DRAW, {"size": "1024x1024"}, "size 1024x1024 is not supported: send 8x8 (the nearest size of this run) or auto"),
    (DRAW, {"size": "big"}, "size must be auto or WIDTHxHEIGHT, such as 8x8"),
    (DRAW, {"quality": "hd"}, 'quality "hd" is not supported: leave it out, or send "auto" or "standard"'),
    (DRAW, {"mask": "x"}, "mask"), (DRAW, {"output_format": "gif"}, "'png', 'jpeg' or 'webp', not \"gif\""),
    (DRAW, {"output_compression": 50}, "output_compression has no effect on png"),
    (DRAW, {"background": "transparent"}, 'background "transparent" is not supported'),
    (DRAW, {"model": "gpt-image-1"}, 'there is no model "gpt-image-1" here: use "tiny"'),
    (EDIT, {"mask": "x"}, "mask"), (EDIT, {"image": "x"}, "image must be a file"), (EDIT, {"n": "x"}, "n should be"),
])  # fmt: skip
def test_unsupported_values_are_refused_in_one_sentence(client, path, fields, message):
    response = ask(client, path, **fields)
    assert response.status_code == (404 if "model" in fields else 400) and message in response.json()["error"]["message"]
    assert_clear_error(response)
    param = response.json()["error"]["param"]
    assert param in fields or param.startswith("messages[0]")


def test_a_mask_file_and_a_field_that_comes_twice_are_refused(client):
    edit = {"files": [("image", ("a.png", make_picture()))]}
    for form, message in (
        ({"files": [*edit["files"], ("mask", ("a.png", make_picture()))], "data": {"prompt": "b"}}, "mask is not supported"),
        ({"files": [*edit["files"], ("user", ("a.png", make_picture()))], "data": {"prompt": "b"}}, "must be text, not a"),
        (edit | {"data": {"prompt": ["b", "c"]}}, "the form field prompt comes twice: send it once"),
    ):
        response = client.post(EDIT, **form)
        assert response.status_code == 400 and message in response.json()["error"]["message"]
        assert_clear_error(response)


@pytest.mark.parametrize(("path", "fields"), [
    (DRAW, {}), (DRAW, {"size": "8x8"}), (CHAT, {"modalities": ["image"]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": to_data_url(make_picture())}]}]}),
])  # fmt: skip
def test_a_run_without_images_refuses_pictures(path, fields):
    with serving(tiny.build_engine(shapes=())) as server, server.client() as client:
        response = ask(client, path, **fields)
        assert response.status_code == 400 and "does not support images" in response.json()["error"]["message"]
        assert client.post(TEXT, json=valid_body(TEXT)).status_code == 200


@pytest.mark.parametrize(("size", "sizes", "nearest"), [
    ((1024, 1024), [(32, 16), (16, 16)], (16, 16)), ((512, 512), [(8, 8), (16, 16)], (16, 16)),
    ((9, 9), [(8, 8), (16, 16)], (8, 8)), ((1792, 1024), [(16, 16), (32, 16), (16, 32)], (32, 16)),
])  # fmt: skip
def test_the_nearest_size_has_the_nearest_shape(size, sizes, nearest):
    assert nearest_size(size, sizes) == nearest


# Pictures in requests and answers


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["", "data:;base64,", "DATA:image/PNG;Base64,",
       "data:image/png;charset=utf-8;base64,", "data:image/png; base64,"]), st.data())  # fmt: skip
@examples(200)
def test_base64_is_read_as_clients_write_it(content, prefix, data):
    text = data.draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))(content).decode()
    text = text.rstrip("=") if data.draw(st.booleans()) else text
    text = data.draw(st.sampled_from([lambda text: text, lambda text: text.replace("+", "%2B").replace("=", "%3D")]))(text)
    if "%" not in text:
        width = data.draw(st.integers(1, 80))
        text = data.draw(st.sampled_from(["\n", "\r\n", ""])).join(text[n : n + width] for n in range(0, len(text), width))
    assert _decode_data_url(prefix + text) == content


@pytest.mark.parametrize("url", [to_data_url(make_picture()), to_data_url(make_picture()).partition(",")[2]])
@pytest.mark.parametrize("is_object", [True, False])
def test_a_picture_can_be_a_text_or_an_object(client, url, is_object):
    part = {"type": "image_url", "image_url": {"url": url, "detail": "auto"} if is_object else url}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    response = ask(client, CHAT, messages=messages)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] > 16


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("as_url", [True, False])
@pytest.mark.parametrize("path", [DRAW, EDIT])
def test_images_have_the_format_that_is_asked_for(client, path, file_format, as_url):
    fields = {"output_format": file_format, "response_format": "url" if as_url else "b64_json"}
    plain = ask(client, path).json()["data"][0]["b64_json"]
    answer = ask(client, path, **fields).json()
    (image,) = answer["data"]
    assert answer["output_format"] == file_format and list(image) == ["url" if as_url else "b64_json"]
    assert not as_url or image["url"].startswith(f"data:image/{file_format};base64,")
    picture = read_picture(*image.values())
    assert picture.format == file_format.upper() and picture.size == (8, 8)
    difference = np.asarray(picture.convert("L"), int) - np.asarray(read_picture(plain))
    assert np.abs(difference).max() <= (0 if file_format == "png" else 12)


def test_previews_have_the_format_too(client):
    fields = {"stream": True, "preview_every": 1, "steps": 2, "output_format": "jpeg", "output_compression": 40}
    text = ask(client, DRAW, **fields).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    pictures = [event[name] for event in events for name in ("b64_json", "noisy_b64_json") if name in event]
    assert len(pictures) == 5 and all(read_picture(picture).format == "JPEG" for picture in pictures)
    assert {event["output_format"] for event in events} == {"jpeg"}


def test_a_lower_quality_gives_smaller_files(client):
    sizes = [len(ask(client, DRAW, output_format="jpeg", output_compression=quality).json()["data"][0]["b64_json"])
             for quality in (0, 50, 100)]  # fmt: skip
    assert sizes == sorted(set(sizes))


# Negative prompts


@pytest.mark.parametrize("path", [DRAW, EDIT, CHAT])
def test_a_negative_prompt_is_that_of_the_engine(client, opened, path):
    picture = to_pixels(PILImage.open(io.BytesIO(make_picture())), [(8, 8)], 1)
    fields = {"negative_prompt": "no", "guidance_scale": "3" if path == EDIT else 3.0}
    fields |= {"modalities": ["image"], "steps": 1} if path == CHAT else {}
    answer = ask(client, path, **fields).json()
    message = answer["choices"][0]["message"] if path == CHAT else {}
    drawn = message["images"][0]["image_url"]["url"] if path == CHAT else answer["data"][0]["b64_json"]
    parts = {DRAW: ("three",), CHAT: ("three",), EDIT: (picture, "b")}[path]
    generation = replace(opened.run.generation, steps=1, guidance_scale=3.0)
    requests = [Request(parts, 1, 1, generation, negative_prompt=text) for text in ("no", None)]
    expected, without = (Engine(opened).generate([request])[0][0].parts[0] for request in requests)
    pixels = np.asarray(read_picture(drawn))[..., None].astype(int)
    assert np.abs(pixels - expected).max() <= 2 < np.abs(pixels - without).max()


def test_a_negative_prompt_without_effect_is_refused(client):
    for path, fields, message in (
        (CHAT, {}, "negative_prompt has no effect"), (DRAW, {"guidance_scale": 1.0}, "negative_prompt has no effect"),
        (DRAW, {"negative_prompt": "a" * 3000}, "the text has 3,000 characters"), (DRAW, {"negative_prompt": 1}, "string"),
    ):  # fmt: skip
        response = ask(client, path, **{"negative_prompt": "no"} | fields)
        assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
        assert_clear_error(response)


# Log probabilities, echo and prompts as token ids


def complete(client: httpx2.Client, **fields) -> dict:
    """The first choice of /v1/completions."""
    response = client.post(TEXT, json={"seed": 1, "max_tokens": 4} | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def join_chunks(client: httpx2.Client, **fields) -> dict:
    """The same from a stream."""
    text = client.post(TEXT, json={"seed": 1, "max_tokens": 4, "stream": True} | fields).text
    choices = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    logprobs = [choice["logprobs"] for choice in choices]
    joined = logprobs[0] and {name: [it for part in logprobs for it in part[name]] for name in logprobs[0]}
    return {"text": "".join(choice["text"] for choice in choices), "logprobs": joined}


@pytest.mark.parametrize("prompt", ["a tree", "é€ \U0001f600", ""])
@pytest.mark.parametrize("num_top", [0, 3])
def test_the_echo_has_the_log_probability_of_every_token(client, opened, prompt, num_top):
    choice = complete(client, prompt=prompt, echo=True, logprobs=num_top)
    logprobs, text = choice["logprobs"], choice["text"]
    assert text.startswith(prompt) and len({len(values) for values in logprobs.values()}) == 1
    expected = likelihoods(Engine(opened), [("", prompt)])[0].log_probs
    assert logprobs["token_logprobs"][: len(expected)] == pytest.approx(expected, abs=1e-4)
    assert len(logprobs["tokens"]) >= len(expected) + 1  # also if the answer is only eos
    ids, bytes_of = opened.tokenizer.encode(prompt), opened.tokenizer.token_bytes
    starts = [len(b"".join(map(bytes_of, ids[:n])).decode(errors="ignore")) for n in range(len(ids))]
    assert logprobs["text_offset"][: len(ids)] == starts
    for token, value, top in zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top is None if num_top == 0 else (top[token] == value and num_top <= len(top) <= num_top + 1)
    assert join_chunks(client, prompt=prompt, echo=True, logprobs=num_top) == {"text": text, "logprobs": logprobs}
    assert complete(client, prompt=prompt, logprobs=num_top)["text"] == text.removeprefix(prompt)


def test_token_ids_are_the_prompt_that_they_spell(client, opened):
    bos, ids = opened.vocabulary.bos, list(opened.tokenizer.encode("a tree"))
    whole = complete(client, prompt="a tree", echo=True, logprobs=1)
    assert complete(client, prompt=ids, echo=True, logprobs=1) == whole
    with_bos = complete(client, prompt=[bos, *ids], echo=True, logprobs=1)
    assert with_bos["text"] == whole["text"]
    assert with_bos["logprobs"]["token_logprobs"] == [None, *whole["logprobs"]["token_logprobs"]]  # of what the client sent
    assert (with_bos["logprobs"]["tokens"][0], with_bos["logprobs"]["top_logprobs"][0]) == ("<bos>", None)
    response = client.post(TEXT, json={"prompt": [ids, [bos, *ids], ids[:1]], "seed": 1, "max_tokens": 4})
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert [whole["text"].removeprefix("a tree")] * 2 == texts[:2] and len(texts) == 3


def test_a_score_alone_samples_nothing(client, opened):
    body = {"prompt": ["a", "bc"], "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}
    answer = client.post(TEXT, json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", "a", "bc", "bc"]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [1, 1, 2, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(client, prompt="abc", max_tokens=0, echo=True)["text"] == "abc"
    assert join_chunks(client, prompt="abc", max_tokens=0, echo=True)["text"] == "abc"
    longest = [5] * (opened.run.data.seq_len - 1)
    assert len(complete(client, prompt=longest, max_tokens=0, echo=True, logprobs=0)["logprobs"]["tokens"]) == len(longest)


@pytest.mark.parametrize(("fields", "message"), [
    ({"prompt": [0, 261]}, "prompt has the token id 261, which is not an id of text: use 0 to 259, and 260 (bos) at"),
    ({"prompt": [-1]}, "prompt has the token id -1"), ({"prompt": [5, 260]}, "prompt has the token id 260"),
    ({"prompt": [2**70]}, "prompt has the token id"), ({"prompt": [5] * 63}, "take 65 positions; the run supports at"),
    *[({"prompt": prompt}, "prompt must be a text, a list of token ids, or a list of several of either")
      for prompt in ([1, "a"], ["a", None], [True], [[1, True]], 5, {"a": 1}, [1.5], [[["a"]]])],
    ({"prompt": []}, "prompt is empty"), ({"prompt": ["a", "\ud800"]}, "prompt is not valid Unicode"),
    ({"logprobs": 21}, "logprobs should be less than or equal to 20, not 21"), ({"logprobs": True}, "logprobs should be"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, or 0 with echo: true"), ({"echo": "yes"}, "echo should be"),
])  # fmt: skip
def test_wrong_prompts_and_scores_are_refused(client, fields, message):
    response = client.post(TEXT, content=json.dumps({"prompt": "a"} | fields), headers={"content-type": "application/json"})
    assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
    assert_clear_error(response)


def test_a_chat_has_log_probabilities(client, opened):
    body = {"messages": [{"role": "user", "content": "three"}], "seed": 4, "max_tokens": 12, "logprobs": True}
    choice = client.post(CHAT, json=body | {"top_logprobs": 2}).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(it for entry in content for it in entry["bytes"]).decode(errors="replace") == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0]["logprob"] >= entry["logprob"]
    text = client.post(CHAT, json=body | {"top_logprobs": 2, "stream": True}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == content
    plain = client.post(CHAT, json=body).json()["choices"][0]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[]] * len(content)
    assert client.post(CHAT, json=body | {"logprobs": 0}).json()["choices"][0]["logprobs"] is None
    response = ask(client, CHAT, top_logprobs=2)
    assert "top_logprobs needs logprobs: true" in response.json()["error"]["message"]


def test_log_probabilities_end_before_a_stop_word():
    """Those of the tokens that begin before it, in a stream too."""
    bytes_of = TOKENIZERS[0].token_bytes
    engine = tiny.build_engine(lambda it: {n: -99 for n in range(it.num_text_tokens) if not bytes_of(n).isalpha()})
    with serving(engine) as server, server.client() as client:
        whole = complete(client, prompt="a", max_tokens=12, logprobs=0)
        tokens, offsets, text = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], whole["text"]
        assert "".join(tokens).startswith(text) and len(text) > 9
        for end in (2, 6, 9):
            stop = text[end - 2 : end]
            begin = text.index(stop)
            held = text[max(0, begin - 2) : begin + 1] + "\0"  # text is also held back for a word that does not follow
            for read in (complete, join_chunks):
                stopped = read(client, prompt="a", max_tokens=12, logprobs=0, stop=[stop, held])
                assert stopped["text"] == text[:begin]
                expected = [token for token, offset in zip(tokens, offsets, strict=True) if offset < begin]
                assert (stopped["logprobs"] or {"tokens": []})["tokens"] == expected


def sentencepiece_like() -> Tokenizer:
    """Words begin with a mark that is a space; unknown characters are bytes."""
    vocab = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    tokenizer = HFTokenizer(models.BPE({token: id_ for id_, token in enumerate(vocab)}, [("\u2581", "a"), ("a", "b")],
                                       byte_fallback=True))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    tokenizer.add_special_tokens(["<s>"])
    return Tokenizer(tokenizer)


TOKENIZERS = [tiny.tokenizer(), sentencepiece_like()]


@given(st.text("ab é€\U0001f600\ufffd\n<", max_size=20), st.sampled_from(TOKENIZERS))
@examples(200)
def test_the_bytes_of_tokens_are_the_text(text, tokenizer):
    content = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert content.decode() == text or content.decode() == " " + text  # the space that SentencePiece puts before a text


def test_special_tokens_add_nothing():
    assert [tokenizer.token_bytes(10**6) for tokenizer in TOKENIZERS] == [b"", b""]
    assert TOKENIZERS[1].token_bytes(0) == b"" and TOKENIZERS[1].token_bytes(1 + 0xE2) == b"\xe2"


def test_eos_has_a_log_probability_in_completions_alone():
    """lm_eval leaves out the last entry, which must be that of a sampled token."""
    with serving(tiny.build_engine(lambda vocabulary: {vocabulary.eos: 99})) as server, server.client() as client:
        choice = complete(client, prompt="ab", echo=True, logprobs=1, max_tokens=1)
        assert (choice["finish_reason"], choice["text"]) == ("stop", "ab")
        assert choice["logprobs"]["tokens"][-1] == "<eos>" and choice["logprobs"]["token_logprobs"][-1] > -1
        assert "".join(choice["logprobs"]["tokens"][:-1]) == "ab"
        assert join_chunks(client, prompt="ab", echo=True, logprobs=1, max_tokens=1)["logprobs"] == choice["logprobs"]
        (choice,) = ask(client, CHAT, logprobs=True).json()["choices"]
        assert (choice["logprobs"]["content"], choice["message"]["content"]) == ([], "")


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_many_log_probabilities_do_not_stop_the_event_loop(client, monkeypatch, fields):
    """Those of long prompts take seconds: they are written in a thread."""
    loops, original = [], CompletionLogprobs.format

    def write(logprobs, entries):
        loops.extend([asyncio._get_running_loop()] if len(entries) > 1 else [])
        return original(logprobs, entries)

    monkeypatch.setattr(CompletionLogprobs, "format", write)
    body = {"prompt": [[5] * 50] * 2, "echo": True, "logprobs": 20, "max_tokens": 0}
    assert client.post(TEXT, json=body | fields).status_code == 200
    assert loops == [None, None]


def test_other_threads_run_while_an_answer_is_written():
    done, turns = threading.Event(), []

    def take_turns():
        while not done.wait(1e-4):
            turns.append(1)

    thread = threading.Thread(target=take_turns)
    thread.start()
    wait_until(lambda: turns)
    before = len(turns)
    answers.write_json({"logprobs": [[n / 7] for n in range(100_000)]})
    num_turns = len(turns) - before
    done.set()
    thread.join()
    assert num_turns > 5


def test_of_tokens_with_one_name_the_most_likely_is_shown():
    """Otherwise a client would take the less likely one for the greedy choice."""
    tokenizer = TOKENIZERS[1]
    names = TokenNames(Vocabulary.build(tokenizer.size, (), patch_size=2), tokenizer)
    letter, byte = tokenizer.encode("ba")[-1], 1 + ord("a")
    assert names.name(letter) == names.name(byte) == "a"
    logprobs = CompletionLogprobs(names).format([TokenLogprob(byte, -3.0, ((letter, -1.0),))])
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([-3.0], [{"a": -1.0}])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"num_concurrent": 4}])
def test_lm_eval_measures_the_same_over_http(exported, local_only, options):
    """lm_eval's local-completions and `evaluate --tasks choice`: the same log probabilities, and greedy answers."""
    engine = open_run(exported)
    generation = replace(engine.run.generation, temperature=0.0, max_tokens=1)
    contexts = string.ascii_letters
    answers = engine.generate([Request(context, generation=generation, allow_images=False) for context in contexts])
    greedy = [Question(context, ("b", it[0].parts[0]), 1) for context, it in zip(contexts, answers, strict=True)
              if it[0].parts and it[0].parts[0].isascii()]  # fmt: skip
    questions = [*greedy[:3], Question("", ("three", "a b"), 1), Question("é ", ("x", "€ y "), 0)]
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    with serving(engine) as server:
        model = completions.LocalCompletionsAPI(
            base_url=f"{server.url}{TEXT}", model="tiny", tokenizer=str(exported), tokenizer_backend="huggingface",
            max_length=engine.max_positions - 1, **options,
        )  # fmt: skip
        scores = model.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])
    expected = likelihoods(engine, pairs)
    assert [score for score, _ in scores] == pytest.approx([it.total for it in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in scores] == [it.is_greedy for it in expected]
    assert any(it.is_greedy for it in expected) and not all(it.is_greedy for it in expected)
    nats = [value for answer in answer_questions(engine, questions)["answers"] for value in answer["nats"]]
    assert [score for score, _ in scores] == pytest.approx(nats, abs=1e-3)


# Many clients


def mixed_request(number: int) -> tuple[str, dict]:
    """Eight kinds: text, scores, chats with and without pictures, streams, drawings with negative prompts, edits."""
    fields: dict = {"seed": number, "n": 1 + number // 8 % 2}
    picture = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * (number % 5)}, PICTURE]}]}
    path, options = [
        (TEXT, {"prompt": "a" * (1 + number % 7), "max_tokens": 8}), (TEXT, {"prompt": [5, 6], "echo": True, "logprobs": 2}),
        (CHAT, {"max_tokens": 8, "logprobs": True}), (CHAT, picture), (CHAT, picture | {"stream": True, "max_tokens": 8}),
        (DRAW, {"steps": 1 + number % 4, "negative_prompt": "no" if number % 2 else None}),
        (CHAT, {"modalities": ["text", "image"], "max_tokens": 8, "steps": 2}), (EDIT, {"output_format": "webp"}),
    ][number % 8]  # fmt: skip
    return path, (fields | options if path != EDIT else {name: str(it) for name, it in (fields | options).items()})


def read_answer(response: httpx2.Response) -> tuple[list, list[np.ndarray]]:
    """What does not change when the same request is sent again: the answer, or the chunks of each choice; its pictures."""
    assert response.status_code == 200, response.text
    changing = {"id", "created", "logprob", "token_logprobs", "top_logprobs"}  # numbers differ by rounding
    pictures: list[np.ndarray] = []

    def reduce(value):
        if isinstance(value, dict):
            return {name: reduce(it) for name, it in value.items() if name not in changing}
        if isinstance(value, list):
            return [reduce(it) for it in value]
        if isinstance(value, str) and len(value) > 80:
            pictures.append(np.asarray(read_picture(value).convert("L"), int))
            return "picture"
        return value

    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    chunks.sort(key=lambda chunk: chunk["choices"][0]["index"])
    return [reduce(chunk) for chunk in chunks or [response.json()]], pictures


def test_64_clients_at_once_get_the_answers_of_each_alone(client, server):
    requests = [mixed_request(number) for number in range(64)]
    begin = Barrier(64)

    def send(request: tuple[str, dict]) -> httpx2.Response:
        begin.wait(TIMEOUT)
        return ask(client, request[0], **request[1])

    with ThreadPoolExecutor(64) as pool:
        together = [read_answer(response) for response in pool.map(send, requests)]
    alone = [read_answer(ask(client, path, **fields)) for path, fields in requests]
    for (texts, pictures), (expected_texts, expected_pictures) in zip(together, alone, strict=True):
        for picture, expected in zip(pictures, expected_pictures, strict=True):
            assert np.abs(picture - expected).max() <= 2
        assert texts == expected_texts


# Requests drawn over every field


def test_drawn_requests_are_answered_or_refused(client, caplog):
    """`python -m tests.drawn_requests` starts a server and sends it 5,000."""
    results = send_drawn(client, 5000 if THOROUGH else 500)
    assert sum(results.values(), Counter()).keys() == {"answered", "refused"} and all(results.values())
    assert not caplog.records


# Browser front ends


def test_pages_of_an_allowed_site_can_read_every_answer(opened):
    """Also errors, streams, and answers without the key: otherwise the browser hides the reason from the page."""
    with serving(Engine(opened), api_key="secret", allow_origins={SITE}) as server, server.client() as client:
        preflight = client.options(CHAT, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == SITE
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        headers = {"origin": SITE, "authorization": "Bearer secret"}
        for body, status in ((valid_body(CHAT), 200), (valid_body(CHAT) | {"stream": True}, 200), ({}, 400)):
            response = client.post(CHAT, json=body, headers=headers)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, SITE)
        assert client.get("/v1/models", headers=headers).headers["access-control-allow-origin"] == SITE
        response = client.post(CHAT, json=valid_body(CHAT), headers={"origin": SITE})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, SITE)
        assert "access-control-allow-credentials" not in response.headers
        for origin in ("https://example.org", "null", "http://chat.example.org", f"{SITE}:8443", f"{SITE}.evil.org"):
            response = client.post(TEXT, json=valid_body(TEXT), headers=headers | {"origin": origin})
            assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
            assert_clear_error(response)
            response = client.options(TEXT, headers=PREFLIGHT | {"origin": origin})
            assert response.status_code == 400 and "access-control-allow-origin" not in response.headers
        own = client.post(DRAW, json=valid_body(DRAW), headers=headers | {"origin": server.url})
        assert own.status_code == 200  # the server's own page


def test_without_an_allowed_site_no_page_of_another_site_is_answered(opened):
    with serving(Engine(opened)) as server, server.client() as client:
        for response in (client.options(CHAT, headers=PREFLIGHT), client.get("/v1/models", headers={"origin": SITE})):
            assert response.status_code == 403
            assert_clear_error(response)
            assert "access-control-allow-origin" not in response.headers and "vary" not in response.headers


@pytest.mark.parametrize(("text", "origin"), [
    ("https://Chat.Example.org/", "https://chat.example.org"), ("http://localhost:3000", "http://localhost:3000"),
    ("https://a.b:443", "https://a.b"), ("http://a.b:80", "http://a.b"), ("http://a.b:443", "http://a.b:443"),
    ("http://[::1]:8080", "http://[::1]:8080"), ("app://obsidian.md", "app://obsidian.md"),
    *[(text, None) for text in ("*", "null", "", "https://", "a.b", "https://a.b/c", "https://a.b?c", "https://a.b#c",
                                "https://me@a.b", "https://a.b:x", "https://a.b:99999", "https://ä.b", "http://[::1")],
])  # fmt: skip
def test_an_allowed_site_is_written_as_browsers_send_it(text, origin):
    if origin is not None:
        assert parse_origin(text) == origin
    else:
        with pytest.raises(ValueError, match="is not the origin of one site: write scheme://host"):
            parse_origin(text)
