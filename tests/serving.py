"""A server in a thread of the test's own process, on a free port of this machine, and an engine that can be held."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
import uvicorn

from transfusion.inference.engine import Engine
from transfusion.serving.app import build_app
from transfusion.serving.limits import Limits
from transfusion.serving.scheduler import Scheduler

SECONDS = 30  # after which something that should have happened has not


@dataclass
class Server:
    """`url`, and what is behind it."""

    url: str
    scheduler: Scheduler

    @property
    def engine(self) -> Engine:
        return self.scheduler.engine

    @property
    def port(self) -> int:
        return urlsplit(self.url).port

    def client(self, **options) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=2 * SECONDS, verify=False, **options)  # no certificates to load

    def settled(self) -> bool:
        """Nothing is under way or waits, and all of the cache is free but what every image shares."""
        engine = self.engine
        held = list(engine.uncond_slots.values())
        idle = not (engine.sequences or self.scheduler.flows or self.scheduler.waiting or self.scheduler.arrived)
        return idle and sorted(engine.cache.free + held) == list(range(len(engine.cache.lengths)))

    @property
    def asked(self) -> int:
        """Answers that are under way or wait."""
        scheduler = self.scheduler
        return len(scheduler.arrived) + len(scheduler.waiting) + len(scheduler.flows)

    def vanish(self, path: str, body: bytes, read: int = 0, when: threading.Event | None = None) -> None:
        """Send a request, read so many bytes of its answer, go away (then, or when it is said)."""
        with socket.create_connection(("127.0.0.1", self.port)) as place:
            place.sendall(
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            while read > 0:
                got = place.recv(min(read, 4096))
                assert got
                read -= len(got)
            if when is not None:
                when.wait(SECONDS)


@contextmanager
def serving(engine: Engine, limits: Limits = Limits(), api_key: str | None = None) -> Iterator[Server]:  # noqa: B008
    app = build_app(engine, limits, api_key)
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, ws="none", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        until(lambda: server.started)
        try:
            yield Server(f"http://127.0.0.1:{place.getsockname()[1]}", app.state.service.scheduler)
        finally:
            if isinstance(gate := getattr(engine.step, "__self__", None), Gate):
                gate.open()
            server.should_exit = True
            thread.join()


class Gate:
    """Holds an engine before each step until it is let through: so many steps, or `open` for all that come."""

    def __init__(self, engine: Engine):
        self.turns, self.step, self.taken = threading.Semaphore(0), engine.step, 0
        self.is_open = False
        engine.step = self._step

    def _step(self):
        while not self.is_open and not self.turns.acquire(timeout=0.01):
            pass
        self.taken += 1
        return self.step()

    def let(self, steps: int) -> None:
        """Returns when these are taken."""
        target = self.taken + steps
        self.turns.release(steps)
        until(lambda: self.taken >= target)

    def open(self) -> None:
        self.is_open = True


def until(holds: Callable[[], bool]) -> None:
    """Waits for it. TimeoutError when it does not come."""
    end = time.monotonic() + SECONDS
    while True:
        with suppress(RuntimeError):  # a dictionary that another thread changes meanwhile
            if holds():
                return
        if time.monotonic() > end:
            raise TimeoutError("this did not come to be")
        time.sleep(0.002)
