"""The answer to a request: text and images in order, with a notebook display."""

from dataclasses import dataclass, field
from html import escape

import numpy as np

from transfusion.page import data_uri

WIDTH = 160  # pixels of an image in a notebook


@dataclass
class Answer:
    """One sample: parts in order, text or pixels (Y, X, channels) uint8, and the reason of its end (see `FinishEvent`)."""

    parts: list[str | np.ndarray] = field(default_factory=list)
    reason: str = ""

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
