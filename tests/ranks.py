"""Ranks for tests: processes over gloo that run while a test file runs, and call functions together."""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from unittest import mock

import torch
import torch.distributed as dist

from tests.processes import context
from transfusion.parallel import Ranks

TIMEOUT = 240  # seconds after which ranks that hang are killed
FAILED_TIMEOUT = 20  # the same after one of them has failed


class World:
    """`size` ranks, `per_machine` of them on each simulated machine. A call starts no new processes."""

    def __init__(self, size: int, per_machine: int | None = None):
        self.size, self.per_machine = size, per_machine or size
        self._start()

    def _start(self) -> None:
        # As in torchrun's agent. Another process could take a free port before rank 0 listens at it.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.per_machine), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            pipe, child_pipe = context().Pipe()
            process = context().Process(target=_serve, args=(child_pipe, environment | {"RANK": str(rank)}), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def __call__(self, function: Callable, *args) -> list:
        """The results of `function(ranks, *args)` on all ranks. AssertionError when it raises or hangs on one of them."""
        if not all(process.is_alive() for process in self.processes):  # after a failed test
            self.close()
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        outcomes, deadline = {}, time.monotonic() + TIMEOUT
        while len(outcomes) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in outcomes]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                self.close()
                break
            for pipe in ready:
                try:
                    outcomes[pipe] = pipe.recv()
                except EOFError:
                    outcomes[pipe] = "the process has ended", False
                if not outcomes[pipe][1]:  # the others wait for it
                    deadline = min(deadline, time.monotonic() + FAILED_TIMEOUT)
        results = [outcomes.get(pipe, ("it hangs", False)) for pipe in self.pipes]
        failures = [f"rank {rank}: {error}" for rank, (error, succeeded) in enumerate(results) if not succeeded]
        assert not failures, "\n".join(failures)
        return [value for value, _ in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    with Ranks.of_torchrun() as ranks:
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((function(ranks, *args), True))
            except BaseException:  # noqa: B036 (SystemExit is reported too)
                pipe.send((traceback.format_exc(), False))


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype. In float64 nothing is converted to float32, not even the logits."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    to_float = torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float
    try:
        with mock.patch.object(torch.Tensor, "float", to_float):
            yield
    finally:
        torch.set_default_dtype(previous)


def run_as_threads(world: int, work: Callable[[int, Callable[[], object]], object]) -> None:
    """Call work(rank, barrier) in one thread for each rank; raises the first of their errors."""
    barrier, errors = threading.Barrier(world), []

    def run(rank: int) -> None:
        try:
            work(rank, barrier.wait)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
