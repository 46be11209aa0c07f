"""What the engine is asked to do, and the events that it answers with."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Picture

from transfusion.config import GenerationConfig
from transfusion.fields import short_repr
from transfusion.sequence import Text

Part = str | Text | np.ndarray | Picture.Image


@dataclass(frozen=True)
class Request:
    """A prompt and what to generate from it. ValueError when a field has a wrong type or is out of range.

    parts: the prompt in order: text (str, or `Text` with the tokenizer's ids) and pictures (PIL, or (Y, X, channels) uint8
    of a size that the run supports). One str is one part.
    num_images: this many samples of one image each (boi is forced), of `size` (width, height) in pixels. Not set: one
    sample of free text, which ends with eos and draws where the model samples a boi, unless allow_images is False.
    negative_prompt: text (str or `Text`) in place of the empty prompt in the unconditional branch of guidance.
    preview_every: denoising steps (or codes) between two PreviewEvents; 0: no previews.
    logprobs: TokenEvents have the log probability of their token, and this many alternatives. None: they have none.
    prompt_logprobs: a PromptEvent has the log probabilities of the prompt, each with `logprobs` alternatives.
    """

    parts: Sequence[Part] = ()
    num_images: int | None = None
    seed: int = 0
    generation: GenerationConfig | None = None  # default: the run's
    size: tuple[int, int] | None = None  # default: the run's first
    preview_every: int = 0
    allow_images: bool = True
    negative_prompt: str | Text | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self):
        parts = (self.parts,) if isinstance(self.parts, Part) else self.parts
        if not isinstance(parts, Sequence) or not all(isinstance(part, Part) for part in parts):
            raise ValueError(f"parts must be texts and pictures, not {short_repr(self.parts)}")
        if not isinstance(self.generation, GenerationConfig | None):
            fix = "engine.make_generation_config(...)"
            raise ValueError(f"generation must be a GenerationConfig ({fix} makes one), not {short_repr(self.generation)}")
        if not isinstance(self.negative_prompt, str | Text | None):
            raise ValueError(f"negative_prompt must be a text, not {short_repr(self.negative_prompt)}")
        negative = _with_ids(self.negative_prompt) if isinstance(self.negative_prompt, Text) else self.negative_prompt
        size = self.size
        if size is not None:
            if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
                raise ValueError(f"size must be (width, height), not {short_repr(size)}")
            size = tuple(_whole_number("size", side, 1) for side in size)
        values = {
            "parts": tuple(_with_ids(part) if isinstance(part, Text) else part for part in parts),
            "negative_prompt": None if negative in ("", Text(())) else negative, "size": size,
            "seed": _whole_number("seed", self.seed),
            "preview_every": _whole_number("preview_every", self.preview_every, 0),
            **{name: _truth_value(name, getattr(self, name)) for name in ("allow_images", "prompt_logprobs")},
        }  # fmt: skip
        for name, minimum in (("num_images", 1), ("logprobs", 0)):
            if getattr(self, name) is not None:
                values[name] = _whole_number(name, getattr(self, name), minimum)
        if size is not None and self.num_images is None:
            raise ValueError("size has no effect without num_images")
        if self.num_images is not None and not self.allow_images:
            raise ValueError("allow_images is False, and num_images asks for images: leave one of them out")
        for name, value in values.items():
            object.__setattr__(self, name, value)


class TokenLogprob(NamedTuple):
    """A token and its log probability (nats): log softmax over all logits, without temperature and top_p.

    top: the most likely of the ids that may be sampled, as (id, log probability), the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptEvent:
    """The prompt is read. One entry for each of its positions after bos; None for patches, eoi and a forced boi."""

    request_id: int
    sample_index: int
    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class TokenEvent:
    """A sampled text token. `text` is what it adds to the text of the sample. Tokens of an incomplete character are held
    back until it is complete, or its text ends; the text is then in the event of the last one."""

    request_id: int
    sample_index: int
    token: int
    text: str
    logprob: TokenLogprob | None = None


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
    """The end of a sample. reason: "eos", "image" (the requested one is finished), "length", or "error": the sample failed;
    `message` is one line. logprob: of the eos that ends it, if the request wants log probabilities."""

    request_id: int
    sample_index: int
    reason: str
    message: str = ""
    logprob: TokenLogprob | None = None


Event = PromptEvent | TokenEvent | PreviewEvent | ImageEvent | FinishEvent


def raise_if_failed(event: Event) -> None:
    """RuntimeError for the end of a sample that failed."""
    if isinstance(event, FinishEvent) and event.reason == "error":
        raise RuntimeError(f"request {event.request_id} failed: {event.message}")


def _with_ids(text: Text) -> Text:
    """The same object if its ids are plain numbers already: requests for several answers share their prompt."""
    try:
        ids = tuple(map(index, text.tokens))
    except TypeError:
        raise ValueError(f"the tokens of a Text must be whole numbers, not {short_repr(text.tokens)}") from None
    is_plain = type(text.tokens) is tuple and all(type(token) is int for token in text.tokens)
    return text if is_plain else Text(ids)


def _whole_number(name: str, value: Any, minimum: int | None = None) -> int:
    """As a Python int, from numpy's too."""
    try:
        number = None if isinstance(value, bool | np.bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, not {short_repr(value)}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {number}")
    return number


def _truth_value(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool):
        raise ValueError(f"{name} must be True or False, not {short_repr(value)}")
    return bool(value)
