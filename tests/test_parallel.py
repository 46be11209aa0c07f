"""Several ranks train like one process: sharded weights, gradients, checkpoints and signals, over gloo on this machine."""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.documents import in_double
from tests.language_models import write_language_model
from tests.processes import torchrun
from tests.profile import THOROUGH, examples
from tests.ranks import World, precision
from tests.sources import write_photos
from tests.test_cli import TINY, command
from tests.test_training import metrics_of, new_trainer, resumed_trainer, stop_at_step
from tests.test_velocity_error import evaluate_guesser
from tests.test_vq import FIT
from tests.tiny import narrow_discriminator, prepared, small_run, write_run
from transfusion import parallel
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.read import describe_run, find_newest_checkpoint, restore_newest
from transfusion.checkpoint.start import open_start
from transfusion.cli.preview import previewer
from transfusion.cli.run_folder import RunFolder
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.config import ParallelConfig, Run
from transfusion.data.loader import LoaderState
from transfusion.data.sources import open_raw
from transfusion.disk import read_json
from transfusion.model.transfusion import build_on_meta
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.seeding import derive_seed
from transfusion.sequence import NO_TARGET, Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.codec import CodecTrainer
from transfusion.training.trainer import Trainer

STEPS = 20 if THOROUGH else 6
LENGTH = 32  # of a synthetic row
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest value of a tensor
Outcome = tuple[dict[str, np.ndarray], list[dict]]  # tensors by name, and the lines of metrics.jsonl


def a_run(
    patches: str = "linear", steps: int = STEPS, batch_size: int = 4,
    parallel: ParallelConfig = ParallelConfig(), **training,  # noqa: B008
) -> Run:  # fmt: skip
    """Digits and texts in turn, so that rows have images, text or both."""
    run = small_run(steps, batch_size, **{"validate_every": STEPS, "warmup_steps": 4} | training)
    model = replace(run.model, patches=patches, unet_width=16)
    return replace(run, model=model, data=replace(run.data, sources=("digits", "topics")), parallel=parallel)


def untie(run: Run, untied: str) -> Run:
    """With image weights of their own, which differ from the first step on."""
    return replace(run, model=replace(run.model, untied=untied, image_init="fresh"))


def gather_tensors(trainer: Trainer) -> dict[str, np.ndarray]:
    """Weights, EMA and moments, gathered from all ranks."""
    tensors = {}
    for part, values in trainer.tensors().items():
        for name, value in values.items():
            tensors[f"{part} {name}"] = (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()
    return tensors


def train(
    ranks: Ranks, folder: Path, run: Run, dtype: torch.dtype = torch.float32, stop_at: int | None = None
) -> Outcome:
    """Start or resume a run. Returns its final tensors ({} when it is stopped) and its metrics."""
    with precision(dtype):
        change = (lambda batch, _: in_double(batch)) if dtype == torch.float64 else None
        build = resumed_trainer if (folder / "checkpoints").exists() else new_trainer
        ranks.barrier()
        trainer = build(folder, run, None, change, ranks)
        if stop_at is not None:
            stop_at_step(trainer, stop_at)
        assert trainer.train() == (stop_at is None)
        ranks.barrier()
        return (gather_tensors(trainer) if stop_at is None else {}), metrics_of(folder)


REFERENCES: dict[str, Outcome] = {}


def train_alone(run: Run, dtype: torch.dtype = torch.float32) -> Outcome:
    """The outcome of one process; trained once for all tests that compare with it."""
    key = f"{run} {dtype}"
    if key not in REFERENCES:
        with TemporaryDirectory() as folder:
            REFERENCES[key] = train(SINGLE_PROCESS, Path(folder), run, dtype)
    return REFERENCES[key]


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))


def assert_same(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """The same tensors and the same metrics, up to the tolerance."""
    assert actual[0].keys() == expected[0].keys()
    distances = {name: distance(value, expected[0][name]) for name, value in actual[0].items()}
    assert max(distances.values()) <= tolerance, sorted(distances.items(), key=lambda item: -item[1])[:5]
    assert len(actual[1]) == len(expected[1])
    for line, expected_line in zip(actual[1], expected[1], strict=True):
        assert line == pytest.approx(expected_line, rel=tolerance)


# Two ranks equal one process


KINDS = [("linear", torch.float32, "none"), ("unet", torch.float64, "none"), ("linear", torch.float64, "full")]
MORE_KINDS = [("linear", torch.float64, "none"), ("unet", torch.float64, "feed_forward")]


@pytest.mark.parametrize(("patches", "dtype", "untied"), [*KINDS, *MORE_KINDS] if THOROUGH else KINDS)
def test_two_ranks_train_like_one_process(pair, tmp_path, patches, dtype, untied):
    """With half as many rows each."""
    run = untie(a_run(patches), untied)
    expected = train_alone(run, dtype)
    outcome, other_outcome = pair(train, tmp_path / "two", run, dtype)
    assert_same(outcome, expected, TOLERANCE[dtype])
    assert_same(other_outcome, outcome, 0)


@pytest.mark.parametrize(("untied", "frozen"), [
    ("none", "text_lr_scale"), ("none", "image_lr_scale"), ("none", "transformer_lr_scale"), ("full", "text_lr_scale"),
    *([("full", "image_lr_scale"), ("feed_forward", "transformer_lr_scale")] if THOROUGH else []),
])  # fmt: skip
def test_two_ranks_train_frozen_parts_like_one_process(pair, tmp_path, untied, frozen):
    """No deadlock, with or without images on a rank, and the parts that are not frozen are trained as by one process."""
    run = untie(a_run(steps=3, **{frozen: 0.0}), untied)
    expected = train_alone(run, torch.float64)
    outcome, other_outcome = pair(train, tmp_path / "two", run, torch.float64)
    assert_same(outcome, expected, 1e-9)
    assert_same(other_outcome, outcome, 0)


def train_with_muon(ranks: Ranks, folder: Path, run: Run) -> Outcome:
    """In float64, also torch's orthogonalisation, which is in bfloat16."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
        return train(ranks, folder, run, torch.float64)


def test_two_ranks_with_muon_train_like_one_process(pair, tmp_path):
    """In bfloat16 they agree as little as bfloat16 and float64 do: within a tenth of an update."""
    run = a_run(steps=3, warmup_steps=1, optimizer="muon")
    expected = train_with_muon(SINGLE_PROCESS, tmp_path / "one", run)
    outcome, other_outcome = pair(train_with_muon, tmp_path / "two", run)
    assert_same(outcome, expected, 1e-9)
    assert_same(other_outcome, outcome, 0)


def first_weights(ranks: Ranks, kind: str, source: Path, untied: str) -> dict[str, np.ndarray]:
    """The first weights of a run from this source, gathered from all ranks."""
    start = open_start(kind, str(source))
    config = a_run().model if kind == "run" else replace(a_run().model, vocab_size=384)
    model = build_on_meta(start.adapt_config(replace(config, untied=untied)))
    mesh = ranks.mesh("cpu", "full") if ranks.world > 1 else None
    parallel.parallelize(model, model.transformer.blocks, torch.device("cpu"), mesh, compiled=False)
    model.to_empty(device="cpu")
    start.fill(model, 3, ranks)
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: value.detach().numpy().copy() for name, value in weights.items()}


@pytest.mark.parametrize("kind", ["language_model", "run", "exported", "untied"])
def test_two_ranks_start_with_the_same_weights_as_one_process(pair, tmp_path, kind):
    """Bit for bit."""
    if kind == "language_model":
        write_language_model(tmp_path / "source", shard="20KB")
    else:
        write_run(tmp_path / "source", (3,))
    if kind == "exported":
        export(tmp_path / "source", tmp_path / "exported", shard=20_000)
    source, untied = tmp_path / ("exported" if kind == "exported" else "source"), "full" if kind == "untied" else "none"
    kind = "language_model" if kind == "language_model" else "run"
    expected = first_weights(SINGLE_PROCESS, kind, source, untied)
    for weights in pair(first_weights, kind, source, untied):
        assert weights.keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in weights.items())


def test_velocity_errors_of_two_ranks_are_those_of_one(pair, tmp_path):
    (values, seen), (values_too, seen_too) = pair(evaluate_guesser, tmp_path / "two")
    expected, all_seen = evaluate_guesser(SINGLE_PROCESS, tmp_path / "one")
    assert values == values_too == pytest.approx(expected, rel=1e-12) and len(values) == 12
    assert seen != seen_too and {*seen} | {*seen_too} == {*all_seen}  # each has its own batches


class SyntheticLoader:
    """A loader of synthetic rows. `kinds` has one word per step, with one letter per row over all ranks."""

    def __init__(self, kinds: list[str], ranks: Ranks, vocabulary: Vocabulary):
        self.kinds, self.ranks, self.vocabulary = kinds, ranks, vocabulary

    def batches(self, start) -> Iterator[tuple[list[Row], LoaderState]]:
        for step in count(start.block):
            kinds = list(enumerate(self.kinds[step % len(self.kinds)]))[self.ranks.rank :: self.ranks.world]
            yield [self._row(kind, 10 * step + n) for n, kind in kinds], LoaderState(step + 1)

    def _row(self, kind: str, seed: int) -> Row:
        rng = np.random.default_rng(seed)
        image = Image(rng.standard_normal((1, 8, 8), dtype=np.float32), loss=kind != "n")
        text = Text(tuple(rng.integers(0, 200, 5).tolist()), loss=kind in "tb")
        segments = {"t": (text,), "i": (image, text), "b": (text, image), "n": (text, image)}[kind]
        chunk = encode_document(Document(segments, seed, "made", derive_seed(seed)), self.vocabulary)
        if kind in "in":  # the boi token before an image has a text loss too
            chunk = replace(chunk, targets=np.full_like(chunk.targets, NO_TARGET))
        return Row((chunk,))


# The row of each of two ranks in a step, by what has a loss: (t)ext, (i)mage, (b)oth, (n)othing (with an image as input).
# So there are image losses on two ranks, one or none; likewise text losses.
MIXTURES = "ti bt tt tb it ib ii bi nb nt in nn tn".split()


def train_synthetic(ranks: Ranks, folder: Path, patches: str, untied: str) -> Outcome:
    """One step of each kind, in float64."""
    with precision(torch.float64):
        run = untie(a_run(patches, steps=len(MIXTURES), batch_size=2, validate_every=100), untied)
        trainer = new_trainer(folder, run, None, lambda batch, _: in_double(batch), ranks)
        trainer.heldout, trainer.loader = {}, SyntheticLoader(MIXTURES, ranks, prepared(run)[1].vocabulary)
        assert trainer.train()
        return gather_tensors(trainer), metrics_of(folder)


@pytest.mark.parametrize(("patches", "untied"), [("linear", "none"), ("unet", "none"), ("linear", "full")])
def test_ranks_without_images_or_text_cause_no_deadlock_and_no_bias(pair, tmp_path, patches, untied):
    expected = train_synthetic(SINGLE_PROCESS, tmp_path / "one", patches, untied)
    outcome, other_outcome = pair(train_synthetic, tmp_path / "two", patches, untied)
    assert_same(outcome, expected, 1e-9)
    assert_same(other_outcome, outcome, 0)


def test_synthetic_rows_have_the_losses_of_their_kind():
    """A check of the test above."""
    vocabulary = prepared(a_run())[1].vocabulary
    for rank, (texts, images) in enumerate(((True, True), (True, False), (False, True), (False, False))):
        rows, _ = next(SyntheticLoader(["btin"], Ranks(rank, 4), vocabulary).batches(LoaderState()))
        batch = collate(rows, LENGTH, vocabulary)
        assert (batch.text_count > 0, batch.image_count > 0) == (texts, images)


@pytest.fixture(scope="module")
def train_on(pair) -> Iterator[Callable[..., Outcome]]:
    """`train_on(world, *args)` is the outcome of `train` on one, two or three ranks."""
    trio = World(3)
    worlds = {1: lambda function, *args: [function(SINGLE_PROCESS, *args)], 2: pair, 3: trio}
    yield lambda world, *args: worlds[world](train, *args)[0]
    trio.close()


def split_run(micro_batch_size: int | None, patches: str = "linear", steps: int = STEPS) -> Run:
    """A run of 6 rows per step, which one, two and three ranks share evenly."""
    return a_run(patches, steps, 6, ParallelConfig(micro_batch_size=micro_batch_size))


@examples(12, quick=2)
@given(st.sampled_from((1, 2, 3)), st.integers(1, 7))
@example(1, 4)  # passes of 4 and 2 rows
@example(2, 2)  # of 2 and 1
@example(3, 1)
def test_ranks_and_micro_batches_change_no_weight_and_no_loss(train_on, world, micro_batch_size):
    """Neither trained nor held-out losses. The micro batch may be larger than a rank's share."""
    expected = train_alone(split_run(None, steps=3), torch.float64)
    with TemporaryDirectory() as folder:
        outcome = train_on(world, Path(folder) / "run", split_run(micro_batch_size, steps=3), torch.float64)
    assert_same(outcome, expected, 1e-9)


@examples(200)
@given(st.integers(1, 600), st.integers(1, 700))
@example(512, 6)
@example(1, 2)
def test_batch_is_shared_evenly_or_refused_with_the_nearest_numbers_that_work(batch_size, world):
    if batch_size % world == 0:
        assert parallel.share_batch(batch_size, world) * world == batch_size
        return
    with pytest.raises(ValueError) as error:
        parallel.share_batch(batch_size, world)
    rule, fix = str(error.value).split(": ")
    assert rule == f"training.batch_size {batch_size} is not divisible by {world} processes"
    sizes, worlds = ([*map(int, re.findall(r"\d+", words))] for words in fix.split(", or "))
    works = [size for size in range(1, batch_size + world) if size % world == 0]
    assert sizes == [n for n in works if abs(n - batch_size) < world]
    works = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    assert worlds == [n for n in works if n < world][-1:] + [n for n in works if n > world][:1]


@examples(100)
@given(st.integers(1, 40), st.integers(1, 8), st.none() | st.integers(1, 50))
def test_rows_of_a_forward_pass_are_the_micro_batch_or_the_whole_share(share, world, micro_batch_size):
    run = a_run(batch_size=share * world, parallel=ParallelConfig(micro_batch_size=micro_batch_size))
    assert parallel.rows_per_pass(run, world) == (share if micro_batch_size is None else min(share, micro_batch_size))


class CollectiveCounter(TorchDispatchMode):
    """Counts the collective operations of this rank, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            self.counts[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


def count_collectives(ranks: Ranks, folder: Path, run: Run) -> Counter:
    """The collective operations of the third step."""
    counts = {}
    trainer = new_trainer(folder, run, lambda model, step: counts.update({step: counter.counts.copy()}), ranks=ranks)
    trainer.loop.preview_every, trainer.heldout = 1, {}
    with CollectiveCounter() as counter:
        assert trainer.train()
    return counts[3] - counts[2]


def test_step_has_no_needless_collectives(pair, tmp_path):
    """Each block but the last is gathered forward and backward; the last one and the rest of the model once."""
    run = a_run(steps=4, validate_every=100)
    run = replace(run, model=replace(run.model, layers=4))
    for counts in pair(count_collectives, tmp_path / "run", run):
        # Counts and stop flag; losses. DTensor's reduction of the gradient norm is not counted here.
        assert counts == {"_allgather_base_": 2 * 3 + 2, "_reduce_scatter_base_": 5, "allreduce_": 2}


# Checkpoints


@pytest.mark.parametrize("sessions", [
    [(2, 1), (3, None), (1, 4)], *([[(1, None), (3, 1), (2, 2)], [(3, 2), (1, 5), (2, None)]] if THOROUGH else []),
])  # fmt: skip
def test_run_resumes_with_any_number_of_ranks_and_micro_batch(train_on, tmp_path, sessions):
    patches = "unet" if THOROUGH else "linear"
    expected = train_alone(split_run(None, patches), torch.float64)
    for (world, micro_batch_size), stop_at in zip(sessions, (2, 4, None), strict=True):
        outcome = train_on(world, tmp_path / "run", split_run(micro_batch_size, patches), torch.float64, stop_at)
    assert_same(outcome, expected, 1e-9)


def test_resumed_ranks_equal_uninterrupted_and_one_process_opens_their_checkpoint(pair, tmp_path):
    """Bit for bit."""
    run = a_run("unet" if THOROUGH else "linear", steps=4, checkpoint_every=2)
    expected, _ = pair(train, tmp_path / "one", run)
    for stop_at in (1, 3, None):
        outcome, _ = pair(train, tmp_path / "run", run, torch.float32, stop_at)
    assert_same(outcome, expected, 0)
    for weights, part in (("ema", "ema"), ("raw", "model")):
        opened = open_checkpoint(tmp_path / "run", weights, "cpu").model.state_dict()
        assert all(np.array_equal(value.numpy(), expected[0][f"{part} {name}"]) for name, value in opened.items())


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_ranks_use_the_checkpoint_before_a_damaged_one(pair, tmp_path):
    """Whichever rank hashes the damaged file."""
    run = a_run(steps=4, checkpoint_every=2, keep_checkpoints=3)
    expected, _ = pair(train, tmp_path / "one", run)
    shards = sorted(path.name for path in (tmp_path / "one" / "checkpoints" / "step-000004" / "model").iterdir())
    assert len(shards) == 2
    for shard in shards if THOROUGH else shards[1:]:  # the second rank's file
        folder = shutil.copytree(tmp_path / "one", tmp_path / shard)
        flip_bit(folder / "checkpoints" / "step-000004" / "model" / shard)
        outcome, _ = pair(train, folder, run)
        assert_same(outcome, expected, 0)
        names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert names == ["step-000002", "step-000004", "step-000004.damaged"]


# Activation checkpointing and compilation


@pytest.mark.parametrize("ranks", [1, 2])
def test_activation_checkpointing_changes_nothing(pair, tmp_path, ranks):
    """Bit for bit; and the blocks run twice."""
    outcomes, counts = [], []
    for enabled in (False, True):
        args = tmp_path / str(enabled), a_run(steps=3, parallel=ParallelConfig(activation_checkpointing=enabled))
        train = train_and_count_passes
        outcome, count = train(SINGLE_PROCESS, *args) if ranks == 1 else pair(train, *args)[0]
        outcomes.append(outcome)
        counts.append(count)
    assert_same(*outcomes, 0)
    assert counts == [3, 6]


def train_and_count_passes(ranks: Ranks, folder: Path, run: Run) -> tuple[Outcome, int]:
    """The outcome of a run, and the number of training passes of its first block."""
    passes = []
    trainer = new_trainer(folder, run, ranks=ranks)
    norm = trainer.model.transformer.blocks[0].attention_norm
    norm.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    assert trainer.train()
    return (gather_tensors(trainer), metrics_of(folder)), sum(passes)


def train_and_count_graphs(ranks: Ranks, folder: Path, run: Run, backend: str) -> tuple[Outcome, list[int]]:
    """The outcome of a float64 run, and the number of compiled graphs after each step."""
    counts = []
    torch._dynamo.reset()
    counters.clear()
    with precision(torch.float64), mock.patch.object(parallel, "COMPILE_BACKEND", backend):
        def count_graphs(model, step):
            counts.append(counters["stats"]["unique_graphs"])

        trainer = new_trainer(folder, run, count_graphs, lambda batch, _: in_double(batch), ranks)
        assert trainer.train()
        return (gather_tensors(trainer), metrics_of(folder)), counts


CASES = [(1, True), (2, False)]  # ranks, activation checkpointing; `make test-all` adds the other two


@pytest.mark.parametrize(("ranks", "checkpointing"), [*CASES, (1, False), (2, True)] if THOROUGH else CASES)
def test_compiled_blocks_train_the_same_and_are_compiled_once(pair, tmp_path, ranks, checkpointing):
    """One process has more layers than dynamo's limit of recompilations."""
    run = a_run(steps=4, parallel=ParallelConfig(activation_checkpointing=checkpointing, compile=True))
    run = replace(run, model=replace(run.model, layers=10 if ranks == 1 else 4))
    plain = replace(run, parallel=ParallelConfig(compile=False))
    if ranks == 1:
        expected = train_alone(plain, torch.float64)
        outcome, counts = train_and_count_graphs(SINGLE_PROCESS, tmp_path / "compiled", run, "aot_eager")
    else:
        expected, _ = pair(train, tmp_path / "plain", plain, torch.float64)
        (outcome, counts), _ = pair(train_and_count_graphs, tmp_path / "compiled", run, "eager")
    assert_same(outcome, expected, 1e-12)
    assert counts[0] == 0
    assert 0 < counts[1] < 4
    assert len(set(counts[1:])) == 1


def train_with_previews(ranks: Ranks, folder: Path, run: Run) -> Outcome:
    """With the previews of the command."""
    trainer = new_trainer(folder, run, ranks=ranks)
    run_folder = RunFolder(folder, replace(describe_run(folder), run=run), encoder=None)
    trainer.on_preview = previewer(run_folder, open_raw(run.data, "heldout"), torch.device("cpu"), ranks)
    trainer.loop.preview_every = 1
    assert trainer.train()
    return gather_tensors(trainer), metrics_of(folder)


def test_previews_on_two_ranks_change_nothing(pair, tmp_path):
    """Previews after every step, and held-out losses after every step, on every rank."""
    expected, _ = pair(train, tmp_path / "one", a_run(steps=3, validate_every=100))
    outcome, _ = pair(train_with_previews, tmp_path / "two", a_run(steps=3, validate_every=1))
    trained = [line for line in outcome[1] if "gradient_norm" in line]
    assert len(outcome[1]) == len(trained) + 4
    assert_same((outcome[0], trained), (expected[0], [line for line in expected[1] if "gradient_norm" in line]), 0)
    assert len(list((tmp_path / "two" / "samples").glob("*.png"))) == 4


# Signals


def train_with_a_signal(ranks: Ranks, folder: Path, run: Run, number: int, step: int, to: int) -> int:
    """Only rank `to` gets a signal, in one step. Returns the step at which this rank stopped."""

    def send_signal(model, now):
        if now == step and ranks.rank == to:
            signal.raise_signal(number)

    trainer = (resumed_trainer if (folder / "checkpoints").exists() else new_trainer)(folder, run, send_signal, ranks=ranks)
    ranks.barrier()
    assert not trainer.train()
    return trainer.loop.progress.step


def test_signal_to_one_rank_stops_all_after_the_same_step(pair, tmp_path):
    run = a_run(steps=7 if THOROUGH else 4)
    expected, _ = pair(train, tmp_path / "one", run)
    signals = ((signal.SIGTERM, 1, 0), (signal.SIGUSR1, 3, 1), (signal.SIGINT, 5, 1))
    for number, step, to in signals if THOROUGH else signals[:2]:
        run_with_previews = replace(run, training=replace(run.training, preview_every=1))
        assert pair(train_with_a_signal, tmp_path / "two", run_with_previews, number, step, to) == [step, step]
    outcome, _ = pair(train, tmp_path / "two", run)
    assert_same(outcome, expected, 0)


# Several machines


@pytest.mark.slow
def test_hybrid_sharding_trains_like_one_process(tmp_path):
    """2 machines of 2 ranks, with patches or a U-Net whose last matrix has fewer rows than there are ranks.

    One process resumes from their checkpoint, and they resume from its checkpoint. Machines add up the gradients of each of
    their 3 units once, although there are two micro-batches.
    """
    run = a_run("unet" if THOROUGH else "linear", steps=3, batch_size=8)
    if not THOROUGH:  # torch needs long to plan the first step of a U-Net's many parameters
        run = replace(run, model=replace(run.model, patch_size=1), data=replace(run.data, seq_len=128))
    assert any(len(parameter) == 1 for parameter in build_on_meta(run.model).patches.parameters())
    hybrid = replace(run, parallel=ParallelConfig("hybrid", micro_batch_size=1))
    expected = train_alone(run, torch.float64)
    world = World(4, per_machine=2)
    try:
        assert world(mesh_shape, "hybrid") == [(2, 2)] * 4
        world(train, tmp_path / "run", hybrid, torch.float64, 1)
        train(SINGLE_PROCESS, tmp_path / "run", run, torch.float64, 2)
        outcome, *others = world(train, tmp_path / "run", hybrid, torch.float64)
        assert_same(outcome, expected, 1e-9)
        for other_outcome in others:
            assert_same(other_outcome, outcome, 0)
        for counts in world(count_collectives, tmp_path / "counted", hybrid):
            assert counts["_reduce_scatter_base_"] == 2 * 3
            assert counts["allreduce_"] == 3 + 2
    finally:
        world.close()


def mesh_shape(ranks: Ranks, shard: str) -> tuple[int, ...]:
    return tuple(ranks.mesh("cpu", shard).mesh.shape)


# Codecs

AUTOENCODER = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1)
FITTING = CodecTrainingConfig(
    steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=100, validate_every=6,
    log_every=1, heldout=4, revive_after=2,
)  # fmt: skip
CODECS = {
    "autoencoder": (AUTOENCODER, FITTING), "with a discriminator": (AUTOENCODER, replace(FITTING, gan_from=2)),
    "vq": (replace(AUTOENCODER, codes=128), FITTING),  # more codes than are used
}  # fmt: skip


def fit(
    ranks: Ranks, folder: Path, network: AutoencoderConfig, config: CodecTrainingConfig, stop_at: int | None = None
) -> Outcome:
    """Start or resume the training of a codec, in float64."""
    with precision(torch.float64), narrow_discriminator():
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
        ranks.barrier()
        # Noise: with similar pixels, codes are similar too, and rounding decides which is the nearest.
        images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
        trainer = CodecTrainer(network, config, folder, images, torch.device("cpu"), ranks)
        state = restore_newest(folder, trainer.tensors(), ranks)
        if state:
            trainer.loop.load_state(state[1])
        original_step = trainer.step

        def step(number, *args):
            trainer.loop.stop_requested = number + 1 == stop_at
            return original_step(number, *args)

        trainer.step = step
        assert trainer.train() == (stop_at is None)
        ranks.barrier()
        if stop_at is not None:
            return {}, []
        lines = [{k: v for k, v in line.items() if k != "pictures_per_second"} for line in metrics_of(folder)]
        return gather_tensors(trainer), lines


if not THOROUGH:
    CODECS.pop("autoencoder")  # the one with a discriminator is the same until step 2


@pytest.mark.parametrize(("network", "config"), CODECS.values(), ids=CODECS)
def test_codec_training_is_the_same_on_two_ranks_and_resumes_with_any_number(pair, tmp_path, network, config):
    expected = fit(SINGLE_PROCESS, tmp_path / "one", network, config)
    if network.codes:
        revived = [line["revived"] for line in expected[1] if "revived" in line]
        assert 0 < revived[0] < revived[-1]
    outcome, other_outcome = pair(fit, tmp_path / "two", network, config)
    assert_same(outcome, expected, 1e-9)
    assert_same(other_outcome, outcome, 0)
    for world, stop_at in ((2, 3), (1, 5), (2, None)):
        if world == 1:
            outcome = fit(SINGLE_PROCESS, tmp_path / "both", network, config, stop_at)
        else:
            outcome, _ = pair(fit, tmp_path / "both", network, config, stop_at)
    assert_same(outcome, expected, 1e-9)


def test_batch_not_divisible_by_ranks_is_refused(tmp_path):
    """By both trainers."""
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by 3 processes: use a batch size of 6 or 9, or 2"):
        Trainer(a_run(batch_size=8), tmp_path, None, {}, torch.device("cpu"), Ranks(1, 3))
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by 3 processes: use a batch size of 3 or 6, or 2"):
        CodecTrainer(AUTOENCODER, FITTING, tmp_path, np.zeros((30, 16, 16, 3), np.uint8), torch.device("cpu"), Ranks(1, 3))


# Commands under torchrun

TRAIN = ("train", "digits", *TINY, "--training.batch-size", 4, "--training.steps", 9, "--training.log-every", 1,
         "--training.validate-every", 9, "--training.preview-every", 9)  # fmt: skip


def run_with_signal_at_step_6(number: int, *args: object) -> None:
    """Run a command; rank 1 gets a signal in step 6, unless torchrun has restarted it."""
    original_step = Trainer.step

    def step(self, done, *step_args):
        if done == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), number)
        return original_step(self, done, *step_args)

    Trainer.step = step
    command(*args)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    files = sorted(find_newest_checkpoint(folder).rglob("*.safetensors"))
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run of two processes under torchrun, for tests that compare with it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert f"training {folder} on 2 processes (cpu), recipe digits" in torchrun(command, *TRAIN, "--out", folder)
    return folder


def assert_same_runs(folder: Path, expected_folder: Path) -> None:
    """Bit for bit."""
    tensors, expected = tensors_of(folder), tensors_of(expected_folder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    assert metrics_of(folder) == metrics_of(expected_folder)


@pytest.mark.slow
def test_train_under_torchrun_restarts_after_a_killed_process(undisturbed, tmp_path):
    """kill -9, after which torchrun restarts both. The metrics are close to those of one process."""
    output = torchrun(run_with_signal_at_step_6, signal.SIGKILL, *TRAIN, "--out", tmp_path / "killed", restarts=1)
    assert "resuming from" in output
    assert "transfusion: another process of this run has stopped; see its error message" in output
    assert "Traceback" not in output
    assert_same_runs(tmp_path / "killed", undisturbed)
    command(*TRAIN, "--out", tmp_path / "alone")
    pairs = zip(metrics_of(undisturbed), metrics_of(tmp_path / "alone"), strict=True)
    for line, expected in [(line, expected) for line, expected in pairs if "text_loss" in line]:
        assert line == pytest.approx(expected, rel=1e-3)
    assert open_checkpoint(tmp_path / "killed").step == 9


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all: a signal to one of two ranks is tested without torchrun too")
def test_train_under_torchrun_stops_at_a_signal_and_resumes(undisturbed, tmp_path):
    """SIGUSR1 to one process only, after which both save and the same command resumes."""
    output = torchrun(run_with_signal_at_step_6, signal.SIGUSR1, *TRAIN, "--out", tmp_path / "run")
    assert output.count("stopped at step 6 and saved") == 1
    assert find_newest_checkpoint(tmp_path / "run").name == "step-000006"
    assert read_json(tmp_path / "run" / "status.json")["state"] == "stopped"
    output = torchrun(command, *TRAIN, "--out", tmp_path / "run")
    assert output.count(f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step-000006'}") == 1
    assert_same_runs(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_fit_codec_under_torchrun_gives_the_codec_of_one_process(tmp_path):
    write_photos(tmp_path / "photos", 40)
    args = ("data", "fit-codec", "small", tmp_path / "photos", *FIT, "--training.revive-after", 2)
    output = torchrun(command, *args, "--out", tmp_path / "two")
    assert output.count("held out: PSNR") == 1
    command(*args, "--out", tmp_path / "one")
    tensors, expected = (load_file(tmp_path / name / "codec.safetensors") for name in ("two", "one"))
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(tensors[name].numpy().astype(float), value.numpy().astype(float)) <= 1e-4, name
    quality, expected = (read_json(tmp_path / name / "codec.json")["heldout"] for name in ("two", "one"))
    assert quality == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "two" / "reconstructions.html").exists()
