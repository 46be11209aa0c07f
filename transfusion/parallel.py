"""Devices, the precision they compute in, and the processes (ranks) that share one run."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transfusion.config import Run

CPUINFO = Path("/proc/cpuinfo")
CGROUP_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, and 1
MAX_ONEDNN_ERROR = 1e-6  # of a float32 product, relative to its norm
COMPILE_BACKEND = "inductor"  # of torch.compile; tests use a lighter one
# Graphs of a block: with and without gradient, for rows of one number or any, with and without images. After torch's default
# of 8 blocks would run without a graph, for the rest of training.
MAX_GRAPHS = 32
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
TIMEOUT = timedelta(days=7)  # of collectives; the watchdog ends a process that hangs long before


def pick_device(name: str = "auto", shared: bool = False) -> torch.device:
    """The named device; "auto" is cuda, else mps, else cpu. ValueError when the device is not available. Under torchrun
    "auto" and "cuda" mean the GPU with this process's local rank; if GPUs may be `shared`, more processes take turns."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        rank = int(os.environ["LOCAL_RANK"])
        name = f"cuda:{rank % max(1, torch.cuda.device_count()) if shared else rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device; of a CPU those of the machine, or of the container (cgroup) that limits it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text(encoding="utf-8")))
    return min(limits)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: let glibc keep what the process frees, from now on. Each training step frees and allocates the same amount,
    and the kernel would zero every page. For commands that only train: other memory would not return to the system."""
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def precision(device: torch.device, cpu_matmul: str = "auto") -> torch.dtype:
    """Dtype of matrix products: bfloat16 on CUDA devices that support it, else float32; on a CPU bfloat16 on request.
    ValueError when the CPU has no instructions for it: it would be 20 times slower than float32."""
    if device.type == "cpu" and cpu_matmul == "bfloat16":
        if not has_cpu_bfloat16():
            raise ValueError("parallel.cpu_matmul bfloat16: this CPU has no bfloat16 instructions; use auto or default")
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def lower_precision(device: torch.device, cpu_matmul: str = "auto"):
    """The autocast context for forward passes. Weights, losses and the optimizer stay in float32."""
    lower = precision(device, cpu_matmul)
    return contextlib.nullcontext() if lower == torch.float32 else torch.autocast(device.type, lower)


def lower_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert matrices and kernels to the precision of products in place; autocast would convert them in every pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return model


@contextlib.contextmanager
def fast_matmul(device: torch.device, cpu_matmul: str = "auto") -> Iterator[None]:
    """Context in which the float32 products of the whole process go to oneDNN, on CPUs where it is faster than MKL. For
    forward and backward passes of training: products of a few rows, as in decoding, are slower in oneDNN."""
    is_used = device.type == "cpu" and cpu_matmul == "auto" and onednn_is_faster()
    with onednn_matmul() if is_used else contextlib.nullcontext():
        yield


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products are faster in oneDNN than in MKL, torch's default, and as exact. Decided by what the CPU is,
    not by timing: a resumed run must compute the same.

    MKL uses no AVX512 on AMD: oneDNN is 2.2 times as fast on Zen 5 and 1.1 times on Zen 4; other CPUs were not measured. The
    only switch is the permission to compute in bfloat16. Without AMX oneDNN ignores it, and one product is checked.
    """
    flags = cpu_flags(CPUINFO)
    return {"AuthenticAMD", "avx512f"} <= flags and "amx_tile" not in flags and _onednn_error() < MAX_ONEDNN_ERROR


@contextlib.contextmanager
def onednn_matmul() -> Iterator[None]:
    """Context in which the float32 products of the whole process go to oneDNN; with AMX they are in bfloat16."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _onednn_error() -> float:
    """The error of a product in oneDNN against float64, relative to its norm: 2e-7 in float32, 3e-3 in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with onednn_matmul():
        return ((a @ b - exact).norm() / exact.norm()).item()


def has_cpu_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags(CPUINFO))  # of Intel and AMD, Intel, ARM


def cpu_flags(cpuinfo: Path) -> set[str]:
    """The vendor and the instruction sets of this CPU, as Linux names them in /proc/cpuinfo. Empty on other systems."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    values = (line.partition(":")[2] for line in lines if line.startswith(("vendor_id", "flags", "Features")))
    return set().union(*map(str.split, values))


class Ranks:
    """The processes of one run: this process's rank, their number (`world`), and collective operations.

    Collectives of numbers use the CPU (gloo), so they never wait for a GPU; those of tensors use the tensor's device. A
    single process is rank 0 of 1; its collectives return their input. All of them raise ConnectionError when another rank
    has stopped.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls, device: torch.device = torch.device("cpu")) -> Iterator["Ranks"]:  # noqa: B008
        """Join the processes that torchrun started, while the context is open. Without torchrun: a single process."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            yield cls()
            return
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torchrun_store, rank, world = next(dist.rendezvous("env://"))
        store = _create_store(torchrun_store, rank)
        store.set_timeout(TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        try:
            yield cls(rank, world)
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self.sum(0.0)

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over all ranks."""
        if self.world == 1:
            return list(values)
        with self.catching_peer_failure():
            total = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(total)
        return total.tolist()

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n,), summed over all ranks by the device's own backend, which no rank waits for on CUDA."""
        if self.world == 1:
            return values
        with self.catching_peer_failure():
            total = values.double()
            dist.all_reduce(total)
        return total

    def broadcast(self, value):
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        values = [value]
        with self.catching_peer_failure():
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value) -> list:
        """The list of every rank's value, on all ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with self.catching_peer_failure():
            dist.all_gather_object(values, value)
        return values

    def average_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Replace each gradient by its mean over all ranks, in place."""
        if self.world == 1:
            return
        with self.catching_peer_failure():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
        parts = (flat / self.world).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def interleave(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n, ...) on each rank -> (world * n, ...): the first row of each rank, then the second of each, ..."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        with self.catching_peer_failure():
            dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """A second process group of all ranks, for the thread that writes checkpoints. None for a single process."""
        return dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None

    def mesh(self, device: str, shard: str) -> DeviceMesh:
        """(world,) for full sharding, (machines, processes per machine) for hybrid sharding."""
        if shard == "hybrid":
            shape = (self.world // self.per_machine, self.per_machine)
            return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(device, (self.world,), mesh_dim_names=("shard",))

    @contextlib.contextmanager
    def catching_peer_failure(self) -> Iterator[None]:
        """Context for collectives: ConnectionError when another rank has stopped."""
        try:
            yield
        except RuntimeError as error:
            if self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise ConnectionError("another process of this run has stopped; see its error message") from None
            raise


SINGLE_PROCESS = Ranks()


def share_batch(batch_size: int, world: int) -> int:
    """The part of a step's batch for each of `world` processes. ValueError, with the nearest numbers that work, when they
    cannot share it evenly."""
    if batch_size % world == 0:
        return batch_size // world
    sizes = [size for size in (batch_size // world * world, (batch_size // world + 1) * world) if size]
    fewer = max(n for n in range(1, world) if batch_size % n == 0)
    worlds = [fewer, *[n for n in range(world + 1, batch_size + 1) if batch_size % n == 0][:1]]
    raise ValueError(
        f"training.batch_size {batch_size} is not divisible by {world} processes: use a batch size of "
        f"{' or '.join(map(str, sizes))}, or {' or '.join(map(str, worlds))} process{'es' if worlds[-1] > 1 else ''}"
    )


def rows_per_pass(run: Run, world: int) -> int:
    """Rows in a forward pass of each of `world` processes: the micro batch, at most a process's share of the batch."""
    share = share_batch(run.training.batch_size, world)
    return min(run.parallel.micro_batch_size or share, share)


def get_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # importing DTensor takes a second


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """A function that returns these values (n,), and waits for nothing that is queued on the device after this call."""
    if values.device.type != "cuda":
        return values.tolist
    copy, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def _create_store(torchrun_store: dist.Store, rank: int) -> dist.Store:
    """A new key-value store on rank 0, for the process group. torchrun's own store keeps the addresses of ended processes
    over a restart, and new processes would connect to those. It only passes on the port of the new store."""
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + 600
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchrun_store.set("transfusion's store", str(store.port))
        return store
    while True:
        port = int(torchrun_store.get("transfusion's store"))
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=3))
        except dist.DistError:  # the port of rank 0 before the restart
            if time.monotonic() > deadline:
                raise


def _exit_with_parent() -> None:
    """End this process when torchrun was killed. A killed torchrun cannot end its processes, and they would hang."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def parallelize(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, mesh: DeviceMesh | None, compiled: bool,
    methods: Sequence[str] = (), trained: bool = True, dynamic: bool | None = False,
) -> None:  # fmt: skip
    """Compile and shard a model that is on the meta device, in place. mesh None: a single process.

    FSDP2: each block is a unit, and so is the rest; every rank holds its part of weights, gradients, moments and EMA.
    Gradients are summed, not averaged: losses are divided by the counts of all ranks. On CUDA weights are gathered and used
    in bfloat16, and gradients are reduced in float32. Each block is compiled separately, for one shape of rows; with
    `dynamic` None once more for any numbers of text and image positions, and once for no images. `methods` are other forward
    methods of the model that gather weights too. A model that is not `trained` has no backward passes.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        for block in blocks:
            block.compile(backend=COMPILE_BACKEND, dynamic=dynamic)
    if mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    lower = None if precision(device) == torch.float32 else precision(device)
    # Inputs keep their dtype: bfloat16 would round t to one of 256 values.
    policy = MixedPrecisionPolicy(lower, reduce_dtype=torch.float32 if lower else None, cast_forward_inputs=False)
    for unit in (*blocks, model):
        # The last block and the rest come first in the backward pass: their gathered weights stay, else they are gathered
        # twice in a row. Without a backward pass nothing would free them.
        is_used_next = trained and unit in (blocks[-1], model)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not is_used_next)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    for method in methods:
        register_fsdp_forward_method(model, method)
