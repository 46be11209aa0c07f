"""The engine's thread: requests join the running batch, and leave it, between any two steps.

The engine belongs to this one thread. What asks runs on an event loop: it hands a `Ticket` over and reads its events. Of
the rows a quarter is kept for text while images wait, and images never take those; within a kind, first come, first served.
So a short text does not wait until long drawings end, and neither kind can shut the other out.
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

BACKLOG = 16  # events that a slow client may leave unread before it is shown fewer previews


@dataclass(eq=False)
class SubRequest:
    """One request to the engine, of the one or several that a ticket stands for."""

    ticket: "RequestHandle"
    request: Request
    choice: int  # the number of its first answer
    number: int | None = None  # the engine's, once it has a row
    left: bool = False  # nobody wants more of it

    @property
    def rows(self) -> int:
        return self.request.num_images or 1

    @property
    def draws(self) -> bool:
        return self.request.allow_images


@dataclass(eq=False)
class RequestHandle:
    """What one client asked for. Iterate it: (choice, event), until every choice is finished."""

    deadline: float  # of time.monotonic
    loop: asyncio.AbstractEventLoop
    flows: list[SubRequest] = field(default_factory=list)
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    begun: float = field(default_factory=time.monotonic)
    prompt: int = 0  # positions of the longest one
    quiet: bool = True  # nothing has come yet
    over: set[int] = field(default_factory=set)  # choices

    def stop(self, choice: int) -> None:
        """No more of this one is wanted."""
        self.over.add(choice)
        next(flow for flow in reversed(self.flows) if flow.choice <= choice).left = True

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Refused when the engine cannot do it, has failed, or was too slow."""
        choices = sum(flow.rows for flow in self.flows)
        while len(self.over) < choices:
            found = await self.queue.get()
            if isinstance(found, APIError):
                raise found
            choice, event = found
            if choice in self.over:
                continue
            yield choice, event
            if isinstance(event, FinishEvent):
                self.over.add(choice)


class Scheduler:
    """Runs an engine. `start` it, `take` tickets, `close` it."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.changed = threading.Condition()
        self.arrived: list[SubRequest] = []
        self.closing = False
        self.waiting: list[SubRequest] = []  # this and what follows is the thread's alone
        self.flows: dict[int, SubRequest] = {}  # by the engine's number
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Returns when the thread has ended; what was under way is given up."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    @property
    def works(self) -> bool:
        return self.thread.is_alive()

    @contextmanager
    def take(self, requests: Sequence[Request], deadline: float) -> Iterator[RequestHandle]:
        """The engine's answers to these requests, one after the other as choices. Leaving gives up what is not done."""
        ticket = RequestHandle(deadline, asyncio.get_running_loop())
        choice = 0
        for request in requests:
            ticket.flows.append(SubRequest(ticket, request, choice))
            choice += ticket.flows[-1].rows
        with self.changed:
            self.arrived += ticket.flows
            self.changed.notify()
        try:
            yield ticket
        finally:
            for flow in ticket.flows:
                flow.left = True

    # The thread's

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.arrived or self.waiting or self.flows or self.closing)
                if self.closing:
                    return
                self.waiting += self.arrived
                self.arrived = []
            self._drop_cancelled()
            self._admit()
            if self.flows:
                self._step()
            self._count()

    def _drop_cancelled(self) -> None:
        """Rows and places of those who went away, or whose time is over."""
        now = time.monotonic()
        for flow in [*self.waiting, *self.flows.values()]:
            if not flow.left and now > flow.ticket.deadline:
                late = APIError(504, f"this was not done within {self.limits.deadline:g} seconds", code="timeout")
                self._give_up(flow.ticket, late)
        self.waiting = [flow for flow in self.waiting if not flow.left]
        for number in [number for number, flow in self.flows.items() if flow.left]:
            self.engine.cancel(number)
            del self.flows[number]

    def _give_up(self, ticket: RequestHandle, why: APIError) -> None:
        for flow in ticket.flows:
            flow.left = True
        self._publish([(ticket, why)])

    def _admit(self) -> None:
        """Rows for as many as there is room for, each kind in its order."""
        stuck = set()  # kinds whose next one must wait
        for flow in list(self.waiting):
            if flow.draws in stuck or flow.left:
                continue
            drawing, writing = (sum(f.rows for f in self.flows.values() if f.draws is kind) for kind in (True, False))
            room = self.limits.rows - drawing - writing
            if flow.draws:
                room = min(room, self.limits.rows - self.limits.text_rows - drawing)
            elif True in stuck:
                room = min(room, self.limits.text_rows - writing)
            if flow.rows > room:
                stuck.add(flow.draws)
                continue
            self.waiting.remove(flow)
            self._submit(flow)

    def _submit(self, flow: SubRequest) -> None:
        try:
            flow.number = self.engine.submit(flow.request)
            flow.ticket.prompt = max(flow.ticket.prompt, len(self.engine.sequences[-1].phase.chunk))
            self.flows[flow.number] = flow
        except ValueError as error:
            self._give_up(flow.ticket, APIError(400, str(error)))
        except Exception:
            log.exception("a request could not be begun")
            self._give_up(flow.ticket, APIError(500, "this request could not be begun, by a fault of the server"))

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed; what was under way is given up, and it begins anew")
            self.metrics.failures.inc()
            self.engine = Engine(self.engine.opened)
            failed, self.flows = {flow.ticket for flow in self.flows.values()}, {}
            for ticket in failed:
                self._give_up(ticket, APIError(500, "the engine failed while it answered this; it can be asked again"))
            return
        found = []
        for event in events:
            flow = self.flows[event.request]
            found.append((flow.ticket, (flow.choice + event.sample_index, event)))
        for number in self.flows.keys() - {row.request_number for row in self.engine.sequences}:
            del self.flows[number]
        self.metrics.steps.inc()
        self.metrics.tokens.inc(sum(isinstance(event, TokenEvent) for event in events))
        self.metrics.images.inc(sum(isinstance(event, ImageEvent) for event in events))
        self._publish(found)  # last: who has an answer finds it counted

    def _publish(self, found: list[tuple[RequestHandle, tuple[int, Event] | APIError]]) -> None:
        """Hand these over to the loops that wait for them; one that has ended waits no more."""
        for loop in {ticket.loop for ticket, _ in found}:
            try:
                loop.call_soon_threadsafe(self._put, [(ticket, what) for ticket, what in found if ticket.loop is loop])
            except RuntimeError:
                log.info("an event loop has ended before its answers")

    def _put(self, found: list[tuple[RequestHandle, tuple[int, Event] | APIError]]) -> None:
        """On the loop."""
        for ticket, what in found:
            if ticket.quiet and not isinstance(what, APIError):
                ticket.quiet = False
                self.metrics.first.observe(time.monotonic() - ticket.begun)
            shown = isinstance(what, tuple) and isinstance(what[1], PreviewEvent)
            if not (shown and ticket.queue.qsize() > BACKLOG):
                ticket.queue.put_nowait(what)

    def _count(self) -> None:
        for name, kind in (("text", False), ("image", True)):
            self.metrics.rows.labels(name).set(sum(f.rows for f in self.flows.values() if f.draws is kind))
        self.metrics.waiting.set(len(self.waiting))
