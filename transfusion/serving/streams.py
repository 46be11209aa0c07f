"""Streams of server-sent events: they start with the first event, show that they are alive, and end with their client."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from transfusion.serving.answers import format_named_event
from transfusion.serving.errors import APIError

SILENT_SECONDS = 15.0  # proxies close a connection on which nothing arrives, many after 60 seconds
WAITING = ": waiting\n\n"  # a comment: clients ignore it


class EventStreamResponse(StreamingResponse):
    """Always closes its iterator, so that the sequences of a client that disconnects end at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]):
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def start_stream(events: AsyncGenerator[str]) -> EventStreamResponse:
    """A response that starts with the first event, or after SILENT_SECONDS. An error before that sets the HTTP status; a
    later error is an event."""
    all_events = _with_comments(events)
    try:
        first = await anext(all_events)
    except BaseException:
        await all_events.aclose()
        raise

    async def started() -> AsyncGenerator[str]:
        try:
            yield first
            async for event in all_events:
                yield event
        except APIError as error:
            yield format_named_event("error", error.body())
        finally:
            await all_events.aclose()

    return EventStreamResponse(started())


async def _with_comments(events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """The events, and a comment after each SILENT_SECONDS without one."""
    following = None
    try:
        while True:
            following = asyncio.ensure_future(anext(events, None))
            while not (await asyncio.wait({following}, timeout=SILENT_SECONDS))[0]:
                yield WAITING
            if (event := following.result()) is None:
                return
            yield event
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await events.aclose()
