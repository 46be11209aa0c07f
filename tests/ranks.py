"""Ranks for tests: processes over gloo that stay up while a file is tested, and do together what they are told."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from unittest import mock

import torch

from tests.processes import context
from transfusion.parallel import Ranks

PATIENCE = 240  # seconds until ranks that wait for one another for ever are given up
GRACE = 20  # ... when one of them has failed already


class World:
    """So many ranks, `per_machine` of them on each made-up machine. Each call costs no new process."""

    def __init__(self, size: int, per_machine: int | None = None):
        self.size, self.per_machine = size, per_machine or size
        self._start()

    def _start(self) -> None:
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.per_machine),
        }  # fmt: skip
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context().Pipe()
            process = context().Process(target=_serve, args=(theirs, environment | {"RANK": str(rank)}), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, do: Callable, *arguments) -> list:
        """What `do(ranks, *arguments)` gives on each rank. AssertionError when it raises, or does not come back."""
        if not all(process.is_alive() for process in self.processes):  # after a test that failed
            self.close()
            self._start()
        for pipe in self.pipes:
            pipe.send((do, arguments))
        found, until = {}, time.monotonic() + PATIENCE
        while len(found) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in found]
            ready = wait(waiting, max(0, until - time.monotonic()))
            if not ready:
                self.close()
                break
            for pipe in ready:
                try:
                    found[pipe] = pipe.recv()
                except EOFError:
                    found[pipe] = "it has died", False
                if not found[pipe][1]:  # the others will wait for it
                    until = min(until, time.monotonic() + GRACE)
        said = [found.get(pipe, ("it hangs", False)) for pipe in self.pipes]
        failed = [f"rank {rank}: {words}" for rank, (words, well) in enumerate(said) if not well]
        assert not failed, "\n".join(failed)
        return [value for value, _ in said]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    with Ranks.of_torchrun() as ranks:
        while True:
            do, arguments = pipe.recv()
            try:
                pipe.send((do(ranks, *arguments), True))
            except BaseException:  # noqa: B036 (SystemExit too: whoever asked shall hear of it)
                pipe.send((traceback.format_exc(), False))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """New numbers are of this dtype. In float64 nothing falls back to float32, not even the logits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    kept = mock.patch.object(torch.Tensor, "float", torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float)
    try:
        with kept:
            yield
    finally:
        torch.set_default_dtype(before)
