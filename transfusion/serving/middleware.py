"""ASGI middleware in front of the API: access, limits of requests and bodies, timeouts, response headers, metrics."""

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Collection, Set
from contextlib import suppress
from hashlib import sha256
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
MAX_HELD_BODIES = 8  # x limits.body_bytes: bytes in memory for all requests together
MAX_DRAINED_BODIES = 4  # x limits.body_bytes: bytes read and discarded, so that the client receives the error
DRAIN_SECONDS = 1.0  # for a rejected client to finish its body
MAX_TEXT_BODY_BYTES = 2**20  # of a request to a path that takes no pictures
PICTURE_PATHS = {"/v1/chat/completions", "/v1/images/edits"}
METRIC_PATHS = {"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/images/generations",
                "/v1/images/edits", "/"}  # fmt: skip
RESPONSE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # of the page: scripts of two server versions are not mixed
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'",
}  # fmt: skip


class LimitsMiddleware:
    """Checks the API key, the origin, the number of requests, the size of bodies and the time of clients.

    With a key, every path requires it except `public_paths` (/health and the page). Clients send it as Bearer (OpenAI's
    clients) or as the password of Basic (browsers). Without a key, the Host header must name this machine: so a web page
    cannot reach the server under its own name (DNS rebinding). Requests from pages of other origins fail, except those
    of `allow_origins`.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, api_key: str | None = None,
        public_paths: Set[str] = frozenset(), allow_origins: Collection[str] = (),
    ):  # fmt: skip
        self.app, self.limits, self.metrics, self.public_paths = app, limits, metrics, public_paths
        self.allow_origins = allow_origins
        self.key_hash = None if api_key is None else sha256(api_key.encode()).digest()
        self.in_flight = self.held_bytes = 0  # accepted requests with a body, and the bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        context = RequestContext(self, scope, receive, send)
        needs_work = scope["method"] not in ("GET", "HEAD")
        error = self._check_access(scope)
        if error is None and needs_work and self.in_flight >= self.limits.max_sequences + self.limits.waiting:
            error = APIError(429, f"{self.in_flight} requests are running or waiting: try again later", code="busy")
        is_counted = needs_work and error is None  # rejected requests do not use up the limit
        self.in_flight += is_counted
        try:
            if error is not None:
                await context.reject(error)
            else:
                await self.app(scope, context.receive, context.send)
        except ClientStalled:
            pass  # the server closes the connection
        finally:
            self.in_flight -= is_counted
            self.held_bytes -= context.received_bytes
            context.record_metrics()

    def _check_access(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin not in self.allow_origins and _parse_netloc(origin) != host:
            return APIError(403, "pages of other sites may not use this server; --allow-origin allows a site's pages")
        if self.key_hash is None:
            if _parse_hostname(host) not in LOCAL_HOSTS:
                return APIError(403, "without an API key the server accepts only the hosts localhost and 127.0.0.1")
        elif scope["path"] not in self.public_paths and not self._has_key(headers.get("authorization", "")):
            return APIError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _has_key(self, authorization: str) -> bool:
        """Compares hashes in constant time."""
        scheme, _, key = authorization.encode("latin-1").partition(b" ")  # the bytes that were sent
        if scheme.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        return hmac.compare_digest(sha256(key).digest(), self.key_hash)


class ClientStalled(Exception):
    """The client did not receive a part of the answer in time."""


class RequestContext:
    """One request: receives its body and sends its answer within the limits."""

    def __init__(self, middleware: LimitsMiddleware, scope: Scope, receive: Receive, send: Send):
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.started, self.received_bytes, self.is_complete, self.status = time.monotonic(), 0, False, 500
        max_bytes = middleware.limits.body_bytes
        self.max_bytes = max_bytes if scope["path"] in PICTURE_PATHS else min(max_bytes, MAX_TEXT_BODY_BYTES)

    async def receive(self) -> Message:
        """The next part of the body. HTTPException when the body is too large or too slow."""
        if self.is_complete:
            return await self._receive()
        message = await self._next_part()
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self.received_bytes += size
        self.middleware.held_bytes += size
        content_length = Headers(scope=self.scope).get("content-length", "0")
        if self.received_bytes > self.max_bytes or int(content_length) > self.max_bytes:
            await self._drain()
            raise HTTPException(413, f"the body is larger than {self.max_bytes:,} bytes")
        if self.middleware.held_bytes > MAX_HELD_BODIES * self.middleware.limits.body_bytes:
            await self._drain()
            raise HTTPException(429, "the bodies of all running requests are too large together: try again later")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in RESPONSE_HEADERS.items():
                headers.setdefault(name, value)
        try:
            async with asyncio.timeout(self.middleware.limits.client_timeout):
                await self._send(message)
        except TimeoutError:
            raise ClientStalled from None

    async def reject(self, error: APIError) -> None:
        with suppress(HTTPException, TimeoutError):  # the client receives `error`
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._drain()
        headers = {"WWW-Authenticate": 'Basic realm="transfusion"'} if error.status == 401 else {}
        if not self.is_complete:
            headers["Connection"] = "close"
        await error.response(headers)(self.scope, self._receive, self.send)

    def record_metrics(self) -> None:
        path = self.scope["path"] if self.scope["path"] in METRIC_PATHS else "other"
        self.middleware.metrics.requests.labels(path, self.status).inc()
        self.middleware.metrics.request_seconds.labels(path).observe(time.monotonic() - self.started)

    async def _next_part(self) -> Message:
        timeout = self.middleware.limits.client_timeout
        try:
            async with asyncio.timeout(self.started + timeout - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {timeout:g} seconds") from None
        self.is_complete = not message.get("more_body", False)
        return message

    async def _drain(self) -> None:
        """Read the rest of the body and discard it: a client that is still sending would not read the answer."""
        read = 0
        while not self.is_complete and read < MAX_DRAINED_BODIES * self.middleware.limits.body_bytes:
            read += len((await self._next_part()).get("body", b""))


def parse_origin(text: str) -> str:
    """The origin as browsers send it: scheme://host, and :port unless it is the scheme's default. ValueError for anything
    else. Not "*": every page that somebody opens could use the server. Not "null": any page can have that origin."""
    try:
        url = urlsplit(text.lower())
        port = "" if url.port in (None, {"http": 80, "https": 443}.get(url.scheme)) else f":{url.port}"
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    except ValueError:
        host = None
    has_rest = host and (url.path.strip("/") or url.query or url.fragment or "@" in url.netloc)
    if not host or not url.scheme or has_rest or not text.isascii():
        raise ValueError(f"{text[:100]!r} is not the origin of one site: write scheme://host or scheme://host:port")
    return f"{url.scheme}://{host}{port}"


def _parse_netloc(origin: str) -> str | None:
    """Host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _parse_hostname(host: str) -> str:
    """The host of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
