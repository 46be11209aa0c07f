"""What a run needs: parameters, memory of each GPU, FLOPs, time and disk, computed before it starts.

Weights, gradients, moments and moving average are exact. Activations are those that a block saves for its backward pass
(tests/test_plan.py measures them); the loss and weights gathered in bfloat16 are upper bounds.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from math import ceil, prod

import numpy as np
import torch

from transfusion.config import LoraConfig, Machines, ModelConfig, Run
from transfusion.model import lora as lora_layers
from transfusion.model.flops import count_training_flops, count_usual_flops
from transfusion.model.transfusion import build_on_meta
from transfusion.model.unet import BLOCKS
from transfusion.model.untied import SIDES, side_of
from transfusion.objective import CHUNK, CPU_CHUNK
from transfusion.parallel import lower_weights, rows_per_pass, share_batch
from transfusion.sequence import Batch, Document, Image, Row, Text, Vocabulary, collate, encode_document

FP32, BF16 = 4, 2  # bytes of a value
PAPER_LATENT = 32  # side of a latent: 256 pixels, and an autoencoder with downsampling 8
NUM_MARKERS = 4  # positions around the patches of an image document: bos, boi, eoi, eos
CUDA_BYTES = 2_000_000_000  # approximate memory of CUDA and NCCL
MAX_GPUS = 16_384
IN_BLOCKS = "block", "adapter"  # parts of the weights that each block has
NUM_SEQUENCES = 8  # that generate together in the plan: as many as inference allocates memory for at the start
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of matrix products


@dataclass(frozen=True)
class Memory:
    """Peak bytes on each GPU."""

    weights: int
    gradients: int
    moments: int
    ema: int
    gathered: int  # weights in bfloat16, and gradients, of the modules that are gathered at one time
    activations: int  # saved by the forward pass
    backward: int  # largest addition to the activations: by the loss, or by the backward pass of one block
    cuda: int = CUDA_BYTES

    @property
    def all(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes that generation needs, without the codec and temporary tensors."""

    weights: int  # matrices in the precision of products, all else in float32
    cache: int  # keys and values of NUM_SEQUENCES rows; a sequence that draws with guidance takes two
    latents: int  # of one image, in float32

    @property
    def all(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Measurement:
    """Times of a run's parts on a device, in seconds, each with how often the run does it."""

    device: str
    steps: int  # that were measured
    step: float  # median
    evaluation: float
    evaluations: int
    preview: float
    previews: int
    peak_memory: int  # bytes: allocated on a GPU, or resident in this process, with Python and PyTorch

    @property
    def pauses(self) -> float:
        """Seconds of all evaluations and previews."""
        return self.evaluation * self.evaluations + self.preview * self.previews


@dataclass(frozen=True)
class Plan:
    """What a run needs on these machines."""

    run: Run
    machines: Machines
    parameters: dict[str, int]
    trained: int  # of the parameters
    memory: Memory
    rows_per_pass: int
    loss: int  # bytes: a chunk of logits, gradients of the head and its input
    image: tuple[int, int] | None  # latent shape (Y, X) of the assumed images
    text_positions: int  # positions with a text loss in a forward pass
    flops: float  # per position, forward and backward
    usual_flops: float  # the same in the convention that counts all attention pairs
    copies: float  # share of the positions that are noisy copies of images
    generation: dict[str, GenerationMemory]  # by the precision of matrix products
    measured: Measurement | None = None  # on this machine; without it, speed follows from the peak and MFU of `machines`

    @property
    def fits(self) -> bool:
        return self.memory.all <= self.machines.memory

    @property
    def positions_per_step(self) -> int:
        return self.run.training.batch_size * self.run.data.seq_len

    @property
    def positions(self) -> int:
        return self.positions_per_step * self.run.training.steps

    @property
    def usual_mfu(self) -> float:
        return self.machines.mfu * self.usual_flops / self.flops

    @property
    def positions_per_second(self) -> float:
        """Positions per second of one GPU."""
        if self.measured:
            return self.positions_per_step / self.measured.step
        return self.machines.mfu * self.machines.tflops * 1e12 / self.flops

    @property
    def seconds(self) -> float:
        """Of the whole run; evaluations and previews are only counted if they were measured."""
        pauses = self.measured.pauses if self.measured else 0
        return self.positions / (self.positions_per_second * self.machines.gpus) + pauses

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: weights and moving average, of a run with an adapter those of the adapter, and moments of trained
        weights."""
        memory = estimate_memory(self.run, replace(self.machines, gpus=1))
        return 2 * (memory.weights if self.run.lora.rank is None else memory.ema) + memory.moments


def plan(run: Run, machines: Machines) -> Plan:
    """The plan of a run on these machines. ValueError when its batch or its sharding does not suit them."""
    config, data, rows = run.model, run.data, rows_per_pass(run, machines.gpus)
    batch = typical_row(config, data.seq_len, data.clean_copies)
    counts = {part: sum(map(prod, shapes)) for part, shapes in weight_shapes(config, run.lora).items()}
    sides = {side: counts["block", side] * config.layers + counts["norm", side] for side in SIDES}
    parameters = {
        "transformer": sides["transformer"], **({} if config.untied == "none" else {
            "transformer, text only": sides["text"], "transformer, images only": sides["image"],
        }),
        "embeddings and head": counts["embeddings", "text"] + counts["embeddings", "image"],
        "patches": counts["patches", "image"],
        **({} if run.lora.rank is None else {"adapter": config.layers * sum(counts["adapter", side] for side in SIDES)}),
    }  # fmt: skip
    return Plan(
        run, machines, parameters, sum(map(prod, chain(*trained_shapes(run).values()))),
        estimate_memory(run, machines), rows_per_pass=rows, loss=count_loss(run, rows),
        image=tuple(batch.groups[0].x0.shape[2:]) if batch.groups else None,
        text_positions=batch.text_count * rows,
        flops=count_training_flops(batch, config) / batch.positions,
        usual_flops=count_usual_flops(config, data.seq_len),
        copies=0.0 if batch.clean_starts is None else int((batch.clean_starts >= 0).sum()) / batch.positions,
        generation={name: estimate_generation_memory(run, name) for name in PRECISIONS},
    )  # fmt: skip


def fit_micro_batch(run: Run, machines: Machines) -> Run:
    """The run with its own micro batch if it fits, else with the largest smaller one that fits and divides a GPU's share of
    the batch, so that all forward passes have one shape. When none fits, 1."""
    share, rows = share_batch(run.training.batch_size, machines.gpus), rows_per_pass(run, machines.gpus)
    smaller = [n for n in range(rows - 1, 0, -1) if share % n == 0]
    candidates = [run, *(replace(run, parallel=replace(run.parallel, micro_batch_size=n)) for n in smaller)]
    return next((r for r in candidates if estimate_memory(r, machines).all <= machines.memory), candidates[-1])


@cache
def weight_shapes(config: ModelConfig, lora: LoraConfig) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """Shapes of the weights of one block and of its adapter, the last norm, the patch layers, and embeddings and head, by
    part and side."""
    shapes = {(part, side): [] for part in ("block", "adapter", "norm", "patches", "embeddings") for side in SIDES}
    model = build_on_meta(replace(config, layers=1))
    for name, parameter in model.named_parameters():
        part = {"transformer": "norm", "patches": "patches"}.get(name.partition(".")[0], "embeddings")
        part = "block" if name.startswith(lora_layers.BLOCKS) else part
        shapes[part, side_of(name, config.untied)].append(tuple(parameter.shape))
    for name, shape in lora_layers.trained_shapes(model, lora).items() if lora.rank is not None else ():
        if lora_layers.is_of_adapter(name):
            shapes["adapter", side_of(name, config.untied)].append(shape)
    return shapes


def trained_shapes(run: Run) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the weights that are trained, of all blocks, by part."""
    shapes: dict[str, list] = {}
    for (part, side), each in weight_shapes(run.model, run.lora).items():
        in_full = run.lora.rank is None or (run.lora.on != "text" and side == "image" and part in ("patches", "embeddings"))
        if run.training.lr_scales[side] and (part == "adapter" or in_full):
            shapes.setdefault(part, []).extend(each * (run.model.layers if part in IN_BLOCKS else 1))
    return shapes


def count_shard(shapes: Iterable[tuple[int, ...]], ranks: int) -> int:
    """Largest number of values that a rank holds: FSDP shards each weight along its first dimension, rounded up."""
    return sum(ceil(first / ranks) * prod(rest) for first, *rest in shapes)


def estimate_memory(run: Run, machines: Machines) -> Memory:
    """Memory of each GPU at its peak, near the start of the backward pass. Gradients are counted in full, although a step
    without accumulation has none yet."""
    shapes, ranks = weight_shapes(run.model, run.lora), machines.shard_group_size(run.parallel.shard)
    rows = rows_per_pass(run, machines.gpus)
    in_block = [shape for (part, _), each in shapes.items() if part in IN_BLOCKS for shape in each]
    rest = [shape for (part, _), each in shapes.items() if part not in IN_BLOCKS for shape in each]
    weights = FP32 * (run.model.layers * count_shard(in_block, ranks) + count_shard(rest, ranks))
    trained_by_part = trained_shapes(run)
    trained = FP32 * count_shard(chain(*trained_by_part.values()), ranks)
    moments = 2 * trained
    if run.training.optimizer == "muon":  # one for the matrices of blocks
        matrices = [shape for part in IN_BLOCKS for shape in trained_by_part.get(part, ()) if len(shape) == 2]
        if any(first < ranks for first, _ in matrices):  # torch's Muon fails on a process without a row
            raise ValueError(f"training.optimizer muon: {ranks} processes share matrices of {min(matrices)[0]} rows; use a "
                             f"lora.rank of at least {ranks}, or training.optimizer adamw")  # fmt: skip
        moments -= FP32 * count_shard(matrices, ranks)
    root, block = count_shard(rest, 1), count_shard(in_block, 1)
    is_cuda = machines.device == "cuda"
    is_lower = is_cuda or run.parallel.cpu_matmul == "bfloat16"
    size = BF16 if is_lower else FP32
    if ranks == 1:
        gathered = BF16 * (root + block * run.model.layers) if is_lower else 0  # autocast's copies, freed after the backward
    else:  # a block and the prefetched next one; gradients of a block are reduced in fp32
        gathered = 2 * size * root + (2 * size + (BF16 if is_lower else 0) + FP32) * block
    return Memory(
        weights=weights, gradients=trained, moments=moments, ema=trained, gathered=gathered,
        activations=count_activations(run, rows, size),
        backward=max(count_loss(run, rows, size), count_block_backward(run, rows, size)),
        cuda=CUDA_BYTES if is_cuda else 0,
    )  # fmt: skip


def estimate_generation_memory(run: Run, precision: str) -> GenerationMemory:
    """Memory that generation needs with matrix products in this precision."""
    config, groups = run.model, typical_row(run.model, run.data.seq_len, run.data.clean_copies).groups
    position = 2 * config.layers * config.num_kv_heads * config.head_size * PRECISIONS[precision].itemsize
    return GenerationMemory(
        weights=count_generation_weights(config, precision),
        cache=NUM_SEQUENCES * run.data.seq_len * position,
        latents=FP32 * prod(groups[0].x0.shape[1:]) if groups and config.patches != "codes" else 0,
    )


@cache
def count_generation_weights(config: ModelConfig, precision: str) -> int:
    """Bytes of a model's weights as `open_checkpoint` creates them."""
    return sum(parameter.nbytes for parameter in lower_weights(build_on_meta(config), PRECISIONS[precision]).parameters())


@cache
def typical_row(config: ModelConfig, length: int, clean_copies: bool = False) -> Batch:
    """A full row as the paper mixes them: half of it images, each its own document, and half text of one document. Images
    have 32 x 32 latent pixels as in the paper; in rows too short for that, half the side, a quarter, and so on. With clean
    copies a token follows each image, which therefore has a noisy copy: the most copies that data can have."""
    side = max(1, PAPER_LATENT // config.patch_size)  # in patches
    times, markers = (2, NUM_MARKERS + 1) if clean_copies else (1, NUM_MARKERS)
    while side and times * side**2 + markers > length // 2:
        side //= 2
    shape = side * config.patch_size, side * config.patch_size
    codes = config.patches == "codes"
    content = np.zeros(shape, np.int64) if codes else np.zeros((config.latent_channels, *shape), np.float32)
    vocabulary = Vocabulary.build(0, [shape], config.patch_size, num_image_codes=int(codes))
    num_images = length // 2 // (times * side**2 + markers) if side else 0
    document = Document((Image(content), *[Text((0,))] * clean_copies))
    images = [encode_document(document, vocabulary, clean_copies=clean_copies)] * num_images
    rest = length - sum(map(len, images))
    text = encode_document(Document((Text((0,) * rest),)), vocabulary).part(0, rest)
    return collate([Row((*images, text))], length, vocabulary)


def count_activations(run: Run, rows: int, value_bytes: int = BF16) -> int:
    """Bytes that a forward pass of `rows` rows saves for its backward pass, without logits; `value_bytes` for each value."""
    config, batch = run.model, typical_row(run.model, run.data.seq_len, run.data.clean_copies)
    block = config.width * value_bytes if run.parallel.activation_checkpointing else saved_by_block(run, value_bytes)
    saved = config.layers * block + 2 * config.head_size * value_bytes  # rotary cos and sin, shared by all blocks
    saved += 2 * config.width * value_bytes  # the last norm's input, and its output at text and patches
    images = sum(len(group.index) * saved_by_unet(config, group.x0.shape[2:], value_bytes) for group in batch.groups)
    return rows * (batch.positions * saved + (images if config.patches == "unet" else 0))


def count_loss(run: Run, rows: int, value_bytes: int = BF16) -> int:
    """Bytes that the loss adds: logits and log-probabilities of a chunk of positions, and its gradients."""
    text_positions = typical_row(run.model, run.data.seq_len, run.data.clean_copies).text_count * rows
    chunk = (value_bytes + FP32) * min(CHUNK if value_bytes == BF16 else CPU_CHUNK, text_positions) * run.model.vocab_size
    return chunk + run.model.width * (FP32 * run.model.vocab_size + value_bytes * text_positions)


def count_block_backward(run: Run, rows: int, value_bytes: int = BF16) -> int:
    """Bytes that the backward pass of one block adds: its inner gradients, and recomputed activations."""
    gradients = value_bytes * (3 * run.model.feed_forward_size + 2 * run.model.width)
    recomputed = saved_by_block(run, value_bytes) if run.parallel.activation_checkpointing else 0
    return rows * run.data.seq_len * (gradients + recomputed)


def saved_by_block(run: Run, value_bytes: int = BF16) -> int:
    """Bytes for each position: input and output of the norms, attention's four tensors, the feed-forward's factors."""
    config = run.model
    queries, keys = config.heads * config.head_size, config.num_kv_heads * config.head_size
    values = 4 * config.width + 2 * queries + 2 * keys + 3 * config.feed_forward_size
    if config.qk_norm:
        values += queries + keys
    if config.untied == "full":
        values += queries  # what attention returns, also by side
    if run.lora.rank is not None:
        values += 7 * run.lora.rank  # A x of each matrix
    size = value_bytes * values + FP32 * config.heads  # the softmax normalisers
    if run.parallel.compile is False:
        size += value_bytes * config.feed_forward_size  # silu, which compiled blocks recompute
        if value_bytes == BF16:  # autocast: norms read fp32, and five products each save a bf16 copy of a norm's output
            size += (2 * (FP32 - BF16) + (5 - 2) * BF16) * config.width
    return size


def saved_by_unet(config: ModelConfig, shape: tuple[int, int], value_bytes: int = BF16) -> int:
    """Bytes for one image of latent shape (Y, X). Norms are in fp32, also under autocast."""
    widths = config.unet_widths
    pixels = [shape[0] * shape[1] // 4**n for n in range(len(widths))]
    normed = 2 * FP32 + value_bytes  # inputs of a norm, of silu and of a convolution
    size = widths[0] * pixels[0] * normed
    for width, area in zip(widths, pixels, strict=True):
        size += width * area * normed * (BLOCKS * 2 + (BLOCKS + 1) * 3)  # up blocks have skips: twice the input channels
    for (above, below), fine in zip(pairwise(widths), pixels, strict=False):
        size += value_bytes * (above + below) * fine  # inputs of downsampling and upsampling
    attention = FP32 + 8 * value_bytes  # each pixel: input of the norm; its output for q, k, v; these; two of out
    return size + (2 * BLOCKS - 1) * widths[-1] * pixels[-1] * attention


def ways_to_fit(run: Run, machines: Machines) -> Iterator[str]:
    """Each single change with which the run fits; if no change is enough, each with which it fits under checkpointing."""
    checkpointed = replace(run, parallel=replace(run.parallel, activation_checkpointing=True))
    ways = [*_changes(run, machines)]
    if not run.parallel.activation_checkpointing:
        if estimate_memory(checkpointed, machines).all <= machines.memory:
            ways.insert(0, "--parallel.activation-checkpointing")
        elif not ways:
            ways = [f"--parallel.activation-checkpointing {way}" for way in _changes(checkpointed, machines)]
    yield from ways


def _changes(run: Run, machines: Machines) -> Iterator[str]:
    """The largest micro batch, and the smallest number of GPUs, with which the run fits."""
    smaller = fit_micro_batch(run, machines)
    if estimate_memory(smaller, machines).all <= machines.memory:
        yield f"--parallel.micro-batch-size {smaller.parallel.micro_batch_size}"
    gpus, max_gpus = 2 * machines.gpus, MAX_GPUS if run.parallel.shard == "full" else machines.gpus_per_machine
    while gpus <= max_gpus and run.training.batch_size % gpus == 0:
        if estimate_memory(run, replace(machines, gpus=gpus)).all <= machines.memory:
            yield f"--gpus {gpus}"
            break
        gpus *= 2
