"""python -m benchmarks.gpu: one GPU in ten minutes. Tests, training, memory, loading and inference, in one JSON file.

Each part has its own process and its own time, so a part that fails, hangs or exhausts the memory costs only itself.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Annotated

import torch
import tyro

from benchmarks import decoding, drawing
from benchmarks.fixtures import make_paper_loader
from benchmarks.timing import ROOT, TABLE_HEAD, Figure, Setting, describe_machine
from transfusion.config import Machines, ParallelConfig, Run
from transfusion.disk import write_json
from transfusion.model.flops import count_training_flops, count_usual_flops, find_peak_tflops
from transfusion.model.transfusion import count_parameters
from transfusion.parallel import pick_device
from transfusion.plan import estimate_memory
from transfusion.runs import named_run
from transfusion.sequence import Batch
from transfusion.training.trainer import MicroBatches, Trainer

TESTS = "tests/test_gpu.py"
WARMUP_STEPS, MAX_STEPS, MAX_SECONDS = 4, 40, 25
MEMORY_SHARE = 0.95  # of the free memory; the rest is for its fragments
Part = Callable[[Setting], Iterator[Figure]]


def run_tests(setting: Setting) -> Iterator[Figure]:
    """The tests that compare a GPU with a CPU. RuntimeError with pytest's last line when one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last_line = process.stdout.strip().splitlines()[-1] if process.stdout.strip() else process.stderr.strip()[-200:]
    if process.returncode:
        raise RuntimeError(f"{TESTS}: {last_line}")
    yield Figure(TESTS, beside=last_line)


def measure_size(name: str, setting: Setting, activation_checkpointing: bool = False) -> Iterator[Figure]:
    """Training steps of a model of the paper, as large as `plan` says that it fits."""
    memory = int(MEMORY_SHARE * torch.cuda.mem_get_info(setting.device)[0]) if setting.cuda else Machines().memory
    run = replace(named_run(name), parallel=ParallelConfig(activation_checkpointing=activation_checkpointing))
    yield from measure_training(largest_run(run, memory), setting)


def largest_run(run: Run, memory: int) -> Run:
    """The run with most layers, and 8 rows or 4, that fits in `memory` bytes by `plan`. ValueError if none does."""
    for layers in range(run.model.layers, 0, -1):
        for rows in (8, 4):
            model, training = replace(run.model, layers=layers), replace(run.training, batch_size=rows)
            candidate = replace(run, model=model, training=training)
            if estimate_memory(candidate, Machines()).all <= memory:
                return candidate
    raise ValueError(f"{run.recipe}: one layer with 4 rows does not fit in {memory:,} bytes; use a GPU with more memory")


def measure_training(run: Run, setting: Setting) -> Iterator[Figure]:
    """Training steps with their loader: speed, share of the peak FLOP/s, and memory against the estimate of `plan`."""
    device = setting.device
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(device)
    loader = make_paper_loader(run.data.seq_len, run.training.batch_size)
    trainer = Trainer(run, Path(), loader, {}, device, init_from=init_on_device)
    loaded = load_ahead(trainer.batches(None))
    run_steps(trainer, islice(loaded, setting.pick(WARMUP_STEPS, 1)))  # they compile
    steps = run_steps(trainer, islice(loaded, setting.pick(MAX_STEPS, 2)))
    loaded.close()
    parameters, seq_len = count_parameters(trainer.model), run.data.seq_len
    size = f"{run.recipe}, {run.model.layers} layers, {run.training.batch_size} x {seq_len:,}"
    speed = steps.positions / steps.seconds
    yield Figure(size, speed, "positions/s", beside=f"{parameters:,} parameters")
    peak = find_peak_tflops(device)
    per_position = {
        "FLOPs of the actual batch": count_training_flops(steps.batch, run.model) / steps.batch.positions,
        "standard FLOPs, 6 N + 12 l w L": count_usual_flops(run.model, parameters, seq_len),
    }
    for convention, flops in per_position.items():
        mfu = peak and speed * flops / (peak * 1e12)
        yield Figure(f"  {convention}", speed * flops / 1e9, "GFLOP/s", mfu, f"{peak} TFLOP/s, data sheet" if peak else "")
    yield Figure("  waiting for the loader", 100 * steps.waiting / steps.seconds, "% of a step")
    yield Figure("  loading, during the step before", 100 * steps.loading / steps.seconds, "% of a step")
    if setting.cuda:
        estimate, used = estimate_memory(run, Machines()), torch.cuda.max_memory_allocated(device)
        planned = estimate.all - estimate.cuda
        yield Figure("  memory on the device", used / 2**20, "MiB", used / planned, f"{planned / 2**20:,.0f} MiB by plan")


@torch.no_grad()
def init_on_device(model: torch.nn.Module) -> None:
    """Random weights. Those of a run come from the CPU, which takes a minute for 7b."""
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02)


@dataclass
class Steps:
    """Measured steps, in seconds: in all, of waiting for a batch, and of loading in the thread. `batch` is the last one."""

    seconds: float = 0.0
    waiting: float = 0.0
    loading: float = 0.0
    positions: int = 0
    batch: Batch | None = None


def load_ahead(batches: Iterator[tuple[MicroBatches, object]]) -> Iterator[tuple[MicroBatches, float]]:
    """The micro-batches of each step, loaded in a thread during the step before, and the seconds that this took."""

    def load() -> tuple[MicroBatches, float]:
        start = time.perf_counter()
        micro_batches, _ = next(batches)
        return micro_batches, time.perf_counter() - start

    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        while True:
            loaded = loading.result()
            loading = thread.submit(load)
            yield loaded


def run_steps(trainer: Trainer, loaded: Iterator[tuple[MicroBatches, float]]) -> Steps:
    """Run these steps, for at most MAX_SECONDS, as the training loop does: numbers are read one step late."""
    steps, reads, start = Steps(), [], time.perf_counter()
    while time.perf_counter() - start < MAX_SECONDS:
        begin = time.perf_counter()
        micro_batches, seconds = next(loaded, (None, 0.0))
        if micro_batches is None:
            break
        steps.waiting += time.perf_counter() - begin
        steps.loading += seconds
        counts = trainer.count(micro_batches)
        reads.append(trainer.step(len(reads), micro_batches, counts, trainer.loop.guard))
        if len(reads) > 1:
            reads[-2]()
        steps.positions += counts[-1]
        steps.batch, _ = micro_batches[-1]
    reads[-1]()
    steps.seconds = time.perf_counter() - start
    return steps


PARTS: dict[str, tuple[Part, int]] = {  # with its limit in seconds
    "tests": (run_tests, 120),
    "0.16b": (partial(measure_size, "0.16b"), 75),
    "0.76b": (partial(measure_size, "0.76b"), 85),
    "1.4b": (partial(measure_size, "1.4b"), 85),
    "7b": (partial(measure_size, "7b", activation_checkpointing=True), 110),
    "decoding": (decoding.measure, 50),
    "drawing": (drawing.measure, 75),
}


# Parts in processes


def run_part(part: Part, setting: Setting, limit: float) -> Iterator[Figure | str]:
    """Each figure of a part as soon as it is measured in a process; then the error, if there was one."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(part, setting, sender))
    process.start()
    sender.close()
    deadline, is_open = time.monotonic() + limit, True
    try:
        while is_open and receiver.poll(max(0, deadline - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:  # the process has ended
                is_open = False
        if is_open:
            yield f"stopped after its limit of {limit:.0f} s"
            return
        process.join()
        if process.exitcode:
            yield f"the process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.kill()
        process.join()


def _measure(part: Part, setting: Setting, sender: Connection) -> None:
    os.setsid()
    Thread(target=_end_with_program, daemon=True).start()
    try:
        for figure in part(setting):
            sender.send(figure)
    except Exception as error:  # noqa: BLE001 (any: the other parts still run)
        first_line = next(iter(str(error).splitlines()), "")
        sender.send(f"{type(error).__name__}: {first_line}")


def _end_with_program() -> None:
    """End this process, and those that it has started, when the program is killed."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


@dataclass
class Options:
    """Measure one GPU within a time limit; every figure is written as soon as it is known."""

    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Parts to measure, in this order: tests, 0.16b, 0.76b, 1.4b, 7b, decoding, drawing. Default: all."""
    device: str = "auto"
    """Device to measure: auto, cpu, cuda or mps."""
    json: Path = Path("runs/gpu.json")
    """File for all figures, the errors and the description of the machine."""
    seconds: int = 600
    """Time limit of all parts together, in seconds. A part that no time is left for is not started."""
    quick: bool = False
    """Run every part with minimal work, as a test. The figures are meaningless."""


def main(options: Options, parts: Mapping[str, tuple[Part, int]] = PARTS) -> bool:
    """Print and write all figures. Returns False when a part has failed; ValueError for an unknown part."""
    start, setting = time.monotonic(), Setting(pick_device(options.device), options.quick)
    unknown = [name for name in options.parts if name not in parts]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]}; the parts are {', '.join(parts)}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    machine, results = describe_machine(setting), {}
    print(f"{machine['commit']} on {machine['device']}\n\n{TABLE_HEAD}")
    for name in options.parts or parts:
        print(name)
        (part, limit), begin = parts[name], time.monotonic()
        left, results[name] = start + options.seconds - begin, {"figures": [], "error": None}
        for outcome in run_part(part, setting, min(limit, left)) if left > 0 else ["not started: no time was left"]:
            if isinstance(outcome, Figure):
                results[name]["figures"].append(asdict(outcome))
            else:
                results[name]["error"] = outcome
            print(outcome.format() if isinstance(outcome, Figure) else f"  {outcome}", flush=True)
            now = time.monotonic()
            results[name]["seconds"] = round(now - begin, 1)
            write_json(options.json, machine | {"seconds": round(now - start, 1), "parts": results})
    failed = [name for name, result in results.items() if result["error"]]
    print(f"\nall figures are in {options.json}" + (f"; not complete: {', '.join(failed)}" if failed else ""))
    return not failed


if __name__ == "__main__":
    try:
        sys.exit(0 if main(tyro.cli(Options, prog="python -m benchmarks.gpu")) else 1)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.gpu: {error}")
