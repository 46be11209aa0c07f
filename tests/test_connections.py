"""Connections: time limits, their number, what is not HTTP, and how the server ends them."""

import asyncio
import errno
import json
import logging
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import Mock

import pytest

from tests.abuse import TEXT, valid_body
from tests.serving import Gate, run_server, serving, wait_until
from tests.tiny import build_engine
from transfusion.serving.connections import MIN_READ_BYTES, SMALL_PARTS, Connection, ConnectionPool, Server
from transfusion.serving.limits import Limits
from transfusion.serving.streams import EventStreamResponse

SHORT = 1  # seconds, and a client of the tests has as long to send what it sends first
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server():
    """It closes no connection because of the time, also on a busy machine."""
    with serving(build_engine(), Limits(client_timeout=1000)) as server:
        yield server


@pytest.fixture(scope="module")
def impatient():
    """A server that soon closes a connection without a request."""
    with serving(build_engine(), Limits(client_timeout=SHORT)) as server:
        yield server


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes the connection. TimeoutError when it does not."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def exchange(port: int, request: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    with connect(port) as connection:
        with suppress(ConnectionError):
            connection.sendall(request)
        return read_all(connection)


def post(path: str, body: bytes, headers: bytes = b"") -> bytes:
    start = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    return start + headers + b"\r\n" + body


# Time


def test_connections_without_a_request_are_closed(impatient):
    """Nothing, a byte, half a header, an answered request, and half a header after it."""
    sent = b"", b"G", HEAD, HEAD + b"\r\n", HEAD + b"\r\n" + HEAD
    with ExitStack() as stack:
        connections = []
        for request in sent:
            connections.append(stack.enter_context(connect(impatient.port)))
            connections[-1].sendall(request)
        answers = list(map(read_all, connections))
    assert [answer.count(b"HTTP/1.1 200") for answer in answers] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("first", [b"", HEAD + b"\r\n"])
def test_the_time_does_not_restart_with_each_byte(impatient, first):
    with connect(impatient.port) as connection:
        end = time.monotonic() + 30
        with suppress(ConnectionError):
            connection.sendall(first)
            connection.sendall(HEAD)
            while time.monotonic() < end:
                connection.sendall(b"x")
                time.sleep(SHORT / 10)
        assert time.monotonic() < end


def test_the_rest_of_a_refused_body_is_not_awaited_longer(impatient):
    """The answer is sent, although the client never stops sending its body."""
    with connect(impatient.port) as connection:
        end = time.monotonic() + 30
        with suppress(ConnectionError):
            connection.sendall(b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
            while time.monotonic() < end:
                connection.sendall(b"x")
                time.sleep(SHORT / 10)
        assert time.monotonic() < end


def test_a_running_request_may_take_longer():
    engine = build_engine()
    gate = Gate(engine)
    with serving(engine, Limits(client_timeout=SHORT)) as server, connect(server.port) as connection:
        body = json.dumps(valid_body(TEXT)).encode()
        connection.sendall(post(TEXT, body, b"Content-Length: %d\r\n" % len(body)))
        time.sleep(2 * SHORT)
        gate.open()
        assert b"HTTP/1.1 200" in read_all(connection)


class EndlessStream:
    """An application that sends events for ever; is_closed when its generator has ended."""

    def __init__(self):
        self.is_closed = threading.Event()

    async def events(self):
        try:
            while True:
                yield "x" * 100_000
                await asyncio.sleep(0)
        finally:
            self.is_closed.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await answer_lifespan(receive, send)
        await EventStreamResponse(self.events())(scope, receive, send)


async def answer_lifespan(receive, send):
    for event in "startup", "shutdown":
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


def test_a_client_that_does_not_read_is_dropped():
    app = EndlessStream()
    with run_server(app, Limits(client_timeout=SHORT)) as port, connect(port) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert app.is_closed.wait(30)
        assert read_all(connection).startswith(b"HTTP/1.1 200")  # what was on its way, and then the end


def test_the_time_ends_when_a_client_reads_again(monkeypatch):
    made, connection_made = [], Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", lambda self, it: (connection_made(self, it), made.append(self)))
    with run_server(EndlessStream(), Limits(client_timeout=1000)) as port, connect(port) as connection:
        connection.sendall(HEAD + b"\r\n")
        wait_until(lambda: made and made[0].flow.write_paused and made[0].timer)
        wait_until(lambda: connection.recv(2**20) and made[0].timer is None)


@pytest.mark.parametrize(("read", "is_closed"), [(MIN_READ_BYTES, False), (MIN_READ_BYTES - 1, True), (0, True)])
def test_a_slow_client_may_read_a_long_answer(read, is_closed):
    """The time begins again for a client that has read a good part in it; another one is disconnected."""
    connection, loop, unsent = Connection.__new__(Connection), asyncio.new_event_loop(), 40 * 2**20
    connection.loop, connection.timer, connection.pool = loop, None, ConnectionPool(Limits(client_timeout=1000))
    connection.transport = Mock(get_write_buffer_size=Mock(return_value=unsent - read))
    connection._on_timeout(unsent)
    assert connection.transport.abort.called == is_closed
    assert (connection.timer is None) == is_closed
    loop.close()


def test_small_writes_are_sent_at_once(server, monkeypatch):
    """Otherwise each event of a stream waits until the one before is acknowledged."""
    options = []

    def connection_made(connection, transport):
        made(connection, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    made = Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", connection_made)
    exchange(server.port, HEAD + b"Connection: close\r\n\r\n")
    assert options == [1]


# Number


def test_at_the_limit_the_oldest_connection_without_a_request_is_closed():
    with serving(build_engine(), Limits(connections=8, client_timeout=1000)) as server, ExitStack() as stack:
        half_open = []
        for _ in range(30):
            half_open.append(stack.enter_context(connect(server.port)))
            half_open[-1].sendall(HEAD)
        with server.client() as client:
            assert client.get("/health").status_code == 200
        assert not any(map(read_all, half_open[:20]))  # closed long before client_timeout
        half_open[-1].sendall(b"\r\n")
        assert half_open[-1].recv(100).startswith(b"HTTP/1.1 200")


def test_connections_with_a_request_are_not_closed_for_new_ones():
    engine = build_engine()
    gate = Gate(engine)
    with serving(engine, Limits(connections=2)) as server, ExitStack() as stack:
        connections = [stack.enter_context(connect(server.port)) for _ in range(2)]
        body = json.dumps(valid_body(TEXT)).encode()
        for connection in connections:
            connection.sendall(post(TEXT, body, b"Connection: close\r\nContent-Length: %d\r\n" % len(body)))
        wait_until(lambda: server.num_requests == 2)
        assert exchange(server.port, HEAD + b"\r\n") == b""
        gate.open()
        assert all(read_all(connection).startswith(b"HTTP/1.1 200") for connection in connections)
        assert exchange(server.port, HEAD + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_lack_of_files_is_reported_once_a_minute(caplog):
    server, loop = Server(EndlessStream(), Limits()), FakeLoop()
    for _ in range(100):
        server._on_loop_error(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
    assert [record.getMessage() for record in caplog.records] == [
        "new connections wait: Too many open files; raise `ulimit -n`, or lower --limits.connections"
    ]
    server.reported -= 60
    server._on_loop_error(loop, {"message": "accept", "exception": OSError(errno.ENFILE, "Too many files in the system")})
    assert len(caplog.records) == 2
    server._on_loop_error(loop, {"message": "another", "exception": ValueError()})
    assert loop.contexts == [{"message": "another", "exception": loop.contexts[0]["exception"]}]


class FakeLoop:
    def __init__(self):
        self.contexts = []

    def default_exception_handler(self, context):
        self.contexts.append(context)


# What is not HTTP

CHUNKED = b"Transfer-Encoding: chunked\r\n"
VALID = json.dumps(valid_body(TEXT)).encode()


@contextmanager
def recorded_logs(caplog):
    """uvicorn's loggers do not propagate: also record theirs."""
    logger = logging.getLogger("uvicorn")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


NOT_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "NUL": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: \0\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": HEAD + b"Host: localhost\r\n\r\n",
    "words": b"hello server\r\n\r\n",
    "a header of 40 kB": HEAD + b"A: " + b"x" * 40_000 + b"\r\n\r\n",
    "10,000 headers": HEAD + b"a:\r\n" * 10_000 + b"\r\n",
    "a path of 40 kB": b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": post(TEXT, VALID, b"Content-Length: 3\r\nContent-Length: %d\r\n" % len(VALID)),
    "a negative length": post(TEXT, VALID, b"Content-Length: -1\r\n"),
    "both framings": post(TEXT, b"0\r\n\r\n", CHUNKED + b"Content-Length: 5\r\nConnection: close\r\n"),
    "chunks of a byte": post(TEXT, b"1\r\n \r\n" * 2000, CHUNKED),
    "chunks of a byte in a form": b"".join(
        [b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n", CHUNKED,
         b"\r\n", b"1\r\n \r\n" * 2000]),
    "a chunk without a size": post(TEXT, b"zz\r\n", CHUNKED),
    "a huge chunk": post(TEXT, b"f" * 30 + b"\r\n", CHUNKED),
    "garbage after a request": HEAD + b"\r\n" + b"\0\1\2\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("request_bytes", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_is_refused_without_a_log(server, request_bytes, caplog):
    with recorded_logs(caplog):
        answer = exchange(server.port, request_bytes)
        wait_until(lambda: server.is_idle())
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+) ", head)[-1] in (b"400", b"431")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not caplog.records
    assert exchange(server.port, HEAD + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_body_in_a_few_small_chunks_is_accepted(server):
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in VALID) + b"0\r\n\r\n"
    assert len(VALID) < SMALL_PARTS
    assert exchange(server.port, post(TEXT, chunks, CHUNKED + b"Connection: close\r\n")).startswith(b"HTTP/1.1 200")


def test_less_usual_http_works(server):
    """A websocket upgrade is an ordinary request; Expect: 100-continue; requests in a pipeline; HEAD."""
    close = b"Connection: close\r\n\r\n"
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n"
    assert exchange(server.port, HEAD + upgrade + HEAD + close).count(b"HTTP/1.1 200") == 2
    headers = b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n" % len(VALID)
    answer = exchange(server.port, post(TEXT, VALID, headers))
    assert answer.startswith(b"HTTP/1.1 100") and b"HTTP/1.1 200" in answer
    assert exchange(server.port, (HEAD + b"\r\n") * 200 + HEAD + close).count(b"HTTP/1.1 200") == 201
    answer = exchange(server.port, HEAD.replace(b"GET", b"HEAD") + close)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")


# The end


def test_the_server_ends_with_connections_without_a_request(caplog):
    """Nothing sent, half a header, something invalid, an answered request."""
    with ExitStack() as stack:
        with serving(build_engine()) as server, recorded_logs(caplog):
            for sent in b"", HEAD, b"\0\r\n\r\n", HEAD + b"\r\n" + HEAD + b"\r\n", HEAD + b"\r\n" + HEAD:
                stack.enter_context(connect(server.port)).sendall(sent)
    assert not caplog.records
