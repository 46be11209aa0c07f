"""Training steps of every recipe that fits the device: positions per second, share of the peak FLOP/s, and memory."""

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import torch

from benchmarks.fixtures import make_paper_loader
from benchmarks.timing import Figure, Setting, format_number, memory_figure, time_alternately
from benchmarks.worker import peak_memory_mib
from transfusion.config import Run
from transfusion.data.loader import Loader
from transfusion.data.sources import fit, open_sources
from transfusion.model.flops import count_training_flops, count_usual_flops, find_peak_tflops
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.parallel import (
    CPUINFO,
    cpu_flags,
    has_cpu_bfloat16,
    keep_freed_memory,
    onednn_matmul,
    pick_device,
    precision,
)
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Batch
from transfusion.training.trainer import MicroBatches, Trainer

SMALL_RUNS = ("digits", "shapes")
WARMUP_STEPS, NUM_READS = 3, 8  # reads are trained on in turn
STATE_BYTES = 20  # per parameter: weights, EMA, gradient and two moments
MAX_STATE_SHARE = 0.75  # of the free memory; a larger model is not tried


def measure(setting: Setting) -> Iterator[Figure]:
    """On a CPU the small runs with their own data; on CUDA the paper's sizes with as many random rows as fit."""
    for name in setting.pick(SMALL_RUNS, SMALL_RUNS[:1]) if not setting.cuda else ():
        yield from measure_steps(make_small_trainer(name, setting.device), setting)
        yield measure_process_memory(name)
    rows = 8
    for name in setting.pick(tuple(SIZES), ("0.16b",)) if setting.cuda else ():
        rows, figures = measure_largest_batch(name, rows, setting)
        yield from figures


def make_small_trainer(name: str, device: torch.device) -> Trainer:
    """A small run before its first step."""
    run = named_run(name)
    encoder = fit(run.data, run.model.patch_size, 0)
    run = replace(run, model=replace(run.model, vocab_size=encoder.vocabulary.size))
    return Trainer(run, Path(), Loader(open_sources(run.data, "train"), encoder, run.training.batch_size), {}, device)


def make_paper_trainer(name: str, rows: int, device: torch.device) -> Trainer:
    """A model of the paper before its first step."""
    run = named_run(name)
    run = replace(run, training=replace(run.training, batch_size=rows))
    return Trainer(run, Path(), make_paper_loader(run.data.seq_len, rows), {}, device)


def measure_largest_batch(name: str, rows: int, setting: Setting) -> tuple[int, list[Figure]]:
    """Measure a model of the paper; halve `rows` until a step fits in memory. Return the rows (0: none fit) and figures."""
    required = STATE_BYTES * count_parameters(build_on_meta(SIZES[name]))
    free = torch.cuda.mem_get_info(setting.device)[0]
    while rows and required < MAX_STATE_SHARE * free:
        try:
            figures = list(measure_steps(make_paper_trainer(name, rows, setting.device), setting))
        except torch.OutOfMemoryError:
            figures = []
        gc.collect()
        torch.cuda.empty_cache()
        if figures:
            return rows, figures
        rows //= 2
    state, memory = format_number(required / 2**30), format_number(free / 2**30)
    return 0, [Figure(name, beside=f"left out: {state} GiB of state and the rows do not fit in {memory} GiB")]


def measure_steps(trainer: Trainer, setting: Setting) -> Iterator[Figure]:
    """Time training steps and plain matrix products alternately."""
    run, device = trainer.run, setting.device
    reads = [read for read, _ in islice(trainer.batches(None), NUM_READS)]
    step = make_stepper(trainer, reads)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP_STEPS):
        step()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if setting.cuda else None
    products, others = matmul_functions(run, device), other_steps(trainer, reads, step)
    seconds = time_alternately({"step": step} | products | others, setting.pick(10 if setting.cuda else 40, 1), device)
    baselines = {}  # FLOP/s of the fastest shape, by kind
    for kind, (m, k, n) in products:
        baselines[kind] = max(baselines.get(kind, 0), NUM_MATMULS * 2 * m * k * n / seconds[kind, (m, k, n)])
    peak_tflops = find_peak_tflops(device)
    if peak_tflops is not None:
        baselines[f"{peak_tflops} TFLOP/s, data sheet"] = peak_tflops * 1e12
    parameters, positions = count_parameters(trainer.model), mean_per_step(reads, lambda batch: batch.positions)
    standard = count_usual_flops(run.model, parameters, run.data.seq_len)
    conventions = {
        "FLOPs of the actual batch": mean_per_step(reads, lambda batch: count_training_flops(batch, run.model)),
        "standard FLOPs, 6 N + 12 l w L": standard * positions,
    }
    size = f"{run.recipe}, {parameters / 1e6:.1f}M, {run.training.batch_size} x {run.data.seq_len:,}"
    yield Figure(f"{size}: a step", positions / seconds["step"], "positions/s")
    for other in others:
        yield Figure("  a step", positions / seconds["step"], "positions/s", seconds[other] / seconds["step"], other)
    for convention, flops in conventions.items():
        for baseline, baseline_flops in baselines.items():
            speed = flops / seconds["step"]
            yield Figure(f"  {convention}", speed / 1e9, "GFLOP/s", speed / baseline_flops, baseline)
    for baseline, flops in baselines.items():
        yield Figure(f"  {baseline}", flops / 1e9, "GFLOP/s")
    if setting.cuda:
        yield memory_figure("  memory on the device", peak)


def other_steps(trainer: Trainer, reads: list[MicroBatches], step: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The same step computed otherwise: on CUDA under a plain causal mask, on a CPU with other matrix products."""
    if trainer.device.type == "cuda":
        return {"plain causal attention": make_stepper(trainer, [make_causal(read) for read in reads])}

    def step_with(cpu_matmul: str) -> None:
        run, trainer.run = trainer.run, replace(trainer.run, parallel=replace(trainer.run.parallel, cpu_matmul=cpu_matmul))
        step()
        trainer.run = run

    choices = ("default", *(["bfloat16"] if has_cpu_bfloat16() else []))
    return {f"cpu_matmul {choice}": partial(step_with, choice) for choice in choices}


def make_stepper(trainer: Trainer, reads: list[MicroBatches]) -> Callable[[], object]:
    """A function that runs the trainer's step on the next of these reads. TrainingError if a gradient is not finite."""
    next_reads, steps = cycle(reads), count()

    def step() -> None:
        read = next(next_reads)
        trainer.step(next(steps), read, trainer.count(read), trainer.loop.guard)()

    return step


def make_causal(read: MicroBatches) -> MicroBatches:
    """The same positions with a plain causal mask: one document per row, no bidirectional images."""
    return [
        (
            replace(
                batch, document_ids=torch.zeros_like(batch.document_ids), image_ids=torch.full_like(batch.image_ids, -1)
            ),
            noise,
        )
        for batch, noise in read
    ]


def mean_per_step(reads: list[MicroBatches], count_batch: Callable[[Batch], int]) -> float:
    return sum(count_batch(batch) for read in reads for batch, _ in read) / len(reads)


# Matrix products

NUM_MATMULS = 12  # about the work of one layer's forward and backward pass


def matmul_shapes(run: Run) -> list[tuple[int, int, int]]:
    """The shapes (m, k, n) of a run's products: rows x width x width, the fused q, k, v, and the feed-forward layers."""
    rows, width, intermediate = run.training.batch_size * run.data.seq_len, run.model.width, run.model.feed_forward_size
    return sorted(
        {(rows, width, width), (rows, width, 3 * width), (rows, width, 2 * intermediate), (rows, intermediate, width)}
    )


def matmul_functions(run: Run, device: torch.device) -> dict[tuple[str, tuple[int, int, int]], Callable[[], object]]:
    """Plain products of a run's shapes, by kind and shape; the fastest shape counts. On a CPU torch's default may not be
    the fastest library, so float32 is also measured in oneDNN, and bfloat16 if there are instructions for it."""
    kinds = {"its fastest matmul": (precision(device), nullcontext)}
    if device.type == "cpu":
        kinds = {"float32 matmul, torch.mm": (torch.float32, nullcontext)}
        if "amx_tile" not in cpu_flags(CPUINFO):  # with AMX oneDNN computes float32 in bfloat16
            kinds["float32 matmul, oneDNN"] = torch.float32, onednn_matmul
        if has_cpu_bfloat16():
            kinds["bfloat16 matmul"] = torch.bfloat16, nullcontext
    return {
        (kind, shape): partial(run_matmuls, context, *make_operands(shape, device, dtype))
        for kind, (dtype, context) in kinds.items() for shape in matmul_shapes(run)
    }  # fmt: skip


def make_operands(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Two matrices (m, k) and (k, n) and the output (m, n)."""
    m, k, n = shape
    return tuple(torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n), (m, n)))


def run_matmuls(
    context: Callable[[], AbstractContextManager], a: torch.Tensor, b: torch.Tensor, out: torch.Tensor
) -> None:
    with context():
        for _ in range(NUM_MATMULS):
            torch.mm(a, b, out=out)


# Memory on a CPU


def measure_process_memory(name: str) -> Figure:
    """The peak memory of a process that only trains this run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return memory_figure("  memory of a process that trains it", pool.submit(train_and_read_memory, name).result())


def train_and_read_memory(name: str) -> float | None:
    device = pick_device("cpu")
    keep_freed_memory(device)
    trainer = make_small_trainer(name, device)
    step = make_stepper(trainer, [read for read, _ in islice(trainer.batches(None), NUM_READS)])
    for _ in range(WARMUP_STEPS):
        step()
    return peak_memory_mib()
