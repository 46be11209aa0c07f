"""The HTTP application: an engine behind OpenAI's API, and the page."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from transfusion.inference import engine as engines
from transfusion.serving.answers import CompletionWriter, EventReader, ImageWriter
from transfusion.serving.errors import APIError, from_validation_errors
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics
from transfusion.serving.middleware import LimitsMiddleware
from transfusion.serving.pictures import PictureWriter
from transfusion.serving.scheduler import Scheduler
from transfusion.serving.schemas import ChatRequest, CompletionRequest, ImageRequest
from transfusion.serving.served import ServedRun, format_size

WEB = Path(__file__).parent / "web"
PUBLIC_PATHS = frozenset({"/health", "/", *(f"/{path.name}" for path in WEB.iterdir())})  # these need no key
MAX_FORM_FIELDS, MAX_FIELD_BYTES = 32, 64 * 2**10  # of a form; MAX_FIELD_BYTES does not apply to files


def build_app(
    engine: engines.Engine, limits: Limits = Limits(), api_key: str | None = None,  # noqa: B008
    allow_origins: Collection[str] = (),
) -> FastAPI:  # fmt: skip
    """The application. It starts the engine's thread at startup and ends it at shutdown. allow_origins: the sites whose
    pages may use it from a browser, each as the browser sends it (`parse_origin`)."""
    metrics = Metrics()
    service = Service(ServedRun(engine, limits), Scheduler(engine, limits, metrics))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.close)

    # FastAPI's documentation pages are disabled: they load scripts from other servers.
    app = FastAPI(title="transfusion", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        LimitsMiddleware, limits=limits, metrics=metrics, api_key=api_key, public_paths=PUBLIC_PATHS,
        allow_origins=allow_origins,
    )  # fmt: skip
    if allow_origins:  # outermost: its headers are also on errors, and a browser's preflight has no key
        app.add_middleware(
            CORSMiddleware, allow_origins=allow_origins, allow_methods=("GET", "POST"), allow_headers=("*",),
            expose_headers=("Retry-After",), allow_private_network=True,
        )  # fmt: skip
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/generations", service.generate_images, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/edits", service.edit_images, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", service.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.get_model, methods=["GET"])
    app.add_api_route("/health", service.get_health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.get_metrics, methods=["GET"], response_model=None)
    app.mount("/", StaticFiles(directory=WEB, html=True))
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(StarletteException, _on_http_error)
    app.add_exception_handler(Exception, _on_exception)
    app.state.service = service
    return app


class Service:
    """The handlers of all paths."""

    def __init__(self, served: ServedRun, scheduler: Scheduler):
        self.served, self.scheduler, self.metrics = served, scheduler, scheduler.metrics

    async def chat(self, body: ChatRequest, http_request: Request) -> Response:
        requests = await self._cancel_on_disconnect(http_request, self.served.parse_chat(body))
        writer = CompletionWriter(self.served.name, requests[0].seed, "chat.completion", "chatcmpl")
        return await self._respond_with_text(http_request, requests, writer, body)

    async def complete(self, body: CompletionRequest, http_request: Request) -> Response:
        requests = self.served.parse_completion(body)
        writer = CompletionWriter(self.served.name, requests[0].seed, "text_completion", "cmpl")
        return await self._respond_with_text(http_request, requests, writer, body)

    async def generate_images(self, body: ImageRequest, http_request: Request) -> Response:
        return await self._respond_with_images(http_request, self.served.parse_image(body), body, "image_generation")

    async def edit_images(self, http_request: Request) -> Response:
        """OpenAI's form: image (one or more files), prompt, and the fields of /v1/images/generations."""
        if not http_request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise APIError(400, "the body must be multipart/form-data with the fields image and prompt")
        self.served.check_edits()
        try:
            fields, files = await self._read_form(http_request)
        except ClientDisconnect:
            return self._on_disconnect()
        try:
            body = ImageRequest.model_validate_strings(fields, strict=False)  # all values of a form are strings
        except ValidationError as error:
            raise from_validation_errors(error.errors()) from None
        request = await self._cancel_on_disconnect(http_request, self.served.parse_edit(body, files))
        return await self._respond_with_images(http_request, request, body, "image_edit")

    async def _read_form(self, http_request: Request) -> tuple[dict[str, Any], list[bytes]]:
        """Its fields, and its pictures."""
        fields, files = {}, []
        limits = {"max_files": self.served.limits.pictures, "max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_FIELD_BYTES}
        async with http_request.form(**limits) as form:
            for name, value in form.multi_items():
                is_file, param = isinstance(value, UploadFile), name[:60]
                if name in ("image", "image[]"):
                    if not is_file:
                        raise APIError(400, "image must be a file", "image")
                    files.append(await value.read())
                elif name in fields:
                    raise APIError(400, f"the form field {param} comes twice: send it once", param)
                elif is_file and name not in ImageRequest.UNSUPPORTED:
                    raise APIError(400, f"the form field {param} must be text, not a file", param)
                else:
                    fields[name] = value
        return fields, files

    def _on_disconnect(self) -> Response:
        self.metrics.disconnects.inc()
        return Response(status_code=499)  # for logs and metrics, as in nginx; the client is gone

    async def list_models(self) -> dict:
        return {"object": "list", "data": [self.served.describe()]}

    async def get_model(self, name: str) -> dict:
        self.served.check_model(name)
        return self.served.describe()

    async def get_health(self) -> Response:
        if not self.scheduler.is_alive:
            raise APIError(503, "the engine has stopped")
        return JSONResponse({"status": "ok"})

    async def get_metrics(self) -> Response:
        return Response(self.metrics.to_text(), media_type="text/plain; version=0.0.4")

    async def _respond_with_text(
        self, http_request: Request, requests: Sequence[engines.Request], writer: CompletionWriter,
        body: ChatRequest | CompletionRequest,
    ) -> Response:  # fmt: skip
        num_choices = sum(request.num_images or 1 for request in requests)
        deadline = time.monotonic() + self.served.limits.deadline

        async def collect() -> Response:
            with self.scheduler.submit(requests, deadline) as handle:
                reader = EventReader(handle, body.stop, self.served.count_patches)
                return JSONResponse(await writer.collect(reader, num_choices))

        async def stream() -> AsyncIterator[str]:
            with self.scheduler.submit(requests, deadline) as handle:
                reader = EventReader(handle, body.stop, self.served.count_patches)
                include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                async for event in writer.stream(reader, include_usage):
                    yield event

        return await self._cancel_on_disconnect(http_request, start_stream(stream()) if body.stream else collect())

    async def _respond_with_images(
        self, http_request: Request, request: engines.Request, body: ImageRequest, event_prefix: str
    ) -> Response:
        deadline = time.monotonic() + self.served.limits.deadline
        pictures = PictureWriter(body.output_format, body.output_compression, body.response_format == "url")
        writer = ImageWriter(request, format_size(request.size), event_prefix, pictures, self.served.count_patches)
        max_previews = None if body.preview_every else body.partial_images or 0

        async def collect() -> Response:
            with self.scheduler.submit([request], deadline) as handle:
                return JSONResponse(await writer.collect(handle))

        async def stream() -> AsyncIterator[str]:
            with self.scheduler.submit([request], deadline) as handle:
                async for event in writer.stream(handle, max_previews):
                    yield event

        return await self._cancel_on_disconnect(http_request, start_stream(stream()) if body.stream else collect())

    async def _cancel_on_disconnect(self, http_request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`. If the client disconnects first, `work` is cancelled."""
        task = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(wait_for_disconnect(http_request))
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else self._on_disconnect()
        finally:
            task.cancel()
            disconnect.cancel()
            await asyncio.gather(task, disconnect, return_exceptions=True)


async def wait_for_disconnect(http_request: Request) -> None:
    """Returns when the client has disconnected. The request's body must have been read."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def start_stream(events: AsyncGenerator[str]) -> "EventStreamResponse":
    """A response that starts after the first event: an error before it still sets the HTTP status."""
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise

    async def all_events() -> AsyncIterator[str]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventStreamResponse(all_events(), media_type="text/event-stream", headers=headers)


class EventStreamResponse(StreamingResponse):
    """Always closes its iterator, so that the sequences of a client that disconnects end at once."""

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def _on_api_error(_: Request, error: APIError) -> Response:
    return error.response()


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    return from_validation_errors(error.errors()).response()


async def _on_exception(*_) -> Response:
    return APIError(500, "the request failed because of an error in the server").response()


async def _on_http_error(http_request: Request, error: StarletteException) -> Response:
    """Errors of the framework: an unknown path, a wrong method or body."""
    messages = {404: "this path does not exist", 405: f"this path does not support the method {http_request.method}"}
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message[:1].lower() + message[1:]).response(error.headers)
