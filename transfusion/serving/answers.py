"""Engine events as OpenAI's answers: one JSON body, or a stream of server-sent events.

Text is in `content`, images are in `images`; `parts` gives their order. In a stream the order is that of the chunks.
"""

import asyncio
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from transfusion.inference.engine import FinishEvent, ImageEvent, PreviewEvent, PromptEvent, Request, TokenEvent
from transfusion.inference.request import TokenLogprob
from transfusion.serving.logprobs import CompletionLogprobs, TokenNames, format_chat_logprobs
from transfusion.serving.pictures import PictureWriter
from transfusion.serving.scheduler import RequestHandle
from transfusion.serving.served import Echo
from transfusion.serving.stop import StopMatcher

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

Output = str | ImageEvent | PreviewEvent | PromptEvent | FinishEvent
FINISH_REASONS = {"eos": "stop", "image": "stop", "stop": "stop", "length": "length"}


@dataclass
class ChoiceReader:
    """The text of one choice, up to a stop word, and the log probabilities that belong to it."""

    matcher: StopMatcher
    num_chars: int = 0  # of its tokens so far
    num_sent: int = 0  # of these
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # with the place of the token in the text

    def add(self, event: TokenEvent) -> tuple[str, bool]:
        """The text that can be sent, and whether it ends at a stop word."""
        if event.logprob is not None:
            self.logprobs.append((self.num_chars, event.logprob))
        self.num_chars += len(event.text)
        text, is_stopped = self.matcher.feed(event.text)
        self.num_sent += len(text)
        return text, is_stopped

    def flush(self) -> str:
        """The text that is held back. A stop word does not continue behind an image."""
        text, self.matcher = self.matcher.held, StopMatcher(self.matcher.words)
        self.num_sent += len(text)
        return text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Of the tokens whose text is sent, each once."""
        taken = [logprob for begin, logprob in self.logprobs if begin < self.num_sent]
        self.logprobs = self.logprobs[len(taken) :]
        return taken

    def take_rest(self, event: FinishEvent) -> list[TokenLogprob]:
        """Of the last tokens, which add no text, and of eos."""
        return [logprob for _, logprob in self.logprobs] + ([] if event.logprob is None else [event.logprob])


class EventReader:
    """Iterates over (choice, output, log probabilities of its tokens). Text ends before the first stop word.

    has_text: False if nothing but the prompt is wanted: choices end before their first token.
    """

    def __init__(
        self, handle: RequestHandle, stop: str | list[str] | None, count_patches: Callable[[np.ndarray], int],
        has_text: bool = True,
    ):  # fmt: skip
        self.handle, self.count_patches, self.has_text = handle, count_patches, has_text
        stop_words = [stop] if isinstance(stop, str) else stop or []
        self.choices = defaultdict(lambda: ChoiceReader(StopMatcher(stop_words)))
        self.num_positions = 0  # of text and images so far

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output, Sequence[TokenLogprob]]]:
        async for choice, event in self.handle:
            reader = self.choices[choice]
            if isinstance(event, PromptEvent):
                yield choice, event, event.logprobs
            if not self.has_text:
                self.handle.stop(choice)
                yield choice, FinishEvent(event.request_id, event.sample_index, "length"), ()
            elif isinstance(event, TokenEvent):
                self.num_positions += 1
                text, is_stopped = reader.add(event)
                if text:
                    yield choice, text, reader.take_logprobs()
                if is_stopped:
                    self.handle.stop(choice)
                    yield choice, FinishEvent(event.request_id, event.sample_index, "stop"), ()
            elif not isinstance(event, PromptEvent):
                if not isinstance(event, PreviewEvent) and (text := reader.flush()):
                    yield choice, text, reader.take_logprobs()
                if isinstance(event, ImageEvent):
                    self.num_positions += self.count_patches(event.pixels) + 1
                yield choice, event, reader.take_rest(event) if isinstance(event, FinishEvent) else ()

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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    async def add(self, output: Output, logprobs: Sequence[TokenLogprob]) -> None:
        self.logprobs += logprobs
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


class ChatFormat:
    """The JSON of /v1/chat/completions."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, names: TokenNames, has_logprobs: bool):
        self.names, self.has_logprobs = names, has_logprobs

    def open_choice(self, index: int) -> dict:
        return {"delta": {"role": "assistant", "content": ""}}

    async def build_delta(self, index: int, output: Output) -> dict:
        match output:
            case str():
                return {"delta": {"content": output}}
            case ImageEvent():
                return {"delta": {"images": [await make_image_part(output.pixels)]}}
            case PreviewEvent():
                return {"delta": {"preview": {"step": output.step} | await make_image_part(output.x0)}}
        return {"delta": {}}

    def build_choice(self, index: int, choice: ChoiceBuilder) -> dict:
        content = choice.text if choice.text or not choice.images else None
        message = {"role": "assistant", "content": content, "refusal": None}
        return {"message": message | ({"images": choice.images, "parts": choice.parts} if choice.images else {})}

    def format_logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict | None:
        return format_chat_logprobs(self.names, logprobs) if self.has_logprobs else None


class CompletionFormat:
    """The JSON of /v1/completions. echoes: the prompts that the choices repeat, if they do."""

    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, names: TokenNames, has_logprobs: bool, echoes: Sequence[Echo] | None):
        self.names, self.has_logprobs, self.echoes = names, has_logprobs, echoes
        self.logprobs = defaultdict(lambda: CompletionLogprobs(names))  # by choice

    def open_choice(self, index: int) -> dict | None:
        return None if self.echoes is None else {"text": self.echoes[index].text}

    async def build_delta(self, index: int, output: Output) -> dict:
        return {"text": output if isinstance(output, str) else ""}

    def build_choice(self, index: int, choice: ChoiceBuilder) -> dict:
        return {"text": choice.text if self.echoes is None else self.echoes[index].text + choice.text}

    def format_logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict | None:
        if not self.has_logprobs:
            return None
        is_first, has_bos = index not in self.logprobs, self.echoes is not None and self.echoes[index].has_bos
        return self.logprobs[index].format([*([self.names.bos] if is_first and has_bos else []), *logprobs])


@dataclass(frozen=True)
class CompletionWriter:
    """Answers of /v1/chat/completions and /v1/completions."""

    model: str
    seed: int
    format: ChatFormat | CompletionFormat
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    async def collect(self, reader: EventReader, num_choices: int) -> str:
        """The body of the answer. Log probabilities can be many, so a thread writes it."""
        builders = [ChoiceBuilder() for _ in range(num_choices)]
        async for choice, output, logprobs in reader:
            await builders[choice].add(output, logprobs)

        def write() -> str:
            choices = [
                self._build_choice(index, self.format.build_choice(index, builder), builder.logprobs, builder.finish_reason)
                for index, builder in enumerate(builders)
            ]
            return write_json(self._head(self.format.object_name) | {"choices": choices, "usage": reader.usage})

        return await asyncio.to_thread(write)

    async def stream(self, reader: EventReader, include_usage: bool) -> AsyncIterator[str]:
        def chunk(**body) -> str:
            return format_event(self._head(self.format.chunk_name) | ({"usage": None} if include_usage else {}) | body)

        def open_choice(choice: int, body: dict, logprobs: Sequence[TokenLogprob]) -> str:
            return chunk(choices=[self._build_choice(choice, body, logprobs)])

        opened = set()
        async for choice, output, logprobs in reader:
            is_prompt = isinstance(output, PromptEvent)
            if choice not in opened and (body := self.format.open_choice(choice)) is not None:
                yield await asyncio.to_thread(open_choice, choice, body, logprobs if is_prompt else ())
            opened.add(choice)
            if not is_prompt:
                reason = FINISH_REASONS[output.reason] if isinstance(output, FinishEvent) else None
                body = await self.format.build_delta(choice, output)
                yield chunk(choices=[self._build_choice(choice, body, logprobs, reason)])
        if include_usage:
            yield chunk(choices=[], usage=reader.usage)
        yield "data: [DONE]\n\n"

    def _head(self, object_name: str) -> dict:
        common = {"created": self.created, "model": self.model, "seed": self.seed}
        return {"id": f"{self.format.id_prefix}-{self.id}", "object": object_name, **common}

    def _build_choice(
        self, index: int, body: dict, logprobs: Sequence[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        return {
            "index": index, **body, "logprobs": self.format.format_logprobs(index, logprobs), "finish_reason": finish_reason,
        }  # fmt: skip


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
        image_tokens = sum(self.count_patches(part) for part in self.request.parts if isinstance(part, np.ndarray))
        prompt_tokens = handle.prompt_tokens
        return {
            "input_tokens": prompt_tokens, "output_tokens": output_tokens, "total_tokens": prompt_tokens + output_tokens,
            "input_tokens_details": {"image_tokens": image_tokens, "text_tokens": prompt_tokens - image_tokens},
        }  # fmt: skip


async def make_image_part(pixels: np.ndarray) -> dict:
    return {"type": "image_url", "image_url": {"url": await PictureWriter().to_data_url(pixels)}}


def write_json(body: dict) -> str:
    """Piece by piece: `json.dumps` holds the interpreter's lock until all is written."""
    return "".join(JSON.iterencode(body))


def format_event(body: dict) -> str:
    return f"data: {write_json(body)}\n\n"


def format_named_event(name: str, body: dict) -> str:
    return f"event: {name}\n{format_event({'type': name} | body)}"
