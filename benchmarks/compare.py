"""This package against transfusion-pytorch on the CPU: training steps, image generation and memory, with the same work.

Each implementation runs in a worker process; the workers take turns. Our models have the peer's width, or as many parameters
as the peer. `python -m benchmarks.compare WIDTH INTERMEDIATE_SIZE` is one of our workers.
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

from benchmarks import worker
from benchmarks.timing import ROOT, Figure, Setting, memory_figure
from benchmarks.worker import BATCH_SIZE, CHANNELS, LATENT_SIZE, PROMPT_LENGTH, TEXT_LENGTHS, VOCAB_SIZE, Worker
from transfusion.checkpoint.open import OpenedRun
from transfusion.codecs.pixels import Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig, GenerationConfig, ModelConfig, Run, TrainingConfig
from transfusion.data.loader import START, LoaderState
from transfusion.inference.engine import Engine, Request
from transfusion.model.transfusion import count_parameters
from transfusion.parallel import keep_freed_memory, onednn_is_faster, pick_device
from transfusion.runs import named_run
from transfusion.sequence import Chunk, Document, Image, Row, Text, Vocabulary, encode_document
from transfusion.training.trainer import Trainer

PEER, VERSION = "transfusion-pytorch", "0.20.0"
OURS = {"ours, same parameters": ("448", "1184"), "ours, same width": ("256", "768")}  # width, intermediate_size


def measure(setting: Setting) -> Iterator[Figure]:
    """ValueError if the peer is missing or has another version."""
    python, threads = setting.peer_python or create_peer_environment(), torch.get_num_threads()
    commands = {PEER: [str(python), "-m", "benchmarks.peer"]}
    commands |= {name: [sys.executable, "-m", "benchmarks.compare", *sizes] for name, sizes in OURS.items()}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(command, threads)) for name, command in commands.items()}
        for name, process in workers.items():
            about = process.ask("about")
            versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
            if about["versions"].get(PEER, VERSION) != VERSION:
                raise ValueError(f"--peer-python {python}: the peer must be {PEER} {VERSION}, not {versions}")
            yield Figure(name, beside=f"{about['parameters'] / 1e6:.2f}M, {about['threads']} threads, {versions}")
        yield from measure_training(workers, setting)
        yield from measure_drawing(workers, setting)


def measure_training(workers: Mapping[str, Worker], setting: Setting) -> Iterator[Figure]:
    """Time a few steps of each worker alternately. Where our trainer computes products in oneDNN, the peer is timed with
    both kinds of products, and the faster one is compared with."""
    seconds, with_onednn = {name: [] for name in workers}, []
    for process in workers.values():
        process.ask(f"train {setting.pick(3, 1)}")  # warm-up: the peer's first steps are slow
    for _ in range(setting.pick(8, 1)):
        for name, process in workers.items():
            seconds[name] += process.ask(f"train {setting.pick(3, 1)}")
        if onednn_is_faster():
            workers[PEER].ask("onednn 1")
            with_onednn += workers[PEER].ask(f"train {setting.pick(3, 1)}")
            workers[PEER].ask("onednn 0")
    yield Figure("training", beside=f"{worker.POSITIONS:,} positions a step")
    if with_onednn:
        default, onednn = map(statistics.median, (seconds[PEER], with_onednn))
        speed = worker.POSITIONS / onednn
        yield Figure(f"  {PEER}, products in oneDNN", speed, "positions/s", default / onednn, "its default products")
        seconds[PEER] = min(seconds[PEER], with_onednn, key=statistics.median)
    yield from compare_with_peer(seconds, "positions/s", lambda step: worker.POSITIONS / step)
    for name, process in workers.items():
        yield memory_figure(f"{name}: memory of the process", process.ask("memory"))


def measure_drawing(workers: Mapping[str, Worker], setting: Setting) -> Iterator[Figure]:
    """Time one guided image after a prompt: with the peer's number of forward passes, and with each worker's defaults."""
    peer, ours = workers[PEER], {name: process for name, process in workers.items() if name != PEER}
    passes = peer.ask("draw")["passes"]
    for process in ours.values():
        process.ask(f"draw {passes}")  # warm-up: the first image loads and initialises
    same_passes, defaults = ({name: [] for name in workers} for _ in range(2))
    for _ in range(setting.pick(7, 1)):
        same_passes[PEER].append(peer.ask("draw"))
        for name, process in ours.items():
            same_passes[name].append(process.ask(f"draw {passes}"))
            defaults[name].append(process.ask("draw"))
    defaults[PEER] = same_passes[PEER]
    for title, by_name in (("drawing, same number of forward passes", same_passes), ("drawing, default settings", defaults)):
        counts = sorted({answer["passes"] for answers in by_name.values() for answer in answers})
        yield Figure(title, beside=f"{' and '.join(map(str, counts))} forward passes")
        seconds = {name: [answer["seconds"] for answer in answers] for name, answers in by_name.items()}
        yield from compare_with_peer(seconds, "s", float)


def compare_with_peer(
    seconds: Mapping[str, list[float]], unit: str, convert: Callable[[float], float]
) -> Iterator[Figure]:
    """The median of each worker, ours with the ratio to the peer's."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        ratio, beside = (None, "") if name == PEER else (medians[PEER] / median, PEER)
        yield Figure(f"  {name}", convert(median), unit, ratio, beside)


def create_peer_environment() -> Path:
    """The python of .venv-peer. Create the environment if it is missing. ValueError if that fails."""
    folder = ROOT / ".venv-peer"
    python, complete = folder / "bin" / "python", folder / "whole"
    if complete.exists():
        return python
    print(f"  (creating {folder} for {PEER} {VERSION}: a few minutes)", flush=True)
    packages = f"torch=={version('torch').split('+')[0]}", f"{PEER}=={VERSION}"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", *packages]):
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            lines = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
            raise ValueError(f"cannot create {folder} (this needs a package index): {lines[-1]}")
    complete.touch()
    return python


# Our worker


class RandomLoader:
    """A loader of random sequences, one per row."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.rng = np.random.default_rng(0)
        self.seq_len = len(self.make_chunk())

    def make_chunk(self) -> Chunk:
        first, *others = (Text(tuple(self.rng.integers(VOCAB_SIZE, size=length).tolist())) for length in TEXT_LENGTHS)
        segments = [first]
        for text in others:
            segments += [Image(self.rng.standard_normal((CHANNELS, LATENT_SIZE, LATENT_SIZE), dtype=np.float32)), text]
        return encode_document(Document(tuple(segments)), self.vocabulary)

    def batches(self, start: LoaderState = START) -> Iterator[tuple[list[Row], LoaderState]]:
        while True:
            yield [Row((self.make_chunk(),)) for _ in range(BATCH_SIZE)], start


class OurModel:
    """A model of this width with 6 layers and heads of 64. It trains with the trainer's step and draws with the engine."""

    def __init__(self, width: int, intermediate_size: int):
        vocabulary = Vocabulary.build(VOCAB_SIZE, [(LATENT_SIZE, LATENT_SIZE)], patch_size=1)
        loader = RandomLoader(vocabulary)
        run = Run(
            "compare",
            ModelConfig(
                width=width, intermediate_size=intermediate_size, layers=6, heads=width // 64, vocab_size=vocabulary.size,
                latent_channels=CHANNELS, patch_size=1,
            ),
            data=DataConfig(seq_len=loader.seq_len),
            training=TrainingConfig(
                batch_size=BATCH_SIZE, learning_rate=worker.LEARNING_RATE, max_grad_norm=worker.MAX_GRAD_NORM
            ),
        )  # fmt: skip
        device = pick_device("cpu")
        keep_freed_memory(device)
        self.trainer = Trainer(run, Path(), loader, {}, device)
        self.reads, self.steps = self.trainer.batches(None), count()
        ones = np.ones(CHANNELS)
        codec = Pixels(0 * ones, ones, -3 * ones, 3 * ones)
        tokenizer = Tokenizer.train([], VOCAB_SIZE)  # one token per byte
        model = self.trainer.ema.eval()
        self.engine = Engine(OpenedRun("compare", run, tokenizer, codec, vocabulary, {}, model, step=0, device=device))
        self.passes = 0
        model.transformer.register_forward_pre_hook(self._count_passes)

    def _count_passes(self, _, args: tuple) -> None:
        self.passes += len(args[0])  # both branches of guidance share one call: it counts as two passes

    def describe(self) -> dict:
        versions = {"transfusion": version("open-transfusion"), "torch": version("torch")}
        parameters = count_parameters(self.trainer.model)
        return {"parameters": parameters, "threads": torch.get_num_threads(), "versions": versions}

    def train(self, steps: int) -> list[float]:
        """Seconds of each step, including its data."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            read, _ = next(self.reads)
            self.trainer.step(next(self.steps), read, self.trainer.count(read), self.trainer.loop.guard)()
            seconds.append(time.perf_counter() - start)
        return seconds

    def draw(self, passes: int | None = None) -> dict:
        """Draw one image after a prompt. `passes`: 1 for the prompt and 2 per step; None: the default settings of a run on
        own data."""
        default = named_run("small").generation
        generation = default if passes is None else GenerationConfig("ddim", steps=(passes - 1) // 2)
        self.passes, start = 0, time.perf_counter()
        self.engine.generate([Request(("a" * PROMPT_LENGTH,), num_images=1, generation=generation)])
        return {"seconds": time.perf_counter() - start, "passes": self.passes}


if __name__ == "__main__":
    model = OurModel(*map(int, sys.argv[1:]))
    worker.serve_commands(
        {"about": model.describe, "train": model.train, "draw": model.draw, "memory": worker.peak_memory_mib}
    )
