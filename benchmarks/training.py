"""A training step of every named run that fits the device: positions a second, of the machine's matrix speed, and memory."""

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import torch

from benchmarks.made import paper_loader
from benchmarks.measuring import Figure, Setting, in_turn, memory, number
from benchmarks.sides import peak_memory
from transfusion.config import Run
from transfusion.data.loader import Loader
from transfusion.data.sources import fit, open_sources
from transfusion.model.flops import count_training_flops
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.parallel import pick_device, precision
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Batch
from transfusion.training.trainer import Read, Trainer

SMALL = ("digits", "shapes")
WARM, READS = 3, 8  # steps that do not count; reads that are trained on in turn
STATE = 20  # bytes of memory for each parameter: weights, their average, a gradient and two moments
ROOM_FOR_STATE = 0.75  # of what is free; with more there is no use in trying
PEAKS = {  # TFLOP/s in bfloat16 by the data sheets; the first name that is part of the device's counts
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
}  # fmt: skip


def measure(setting: Setting) -> Iterator[Figure]:
    """On a CPU the small runs on their own data; on CUDA the paper's sizes, on as many rows of the paper's kind as fit."""
    for name in setting.pick(SMALL, SMALL[:1]) if not setting.cuda else ():
        yield from figures(small(name, setting.device), setting)
        yield memory_of_a_process(name)
    rows = 8
    for name in setting.pick(tuple(SIZES), ("0.16b",)) if setting.cuda else ():
        rows, found = as_many_rows_as_fit(name, rows, setting)
        yield from found


def small(name: str, device: torch.device) -> Trainer:
    """A small run at its first step."""
    run = named_run(name)
    encoder = fit(run.data, run.model.patch_size, 0)
    run = replace(run, model=replace(run.model, vocab_size=encoder.vocabulary.size))
    return Trainer(run, Path(), Loader(open_sources(run.data, "train"), encoder), {}, device)


def paper_sized(name: str, rows: int, device: torch.device) -> Trainer:
    """One of the paper's models at its first step."""
    run = named_run(name)
    run = replace(run, data=replace(run.data, rows=rows))
    return Trainer(run, Path(), paper_loader(run.data.seq_len, rows), {}, device)


def as_many_rows_as_fit(name: str, rows: int, setting: Setting) -> tuple[int, list[Figure]]:
    """One of the paper's models with so many rows in a step, or half as many, and so on; 0 where none fits."""
    need, room = STATE * count_parameters(build_on_meta(SIZES[name])), torch.cuda.mem_get_info(setting.device)[0]
    while rows and need < ROOM_FOR_STATE * room:
        try:
            found = list(figures(paper_sized(name, rows, setting.device), setting))
        except torch.OutOfMemoryError:
            found = []
        gc.collect()
        torch.cuda.empty_cache()
        if found:
            return rows, found
        rows //= 2
    why = f"left out, {number(need / 2**30)} GiB of state and rows beside it do not fit in {number(room / 2**30)} GiB"
    return 0, [Figure(name, beside=why)]


def figures(trainer: Trainer, setting: Setting) -> Iterator[Figure]:
    """Steps and bare products in turn."""
    run, device = trainer.run, setting.device
    reads = [read for read, _ in islice(trainer.read(None), READS)]
    step = stepper(trainer, reads)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM):
        step()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if setting.cuda else None
    ways = {"step": step} | {shape: partial(multiply, *operands(shape, device)) for shape in products_of(run)}
    if setting.cuda:
        ways["causal"] = stepper(trainer, [causal(read) for read in reads])
    seconds = in_turn(ways, setting.pick(10 if setting.cuda else 40, 1), device)
    parameters, positions = count_parameters(trainer.model), mean(reads, lambda batch: batch.positions)
    speed = {shape: TIMES * 2 * shape[0] * shape[1] * shape[2] / seconds[shape] for shape in products_of(run)}
    rows, width = run.data.rows * run.data.seq_len, run.model.width
    beside = {"bare rows x width x width": speed[rows, width, width], "its fastest bare product": max(speed.values())}
    sheet = next((top for name, top in PEAKS.items() if setting.cuda and name in torch.cuda.get_device_name(device)), None)
    if sheet is not None:
        beside[f"{sheet} TFLOP/s, data sheet"] = sheet * 1e12
    usual = 6 * parameters + 12 * run.model.layers * width * run.data.seq_len
    conventions = {
        "FLOPs of the real batch": mean(reads, lambda batch: count_training_flops(batch, run.model)),
        "FLOPs as usual, 6 N + 12 l w L": usual * positions,
    }
    size = f"{run.name}, {parameters / 1e6:.1f}M, {run.data.rows} x {run.data.seq_len:,}"
    yield Figure(f"{size}: a step", positions / seconds["step"], "positions/s")
    for convention, flops in conventions.items():
        for product, fastest in beside.items():
            reached = flops / seconds["step"]
            yield Figure(f"  {convention}", reached / 1e9, "GFLOP/s", reached / fastest, product)
    if setting.cuda:
        ratio = seconds["causal"] / seconds["step"]
        yield Figure("  with its own mask", positions / seconds["step"], "positions/s", ratio, "plain causal attention")
        yield memory("  memory on the device", peak)


def stepper(trainer: Trainer, reads: list[Read]) -> Callable[[], object]:
    """The trainer's own step, on these reads in turn. RuntimeError when one's gradient is not finite."""
    coming, numbers = cycle(reads), count()

    def allows(number: int, norm: float, *_) -> bool:
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient of step {number} is not finite")
        return True

    return lambda: trainer.step(next(numbers), next(coming), allows)


def causal(read: Read) -> Read:
    """The same positions, but every row one document, and images no more than text to the mask."""
    return [
        (
            replace(
                batch, document_ids=torch.zeros_like(batch.document_ids), image_ids=torch.full_like(batch.image_ids, -1)
            ),
            draws,
        )
        for batch, draws in read
    ]


def mean(reads: list[Read], of: Callable[[Batch], int]) -> float:
    """Of a step, over all reads."""
    return sum(of(batch) for read in reads for batch, _ in read) / len(reads)


# Bare products

TIMES = 12  # about the work of one layer's forward and backward


def products_of(run: Run) -> list[tuple[int, int, int]]:
    """The shapes of a run's own matrix products: rows x width x width, those of attention together, of the feed-forward."""
    rows, width, hidden = run.data.rows * run.data.seq_len, run.model.width, run.model.feed_forward_size
    return sorted({(rows, width, width), (rows, width, 3 * width), (rows, width, 2 * hidden), (rows, hidden, width)})


def operands(shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Two matrices and the place of their product, in the precision of a forward pass."""
    m, k, n = shape
    return tuple(torch.randn(side, device=device, dtype=precision(device)) for side in ((m, k), (k, n), (m, n)))


def multiply(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> None:
    for _ in range(TIMES):
        torch.mm(a, b, out=product)


# Memory on a CPU


def memory_of_a_process(name: str) -> Figure:
    """Of one that does nothing but train this run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return memory("  memory of a process that trains it", pool.submit(memory_of_training, name).result())


def memory_of_training(name: str) -> float | None:
    trainer = small(name, pick_device("cpu"))
    step = stepper(trainer, [read for read, _ in islice(trainer.read(None), READS)])
    for _ in range(WARM):
        step()
    return peak_memory()
