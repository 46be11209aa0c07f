"""What may be asked, in OpenAI's words and a few of our own.

What OpenAI's clients send, falls into three: what is done; what is ignored because no answer depends on it (IGNORED);
what would change the answer and cannot be done here, so that only its neutral value is taken (NEUTRAL). Anything else is
refused: a misspelt field would else do nothing, silently.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "parallel_tool_calls", "moderation",
}  # fmt: skip
ELEMENTS, KEYS = 256, 64  # at most, of one list and of one object


def few(most: int, least: int = 0) -> tuple:
    """What makes a list short, looked at before its elements are, and the first wrong one ends it: each would else cost."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > most:
            raise ValueError(f"has {len(value):,} elements; at most {most:,} are read")
        return value

    return Field(min_length=least, fail_fast=True), BeforeValidator(check)


def _whole_letters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a letter (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_whole_letters)]
LONG = Field(ge=-(2**63), lt=2**63)
BY_TYPE = Field(discriminator="type")
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Strict(BaseModel):
    """No field that is not known, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > KEYS:
            raise ValueError(f"an object has {len(values):,} fields; at most {KEYS} are read")
        return values


class RequestBase(Strict):
    """What all that can be asked share."""

    NEUTRAL: ClassVar[dict[str, tuple]] = {}

    model: str | None = None
    n: Positive | None = None
    seed: Annotated[int, LONG] | None = None  # none: one is drawn, and told in the answer
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, allowed in cls.NEUTRAL.items():
            if values.get(name) is not None and values[name] not in allowed:
                raise PydanticCustomError("unsupported", "{name} is not supported here: leave it out", {"name": name})
        return {name: value for name, value in values.items() if name not in IGNORED and name not in cls.NEUTRAL}


class ImageOptions(Strict):
    """Our own words for how an image is drawn; the run has defaults."""

    steps: Positive | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: Scale | None = None
    preview_every: Positive | None = None  # denoising steps after which an image on its way is shown


class TextOptions(Strict):
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | Annotated[list[str], *few(4)] | None = None
    stream_options: "StreamOptions | None" = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    url: str
    detail: Any = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class OutputPart(Strict):
    type: Literal["image"]
    image: Annotated[int, Field(ge=0)]


class Message(Strict):
    """What was said. An assistant's message may be given back as it came: `parts` keep the order of its text and images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, BY_TYPE]], *few(ELEMENTS)] | None = None
    images: Annotated[list[ImagePart], *few(ELEMENTS)] | None = None
    parts: Annotated[list[Annotated[TextPart | OutputPart, BY_TYPE]], *few(ELEMENTS)] | None = None
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @model_validator(mode="after")
    def _parts_show_what_is_there(self):
        for part in self.parts or ():
            if isinstance(part, OutputPart) and part.image >= len(self.images or ()):
                raise ValueError(f"parts show image {part.image}, and images hold {len(self.images or ())}")
        return self

    @property
    def said(self) -> list[TextPart | ImagePart]:
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

    messages: Annotated[list[Message], *few(ELEMENTS, least=1)]
    modalities: Annotated[list[Literal["text", "image"]], *few(ELEMENTS, least=1)] | None = None
    max_completion_tokens: Positive | None = None


class CompletionRequest(RequestBase, TextOptions):
    NEUTRAL = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (0,), "best_of": (1,),
        "echo": (False,), "suffix": ("",),
    }  # fmt: skip

    prompt: Text | Annotated[list[Text], *few(ELEMENTS, least=1)]


class ImageRequest(RequestBase, ImageOptions):
    NEUTRAL = {
        "response_format": ("b64_json",), "output_format": ("png",), "output_compression": (100,),
        "quality": ("auto", "standard"), "background": ("auto", "opaque"), "style": (), "mask": (), "input_fidelity": (),
        "svg": (), "complexity": (), "frame_count": (1,), "frame_duration_ms": (),
    }  # fmt: skip

    prompt: Text
    size: str | None = None  # "auto": the run's first
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
