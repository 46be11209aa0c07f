"""The answer to a request: text and images in order, with a notebook display."""

from dataclasses import dataclass, field
from html import escape

import numpy as np

from transfusion.inference.request import Event, FinishEvent, ImageEvent, TokenEvent
from transfusion.page import data_uri

WIDTH = 160  # pixels of an image in a notebook
REPR_CHARS = 60  # of a text in repr


@dataclass(repr=False)
class Answer:
    """One sample: parts in order, text or pixels (Y, X, channels) uint8, and the reason of its end (see `FinishEvent`)."""

    parts: list[str | np.ndarray] = field(default_factory=list)
    reason: str = ""

    def add(self, event: Event) -> None:
        """Add the text or image of an event of this sample, or the reason of its end."""
        match event:
            case TokenEvent(text=text) if text:
                if self.parts and isinstance(self.parts[-1], str):
                    self.parts[-1] += text
                else:
                    self.parts.append(text)
            case ImageEvent():
                self.parts.append(event.pixels)
            case FinishEvent():
                self.reason = event.reason

    def __repr__(self) -> str:
        parts = (
            f"<image {part.shape[1]}x{part.shape[0]}>" if isinstance(part, np.ndarray)
            else repr(part if len(part) <= REPR_CHARS else f"{part[:REPR_CHARS]}...") for part in self.parts
        )  # fmt: skip
        return f"Answer([{', '.join(parts)}], {self.reason!r})"

    def _repr_html_(self) -> str:
        """Text and images side by side."""
        parts = (
            f'<span style="white-space: pre-wrap">{escape(part)}</span>' if isinstance(part, str)
            else f'<img src="{data_uri(part)}" width="{WIDTH}" style="image-rendering: pixelated">' for part in self.parts
        )  # fmt: skip
        return f'<div style="display: flex; flex-wrap: wrap; gap: 8px; align-items: center">{"".join(parts)}</div>'


class Answers(list[Answer]):
    """All answers to a request, one per sample."""

    def _repr_html_(self) -> str:
        return "".join(answer._repr_html_() for answer in self)
