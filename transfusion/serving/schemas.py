"""The fields of requests: those of OpenAI's API, and a few extensions.

A field is used (it is in a model below), IGNORED because no answer depends on it, or UNSUPPORTED and accepted only with
one of the values that have no effect. null is the same as no field. Any other field is an error: a misspelt one would
otherwise be ignored silently.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from transfusion.serving.errors import show

MAX_ELEMENTS, MAX_FIELDS = 256, 64  # of one list, of one object
MAX_TOP_LOGPROBS = 20


def limited_list(max_length: int, min_length: int = 0) -> tuple:
    """Annotations that check a list's length before its elements, and stop at the first wrong element: each costs time."""

    def check_length(value: Any) -> Any:
        if isinstance(value, list) and len(value) > max_length:
            raise ValueError(f"has {len(value):,} elements; at most {max_length:,} are allowed")
        return value

    return Field(min_length=min_length, fail_fast=True), BeforeValidator(check_length)


def one_option(name: str, other: str) -> Callable:
    """A validator of a model in which `other` is another name of the field `name`: both may be sent if they are equal."""

    def merge(model: BaseModel) -> BaseModel:
        value, other_value = getattr(model, name), getattr(model, other)
        if None not in (value, other_value) and value != other_value:
            context = {"field": name, "other": other}
            raise PydanticCustomError("field", "and {other} are the same option: send one of them", context)
        setattr(model, name, other_value if value is None else value)
        return model

    return model_validator(mode="after")(merge)


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (it has a lone surrogate)") from None
    return text


def _read_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or a list of them, each a text or token ids."""
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    prompts = [value] if is_one else value
    if len(prompts) > MAX_ELEMENTS:
        raise ValueError(f"has {len(prompts):,} elements; at most {MAX_ELEMENTS} are allowed")
    if not prompts:
        raise ValueError("is empty: send at least one prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_unicode(prompt)
        elif not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
            raise ValueError("must be a text, a list of token ids, or a list of several of either")
    return prompts


Text = Annotated[str, AfterValidator(_check_unicode)]
StopWord = Annotated[str, Field(max_length=1000)]
BY_TYPE = Field(discriminator="type")
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NumTopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]


class StrictModel(BaseModel):
    """Unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[dict[str, tuple]] = {}  # field -> its values without effect

    @model_validator(mode="before")
    @classmethod
    def _read_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_FIELDS:
            raise ValueError(f"an object has {len(values):,} fields; at most {MAX_FIELDS} are allowed")
        values = {name: value for name, value in values.items() if value is not None and name not in cls.IGNORED}
        for name in [name for name in cls.UNSUPPORTED if name in values]:
            value, harmless = values.pop(name), cls.UNSUPPORTED[name]
            if value not in harmless:
                fix = f", or send {' or '.join(map(json.dumps, harmless))}" if harmless else ""
                context = {"field": name, "value": f"{show(value)} ".lstrip(), "fix": fix}
                raise PydanticCustomError("field", "{value}is not supported: leave it out{fix}", context)
        return values


class RequestBase(StrictModel):
    """Fields of all requests."""

    IGNORED = frozenset({
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention",
    })  # fmt: skip

    model: str | None = None
    n: PositiveInt | None = None
    seed: Int64 | None = None  # not set: random; the answer contains the seed
    stream: bool | None = None


class ImageOptions(StrictModel):
    """Extensions for drawing images. If not set, the run's defaults apply."""

    steps: PositiveInt | None = None
    num_inference_steps: PositiveInt | None = None  # another name of steps
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    negative_prompt: Text | None = None  # takes the place of the empty prompt in guidance
    preview_every: PositiveInt | None = None  # denoising steps between two previews of an image

    merge_steps = one_option("steps", "num_inference_steps")


class TextOptions(StrictModel):
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: StopWord | Annotated[list[StopWord], *limited_list(4)] | None = None
    stream_options: "StreamOptions | None" = None


class StreamOptions(StrictModel):
    IGNORED = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class ImageURL(StrictModel):
    IGNORED = frozenset({"detail", "format"})

    url: str


class ImagePart(StrictModel):
    IGNORED = frozenset({"index"})

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


class OutputPart(StrictModel):
    type: Literal["image"]
    image: Annotated[int, Field(ge=0)]


class Message(StrictModel):
    """A chat message. An assistant's message can be sent back unchanged: `parts` is the order of its text and images."""

    IGNORED = frozenset({"name", "refusal", "annotations", "reasoning_content", "provider_specific_fields"})
    UNSUPPORTED = {"tool_calls": ([],), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, BY_TYPE]], *limited_list(MAX_ELEMENTS)] | None = None
    images: Annotated[list[ImagePart], *limited_list(MAX_ELEMENTS)] | None = None
    parts: Annotated[list[Annotated[TextPart | OutputPart, BY_TYPE]], *limited_list(MAX_ELEMENTS)] | None = None

    @model_validator(mode="after")
    def _check_parts(self):
        for part in self.parts or ():
            if isinstance(part, OutputPart) and part.image >= len(self.images or ()):
                raise ValueError(f"parts has image {part.image}, but images has only {len(self.images or ())}")
        return self

    @property
    def content_parts(self) -> list[TextPart | ImagePart]:
        """Text and images in order."""
        if self.parts is not None:
            return [self.images[part.image] if isinstance(part, OutputPart) else part for part in self.parts]
        if isinstance(self.content, str):
            content = [TextPart(type="text", text=self.content)]
        else:
            content = self.content or []
        return [*content, *(self.images or ())]


class ChatRequest(RequestBase, TextOptions, ImageOptions):
    IGNORED = RequestBase.IGNORED | {"parallel_tool_calls"}
    UNSUPPORTED = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
        "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},), "audio": (), "prediction": (), "reasoning_effort": ("none",),
        "verbosity": ("medium",), "web_search_options": (), "moderation": (),
    }  # fmt: skip

    messages: Annotated[list[Message], *limited_list(MAX_ELEMENTS, 1)]
    modalities: Annotated[list[Literal["text", "image"]], *limited_list(MAX_ELEMENTS, 1)] | None = None
    max_completion_tokens: PositiveInt | None = None  # another name of max_tokens
    logprobs: Annotated[bool, BeforeValidator(lambda value: bool(value) if value == 0 else value)] = False
    top_logprobs: NumTopLogprobs = 0

    merge_max_tokens = one_option("max_tokens", "max_completion_tokens")

    @model_validator(mode="after")
    def _check_top_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("field", "needs logprobs: true", {"field": "top_logprobs"})
        return self


class CompletionRequest(RequestBase, TextOptions):
    UNSUPPORTED = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
    }  # fmt: skip

    prompt: Annotated[Any, PlainValidator(_read_prompts)]  # as list[str | list[int]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: only the prompt's echo and log probabilities
    echo: bool = False
    logprobs: Annotated[NumTopLogprobs | None, BeforeValidator(lambda value: None if value is False else value)] = None
    best_of: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_values(self):
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("field", "must be at least 1, or 0 with echo: true", {"field": "max_tokens"})
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError("field", "must be equal to n: every choice is returned", {"field": "best_of"})
        return self


class ImageRequest(RequestBase, ImageOptions):
    UNSUPPORTED = {
        "quality": ("auto", "standard"), "background": ("auto", "opaque"), "style": ("vivid",), "mask": (),
        "moderation": ("auto", "low"), "input_fidelity": ("low",), "svg": (), "complexity": (), "frame_count": (1, "1"),
        "frame_duration_ms": (),
    }  # fmt: skip

    prompt: Text
    size: str | None = None  # "auto" or not set: the run's first
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"  # url: a data: URL
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100  # the quality of jpeg and webp

    @model_validator(mode="after")
    def _check_compression(self):
        if self.output_format == "png" and self.output_compression != 100:
            reason = "has no effect on png, which is lossless: leave it out, or set output_format to jpeg or webp"
            raise PydanticCustomError("field", reason, {"field": "output_compression"})
        return self
