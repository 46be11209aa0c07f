"""Paths and methods, hosts, streams of waiting requests, usage, and the access log."""

import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from dataclasses import replace

import pytest

from tests.abuse import CHAT, DRAW, EDIT, TEXT, assert_clear_error, form_request, make_picture, valid_body
from tests.lazy import Lazy
from tests.serving import Gate, serving, thread_name, wait_until
from transfusion.cli.serve import AccessLog, listen
from transfusion.inference.engine import Engine, open_run
from transfusion.serving import streams
from transfusion.serving.app import PAGE_PATHS
from transfusion.serving.hosts import is_local, parse_hostname
from transfusion.serving.limits import Limits

openai = Lazy("openai")

GET_PATHS = ["/health", "/metrics", "/v1/models", "/v1/models/tiny", *PAGE_PATHS]
POST_PATHS = [CHAT, TEXT, DRAW, EDIT]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]


@pytest.fixture(scope="module")
def opened(written):
    return replace(open_run(written).opened, notes={"edits": True})


@pytest.fixture
def engine(opened):
    return Engine(opened)


@pytest.fixture(scope="module")
def server(opened):
    with serving(Engine(opened)) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


# Paths and methods


def test_known_paths_with_another_method_are_405_and_name_the_right_ones(client):
    for paths, allowed in (GET_PATHS, {"GET", "HEAD"}), (POST_PATHS, {"POST"}):
        for path in paths:
            for method in set(METHODS) - allowed:
                response = client.request(method, path)
                assert response.status_code == 405, (method, path)
                assert set(response.headers["allow"].replace(" ", "").split(",")) == allowed
                assert_clear_error(response) if method != "HEAD" else None


@pytest.mark.parametrize("path", [
    "/v1", "/v1/", "/v1/embeddings", "/v1/responses", "/chat/completions", "/v1/chat/completions/", "/health/",
    "/index.html/", "/v1/models/none", "/v1/models/", "/v1//models", "/none", "//", "/%00", "/..%2f..%2fetc/passwd",
    "/../run.json", "/web/index.html", "/docs", "/openapi.json", "/" + "x" * 8000, "/V1/models",
])  # fmt: skip
def test_unknown_paths_are_404_for_every_method(server, client, path):
    for method in set(METHODS) - ({"PUT"} if path.startswith("/v1/models/") else set()):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:  # httpx2 changes paths
            connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        expected = b"405" if path.startswith("/v1/models/") and method not in ("GET", "HEAD") else b"404"
        assert answer.startswith(b"HTTP/1.1 " + expected), (method, answer[:200])


def test_head_is_get_without_the_body(client):
    for path in GET_PATHS:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content, get.status_code) == (200, b"", 200), path
        if path != "/metrics":  # its length changes
            assert head.headers["content-length"] == str(len(get.content))


def test_the_page_is_revalidated(client):
    response = client.get("/main.js")
    again = client.get("/main.js", headers={"if-none-match": response.headers["etag"]})
    assert (response.headers["content-type"].split(";")[0], again.status_code) == ("text/javascript", 304)


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "application/jsonx", ""])
def test_json_has_its_content_type(client, content_type):
    body = json.dumps(valid_body(TEXT)).encode()
    response = client.post(TEXT, content=body, headers={"content-type": content_type})
    assert (response.status_code, "application/json" in response.text) == (400, True)
    for right in "application/json", "Application/JSON; charset=utf-8", "application/problem+json":
        assert client.post(TEXT, content=body, headers={"content-type": right}).status_code == 200


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-16", '"utf-7"', "x"])
def test_a_form_in_another_encoding_is_refused(client, charset):
    request = form_request({"prompt": "a", "steps": "1"}, [make_picture()])
    for ending, status in (f"; charset={charset}", 400), ("; charset=UTF-8", 200), ("", 200):
        headers = {"content-type": request.content_type + ending}
        response = client.post(EDIT, content=request.body, headers=headers)
        assert response.status_code == status, response.text


# Hosts


@pytest.mark.parametrize(("host", "expected"), [
    ("localhost:8000", True), ("LOCALHOST", True), ("127.0.0.1", True), ("127.0.0.2:1", True), ("[::1]:8000", True),
    ("[0:0:0:0:0:0:0:1]", True), ("", False), ("[", False), ("localhost.example.org", False),
    ("127.0.0.1.example.org", False),
    ("10.0.0.1", False), ("0.0.0.0", False), ("[::]", False), ("user@example.org", False), ("2130706433", False),
])  # fmt: skip
def test_hosts_that_are_this_machine(client, host, expected):
    assert is_local(parse_hostname(host)) == expected
    if host not in ("", "["):
        assert client.get("/health", headers={"host": host}).status_code == (200 if expected else 403)


def test_any_address_of_this_machine_can_be_served(written):
    """Without a key, the server answers at the address that it prints. --access-log prints a line for each request."""
    options = ["--port", "0", "--host", "127.0.0.2", "--access-log"]
    command = [sys.executable, "-m", "transfusion", "serve", str(written), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.2:\S+", process.stderr.readline())[0]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens <= 1
    finally:
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert [line.split()[1:4] for line in output.splitlines()] == [["GET", "/v1/models", "200"], ["POST", TEXT, "200"]]


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost", "127.0.0.2"])
def test_listening_at_an_address_of_this_machine(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()[:2], timeout=30):
        pass


# Streams


@pytest.mark.parametrize("path", [CHAT, TEXT, DRAW])
def test_a_stream_that_waits_has_comments(monkeypatch, engine, path):
    """The client sees them before the first event, between two, and still understands the answer."""
    monkeypatch.setattr(streams, "SILENT_SECONDS", 0.1)
    gate = Gate(engine)
    body = valid_body(path) | {"stream": True} | ({"steps": 50, "preview_every": 1} if path == DRAW else {"max_tokens": 9})
    with serving(engine) as server, server.client() as client, client.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": waiting", ""] * 2
        gate.allow(2)
        while next(lines) != ": waiting":
            pass
        gate.open()
        rest = list(lines)
        assert any(line.startswith("data: ") for line in rest)
        assert rest[-2] == "data: [DONE]" if path != DRAW else '"type": "image_generation.completed"' in rest[-2]


@pytest.mark.parametrize("path", [CHAT, TEXT, DRAW])
def test_an_error_after_the_first_comment_is_an_event(monkeypatch, engine, path):
    monkeypatch.setattr(streams, "SILENT_SECONDS", 0.1)
    gate = Gate(engine)
    body = valid_body(path) | {"stream": True} | ({"steps": 900} if path == DRAW else {})
    with serving(engine, Limits(deadline=1)) as server, server.client() as client:
        with client.stream("POST", path, json=body) as response:
            lines = response.iter_lines()
            assert (response.status_code, next(lines)) == (200, ": waiting")
            time.sleep(1)  # the deadline, which is checked between two steps
            gate.open()
            *_, event, data, _ = lines
        error = json.loads(data.removeprefix("data: "))
        assert (event, error["error"]["code"]) == ("event: error", "timeout")
        assert "longer than 1 seconds" in error["error"]["message"]
        wait_until(server.is_idle)


def test_openais_client_reads_comments_and_errors(monkeypatch, engine):
    monkeypatch.setattr(streams, "SILENT_SECONDS", 0.05)
    gate = Gate(engine)
    with serving(engine, Limits(deadline=1)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        # seed: with another one the answer may end before its deadline is checked
        chunks = client.completions.create(model="tiny", prompt="a", max_tokens=100, seed=1, stream=True)
        time.sleep(1)  # the first comment has arrived, and now the deadline passes
        gate.open()
        with pytest.raises(openai.APIError, match="longer than 1 seconds"):
            list(chunks)


# Usage


def test_usage_adds_up_all_prompts(server, client):
    def usage(path: str, **body) -> tuple[int, int]:
        usage = client.post(path, json=body | {"max_tokens": 2}).json()["usage"]
        return usage["prompt_tokens"]

    short, long = usage(TEXT, prompt="a"), usage(TEXT, prompt="a longer prompt")
    assert short < long
    assert usage(TEXT, prompt=["a", "a longer prompt"]) == short + long
    assert usage(TEXT, prompt=["a", "a"]) == 2 * short
    assert usage(TEXT, prompt=["a", "a longer prompt"], n=2) == short + long  # a prompt counts once for all its choices
    message = {"role": "user", "content": "a"}
    assert usage(CHAT, messages=[message], n=3) == usage(CHAT, messages=[message])


def test_texts_reach_the_engine_as_token_ids(server, client, monkeypatch):
    """The engine's thread encodes no text: it would stop all answers meanwhile."""
    threads, encode = [], server.engine.opened.tokenizer.encode

    def recorded_encode(text, *options):
        if len(text) > 1:  # not the empty prompt of guidance, and not the context of a text stream
            threads.append(threading.current_thread().name)
        return encode(text, *options)

    monkeypatch.setattr(server.engine.opened.tokenizer, "encode", recorded_encode)
    for path in CHAT, TEXT, DRAW:
        assert client.post(path, json=valid_body(path)).status_code == 200
    assert {name.partition("_")[0] for name in threads} == {"bodies, pictures and texts"} and len(threads) >= 3


# The access log


def test_the_access_log_has_a_line_for_each_request_and_no_secrets(caplog, engine):
    caplog.set_level(logging.INFO, "transfusion.access")
    with serving(engine, api_key="secret") as server, server.client() as client:
        headers = {"authorization": "Bearer secret"}
        client.get("/v1/models?key=secret", headers=headers)
        client.post(TEXT, headers=headers, json=valid_body(TEXT) | {"prompt": "private"})
        client.post(TEXT, headers={"authorization": "Bearer secre"}, json=valid_body(TEXT))
        client.get("/a%0Ab%1B%5B31m c", headers=headers | {"x-forwarded-for": "1.2.3.4\x9b 200 \u00e9".encode("latin-1")})
        wait_until(lambda: len(logged_lines(caplog, server)) == 4)
    lines = logged_lines(caplog, server)
    form = r"\S+ (GET|POST) \S+ \d{3} \d+\.\d{3} s \d+ bytes"
    assert all(re.fullmatch(form, line) and line.isprintable() and line.isascii() for line in lines)
    assert [line.split()[1:4] for line in lines] == [
        ["GET", "/v1/models", "200"], ["POST", TEXT, "200"], ["POST", TEXT, "401"], ["GET", "/a%0Ab%1B%5B31m%20c", "404"],
    ]  # fmt: skip
    assert not re.search("secre|private", "".join(lines))


def logged_lines(caplog, server) -> list[str]:
    """What this server has logged. The server of another test may log its last request after its client had the answer."""
    return [record.getMessage() for record in caplog.records if record.threadName == thread_name(server.port)]


def test_a_log_that_nobody_reads_ends_with_one_line(caplog):
    """As after `serve --access-log | head -1`: logging would print a traceback for each request."""
    logger, stderr, handler = logging.getLogger("transfusion.access"), io.StringIO(), AccessLog(ClosedPipe())
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(handler)
    with redirect_stderr(stderr):
        for _ in range(3):
            logger.info("GET /health")
    lines = [record.getMessage() for record in caplog.records if record.name != logger.name]
    assert lines == ["the access log ends: [Errno 32] Broken pipe"]
    assert handler not in logger.handlers and "Traceback" not in stderr.getvalue()


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_without_the_option_there_is_no_access_log(server, client, caplog):
    assert client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.name == "transfusion.access"]
