"""Training steps of every named run that fits the device: positions per second, share of the peak FLOP/s, and memory."""

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from transfusion.model.flops import count_training_flops
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.parallel import pick_device, precision
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Batch
from transfusion.training.trainer import MicroBatches, Trainer

SMALL_RUNS = ("digits", "shapes")
WARMUP_STEPS, NUM_READS = 3, 8  # reads are trained on in turn
STATE_BYTES = 20  # per parameter: weights, EMA, gradient and two moments
MAX_STATE_SHARE = 0.75  # of the free memory; a larger model is not tried
PEAK_TFLOPS = {  # bfloat16, from the data sheets; the first name that is part of the device's name is used
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
}  # fmt: skip


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
    return Trainer(run, Path(), Loader(open_sources(run.data, "train"), encoder), {}, device)


def make_paper_trainer(name: str, rows: int, device: torch.device) -> Trainer:
    """A model of the paper before its first step."""
    run = named_run(name)
    run = replace(run, data=replace(run.data, rows=rows))
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
    functions = {"step": step} | {shape: partial(run_matmuls, *make_operands(shape, device)) for shape in matmul_shapes(run)}
    if setting.cuda:
        functions["causal"] = make_stepper(trainer, [make_causal(read) for read in reads])
    seconds = time_alternately(functions, setting.pick(10 if setting.cuda else 40, 1), device)
    parameters, positions = count_parameters(trainer.model), mean_per_step(reads, lambda batch: batch.positions)
    speeds = {shape: NUM_MATMULS * 2 * shape[0] * shape[1] * shape[2] / seconds[shape] for shape in matmul_shapes(run)}
    rows, width = run.data.rows * run.data.seq_len, run.model.width
    baselines = {"matmul rows x width x width": speeds[rows, width, width], "its fastest matmul": max(speeds.values())}
    device_name = torch.cuda.get_device_name(device) if setting.cuda else ""
    peak_tflops = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)
    if peak_tflops is not None:
        baselines[f"{peak_tflops} TFLOP/s, data sheet"] = peak_tflops * 1e12
    standard = 6 * parameters + 12 * run.model.layers * width * run.data.seq_len
    conventions = {
        "FLOPs of the actual batch": mean_per_step(reads, lambda batch: count_training_flops(batch, run.model)),
        "standard FLOPs, 6 N + 12 l w L": standard * positions,
    }
    size = f"{run.name}, {parameters / 1e6:.1f}M, {run.data.rows} x {run.data.seq_len:,}"
    yield Figure(f"{size}: a step", positions / seconds["step"], "positions/s")
    for convention, flops in conventions.items():
        for baseline, baseline_flops in baselines.items():
            speed = flops / seconds["step"]
            yield Figure(f"  {convention}", speed / 1e9, "GFLOP/s", speed / baseline_flops, baseline)
    if setting.cuda:
        ratio = seconds["causal"] / seconds["step"]
        yield Figure("  with its own mask", positions / seconds["step"], "positions/s", ratio, "plain causal attention")
        yield memory_figure("  memory on the device", peak)


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
    rows, width, intermediate = run.data.rows * run.data.seq_len, run.model.width, run.model.feed_forward_size
    return sorted(
        {(rows, width, width), (rows, width, 3 * width), (rows, width, 2 * intermediate), (rows, intermediate, width)}
    )


def make_operands(shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Two matrices (m, k) and (k, n) and the output (m, n), in the precision of a forward pass."""
    m, k, n = shape
    return tuple(torch.randn(size, device=device, dtype=precision(device)) for size in ((m, k), (k, n), (m, n)))


def run_matmuls(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    for _ in range(NUM_MATMULS):
        torch.mm(a, b, out=out)


# Memory on a CPU


def measure_process_memory(name: str) -> Figure:
    """The peak memory of a process that only trains this run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return memory_figure("  memory of a process that trains it", pool.submit(train_and_read_memory, name).result())


def train_and_read_memory(name: str) -> float | None:
    trainer = make_small_trainer(name, pick_device("cpu"))
    step = make_stepper(trainer, [read for read, _ in islice(trainer.batches(None), NUM_READS)])
    for _ in range(WARMUP_STEPS):
        step()
    return peak_memory_mib()
