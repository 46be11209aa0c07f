"""What one request may ask for, and what the server does at once. Checked before any work is done."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is more is refused with one sentence, or waits."""

    rows: int = 16  # answers that are written and drawn at once; the rest wait
    waiting: int = 64  # requests that may wait; one more is told to come back later (429)
    n: int = 8  # answers to one request
    steps: int = 1000  # denoising steps of an image
    tokens: int = 32_768  # max_tokens; a row ends at the run's own length in any case
    prompt_chars_per_position: int = 32  # of a request's text, for each position in a row of the run
    body_bytes: int = 32 * 2**20  # of a request
    pictures: int = 8  # in one request
    pixels: int = 16_000_000  # of a picture that is sent
    deadline: float = 300.0  # seconds from a request's arrival to the end of its answer (504)
    client_timeout: float = 30.0  # seconds that a client may take to send its request, or to take the next part of an answer
    shutdown_grace: float = 30.0  # seconds that answers under way are given when the server is told to stop

    def __post_init__(self):
        for name in ("rows", "n", "steps", "tokens", "prompt_chars_per_position", "body_bytes", "pictures", "pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("waiting", "shutdown_grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"limits.{name} must be a number that is not negative, not {getattr(self, name)}")
        for name in ("deadline", "client_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits.{name} must be above 0, not {getattr(self, name)}")

    @property
    def text_rows(self) -> int:
        """Rows that images never take, so that a short text is not kept waiting until a long drawing ends."""
        return self.rows // 4

    @property
    def answers(self) -> int:
        """The largest n: what is drawn for one request begins together."""
        return min(self.n, self.rows - self.text_rows)
