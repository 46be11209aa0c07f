"""Limits of one request and of the whole server. They are checked before any work is done."""

from dataclasses import dataclass
from typing import Annotated

from transfusion.fields import MAX_SECONDS, Config, NonNegativeInt, PositiveInt, Range

Seconds = Annotated[float, Range(above=0, limit=MAX_SECONDS)]


@dataclass(frozen=True)
class Limits(Config, part="limits."):
    """A request above a limit fails with one sentence, or waits."""

    max_sequences: PositiveInt = 16  # Number of sequences generated at once; others wait.
    waiting: NonNegativeInt = 64  # Number of requests that may wait; one more fails with 429.
    n: PositiveInt = 8  # Largest n: choices or images of one request.
    steps: PositiveInt = 1000  # Largest number of denoising steps of an image.
    tokens: PositiveInt = 32_768  # Largest max_tokens. A sequence also ends at the run's data.seq_len.
    prompt_chars_per_position: PositiveInt = 32  # Prompt limit in characters, divided by the run's data.seq_len.
    body_bytes: PositiveInt = 8 * 2**20  # Largest body of a request, in bytes.
    pictures: PositiveInt = 8  # Largest number of pictures in one request.
    pixels: PositiveInt = 16_000_000  # Largest picture in a request, in pixels.
    # Largest number of open connections; at most 3/4 of the files that the process may open.
    connections: PositiveInt = 1000
    deadline: Seconds = 300.0  # Seconds from a request's arrival to the end of its answer, or it fails with 504.
    client_timeout: Seconds = 30.0  # Seconds for a client to send a header, or a body, or to receive a part of the answer.
    # Seconds for running requests to finish after SIGTERM or Ctrl-C.
    shutdown_grace: Annotated[float, Range(at_least=0, limit=MAX_SECONDS)] = 30.0

    @property
    def reserved_text_sequences(self) -> int:
        """Sequences reserved for text: a short text does not wait until a long drawing ends."""
        return self.max_sequences // 4

    @property
    def max_n(self) -> int:
        """The largest n: the images of one request start together, within the sequences not reserved for text."""
        return min(self.n, self.max_sequences - self.reserved_text_sequences)
