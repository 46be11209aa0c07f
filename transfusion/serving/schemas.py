"""The fields of requests: those of OpenAI's API, and a few extensions.

OpenAI's fields are supported, ignored because no answer depends on them (IGNORED), or not supported and accepted only with
a value that has no effect (NEUTRAL). Any other field is an error: a misspelt one would otherwise be ignored silently.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "parallel_tool_calls", "moderation",
}  # fmt: skip
MAX_ELEMENTS, MAX_FIELDS = 256, 64  # of one list, of one object


def limited_list(max_length: int, min_length: int = 0) -> tuple:
    """Annotations that check a list's length before its elements, and stop at the first wrong element: each costs time."""

    def check_length(value: Any) -> Any:
        if isinstance(value, list) and len(value) > max_length:
            raise ValueError(f"has {len(value):,} elements; at most {max_length:,} are allowed")
        return value

    return Field(min_length=min_length, fail_fast=True), BeforeValidator(check_length)


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (it has a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
StopWord = Annotated[str, Field(max_length=1000)]
BY_TYPE = Field(discriminator="type")
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]


class StrictModel(BaseModel):
    """Unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            raise ValueError(f"an object has {len(values):,} fields; at most {MAX_FIELDS} are allowed")
        return values


class RequestBase(StrictModel):
    """Fields of all requests."""

    NEUTRAL: ClassVar[dict[str, tuple]] = {}

    model: str | None = None
    n: PositiveInt | None = None
    seed: Int64 | None = None  # not set: random; the answer contains the seed
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, allowed in cls.NEUTRAL.items():
            if values.get(name) is not None and values[name] not in allowed:
                raise PydanticCustomError("unsupported", "{name} is not supported: leave it out", {"name": name})
        return {name: value for name, value in values.items() if name not in IGNORED and name not in cls.NEUTRAL}


class ImageOptions(StrictModel):
    """Extensions for drawing images. If not set, the run's defaults apply."""

    steps: PositiveInt | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    preview_every: PositiveInt | None = None  # denoising steps between two previews of an image


class TextOptions(StrictModel):
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: StopWord | Annotated[list[StopWord], *limited_list(4)] | None = None
    stream_options: "StreamOptions | None" = None


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class ImageURL(StrictModel):
    url: str
    detail: Any = None


class ImagePart(StrictModel):
    type: Literal["image_url"]
    image_url: ImageURL


class OutputPart(StrictModel):
    type: Literal["image"]
    image: Annotated[int, Field(ge=0)]


class Message(StrictModel):
    """A chat message. An assistant's message can be sent back unchanged: `parts` is the order of its text and images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, BY_TYPE]], *limited_list(MAX_ELEMENTS)] | None = None
    images: Annotated[list[ImagePart], *limited_list(MAX_ELEMENTS)] | None = None
    parts: Annotated[list[Annotated[TextPart | OutputPart, BY_TYPE]], *limited_list(MAX_ELEMENTS)] | None = None
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

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
    NEUTRAL = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,),
        "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},), "audio": (), "prediction": (), "reasoning_effort": ("none",),
        "verbosity": ("medium",), "web_search_options": (),
    }  # fmt: skip

    messages: Annotated[list[Message], *limited_list(MAX_ELEMENTS, 1)]
    modalities: Annotated[list[Literal["text", "image"]], *limited_list(MAX_ELEMENTS, 1)] | None = None
    max_completion_tokens: PositiveInt | None = None


class CompletionRequest(RequestBase, TextOptions):
    NEUTRAL = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (0,), "best_of": (1,),
        "echo": (False,), "suffix": ("",),
    }  # fmt: skip

    prompt: Text | Annotated[list[Text], *limited_list(MAX_ELEMENTS, 1)]


class ImageRequest(RequestBase, ImageOptions):
    NEUTRAL = {
        "response_format": ("b64_json",), "output_format": ("png",), "output_compression": (100,),
        "quality": ("auto", "standard"), "background": ("auto", "opaque"), "style": (), "mask": (), "input_fidelity": (),
        "svg": (), "complexity": (), "frame_count": (1,), "frame_duration_ms": (),
    }  # fmt: skip

    prompt: Text
    size: str | None = None  # "auto" or not set: the run's first
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
