"""Limits of one request and of the whole server. They are checked before any work is done."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """A request above a limit fails with one sentence, or waits."""

    max_sequences: int = 16  # Number of sequences generated at once; others wait.
    waiting: int = 64  # Number of requests that may wait; one more fails with 429.
    n: int = 8  # Largest n: choices or images of one request.
    steps: int = 1000  # Largest number of denoising steps of an image.
    tokens: int = 32_768  # Largest max_tokens. A sequence also ends at the run's data.seq_len.
    prompt_chars_per_position: int = 32  # Prompt limit in characters, divided by the run's data.seq_len.
    body_bytes: int = 8 * 2**20  # Largest body of a request, in bytes.
    pictures: int = 8  # Largest number of pictures in one request.
    pixels: int = 16_000_000  # Largest picture in a request, in pixels.
    connections: int = 1000  # Largest number of open connections; at most 3/4 of the files that the process may open.
    deadline: float = 300.0  # Seconds from a request's arrival to the end of its answer, or it fails with 504.
    client_timeout: float = 30.0  # Seconds for a client to send a header, or a body, or to receive a part of the answer.
    shutdown_grace: float = 30.0  # Seconds for running requests to finish after SIGTERM or Ctrl-C.

    def __post_init__(self):
        at_least_one = "max_sequences", "n", "steps", "tokens", "prompt_chars_per_position"
        for name in *at_least_one, "body_bytes", "pictures", "pixels", "connections":
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("waiting", "shutdown_grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"limits.{name} must be at least 0 and finite, not {getattr(self, name)}")
        for name in ("deadline", "client_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits.{name} must be above 0, not {getattr(self, name)}")

    @property
    def reserved_text_sequences(self) -> int:
        """Sequences reserved for text: a short text does not wait until a long drawing ends."""
        return self.max_sequences // 4

    @property
    def max_n(self) -> int:
        """The largest n: the images of one request start together, within the sequences not reserved for text."""
        return min(self.n, self.max_sequences - self.reserved_text_sequences)
