"""Requests that no server should answer with anything but a 4xx and one clear sentence.

`python -m tests.abuse RUN` sends 2,000 of them to a server of its own, and 50 clients that go away in the middle, and looks
at its memory before and after.
"""

import base64
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import httpx2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

CHAT, TEXT, DRAW, EDIT = "/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/images/edits"
LONGEST = 400  # letters of a clear sentence, its braces apart


@dataclass(frozen=True)
class Sent:
    """One request, as bytes."""

    method: str
    path: str
    body: bytes
    kind: str = "application/json"

    def to(self, client: httpx2.Client) -> httpx2.Response:
        return client.request(self.method, self.path, content=self.body, headers={"content-type": self.kind})


def valid(path: str) -> dict:
    """A request that is answered, without what a run must be asked for by name."""
    match path:
        case "/v1/chat/completions":
            return {"messages": [{"role": "user", "content": "three"}], "max_tokens": 2, "seed": 1}
        case "/v1/completions":
            return {"prompt": "three", "max_tokens": 2, "seed": 1}
        case _:
            return {"prompt": "three", "steps": 1, "seed": 1}


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header promises this size, whatever stands behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(kind: str = "PNG") -> bytes:
    """24x16 pixels, the same every time."""
    file = io.BytesIO()
    Picture.linear_gradient("L").resize((24, 16)).save(file, kind)
    return file.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def form(fields: dict[str, str], files: list[bytes], edge: str = "edge") -> Sent:
    parts = [f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    head = 'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    parts += [f"--{edge}\r\n{head}".encode() + file + b"\r\n" for file in files]
    return Sent("POST", EDIT, b"".join(parts) + f"--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}")


broken_pictures = (
    st.binary(max_size=64)
    | st.builds(lambda kind, share: picture(kind)[: int(share * len(picture(kind)))],
                st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.floats(0, 0.6))
    | st.builds(png, st.sampled_from([0, 50_000, 2**31 - 1]), st.sampled_from([50_000, 2**31 - 1]))
    | st.just(png(9_000, 9_000, bytes(10_000)))
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

above_0 = st.floats(0.1, 0.9)  # where whole numbers are wanted
below_0 = st.floats(max_value=-0.001)
some_dictionaries = st.lists(st.dictionaries(st.sampled_from(["type", "text", "image_url"]), words, max_size=2), min_size=1)
wrong_contents = st.integers() | st.lists(words, min_size=1, max_size=2) | some_dictionaries

FIELDS = {  # what a field is not, on every path that has it
    "n": wrong_numbers | too_small | st.integers(9, 2**80) | above_0,
    "seed": wrong_numbers | st.integers(2**63) | above_0,
    "max_tokens": wrong_numbers | too_small | too_large | above_0,
    "steps": wrong_numbers | too_small | st.integers(1001) | above_0,
    "temperature": words | st.booleans() | st.floats(2.001) | below_0 | st.lists(st.floats(), max_size=1),
    "top_p": words | st.booleans() | st.floats(1.001) | below_0,
    "guidance_scale": words | st.booleans() | st.floats(100.1) | below_0 | st.just(float("nan")),
    "stream": words | st.integers() | st.just([]),
    "stop": st.integers() | st.lists(words, min_size=5, max_size=6) | st.lists(st.integers(), min_size=1, max_size=2),
    "model": words | wrong_texts,
    "size": words | wrong_texts | st.sampled_from(["0x0", "8x", "99999x99999", "-8x8", "8x8x8", "1e3x8", "٨x٨"]),
    "partial_images": words | st.integers(4) | st.integers(max_value=-1),
    "modalities": words | st.just([]) | st.lists(words, min_size=1, max_size=2),
    "prompt": st.none() | st.integers() | st.floats() | st.sampled_from([[], [1, 2], [[1]], "y" * 50_000]),
    "messages": words | st.none() | st.lists(words | st.integers() | st.none(), max_size=3)
    | st.sampled_from([[{"role": "user"}, 1], [{"role": "user", "content": "z" * 50_000}]])
    | st.builds(lambda role, content: [{"role": role, "content": content}], words, words)
    | st.builds(lambda content: [{"role": "user", "content": content}], wrong_contents),
    "logprobs": st.just(5), "tools": st.just([{"type": "function"}]), "response_format": st.just({"type": "json_object"}),
    "mask": st.just("x"),
}  # fmt: skip
OF_PATH = {
    CHAT: ["n", "seed", "max_tokens", "steps", "temperature", "top_p", "guidance_scale", "stream", "stop", "model",
           "modalities", "messages", "logprobs", "tools", "response_format"],
    TEXT: ["n", "seed", "max_tokens", "temperature", "top_p", "stream", "stop", "model", "prompt", "logprobs"],
    DRAW: ["n", "seed", "steps", "guidance_scale", "stream", "model", "size", "partial_images", "response_format", "mask"],
}  # fmt: skip


@st.composite
def wrong_fields(draw) -> Sent:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    name = draw(st.sampled_from(OF_PATH[path]))
    value = draw(FIELDS[name])
    if name == "model" and value == "tiny" or name == "size" and value in ("8x8", "auto"):
        value = 7
    if name == "response_format" and path == DRAW:
        value = "url"
    return Sent("POST", path, json.dumps(valid(path) | {name: value}).encode())


@st.composite
def unknown_fields(draw) -> Sent:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    name = draw(st.text(max_size=12).map("x_{}".format) | st.just("x" * 3000))
    return Sent("POST", path, json.dumps(valid(path) | {name: draw(st.none() | st.integers())}).encode())


@st.composite
def broken_images(draw) -> Sent:
    address = draw(addresses | broken_pictures.map(url))
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": address}}]
    if draw(st.integers(0, 9)) == 0:
        parts = [{"type": "image_url", "image_url": {"url": url(picture())}}] * 9
    return Sent("POST", CHAT, json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 2}).encode())


@st.composite
def wrong_forms(draw) -> Sent:
    """All are wrong even where a run can edit."""
    match draw(st.integers(0, 5)):
        case 0:
            return form({"prompt": "a"}, [draw(broken_pictures)])
        case 1:
            return form({"prompt": "a", "n": draw(st.sampled_from(["0", "x", "99", "1.5", "", "1e99"]))}, [picture()])
        case 2:
            return form({"prompt": "a"}, [picture()] * 9)
        case 3:
            return form({"prompt": "a", draw(st.sampled_from(["x", "image", "mask"])): "b"}, [picture()])
        case 4:
            return Sent("POST", EDIT, draw(st.binary(max_size=60)), "multipart/form-data; boundary=edge")
    return form({"steps": "1"}, [picture()]) if draw(st.booleans()) else form({"prompt": "a"}, [])


@st.composite
def wrong_bodies(draw) -> Sent:
    path = draw(st.sampled_from([CHAT, TEXT, DRAW]))
    whole = json.dumps(valid(path)).encode()
    body, kind = whole, "application/json"
    match draw(st.integers(0, 6)):
        case 0:
            body = draw(st.binary(max_size=40))
        case 1:
            body = whole[: draw(st.integers(0, len(whole) - 1))]
        case 2:
            kind = draw(st.sampled_from(["text/plain", "application/x-www-form-urlencoded", "image/png", "a"]))
        case 3:
            depth = draw(st.sampled_from([200, 100_000]))
            body = b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"
        case 4:
            body = json.dumps(draw(st.none() | st.integers() | words | st.lists(words, max_size=2))).encode()
        case 5:
            field = b'"messages":[{"role":"user","content":"\\ud800"}]' if path == CHAT else b'"prompt":"\\ud800"'
            body = b"{" + field + b"}"
        case 6:
            body = whole[:-1] + b', "seed": ' + draw(st.sampled_from([b"1" * 5000, b"NaN", b"1e999", b"-", b"0x1"])) + b"}"
    return Sent("POST", path, body, kind)


@st.composite
def wrong_places(draw) -> Sent:
    if draw(st.booleans()):
        paths = ["/v1", "/v1/embeddings", "/v1/models/none", "/v1/../etc/passwd", "/%2e%2e/%2e%2e/run.json"]
        return Sent(draw(st.sampled_from(["GET", "POST", "DELETE"])), draw(st.sampled_from(paths)), b"")
    methods = st.sampled_from(["GET", "PUT", "PATCH", "DELETE"])
    return Sent(draw(methods), draw(st.sampled_from([CHAT, TEXT, DRAW, EDIT])), b"")


malformed = st.one_of(
    wrong_fields(), wrong_fields(), unknown_fields(), broken_images(), wrong_forms(), wrong_bodies(), wrong_places()
)


def is_clear(answer: httpx2.Response) -> None:
    """A 4xx in OpenAI's shape, with one sentence that gives nothing of the server away."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert 8 < len(message) < LONGEST and message.isprintable(), message
    assert not re.search(r"Traceback|File \"|\.py|0x[0-9a-f]{6}|site-packages|pydantic|Errno", message), message


def main(run: Path, requests: int = 2000, gone: int = 50) -> None:
    """Prints how many were answered as they should, and the server's memory."""
    command = [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        base = re.search(r"http://\S+", server.stderr.readline())[0]
        with httpx2.Client(base_url=base, timeout=120) as client:
            fine(client)
            send(client, 200)
            warm = memory(server.pid)
            send(client, requests)
            fine(client)
            after = memory(server.pid)
            print(f"{requests} malformed requests, each answered with a 4xx and one sentence")
            print(f"memory: {warm:.1f} MiB after 200 to warm up, {after:.1f} MiB in the end ({after / warm - 1:+.1%})")
            for number in range(gone):
                body = valid(DRAW) | {"steps": 1000, "stream": True, "preview_every": 1, "n": 1 + number % 4}
                with client.stream("POST", DRAW, json=body) as answer:
                    next(answer.iter_bytes())
            fine(client)
            rows = re.findall(r'transfusion_rows\{kind="\w+"\} (\S+)', client.get("/metrics").text)
            print(f"{gone} clients gone in mid-stream: {sum(map(float, rows)):.0f} rows held, {memory(server.pid):.1f} MiB")
    finally:
        server.terminate()
        server.wait()


def fine(client: httpx2.Client) -> None:
    """It still serves."""
    for path in (CHAT, TEXT, DRAW):
        assert client.post(path, json=valid(path)).status_code == 200


def send(client: httpx2.Client, requests: int) -> None:
    count = 0

    @settings(
        max_examples=requests, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(malformed)
    def one(sent: Sent) -> None:
        nonlocal count
        is_clear(sent.to(client))
        count += 1
        if count % 100 == 0:
            fine(client)

    while count < requests:
        one()


def memory(process: int) -> float:
    """MiB that it holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
