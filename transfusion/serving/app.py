"""The HTTP application: an engine behind OpenAI's API, and the page."""

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from transfusion.inference import engine as engines
from transfusion.serving.answers import ChatFormat, CompletionFormat, CompletionWriter, EventReader, ImageWriter
from transfusion.serving.bodies import read_form, read_json
from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics
from transfusion.serving.middleware import LimitsMiddleware
from transfusion.serving.pictures import PictureWriter
from transfusion.serving.scheduler import Scheduler
from transfusion.serving.schemas import ChatRequest, CompletionRequest, ImageRequest
from transfusion.serving.served import ServedRun, format_size
from transfusion.serving.streams import start_stream

WEB = Path(__file__).parent / "web"
PAGE_PATHS = ["/", *(f"/{path.name}" for path in WEB.iterdir())]
PUBLIC_PATHS = frozenset({"/health", *PAGE_PATHS})  # these need no key


def build_app(
    engine: engines.Engine, limits: Limits = Limits(), api_key: str | None = None,  # noqa: B008
    allow_origins: Collection[str] = (),
) -> Starlette:  # fmt: skip
    """The application. It starts the engine's thread at startup and ends it at shutdown. allow_origins: the sites whose
    pages may use it from a browser, each as the browser sends it (`parse_origin`)."""
    metrics = Metrics()
    service = Service(ServedRun(engine, limits), Scheduler(engine, limits, metrics))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.close)

    middleware = [Middleware(
        LimitsMiddleware, limits=limits, metrics=metrics, api_key=api_key, public_paths=PUBLIC_PATHS,
        allow_origins=allow_origins,
    )]  # fmt: skip
    if allow_origins:  # outermost: its headers are also on errors, and a browser's preflight has no key
        middleware.insert(0, Middleware(
            CORSMiddleware, allow_origins=allow_origins, allow_methods=("GET", "POST"), allow_headers=("*",),
            expose_headers=("Retry-After",), allow_private_network=True,
        ))  # fmt: skip
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/images/generations", service.generate_images, methods=["POST"]),
        Route("/v1/images/edits", service.edit_images, methods=["POST"]),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.get_model),
        Route("/health", service.get_health),
        Route("/metrics", service.get_metrics),
        *(Route(path, service.get_page) for path in PAGE_PATHS),
    ]
    handlers = {
        APIError: _on_api_error, HTTPException: _on_http_error, ClientDisconnect: service.on_disconnect,
        Exception: _on_exception,
    }  # fmt: skip
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # a path has one spelling
    app.state.service = service
    return app


class Service:
    """The handlers of all paths."""

    def __init__(self, served: ServedRun, scheduler: Scheduler):
        self.served, self.scheduler, self.metrics = served, scheduler, scheduler.metrics
        self.page = StaticFiles(directory=WEB)

    async def chat(self, http_request: Request) -> Response:
        body = await read_json(http_request, ChatRequest)
        requests = await self._cancel_on_disconnect(http_request, self.served.parse_chat(body))
        answer_format = ChatFormat(self.served.names, body.logprobs)
        return await self._respond_with_text(http_request, requests, answer_format, body)

    async def complete(self, http_request: Request) -> Response:
        body = await read_json(http_request, CompletionRequest)
        requests, echoes = await self._cancel_on_disconnect(http_request, self.served.parse_completion(body))
        answer_format = CompletionFormat(self.served.names, body.logprobs is not None, echoes if body.echo else None)
        return await self._respond_with_text(http_request, requests, answer_format, body)

    async def generate_images(self, http_request: Request) -> Response:
        body = await read_json(http_request, ImageRequest)
        request = await self._cancel_on_disconnect(http_request, self.served.parse_image(body))
        return await self._respond_with_images(http_request, request, body, "image_generation")

    async def edit_images(self, http_request: Request) -> Response:
        """OpenAI's form: image (one or more files), prompt, and the fields of /v1/images/generations."""
        self.served.check_edits()
        body, files = await read_form(http_request, self.served.limits.pictures)
        if not files:
            raise APIError(400, "image is missing: send one or more picture files", "image")
        request = await self._cancel_on_disconnect(http_request, self.served.parse_image(body, files))
        return await self._respond_with_images(http_request, request, body, "image_edit")

    async def list_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.served.describe()]})

    async def get_model(self, http_request: Request) -> Response:
        self.served.check_model(http_request.path_params["name"])
        return JSONResponse(self.served.describe())

    async def get_health(self, _: Request) -> Response:
        if not self.scheduler.is_alive:
            raise APIError(503, "the engine has stopped")
        return JSONResponse({"status": "ok"})

    async def get_metrics(self, _: Request) -> Response:
        return Response(self.metrics.to_text(), media_type="text/plain; version=0.0.4")

    async def get_page(self, http_request: Request) -> Response:
        return await self.page.get_response(http_request.url.path.strip("/") or "index.html", http_request.scope)

    async def on_disconnect(self, *_) -> Response:
        """The client is gone: this status is for logs and metrics, as in nginx."""
        self.metrics.disconnects.inc()
        return Response(status_code=499)

    async def _respond_with_text(
        self, http_request: Request, requests: Sequence[engines.Request], answer_format: ChatFormat | CompletionFormat,
        body: ChatRequest | CompletionRequest,
    ) -> Response:  # fmt: skip
        writer = CompletionWriter(self.served.name, requests[0].seed, answer_format)
        num_choices = sum(request.num_images or 1 for request in requests)
        deadline = http_request.scope["arrival"] + self.served.limits.deadline

        async def collect() -> Response:
            with self.scheduler.submit(requests, deadline) as handle:
                reader = EventReader(handle, body.stop, self.served.count_patches, has_text=body.max_tokens != 0)
                return Response(await writer.collect(reader, num_choices), media_type="application/json")

        async def stream() -> AsyncIterator[str]:
            with self.scheduler.submit(requests, deadline) as handle:
                reader = EventReader(handle, body.stop, self.served.count_patches, has_text=body.max_tokens != 0)
                include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                async for event in writer.stream(reader, include_usage):
                    yield event

        return await self._cancel_on_disconnect(http_request, start_stream(stream()) if body.stream else collect())

    async def _respond_with_images(
        self, http_request: Request, request: engines.Request, body: ImageRequest, event_prefix: str
    ) -> Response:
        deadline = http_request.scope["arrival"] + self.served.limits.deadline
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
        """The result of `work`. If the client disconnects first, `work` is cancelled: ClientDisconnect."""
        task = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(wait_for_disconnect(http_request))
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientDisconnect
        finally:
            task.cancel()
            disconnect.cancel()
            await asyncio.gather(task, disconnect, return_exceptions=True)


async def wait_for_disconnect(http_request: Request) -> None:
    """Returns when the client has disconnected. The request's body must have been read."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def _on_api_error(_: Request, error: APIError) -> Response:
    return error.response()


async def _on_exception(*_) -> Response:
    return APIError(500, "the request failed because of an error in the server").response()


async def _on_http_error(http_request: Request, error: HTTPException) -> Response:
    """Errors of the framework: an unknown path, a wrong method or body."""
    messages = {404: "this path does not exist", 405: f"this path does not support the method {http_request.method}"}
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message[:1].lower() + message[1:]).response(error.headers)
