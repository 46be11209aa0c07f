"""Hostile clients of a server, by kind. Each function sends what it has to send, waits a little, and disconnects."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial

from PIL import Image as Picture

CHAT, TEXT, DRAW, EDIT = "/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/images/edits"
MIB = 2**20
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connect(port: int, timeout: float = 5) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(port: int, request: bytes, timeout: float = 2) -> bytes:
    """What the server answers until it closes the connection, or until nothing arrives for `timeout` seconds."""
    answer = b""
    with suppress(OSError), connect(port, timeout) as connection:
        connection.sendall(request)
        while part := connection.recv(2**16):
            answer += part
    return answer


def post(path: str, body: bytes, content_type: str = "application/json", framing: bytes | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {content_type}\r\n".encode()
    return head + (b"Content-Length: %d\r\n" % len(body) if framing is None else framing) + b"\r\n" + body


def post_json(path: str, **body) -> bytes:
    return post(path, json.dumps(body).encode())


def exchange_all(port: int, requests: list[bytes], at_once: int = 8) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(partial(exchange, port), requests))


@contextmanager
def held_open(port: int, number: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """This many connections on which this has been sent."""
    connections = []
    try:
        for _ in range(number):
            with suppress(OSError):
                connections.append(connect(port))
                connections[-1].sendall(sent)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def trickle(port: int, number: int, sent: bytes, seconds: float = 2) -> None:
    """This many connections on which one more byte arrives every 20 ms."""
    end = time.monotonic() + seconds
    with held_open(port, number, sent) as connections:
        while time.monotonic() < end:
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(b"x")
            time.sleep(0.02)


def long_stops(port: int) -> None:
    body = {"prompt": "a", "max_tokens": 64, "temperature": 2}
    stops = ["a" * 400_000, ["a" * 100_000] * 4, ["a" * 999 + c for c in "bcde"], ["ab" * 499 + c for c in "cdef"]]
    exchange_all(port, [post_json(TEXT, **body, stop=stop) for stop in stops] * 4)


@cache
def json_bodies(limit: int) -> list[bytes]:
    """Bodies of about `limit` bytes that are costly to parse."""
    deep = b'{"a":' * (limit // 12) + b"1" + b"}" * (limit // 12)
    wide = [
        b"[" * limit, b'"' * limit, b"\\" * limit, b'{"messages":[' + b"[]," * (limit // 3) + b"0]}",
        b'{"messages":[' + b"{}," * (limit // 3) + b"0]}", b'{"messages":[' + b"0," * (limit // 2) + b"0]}",
        b'{"messages":[' + b'"",' * (limit // 3) + b"0]}",
        b'{"messages":[' + b"1.2345678901234567e-301," * (limit // 24) + b"0]}",
        b'{"messages":[' + (b"1234567890" * 400 + b",") * (limit // 4001) + b"0]}",
        b"{" + b",".join(b'"%d":0' % n for n in range(limit // 12)) + b"}",
    ]  # fmt: skip
    strings = [b"a" * limit, rb"\n" * (limit // 2), rb"\u4e2d" * (limit // 6), "中".encode() * (limit // 3)]
    wrong = [b'{"messages":[],"tools":"%b"}', b'{"messages":[{"role":"user","content":[{"type":"%b"}]}]}']
    wide += [body % (words * (limit // 2)) for body in wrong for words in (b"x ", "é".encode())]
    strings.append(b",[{" * (limit // 3))
    return [deep, *wide, *[b'{"messages":[{"role":"user","content":"%b"}]}' % string for string in strings]]


def costly_json(port: int) -> None:
    exchange_all(port, [post(TEXT, body) for body in json_bodies(MIB - 100)], 4)
    for size in 8 * MIB - 100, 15 * MIB:
        exchange_all(port, [post(CHAT, body) for body in json_bodies(size)], 4)


def many_parts(port: int) -> None:
    part = {"type": "text", "text": ""}
    messages = [{"role": "user", "content": [part] * 40}] * 200
    exchange_all(port, [post_json(CHAT, messages=messages)] * 16)


def half_open(port: int) -> None:
    with held_open(port, 2000, GET):
        time.sleep(2)


def slow_headers(port: int) -> None:
    trickle(port, 100, GET + b"A: ")


def slow_bodies(port: int) -> None:
    trickle(port, 50, f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode())


def slow_readers(port: int) -> None:
    """They ask for much and read nothing."""
    stream = post_json(DRAW, prompt="a", steps=1000, preview_every=1, stream=True, n=4)
    with held_open(port, 8, stream), held_open(port, 30, (GET.replace(b"health", b"metrics") + b"\r\n") * 500):
        time.sleep(2)


def huge_headers(port: int) -> None:
    headers = [b"A: " + b"x" * 200_000, b"a:\r\n" * 50_000, b"A: b\r\n" + b" c\r\n" * 3000, b"Cookie: " + b"a=b; " * 3000]
    exchange_all(port, [GET + header + b"\r\n\r\n" for header in headers] * 16)


def costly_forms(port: int) -> None:
    content_type = "multipart/form-data; boundary="
    field = b'--a\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    bodies = [
        b"".join(field % (b"f%d" % n, b"") for n in range(20_000)) + b"--a--\r\n",
        b"--a\r\n" + b"a: b\r\n" * 100_000, b"\r\n--ab" * MIB, b"--a\r\n" * MIB, b"\r\n--a" * MIB,
        field % (b"prompt", b"x" * 4 * MIB) + b"--a--\r\n", field % (b"x" * MIB, b"") + b"--a--\r\n",
    ]  # fmt: skip
    requests = [post(EDIT, body, content_type + "a") for body in bodies]
    for charset in "punycode", "idna", "unicode_escape", "utf-7", "utf-16":
        body = field % (b"prompt", b"a-" * 30_000 + b"b" * 3000) + b"--a--\r\n"
        requests.append(post(EDIT, body, f"{content_type}a; charset={charset}"))
    exchange_all(port, requests * 2, 4)


def pipelines(port: int) -> None:
    exchange_all(port, [(GET + b"\r\n") * 1000 + GET + b"Connection: close\r\n\r\n"] * 8)


def tiny_chunks(port: int) -> None:
    requests = []
    for path, content_type in (TEXT, "application/json"), (EDIT, "multipart/form-data; boundary=a"):
        for chunk in b"1\r\n \r\n", b"1;" + b"x" * 1000 + b"\r\n \r\n", b"2\r\n[]\r\n":
            requests.append(post(path, chunk * (MIB // len(chunk)), content_type, b"Transfer-Encoding: chunked\r\n"))
    exchange_all(port, requests * 2)


def encode_picture(mode: str, size: tuple[int, int], file_format: str, **options) -> bytes:
    file = io.BytesIO()
    Picture.new(mode, size).save(file, file_format, **options)
    return file.getvalue()


def picture_bombs(port: int) -> None:
    largest = (4000, 4000)
    pictures = [
        encode_picture("RGBA", largest, "PNG"), encode_picture("LA", largest, "PNG"), encode_picture("RGB", largest, "JPEG"),
        encode_picture("RGBA", largest, "WEBP", lossless=True), encode_picture("P", largest, "GIF"),
        encode_picture("1", (9000, 9000), "PNG"), encode_picture("RGB", (15_999_999, 1), "BMP")[:1000],
        encode_picture("L", (2, 8_000_000), "PNG"), encode_picture("I;16", largest, "PNG"),
    ]  # fmt: skip
    requests = []
    for picture in pictures:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(picture).decode()}}
        requests.append(post_json(CHAT, messages=[{"role": "user", "content": [part] * 2}], max_tokens=1))
    exchange_all(port, requests)


def longest_prompts(port: int) -> None:
    """At the limit of characters, and of one body."""
    answer = exchange(port, GET.replace(b"health", b"v1/models") + b"Connection: close\r\n\r\n")
    model = re.search(rb'"seq_len":(\d+)', answer)
    requests = []
    for length in 32 * int(model[1] if model else 1024), 250_000:
        for text in "a", "\U0001f600", "e\u0301", " ", "1", "\n", "\U0001f469\u200d", "\0", "hello, ", "\u202e":
            prompt = (text * length)[:length]
            requests += [post_json(TEXT, prompt=prompt, max_tokens=1), post_json(DRAW, prompt=prompt, steps=1)]
    exchange_all(port, requests)


def log_probabilities(port: int) -> None:
    """The most that one request can ask for: with alternatives, of eight prompts as long as a row."""
    answer = exchange(port, GET.replace(b"health", b"v1/models") + b"Connection: close\r\n\r\n")
    model = re.search(rb'"seq_len":(\d+)', answer)
    prompts = [[5] * (min(int(model[1] if model else 1024), 4000) - 1)] * 8
    exchange_all(port, [post_json(TEXT, prompt=prompts, max_tokens=0, echo=True, logprobs=20)] * 8)


def disconnects(port: int) -> None:
    stream = post_json(DRAW, prompt="a", steps=1000, preview_every=1, stream=True)
    for sent in [stream, stream[:-5], GET, post(CHAT, b"x" * MIB)[: MIB // 2]] * 30:
        with suppress(OSError), connect(port) as connection:
            connection.sendall(sent)
            if sent == stream:
                connection.recv(100)


def not_http(port: int) -> None:
    chunked, host = b"Transfer-Encoding: chunked\r\n", b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    requests = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0" * 1000, b"BREW /health" + host, b"GET /\0" + host, b"GET /%00" + host, b"GET /" + b"../" * 3000 + host,
        b"GET /?" + b"a=b&" * 3000 + host, b"OPTIONS *" + host, b"CONNECT localhost:80" + host,
        GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", GET + b"Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        post(TEXT, b"{}", framing=b"Expect: 100-continue\r\nContent-Length: 2\r\n"),
        post(TEXT, b"zz\r\n", framing=chunked), post(TEXT, b"0\r\n\r\nGET /", framing=chunked + b"Content-Length: 5\r\n"),
        GET + b"\r\n" + b"\0\r\n\r\n",
    ]  # fmt: skip
    exchange_all(port, [request for request in requests for _ in range(10)], 16)


KINDS: list[Callable[[int], None]] = [
    long_stops, costly_json, many_parts, slow_headers, slow_bodies, slow_readers, huge_headers, costly_forms, pipelines,
    tiny_chunks, picture_bombs, longest_prompts, log_probabilities, disconnects, not_http, half_open,
]  # fmt: skip
