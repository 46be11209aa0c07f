"""Where work is done: the device, the numbers it computes with, and the processes (ranks) that share it."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

COMPILER = "inductor"  # of blocks; tests take a lighter one
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
PATIENCE = timedelta(days=7)  # of ranks that wait for one another; the watchdog has less


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the best there is: cuda, then mps, then cpu. ValueError when the named one is missing.

    Under torchrun "auto" and "cuda" are the GPU of this process's own number on its machine. A process that is to compute on
    its CPU keeps from then on what memory it has had.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        _keep_memory()
    return device


def _keep_memory() -> None:
    """Have glibc keep what is freed: a step frees and takes the same again, and the system would clear it page by page."""
    try:
        set_ = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    set_(M_MMAP_MAX, 0)
    set_(M_TRIM_THRESHOLD, 2**31 - 1)
    set_(M_TOP_PAD, 2**26)


def precision(device: torch.device) -> torch.dtype:
    """Of matrix products: bfloat16 where the hardware is fast at it (CUDA), float32 elsewhere.

    On a CPU without bfloat16 units a step would be 20 times slower.
    """
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def lower_precision(device: torch.device):
    """The context for forward passes in that precision. Weights, losses and the optimizer stay in float32."""
    lower = precision(device)
    return contextlib.nullcontext() if lower == torch.float32 else torch.autocast(device.type, lower)


def lower_weights(model: nn.Module, device: torch.device) -> None:
    """For good: the matrices of products in that precision, which `lower_precision` would convert in every pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(precision(device))


class Ranks:
    """The processes that do one piece of work together: which of them this is, and how they agree.

    What they say to each other here goes through the CPU (gloo): it never waits for a GPU. A process alone is its own rank 0
    of 1, and agrees with itself.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls, device: torch.device = torch.device("cpu")) -> Iterator["Ranks"]:  # noqa: B008
        """Those that torchrun started, while it is open; this process alone, where it did not."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            yield cls()
            return
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        lasting, rank, world = next(dist.rendezvous("env://"))
        store = _fresh_store(lasting, rank)
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        try:
            yield cls(rank, world)
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Is this the one that writes what is written once?"""
        return self.rank == 0

    def wait(self) -> None:
        """Until all of them have come here. ConnectionError when one of them has stopped instead."""
        self.sum(0.0)

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over all ranks."""
        if self.world == 1:
            return list(values)
        with self.catching_peer_failure():
            total = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Is it true on any of them?"""
        return self.sum(float(value))[0] > 0

    def broadcast(self, value):
        """What rank 0 says here, on all of them."""
        if self.world == 1:
            return value
        said = [value]
        with self.catching_peer_failure():
            dist.broadcast_object_list(said)
        return said[0]

    def gather(self, value) -> list:
        """What each rank says here, on all of them."""
        if self.world == 1:
            return [value]
        said = [None] * self.world
        with self.catching_peer_failure():
            dist.all_gather_object(said, value)
        return said

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor's mean over all ranks, in place."""
        if self.world == 1:
            return
        with self.catching_peer_failure():
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
        parts = (flat / self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def interleave(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (n, ...) as they were dealt out: the first of each rank, then the second of each, ..."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        with self.catching_peer_failure():
            dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """The same ranks once more, for what goes on beside the work: saving."""
        return dist.new_group(backend="gloo", timeout=PATIENCE) if self.world > 1 else None

    def mesh(self, device: str, shard: str) -> DeviceMesh:
        """All ranks in a row, or for hybrid sharding machines by processes of a machine."""
        if shard == "hybrid":
            shape = (self.world // self.per_machine, self.per_machine)
            return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(device, (self.world,), mesh_dim_names=("shard",))

    @contextlib.contextmanager
    def catching_peer_failure(self) -> Iterator[None]:
        """Whatever ranks do together. ConnectionError when one of them has stopped instead."""
        try:
            yield
        except RuntimeError as error:
            if self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise ConnectionError("another process of this work has stopped; what it said tells why") from None
            raise


SINGLE_PROCESS = Ranks()


def _fresh_store(lasting: dist.Store, rank: int) -> dist.Store:
    """Where these processes find one another. torchrun's own store outlives a restart, with all that the ended processes
    left in it: new ones would take their addresses for one another's. All it is asked for is the place of a new one.
    """
    host, until = os.environ["MASTER_ADDR"], time.monotonic() + 600
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        lasting.set("transfusion's store", str(store.port))
        return store
    while True:
        port = int(lasting.get("transfusion's store"))
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=3))
        except dist.DistError:  # it was that of rank 0 before the restart
            if time.monotonic() > until:
                raise


def _end_with_parent() -> None:
    """torchrun ends its processes when it ends; killed, it cannot, and they would wait for one another for days."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def parallelize(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, mesh: DeviceMesh | None, compiled: bool,
    methods: Sequence[str] = (),
) -> None:  # fmt: skip
    """Make a model (on the meta device, so far) fit for work on this device and over a mesh (None: one process alone).

    FSDP2: each block and the rest are units, of whose weights, gradients, moments and average every rank holds its part.
    Gradients are summed, not averaged: losses have been divided by the counts of all ranks. On CUDA weights travel and
    compute in bfloat16, gradients are reduced in float32. Each block is compiled by itself, for one shape of rows.
    """
    if compiled:
        for block in blocks:
            block.compile(backend=COMPILER, dynamic=False)
    if mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    lower = None if precision(device) == torch.float32 else precision(device)
    # Inputs are left as they are: t would be rounded to the nearest of 256 numbers.
    policy = MixedPrecisionPolicy(lower, reduce_dtype=torch.float32 if lower else None, cast_forward_inputs=False)
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for method in methods:
        register_fsdp_forward_method(model, method)
