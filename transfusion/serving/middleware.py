"""ASGI middleware in front of the API: access, limits of requests and bodies, response headers, metrics, access log."""

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections.abc import Collection, Set
from contextlib import suppress
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfusion.serving.errors import APIError
from transfusion.serving.hosts import is_local, parse_hostname, parse_netloc
from transfusion.serving.limits import Limits
from transfusion.serving.memory import release_memory
from transfusion.serving.metrics import Metrics

MAX_HELD_BODIES = 8  # x limits.body_bytes: bytes in memory for all requests together
MAX_DRAINED_BODIES = 4  # x limits.body_bytes: bytes read and discarded, so that the client receives the error
LARGE_BODY_BYTES = 2**18  # the memory of such a body is returned at once
DRAIN_SECONDS = 1.0  # for a rejected client to finish its body
MAX_DRAINING = 64  # rejected clients at once; the body of one more is not read
MAX_TEXT_BODY_BYTES = 2**20  # of a request to a path that takes no pictures
PICTURE_PATHS = {"/v1/chat/completions", "/v1/images/edits"}
METRIC_PATHS = {"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/images/generations",
                "/v1/images/edits", "/"}  # fmt: skip
RESPONSE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # of the page: scripts of two server versions are not mixed
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'",
}  # fmt: skip

access_logger = logging.getLogger("transfusion.access")


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
        self.draining = 0  # rejected requests whose body is still read

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
        finally:
            self.in_flight -= is_counted
            self.held_bytes -= context.received_bytes
            context.record()
            if context.received_bytes > LARGE_BODY_BYTES:
                asyncio.get_running_loop().run_in_executor(None, release_memory)

    def _check_access(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin not in self.allow_origins and parse_netloc(origin) != host:
            return APIError(403, "pages of other sites may not use this server; --allow-origin allows a site's pages")
        if self.key_hash is None:
            if not is_local(parse_hostname(host)):
                return APIError(403, "without an API key the server accepts only the hosts localhost, 127.0.0.1 and [::1]")
        elif scope["path"] not in self.public_paths and not self._has_key(headers.get("authorization", "")):
            return APIError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may have read it in another way
            return APIError(400, "a request has Content-Length or Transfer-Encoding, not both")
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


class RequestContext:
    """One request: receives its body and sends its answer within the limits."""

    def __init__(self, middleware: LimitsMiddleware, scope: Scope, receive: Receive, send: Send):
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.started, self.is_complete, self.status = time.monotonic(), False, 500
        scope["arrival"] = self.started  # for the deadline
        self.received_bytes = self.sent_bytes = 0
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
        self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    async def reject(self, error: APIError) -> None:
        if self.middleware.draining < MAX_DRAINING:
            self.middleware.draining += 1
            try:
                with suppress(HTTPException, TimeoutError):  # the client receives `error`
                    async with asyncio.timeout(DRAIN_SECONDS):
                        await self._drain()
            finally:
                self.middleware.draining -= 1
        headers = {"WWW-Authenticate": 'Basic realm="transfusion"'} if error.status == 401 else {}
        if not self.is_complete:
            headers["Connection"] = "close"
        await error.response(headers)(self.scope, self._receive, self.send)

    def record(self) -> None:
        """In the metrics and the access log. The path is without its query, which may contain a secret."""
        seconds, path = time.monotonic() - self.started, self.scope["path"]
        metric_path = path if path in METRIC_PATHS else "other"
        self.middleware.metrics.requests.labels(metric_path, self.status).inc()
        self.middleware.metrics.request_seconds.labels(metric_path).observe(seconds)
        if access_logger.isEnabledFor(logging.INFO):
            request = (self.scope.get("client") or "-")[0], self.scope["method"], self.scope["raw_path"].decode("latin-1")
            answer = self.status, f"{seconds:.3f} s", f"{self.sent_bytes} bytes"
            access_logger.info("%s %s %s %d %s %s", *map(_escape, request), *answer)

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


def _escape(text: str) -> str:
    """One word of a log: without spaces and control characters, at most 300 characters."""
    return text[:300].encode("unicode_escape").decode().replace(" ", "\\x20")
