"""Text mode, image mode, and the switch between them, for many sequences at once.

A sequence samples tokens until it samples a boi. Then it draws an image, which enters the cache with t = 0 (no noise),
followed by eoi, and continues with text (section 3). `submit` adds sequences, `step` advances all of them: one forward pass
for those that decode a token, one for those that prefill (a prompt, or an image that they have finished), and one per latent
shape for those that draw, conditional and unconditional together. The tokens of all are sampled together, too. Image codes
are sampled one by one (`chameleon`).

Guidance compares branches that differ in what they read before an image. A sequence may have slots for two of them besides
its own. One holds bos, the prompt's images and boi, like training documents whose text was dropped, if text and images have
different scales (`image_guidance_scale`). The other holds bos, the negative prompt and boi. They join the forward passes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
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
from transfusion.inference.request import (
    Event,
    FinishEvent,
    ImageEvent,
    PreviewEvent,
    PromptEvent,
    Request,
    TokenEvent,
    TokenLogprob,
    raise_if_failed,
)
from transfusion.inference.samplers import get_sampler
from transfusion.inference.state import Decode, Draw, Prefill, Sample, SequenceState
from transfusion.inference.text_stream import TextStream
from transfusion.seeding import derive_seed
from transfusion.sequence import EMPTY_CHUNK, Chunk, Document, Image, Text, encode_document

log = logging.getLogger(__name__)

INTERRUPTS = (KeyboardInterrupt, SystemExit)
MAX_LOGITS = 2**28  # float32 numbers of the logits of one forward pass: 1 GiB


class Engine:
    """Generates text and images with a run. `generate` runs requests to their end; `submit`, `step`, `cancel` stream."""

    def __init__(self, opened: OpenedRun):
        self.opened, self.device = opened, opened.device
        self.model, self.run, self.vocabulary = opened.model, opened.run, opened.vocabulary
        self.max_positions = self.run.data.seq_len  # positions: a sequence is never longer than the rows of training
        self.cache = Cache(self.run.model, self.device, opened.precision)
        self.allowed_tokens = text_mode.allowed_tokens(self.vocabulary).to(self.device)
        boi = torch.tensor([*self.vocabulary.boi.values()], dtype=torch.int64, device=self.device)  # (empty without images)
        self.allowed_text_tokens = self.allowed_tokens.index_fill(0, boi, False)
        codec = opened.codec
        self.uses_image_codes = self.vocabulary.num_image_codes > 0
        self.latent_range = () if self.uses_image_codes else tuple(
            torch.tensor(side, dtype=torch.float32, device=self.device).view(-1, 1, 1) for side in (codec.low, codec.high)
        )
        self.sizes = [(x * codec.downsampling, y * codec.downsampling) for y, x in self.vocabulary.boi]  # (width, height)
        self.sequences: list[SequenceState] = []
        self.num_requests = 0
        self.on_step: Callable[[int], None] = lambda num_finished: None  # see `generate`
        # Latent shape -> the keys and values of bos and boi.
        self.uncond_prefixes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

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
        return self._start(self._prepare(request))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every sequence by one forward pass of its phase. A sequence that reads a boi is denoised in the
        same step: for example, a prompt that ends with boi is prefilled and then denoised.

        A sequence that fails ends with a FinishEvent of reason "error"; the others continue as if it had not failed. An
        interrupt (Ctrl-C) removes all sequences, because it leaves them between two phases."""
        events: list[Event] = []
        try:
            with self.opened.lower_precision():
                for phase in (Decode, Prefill):
                    for sequences in self._reading_sequences(phase):
                        self._advance(sequences, self._read, self._after_text_pass, events)
                sampling = [sequence for sequence in self.sequences if isinstance(sequence.phase, Sample)]
                self._advance(sampling, self._sample_tokens, self._add_token, events)
                for sequences in self._drawing_sequences():
                    self._advance(sequences, self._draw, self._after_image_pass, events)
        except BaseException:
            for sequence in list(self.sequences):
                self._remove(sequence)
            raise
        return events

    def cancel(self, request_id: int) -> None:
        """Remove a request and its sequences."""
        for sequence in [sequence for sequence in self.sequences if sequence.request_id == request_id]:
            self._remove(sequence)

    def generate(self, requests: Sequence[Request]) -> list[Answers]:
        """Run all requests together to their end: the answers of each, one per sample. After each step it calls the engine's
        `on_step` with the number of answers which that step finished. ValueError, before anything is generated, if the run
        does not support one of the requests or others are running. RuntimeError if a sample fails."""
        if self.sequences:
            raise ValueError("other requests are under way: finish them with step, or cancel them")
        prepared = [self._prepare(request) for request in requests]
        answers: dict[int, Answers] = {}
        try:
            for request, sequence in zip(requests, prepared, strict=True):
                answers[self._start(sequence)] = Answers(Answer() for _ in range(request.num_images or 1))
            while self.sequences:
                events = self.step()
                for event in events:
                    raise_if_failed(event)
                    answers[event.request_id][event.sample_index].add(event)
                self.on_step(sum(isinstance(event, FinishEvent) for event in events))
        finally:
            for request_id in answers:
                self.cancel(request_id)
        return list(answers.values())

    # Requests

    def _prepare(self, request: Request) -> SequenceState:
        """The first sample of a request, without id and slots. ValueError if the run does not support the request."""
        if request.num_images is None and not request.parts:
            raise ValueError("the request is empty: give a part, or num_images")
        generation, vocabulary = request.generation or self.run.generation, self.vocabulary
        get_sampler(generation.sampler, self.run.diffusion.noise_schedule)
        parts = [self._to_pixels(part) if isinstance(part, np.ndarray | Picture.Image) else part for part in request.parts]
        segments = [self._to_segment(part) for part in parts]
        texts, images = ([segment for segment in segments if isinstance(segment, kind)] for kind in (Text, Image))
        prompts, scales = [segments], [generation.guidance_scale]
        # With equal scales the guidance formula reduces to plain classifier-free guidance, so the branch is skipped.
        if images and generation.image_guidance_scale not in (None, generation.guidance_scale):
            prompts.append(images)
            scales.append(generation.image_guidance_scale)
        if request.negative_prompt:
            self._check_negative_prompt(request, scales)
            prompts.append([self._to_segment(request.negative_prompt)])
            scales.append(1.0)
        chunks = [encode_document(Document(tuple(prompt)), vocabulary, add_eos=False) for prompt in prompts]
        if request.num_images is not None:
            shape = self._latent_shape(request.size)
            chunks = [chunk.append(vocabulary.boi[shape]) for chunk in chunks]
        self._check_length(request, chunks)
        phase = Prefill(tuple(chunks), (request.num_images or 1) - 1, request.prompt_logprobs)
        follows_text = any(text.tokens for text in texts)
        hashes = tuple(_hash(part) for part in parts if isinstance(part, np.ndarray))
        return SequenceState(0, request, generation, 0, phase, tuple(scales), follows_text, hashes)

    def _start(self, sequence: SequenceState) -> int:
        self.num_requests += 1
        sequence.request_id = self.num_requests
        self.sequences.append(sequence)
        try:
            for _ in sequence.scales:
                sequence.slots.append(self.cache.acquire())
        except BaseException:
            self._remove(sequence)
            raise
        return sequence.request_id

    def _to_pixels(self, part: np.ndarray | Picture.Image) -> np.ndarray:
        codec = self.opened.codec
        if not self.sizes:
            raise ValueError("this run does not support images")
        if isinstance(part, Picture.Image):
            part = to_pixels(part, self.sizes, codec.image_channels)
        if part.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8, from 0 to 255, not {part.dtype}")
        if part.shape[1::-1] not in self.sizes or part.shape[2:] != (codec.image_channels,):
            raise ValueError(f"an image of shape {part.shape} is not supported; the run supports {self._size_list()}")
        return part

    def _to_segment(self, part: str | Text | np.ndarray) -> Text | Image:
        if isinstance(part, np.ndarray):
            return Image(self.opened.codec.encode(part))
        if isinstance(part, str):
            return Text(self.opened.tokenizer.encode(part))
        unknown = [token for token in part.tokens if not 0 <= token < self.vocabulary.num_text_tokens]
        if unknown:
            last = self.vocabulary.num_text_tokens - 1
            raise ValueError(f"{unknown[0]} is not an id of the run's tokenizer: its ids are 0 to {last}")
        return Text(part.tokens)

    def _check_negative_prompt(self, request: Request, scales: Sequence[float]) -> None:
        if not self.sizes or (request.num_images is None and not request.allow_images):
            raise ValueError("negative_prompt has no effect: the request draws no images")
        if scales[-1] == 1:
            name = "guidance_scale" if len(scales) == 1 else "image_guidance_scale"
            raise ValueError(f"negative_prompt has no effect at {name} 1: use a scale above 1")

    def _check_length(self, request: Request, chunks: Sequence[Chunk]) -> None:
        """Every branch must have room for an image: for the one that is asked for, or after a negative prompt for any."""
        patches = self.vocabulary.num_patches
        if request.num_images is not None:
            length = max(map(len, chunks)) + patches(self._latent_shape(request.size))
        elif request.negative_prompt:
            length = max(len(chunks[0]), len(chunks[-1]) + 1 + max(map(patches, self.vocabulary.boi)))
        else:
            length = len(chunks[0])
        if length > self.max_positions:
            maximum = f"{self.max_positions} (data.seq_len)"
            raise ValueError(f"the request takes {length} positions; the run supports at most {maximum}")

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

    # Forward passes

    def _advance(
        self, sequences: list[SequenceState], forward: Callable[[list[SequenceState]], list],
        after: Callable[[SequenceState, Any, list[Event]], None], events: list[Event],
    ) -> None:  # fmt: skip
        """One forward pass for all, then the work of each one with its own result. If the pass fails, it is repeated for
        each sequence alone, so that only those end which fail alone."""
        if not sequences:
            return None
        lengths = list(self.cache.lengths)
        try:
            results = forward(sequences)
        except INTERRUPTS:
            raise
        except BaseException as error:  # a panic of a library in Rust, such as tokenizers, is no Exception
            self.cache.lengths = lengths
            if len(sequences) == 1:
                return self._end_with_error(sequences[0], error, events)
            log.warning("a forward pass of %d sequences failed; it is repeated for each one alone", len(sequences))
            for sequence in sequences:
                self._advance([sequence], forward, after, events)
            return None
        for sequence, result in zip(sequences, results, strict=True):
            with self._ending_on_error(sequence, events):
                after(sequence, result, events)

    @contextmanager
    def _ending_on_error(self, sequence: SequenceState, events: list[Event]) -> Iterator[None]:
        """An exception in this context ends the sequence."""
        try:
            yield
        except INTERRUPTS:
            raise
        except BaseException as error:  # see `_advance`
            self._end_with_error(sequence, error, events)

    def _end_with_error(self, sequence: SequenceState, error: BaseException, events: list[Event]) -> None:
        """End a sequence, and the samples that would have forked from it."""
        log.error("request %d failed", sequence.request_id, exc_info=error)
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        remaining = sequence.phase.remaining_samples if isinstance(sequence.phase, Prefill) else 0
        self._remove(sequence)
        for sample_index in (sequence.sample_index, *range(1, 1 + remaining)):
            events.append(FinishEvent(sequence.request_id, sample_index, "error", message))

    def _read(self, sequences: list[SequenceState]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Read the chunks of all. Returns for each the logits after its last position, (V,), and those after all of its
        positions, (n, V), if it needs them."""
        # All own slots first, then those of other branches: slots that were acquired together are then adjacent.
        order = [
            (sequence, n) for n in range(max(len(sequence.phase.chunks) for sequence in sequences))
            for sequence in sequences if n < len(sequence.phase.chunks)
        ]  # fmt: skip
        slots, chunks = [sequence.slots[n] for sequence, n in order], [sequence.phase.chunks[n] for sequence, n in order]
        num_logits = [sequence.num_logits for sequence in sequences]
        num_logits += [0] * (len(order) - len(sequences))  # those of other branches are not needed
        logits = text_mode.extend_cache(self.model, self.cache, slots, chunks, self.vocabulary, num_logits)  # (T, V)
        by_sequence = logits.split(num_logits[: len(sequences)])
        return [
            # A copy, so that the logits of a whole prompt are freed before the next token is sampled.
            (each[-1].clone(), each) if sequence.has_prompt_logprobs else (each[-1], None)
            for sequence, each in zip(sequences, by_sequence, strict=True)
        ]

    def _after_text_pass(
        self, sequence: SequenceState, logits: tuple[torch.Tensor, torch.Tensor | None], events: list[Event]
    ) -> None:
        """Fork the samples of a prompt. Then draw if the last token is a boi, else sample the next token in this step."""
        phase, (last_logits, prompt_logits) = sequence.phase, logits
        shape = self.vocabulary.shape_of(int(phase.chunks[0].tokens[-1]))
        if prompt_logits is not None:
            num_top = sequence.request.logprobs or 0
            logprobs = text_mode.prompt_logprobs(prompt_logits, phase.chunks[0], self.allowed_tokens, num_top)
            events.append(PromptEvent(sequence.request_id, sequence.sample_index, logprobs))
        samples, sequence.phase = [sequence], None
        for sample_index in range(1, 1 + (phase.remaining_samples if isinstance(phase, Prefill) else 0)):
            fork = replace(sequence, sample_index=sample_index, slots=[], held_events=[])
            self.sequences.append(fork)
            with self._ending_on_error(fork, events):
                for slot in sequence.slots:
                    fork.slots.append(self.cache.fork(slot))
                samples.append(fork)
        for sample in samples:
            with self._ending_on_error(sample, events):
                if shape is not None:
                    self._begin_image(sample, shape)
                else:
                    sample.phase = Sample(last_logits)

    def _sample_tokens(self, sequences: list[SequenceState]) -> list[tuple[int, TokenLogprob | None]]:
        """The next token of each, and its log probability if the request wants it."""
        logits = [sequence.phase.logits for sequence in sequences]
        allowed = [
            self.allowed_tokens if sequence.request.allow_images else self.allowed_text_tokens for sequence in sequences
        ]
        generations, seeds = zip(*((sequence.generation, sequence.token_seed) for sequence in sequences), strict=True)
        tokens = text_mode.sample_tokens(logits, generations, seeds, allowed)
        num_tops = [sequence.request.logprobs for sequence in sequences]
        return [
            (token, None if num_top is None else text_mode.token_logprobs(row[None], [token], allowed_ids, num_top)[0])
            for token, row, allowed_ids, num_top in zip(tokens, logits, allowed, num_tops, strict=True)
        ]

    def _add_token(self, sequence: SequenceState, sampled: tuple[int, TokenLogprob | None], events: list[Event]) -> None:
        token, logprob = sampled
        vocabulary, sequence.phase = self.vocabulary, None
        if token in vocabulary.eos_ids:
            return self._finish(sequence, "eos", events, logprob)
        shape = vocabulary.shape_of(token)
        length = self.cache.lengths[sequence.slots[0]] + 1 + (0 if shape is None else vocabulary.num_patches(shape) + 1)
        if sequence.num_sampled_tokens >= sequence.generation.max_tokens or length > self.max_positions:
            return self._finish(sequence, "length", events)
        sequence.num_sampled_tokens += 1
        chunk = EMPTY_CHUNK.append(token)
        if shape is not None:
            sequence.phase = Decode((chunk,) * len(sequence.slots))
            return self._end_text(sequence, events)
        sequence.phase = Decode((chunk,))
        sequence.text_stream = sequence.text_stream or TextStream(self.opened.tokenizer, sequence.follows_text)
        text = sequence.text_stream.add(token)
        sequence.held_events.append(TokenEvent(sequence.request_id, sequence.sample_index, token, text, logprob))
        if text:
            events += sequence.held_events
            sequence.held_events = []

    def _end_text(self, sequence: SequenceState, events: list[Event]) -> None:
        """Send the tokens whose text is held back: an image follows, or nothing."""
        if sequence.held_events:
            sequence.held_events[-1] = replace(sequence.held_events[-1], text=sequence.text_stream.flush())
            events += sequence.held_events
        sequence.follows_text |= sequence.text_stream is not None
        sequence.held_events, sequence.text_stream = [], None

    def _begin_image(self, sequence: SequenceState, shape: tuple[int, int]) -> None:
        generation, request = sequence.generation, sequence.request
        branches = [Branch(slot, scale) for slot, scale in zip(sequence.slots, sequence.scales, strict=True)]
        if not request.negative_prompt and (len(branches) > 1 or generation.guidance_scale != 1):
            sequence.uncond_slot = self._acquire_uncond_slot(shape)
            branches.append(Branch(sequence.uncond_slot))
        # The pictures of the prompt are part of the seed: an edit must not start from the noise of the image that it edits.
        parts = (request.seed, sequence.sample_index, "image", sequence.num_images_begun, *sequence.picture_hashes)
        if self.uses_image_codes:
            image = chameleon.begin_image(shape, branches, generation, self.vocabulary, self.cache, derive_seed(*parts))
        else:
            latent, diffusion = (self.run.model.latent_channels, *shape), self.run.diffusion
            image = image_mode.begin_image(
                latent, branches, generation, diffusion, self.latent_range, derive_seed(*parts), self.device
            )
        sequence.phase = Draw(image)
        sequence.num_images_begun += 1

    def _acquire_uncond_slot(self, shape: tuple[int, int]) -> int:
        """A slot with the prefix of training without caption: bos and boi. They are read once per latent shape."""
        if shape in self.uncond_prefixes:
            return self.cache.acquire_with(*self.uncond_prefixes[shape])
        chunk = encode_document(Document(()), self.vocabulary, add_eos=False).append(self.vocabulary.boi[shape])
        slot = self.cache.acquire()
        try:
            text_mode.extend_cache(self.model, self.cache, [slot], [chunk], self.vocabulary)
        except BaseException:
            self.cache.release(slot)
            raise
        keys, values = self.cache.content(slot)
        self.uncond_prefixes[shape] = keys.clone(), values.clone()
        return slot

    def _reading_sequences(self, phase: type[Prefill] | type[Decode]) -> list[list[SequenceState]]:
        """Those in this phase, in groups: one forward pass each. Only prompts with log probabilities need several."""
        groups: list[list[SequenceState]] = []
        num_logits = 0
        for sequence in self.sequences:
            if isinstance(sequence.phase, phase):
                num_logits += sequence.num_logits * self.vocabulary.size
                if not groups or num_logits > MAX_LOGITS:
                    groups.append([])
                    num_logits = sequence.num_logits * self.vocabulary.size
                groups[-1].append(sequence)
        return groups

    def _drawing_sequences(self) -> list[list[SequenceState]]:
        """Those that draw, by latent shape: one forward pass each. Codes of all shapes share one."""
        by_shape: dict[tuple[int, int] | None, list[SequenceState]] = {}
        for sequence in self.sequences:
            if isinstance(sequence.phase, Draw):
                by_shape.setdefault(None if self.uses_image_codes else sequence.phase.image.shape, []).append(sequence)
        return list(by_shape.values())

    def _draw(self, sequences: list[SequenceState]) -> list:
        """What each image continues with: its next latents, or its next code."""
        images = [sequence.phase.image for sequence in sequences]
        if self.uses_image_codes:
            return chameleon.sample_codes(self.model, self.cache, images, self.vocabulary)
        return image_mode.denoise(self.model, self.cache, images)

    def _after_image_pass(self, sequence: SequenceState, result: tuple, events: list[Event]) -> None:
        image, codec, request = sequence.phase.image, self.opened.codec, sequence.request
        step = image.step
        image.advance(result)
        if image.step > step and request.preview_every and image.step % request.preview_every == 0:
            events.append(PreviewEvent(sequence.request_id, sequence.sample_index, image.step, *image.preview(codec)))
        content = image.content()
        if content is None:
            return None
        events.append(ImageEvent(sequence.request_id, sequence.sample_index, codec.decode(content)))
        if request.num_images is not None:
            return self._finish(sequence, "image", events)
        for slot in sequence.slots[1:]:  # they keep only their prompts
            self.cache.truncate(slot, image.num_cached_positions)
        if sequence.uncond_slot is not None:
            self.cache.release(sequence.uncond_slot)
            sequence.uncond_slot = None
        # Of a latent no patch is in the cache yet: prefill all with t = 0, then eoi. Of codes only the last is missing.
        document = encode_document(Document((Image(content),)), self.vocabulary, add_eos=False)  # bos boi patches eoi
        sequence.phase = Prefill((document.part(1 + image.num_cached_positions),))

    def _finish(
        self, sequence: SequenceState, reason: str, events: list[Event], logprob: TokenLogprob | None = None
    ) -> None:
        self._end_text(sequence, events)
        self._remove(sequence)
        events.append(FinishEvent(sequence.request_id, sequence.sample_index, reason, logprob=logprob))

    def _remove(self, sequence: SequenceState) -> None:
        self.sequences.remove(sequence)
        for slot in sequence.all_slots:
            self.cache.release(slot)


def _hash(pixels: np.ndarray) -> str:
    return blake2b(pixels.tobytes(), digest_size=16).hexdigest()


def open_run(
    place: str | Path, weights: str = "ema", device: str = "auto", *, revision: str | None = None,
    local_files_only: bool = False,
) -> Engine:  # fmt: skip
    """The engine of a run's folder, of an exported run, or of `owner/name` on the hub.

    weights: "raw" are the weights that training continues from, "ema" their moving average; an exported run has one of the
    two. revision: branch, tag or commit on the hub; default main. local_files_only: do not use the network. OpenError when
    there is no such run.
    """
    return Engine(open_checkpoint(place, weights, device, revision=revision, local_files_only=local_files_only))
