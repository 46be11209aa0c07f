"""Text mode, image mode, and the switch between them, for many sequences at once.

A sequence samples tokens until it samples a boi. Then it draws an image, which enters the cache with t = 0 (no noise),
followed by eoi, and continues with text (section 3). `submit` adds sequences, `step` advances all of them: one forward pass
for those that decode a token, one for those that prefill (a prompt, or an image that they have finished), and one per latent
shape for those that draw, conditional and unconditional together. Image codes are sampled one by one (`chameleon`).

If the text and the images of a prompt have different guidance scales (`image_guidance_scale`), a sequence has a second slot.
It holds bos, the prompt's images and boi, like training documents whose text was dropped, and joins the forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture

from transfusion.checkpoint.open import OpenedRun, open_checkpoint
from transfusion.codecs.pictures import to_pixels
from transfusion.config import GenerationConfig
from transfusion.inference import chameleon, image_mode, text_mode
from transfusion.inference.answer import Answer, Answers
from transfusion.inference.cache import Cache
from transfusion.inference.image_mode import Branch
from transfusion.inference.samplers import get_sampler
from transfusion.seeding import derive_seed
from transfusion.sequence import EMPTY_CHUNK, Chunk, Document, Image, Text, encode_document


@dataclass(frozen=True)
class Request:
    """A prompt and what to generate from it.

    parts: the prompt in order, text or pictures (PIL, or (Y, X, channels) uint8 of a size that the run supports).
    num_images: this many samples of one image each (boi is forced), of `size` (width, height) in pixels. Not set: one
    sample of free text, which ends with eos and draws where the model samples a boi, unless allow_images is False.
    preview_every: denoising steps (or codes) between two PreviewEvents; 0: no previews.
    """

    parts: tuple[str | np.ndarray | Picture.Image, ...] = ()
    num_images: int | None = None
    seed: int = 0
    generation: GenerationConfig | None = None  # default: the run's
    size: tuple[int, int] | None = None  # default: the run's first
    preview_every: int = 0
    allow_images: bool = True


@dataclass(frozen=True)
class TokenEvent:
    """A sampled text token. `text` is the readable text that it adds; an incomplete character is held back."""

    request_id: int
    sample_index: int
    token: int
    text: str


@dataclass(frozen=True)
class PreviewEvent:
    """An unfinished image: x_t and the predicted x0 as pixels, both (Y, X, channels) uint8."""

    request_id: int
    sample_index: int
    step: int
    x_t: np.ndarray
    x0: np.ndarray


@dataclass(frozen=True)
class ImageEvent:
    """A finished image, (Y, X, channels) uint8."""

    request_id: int
    sample_index: int
    pixels: np.ndarray


@dataclass(frozen=True)
class FinishEvent:
    """The end of a sample. reason: "eos", "image" (the requested one is finished) or "length"."""

    request_id: int
    sample_index: int
    reason: str


Event = TokenEvent | PreviewEvent | ImageEvent | FinishEvent


@dataclass(frozen=True)
class Prefill:
    """The positions to prefill: a prompt or a finished image; and those for the image-conditional slot."""

    chunk: Chunk
    image_cond_chunk: Chunk | None = None
    remaining_samples: int = 0  # samples that fork from this prompt when it is read


@dataclass(frozen=True)
class Decode:
    """Next input: the last sampled token, one position."""

    chunk: Chunk
    image_cond_chunk: Chunk | None = None


@dataclass(frozen=True)
class Draw:
    """An unfinished image, and the slot of its unconditional branch."""

    image: image_mode.LatentImageState | chameleon.CodeImageState
    uncond_slot: int | None


@dataclass
class SequenceState:
    """One sample of a request: its phase, its cache slots, and the text since the last image."""

    request_id: int
    request: Request
    generation: GenerationConfig
    sample_index: int
    phase: Prefill | Decode | Draw | None  # None only while a forward pass is evaluated
    slot: int
    image_cond_slot: int | None = None  # bos and the prompt's images, if their guidance scale is different
    num_sampled_tokens: int = 0
    num_images_begun: int = 0
    text_tokens: list[int] = field(default_factory=list)
    num_characters_sent: int = 0  # of these tokens' text, in events so far

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(derive_seed(self.request.seed, self.sample_index, "text"))

    @property
    def slots(self) -> list[int]:
        """All its cache slots."""
        uncond_slot = self.phase.uncond_slot if isinstance(self.phase, Draw) else None
        return [slot for slot in (self.slot, self.image_cond_slot, uncond_slot) if slot is not None]


class Engine:
    """Generates text and images with a run. `generate` runs requests to their end; `submit`, `step`, `cancel` stream."""

    def __init__(self, opened: OpenedRun):
        self.opened, self.device = opened, opened.device
        self.model, self.run, self.vocabulary = opened.model, opened.run, opened.vocabulary
        self.max_positions = self.run.data.seq_len  # positions: a sequence is never longer than the rows of training
        self.cache = Cache(self.run.model, self.device, opened.precision)
        self.allowed_tokens = text_mode.allowed_tokens(self.vocabulary)
        boi = torch.tensor([*self.vocabulary.boi.values()], dtype=torch.int64)  # (empty for a run without images)
        self.allowed_text_tokens = self.allowed_tokens.index_fill(0, boi, False)
        codec = opened.codec
        self.uses_image_codes = self.vocabulary.num_image_codes > 0
        self.latent_range = () if self.uses_image_codes else tuple(
            torch.tensor(side, dtype=torch.float32, device=self.device).view(-1, 1, 1) for side in (codec.low, codec.high)
        )
        self.sizes = [(x * codec.downsampling, y * codec.downsampling) for y, x in self.vocabulary.boi]  # (width, height)
        self.sequences: list[SequenceState] = []
        self.num_requests = 0
        self.uncond_prefix_slots: dict[tuple[int, int], int] = {}  # latent shape -> slot with bos and boi

    def make_generation_config(self, **changes: Any) -> GenerationConfig:
        """The run's options with these changes. ValueError if one is out of bounds, or has no effect in a run of codes."""
        ignored = sorted(changes.keys() & chameleon.DIFFUSION_OPTIONS) if self.uses_image_codes else ()
        if ignored:
            raise ValueError(f"this run samples images as codes, without diffusion: {ignored[0]} has no effect")
        generation = replace(self.run.generation, **changes)
        get_sampler(generation.sampler, self.run.diffusion.noise_schedule)
        return generation

    def is_default_image(self, size: tuple[int, int], channels: int) -> bool:
        """Does the run draw images of this (width, height) and number of channels when a request names no size?"""
        return self.sizes[:1] == [size] and self.opened.codec.image_channels == channels

    def submit(self, request: Request) -> int:
        """Add a request. Returns its id; events refer to it as `request_id`. ValueError if the run does not support it."""
        if request.num_images is None and not request.parts:
            raise ValueError("the request is empty: give a part, or num_images")
        if request.num_images is not None and request.num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {request.num_images}")
        generation = request.generation or self.run.generation
        get_sampler(generation.sampler, self.run.diffusion.noise_schedule)
        segments = tuple(map(self._to_segment, request.parts))
        images = tuple(segment for segment in segments if isinstance(segment, Image))
        prompt, images_only = (encode_document(d, self.vocabulary, add_eos=False) for d in map(Document, (segments, images)))
        length = len(prompt)
        if request.num_images is not None:
            shape = self._latent_shape(request.size)
            prompt, images_only = (chunk.append(self.vocabulary.boi[shape]) for chunk in (prompt, images_only))
            length = len(prompt) + self.vocabulary.num_patches(shape)
        if length > self.max_positions:
            maximum = f"{self.max_positions} (data.seq_len)"
            raise ValueError(f"the request takes {length} positions; the run supports at most {maximum}")
        self.num_requests += 1
        slot, image_cond_slot = self.cache.acquire(), None
        # With equal scales the guidance formula reduces to plain classifier-free guidance, so the branch is skipped.
        if images and generation.image_guidance_scale not in (None, generation.guidance_scale):
            image_cond_slot = self.cache.acquire()
        phase = Prefill(prompt, None if image_cond_slot is None else images_only, (request.num_images or 1) - 1)
        self.sequences.append(SequenceState(self.num_requests, request, generation, 0, phase, slot, image_cond_slot))
        return self.num_requests

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every sequence by one forward pass of its phase. A sequence that reads a boi is denoised in the
        same step: for example, a prompt that ends with boi is prefilled and then denoised."""
        events: list[Event] = []
        with self.opened.lower_precision():
            self._forward_text(Decode, events)
            self._forward_text(Prefill, events)
            self._forward_images(events)
        return events

    def _forward_text(self, phase: type[Prefill] | type[Decode], events: list[Event]) -> None:
        sequences = [sequence for sequence in self.sequences if isinstance(sequence.phase, phase)]
        if not sequences:
            return
        with_image_cond = [sequence for sequence in sequences if sequence.phase.image_cond_chunk is not None]
        slots = [sequence.slot for sequence in sequences] + [sequence.image_cond_slot for sequence in with_image_cond]
        chunks = [sequence.phase.chunk for sequence in sequences]
        chunks += [sequence.phase.image_cond_chunk for sequence in with_image_cond]
        logits = text_mode.extend_cache(self.model, self.cache, slots, chunks, self.vocabulary).cpu()  # (B, V)
        for sequence, sequence_logits in zip(sequences, logits, strict=False):  # those of image_cond slots are not needed
            self._after_text_pass(sequence, sequence_logits, events)

    def _forward_images(self, events: list[Event]) -> None:
        by_shape: dict[tuple[int, int] | None, list[SequenceState]] = {}
        for sequence in self.sequences:
            if isinstance(sequence.phase, Draw):
                by_shape.setdefault(None if self.uses_image_codes else sequence.phase.image.shape, []).append(sequence)
        for sequences in by_shape.values():
            images = [sequence.phase.image for sequence in sequences]
            steps = [image.step for image in images]
            if self.uses_image_codes:
                chameleon.decode_codes(self.model, self.cache, images, self.vocabulary)
            else:
                image_mode.denoise(self.model, self.cache, images, self.run.diffusion)
            for sequence, image, step in zip(sequences, images, steps, strict=True):
                self._after_image_pass(sequence, sequence.phase, image.step > step, events)

    def cancel(self, request_id: int) -> None:
        """Remove a request and its sequences."""
        for sequence in [sequence for sequence in self.sequences if sequence.request_id == request_id]:
            self._remove(sequence)

    def generate(self, requests: Sequence[Request]) -> list[Answers]:
        """Run all requests together to their end: the answers of each, one per sample. ValueError if others are running."""
        if self.sequences:
            raise ValueError("other requests are under way: finish them with step, or cancel them")
        answers = {self.submit(request): Answers(Answer() for _ in range(request.num_images or 1)) for request in requests}
        tokens: dict[tuple[int, int], list[int]] = {}
        while self.sequences:
            for event in self.step():
                sample = event.request_id, event.sample_index
                answer = answers[event.request_id][event.sample_index]
                if isinstance(event, TokenEvent):
                    tokens.setdefault(sample, []).append(event.token)
                elif isinstance(event, ImageEvent | FinishEvent):
                    text = self.opened.tokenizer.decode(tokens.pop(sample, []))
                    answer.parts += [text] if text else []
                if isinstance(event, ImageEvent):
                    answer.parts.append(event.pixels)
                elif isinstance(event, FinishEvent):
                    answer.reason = event.reason
        return list(answers.values())

    def _to_segment(self, part: str | np.ndarray | Picture.Image) -> Text | Image:
        if isinstance(part, str):
            return Text(self.opened.tokenizer.encode(part))
        codec = self.opened.codec
        if not self.sizes:
            raise ValueError("this run does not support images")
        if isinstance(part, Picture.Image):
            part = to_pixels(part, self.sizes, codec.image_channels)
        if part.shape[1::-1] not in self.sizes or part.shape[2:] != (codec.image_channels,):
            raise ValueError(f"an image of shape {part.shape} is not supported; the run supports {self._size_list()}")
        return Image(codec.encode(part))

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The latent shape (Y, X) of an image of this (width, height)."""
        if not self.sizes:
            raise ValueError("this run does not support images")
        if size is None:
            return next(iter(self.vocabulary.boi))
        if size not in self.sizes:
            raise ValueError(f"the run cannot draw {size[0]}x{size[1]}; it can draw {self._size_list()}")
        return size[1] // self.opened.codec.downsampling, size[0] // self.opened.codec.downsampling

    def _size_list(self) -> str:
        return ", ".join(f"{x}x{y}" for x, y in self.sizes)

    def _after_text_pass(self, sequence: SequenceState, logits: torch.Tensor, events: list[Event]) -> None:
        """Fork the samples of a prompt. Then draw if the last token is a boi, else sample the next token."""
        shape = self.vocabulary.shape_of(int(sequence.phase.chunk.tokens[-1]))
        remaining = sequence.phase.remaining_samples if isinstance(sequence.phase, Prefill) else 0
        forks = []
        for sample_index in range(1, remaining + 1):
            slot = self.cache.fork(sequence.slot)
            image_cond_slot = None if sequence.image_cond_slot is None else self.cache.fork(sequence.image_cond_slot)
            forks.append(replace(
                sequence, sample_index=sample_index, phase=None, slot=slot, image_cond_slot=image_cond_slot, text_tokens=[],
            ))  # fmt: skip
        self.sequences += forks
        for sample in (sequence, *forks):
            sample.phase = None
            if shape is not None:
                self._begin_image(sample, shape)
            else:
                self._sample_token(sample, logits, events)

    def _sample_token(self, sequence: SequenceState, logits: torch.Tensor, events: list[Event]) -> None:
        vocabulary = self.vocabulary
        allowed = self.allowed_tokens if sequence.request.allow_images else self.allowed_text_tokens
        token = text_mode.sample_token(logits, allowed, sequence.generation, sequence.generator)
        if token in vocabulary.eos_ids:
            return self._finish(sequence, "eos", events)
        shape = vocabulary.shape_of(token)
        length = self.cache.lengths[sequence.slot] + 1 + (0 if shape is None else vocabulary.num_patches(shape) + 1)
        if sequence.num_sampled_tokens >= sequence.generation.max_tokens or length > self.max_positions:
            return self._finish(sequence, "length", events)
        sequence.num_sampled_tokens += 1
        chunk = EMPTY_CHUNK.append(token)
        sequence.phase = Decode(chunk, chunk if shape is not None and sequence.image_cond_slot is not None else None)
        if shape is None:
            sequence.text_tokens.append(token)
            text = self.opened.tokenizer.decode(sequence.text_tokens)
            new_text = "" if text.endswith("\ufffd") else text[sequence.num_characters_sent :]
            sequence.num_characters_sent += len(new_text)
            events.append(TokenEvent(sequence.request_id, sequence.sample_index, token, new_text))

    def _begin_image(self, sequence: SequenceState, shape: tuple[int, int]) -> None:
        generation, uncond_slot = sequence.generation, None
        branches = [Branch(sequence.slot, generation.guidance_scale)]
        if sequence.image_cond_slot is not None:
            branches.append(Branch(sequence.image_cond_slot, generation.image_guidance_scale))
        if sequence.image_cond_slot is not None or generation.guidance_scale != 1:
            uncond_slot = self.cache.fork(self._uncond_prefix(shape))
            branches.append(Branch(uncond_slot))
        sequence.text_tokens, sequence.num_characters_sent = [], 0
        seed = derive_seed(sequence.request.seed, sequence.sample_index, "image", sequence.num_images_begun)
        if self.uses_image_codes:
            image = chameleon.begin_image(shape, branches, generation, self.vocabulary, self.cache, seed)
        else:
            latent, diffusion = (self.run.model.latent_channels, *shape), self.run.diffusion
            image = image_mode.begin_image(latent, branches, generation, diffusion, self.latent_range, seed, self.device)
        sequence.phase = Draw(image, uncond_slot)
        sequence.num_images_begun += 1

    def _uncond_prefix(self, shape: tuple[int, int]) -> int:
        """The slot with the prefix of training without caption: bos and boi. Read once per latent shape."""
        if shape not in self.uncond_prefix_slots:
            self.uncond_prefix_slots[shape] = slot = self.cache.acquire()
            chunk = encode_document(Document(()), self.vocabulary, add_eos=False).append(self.vocabulary.boi[shape])
            text_mode.extend_cache(self.model, self.cache, [slot], [chunk], self.vocabulary)
        return self.uncond_prefix_slots[shape]

    def _after_image_pass(self, sequence: SequenceState, phase: Draw, completed_step: bool, events: list[Event]) -> None:
        image, codec = phase.image, self.opened.codec
        if completed_step and sequence.request.preview_every and image.step % sequence.request.preview_every == 0:
            events.append(PreviewEvent(sequence.request_id, sequence.sample_index, image.step, *image.preview(codec)))
        content = image.content()
        if content is None:
            return None
        if sequence.image_cond_slot is not None:
            # Remove this image: the slot keeps only the images of the prompt.
            self.cache.truncate(sequence.image_cond_slot, image.num_cached_positions)
        events.append(ImageEvent(sequence.request_id, sequence.sample_index, codec.decode(content)))
        if sequence.request.num_images is not None:
            return self._finish(sequence, "image", events)
        if phase.uncond_slot is not None:
            self.cache.release(phase.uncond_slot)
        # Of a latent no patch is in the cache yet: prefill all with t = 0, then eoi. Of codes only the last is missing.
        document = encode_document(Document((Image(content),)), self.vocabulary, add_eos=False)  # bos boi patches eoi
        sequence.phase = Prefill(document.part(1 + image.num_cached_positions))

    def _finish(self, sequence: SequenceState, reason: str, events: list[Event]) -> None:
        self._remove(sequence)
        events.append(FinishEvent(sequence.request_id, sequence.sample_index, reason))

    def _remove(self, sequence: SequenceState) -> None:
        self.sequences.remove(sequence)
        for slot in sequence.slots:
            self.cache.release(slot)


def open_run(path: str | Path, weights: str = "ema", device: str = "auto") -> Engine:
    """The engine of a run's folder, of an exported run, or of `owner/name` on the hub.

    `weights="raw"`: the weights that training continues from, instead of their moving average. An exported run has one of
    the two. OpenError when there is no such run.
    """
    return Engine(open_checkpoint(path, weights, device))
