"""What a run withstands: it is killed, stopped, and its newest checkpoint damaged, at random moments, and goes on each time.

Claim (ours): a run that was interrupted in any way ends with the same weights, to the bit, as one that was left in peace.
It prints a tally, and exits with 1 if any restart failed or any weights differ.

    python -m experiments.survival --faults 100 --out runs/survival
    python -m experiments.survival --faults 20 --processes 2 --out runs/survival-2
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

STEPS = 40
RUN = (
    "digits", "--training.steps", str(STEPS), "--training.checkpoint-every", "2", "--training.validate-every", str(STEPS),
    "--training.preview-every", "0", "--model.width", "64", "--model.heads", "2", "--model.intermediate-size", "256",
    "--model.layers", "2", "--device", "cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a run; `damage` is done to its newest checkpoint when it has ended."""

    name: str
    signal: signal.Signals
    share: float
    damage: str = ""


FAULTS = (
    Fault("killed", signal.SIGKILL, 0.6),
    Fault("stopped by SIGTERM", signal.SIGTERM, 0.1),
    Fault("stopped by SIGUSR1", signal.SIGUSR1, 0.1),
    Fault("killed, and a bit of its newest checkpoint flipped", signal.SIGKILL, 0.1, "flip"),
    Fault("killed, and a file of its newest checkpoint cut short", signal.SIGKILL, 0.1, "cut"),
)


@dataclass
class Options:
    """Interrupt runs at random moments and see how they end."""

    out: Path = Path("runs/survival")
    """The folder; what is in it is deleted."""
    faults: int = 100
    """How many interruptions in all."""
    processes: int = 1
    """Of each run: more than one under torchrun, one of which, picked by chance, gets the signal."""
    seed: int = 0


def main(asked: Options) -> None:
    """One run in peace, then runs that are disturbed again and again, until there were enough faults."""
    chance = random.Random(asked.seed)
    shutil.rmtree(asked.out, ignore_errors=True)
    peaceful = asked.out / "peaceful"
    begun = time.monotonic()
    if _start(asked, peaceful).wait():
        sys.exit("the undisturbed run failed")
    longest, wanted = time.monotonic() - begun, _weights(peaceful)
    tally, failed, runs, different = Counter(), 0, 0, 0
    while tally.total() < asked.faults:
        runs, folder = runs + 1, asked.out / f"run-{runs:03d}"
        while True:
            process = _start(asked, folder)
            try:
                process.wait(chance.uniform(0, longest) if tally.total() < asked.faults else None)
            except subprocess.TimeoutExpired:
                fault = chance.choices(FAULTS, [one.share for one in FAULTS])[0]
                what = _disturb(process, fault, folder, chance)
                tally[what] += 1
                print(f"{tally.total():4}  {what}, at step {_step(folder)}", flush=True)
                continue
            break
        failed += bool(process.returncode)
        different += not process.returncode and _weights(folder) != wanted
        print(f"      run {runs} ended with exit code {process.returncode}", flush=True)
        shutil.rmtree(folder)
    for name, count in tally.items():
        print(f"{count:4}  {name}")
    print(f"{runs} runs, {tally.total()} faults: {failed} runs did not go on, {different} ended with other weights")
    sys.exit(bool(failed or different))


def _start(asked: Options, folder: Path) -> subprocess.Popen:
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(asked.processes)] if asked.processes > 1 else []
    command = [sys.executable, *many, "-m", "transfusion", "train", *RUN, "--out", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def _disturb(process: subprocess.Popen, fault: Fault, folder: Path, chance: random.Random) -> str:
    """Give the signal to the run, or to one process of it, and wait until all of it has ended: what was done.

    The last whole checkpoint is left alone: who loses that has lost the run, and is told so.
    """
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(chance.choice(children)) if children else process.pid, fault.signal)
    process.wait()
    if not fault.damage or len(list_checkpoints(folder)) < 2:
        return "killed" if fault.damage else fault.name
    path = chance.choice(sorted(list_checkpoints(folder)[-1].rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    if fault.damage == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)
    return fault.name


def _step(folder: Path) -> int:
    """Of the newest checkpoint; 0 when there is none."""
    found = list_checkpoints(folder)
    return int(re.sub(r"\D", "", found[-1].name)) if found else 0


def _weights(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors, by file and name. (In which order a file holds them is another matter.)"""
    files = sorted(list_checkpoints(folder)[-1].rglob("*.safetensors"))
    found = {f"{path.parent.name}/{path.name} {name}": value for path in files for name, value in load_file(path).items()}
    return {name: value.tobytes() for name, value in found.items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
