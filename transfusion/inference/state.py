"""The state of a sample between two steps of the engine."""

from dataclasses import dataclass, field

from torch import Tensor

from transfusion.config import GenerationConfig
from transfusion.inference.chameleon import CodeImageState
from transfusion.inference.image_mode import LatentImageState
from transfusion.inference.request import Request, TokenEvent
from transfusion.inference.text_stream import TextStream
from transfusion.seeding import derive_seed
from transfusion.sequence import Chunk


@dataclass(frozen=True)
class Prefill:
    """The positions to read: a prompt or a finished image, and the prompts of the sequence's other slots."""

    chunks: tuple[Chunk, ...]  # for the first slots of the sequence
    remaining_samples: int = 0  # samples that fork from this prompt when it is read
    has_logprobs: bool = False  # of the prompt, for a PromptEvent


@dataclass(frozen=True)
class Decode:
    """Next input: the last sampled token, one position. All slots read a boi, other tokens only the sequence's own."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Sample:
    """The next token is sampled from these logits."""

    logits: Tensor  # (V,)


@dataclass(frozen=True)
class Draw:
    """An unfinished image."""

    image: LatentImageState | CodeImageState


@dataclass(eq=False)
class SequenceState:
    """One sample of a request: its phase, its cache slots, and the text that it adds."""

    request_id: int
    request: Request
    generation: GenerationConfig
    sample_index: int
    phase: Prefill | Decode | Sample | Draw | None  # None only while a forward pass is evaluated
    scales: tuple[float, ...]  # the weight in guidance of each of `slots`
    follows_text: bool  # is there text before its next text?
    picture_hashes: tuple[str, ...]  # of the prompt
    slots: list[int] = field(default_factory=list)  # its own, then those of other branches with a prompt
    uncond_slot: int | None = None  # a copy of bos and boi, while it draws
    num_sampled_tokens: int = 0
    num_images_begun: int = 0
    held_events: list[TokenEvent] = field(default_factory=list)  # of tokens whose text is held back
    text_stream: TextStream | None = None

    @property
    def token_seed(self) -> int:
        """The seed of its next token."""
        return derive_seed(self.request.seed, self.sample_index, "text", self.num_sampled_tokens)

    @property
    def all_slots(self) -> list[int]:
        return self.slots + ([] if self.uncond_slot is None else [self.uncond_slot])

    @property
    def has_prompt_logprobs(self) -> bool:
        """Does the next forward pass give the log probabilities of the prompt?"""
        return isinstance(self.phase, Prefill) and self.phase.has_logprobs

    @property
    def num_logits(self) -> int:
        """Positions of the next text pass whose logits are needed: the last one, or all of a prompt."""
        return len(self.phase.chunks[0]) if self.has_prompt_logprobs else 1
