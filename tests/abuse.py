"""Malformed requests: a server must answer each one with a 4xx and one clear sentence.

`python -m tests.abuse RUN` starts a server that may open 1,024 files, and sends it 2,000 of them, 50 requests whose clients
disconnect in mid-stream, and every kind of `hostile`, alone and all at once, while a probe asks /health every 10 ms.
It prints the longest times without an answer, the memory and the log, and fails when one is too large.
"""

import base64
import io
import json
import multiprocessing
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import httpx2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from tests.hostile import CHAT, DRAW, EDIT, GET, KINDS, TEXT, connect, held_open

MAX_MESSAGE_CHARS = 400


@dataclass(frozen=True)
class RawRequest:
    method: str
    path: str
    body: bytes
    content_type: str = "application/json"

    def send(self, client: httpx2.Client) -> httpx2.Response:
        return client.request(self.method, self.path, content=self.body, headers={"content-type": self.content_type})


def valid_body(path: str) -> dict:
    """The body of a valid request."""
    match path:
        case "/v1/chat/completions":
            return {"messages": [{"role": "user", "content": "three"}], "max_tokens": 2, "seed": 1}
        case "/v1/completions":
            return {"prompt": "three", "max_tokens": 2, "seed": 1}
        case _:
            return {"prompt": "three", "steps": 1, "seed": 1}


def make_png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header declares this size, whatever its data is."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def make_picture(file_format: str = "PNG") -> bytes:
    """24x16 pixels, the same at every call."""
    file = io.BytesIO()
    Picture.linear_gradient("L").resize((24, 16)).save(file, file_format)
    return file.getvalue()


def to_data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def form_request(fields: dict[str, str], files: list[bytes], boundary: str = "edge") -> RawRequest:
    part = f"--{boundary}\r\nContent-Disposition: form-data; name="
    header = f'{part}"image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'.encode()
    parts = [f'{part}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    parts += [header + file + b"\r\n" for file in files]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return RawRequest("POST", EDIT, body, f"multipart/form-data; boundary={boundary}")


broken_pictures = (
    st.binary(max_size=64)
    | st.builds(lambda name, share: make_picture(name)[: int(share * len(make_picture(name)))],
                st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.floats(0, 0.6))
    | st.builds(make_png, st.sampled_from([0, 50_000, 2**31 - 1]), st.sampled_from([50_000, 2**31 - 1]))
    | st.just(make_png(9_000, 9_000, bytes(10_000)))
    | st.sampled_from([b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"P6 4 4 255 " + bytes(48), b"",
                       b"II*\0" + bytes(40), b"SIMPLE  =         T", b"8BPS" + bytes(30), b"GIF89a" + b"\xff" * 10])
)  # fmt: skip
addresses = st.sampled_from([
    "http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd", "ftp://a/b", "//a/b", "data:image/png,abc",
    "data:,", "data:;base64", "data:image/png;base64,***", "data:image/png;base64,\u0661", "", "javascript:1", "DATA",
    "\\\\a\\b", "http://[::1]:80@169.254.169.254/",
]) | st.text(max_size=20)  # fmt: skip
words = st.text(max_size=8) | st.just("x" * 5000)
wrong_numbers = words | st.booleans() | st.lists(st.integers(), max_size=2) | st.just({}) | st.just([None])
too_small, too_large = st.integers(-(2**70), 0), st.integers(2**31, 2**80) | st.just(10**500)
wrong_texts = st.integers() | st.floats() | st.booleans() | st.dictionaries(words, words, max_size=1)

fractions = st.floats(0.1, 0.9)  # for fields that must be integers
negative_floats = st.floats(max_value=-0.001)
some_dictionaries = st.lists(st.dictionaries(st.sampled_from(["type", "text", "image_url"]), words, max_size=2), min_size=1)
wrong_contents = st.integers() | st.lists(words, min_size=1, max_size=2) | some_dictionaries

INVALID_VALUES = {  # by field, for every path that has it
    "n": wrong_numbers | too_small | st.integers(9, 2**80) | fractions,
    "seed": wrong_numbers | st.integers(2**63) | fractions,
    "max_tokens": wrong_numbers | too_small | too_large | fractions,
    "steps": wrong_numbers | too_small | st.integers(1001) | fractions,
    "temperature": words | st.booleans() | st.floats(2.001) | negative_floats | st.lists(st.floats(), max_size=1),
    "top_p": words | st.booleans() | st.floats(1.001) | negative_floats,
    "guidance_scale": words | st.booleans() | st.floats(100.1) | negative_floats | st.just(float("nan")),
    "stream": words | st.integers() | st.just([]),
    "stop": st.integers() | st.lists(words, min_size=5, max_size=6) | st.lists(st.integers(), min_size=1, max_size=2),
    "model": words | wrong_texts,
    "size": words | wrong_texts | st.sampled_from(["0x0", "8x", "99999x99999", "-8x8", "8x8x8", "1e3x8", "٨x٨"]),
    "partial_images": words | st.integers(4) | st.integers(max_value=-1),
    "modalities": words | st.just([]) | st.lists(words, min_size=1, max_size=2),
    "prompt": st.none() | st.integers() | st.floats() | st.sampled_from([[], [-1], [[2**20]], [1, "a"], "y" * 50_000]),
    "messages": words | st.none() | st.lists(words | st.integers() | st.none(), max_size=3)
    | st.sampled_from([[{"role": "user"}, 1], [{"role": "user", "content": "z" * 50_000}]])
    | st.builds(lambda role, content: [{"role": role, "content": content}], words, words)
    | st.builds(lambda content: [{"role": "user", "content": content}], wrong_contents),
    "logprobs": st.just(-1) | words,
    "tools": st.just([{"type": "function"}]), "response_format": st.just({"type": "json_object"}),
    "mask": st.just("x"),
}  # fmt: skip
FIELDS_OF_PATH = {
    CHAT: ["n", "seed", "max_tokens", "steps", "temperature", "top_p", "guidance_scale", "stream", "stop", "model",
           "modalities", "messages", "logprobs", "tools", "response_format"],
    TEXT: ["n", "seed", "max_tokens", "temperature", "top_p", "stream", "stop", "model", "prompt", "logprobs"],
    DRAW: ["n", "seed", "steps", "guidance_scale", "stream", "model", "size", "partial_images", "response_format", "mask"],
}  # fmt: skip


@st.composite
def wrong_fields(draw) -> RawRequest:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    name = draw(st.sampled_from(FIELDS_OF_PATH[path]))
    value = draw(INVALID_VALUES[name])
    if name == "model" and value == "tiny" or name == "size" and value in ("8x8", "auto"):
        value = 7
    if name == "response_format" and path == DRAW:
        value = "bmp"
    return RawRequest("POST", path, json.dumps(valid_body(path) | {name: value}).encode())


@st.composite
def unknown_fields(draw) -> RawRequest:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    name = draw(st.text(max_size=12).map("x_{}".format) | st.just("x" * 3000))
    return RawRequest("POST", path, json.dumps(valid_body(path) | {name: draw(st.booleans() | st.integers())}).encode())


@st.composite
def broken_images(draw) -> RawRequest:
    address = draw(addresses | broken_pictures.map(to_data_url))
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": address}}]
    if draw(st.integers(0, 9)) == 0:
        parts = [{"type": "image_url", "image_url": {"url": to_data_url(make_picture())}}] * 9
    return RawRequest("POST", CHAT, json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 2}).encode())


@st.composite
def wrong_forms(draw) -> RawRequest:
    """Each is wrong also for a run that can edit."""
    match draw(st.integers(0, 5)):
        case 0:
            return form_request({"prompt": "a"}, [draw(broken_pictures)])
        case 1:
            n = draw(st.sampled_from(["0", "x", "99", "1.5", "", "1e99"]))
            return form_request({"prompt": "a", "n": n}, [make_picture()])
        case 2:
            return form_request({"prompt": "a"}, [make_picture()] * 9)
        case 3:
            return form_request({"prompt": "a", draw(st.sampled_from(["x", "image", "mask"])): "b"}, [make_picture()])
        case 4:
            return RawRequest("POST", EDIT, draw(st.binary(max_size=60)), "multipart/form-data; boundary=edge")
    return form_request({"steps": "1"}, [make_picture()]) if draw(st.booleans()) else form_request({"prompt": "a"}, [])


@st.composite
def wrong_bodies(draw) -> RawRequest:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    valid = json.dumps(valid_body(path)).encode()
    body, content_type = valid, "application/json"
    match draw(st.integers(0, 6)):
        case 0:
            body = draw(st.binary(max_size=40))
        case 1:
            body = valid[: draw(st.integers(0, len(valid) - 1))]
        case 2:
            content_type = draw(st.sampled_from(["text/plain", "application/x-www-form-urlencoded", "image/png", "a"]))
        case 3:
            depth = draw(st.sampled_from([200, 100_000]))
            body = b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"
        case 4:
            body = json.dumps(draw(st.none() | st.integers() | words | st.lists(words, max_size=2))).encode()
        case 5:
            field = b'"messages":[{"role":"user","content":"\\ud800"}]' if path == CHAT else b'"prompt":"\\ud800"'
            body = b"{" + field + b"}"
        case 6:
            body = valid[:-1] + b', "seed": ' + draw(st.sampled_from([b"1" * 5000, b"NaN", b"1e999", b"-", b"0x1"])) + b"}"
    return RawRequest("POST", path, body, content_type)


@st.composite
def wrong_paths(draw) -> RawRequest:
    if draw(st.booleans()):
        paths = ["/v1", "/v1/embeddings", "/v1/models/none", "/v1/../etc/passwd", "/%2e%2e/%2e%2e/run.json"]
        return RawRequest(draw(st.sampled_from(["GET", "POST", "DELETE"])), draw(st.sampled_from(paths)), b"")
    methods = st.sampled_from(["GET", "PUT", "PATCH", "DELETE"])
    return RawRequest(draw(methods), draw(st.sampled_from([CHAT, TEXT, DRAW, EDIT])), b"")


malformed = st.one_of(
    wrong_fields(), wrong_fields(), unknown_fields(), broken_images(), wrong_forms(), wrong_bodies(), wrong_paths()
)


def assert_clear_error(response: httpx2.Response) -> None:
    """A 4xx in OpenAI's format, with one sentence that contains no internals of the server."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert 8 < len(message) < MAX_MESSAGE_CHARS and message.isprintable(), message
    assert not re.search(r"Traceback|File \"|\.py|0x[0-9a-f]{6}|site-packages|pydantic|Errno", message), message


MAX_GAP, MAX_GROWTH, MAX_WAIT, MAX_LOG = 0.25, 200, 2, 2**20  # seconds, MiB, seconds, bytes
MAX_FILES = 1024  # that the server may open
ROUNDS = 2  # of all kinds at once


def main(run: Path, requests: int = 2000, disconnects: int = 50) -> None:
    """Prints what it has measured. AssertionError when an answer is wrong; exit status 1 when a number is missed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    command = [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0"]
    with tempfile.NamedTemporaryFile("r") as log:
        server = subprocess.Popen(
            command, stdout=open(log.name, "ab"), stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES)),
        )  # fmt: skip
        try:
            while not (address := re.search(r"http://\S+:(\d+)", Path(log.name).read_text())):
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            with httpx2.Client(base_url=address[0], timeout=120) as client:
                send_all_malformed(client, server.pid, requests)
                disconnect_mid_stream(client, server.pid, disconnects)
                misses = face_hostile_clients(client, int(address[1]), server.pid)
            log_bytes = Path(log.name).stat().st_size
            misses += report("log", log_bytes, MAX_LOG, "bytes")
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    sys.exit(bool(misses))


def report(label: str, value: float, limit: float, unit: str, more: str = "") -> int:
    """Prints one number; 1 when it is above its limit."""
    print(f"{label:34} {value:10,.3f} {unit:8} {'above' if value > limit else 'below'} {limit:,} {more}", flush=True)
    return value > limit


def face_hostile_clients(client: httpx2.Client, port: int, pid: int) -> int:
    """Each kind alone, and all at once, while a probe asks /health every 10 ms. Returns how many numbers were missed."""
    context = multiprocessing.get_context("spawn")
    last, longest = context.Value("d", time.monotonic()), context.Value("d", 0)
    probe = context.Process(target=probe_health, args=(port, last, longest), daemon=True)
    probe.start()
    while longest.value == 0:
        time.sleep(0.1)

    def measure_gap(attack: Callable[[], object]) -> float:
        """The longest time without an answer of /health, until now."""
        longest.value = 0
        attack()
        return max(longest.value, time.monotonic() - last.value)

    print(f"{'at rest':34} {measure_gap(lambda: time.sleep(2)):10,.3f} seconds")
    before, misses = measure_memory(pid), 0
    for kind in KINDS:
        gap = measure_gap(lambda kind=kind: kind(port))
        misses += report(kind.__name__, gap, MAX_GAP, "seconds", f"memory {measure_memory(pid):,.0f} MiB")
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(len(KINDS)) as pool:
            gap = measure_gap(lambda pool=pool: list(pool.map(lambda kind: kind(port), KINDS)))
        misses += report("all at once", gap, MAX_GAP, "seconds", f"memory {measure_memory(pid):,.0f} MiB")
    with held_open(port, 2000, GET):
        started = time.monotonic()
        try:
            with httpx2.Client(base_url=client.base_url, timeout=60) as newcomer:
                assert newcomer.post(TEXT, json=valid_body(TEXT)).status_code == 200
        except httpx2.HTTPError as error:
            print(f"a normal request: {error!r}")
        misses += report("a request beside 2,000 half-open", time.monotonic() - started, MAX_WAIT, "seconds")
    time.sleep(2)
    misses += report("growth of memory", measure_memory(pid) - before, MAX_GROWTH, "MiB")
    print(f"largest memory {measure_memory(pid, 'VmHWM'):.0f} MiB")
    assert_works(client)
    probe.kill()
    return misses


def probe_health(port: int, last: Synchronized, longest: Synchronized) -> None:
    """Asks /health every 10 ms. Sets the time of the last answer, and the longest time between two answers."""
    connection = None
    while True:
        try:
            connection = connection or connect(port, 120)
            connection.sendall(GET + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                part = connection.recv(4096)
                if not part:
                    raise ConnectionError
                answer += part
            now = time.monotonic()
            last.value, longest.value = now, max(longest.value, now - last.value)
        except OSError:
            connection = None
        time.sleep(0.01)


def send_all_malformed(client: httpx2.Client, pid: int, requests: int) -> None:
    assert_works(client)
    send_malformed(client, min(200, requests))
    before = measure_memory(pid)
    send_malformed(client, requests)
    assert_works(client)
    after = measure_memory(pid)
    print(f"{requests} malformed requests, each answered with a 4xx and one sentence")
    print(f"memory: {before:.1f} MiB after 200 requests, {after:.1f} MiB at the end ({after / before - 1:+.1%})", flush=True)


def disconnect_mid_stream(client: httpx2.Client, pid: int, disconnects: int) -> None:
    for number in range(disconnects):
        body = valid_body(DRAW) | {"steps": 1000, "stream": True, "preview_every": 1, "n": 1 + number % 4}
        with client.stream("POST", DRAW, json=body) as response:
            next(response.iter_bytes())
    assert_works(client)
    metrics = client.get("/metrics").text
    sequences = sum(map(float, re.findall(r'transfusion_sequences\{kind="\w+"\} (\S+)', metrics)))
    print(f"{disconnects} disconnects mid-stream: {sequences:.0f} sequences, {measure_memory(pid):.1f} MiB", flush=True)


def assert_works(client: httpx2.Client) -> None:
    """The server answers valid requests."""
    for path in (CHAT, TEXT, DRAW):
        assert client.post(path, json=valid_body(path)).status_code == 200


def send_malformed(client: httpx2.Client, requests: int) -> None:
    count = 0

    @settings(
        max_examples=requests, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(malformed)
    def send(request: RawRequest) -> None:
        nonlocal count
        assert_clear_error(request.send(client))
        count += 1
        if count % 100 == 0:
            assert_works(client)

    while count < requests:
        send()


def measure_memory(process_id: int, field: str = "VmRSS") -> float:
    """Resident memory of a process in MiB, or its largest value so far (VmHWM)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{process_id}/status").read_text())[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
