"""What every request passes before anything is done for it, and what every answer passes on its way out."""

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Set
from contextlib import suppress
from hashlib import sha256
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics

LOCAL = {"localhost", "127.0.0.1", "::1"}
BODIES = 8  # largest bodies that are held at once, all requests together
DRAINED = 4  # largest bodies that are read and thrown away, so that a client sees why it is refused
GRACE = 1.0  # seconds in which a client that is turned away may end its sending
WORDS = 2**20  # largest body where no pictures are sent
PICTURES = {"/v1/chat/completions", "/v1/images/edits"}  # where they are
PATHS = {"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/images/generations",
         "/v1/images/edits", "/"}  # fmt: skip
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # of the page: a newer server's scripts are not mixed with older ones
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'",
}  # fmt: skip


class LimitsMiddleware:
    """The key, other sites' pages, how many are inside, how much they bring, how long they take.

    With a key every path asks for it but the `open` ones (/health, and the page, which asks its user for it): as Bearer,
    which OpenAI's clients send, or as the password of Basic, for which a browser asks its user. Without one, only names of
    this machine are answered to, so that no page that a browser shows can reach the server under a name of its own (DNS
    rebinding); none may send requests from elsewhere in any case.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, api_key: str | None = None, open: Set[str] = frozenset()
    ):
        self.app, self.limits, self.metrics, self.open = app, limits, metrics, open
        self.key = None if api_key is None else sha256(api_key.encode()).digest()
        self.in_flight = self.held_bytes = 0  # requests with a body that were let in, and its bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        visit = RequestContext(self, scope, receive, send)
        works = scope["method"] not in ("GET", "HEAD")
        refused = self._refusal(scope)
        if refused is None and works and self.in_flight >= self.limits.rows + self.limits.waiting:
            refused = APIError(
                429, f"{self.in_flight} requests are under way or wait: come back a little later", code="busy"
            )
        counted = works and refused is None  # who is turned away takes nobody's place
        self.in_flight += counted
        try:
            if refused is not None:
                await visit.turn_away(refused)
            else:
                await self.app(scope, visit.receive, visit.send)
        except ClientIsStuck:
            pass  # the server closes the connection
        finally:
            self.in_flight -= counted
            self.held_bytes -= visit.size
            visit.count()

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and _site(origin) != host:
            return APIError(403, "pages of other sites may not use this server")
        if self.key is None:
            if _name(host) not in LOCAL:
                return APIError(403, "without an API key this server answers to localhost and 127.0.0.1 alone")
        elif scope["path"] not in self.open and not self._has_key(headers.get("authorization", "")):
            return APIError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _has_key(self, said: str) -> bool:
        """Compared as hashes, in a time that depends on neither."""
        scheme, _, given = said.encode("latin-1").partition(b" ")  # the bytes that were sent
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        return hmac.compare_digest(sha256(given).digest(), self.key)


class ClientIsStuck(Exception):
    """It does not take what it is sent."""


class RequestContext:
    """One request: what is read and sent for it, within limits."""

    def __init__(self, door: LimitsMiddleware, scope: Scope, receive: Receive, send: Send):
        self.middleware, self.scope, self._receive, self._send = door, scope, receive, send
        self.begun, self.size, self.whole, self.status = time.monotonic(), 0, False, 500
        most = door.limits.body_bytes
        self.most = most if scope["path"] in PICTURES else min(most, WORDS)

    async def receive(self) -> Message:
        """The next part of the body. HTTPException when there is too much, or it takes too long."""
        limits = self.middleware.limits
        if self.whole:
            return await self._receive()
        message = await self._next()
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self.size += size
        self.middleware.held_bytes += size
        length = Headers(scope=self.scope).get("content-length", "0")
        if self.size > self.most or int(length) > self.most:
            await self._drain()
            raise HTTPException(413, f"the body is larger than {self.most:,} bytes")
        if self.middleware.held_bytes > BODIES * limits.body_bytes:
            await self._drain()
            raise HTTPException(429, "too much is being sent to this server: come back a little later")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        try:
            async with asyncio.timeout(self.middleware.limits.client_timeout):
                await self._send(message)
        except TimeoutError:
            raise ClientIsStuck from None

    async def turn_away(self, refused: APIError) -> None:
        with suppress(HTTPException, TimeoutError):  # it gets the first reason
            async with asyncio.timeout(GRACE):
                await self._drain()
        headers = {"WWW-Authenticate": 'Basic realm="transfusion"'} if refused.status == 401 else {}
        if not self.whole:
            headers["Connection"] = "close"
        await refused.response(headers)(self.scope, self._receive, self.send)

    def count(self) -> None:
        path = self.scope["path"] if self.scope["path"] in PATHS else "other"
        self.middleware.metrics.requests.labels(path, self.status).inc()
        self.middleware.metrics.seconds.labels(path).observe(time.monotonic() - self.begun)

    async def _next(self) -> Message:
        left = self.begun + self.middleware.limits.client_timeout - time.monotonic()
        try:
            async with asyncio.timeout(left):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not come within {self.middleware.limits.client_timeout:g} seconds"
            ) from None
        self.whole = not message.get("more_body", False)
        return message

    async def _drain(self) -> None:
        """Read on, keep nothing: a client that still sends would not see an answer."""
        read = 0
        while not self.whole and read < DRAINED * self.middleware.limits.body_bytes:
            read += len((await self._next()).get("body", b""))


def _site(origin: str) -> str | None:
    """The host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
