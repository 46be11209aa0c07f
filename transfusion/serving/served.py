"""The run that is served: its description, and API requests as requests to its engine."""

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from transfusion.chat import PLAIN, ROLES, Turn, lay_out_prompt
from transfusion.config import GenerationConfig, to_json
from transfusion.inference.engine import Engine, Request
from transfusion.seeding import derive_seed
from transfusion.sequence import Text
from transfusion.serving.errors import APIError, show
from transfusion.serving.limits import Limits
from transfusion.serving.logprobs import TokenNames
from transfusion.serving.pictures import PictureReader
from transfusion.serving.schemas import ChatRequest, CompletionRequest, ImageOptions, ImageRequest, TextOptions, TextPart

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Echo:
    """What an answer repeats of its prompt. has_bos: the client's token ids began with bos."""

    text: str
    has_bos: bool = False


class ServedRun:
    """A run and its limits. Uses only attributes of the engine that never change. Messages get the chat layout of the run's
    training data; a run without one gets their contents alone."""

    def __init__(self, engine: Engine, limits: Limits):
        self.name, self.max_positions, defaults = engine.opened.name, engine.max_positions, engine.run.generation
        # The limits apply to the defaults too.
        steps, tokens = min(defaults.steps, limits.steps), min(defaults.max_tokens, limits.tokens)
        self.generation = replace(defaults, steps=steps, max_tokens=tokens)
        self.step, self.sizes, self.limits = engine.opened.step, engine.sizes, limits
        self.chat = engine.opened.chat or PLAIN
        self.can_edit = engine.opened.notes.get("edits") is True  # trained on documents that draw from another image
        self.facts = {
            "recipe": engine.run.recipe, "parameters": engine.opened.parameters,
            "image_channels": engine.opened.codec.image_channels,
            "sources": [*engine.opened.notes.get("document_weights", engine.run.data.sources)],
        }  # fmt: skip
        self.created = int(time.time())
        self.tokenizer, self.names = engine.opened.tokenizer, TokenNames(engine.vocabulary, engine.opened.tokenizer)
        self.pictures = PictureReader(self.sizes, engine.opened.codec.image_channels, limits.pixels)
        self._patch_side = engine.opened.codec.downsampling * engine.vocabulary.patch_size  # in pixels
        num_codes = {(x, y): (x // self._patch_side) * (y // self._patch_side) for x, y in self.sizes}
        self.num_codes = num_codes if engine.uses_image_codes else None  # of an image, by its size

    def describe(self) -> dict:
        """One entry of /v1/models: OpenAI's four fields and extensions. image_steps: for a run whose images are codes, the
        number of codes by size; such a run supports no `steps`."""
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "transfusion", "step": self.step,
            "sizes": [format_size(size) for size in self.sizes], "seq_len": self.max_positions, "edits": self.can_edit,
            **self.facts, "generation": to_json(self.generation), "max_n": self.limits.max_n,
            "chat": None if self.chat == PLAIN else to_json(self.chat),
            "image_steps": self.num_codes and {format_size(size): n for size, n in self.num_codes.items()},
        }  # fmt: skip

    def count_patches(self, pixels: np.ndarray) -> int:
        """Positions of an image in a sequence."""
        return (pixels.shape[0] // self._patch_side) * (pixels.shape[1] // self._patch_side)

    async def parse_chat(self, body: ChatRequest) -> list[Request]:
        """One request for all choices when only images are wanted; otherwise one for each choice."""
        self._check(body.model, body.n)
        content = [part for message in body.messages for part in message.content_parts]
        self._check_text("".join(part.text for part in content if isinstance(part, TextPart)), "messages")
        urls = [part.image_url.url for part in content if not isinstance(part, TextPart)]
        self._check_pictures(len(urls), "messages")
        pixels = iter([await self.pictures.read(url, "image_url") for url in urls])
        turns = [
            Turn(ROLES[message.role], [p.text if isinstance(p, TextPart) else next(pixels) for p in message.content_parts])
            for message in body.messages
        ]
        parts = [
            await self._encode(part.content, part.parse_special) if isinstance(part.content, str) else part.content
            for part in lay_out_prompt(turns, self.chat)
        ]
        generation = self._with_image_options(self._with_text_options(self.generation, body), body)
        modalities, n = set(body.modalities or ("text",)), body.n or 1
        common = {
            "generation": generation, "preview_every": body.preview_every or 0,
            "negative_prompt": await self._encode(body.negative_prompt or ""),
            "logprobs": body.top_logprobs if body.logprobs else None,
        }  # fmt: skip
        if modalities == {"image"}:
            return [Request(parts, num_images=n, seed=choose_seed(body.seed), **common)]
        seeds = derive_seeds(choose_seed(body.seed), n)
        return [Request(parts, seed=seed, allow_images="image" in modalities, **common) for seed in seeds]

    async def parse_completion(self, body: CompletionRequest) -> tuple[list[Request], list[Echo]]:
        """One request for each choice of each prompt, and what their answers repeat of the prompt."""
        self._check(body.model, body.n, len(body.prompt))
        prompts = [await self._read_prompt(prompt, body.max_tokens != 0) for prompt in body.prompt]
        generation = self._with_text_options(self.generation, body)
        seeds = derive_seeds(choose_seed(body.seed), body.n or 1)
        requests = [
            Request(
                (part,), seed=seed, generation=generation, allow_images=False, logprobs=body.logprobs,
                prompt_logprobs=body.echo and body.logprobs is not None,
            )
            for part, _ in prompts
            for seed in seeds
        ]  # fmt: skip
        return requests, [echo for _, echo in prompts for _ in seeds]

    async def _read_prompt(self, prompt: str | list[int], has_answer: bool) -> tuple[Text, Echo]:
        """A text, or token ids with or without bos before them."""
        if isinstance(prompt, str):
            self._check_text(prompt, "prompt")
            text, echo = await self._encode(prompt), Echo(prompt)
        else:
            has_bos = prompt[:1] == [self.names.bos]
            text = Text(tuple(prompt[has_bos:]))
            unknown = [token for token in text.tokens if not 0 <= token < self.names.num_text_tokens]
            if unknown:
                rule = f"use 0 to {self.names.num_text_tokens - 1}, and {self.names.bos} (bos) at the beginning"
                raise APIError(400, f"prompt has the token id {unknown[0]}, which is not an id of text: {rule}", "prompt")
            echo = Echo(self.tokenizer.decode(text.tokens), has_bos)
        if (length := 1 + len(text.tokens) + has_answer) > self.max_positions:
            parts = "bos, the prompt and a token of the answer" if has_answer else "bos and the prompt"
            limit = f"the run supports at most {self.max_positions:,}"
            raise APIError(400, f"{parts} take {length:,} positions; {limit}", "prompt")
        return text, echo

    async def parse_image(self, body: ImageRequest, files: Sequence[bytes] = ()) -> Request:
        """One request for all images. The pictures in the files precede the prompt, as in training."""
        self._check(body.model, body.n)
        self._check_text(body.prompt, "prompt")
        self._check_pictures(len(files), "image")
        generation = self._with_image_options(self.generation, body)
        if body.partial_images and body.preview_every:
            raise APIError(400, "partial_images and preview_every are the same option: send only one", "partial_images")
        if (body.partial_images or body.preview_every) and not body.stream:
            raise APIError(400, "previews need stream: true", "stream")
        preview_every, size = body.preview_every or 0, self._parse_size(body.size)
        if body.partial_images:
            steps = self.num_codes[size] if self.num_codes else generation.steps
            preview_every = max(1, steps // (body.partial_images + 1))
        pictures = [await self.pictures.read(file, "image") for file in files]  # costly, so after all checks
        texts = [await self._encode(body.prompt)] if body.prompt else []
        return Request(
            (*pictures, *texts), body.n or 1, choose_seed(body.seed), generation, size, preview_every,
            negative_prompt=await self._encode(body.negative_prompt or ""),
        )  # fmt: skip

    async def _encode(self, text: str, parse_special: bool = False) -> Text:
        """Its ids, as `data prepare` encodes it. A long text takes long, so it is not left to the engine's thread."""
        if not text:
            return Text(())  # at once: the worker may be busy
        try:
            return Text(await asyncio.to_thread(self.tokenizer.encode, text, parse_special))
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in the tokenizers library is no Exception
            log.exception("a text could not be encoded")
            raise APIError(500, "a text could not be encoded because of an error in the server") from None

    def check_edits(self) -> None:
        """APIError when the run cannot edit. Called before a form is read."""
        if not self.can_edit:
            raise APIError(400, f"{self.name} cannot edit: no document in its training data draws from another image")

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"there is no model {show(name[:40])} here: use {show(self.name)}"
            raise APIError(404, message, "model", "model_not_found")

    def _check(self, model: str | None, n: int | None, num_prompts: int = 1) -> None:
        if model is not None:
            self.check_model(model)
        n, max_n = n or 1, self.limits.max_n
        if num_prompts > 1 and n * num_prompts > max_n:
            message = f"the request has {num_prompts} prompts with {n} choices each: it may have {max_n} in all"
            raise APIError(400, message, "prompt")
        if n > max_n:
            raise APIError(400, f"n must be at most {max_n}", "n")

    def _check_text(self, text: str, param: str) -> None:
        max_chars = self.limits.prompt_chars_per_position * self.max_positions
        if len(text) > max_chars:
            raise APIError(400, f"the text has {len(text):,} characters; the limit is {max_chars:,}", param)

    def _check_pictures(self, count: int, param: str) -> None:
        if count and not self.sizes:
            raise APIError(400, f"{self.name} does not support images", param)
        if count > self.limits.pictures:
            raise APIError(400, f"the request has {count} pictures; the limit is {self.limits.pictures}", param)

    def _parse_size(self, text: str | None) -> tuple[int, int]:
        if not self.sizes:
            raise APIError(400, f"{self.name} does not support images")
        if text in (None, "auto"):
            return self.sizes[0]
        if (match := re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)) is None:
            raise APIError(400, f"size must be auto or WIDTHxHEIGHT, such as {format_size(self.sizes[0])}", "size")
        size = int(match[1]), int(match[2])
        if size not in self.sizes:
            nearest = format_size(nearest_size(size, self.sizes))
            message = f"size {text} is not supported: send {nearest} (the nearest size of this run) or auto"
            raise APIError(400, message, "size")
        return size

    def _with_image_options(self, generation: GenerationConfig, body: ImageOptions) -> GenerationConfig:
        self._check_text(body.negative_prompt or "", "negative_prompt")
        for name in ("num_inference_steps", "steps", "preview_every"):
            if (value := getattr(body, name)) is None:
                continue
            if value > self.limits.steps:
                raise APIError(400, f"{name} must be at most {self.limits.steps}", name)
            if self.num_codes and name != "preview_every":
                raise APIError(400, f"{self.name} draws images as codes, without denoising steps: leave {name} out", name)
        return override(generation, steps=body.steps, guidance_scale=body.guidance_scale)

    def _with_text_options(self, generation: GenerationConfig, body: TextOptions) -> GenerationConfig:
        if (body.max_tokens or 1) > self.limits.tokens:
            name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
            raise APIError(400, f"{name} must be at most {self.limits.tokens:,}", name)
        top_p = None if body.top_p is None else max(body.top_p, 1e-6)  # 0: only the most likely token
        return override(generation, max_tokens=body.max_tokens or None, temperature=body.temperature, top_p=top_p)


def override(generation: GenerationConfig, **options: float | None) -> GenerationConfig:
    """With those options that are not None."""
    return replace(generation, **{name: value for name, value in options.items() if value is not None})


def choose_seed(seed: int | None) -> int:
    """`seed`, or a random one when it is not set."""
    return secrets.randbits(31) if seed is None else seed


def derive_seeds(seed: int, n: int) -> list[int]:
    """One for each choice; the first is `seed` itself."""
    return [seed, *(derive_seed(seed, "answer", k) for k in range(1, n))]


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of these (width, height): the nearest aspect ratio, and of several the nearest area."""

    def distances(other: tuple[int, int]) -> tuple[float, float]:
        x, y = math.log(other[0] / size[0]), math.log(other[1] / size[1])
        return round(abs(x - y), 6), abs(x + y)  # rounded: equal ratios of different sizes

    return min(sizes, key=distances)


def format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
