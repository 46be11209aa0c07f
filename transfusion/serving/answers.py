"""What an engine says, as OpenAI's answers: whole, or in parts as it comes (server-sent events).

Text stands in `content`, images in `images`; `parts` says in which order they came. In a stream the order is that of the
chunks.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from transfusion.inference.engine import FinishEvent, ImageEvent, PreviewEvent, Request, TokenEvent
from transfusion.serving.errors import APIError
from transfusion.serving.pictures import base64_of, data_url
from transfusion.serving.scheduler import RequestHandle

Shown = str | ImageEvent | PreviewEvent | FinishEvent
REASONS = {"eos": "stop", "image": "stop", "stop": "stop", "length": "length"}


class EventReader:
    """A ticket's events as what can be shown: text without stop words and what follows them, images, ends."""

    def __init__(self, ticket: RequestHandle, stop: str | list[str] | None, patches: Callable[[np.ndarray], int]):
        self.ticket, self.patches = ticket, patches
        self.stops = [word for word in ([stop] if isinstance(stop, str) else stop or []) if word]
        self.held: dict[int, str] = {}  # letters of each choice that may yet become a stop word
        self.positions = 0  # written and drawn

    async def __aiter__(self) -> AsyncIterator[tuple[int, Shown]]:
        async for choice, event in self.ticket:
            if isinstance(event, TokenEvent):
                self.positions += 1
                text, stopped = self._until_stop(self.held.pop(choice, "") + event.text, choice)
                if text:
                    yield choice, text
                if stopped:
                    self.ticket.stop(choice)
                    yield choice, FinishEvent(event.request, event.sample_index, "stop")
                continue
            if isinstance(event, ImageEvent):
                self.positions += self.patches(event.pixels) + 1
            if not isinstance(event, PreviewEvent) and choice in self.held:
                yield choice, self.held.pop(choice)
            yield choice, event

    def _until_stop(self, text: str, choice: int) -> tuple[str, bool]:
        """What can be shown of it, and whether it ends there; the rest is held back."""
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            return text[: min(found)], True
        keep = max((n for word in self.stops for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        if keep:
            self.held[choice] = text[-keep:]
        return text[: len(text) - keep], False

    @property
    def usage(self) -> dict:
        """Positions: an image counts as its patches."""
        read = self.ticket.prompt
        return {"prompt_tokens": read, "completion_tokens": self.positions, "total_tokens": read + self.positions}


@dataclass
class ChoiceBuilder:
    """One choice, put together."""

    text: str = ""
    images: list[dict] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)
    reason: str | None = None

    async def add(self, what: Shown) -> None:
        if isinstance(what, str):
            self.text += what
            if not self.parts or self.parts[-1]["type"] != "text":
                self.parts.append({"type": "text", "text": ""})
            self.parts[-1]["text"] += what
        elif isinstance(what, ImageEvent):
            self.parts.append({"type": "image", "image": len(self.images)})
            self.images.append(image_part(await data_url(what.pixels)))
        elif isinstance(what, FinishEvent):
            self.reason = REASONS[what.reason]


@dataclass(frozen=True)
class Writer:
    """What all answers of one kind have in common."""

    model: str
    seed: int
    kind: str  # "chat.completion" or "text_completion"
    prefix: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    async def whole(self, reading: EventReader, choices: int) -> dict:
        said = [ChoiceBuilder() for _ in range(choices)]
        async for choice, what in reading:
            await said[choice].add(what)
        return self._head(self.kind) | {
            "choices": [self._choice(n, one) for n, one in enumerate(said)], "usage": reading.usage,
        }  # fmt: skip

    async def stream(self, reading: EventReader, choices: int, include_usage: bool) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if self.chat else self.kind

        def chunk(**body) -> str:
            return event(self._head(kind) | ({"usage": None} if include_usage else {}) | body)

        try:
            opened = set()
            async for choice, what in reading:
                new = choice not in opened
                opened.add(choice)
                if self.chat and new:
                    yield chunk(choices=[choice_body(choice, delta={"role": "assistant", "content": ""})])
                if isinstance(what, FinishEvent):
                    end = {"delta": {}} if self.chat else {"text": ""}
                    yield chunk(choices=[choice_body(choice, REASONS[what.reason], **end)])
                elif self.chat:
                    yield chunk(choices=[choice_body(choice, delta=await self._delta(what))])
                elif isinstance(what, str):
                    yield chunk(choices=[choice_body(choice, text=what)])
        except APIError as refused:
            if not opened:
                raise
            yield event(refused.body())
            return
        if include_usage:
            yield chunk(choices=[], usage=reading.usage)
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict:
        common = {"created": self.created, "model": self.model, "seed": self.seed}
        return {"id": f"{self.prefix}-{self.id}", "object": kind, **common}

    def _choice(self, number: int, said: ChoiceBuilder) -> dict:
        if not self.chat:
            return choice_body(number, said.reason, text=said.text)
        message = {"role": "assistant", "content": said.text if said.text or not said.images else None, "refusal": None}
        if said.images:
            message |= {"images": said.images, "parts": said.parts}
        return choice_body(number, said.reason, message=message)

    async def _delta(self, what: str | ImageEvent | PreviewEvent) -> dict:
        if isinstance(what, str):
            return {"content": what}
        if isinstance(what, ImageEvent):
            return {"images": [image_part(await data_url(what.pixels))]}
        return {"preview": {"step": what.step} | image_part(await data_url(what.x0))}


@dataclass(frozen=True)
class Images:
    """What all answers to a request for images have in common. kind: image_generation or image_edit."""

    request: Request
    size: str
    kind: str
    patches: Callable[[np.ndarray], int]

    async def whole(self, ticket: RequestHandle) -> dict:
        data: list[dict] = [{} for _ in range(self.request.num_images)]
        drawn = 0
        async for choice, what in ticket:
            if isinstance(what, ImageEvent):
                data[choice] = {"b64_json": await base64_of(what.pixels)}
                drawn += self.patches(what.pixels)
        usage = self._usage(ticket, drawn)
        return {"created": int(time.time()), "data": data, **self._about, "usage": usage}

    async def stream(self, ticket: RequestHandle, most: int | None) -> AsyncIterator[str]:
        """Images on their way and done. most: so many previews of each; None: all, and as noisy as they still are, too."""
        shown = [0] * self.request.num_images
        begun = False
        try:
            async for choice, what in ticket:
                begun = True
                about = {"created_at": int(time.time()), "index": choice, **self._about, "quality": "auto"}
                if isinstance(what, PreviewEvent) and (most is None or shown[choice] < most):
                    about |= {"partial_image_index": shown[choice], "step": what.step}
                    shown[choice] += 1
                    about |= {"noisy_b64_json": await base64_of(what.x_t)} if most is None else {}
                    yield named_event(f"{self.kind}.partial_image", about | {"b64_json": await base64_of(what.x0)})
                elif isinstance(what, ImageEvent):
                    about |= {"usage": self._usage(ticket, self.patches(what.pixels))}
                    yield named_event(f"{self.kind}.completed", about | {"b64_json": await base64_of(what.pixels)})
        except APIError as refused:
            if not begun:
                raise
            yield named_event("error", refused.body())

    @property
    def _about(self) -> dict:
        return {"size": self.size, "output_format": "png", "background": "opaque", "seed": self.request.seed}

    def _usage(self, ticket: RequestHandle, drawn: int) -> dict:
        given = sum(self.patches(part) for part in self.request.parts if not isinstance(part, str))
        return {
            "input_tokens": ticket.prompt, "output_tokens": drawn, "total_tokens": ticket.prompt + drawn,
            "input_tokens_details": {"image_tokens": given, "text_tokens": ticket.prompt - given},
        }  # fmt: skip


def choice_body(choice: int, finish_reason: str | None = None, **body) -> dict:
    return {"index": choice, **body, "logprobs": None, "finish_reason": finish_reason}


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def named_event(name: str, body: dict) -> str:
    return f"event: {name}\n{event({'type': name} | body)}"
