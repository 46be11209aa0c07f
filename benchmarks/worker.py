"""Worker processes of the comparison: the workload of both implementations, and the protocol. Needs only Python.

A command is one line ("train 3"), an answer is one line of JSON. Each implementation has its own process, so that they can
take turns and their memory is measured separately.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

BATCH_SIZE = 16  # sequences per step, each of them text, image, text, image, text
TEXT_LENGTHS = 32, 16, 16  # tokens
VOCAB_SIZE = 256
CHANNELS, LATENT_SIZE = 16, 8  # every latent pixel is one patch
POSITIONS = BATCH_SIZE * (sum(TEXT_LENGTHS) + 2 * LATENT_SIZE**2)  # per step, without markers
PROMPT_LENGTH = 32  # tokens before the image that is drawn
LEARNING_RATE, MAX_GRAD_NORM = 3e-4, 1.0


def serve_commands(functions: Mapping[str, Callable[..., object]]) -> None:
    """Answer each line of standard input until it ends. Other output of the process goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(functions[name](*map(int, numbers))), file=answers, flush=True)


class Worker:
    """A process that runs `serve_commands`. A context manager: it kills the process on exit."""

    def __init__(self, command: Sequence[str], threads: int):
        self.command, self.errors = command, tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ask(self, line: str):
        """Send a command and return its answer. ValueError with the last line of standard error if the process has ended."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; the empty answer below reports it
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["no output"]
            raise ValueError(f"{' '.join(self.command)} has ended; the last line of its output: {lines[-1]}")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # it has no state to save
        self.process.communicate()
        self.errors.close()


def peak_memory_mib() -> float | None:
    """The peak resident memory of this process in MiB; None without /proc.

    getrusage's maximum is not used: it includes the memory of the parent process before exec.
    """
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(match[1]) / 1024 if match else None
