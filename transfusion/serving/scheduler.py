"""Runs the engine in its own thread: requests join the running batch, and leave it, between two steps.

Only this thread uses the engine. Request handlers run on an event loop; each submits requests and reads events from a
`RequestHandle`. A quarter of the sequences is reserved for text: images never take it, and while an image waits, text gets
only that quarter. Requests of the same kind start in order of arrival. So neither kind can block the other.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transfusion.inference.engine import Engine, Event, FinishEvent, ImageEvent, PreviewEvent, Request, TokenEvent
from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics

log = logging.getLogger(__name__)

MAX_QUEUED_EVENTS = 16  # a slow client that has more unread events receives no more previews


@dataclass(eq=False)
class SubRequest:
    """One request to the engine; a handle has one or several."""

    handle: "RequestHandle"
    request: Request
    first_choice: int  # sample i of the request, one `Answer` of Engine.generate, is choice first_choice + i of the response
    request_id: int | None = None  # the engine's id, set when it starts
    prompt_tokens: int = 0  # positions of its prompt, set when it starts
    is_cancelled: bool = False

    @property
    def num_sequences(self) -> int:
        return self.request.num_images or 1

    @property
    def kind(self) -> str:
        return "image" if self.request.allow_images else "text"


@dataclass(eq=False)
class RequestHandle:
    """The request of one client. Iterate it for (choice, event), until every choice is finished."""

    deadline: float  # in time.monotonic()
    loop: asyncio.AbstractEventLoop
    sub_requests: list[SubRequest] = field(default_factory=list)
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    has_output: bool = False
    finished: set[int] = field(default_factory=set)  # choices

    @property
    def prompt_tokens(self) -> int:
        """Positions of all prompts. Choices of one prompt have the same parts: it counts once."""
        return sum({tuple(map(id, sub.request.parts)): sub.prompt_tokens for sub in self.sub_requests}.values())

    def stop(self, choice: int) -> None:
        """Cancel this choice."""
        self.finished.add(choice)
        next(sub for sub in reversed(self.sub_requests) if sub.first_choice <= choice).is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """APIError when the engine cannot do the request, has failed, or misses the deadline."""
        num_choices = sum(sub.num_sequences for sub in self.sub_requests)
        while len(self.finished) < num_choices:
            item = await self.queue.get()
            if isinstance(item, APIError):
                raise item
            choice, event = item
            if choice in self.finished:
                continue
            yield choice, event
            if isinstance(event, FinishEvent):
                self.finished.add(choice)


class Scheduler:
    """Runs an engine: `start` the thread, `submit` requests, `close` the thread."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.condition = threading.Condition()
        self.submitted: list[SubRequest] = []
        self.is_closing = False
        self.waiting: list[SubRequest] = []  # `waiting` and `running` are used only by the engine thread
        self.running: dict[int, SubRequest] = {}  # by request_id
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Drop all running requests; return when the thread has ended."""
        with self.condition:
            self.is_closing = True
            self.condition.notify()
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    @contextmanager
    def submit(self, requests: Sequence[Request], deadline: float) -> Iterator[RequestHandle]:
        """Generate these requests; their samples are numbered in order as choices. Leaving the context cancels the rest."""
        handle = RequestHandle(deadline, asyncio.get_running_loop())
        choice = 0
        for request in requests:
            handle.sub_requests.append(SubRequest(handle, request, choice))
            choice += handle.sub_requests[-1].num_sequences
        with self.condition:
            self.submitted += handle.sub_requests
            self.condition.notify()
        try:
            yield handle
        finally:
            for sub in handle.sub_requests:
                sub.is_cancelled = True

    # In the engine's thread

    def _run(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.submitted or self.waiting or self.running or self.is_closing)
                if self.is_closing:
                    return
                self.waiting += self.submitted
                self.submitted = []
            self._drop_cancelled()
            self._admit()
            if self.running:
                self._step()
            self._update_gauges()

    def _drop_cancelled(self) -> None:
        """Remove the requests that are cancelled or past their deadline."""
        now = time.monotonic()
        for sub in [*self.waiting, *self.running.values()]:
            if not sub.is_cancelled and now > sub.handle.deadline:
                message = f"the request took longer than {self.limits.deadline:g} seconds"
                self._fail(sub.handle, APIError(504, message, code="timeout"))
        self.waiting = [sub for sub in self.waiting if not sub.is_cancelled]
        for request_id in [request_id for request_id, sub in self.running.items() if sub.is_cancelled]:
            self.engine.cancel(request_id)
            del self.running[request_id]

    def _fail(self, handle: RequestHandle, error: APIError) -> None:
        for sub in handle.sub_requests:
            sub.is_cancelled = True
        self._publish([(handle, error)])

    def _admit(self) -> None:
        """Submit waiting requests to the engine while there is room, each kind in order of arrival."""
        blocked = set()  # kinds whose next request must wait
        for sub in list(self.waiting):
            if sub.kind in blocked or sub.is_cancelled:
                continue
            num_image, num_text = self._count_sequences("image"), self._count_sequences("text")
            free = self.limits.max_sequences - num_image - num_text
            if sub.kind == "image":
                free = min(free, self.limits.max_sequences - self.limits.reserved_text_sequences - num_image)
            elif "image" in blocked:
                free = min(free, self.limits.reserved_text_sequences - num_text)
            if sub.num_sequences > free:
                blocked.add(sub.kind)
                continue
            self.waiting.remove(sub)
            self._start(sub)

    def _count_sequences(self, kind: str) -> int:
        return sum(sub.num_sequences for sub in self.running.values() if sub.kind == kind)

    def _start(self, sub: SubRequest) -> None:
        try:
            sub.request_id = self.engine.submit(sub.request)
            sub.prompt_tokens = len(self.engine.sequences[-1].phase.chunks[0])
            self.running[sub.request_id] = sub
        except ValueError as error:
            self._fail(sub.handle, APIError(400, str(error)))
        except BaseException:  # a panic of a library in Rust, such as tokenizers, is no Exception
            log.exception("a request could not be started")
            self._fail(sub.handle, APIError(500, "the request could not be started because of an error in the server"))

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed: its requests fail, and a new engine starts")
            self.metrics.failures.inc()
            self.engine = Engine(self.engine.opened)
            failed, self.running = {sub.handle for sub in self.running.values()}, {}
            for handle in failed:
                self._fail(handle, APIError(500, "the engine failed during this request; you can send it again"))
            return
        items = []
        for event in events:
            sub = self.running[event.request_id]
            if isinstance(event, FinishEvent) and event.reason == "error":
                self.metrics.failures.inc()
                self._fail(sub.handle, APIError(500, "the engine failed at this request; other requests continue"))
            items.append((sub.handle, (sub.first_choice + event.sample_index, event)))
        for request_id in self.running.keys() - {sequence.request_id for sequence in self.engine.sequences}:
            del self.running[request_id]
        self.metrics.steps.inc()
        self.metrics.tokens.inc(sum(isinstance(event, TokenEvent) for event in events))
        self.metrics.images.inc(sum(isinstance(event, ImageEvent) for event in events))
        # Publish last, so that the metrics already include an answer when its client receives it.
        self._publish(items)

    def _publish(self, items: list[tuple[RequestHandle, tuple[int, Event] | APIError]]) -> None:
        """Pass these to the event loops that wait for them. A loop that has ended is skipped."""
        for loop in {handle.loop for handle, _ in items}:
            try:
                loop.call_soon_threadsafe(self._enqueue, [item for item in items if item[0].loop is loop])
            except RuntimeError:
                log.info("an event loop ended before its answers")

    def _enqueue(self, items: list[tuple[RequestHandle, tuple[int, Event] | APIError]]) -> None:
        """On the event loop."""
        for handle, item in items:
            if not handle.has_output and not isinstance(item, APIError):
                handle.has_output = True
                self.metrics.first_event_seconds.observe(time.monotonic() - handle.submitted)
            is_preview = isinstance(item, tuple) and isinstance(item[1], PreviewEvent)
            if not (is_preview and handle.queue.qsize() > MAX_QUEUED_EVENTS):
                handle.queue.put_nowait(item)

    def _update_gauges(self) -> None:
        for kind in ("text", "image"):
            self.metrics.sequences.labels(kind).set(self._count_sequences(kind))
        self.metrics.waiting.set(len(self.waiting))
