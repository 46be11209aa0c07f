"""The run that is served: what is asked, in the words of the API, as requests to its engine."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from transfusion.config import GenerationConfig, to_json
from transfusion.inference.engine import Engine, Request
from transfusion.seeding import derive_seed
from transfusion.serving.errors import APIError
from transfusion.serving.limits import Limits
from transfusion.serving.pictures import PictureReader
from transfusion.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    ImageOptions,
    ImageRequest,
    TextOptions,
    TextPart,
)

Part = str | np.ndarray


class Served:
    """What there is to know about a run, and its limits. Reads of an engine only what never changes.

    No run has a chat template yet: the contents of messages are put one behind the other, whoever said them.
    """

    def __init__(self, engine: Engine, limits: Limits):
        self.name, self.context, usual = engine.run.name, engine.context, engine.run.generation
        # What nobody asks for stays within the limits too.
        steps, tokens = min(usual.steps, limits.steps), min(usual.max_tokens, limits.tokens)
        self.generation = replace(usual, steps=steps, max_tokens=tokens)
        self.step, self.sizes, self.limits = engine.opened.step, engine.sizes, limits
        self.edits = engine.opened.notes.get("edits") is True  # its data held documents that draw from a given image
        self.about = {
            "parameters": engine.opened.parameters, "image_channels": engine.opened.codec.image_channels,
            "sources": [*engine.opened.notes.get("element_weights", engine.run.data.sources)],
        }  # fmt: skip
        self.created = int(time.time())
        self.pictures = PictureReader(self.sizes, engine.opened.codec.image_channels, limits.pixels)
        self._patch = engine.opened.codec.downsampling * engine.vocabulary.patch_size  # pixels along one side of a patch
        codes = {(x, y): (x // self._patch) * (y // self._patch) for x, y in self.sizes}
        self.codes = codes if engine.draws_codes else None  # of an image, by its size

    def describe(self) -> dict:
        """One entry of /v1/models: OpenAI's four fields, then what a page or a program wants to know.

        image_steps: where images are drawn code by code, how many codes each size has: such a run takes no `steps`.
        """
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "transfusion", "step": self.step,
            "sizes": [size_name(size) for size in self.sizes], "seq_len": self.context, "edits": self.edits, **self.about,
            "generation": to_json(self.generation), "most_answers": self.limits.answers,
            "image_steps": self.codes and {size_name(size): codes for size, codes in self.codes.items()},
        }  # fmt: skip

    def patches(self, pixels: np.ndarray) -> int:
        """Positions of an image in a row."""
        return (pixels.shape[0] // self._patch) * (pixels.shape[1] // self._patch)

    async def chat(self, asked: ChatRequest) -> list[Request]:
        """One request for all answers that are an image and nothing else; otherwise one for each."""
        self._check(asked.model, asked.n)
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise APIError(400, "max_tokens and max_completion_tokens mean the same: give one", "max_tokens")
        said = [part for message in asked.messages for part in message.said]
        self._check_text("".join(part.text for part in said if isinstance(part, TextPart)), "messages")
        urls = [part.image_url.url for part in said if not isinstance(part, TextPart)]
        self._check_pictures(len(urls), "messages")
        pixels = iter([await self.pictures.read(url, "image_url") for url in urls])
        parts = joined([part.text if isinstance(part, TextPart) else next(pixels) for part in said])
        generation = self._drawing(self._writing(self.generation, asked, asked.max_completion_tokens), asked)
        wanted, n = set(asked.modalities or ("text",)), asked.n or 1
        common = {"generation": generation, "previews": asked.preview_every or 0}
        if wanted == {"image"}:
            return [Request(parts, num_images=n, seed=seed_of(asked.seed), **common)]
        return [
            Request(parts, seed=seed, allow_images="image" in wanted, **common) for seed in seeds(seed_of(asked.seed), n)
        ]

    def complete(self, asked: CompletionRequest) -> list[Request]:
        """One request for each prompt and answer."""
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        self._check(asked.model, (asked.n or 1) * len(prompts))
        for prompt in prompts:
            self._check_text(prompt, "prompt")
        generation, first = self._writing(self.generation, asked, None), seed_of(asked.seed)
        return [
            Request(joined([prompt]), seed=seed, generation=generation, allow_images=False)
            for prompt in prompts
            for seed in seeds(first, asked.n or 1)
        ]

    def draw(self, asked: ImageRequest, given: Sequence[np.ndarray] = ()) -> Request:
        """One request for all images; given pictures come before the prompt, as in training."""
        self._check(asked.model, asked.n)
        self._check_text(asked.prompt, "prompt")
        generation = self._drawing(self.generation, asked)
        if asked.partial_images and asked.preview_every:
            raise APIError(400, "partial_images and preview_every are two ways to say the same: give one", "partial_images")
        if (asked.partial_images or asked.preview_every) and not asked.stream:
            raise APIError(400, "images on their way come only with stream: true", "stream")
        previews, size = asked.preview_every or 0, self._size(asked.size)
        if asked.partial_images:
            steps = self.codes[size] if self.codes else generation.steps
            previews = max(1, steps // (asked.partial_images + 1))
        parts = joined([*given, asked.prompt])
        return Request(parts, asked.n or 1, seed_of(asked.seed), generation, size, previews)

    async def edit(self, asked: ImageRequest, files: Sequence[bytes]) -> Request:
        """The same behind pictures that were sent."""
        if not files:
            raise APIError(400, "image is missing: send one or more picture files", "image")
        self._check_pictures(len(files), "image")
        self.draw(asked)  # whatever is wrong with the rest is found before anything is decoded
        return self.draw(asked, [await self.pictures.read(file, "image") for file in files])

    def check_edits(self) -> None:
        """Before any picture is taken."""
        if not self.edits:
            raise APIError(400, f"{self.name} cannot edit: its training data held no image that is drawn from a given one")

    def _check(self, model: str | None, n: int | None) -> None:
        if model is not None and model != self.name:
            raise APIError(404, f"there is no such model here; there is {self.name}", "model", "model_not_found")
        if (n or 1) > self.limits.answers:
            raise APIError(400, f"n must be at most {self.limits.answers}, all prompts together", "n")

    def _check_text(self, text: str, param: str) -> None:
        most = self.limits.prompt_chars_per_position * self.context
        if len(text) > most:
            raise APIError(400, f"the text has {len(text):,} letters; at most {most:,} are read by this run", param)

    def _check_pictures(self, count: int, param: str) -> None:
        if count > self.limits.pictures:
            raise APIError(400, f"{count} pictures are too many: at most {self.limits.pictures} in one request", param)

    def _size(self, asked: str | None) -> tuple[int, int]:
        known = {size_name(size): size for size in self.sizes} | {None: self.sizes[0], "auto": self.sizes[0]}
        if asked not in known:
            drawn = ", ".join(map(size_name, self.sizes))
            raise APIError(400, f"size must be auto or one that this run draws: {drawn}", "size")
        return known[asked]

    def _drawing(self, generation: GenerationConfig, asked: ImageOptions) -> GenerationConfig:
        for name in ("steps", "preview_every"):
            if (getattr(asked, name) or 1) > self.limits.steps:
                raise APIError(400, f"{name} must be at most {self.limits.steps}", name)
        if self.codes and asked.steps is not None:
            raise APIError(400, f"{self.name} draws an image code by code: leave steps out", "steps")
        return changed(generation, steps=asked.steps, guidance_scale=asked.guidance_scale)

    def _writing(self, generation: GenerationConfig, asked: TextOptions, completion_tokens: int | None) -> GenerationConfig:
        tokens = completion_tokens if asked.max_tokens is None else asked.max_tokens
        if (tokens or 1) > self.limits.tokens:
            raise APIError(400, f"max_tokens must be at most {self.limits.tokens:,}", "max_tokens")
        top_p = None if asked.top_p is None else max(asked.top_p, 1e-6)  # 0: the likeliest alone
        return changed(generation, max_tokens=tokens, temperature=asked.temperature, top_p=top_p)


def changed(generation: GenerationConfig, **numbers: float | None) -> GenerationConfig:
    """With what was asked for, as far as anything was."""
    return replace(generation, **{name: value for name, value in numbers.items() if value is not None})


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Texts that follow each other as one, and no empty ones."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif not isinstance(part, str) or part:
            found.append(part)
    return tuple(found)


def seed_of(asked: int | None) -> int:
    return secrets.randbits(31) if asked is None else asked


def seeds(first: int, n: int) -> list[int]:
    """One for each answer; that of the first is the one that was asked for."""
    return [first, *(derive_seed(first, "answer", k) for k in range(1, n))]


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
