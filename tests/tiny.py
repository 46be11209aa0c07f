"""Untrained runs: an engine in memory whose model records its calls, and run folders on disk."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.documents import CHANNELS, SHAPES, build, with_all_logits
from transfusion.checkpoint.open import OpenedRun
from transfusion.checkpoint.read import restore_newest
from transfusion.checkpoint.save import Saver, create_run_folder
from transfusion.codecs.autoencoder import PatchDiscriminator
from transfusion.codecs.pixels import Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import (
    DataConfig,
    DiffusionConfig,
    DigitsConfig,
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
)
from transfusion.data.sources import fit
from transfusion.inference.engine import Engine
from transfusion.inference.image_mode import LatentImageState, LatentRange, update_latents
from transfusion.inference.samplers import SamplingSchedule, get_sampler
from transfusion.model.transfusion import Prediction, Transfusion
from transfusion.parallel import SINGLE_PROCESS
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.codec import CodecTrainer
from transfusion.training.optimizer import build_optimizer, optimizer_tensors

torch.set_num_threads(1)  # small tensors: a second thread would be slower
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel("WARNING")  # it logs every tensor that is saved

SIZES = tuple((x, y) for y, x in SHAPES)  # (width, height) of the engine's images


class Latents(Pixels):
    """A codec that decodes latents without rounding, so that generated images can be compared exactly."""

    def __init__(self, bound: float = 3.0):
        side = np.full(CHANNELS, bound)
        super().__init__(0 * side, 1 + 0 * side, -side, side)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.transpose(2, 0, 1).astype(np.float32) * (6 / 255) - 3

    def decode(self, latent: np.ndarray) -> np.ndarray:
        return latent.transpose(1, 2, 0)


@cache
def tokenizer() -> Tokenizer:
    """All bytes, and a few longer ids."""
    return Tokenizer.train(["a small drawing of a small house", "zwei kleine Häuser"] * 3, 268)


def picture(shape: tuple[int, int], seed: int) -> np.ndarray:
    """A random image (Y, X, channels) uint8 from a seed."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, CHANNELS), dtype=np.uint8)


@dataclass
class Call:
    """One forward pass: its cache slots, inputs and prediction."""

    slots: list[int]
    tokens: Tensor  # (B, L)
    positions: Tensor  # (B, L) or (B, L, 2)
    x_t: list[Tensor]
    t: list[Tensor]
    prediction: Prediction
    num_keys: int

    @property
    def kind(self) -> str:
        """A denoising step has no logits; decoding reads one token."""
        if not len(self.prediction.logits):
            return f"draw {tuple(self.x_t[0].shape[2:])}"
        return "decode" if self.tokens.shape[1] == 1 else "prefill"

    def is_uncond_prefix(self, vocabulary: Vocabulary) -> bool:
        """Does it read only bos and boi? They are read once for all images, or for a request of an image without prompt."""
        return self.tokens.tolist() in [[[vocabulary.bos, boi]] for boi in vocabulary.boi.values()]


@dataclass
class RecordingModel:
    """A model that records its calls, and adds `bias` (V,) to the logits that it returns, not to the recorded ones."""

    model: Transfusion
    bias: Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward_cached(self, tokens, positions, mask, cache, text_index, x_t, t, image_index, sides) -> Prediction:
        prediction = self.model.forward_cached(tokens, positions, mask, cache, text_index, x_t, t, image_index, sides)
        slots = cache.slots[:, 0].tolist()
        self.calls.append(Call(slots, tokens, positions, x_t, t, prediction, cache.end))
        return prediction if self.bias is None else prediction._replace(logits=prediction.logits + self.bias)


def build_engine(
    bias: dict[int, float] | Callable[[Vocabulary], dict[int, float]] | None = None, context: int = 200,
    diffusion: DiffusionConfig = DiffusionConfig(prediction="velocity"),  # noqa: B008 (frozen)
    shapes: Sequence[tuple[int, int]] = SHAPES, text: Tokenizer | None = None, seed: int = 0, **model,
) -> Engine:  # fmt: skip
    """A new engine with random weights; `bias` on logits by id, or a function from the vocabulary to it."""
    text = text or tokenizer()
    vocabulary = Vocabulary.build(text.size, shapes, patch_size=2)
    sizes = {"width": 32, "layers": 2, "heads": 4, "intermediate_size": 48} | model
    ids = {"vocab_size": vocabulary.size, "text_vocab_size": vocabulary.text_size}
    config = ModelConfig(latent_channels=CHANNELS, **ids, **sizes)
    run = Run(
        "tiny", config, diffusion, DataConfig(seq_len=context),
        generation=GenerationConfig("ddim", steps=3, guidance_scale=2.0, max_tokens=12),
    )  # fmt: skip
    model = build(config, seed, torch.float32).eval().requires_grad_(False)
    engine = Engine(OpenedRun("tiny", run, text, Latents(), vocabulary, {}, model, 0, torch.device("cpu")))
    added_bias = torch.zeros(vocabulary.size)
    for token, value in (bias(vocabulary) if callable(bias) else bias or {}).items():
        added_bias[token] = value
    engine.model = RecordingModel(model, added_bias)
    return engine


def prompt_segments(parts: Sequence, text: Tokenizer | None = None) -> tuple[Text | Image, ...]:
    """The segments of a request's parts."""
    text = text or tokenizer()
    return tuple(
        Text(text.encode(p)) if isinstance(p, str) else Image(Latents().encode(p)) for p in parts
    )


@torch.no_grad()
def uncached(engine: Engine, segments: Sequence, t: float | None = None) -> tuple[Tensor, Tensor | None]:
    """One forward pass over a whole sequence: logits (L, V), and the prediction for its last image (C, Y, X).

    Every image is clean, t = 0; with `t`, the last one is noisy (at t) and the sequence ends with its patches.
    """
    vocabulary, model = engine.vocabulary, engine.model.model
    chunk = encode_document(Document(tuple(segments)), vocabulary, add_eos=False)
    if t is not None:
        chunk = chunk.part(0, len(chunk) - 1)
    batch = with_all_logits(collate([Row((chunk,))], len(chunk), vocabulary))
    times = [torch.zeros(len(group.x0)) for group in batch.groups]
    if t is None:
        return model(batch, [group.x0 for group in batch.groups], times).logits, None
    last = max(range(len(times)), key=lambda g: batch.groups[g].index.max())
    times[last][-1] = t
    prediction = model(batch, [group.x0 for group in batch.groups], times)
    return prediction.logits, prediction.images[last][-1]


def start_sampler(
    name: str, x_t: Tensor, schedule: SamplingSchedule, latent_range: LatentRange | None = None, seed: int = 0
) -> LatentImageState:
    """An image that begins with x_t (1, C, Y, X). latent_range: of x0; None: it is not clipped. seed: of new noise."""
    updates = tuple(get_sampler(name, schedule.diffusion.noise_schedule)(schedule))
    generator = torch.Generator().manual_seed(seed)
    return LatentImageState(
        tuple(x_t.shape[2:]), (), GenerationConfig(), schedule.diffusion, latent_range, updates, generator, x_t[0]
    )


def run_sampler(
    image: LatentImageState, predict: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Draw an image to its end with predict(x_t, t), (1, C, Y, X) and (1,): x0, and (x_t, t) of every model call."""
    calls = []
    while not image.is_finished:
        x_t, t = image.x_t[None], image.x_t.new_tensor([image.update.t])
        calls.append((x_t, t))
        (latents,) = update_latents([image], x_t, t, predict(x_t, t))
        image.advance(latents)
    return image.x_t[None], calls


def small_run(steps: int = 4, batch_size: int = 4, micro_batch_size: int | None = None, **training) -> Run:
    """A run on digits with 0.01 seconds per step; `prepared` sets its vocabulary."""
    return Run(
        "tiny",
        ModelConfig(width=32, layers=2, heads=2, intermediate_size=48, latent_channels=1),
        DiffusionConfig(prediction="velocity"),
        DataConfig(
            sources=("digits",), tokenizer_size=260, fit_documents=40, seq_len=64, shuffle_block=24,
            image_first_max_t=0.0, digits=DigitsConfig(interleaved=0.3),
        ),
        TrainingConfig(**{
            "steps": steps, "batch_size": batch_size, "learning_rate": 3e-3, "min_learning_rate": 1e-4, "warmup_steps": 2,
            "ema_decay": 0.9, "image_weight": 1.0, "checkpoint_every": 100, "validate_every": 2, "preview_every": 1,
            "log_every": 1,
        } | training),
        ParallelConfig(micro_batch_size=micro_batch_size),
        generation=GenerationConfig("ddim", steps=3, guidance_scale=2.0, max_tokens=8),
    )  # fmt: skip


@cache
def _fitted(data: DataConfig, patch_size: int, seed: int):
    return fit(data, patch_size, seed)


def prepared(run: Run):
    """The run with its vocabulary, and the encoder of its data."""
    encoder = _fitted(run.data, run.model.patch_size, run.training.seed)
    ids = {"vocab_size": encoder.vocabulary.size, "text_vocab_size": encoder.vocabulary.text_size}
    return replace(run, model=replace(run.model, **ids)), encoder


def run_tensors(run: Run, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random tensors for all parts of a checkpoint of this run."""
    model, ema = (build(run.model, seed + n, torch.float32) for n in range(2))
    optimizer = optimizer_tensors(model, build_optimizer(model, run.training))
    for name, value in optimizer.items():
        value.normal_(generator=torch.Generator().manual_seed(len(name) + seed))
    return {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer}


def begin_run(folder: Path, run: Run | None = None) -> Run:
    """Write a run folder without checkpoints."""
    run, encoder = prepared(run or small_run())
    create_run_folder(folder, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {"made": "for a test"})
    return run


def narrow_discriminator():
    """A context in which the discriminator of an autoencoder has an eighth of its channels."""
    return mock.patch("transfusion.training.codec.PatchDiscriminator", partial(PatchDiscriminator, width=8))


def finished(trainer: CodecTrainer, folder: Path, stop_at: int | None = None) -> CodecTrainer:
    """The trainer after its last step, or after step `stop_at`; it resumes from the folder's checkpoint if there is one."""
    if (folder / "checkpoints").exists():
        trainer.loop.load_state(restore_newest(folder, trainer.tensors(), SINGLE_PROCESS)[1])
    if stop_at is not None:
        original_step = trainer.step

        def step(number, *args):
            trainer.loop.stop_requested = number + 1 == stop_at
            return original_step(number, *args)

        trainer.step = step
    trainer.train()
    return trainer


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int = 2) -> Path:
    """Write one checkpoint and return its folder."""
    with Saver(folder, keep, SINGLE_PROCESS) as saver:
        saver.save(step, tensors, state)
    return folder / "checkpoints" / f"step-{step:06d}"


def write_run(folder: Path, steps: Sequence[int] = (1,)) -> Run:
    """Write a run folder with a checkpoint of different weights at each of these steps."""
    run = begin_run(folder)
    for step in steps:
        save(folder, step, run_tensors(run, step), {"step": step}, keep=len(steps))
    return run
