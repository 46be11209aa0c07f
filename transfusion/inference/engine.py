"""Text mode, image mode, and the switch between them, for many rows at once.

A row writes tokens until it writes a boi; then it draws an image, which goes into the cache clean, eoi behind it, and it
writes on (section 3). `submit` adds rows, `step` moves all of them: one forward pass for the rows that write a token, one
for those that read (a prompt, or their own finished image), and one per latent shape for those that draw, with and
without their prompt together. Rows that wait compute nothing. A run whose images are codes draws them one by one
(`chameleon`), all rows that draw together.

Where text and images of a prompt guide apart (`image_guidance_scale`), a row has a second slot for what training showed when
the text was dropped: bos, the prompt's images, boi. It is read in the same forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture

from transfusion.chance import seed_from
from transfusion.checkpoint.open import Opened, open_checkpoint
from transfusion.codecs.pictures import to_pixels
from transfusion.config import GenerationConfig
from transfusion.inference import chameleon, image_mode, text_mode
from transfusion.inference.answer import Answer, Answers
from transfusion.inference.cache import Cache
from transfusion.inference.image_mode import Branch
from transfusion.inference.samplers import sampler_of
from transfusion.sequence import NOTHING, Document, Image, Piece, Text, lay_out


@dataclass(frozen=True)
class Request:
    """What is asked for.

    parts: the prompt in order, text or pictures (PIL, or (Y, X, colours) uint8 of a size the run knows). num_images: so
    many independent draws of one image each (boi is forced), of `size` (width, height) in pixels; without it one row runs
    free until eos, and draws where it likes unless may_draw is False. previews: every so many denoising steps an event
    shows the image; 0: never.
    """

    parts: tuple[str | np.ndarray | Picture.Image, ...] = ()
    num_images: int | None = None
    seed: int = 0
    generation: GenerationConfig | None = None  # the run's own
    size: tuple[int, int] | None = None  # the run's first
    previews: int = 0
    may_draw: bool = True


@dataclass(frozen=True)
class Written:
    """A row wrote a token. `text` is what it adds that can be read (parts of a letter are held back)."""

    request: int
    draw: int
    token: int
    text: str


@dataclass(frozen=True)
class Previewed:
    """An image on its way: as noisy as it still is, and what the model takes it to be, both (Y, X, colours) uint8."""

    request: int
    draw: int
    step: int
    noisy: np.ndarray
    clean: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """A finished image, (Y, X, colours) uint8."""

    request: int
    draw: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Finished:
    """A row's end, and why: "eos", "image" (the one that was asked for), or "length"."""

    request: int
    draw: int
    reason: str


Event = Written | Previewed | Drawn | Finished


@dataclass
class Row:
    """One answer on its way: its slots in the cache, what they have yet to read, the image it draws."""

    number: int  # of the request
    request: Request
    generation: GenerationConfig
    draw: int
    slot: int
    unread: Piece | None
    forks: int  # rows that will go on from the same prompt, once it is read
    images_slot: int | None = None  # only bos and the prompt's images, where these guide apart from its text
    images_unread: Piece | None = None
    free_slot: int | None = None  # only bos and boi, while an image is drawn with guidance
    written: int = 0  # tokens
    segment: list[int] = field(default_factory=list)  # tokens of the text in hand
    shown: int = 0  # letters of it that events have carried
    images: int = 0
    drawing: image_mode.Drawing | chameleon.Drawing | None = None

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(seed_from(self.request.seed, self.draw, "text"))

    @property
    def slots(self) -> list[int]:
        """All that it holds of the cache."""
        return [slot for slot in (self.slot, self.images_slot, self.free_slot) if slot is not None]


class Engine:
    """A run, ready to write and draw. `generate` is the short way; `submit`, `step` and `cancel` are the long one."""

    def __init__(self, opened: Opened):
        self.opened, self.device = opened, opened.device
        self.model, self.run, self.vocabulary = opened.model, opened.run, opened.vocabulary
        self.context = self.run.data.row_length  # positions: a row never grows beyond what was trained on
        self.cache = Cache(self.run.model, self.device, opened.precision)
        self.allowed = text_mode.allowed_tokens(self.vocabulary)
        boi = torch.tensor([*self.vocabulary.boi.values()], dtype=torch.int64)  # (none, of a run that knows no pictures)
        self.allowed_text = self.allowed.index_fill(0, boi, False)
        codec = opened.codec
        self.codes = self.vocabulary.codes > 0  # images are drawn code by code
        self.bound = () if self.codes else tuple(
            torch.tensor(side, dtype=torch.float32, device=self.device).view(-1, 1, 1) for side in (codec.low, codec.high)
        )
        self.sizes = [(x * codec.scale, y * codec.scale) for y, x in self.vocabulary.boi]  # (width, height)
        self.rows: list[Row] = []
        self.requests = 0
        self.free_slots: dict[tuple[int, int], int] = {}  # by shape: bos and boi, read once

    def generation(self, **chosen: Any) -> GenerationConfig:
        """The run's own, with what was chosen. ValueError when that is out of bounds, or of no use to a run of codes."""
        useless = sorted(chosen.keys() & chameleon.OF_NOISE) if self.codes else ()
        if useless:
            raise ValueError(f"this run draws an image code by code, without noise: {useless[0]} has no use")
        generation = replace(self.run.generation, **chosen)
        sampler_of(generation.sampler, self.run.diffusion)
        return generation

    def draws(self, size: tuple[int, int], colours: int) -> bool:
        """Are pictures of this (width, height) and so many colours what this run draws when nobody names a size?"""
        return self.sizes[:1] == [size] and self.opened.codec.colours == colours

    def submit(self, request: Request) -> int:
        """Take a request; its number comes back with every event. ValueError when it cannot be done."""
        if request.num_images is None and not request.parts:
            raise ValueError("nothing to go on: give a part, or ask for images")
        if request.num_images is not None and request.num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {request.num_images}")
        generation = request.generation or self.run.generation
        sampler_of(generation.sampler, self.run.diffusion)
        segments = tuple(map(self._segment, request.parts))
        images = tuple(segment for segment in segments if isinstance(segment, Image))
        prompt, without_text = (lay_out(Document(given), self.vocabulary, ends=False) for given in (segments, images))
        needed = len(prompt)
        if request.num_images is not None:
            shape = self._shape(request.size)
            prompt, without_text = (piece.followed_by(self.vocabulary.boi[shape]) for piece in (prompt, without_text))
            needed = len(prompt) + self.vocabulary.patches(shape)
        if needed > self.context:
            raise ValueError(f"this takes {needed} positions, and the run was trained on rows of {self.context}")
        self.requests += 1
        row = Row(self.requests, request, generation, 0, self.cache.acquire(), prompt, (request.num_images or 1) - 1)
        # With equal scales, what the images alone would say cancels out.
        if images and generation.image_guidance_scale not in (None, generation.guidance_scale):
            row.images_slot, row.images_unread = self.cache.acquire(), without_text
        self.rows.append(row)
        return self.requests

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Move every row by one forward pass of its kind."""
        with self.opened.lower_precision():
            return self._step()

    def _step(self) -> list[Event]:
        events: list[Event] = []
        for writing in (True, False):
            rows = [row for row in self.rows if row.unread is not None and (len(row.unread) == 1) == writing]
            if rows:
                apart = [row for row in rows if row.images_unread is not None]
                slots = [row.slot for row in rows] + [row.images_slot for row in apart]
                pieces = [row.unread for row in rows] + [row.images_unread for row in apart]
                logits = text_mode.read(self.model, self.cache, slots, pieces, self.vocabulary).cpu()  # (B, V)
                for row, after in zip(rows, logits, strict=False):
                    self._go_on(row, after, events)
        drawing: dict[tuple[int, int] | None, list[Row]] = {}
        for row in self.rows:
            if row.drawing is not None:
                drawing.setdefault(None if self.codes else row.drawing.shape, []).append(row)
        for rows in drawing.values():
            steps, drawings = [row.drawing.step for row in rows], [row.drawing for row in rows]
            if self.codes:
                chameleon.write(self.model, self.cache, drawings, self.vocabulary)
            else:
                image_mode.denoise(self.model, self.cache, drawings, self.run.diffusion)
            for row, step in zip(rows, steps, strict=True):
                self._after_drawing(row, row.drawing.step > step, events)
        return events

    def cancel(self, number: int) -> None:
        """Forget a request: its rows are gone before the next step."""
        for row in [row for row in self.rows if row.number == number]:
            self._remove(row)

    def generate(self, requests: Sequence[Request]) -> list[Answers]:
        """All requests at once, to their ends: for each its answers, one per draw. ValueError while others are under way."""
        if self.rows:
            raise ValueError("other requests are under way: finish them with step, or cancel them")
        answers = {
            self.submit(request): Answers(Answer() for _ in range(request.num_images or 1)) for request in requests
        }
        tokens: dict[tuple[int, int], list[int]] = {}
        while self.rows:
            for event in self.step():
                place = event.request, event.draw
                answer = answers[event.request][event.draw]
                if isinstance(event, Written):
                    tokens.setdefault(place, []).append(event.token)
                elif isinstance(event, Drawn | Finished):
                    text = self.opened.tokenizer.decode(tokens.pop(place, []))
                    answer.parts += [text] if text else []
                if isinstance(event, Drawn):
                    answer.parts.append(event.pixels)
                elif isinstance(event, Finished):
                    answer.reason = event.reason
        return list(answers.values())

    def _segment(self, part: str | np.ndarray | Picture.Image) -> Text | Image:
        if isinstance(part, str):
            return Text(self.opened.tokenizer.encode(part))
        codec = self.opened.codec
        if not self.sizes:
            raise ValueError("this run knows no pictures")
        if isinstance(part, Picture.Image):
            part = to_pixels(part, self.sizes, codec.colours)
        if part.shape[1::-1] not in self.sizes or part.shape[2:] != (codec.colours,):
            raise ValueError(f"a picture of shape {part.shape} is none of this run's sizes: {self._size_list()}")
        return Image(codec.encode(part))

    def _shape(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The latent shape (Y, X) of a picture of this (width, height)."""
        if not self.sizes:
            raise ValueError("this run knows no pictures")
        if size is None:
            return next(iter(self.vocabulary.boi))
        if size not in self.sizes:
            raise ValueError(f"the run cannot draw {size[0]}x{size[1]}; it can draw {self._size_list()}")
        return size[1] // self.opened.codec.scale, size[0] // self.opened.codec.scale

    def _size_list(self) -> str:
        return ", ".join(f"{x}x{y}" for x, y in self.sizes)

    def _go_on(self, row: Row, logits: torch.Tensor, events: list[Event]) -> None:
        """What a row does once all is read: draw if that ended in a boi, else write the next token."""
        shape = self.vocabulary.shape_of(int(row.unread.tokens[-1]))
        rows = [row]
        for draw in range(1, row.forks + 1):
            fork = Row(row.number, row.request, row.generation, draw, self.cache.acquire(), None, 0)
            self.cache.copy(row.slot, fork.slot)
            if row.images_slot is not None:
                fork.images_slot = self.cache.acquire()
                self.cache.copy(row.images_slot, fork.images_slot)
            self.rows.append(fork)
            rows.append(fork)
        row.forks = 0
        for each in rows:
            each.unread = each.images_unread = None
            if shape is not None:
                self._begin_image(each, shape)
            else:
                self._write(each, logits, events)

    def _write(self, row: Row, logits: torch.Tensor, events: list[Event]) -> None:
        vocabulary = self.vocabulary
        allowed = self.allowed if row.request.may_draw else self.allowed_text
        token = text_mode.choose(logits, allowed, row.generation, row.generator)
        if token == vocabulary.eos:
            return self._end(row, "eos", events)
        shape = vocabulary.shape_of(token)
        needed = self.cache.lengths[row.slot] + 1 + (0 if shape is None else vocabulary.patches(shape) + 1)
        if row.written >= row.generation.max_tokens or needed > self.context:
            return self._end(row, "length", events)
        row.written += 1
        row.unread = NOTHING.followed_by(token)
        if shape is not None and row.images_slot is not None:
            row.images_unread = row.unread
        if shape is None:
            row.segment.append(token)
            text = self.opened.tokenizer.decode(row.segment)
            fresh = "" if text.endswith("\ufffd") else text[row.shown :]
            row.shown += len(fresh)
            events.append(Written(row.number, row.draw, token, fresh))

    def _begin_image(self, row: Row, shape: tuple[int, int]) -> None:
        generation = row.generation
        branches = [Branch(row.slot, generation.guidance_scale)]
        if row.images_slot is not None:
            branches.append(Branch(row.images_slot, generation.image_guidance_scale))
        if row.images_slot is not None or generation.guidance_scale != 1:
            row.free_slot = self.cache.acquire()
            self.cache.copy(self._without_prompt(shape), row.free_slot)
            branches.append(Branch(row.free_slot))
        row.segment, row.shown = [], 0
        seed = seed_from(row.request.seed, row.draw, "image", row.images)
        if self.codes:
            row.drawing = chameleon.begin(shape, branches, generation, self.vocabulary, self.cache, seed)
        else:
            latent = (self.run.model.latent_channels, *shape)
            row.drawing = image_mode.begin(latent, branches, generation, self.run.diffusion, self.bound, seed, self.device)
        row.images += 1

    def _without_prompt(self, shape: tuple[int, int]) -> int:
        """The slot of what the model read in training when the caption was dropped: bos and boi."""
        if shape not in self.free_slots:
            self.free_slots[shape] = slot = self.cache.acquire()
            piece = lay_out(Document(()), self.vocabulary, ends=False).followed_by(self.vocabulary.boi[shape])
            text_mode.read(self.model, self.cache, [slot], [piece], self.vocabulary)
        return self.free_slots[shape]

    def _after_drawing(self, row: Row, moved: bool, events: list[Event]) -> None:
        """moved: the drawing has a whole step behind it since it was last here."""
        drawing, codec = row.drawing, self.opened.codec
        if moved and row.request.previews and drawing.step % row.request.previews == 0:
            events.append(Previewed(row.number, row.draw, drawing.step, *drawing.preview(codec)))
        content = drawing.content()
        if content is None:
            return None
        if row.free_slot is not None:
            self.cache.release(row.free_slot)
        if row.images_slot is not None:
            # Images that the row draws itself are no part of its prompt.
            self.cache.advance(row.images_slot, -drawing.kept)
        row.drawing = row.free_slot = None
        events.append(Drawn(row.number, row.draw, codec.decode(content)))
        if row.request.num_images is not None:
            return self._end(row, "image", events)
        # The cache still holds nothing of a latent: it is read once more, clean, as later text and images will see it. Of
        # codes it lacks the last.
        whole = lay_out(Document((Image(content),)), self.vocabulary, ends=False)  # bos boi patches eoi
        row.unread = whole.part(1 + drawing.kept)

    def _end(self, row: Row, reason: str, events: list[Event]) -> None:
        self._remove(row)
        events.append(Finished(row.number, row.draw, reason))

    def _remove(self, row: Row) -> None:
        self.rows.remove(row)
        for slot in row.slots:
            self.cache.release(slot)


def open_run(path: str | Path, weights: str = "average", device: str = "auto") -> Engine:
    """A run's folder, or an exported one, or `owner/name` on the hub, ready to write and draw.

    `weights="raw"` instead of the moving average; an exported run has one of them.
    """
    return Engine(open_checkpoint(path, weights, device))
