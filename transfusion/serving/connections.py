"""Connections: how many are open, and for how long one may have no request or not read its answer. Uses h11 and asyncio."""

import asyncio
import errno
import json
import logging
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits

SHARE_OF_FILES = 0.75  # of the files that the process may open
MAX_HEADER_BYTES = 16 * 2**10
READ_BYTES = 16 * 2**10  # at once from one connection: parsing them takes little time, also if they are many tiny chunks
SMALL_PARTS, MIN_MEAN_BYTES = 512, 256  # a body may arrive in this many parts of any size; then their mean size counts
ACCEPTS_PER_TURN = 64  # of the event loop, before these connections are counted
LISTEN_BACKLOG = 1024  # connections that wait in the operating system
MIN_READ_BYTES = 256 * 2**10  # that a client must read of a long answer in each client_timeout
# One thread does all costly work beside the event loop: parsing, pictures, texts. From several threads, calls of C that hold
# the interpreter's lock could follow each other, and the loop would wait for all. One thread also keeps less memory.
NUM_WORKERS = 1
SECONDS_BETWEEN_REPORTS = 60
INVALID_REQUEST = "the request is not valid HTTP/1.1, its header is too long, or its body arrives in too many small parts"
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)
log.setLevel("ERROR")  # any client can cause uvicorn's warnings, as often as it likes


class Server(uvicorn.Server):
    """Serves an application within these limits. `run` listens at sockets until a signal."""

    def __init__(self, app: ASGIApp, limits: Limits):
        super().__init__(uvicorn.Config(
            app, loop="asyncio", http=partial(Connection, pool=ConnectionPool(limits)), ws="none", lifespan="on",
            log_level="warning", access_log=False, server_header=False, backlog=ACCEPTS_PER_TURN,
            timeout_keep_alive=limits.client_timeout, timeout_graceful_shutdown=int(limits.shutdown_grace),
        ))  # fmt: skip
        self.reported = -SECONDS_BETWEEN_REPORTS  # in time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        loop.set_default_executor(ThreadPoolExecutor(NUM_WORKERS, "bodies, pictures and texts"))
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(LISTEN_BACKLOG)  # asyncio uses one number for this and for ACCEPTS_PER_TURN

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """asyncio pauses for a second when it cannot accept a connection, but logs a traceback for each attempt."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in OUT_OF_RESOURCES:
            return loop.default_exception_handler(context)
        if time.monotonic() - self.reported >= SECONDS_BETWEEN_REPORTS:
            self.reported = time.monotonic()
            log.error("new connections wait: %s; raise `ulimit -n`, or lower --limits.connections", error.strerror)


class ConnectionPool:
    """The open connections of a server. At the limit, the one that has had no request for the longest time is closed."""

    def __init__(self, limits: Limits):
        max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_open = min(limits.connections, int(SHARE_OF_FILES * max_files))
        self.client_timeout = limits.client_timeout
        self.open: set[Connection] = set()
        self.idle: dict[Connection, None] = {}  # open connections without a request, in the order of their last one

    def add(self, connection: "Connection") -> None:
        self.open.add(connection)
        if len(self.open) > self.max_open:
            closed = next(iter(self.idle), connection)
            self.remove(closed)
            closed.transport.abort()

    def remove(self, connection: "Connection") -> None:
        self.open.discard(connection)
        self.idle.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's connection, with time limits. It is closed after `client_timeout` seconds without a complete request header
    since it was opened or since its last answer, and after as many seconds in which its client reads too little."""

    def __init__(self, *args, pool: ConnectionPool, **kwargs):
        super().__init__(*args, **kwargs)
        self.pool, self.logger, self.conn = pool, log, RequestParser(h11.SERVER, MAX_HEADER_BYTES)
        self.timer: asyncio.TimerHandle | None = None

    @property
    def has_request(self) -> bool:
        """A request whose answer is not complete."""
        return self.cycle is not None and not (self.cycle.response_complete or self.cycle.disconnected)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # Otherwise the second write of an answer waits until the first is acknowledged, often 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.max_size = READ_BYTES
        self.pool.add(self)
        self._update()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.pool.remove(self)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Unlike uvicorn's, does not restart the time: a client could send a header byte by byte without end."""
        self.conn.receive_data(data)
        self.handle_events()

    def handle_events(self) -> None:
        super().handle_events()
        self._update()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.has_request:
            self._stop_timer()

    def send_400_response(self, message: str) -> None:
        """In the API's format, if no answer has begun. A request with a wrong body ends as if its client had left."""
        if self.has_request:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(APIError(400, INVALID_REQUEST).body()).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            for event in h11.Response(status_code=400, headers=[*headers.items()]), h11.Data(body), h11.EndOfMessage():
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _update(self) -> None:
        """Start the time when the connection has no request any more; stop it when it has one."""
        is_idle = self in self.pool.idle
        if self.has_request and is_idle:
            del self.pool.idle[self]
            self._stop_timer()
        elif not self.has_request and not is_idle and self in self.pool.open:
            self.pool.idle[self] = None
            self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        unsent = self.transport.get_write_buffer_size()
        self.timer = self.loop.call_later(self.pool.client_timeout, self._on_timeout, unsent)

    def _on_timeout(self, unsent: int) -> None:
        """unsent: the bytes of answers that were not sent when the time began."""
        if unsent - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._start_timer()

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class RequestParser(h11.Connection):
    """Refuses a body in many tiny parts: each costs as much time as a large one."""

    num_parts = num_bytes = 0  # of the request's body

    def next_event(self) -> object:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_parts = self.num_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_parts += 1
            self.num_bytes += len(event.data)
            if self.num_parts > SMALL_PARTS and self.num_bytes < MIN_MEAN_BYTES * self.num_parts:
                raise h11.RemoteProtocolError("the body arrives in too many parts")
        return event
