"""Engine events as OpenAI's answers: one JSON body, or a stream of server-sent events.

Text is in `content`, images are in `images`; `parts` gives their order. In a stream the order is that of the chunks.
"""

import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from transfusion.inference.engine import FinishEvent, ImageEvent, PreviewEvent, Request, TokenEvent
from transfusion.serving.pictures import PictureWriter
from transfusion.serving.scheduler import RequestHandle
from transfusion.serving.stop import StopMatcher

Output = str | ImageEvent | PreviewEvent | FinishEvent
FINISH_REASONS = {"eos": "stop", "image": "stop", "stop": "stop", "length": "length"}


class EventReader:
    """Iterates over (choice, output). Text ends before the first stop word."""

    def __init__(self, handle: RequestHandle, stop: str | list[str] | None, count_patches: Callable[[np.ndarray], int]):
        self.handle, self.count_patches = handle, count_patches
        stop_words = [stop] if isinstance(stop, str) else stop or []
        self.matchers = defaultdict(lambda: StopMatcher(stop_words))  # by choice
        self.num_positions = 0  # of text and images so far

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        async for choice, event in self.handle:
            if isinstance(event, TokenEvent):
                self.num_positions += 1
                text, is_stopped = self.matchers[choice].feed(event.text)
                if text:
                    yield choice, text
                if is_stopped:
                    self.handle.stop(choice)
                    yield choice, FinishEvent(event.request_id, event.sample_index, "stop")
                continue
            if isinstance(event, ImageEvent):
                self.num_positions += self.count_patches(event.pixels) + 1
            if not isinstance(event, PreviewEvent) and choice in self.matchers:
                if text := self.matchers.pop(choice).held:  # a stop word does not continue behind an image
                    yield choice, text
            yield choice, event

    @property
    def usage(self) -> dict:
        """Numbers of positions; an image counts as its patches."""
        prompt, completion = self.handle.prompt_tokens, self.num_positions
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass
class ChoiceBuilder:
    """Collects the outputs of one choice."""

    text: str = ""
    images: list[dict] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)
    finish_reason: str | None = None

    async def add(self, output: Output) -> None:
        if isinstance(output, str):
            self.text += output
            if not self.parts or self.parts[-1]["type"] != "text":
                self.parts.append({"type": "text", "text": ""})
            self.parts[-1]["text"] += output
        elif isinstance(output, ImageEvent):
            self.parts.append({"type": "image", "image": len(self.images)})
            self.images.append(await make_image_part(output.pixels))
        elif isinstance(output, FinishEvent):
            self.finish_reason = FINISH_REASONS[output.reason]


@dataclass(frozen=True)
class CompletionWriter:
    """Answers of /v1/chat/completions and /v1/completions."""

    model: str
    seed: int
    object_name: str  # "chat.completion" or "text_completion"
    id_prefix: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.object_name == "chat.completion"

    async def collect(self, reader: EventReader, num_choices: int) -> dict:
        builders = [ChoiceBuilder() for _ in range(num_choices)]
        async for choice, output in reader:
            await builders[choice].add(output)
        choices = [self._build_choice(index, builder) for index, builder in enumerate(builders)]
        return self._head(self.object_name) | {"choices": choices, "usage": reader.usage}

    async def stream(self, reader: EventReader, include_usage: bool) -> AsyncIterator[str]:
        object_name = "chat.completion.chunk" if self.is_chat else self.object_name

        def chunk(**body) -> str:
            return format_event(self._head(object_name) | ({"usage": None} if include_usage else {}) | body)

        opened = set()
        async for choice, output in reader:
            is_first = choice not in opened
            opened.add(choice)
            if self.is_chat and is_first:
                yield chunk(choices=[make_choice(choice, delta={"role": "assistant", "content": ""})])
            if isinstance(output, FinishEvent):
                content = {"delta": {}} if self.is_chat else {"text": ""}
                yield chunk(choices=[make_choice(choice, FINISH_REASONS[output.reason], **content)])
            elif self.is_chat:
                yield chunk(choices=[make_choice(choice, delta=await self._build_delta(output))])
            elif isinstance(output, str):
                yield chunk(choices=[make_choice(choice, text=output)])
        if include_usage:
            yield chunk(choices=[], usage=reader.usage)
        yield "data: [DONE]\n\n"

    def _head(self, object_name: str) -> dict:
        common = {"created": self.created, "model": self.model, "seed": self.seed}
        return {"id": f"{self.id_prefix}-{self.id}", "object": object_name, **common}

    def _build_choice(self, index: int, choice: ChoiceBuilder) -> dict:
        if not self.is_chat:
            return make_choice(index, choice.finish_reason, text=choice.text)
        content = choice.text if choice.text or not choice.images else None
        message = {"role": "assistant", "content": content, "refusal": None}
        if choice.images:
            message |= {"images": choice.images, "parts": choice.parts}
        return make_choice(index, choice.finish_reason, message=message)

    async def _build_delta(self, output: str | ImageEvent | PreviewEvent) -> dict:
        if isinstance(output, str):
            return {"content": output}
        if isinstance(output, ImageEvent):
            return {"images": [await make_image_part(output.pixels)]}
        return {"preview": {"step": output.step} | await make_image_part(output.x0)}


@dataclass(frozen=True)
class ImageWriter:
    """Answers of /v1/images/generations and /v1/images/edits. event_prefix: image_generation or image_edit."""

    request: Request
    size: str
    event_prefix: str
    pictures: PictureWriter
    count_patches: Callable[[np.ndarray], int]

    async def collect(self, handle: RequestHandle) -> dict:
        data: list[dict] = [{} for _ in range(self.request.num_images)]
        num_patches = 0
        async for choice, event in handle:
            if isinstance(event, ImageEvent):
                data[choice] = await self.pictures.encode(event.pixels)
                num_patches += self.count_patches(event.pixels)
        usage = self._usage(handle, num_patches)
        return {"created": int(time.time()), "data": data, **self._settings, "usage": usage}

    async def stream(self, handle: RequestHandle, max_previews: int | None) -> AsyncIterator[str]:
        """Previews and finished images. max_previews: of each image. None: all, with the noisy image (x_t) beside x0."""
        num_previews = [0] * self.request.num_images
        async for choice, event in handle:
            body = {"created_at": int(time.time()), "index": choice, **self._settings, "quality": "auto"}
            if isinstance(event, PreviewEvent) and (max_previews is None or num_previews[choice] < max_previews):
                body |= {"partial_image_index": num_previews[choice], "step": event.step}
                num_previews[choice] += 1
                body |= await self.pictures.encode(event.x_t, "noisy_") if max_previews is None else {}
                body |= await self.pictures.encode(event.x0)
                yield format_named_event(f"{self.event_prefix}.partial_image", body)
            elif isinstance(event, ImageEvent):
                body |= {"usage": self._usage(handle, self.count_patches(event.pixels))}
                body |= await self.pictures.encode(event.pixels)
                yield format_named_event(f"{self.event_prefix}.completed", body)

    @property
    def _settings(self) -> dict:
        output_format = self.pictures.file_format
        return {"size": self.size, "output_format": output_format, "background": "opaque", "seed": self.request.seed}

    def _usage(self, handle: RequestHandle, output_tokens: int) -> dict:
        image_tokens = sum(self.count_patches(part) for part in self.request.parts if not isinstance(part, str))
        prompt_tokens = handle.prompt_tokens
        return {
            "input_tokens": prompt_tokens, "output_tokens": output_tokens, "total_tokens": prompt_tokens + output_tokens,
            "input_tokens_details": {"image_tokens": image_tokens, "text_tokens": prompt_tokens - image_tokens},
        }  # fmt: skip


def make_choice(index: int, finish_reason: str | None = None, **body) -> dict:
    return {"index": index, **body, "logprobs": None, "finish_reason": finish_reason}


async def make_image_part(pixels: np.ndarray) -> dict:
    return {"type": "image_url", "image_url": {"url": await PictureWriter().to_data_url(pixels)}}


def format_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def format_named_event(name: str, body: dict) -> str:
    return f"event: {name}\n{format_event({'type': name} | body)}"
