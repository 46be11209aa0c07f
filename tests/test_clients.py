"""Clients that people have: what they send by default is answered, or refused in one sentence; pages of other sites."""

import base64
import io
import json
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
from tests.serving import serving, wait_until
from transfusion.inference.engine import Engine, open_run
from transfusion.serving.hosts import parse_origin
from transfusion.serving.pictures import _decode_data_url
from transfusion.serving.served import nearest_size

openai = Lazy("openai")

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
