"""An engine behind OpenAI's API: its paths, and what stands in front of and behind them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
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
from starlette.requests import ClientDisconnect

from transfusion.inference import engine as engines
from transfusion.serving.answers import EventReader, Images, Writer
from transfusion.serving.errors import APIError, misread
from transfusion.serving.limits import Limits
from transfusion.serving.metrics import Metrics
from transfusion.serving.middleware import LimitsMiddleware
from transfusion.serving.scheduler import Scheduler
from transfusion.serving.schemas import ChatRequest, CompletionRequest, ImageRequest
from transfusion.serving.served import Served, size_name

PAGE = Path(__file__).parent / "web"
OPEN = frozenset({"/health", "/", *(f"/{path.name}" for path in PAGE.iterdir())})  # without a key
FIELDS, FIELD = 32, 64 * 2**10  # of a form: how many, and the bytes of one that is no file


def build_app(engine: engines.Engine, limits: Limits = Limits(), api_key: str | None = None) -> FastAPI:  # noqa: B008
    """The application; the engine's thread runs while it does."""
    metrics = Metrics()
    service = Service(Served(engine, limits), Scheduler(engine, limits, metrics))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.close)

    # Without FastAPI's pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="transfusion", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(LimitsMiddleware, limits=limits, metrics=metrics, api_key=api_key, open=OPEN)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/generations", service.generate, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/edits", service.edit, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.count, methods=["GET"], response_model=None)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.add_exception_handler(APIError, _refused)
    app.add_exception_handler(RequestValidationError, _misread)
    app.add_exception_handler(StarletteException, _http_error)
    app.add_exception_handler(Exception, _failed)
    app.state.service = service
    return app


class Service:
    """What each path does."""

    def __init__(self, served: Served, scheduler: Scheduler):
        self.served, self.scheduler, self.metrics = served, scheduler, scheduler.metrics

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        requests = await self._unless_gone(request, self.served.chat(asked))
        writer = Writer(self.served.name, requests[0].seed, "chat.completion", "chatcmpl")
        return await self._write(request, requests, writer, asked)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        requests = self.served.complete(asked)
        writer = Writer(self.served.name, requests[0].seed, "text_completion", "cmpl")
        return await self._write(request, requests, writer, asked)

    async def generate(self, asked: ImageRequest, request: Request) -> Response:
        return await self._draw(request, self.served.draw(asked), asked, "image_generation")

    async def edit(self, request: Request) -> Response:
        """A form, as OpenAI's: image (one or more files), prompt, and the fields of /v1/images/generations."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise APIError(400, "an edit is sent as multipart/form-data, with image and prompt")
        self.served.check_edits()
        try:
            fields, files = await self._form(request)
        except ClientDisconnect:
            return self._gone()
        try:
            asked = ImageRequest.model_validate_strings(fields, strict=False)  # in a form all is words
        except ValidationError as error:
            raise misread(error.errors()) from None
        drawing = await self._unless_gone(request, self.served.edit(asked, files))
        return await self._draw(request, drawing, asked, "image_edit")

    async def _form(self, request: Request) -> tuple[dict[str, str], list[bytes]]:
        """Its fields, and its pictures."""
        fields, files = {}, []
        async with request.form(max_files=self.served.limits.pictures, max_fields=FIELDS, max_part_size=FIELD) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) != (name in ("image", "image[]")):
                    raise APIError(400, f"{name[:60]}: image is sent as a file, and nothing else is", name[:60])
                if isinstance(value, UploadFile):
                    files.append(await value.read())
                else:
                    fields[name] = value
        return fields, files

    def _gone(self) -> Response:
        self.metrics.gone.inc()
        return Response(status_code=499)  # nobody reads it; proxies' word for this in logs and metrics

    async def models(self) -> dict:
        return {"object": "list", "data": [self.served.describe()]}

    async def model(self, name: str) -> dict:
        if name != self.served.name:
            raise APIError(404, f"there is no such model here; there is {self.served.name}", "model", "model_not_found")
        return self.served.describe()

    async def health(self) -> Response:
        if not self.scheduler.works:
            raise APIError(503, "the engine has stopped")
        return JSONResponse({"status": "ok"})

    async def count(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _write(
        self, request: Request, requests: Sequence[engines.Request], writer: Writer, asked: ChatRequest | CompletionRequest
    ) -> Response:
        choices = sum(one.num_images or 1 for one in requests)
        deadline = time.monotonic() + self.served.limits.deadline

        async def whole() -> Response:
            with self.scheduler.take(requests, deadline) as ticket:
                return JSONResponse(await writer.whole(EventReader(ticket, asked.stop, self.served.patches), choices))

        async def stream() -> AsyncIterator[str]:
            with self.scheduler.take(requests, deadline) as ticket:
                reading = EventReader(ticket, asked.stop, self.served.patches)
                usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                async for line in writer.stream(reading, choices, usage):
                    yield line

        return await self._unless_gone(request, begun(stream()) if asked.stream else whole())

    async def _draw(self, request: Request, drawing: engines.Request, asked: ImageRequest, name: str) -> Response:
        deadline = time.monotonic() + self.served.limits.deadline
        images = Images(drawing, size_name(drawing.size), name, self.served.patches)
        most = None if asked.preview_every else asked.partial_images or 0

        async def whole() -> Response:
            with self.scheduler.take([drawing], deadline) as ticket:
                return JSONResponse(await images.whole(ticket))

        async def stream() -> AsyncIterator[str]:
            with self.scheduler.take([drawing], deadline) as ticket:
                async for line in images.stream(ticket, most):
                    yield line

        return await self._unless_gone(request, begun(stream()) if asked.stream else whole())

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """What the work gives; when the client goes away before that, it is given up."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(departure(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return self._gone()
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def departure(request: Request) -> None:
    """Returns when the client has gone away. For when all of its body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def begun(lines: AsyncGenerator[str]) -> "Stream":
    """A stream, as soon as it has something to send: until then an error still has a status of its own."""
    try:
        first = await anext(lines)
    except BaseException:
        await lines.aclose()
        raise

    async def all_lines() -> AsyncIterator[str]:
        try:
            yield first
            async for line in lines:
                yield line
        finally:
            await lines.aclose()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(all_lines(), media_type="text/event-stream", headers=headers)


class Stream(StreamingResponse):
    """Closes what it reads from, however it ends: a client that goes away gives its row back at once."""

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def _refused(_: Request, error: APIError) -> Response:
    return error.response()


async def _misread(_: Request, error: RequestValidationError) -> Response:
    return misread(error.errors()).response()


async def _failed(*_) -> Response:
    return APIError(500, "this failed, by a fault of the server").response()


async def _http_error(request: Request, error: StarletteException) -> Response:
    """What the framework itself refuses: a path, a method, a body."""
    known = {404: "there is nothing at this path", 405: f"this path does not take {request.method}"}
    message = known.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message[:1].lower() + message[1:]).response(error.headers)
