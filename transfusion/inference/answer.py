"""What a request gets back: text and pictures in order, and how a notebook shows them."""

from dataclasses import dataclass, field
from html import escape

import numpy as np

from transfusion.page import data_uri

SHOWN = 160  # pixels that a picture in a notebook is wide


@dataclass
class Answer:
    """What one row wrote and drew, in order."""

    parts: list[str | np.ndarray] = field(default_factory=list)
    reason: str = ""

    def _repr_html_(self) -> str:
        """Pictures, and the text beside them."""
        parts = (
            f'<span style="white-space: pre-wrap">{escape(part)}</span>' if isinstance(part, str)
            else f'<img src="{data_uri(part)}" width="{SHOWN}" style="image-rendering: pixelated">' for part in self.parts
        )  # fmt: skip
        return f'<div style="display: flex; flex-wrap: wrap; gap: 8px; align-items: center">{"".join(parts)}</div>'


class Answers(list[Answer]):
    """All that a request gets, one answer per draw."""

    def _repr_html_(self) -> str:
        return "".join(answer._repr_html_() for answer in self)
