"""Interrupt training runs at random moments and check that they resume exactly.

A run is killed, stopped by a signal, or its newest checkpoint is damaged; then the same command resumes it. Its final
weights must equal those of an uninterrupted run bit for bit. The script prints the number of faults of each kind. It exits
with 1 if a run did not resume or ended with different weights. Messages of all runs are in log.txt in the folder.

    python -m experiments.fault_tolerance --faults 100 --out runs/fault-tolerance
    python -m experiments.fault_tolerance --faults 20 --processes 2 --out runs/fault-tolerance-2
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.numpy import load_file

from transfusion.checkpoint.save import list_checkpoints

LOG = "log.txt"  # what all runs print
STEPS = 40
RUN = (
    "digits", "--training.steps", str(STEPS), "--training.checkpoint-every", "2", "--training.validate-every", str(STEPS),
    "--training.preview-every", "0", "--model.width", "64", "--model.heads", "2", "--model.intermediate-size", "256",
    "--model.layers", "2", "--training.batch-size", "12", "--device", "cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A signal sent to a run, and the damage ("flip" or "truncate") to its newest checkpoint after it has ended."""

    name: str
    signal: signal.Signals
    probability: float
    damage: str = ""


FAULTS = (
    Fault("killed", signal.SIGKILL, 0.6),
    Fault("stopped by SIGTERM", signal.SIGTERM, 0.1),
    Fault("stopped by SIGUSR1", signal.SIGUSR1, 0.1),
    Fault("killed, and one bit of the newest checkpoint flipped", signal.SIGKILL, 0.1, "flip"),
    Fault("killed, and one file of the newest checkpoint truncated", signal.SIGKILL, 0.1, "truncate"),
)


@dataclass
class Options:
    """Interrupt runs at random moments and check their final weights."""

    out: Path = Path("runs/fault-tolerance")
    """Folder of the runs. Its contents are deleted."""
    faults: int = 100
    """Total number of faults."""
    processes: int = 1
    """Processes per run. With more than one, torchrun starts them and a random one of them gets the signal."""
    seed: int = 0
    """Seed of the faults and their times."""


def main(options: Options) -> None:
    """Train one uninterrupted run, then interrupted runs until the number of faults is reached."""
    rng = random.Random(options.seed)
    shutil.rmtree(options.out, ignore_errors=True)
    reference = options.out / "reference"
    start = time.monotonic()
    if _start(options, reference).wait():
        sys.exit(f"the uninterrupted run failed: see {options.out / LOG}")
    duration, expected = time.monotonic() - start, _read_weights(reference)
    counts, num_failed, num_runs, num_different = Counter(), 0, 0, 0
    while counts.total() < options.faults:
        num_runs, folder = num_runs + 1, options.out / f"run-{num_runs:03d}"
        while True:
            process = _start(options, folder)
            try:
                process.wait(rng.uniform(0, duration) if counts.total() < options.faults else None)
            except subprocess.TimeoutExpired:
                fault = rng.choices(FAULTS, [fault.probability for fault in FAULTS])[0]
                name = _inject_fault(process, fault, folder, rng)
                counts[name] += 1
                print(f"{counts.total():4}  {name}, at step {_last_step(folder)}", flush=True)
                continue
            break
        num_failed += bool(process.returncode)
        num_different += not process.returncode and _read_weights(folder) != expected
        print(f"      run {num_runs} ended with exit code {process.returncode}", flush=True)
        shutil.rmtree(folder)
    for name, count in counts.items():
        print(f"{count:4}  {name}")
    outcome = f"{num_failed} runs did not resume, {num_different} ended with different weights"
    print(f"{num_runs} runs, {counts.total()} faults: {outcome}")
    sys.exit(bool(num_failed or num_different))


def _start(options: Options, folder: Path) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)] if options.processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "transfusion", "train", *RUN, "--out", str(folder)]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / LOG).open("ab") as log:
        return subprocess.Popen(command, stderr=log, start_new_session=True)


def _inject_fault(process: subprocess.Popen, fault: Fault, folder: Path, rng: random.Random) -> str:
    """Send the signal to the run, or to one of its processes, and wait until all have ended. Return the name of the fault.

    The only intact checkpoint is not damaged: a run without any intact checkpoint cannot resume, and reports an error.
    """
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(rng.choice(children)) if children else process.pid, fault.signal)
    process.wait()
    if not fault.damage or len(list_checkpoints(folder)) < 2:
        return "killed" if fault.damage else fault.name
    path = rng.choice(sorted(list_checkpoints(folder)[-1].rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    if fault.damage == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)
    return fault.name


def _last_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    checkpoints = list_checkpoints(folder)
    return int(re.sub(r"\D", "", checkpoints[-1].name)) if checkpoints else 0


def _read_weights(folder: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint, by file and name, so that their order within a file does not matter."""
    paths = sorted(list_checkpoints(folder)[-1].rglob("*.safetensors"))
    tensors = {f"{path.parent.name}/{path.name} {name}": value for path in paths for name, value in load_file(path).items()}
    return {name: value.tobytes() for name, value in tensors.items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
