"""A server in a thread of the test process, on a free local port, and an engine that a test can pause."""

import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
from starlette.types import ASGIApp

from transfusion.inference.engine import Engine
from transfusion.serving import connections
from transfusion.serving.app import build_app
from transfusion.serving.limits import Limits
from transfusion.serving.scheduler import Scheduler, SubRequest

TIMEOUT = 30  # seconds until `wait_until` fails


@dataclass
class Server:
    """`url`, and the scheduler behind it."""

    url: str
    scheduler: Scheduler

    @property
    def engine(self) -> Engine:
        return self.scheduler.engine

    @property
    def port(self) -> int:
        return urlsplit(self.url).port

    def client(self, **options) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=2 * TIMEOUT, verify=False, **options)  # no certificates to load

    def is_idle(self) -> bool:
        """Nothing runs or waits, and the whole cache is free."""
        engine = self.engine
        is_idle = not (self.requests or engine.sequences)
        return is_idle and sorted(engine.cache.free) == list(range(len(engine.cache.lengths)))

    @property
    def requests(self) -> set[SubRequest]:
        """Requests to the engine that run or wait, each once: its thread may move one from list to list meanwhile."""
        scheduler = self.scheduler
        return {*scheduler.submitted, *scheduler.waiting, *scheduler.running.values()}

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def has_image_request(self) -> bool:
        """An image request has arrived: it is submitted, waits or runs."""
        return any(sub.kind == "image" for sub in self.requests)

    def send_and_disconnect(self, path: str, body: bytes, num_bytes: int = 0, when: threading.Event | None = None) -> None:
        """Send a request, read `num_bytes` of its answer, and disconnect (after the event `when`, if there is one)."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            while num_bytes > 0:
                received = connection.recv(min(num_bytes, 4096))
                assert received
                num_bytes -= len(received)
            if when is not None:
                when.wait(TIMEOUT)


@contextmanager
def serving(
    engine: Engine, limits: Limits = Limits(), api_key: str | None = None, allow_origins: Collection[str] = (),  # noqa: B008
) -> Iterator[Server]:  # fmt: skip
    app = build_app(engine, limits, api_key, allow_origins)
    with run_server(app, limits) as port:
        try:
            yield Server(f"http://127.0.0.1:{port}", app.state.service.scheduler)
        finally:
            if isinstance(gate := getattr(engine.step, "__self__", None), Gate):
                gate.open()


@contextmanager
def run_server(app: ASGIApp, limits: Limits) -> Iterator[int]:
    """Yields the port at which this application is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server, port = connections.Server(app, limits), listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name=thread_name(port))
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


def thread_name(port: int) -> str:
    """The name of a server's thread, which its log records have."""
    return f"server of port {port}"


class Gate:
    """Blocks an engine before each step: `allow` lets a number of steps pass, `open` lets all pass."""

    def __init__(self, engine: Engine):
        self.permits, self.step, self.steps_taken = threading.Semaphore(0), engine.step, 0
        self.is_open = False
        engine.step = self._step

    def _step(self):
        while not self.is_open and not self.permits.acquire(timeout=0.01):
            pass
        self.steps_taken += 1
        return self.step()

    def allow(self, steps: int) -> None:
        """Returns when these steps have started."""
        target = self.steps_taken + steps
        self.permits.release(steps)
        wait_until(lambda: self.steps_taken >= target)

    def open(self) -> None:
        self.is_open = True


def wait_until(condition: Callable[[], bool]) -> None:
    """TimeoutError when the condition does not become true."""
    end = time.monotonic() + TIMEOUT
    while True:
        with suppress(RuntimeError):  # a dictionary that another thread changes at the same time
            if condition():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"the condition is not true after {TIMEOUT} seconds")
        time.sleep(0.002)
