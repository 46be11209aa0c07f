"""This package beside transfusion-pytorch, on the same work in the same call: training steps, drawings, memory. On the CPU.

Each side is a process of its own that works when it is told to; they take turns. Ours has the peer's width, or as many
parameters as the peer. `python -m benchmarks.compare WIDTH HIDDEN` is one such process.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks import sides
from benchmarks.measuring import ROOT, Figure, Setting, memory
from benchmarks.sides import CHANNELS, PROMPT, SEQUENCES, SIDE, TEXTS, VOCABULARY, Worker
from transfusion.checkpoint.open import OpenedRun
from transfusion.codecs.pixels import Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, GenerationConfig, ModelConfig, Run, TrainingConfig
from transfusion.data.loader import BEGINNING, LoaderState
from transfusion.inference.engine import Engine, Request
from transfusion.model.transfusion import count_parameters
from transfusion.parallel import pick_device
from transfusion.sequence import Batch, Chunk, Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.trainer import Trainer

PEER, VERSION = "transfusion-pytorch", "0.20.0"
OURS = {"ours, as wide": ("256", "768"), "ours, as large": ("448", "1184")}  # width and hidden


def measure(setting: Setting) -> Iterator[Figure]:
    """ValueError when there is no peer to compare with."""
    python, threads = setting.peer_python or peer_environment(), torch.get_num_threads()
    commands = {PEER: [str(python), "-m", "benchmarks.peer"]}
    commands |= {name: [sys.executable, "-m", "benchmarks.compare", *numbers] for name, numbers in OURS.items()}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(command, threads)) for name, command in commands.items()}
        for name, worker in workers.items():
            about = worker.ask("about")
            found = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
            if about["versions"].get(PEER, VERSION) != VERSION:
                raise ValueError(f"the peer must be {PEER} {VERSION}, and {python} has {found}")
            yield Figure(name, beside=f"{about['parameters'] / 1e6:.2f}M, {about['threads']} threads, {found}")
        yield from training(workers, setting)
        yield from drawing(workers, setting)


def training(workers: Mapping[str, Worker], setting: Setting) -> Iterator[Figure]:
    """A few steps of each in turn, again and again."""
    seconds = {name: [] for name in workers}
    for worker in workers.values():
        worker.ask(f"train {setting.pick(3, 1)}")  # the peer is slow in its first steps, and looks for its way
    for _ in range(setting.pick(8, 1)):
        for name, worker in workers.items():
            seconds[name] += worker.ask(f"train {setting.pick(3, 1)}")
    step = Figure("training", beside=f"{sides.POSITIONS:,} positions a step")
    yield from beside_the_peer(step, seconds, "positions/s", lambda each: sides.POSITIONS / each)
    for name, worker in workers.items():
        yield memory(f"{name}: memory of the process", worker.ask("memory"))


def drawing(workers: Mapping[str, Worker], setting: Setting) -> Iterator[Figure]:
    """One image behind a prompt, guided: with as many forward passes as the peer takes, and as each does by itself."""
    peer, ours = workers[PEER], {name: worker for name, worker in workers.items() if name != PEER}
    passes = peer.ask("draw")["passes"]
    for worker in ours.values():
        worker.ask(f"draw {passes}")  # the first drawing of all reads what is read once
    alike, each = ({name: [] for name in workers} for _ in range(2))
    for _ in range(setting.pick(7, 1)):
        alike[PEER].append(peer.ask("draw"))
        for name, worker in ours.items():
            alike[name].append(worker.ask(f"draw {passes}"))
            each[name].append(worker.ask("draw"))
    each[PEER] = alike[PEER]
    for what, found in (("drawing, with as many forward passes", alike), ("drawing, as each does by itself", each)):
        counts = sorted({answer["passes"] for answers in found.values() for answer in answers})
        head = Figure(what, beside=f"{' and '.join(map(str, counts))} forward passes")
        seconds = {name: [answer["seconds"] for answer in answers] for name, answers in found.items()}
        yield from beside_the_peer(head, seconds, "s", float)


def beside_the_peer(
    head: Figure, seconds: Mapping[str, list[float]], unit: str, show: Callable[[float], float]
) -> Iterator[Figure]:
    """The median of each, ours beside the peer's."""
    median = {name: statistics.median(found) for name, found in seconds.items()}
    yield head
    for name, found in median.items():
        ratio, beside = (None, "") if name == PEER else (median[PEER] / found, PEER)
        yield Figure(f"  {name}", show(found), unit, ratio, beside)


def peer_environment() -> Path:
    """The python of .venv-peer, which is made if it is not there. ValueError when it cannot be."""
    folder = ROOT / ".venv-peer"
    python, whole = folder / "bin" / "python", folder / "whole"
    if whole.exists():
        return python
    print(f"  (making {folder} for {PEER} {VERSION}: a few minutes)", flush=True)
    packages = f"torch=={version('torch').split('+')[0]}", f"{PEER}=={VERSION}"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", *packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise ValueError(f"cannot make {folder}, which takes a package index: {said[-1]}")
    whole.touch()
    return python


# Our side


class Sequences:
    """The work as a loader gives it: every sequence a row of its own, all chance."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.chance = np.random.default_rng(0)
        self.seq_len = len(self.chunk())

    def chunk(self) -> Chunk:
        first, *others = (Text(tuple(self.chance.integers(VOCABULARY, size=length).tolist())) for length in TEXTS)
        segments = [first]
        for text in others:
            segments += [Image(self.chance.standard_normal((CHANNELS, SIDE, SIDE), dtype=np.float32)), text]
        return encode_document(Document(tuple(segments)), self.vocabulary)

    def batches(self, start: LoaderState = BEGINNING) -> Iterator[tuple[Batch, LoaderState]]:
        while True:
            yield collate([Row((self.chunk(),)) for _ in range(SEQUENCES)], self.seq_len, self.vocabulary), start


class Ours:
    """A model of some width, 6 layers, heads of 64; it trains by the trainer's own step and draws by the engine."""

    def __init__(self, width: int, hidden: int):
        vocabulary = Vocabulary.build(VOCABULARY, [(SIDE, SIDE)], patch_size=1)
        loader = Sequences(vocabulary)
        run = Run(
            "compare",
            ModelConfig(
                width=width, intermediate_size=hidden, layers=6, heads=width // 64, vocab_size=vocabulary.size,
                latent_channels=CHANNELS, patch_size=1,
            ),
            data=DataConfig(seq_len=loader.seq_len, rows=SEQUENCES),
            training=TrainingConfig(learning_rate=sides.RATE, max_grad_norm=sides.CLIP),
        )  # fmt: skip
        device = pick_device("cpu")
        self.trainer = Trainer(run, Path(), loader, {}, device)
        self.reading, self.steps = self.trainer.read(None), count()
        side = np.ones(CHANNELS)
        codec = Pixels(0 * side, side, -3 * side, 3 * side)
        tokenizer = Tokenizer.train([], VOCABULARY)  # a byte a token
        model = self.trainer.ema.eval()
        self.engine = Engine(OpenedRun(run, tokenizer, codec, vocabulary, {}, model, step=0, device=device))
        self.passes = 0
        model.transformer.register_forward_pre_hook(self._count)

    def _count(self, _, arguments: tuple) -> None:
        self.passes += len(arguments[0])  # both branches of guidance go through in one pass: they count as two

    def about(self) -> dict:
        versions = {name: version(name) for name in ("transfusion", "torch")}
        parameters = count_parameters(self.trainer.model)
        return {"parameters": parameters, "threads": torch.get_num_threads(), "versions": versions}

    def train(self, steps: int) -> list[float]:
        """Seconds of each step, its data made in it."""
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            read, _ = next(self.reading)
            self.trainer.step(next(self.steps), read, lambda *_: True)
            seconds.append(time.perf_counter() - begun)
        return seconds

    def draw(self, passes: int | None = None) -> dict:
        """One image behind a prompt: with so many forward passes (one reads the prompt, a step takes two), or by default."""
        default = GenerationConfig()
        generation = default if passes is None else GenerationConfig("ddim", steps=(passes - 1) // 2)
        self.passes, begun = 0, time.perf_counter()
        self.engine.generate([Request(("a" * PROMPT,), num_images=1, generation=generation)])
        return {"seconds": time.perf_counter() - begun, "passes": self.passes}


if __name__ == "__main__":
    side = Ours(*map(int, sys.argv[1:]))
    sides.obey({"about": side.about, "train": side.train, "draw": side.draw, "memory": sides.peak_memory})
