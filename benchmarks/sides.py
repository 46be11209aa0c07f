"""What both sides of a comparison share: the work, and how a process is told to do it. Needs nothing but Python.

One line asks ("train 3"), one line of JSON answers; so processes of different packages can take turns, and each has its
own memory.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SEQUENCES = 16  # in a step, each of them text, image, text, image, text
TEXTS = 32, 16, 16  # tokens
VOCABULARY = 256
CHANNELS, SIDE = 16, 8  # of a latent; every latent pixel is a patch
POSITIONS = SEQUENCES * (sum(TEXTS) + 2 * SIDE**2)  # in a step; markers do not count
PROMPT = 32  # tokens before the image that is drawn
RATE, CLIP = 3e-4, 1.0


def obey(verbs: Mapping[str, Callable[..., object]]) -> None:
    """Do what each line of the input says, until it ends. What a library prints goes where errors go."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        verb, *numbers = line.split()
        print(json.dumps(verbs[verb](*map(int, numbers))), file=answers, flush=True)


class Worker:
    """A process that obeys. Close it, or use it in a `with`."""

    def __init__(self, command: Sequence[str], threads: int):
        self.command, self.errors = command, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ask(self, line: str):
        """Its answer. ValueError with the last thing it said, when it has stopped instead."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # there will be no answer
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["nothing"]
            raise ValueError(f"{' '.join(self.command)} has stopped; the last that it said: {said[-1]}")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # nothing that it holds is worth keeping
        self.process.communicate()
        self.errors.close()


def peak_memory() -> float | None:
    """MiB that this process has held at most. None where there is no /proc.

    (getrusage's maximum would count what the process held that started this one.)
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None
