"""Many processes learn what one learns: sharded weights, gradients, checkpoints and signals, over gloo on this machine."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.documents import in_double
from tests.llama import write_llama
from tests.processes import torchrun
from tests.profile import THOROUGH
from tests.ranks import World, precision
from tests.sources import write_photos
from tests.test_cli import TINY, command
from tests.test_training import looking, new_trainer, resumed, rows_of, stopping
from tests.test_vq import FIT
from tests.tiny import narrow_discriminator, prepared, small_run, write_run
from transfusion import parallel
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import describe_run, newest_checkpoint, open_checkpoint, restore_newest
from transfusion.checkpoint.start import open_start
from transfusion.cli import runs
from transfusion.cli.run_folder import RunFolder
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.config import ParallelConfig, Run
from transfusion.data.loader import LoaderState
from transfusion.data.sources import open_raw
from transfusion.disk import read_json
from transfusion.model.transfusion import build_on_meta
from transfusion.parallel import SINGLE_PROCESS, Ranks
from transfusion.seeding import derive_seed
from transfusion.sequence import Batch, Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.codec import CodecTrainer
from transfusion.training.guard import TrainingError
from transfusion.training.trainer import Trainer

STEPS = 20 if THOROUGH else 6
LENGTH = 32  # of a made row
WITHIN = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest number of a tensor
Found = tuple[dict[str, np.ndarray], list[dict]]


def a_run(
    rows: int = 4, patches: str = "linear", steps: int = STEPS,
    parallel: ParallelConfig = ParallelConfig(), **training,  # noqa: B008
) -> Run:  # fmt: skip
    """Digits and texts in turn, so that rows differ in what they hold."""
    run = small_run(steps, rows, **{"validate_every": STEPS, "warmup_steps": 4} | training)
    model = replace(run.model, patches=patches, unet_width=16)
    return replace(run, model=model, data=replace(run.data, sources=("digits", "topics")), parallel=parallel)


def whole(trainer: Trainer) -> dict[str, np.ndarray]:
    """Weights, average and moments, put together from all ranks."""
    found = {}
    for part, values in trainer.tensors().items():
        for name, value in values.items():
            found[f"{part} {name}"] = (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()
    return found


def train(
    ranks: Ranks, folder: Path, run: Run, dtype: torch.dtype = torch.float32, stop_at: int | None = None
) -> Found:
    """Begin a run or go on with it; what it has logged and, when it is not stopped, what it has learnt in the end."""
    with precision(dtype):
        change = (lambda batch, _: in_double(batch)) if dtype == torch.float64 else None
        begin = resumed if (folder / "checkpoints").exists() else new_trainer
        ranks.wait()
        trainer = begin(folder, run, None, change, ranks)
        if stop_at is not None:
            stopping(trainer, stop_at)
        assert trainer.train() == (stop_at is None)
        ranks.wait()
        return (whole(trainer) if stop_at is None else {}), rows_of(folder)


REFERENCES: dict[str, Found] = {}


def alone(run: Run, dtype: torch.dtype = torch.float32) -> Found:
    """What one process learns and logs: trained once, for all tests that compare with it."""
    key = f"{run} {dtype}"
    if key not in REFERENCES:
        with TemporaryDirectory() as folder:
            REFERENCES[key] = train(SINGLE_PROCESS, Path(folder), run, dtype)
    return REFERENCES[key]


def far(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def same(found: Found, expected: Found, within: float) -> None:
    """The same tensors and the same logged numbers, as nearly as that."""
    assert found[0].keys() == expected[0].keys()
    distances = {name: far(value, expected[0][name]) for name, value in found[0].items()}
    assert max(distances.values()) <= within, sorted(distances.items(), key=lambda one: -one[1])[:5]
    assert len(found[1]) == len(expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=within)


def numbers(row: dict, before: str = "") -> dict[str, float]:
    """A line of metrics.jsonl without its nesting."""
    found = {}
    for name, value in row.items():
        found |= numbers(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


# Two ranks are one


KINDS = [("linear", torch.float32), ("unet", torch.float64)]


@pytest.mark.parametrize(("patches", "dtype"), [*KINDS, ("linear", torch.float64)] if THOROUGH else KINDS)
def test_two_ranks_learn_what_one_learns(pair, tmp_path, patches, dtype):
    """Half as many rows each."""
    expected = alone(a_run(4, patches), dtype)
    found, other = pair(train, tmp_path / "two", a_run(2, patches), dtype)
    same(found, expected, WITHIN[dtype])
    same(other, found, 0)


@pytest.mark.parametrize("frozen", ["text_lr_scale", "image_lr_scale", "transformer_lr_scale"])
def test_two_ranks_leave_alone_what_one_does(pair, tmp_path, frozen):
    """Parts that are frozen hang no rank, with and without images on it, and the rest is learnt as by one."""
    rates = {frozen: 0.0}
    expected = alone(a_run(4, steps=3, **rates), torch.float64)
    found, other = pair(train, tmp_path / "two", a_run(2, steps=3, **rates), torch.float64)
    same(found, expected, 1e-9)
    same(other, found, 0)


def begun(ranks: Ranks, kind: str, place: Path) -> dict[str, np.ndarray]:
    """The weights that a run begins with, put together from all ranks."""
    start = open_start(kind, str(place))
    own = a_run().model if kind == "run" else replace(a_run().model, vocab_size=384)
    model = build_on_meta(start.model(own))
    mesh = ranks.mesh("cpu", "full") if ranks.world > 1 else None
    parallel.parallelize(model, model.transformer.blocks, torch.device("cpu"), mesh, compiled=False)
    model.to_empty(device="cpu")
    start.fill(model, 3, ranks)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: value.detach().numpy().copy() for name, value in whole.items()}


@pytest.mark.parametrize("kind", ["llama", "run", "exported"])
def test_two_ranks_begin_with_what_one_does(pair, tmp_path, kind):
    """Bit for bit."""
    if kind == "llama":
        write_llama(tmp_path / "it", shard="20KB")
    else:
        write_run(tmp_path / "it", (3,))
    if kind == "exported":
        export(tmp_path / "it", tmp_path / "exported", shard=20_000)
    place, kind = tmp_path / ("exported" if kind == "exported" else "it"), "llama" if kind == "llama" else "run"
    expected = begun(SINGLE_PROCESS, kind, place)
    for found in pair(begun, kind, place):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in found.items())


class Made:
    """A loader of rows made for the test: `kinds` says for each step what stands in each of its rows, over all ranks."""

    def __init__(self, kinds: list[str], ranks: Ranks, vocabulary: Vocabulary):
        self.kinds, self.ranks, self.vocabulary = kinds, ranks, vocabulary

    def batches(self, start) -> Iterator[tuple[Batch, LoaderState]]:
        for step in count(start.block):
            kinds = list(enumerate(self.kinds[step % len(self.kinds)]))[self.ranks.rank :: self.ranks.world]
            batch = in_double(collate([self._row(kind, 10 * step + n) for n, kind in kinds], LENGTH, self.vocabulary))
            # An image teaches the token that begins it; of rows that shall teach no text this goes too.
            silent = torch.tensor([kind in "in" for _, kind in kinds])  # (B,)
            kept = ~silent[batch.text_index // LENGTH]  # (T,)
            yield (
                replace(batch, text_index=batch.text_index[kept], text_target=batch.text_target[kept]),
                LoaderState(step + 1),
            )

    def _row(self, kind: str, seed: int) -> Row:
        drawn = np.random.default_rng(seed)
        image = Image(drawn.standard_normal((1, 8, 8), dtype=np.float32), loss=kind != "n")
        text = Text(tuple(drawn.integers(0, 200, 5).tolist()), loss=kind in "tb")
        segments = {"t": (text,), "i": (image, text), "b": (text, image), "n": (text, image)}[kind]
        return Row((encode_document(Document(segments, seed, "made", derive_seed(seed)), self.vocabulary),))


# What each of two ranks gets in a step: (t)ext, (i)mages that teach nothing else, (b)oth, (n)othing to learn, but an image
# to look at. So there is an image on one rank or none, text on one rank or none, nothing on one rank or both.
MIXTURES = "ti bt tt tb it ib ii bi nb nt in nn tn".split()


def train_made(ranks: Ranks, folder: Path, patches: str) -> Found:
    """One step of each kind, in float64."""
    with precision(torch.float64):
        run = a_run(patches=patches, steps=len(MIXTURES), validate_every=100)
        trainer = new_trainer(folder, run, ranks=ranks)
        trainer.heldout, trainer.loader = {}, Made(MIXTURES, ranks, prepared(run)[1].vocabulary)
        assert trainer.train()
        return whole(trainer), rows_of(folder)


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_rank_that_has_no_image_or_no_text_neither_hangs_nor_weighs_in(pair, tmp_path, patches):
    expected = train_made(SINGLE_PROCESS, tmp_path / "one", patches)
    found, other = pair(train_made, tmp_path / "two", patches)
    same(found, expected, 1e-9)
    same(other, found, 0)


def test_a_loader_of_made_rows_makes_what_it_says():
    """Else the test above would test nothing."""
    vocabulary = prepared(a_run())[1].vocabulary
    for rank, (texts, images) in enumerate(((True, True), (True, False), (False, True), (False, False))):
        batch, _ = next(Made(["btin"], Ranks(rank, 4), vocabulary).batches(LoaderState()))
        assert (batch.text_count > 0, batch.image_count > 0) == (texts, images)


@pytest.mark.parametrize("parts", [2, 4] if THOROUGH else [4])
def test_ranks_are_as_good_as_more_passes(pair, tmp_path, parts):
    """Both at once too: 2 ranks of 2 passes are 4 passes of one."""
    expected = alone(a_run(2, steps=STEPS // 2, accumulate=parts), torch.float64)
    found, _ = pair(train, tmp_path / "two", a_run(2, steps=STEPS // 2, accumulate=parts // 2), torch.float64)
    same(found, expected, 1e-9)


# Checkpoints


@pytest.mark.parametrize("worlds", [(2, 1, 2), (1, 2, 1)] if THOROUGH else [(2, 1, 2)])
def test_a_run_goes_on_with_any_number_of_ranks(pair, tmp_path, worlds):
    expected = alone(a_run(4, "unet"), torch.float64)
    for world, stop_at in zip(worlds, (2, 4, None), strict=True):
        run = a_run(4 // world, "unet")
        if world == 1:
            found = train(SINGLE_PROCESS, tmp_path / "run", run, torch.float64, stop_at)
        else:
            found, _ = pair(train, tmp_path / "run", run, torch.float64, stop_at)
    same(found, expected, 1e-9)


def test_ranks_that_stop_and_go_on_are_as_if_nothing_had_been_and_one_process_opens_what_they_saved(pair, tmp_path):
    """Bit for bit."""
    run = a_run(2, "unet" if THOROUGH else "linear", steps=4, checkpoint_every=2)
    expected, _ = pair(train, tmp_path / "one", run)
    for stop_at in (1, 3, None):
        found, _ = pair(train, tmp_path / "run", run, torch.float32, stop_at)
    same(found, expected, 0)
    for which, part in (("ema", "ema"), ("raw", "model")):
        opened = open_checkpoint(tmp_path / "run", which, "cpu").model.state_dict()
        assert all(np.array_equal(value.numpy(), expected[0][f"{part} {name}"]) for name, value in opened.items())


def spoil(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_ranks_agree_that_a_checkpoint_is_damaged_and_take_the_one_before(pair, tmp_path):
    """Whichever of them reads the file that is damaged."""
    run = a_run(2, steps=4, checkpoint_every=2, keep_checkpoints=3)
    expected, _ = pair(train, tmp_path / "one", run)
    shards = sorted(path.name for path in (tmp_path / "one" / "checkpoints" / "step-000004" / "model").iterdir())
    assert len(shards) == 2
    for shard in shards if THOROUGH else shards[1:]:  # the one that the second rank wrote
        folder = shutil.copytree(tmp_path / "one", tmp_path / shard)
        spoil(folder / "checkpoints" / "step-000004" / "model" / shard)
        found, _ = pair(train, folder, run)
        same(found, expected, 0)
        names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert names == ["step-000002", "step-000004", "step-000004.damaged"]


# How the work is laid out


@pytest.mark.parametrize("ranks", [1, 2])
def test_running_blocks_again_instead_of_remembering_them_changes_nothing(pair, tmp_path, ranks):
    """Bit for bit; and they are run again."""
    found, times = [], []
    for recompute in (False, True):
        asked = tmp_path / str(recompute), a_run(2, steps=3, parallel=ParallelConfig(activation_checkpointing=recompute))
        one, passes = train_passing(SINGLE_PROCESS, *asked) if ranks == 1 else pair(train_passing, *asked)[0]
        found.append(one)
        times.append(passes)
    same(*found, 0)
    assert times == [3, 6]


def train_passing(ranks: Ranks, folder: Path, run: Run) -> tuple[Found, int]:
    """What a run has learnt, and how often its first block was run for it."""
    passes = []
    trainer = new_trainer(folder, run, ranks=ranks)
    norm = trainer.model.transformer.blocks[0].attention_norm
    norm.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    assert trainer.train()
    return (whole(trainer), rows_of(folder)), sum(passes)


def train_counting(ranks: Ranks, folder: Path, run: Run, backend: str) -> tuple[Found, list[int]]:
    """What a run in float64 has learnt, and how many graphs there were after each step."""
    counts = []
    torch._dynamo.reset()
    counters.clear()
    with precision(torch.float64), mock.patch.object(parallel, "COMPILER", backend):
        def look(model, step):
            counts.append(counters["stats"]["unique_graphs"])

        trainer = new_trainer(folder, run, look, lambda batch, _: in_double(batch), ranks)
        assert trainer.train()
        return (whole(trainer), rows_of(folder)), counts


WAYS = [(1, True), (2, False)]  # ranks, and whether blocks are run again; `make test-all` tries the other two as well


@pytest.mark.parametrize(("ranks", "recompute"), [*WAYS, (1, False), (2, True)] if THOROUGH else WAYS)
def test_compiled_blocks_learn_the_same_and_are_compiled_once(pair, tmp_path, ranks, recompute):
    """Alone of more layers than dynamo would compile one by one."""
    run = a_run(2, steps=4, parallel=ParallelConfig(activation_checkpointing=recompute, compile=True))
    run = replace(run, model=replace(run.model, layers=10 if ranks == 1 else 4))
    plain = replace(run, parallel=ParallelConfig(compile=False))
    if ranks == 1:
        expected = alone(plain, torch.float64)
        found, counts = train_counting(SINGLE_PROCESS, tmp_path / "compiled", run, "aot_eager")
    else:
        expected, _ = pair(train, tmp_path / "plain", plain, torch.float64)
        (found, counts), _ = pair(train_counting, tmp_path / "compiled", run, "eager")
    same(found, expected, 1e-12)
    assert counts[0] == 0
    assert 0 < counts[1] < 4
    assert len(set(counts[1:])) == 1


def train_looking(ranks: Ranks, folder: Path, run: Run) -> Found:
    """With the previews that the command makes."""
    trainer = new_trainer(folder, run, ranks=ranks)
    run_folder = RunFolder(folder, describe_run(folder), run, encoder=None)
    looking(trainer, runs._previewer(run_folder, open_raw(run.data, "heldout"), torch.device("cpu"), ranks))
    assert trainer.train()
    return whole(trainer), rows_of(folder)


def test_looks_at_what_two_ranks_learn_change_nothing(pair, tmp_path):
    """Previews after every step, and held-out losses after every step, on every rank."""
    expected, _ = pair(train, tmp_path / "one", a_run(2, steps=3, validate_every=100))
    found, _ = pair(train_looking, tmp_path / "two", a_run(2, steps=3, validate_every=1))
    for row in found[1][1:-1]:
        row.pop("heldout", None)
    same((found[0], [row for row in found[1] if len(row) > 1]), expected, 0)
    assert len(list((tmp_path / "two" / "samples").glob("*.png"))) == 4


# Signals


def train_with_a_signal(ranks: Ranks, folder: Path, run: Run, number: int, step: int, to: int) -> int:
    """One rank alone gets a signal in a step; where it stopped."""
    def look(model, now):
        if now == step and ranks.rank == to:
            signal.raise_signal(number)

    trainer = (resumed if (folder / "checkpoints").exists() else new_trainer)(folder, run, look, ranks=ranks)
    ranks.wait()
    assert not trainer.train()
    return trainer.loop.progress.step


def test_a_signal_to_one_rank_stops_all_after_the_same_step(pair, tmp_path):
    run = a_run(2, steps=7 if THOROUGH else 4)
    expected, _ = pair(train, tmp_path / "one", run)
    signals = ((signal.SIGTERM, 1, 0), (signal.SIGUSR1, 3, 1), (signal.SIGINT, 5, 1))
    for number, step, to in signals if THOROUGH else signals[:2]:
        run_looking = replace(run, training=replace(run.training, preview_every=1))
        assert pair(train_with_a_signal, tmp_path / "two", run_looking, number, step, to) == [step, step]
    found, _ = pair(train, tmp_path / "two", run)
    same(found, expected, 0)


# Machines of their own


@pytest.mark.slow
def test_machines_that_hold_all_weights_each_learn_what_one_process_learns(tmp_path):
    """Hybrid sharding, 2 machines of 2 ranks, over patches or a U-Net whose last matrix has fewer rows than there are ranks.
    What they save one process goes on with, and the other way round.
    """
    one = a_run(4, "unet" if THOROUGH else "linear", steps=3)
    if not THOROUGH:  # a U-Net has so many parameters that torch takes long to plan the first step
        one = replace(one, model=replace(one.model, patch_size=1), data=replace(one.data, seq_len=128))
    assert any(len(parameter) == 1 for parameter in build_on_meta(one.model).patches.parameters())
    hybrid = replace(one, data=replace(one.data, rows=1), parallel=ParallelConfig("hybrid"))
    expected = alone(one, torch.float64)
    world = World(4, per_machine=2)
    try:
        assert world(shape_of_mesh, "hybrid") == [(2, 2)] * 4
        world(train, tmp_path / "run", hybrid, torch.float64, 1)
        train(SINGLE_PROCESS, tmp_path / "run", one, torch.float64, 2)
        found, *others = world(train, tmp_path / "run", hybrid, torch.float64)
        same(found, expected, 1e-9)
        for other in others:
            same(other, found, 0)
    finally:
        world.close()


def shape_of_mesh(ranks: Ranks, shard: str) -> tuple[int, ...]:
    return tuple(ranks.mesh("cpu", shard).mesh.shape)


# Codecs

AUTOENCODER = AutoencoderConfig(channels=4, width=8, multipliers=(1, 2), blocks=1)
FITTING = CodecTrainingConfig(
    steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=100, validate_every=6,
    log_every=1,
    heldout=4, revive_after=2,
)  # fmt: skip
CODECS = {
    "autoencoder": (AUTOENCODER, FITTING), "with a discriminator": (AUTOENCODER, replace(FITTING, gan_from=2)),
    "vq": (replace(AUTOENCODER, codes=128), FITTING),  # more codes than there is use for
}  # fmt: skip


def fit(
    ranks: Ranks, folder: Path, network: AutoencoderConfig, config: CodecTrainingConfig, stop_at: int | None = None
) -> Found:
    """Begin a codec or go on with it, in float64."""
    with precision(torch.float64), narrow_discriminator():
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
        ranks.wait()
        # Noise: where pixels are alike, codes are too, and rounding says which of them is the nearest.
        pictures = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
        trainer = CodecTrainer(network, config, folder, pictures, torch.device("cpu"), ranks)
        state = restore_newest(folder, trainer.tensors(), ranks)
        if state:
            trainer.loop.load_state(state[1])
        real = trainer.step

        def step(number, *rest):
            trainer.loop.stop_asked = number + 1 == stop_at
            return real(number, *rest)

        trainer.step = step
        assert trainer.train() == (stop_at is None)
        ranks.wait()
        if stop_at is not None:
            return {}, []
        rows = [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in rows_of(folder)]
        return whole(trainer), rows


if not THOROUGH:
    CODECS.pop("autoencoder")  # until step 2 it is the one with a discriminator


@pytest.mark.parametrize(("network", "config"), CODECS.values(), ids=CODECS)
def test_a_codec_is_the_same_from_two_ranks_and_goes_on_with_any_number(pair, tmp_path, network, config):
    expected = fit(SINGLE_PROCESS, tmp_path / "one", network, config)
    if network.codes:
        revived = [row["revived"] for row in expected[1] if "revived" in row]
        assert 0 < revived[0] < revived[-1]
    found, other = pair(fit, tmp_path / "two", network, config)
    same(found, expected, 1e-9)
    same(other, found, 0)
    for world, stop_at in ((2, 3), (1, 5), (2, None)):
        if world == 1:
            found = fit(SINGLE_PROCESS, tmp_path / "both", network, config, stop_at)
        else:
            found, _ = pair(fit, tmp_path / "both", network, config, stop_at)
    same(found, expected, 1e-9)


def test_pictures_that_cannot_be_shared_out_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="batch_size 4 cannot be shared out evenly among 3 processes"):
        CodecTrainer(AUTOENCODER, FITTING, tmp_path, np.zeros((30, 16, 16, 3), np.uint8), torch.device("cpu"), Ranks(1, 3))


# As commands

TRAIN = ("train", "digits", *TINY, "--training.steps", 9, "--training.validate-every", 9, "--training.preview-every", 9,
         "--training.log-every", 1)  # fmt: skip


def hurt_at_step_6(number: int, *arguments: object) -> None:
    """A command whose second process, the first time that it is started, gets a signal in step 6."""
    real = Trainer.step

    def step(self, done, *rest):
        if done == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), number)
        return real(self, done, *rest)

    Trainer.step = step
    command(*arguments)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    files = sorted(newest_checkpoint(folder).rglob("*.safetensors"))
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run of two processes under torchrun, for tests that compare with it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert "training digits on 2 processes (cpu)" in torchrun(command, *TRAIN, "--out", folder)
    return folder


def same_runs(one: Path, other: Path) -> None:
    """Bit for bit."""
    found, expected = weights_of(one), weights_of(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert rows_of(one) == rows_of(other)


@pytest.mark.slow
def test_train_under_torchrun_outlives_a_killed_process(undisturbed, tmp_path):
    """kill -9, after which torchrun starts both anew. It ends near what one process with as many rows learns."""
    said = torchrun(hurt_at_step_6, signal.SIGKILL, *TRAIN, "--out", tmp_path / "killed", restarts=1)
    assert "going on from" in said
    assert "transfusion: another process of this work has stopped; what it said tells why" in said
    assert "Traceback" not in said
    same_runs(tmp_path / "killed", undisturbed)
    command(*TRAIN, "--data.rows", 4, "--out", tmp_path / "alone")
    pairs = zip(rows_of(undisturbed), rows_of(tmp_path / "alone"), strict=True)
    for row, expected in [(row, expected) for row, expected in pairs if "text_loss" in row]:
        assert numbers(row) == pytest.approx(numbers(expected), rel=1e-3)
    assert open_checkpoint(tmp_path / "killed").step == 9


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all: a signal to one of two ranks is tested without torchrun too")
def test_train_under_torchrun_stops_at_a_signal_and_goes_on(undisturbed, tmp_path):
    """SIGUSR1 to one process only, after which both save and the same command goes on."""
    said = torchrun(hurt_at_step_6, signal.SIGUSR1, *TRAIN, "--out", tmp_path / "asked")
    assert said.count("stopped at step 6 and saved") == 1
    assert newest_checkpoint(tmp_path / "asked").name == "step-000006"
    said = torchrun(command, *TRAIN, "--out", tmp_path / "asked")
    assert said.count(f"going on from {tmp_path / 'asked' / 'checkpoints' / 'step-000006'}") == 1
    same_runs(tmp_path / "asked", undisturbed)


@pytest.mark.slow
def test_fit_codec_under_torchrun_makes_the_codec_of_one_process(tmp_path):
    write_photos(tmp_path / "photos", 40)
    asked = ("data", "fit-codec", "small", tmp_path / "photos", *FIT, "--training.revive-after", 2)
    said = torchrun(command, *asked, "--out", tmp_path / "two")
    assert said.count("held out: PSNR") == 1
    command(*asked, "--out", tmp_path / "one")
    found, expected = (load_file(tmp_path / name / "codec.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert far(found[name].numpy().astype(float), value.numpy().astype(float)) <= 1e-4, name
    one, other = (read_json(tmp_path / name / "codec.json")["heldout"] for name in ("two", "one"))
    assert one == pytest.approx(other, rel=1e-4)
    assert (tmp_path / "two" / "reconstructions.html").exists()
