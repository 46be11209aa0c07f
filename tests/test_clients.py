"""Clients that people have: what they send by default is answered, or refused in one sentence; pages of other sites."""

import asyncio
import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

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
from tests.lazy import Lazy
from tests.profile import examples
from tests.serving import Gate, serving, wait_until
from transfusion.inference.engine import Engine, open_run
from transfusion.serving.hosts import parse_origin
from transfusion.serving.limits import Limits
from transfusion.serving.pictures import _decode_data_url
from transfusion.serving.served import nearest_size

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


def read_picture(url_or_base64: str) -> Picture.Image:
    return Picture.open(io.BytesIO(base64.b64decode(url_or_base64.rpartition(",")[2])))


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
                          "refusal": None, "reasoning_content": "b", "annotations": [], "audio": None}]}),
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
