"""What a run will cost: parameters, memory of each GPU, FLOPs, time and disk, all known before it begins.

Weights, gradients, moments and average are counted exactly. Activations are what a block keeps for its backward pass
(tests/test_plan.py measures it); logits and the weights that are gathered in bfloat16 are counted at their largest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import ceil, prod

import numpy as np
from torch import nn

from transfusion.config import Machines, ModelConfig, Run
from transfusion.model.flops import count_training_flops
from transfusion.model.transfusion import build_on_meta
from transfusion.model.unet import BLOCKS
from transfusion.sequence import Batch, Document, Image, Row, Text, Vocabulary, collate, encode_document

FP32, BF16 = 4, 2  # bytes of a number
PAPER_SIDE = 32  # of a latent: 256 x 256 pixels behind an autoencoder that makes one of 8
AROUND = 4  # positions around the patches of an image by itself: bos, boi, eoi, eos
LOGITS = 3 * FP32  # bytes, at most, for one: its log-probability and, one from the other, two gradients
OWN = 2_000_000_000  # bytes that CUDA and NCCL take for themselves, roughly
MOST_GPUS = 16_384


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU when they are most."""

    weights: int
    gradients: int
    moments: int
    ema: int
    gathered: int  # weights in bfloat16, and gradients, of what is whole at one time
    activations: int  # kept from the forward pass
    backward: int  # what the widest moment of the backward pass adds: the logits, or one block
    own: int = OWN

    @property
    def all(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What a run costs on these machines."""

    run: Run
    machines: Machines
    parameters: dict[str, int]
    memory: Memory
    logits: int  # bytes, with their gradients
    image: tuple[int, int] | None  # the latent (Y, X) of the images that are assumed
    text_positions: int  # of a forward pass, with a loss
    flops: float  # per position, forward and backward
    usual_flops: float  # by the convention that counts every pair of positions

    @property
    def fits(self) -> bool:
        return self.memory.all <= self.machines.memory

    @property
    def positions_per_step(self) -> int:
        return positions_of_step(self.run, self.machines.gpus)

    @property
    def positions(self) -> int:
        return self.positions_per_step * self.run.training.steps

    @property
    def usual_mfu(self) -> float:
        return self.machines.mfu * self.usual_flops / self.flops

    @property
    def positions_per_second(self) -> float:
        """Of one GPU."""
        return self.machines.mfu * self.machines.tflops * 1e12 / self.flops

    @property
    def seconds(self) -> float:
        return self.positions / (self.positions_per_second * self.machines.gpus)

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: weight and EMA, and the two moments of what is learnt."""
        training = self.run.training
        rates = (
            training.transformer_lr_scale,
            training.text_lr_scale,
            training.image_lr_scale,
        )  # in the order of the parameters
        return FP32 * sum((4 if rate else 2) * n for rate, n in zip(rates, self.parameters.values(), strict=True))


def plan(run: Run, machines: Machines) -> Plan:
    """What this run costs on these machines. ValueError when they cannot share it as it asks."""
    config, batch = run.model, typical_row(run.model, run.data.seq_len)
    numbers = {part: sum(map(prod, shapes)) for part, shapes in weights_of(config).items()}
    parameters = {
        "transformer": numbers["block"] * config.layers + numbers["norm"],
        "embeddings and head": numbers["embeddings"], "patches": numbers["patches"],
    }  # fmt: skip
    every_pair = 12 * config.layers * config.heads * config.head_size * run.data.seq_len
    return Plan(
        run, machines, parameters, memory(run, machines), logits=logits(run),
        image=tuple(batch.groups[0].x0.shape[2:]) if batch.groups else None,
        text_positions=batch.text_count * run.data.rows,
        flops=count_training_flops(batch, config) / batch.positions,
        usual_flops=6 * sum(parameters.values()) + every_pair,
    )  # fmt: skip


def positions_of_step(run: Run, gpus: int) -> int:
    return run.data.rows * run.data.seq_len * run.training.accumulate * gpus


def with_batch(run: Run, gpus: int, positions: int) -> Run:
    """The run with as many forward passes per step as come nearest to this many positions."""
    one = positions_of_step(replace(run, training=replace(run.training, accumulate=1)), gpus)
    return replace(run, training=replace(run.training, accumulate=max(1, round(positions / one))))


@cache
def weights_of(config: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the weights of one block, of the last norm, of embeddings and head, and of the layers for patches."""
    model = build_on_meta(config)
    found = {
        "block": model.transformer.blocks[0].parameters(), "norm": model.transformer.norm.parameters(),
        "patches": parameters_of(model.patches), "embeddings": parameters_of(model.tokens, model.head),
    }  # fmt: skip
    return {part: [tuple(p.shape) for p in parameters] for part, parameters in found.items()}


def parameters_of(*parts: nn.Module | None) -> list[nn.Parameter]:
    """Of the parts that are there."""
    return [parameter for part in parts if part is not None for parameter in part.parameters()]


def share(shapes: Iterable[tuple[int, ...]], ranks: int) -> int:
    """Numbers that a rank holds of weights in so many parts: each is cut along its first side, in parts rounded up."""
    return sum(ceil(first / ranks) * prod(rest) for first, *rest in shapes)


def memory(run: Run, machines: Machines) -> Memory:
    """What each GPU holds when it is most, near the start of the backward pass (where gradients are only there already if
    the step accumulates)."""
    shapes, ranks = weights_of(run.model), machines.sharing(run.parallel.shard)
    rest = [shape for part in ("norm", "patches", "embeddings") for shape in shapes[part]]
    parts = {part: FP32 * share(shapes[part], ranks) for part in shapes}
    parts["block"] *= run.model.layers
    rates = {"block": run.training.transformer_lr_scale, "norm": run.training.transformer_lr_scale,
             "patches": run.training.image_lr_scale, "embeddings": run.training.text_lr_scale}  # fmt: skip
    held, learnt = sum(parts.values()), sum(size for part, size in parts.items() if rates[part])
    root, block = share(rest, 1), share(shapes["block"], 1)
    if ranks == 1:
        gathered = BF16 * (root + block * run.model.layers)  # autocast's copies, until the backward pass is through
    else:  # a block, and the next one on its way; gradients of a block are summed in fp32
        gathered = 2 * BF16 * root + (2 * BF16 + BF16 + FP32) * block
    return Memory(
        weights=held, gradients=learnt, moments=2 * learnt, ema=held, gathered=gathered,
        activations=activations(run), backward=max(logits(run), inside_block(run)),
    )  # fmt: skip


@cache
def typical_row(config: ModelConfig, length: int) -> Batch:
    """One row, full: half of it images, each a document by itself, and half text of one document, as the paper mixes them.

    Images are the paper's, 32 x 32 latent pixels; where a row is too short for that, a half or a quarter ... as wide.
    """
    side = max(1, PAPER_SIDE // config.patch_size)  # in patches
    while side and side**2 + AROUND > length // 2:
        side //= 2
    shape = side * config.patch_size, side * config.patch_size
    codes = config.patches == "codes"
    content = np.zeros(shape, np.int64) if codes else np.zeros((config.latent_channels, *shape), np.float32)
    vocabulary = Vocabulary.build(0, [shape], config.patch_size, num_image_codes=int(codes))
    number = length // 2 // (side**2 + AROUND) if side else 0
    images = [encode_document(Document((Image(content),)), vocabulary)] * number
    rest = length - sum(map(len, images))
    text = encode_document(Document((Text((0,) * rest),)), vocabulary).part(0, rest)
    return collate([Row((*images, text))], length, vocabulary)


def activations(run: Run, number: int = BF16) -> int:
    """Bytes that a forward pass keeps for its backward pass, logits apart; `number` bytes for each number."""
    config, batch = run.model, typical_row(run.model, run.data.seq_len)
    block = config.width * number if run.parallel.activation_checkpointing else kept_by_block(run, number)
    kept = config.layers * block + 2 * config.head_size * number  # rotations, one for all blocks
    kept += 2 * config.width * number  # the last norm's input; what text and patches take of its output
    images = sum(len(group.index) * kept_by_unet(config, group.x0.shape[2:], number) for group in batch.groups)
    return run.data.rows * (batch.positions * kept + (images if config.patches == "unet" else 0))


def logits(run: Run) -> int:
    """Bytes that they take at most, with their gradients."""
    text = typical_row(run.model, run.data.seq_len).text_count * run.data.rows
    return LOGITS * text * run.model.vocab_size


def inside_block(run: Run, number: int = BF16) -> int:
    """Bytes that the backward pass of one block adds: the gradients inside it, and what is computed again."""
    inside = number * (3 * run.model.feed_forward_size + 2 * run.model.width)
    again = kept_by_block(run, number) if run.parallel.activation_checkpointing else 0
    return run.data.rows * run.data.seq_len * (inside + again)


def kept_by_block(run: Run, number: int = BF16) -> int:
    """Bytes for each position: what each norm reads and gives, attention's four, what the feed-forward multiplies."""
    config = run.model
    queries, keys = config.heads * config.head_size, config.num_kv_heads * config.head_size
    numbers = 4 * config.width + 2 * queries + 2 * keys + 3 * config.feed_forward_size
    if config.qk_norm:
        numbers += queries + keys
    found = number * numbers + FP32 * config.heads  # attention's normalisers
    if run.parallel.compile is False:
        found += number * config.feed_forward_size  # silu, which compiled blocks compute again
        if number == BF16:  # autocast: norms read fp32, and each of five products keeps its own copy of what they give
            found += (2 * (FP32 - BF16) + (5 - 2) * BF16) * config.width
    return found


def kept_by_unet(config: ModelConfig, shape: tuple[int, int], number: int = BF16) -> int:
    """Bytes for one image of shape (Y, X). Norms read and give fp32, also under autocast."""
    widths = config.unet_widths
    pixels = [shape[0] * shape[1] // 4**n for n in range(len(widths))]
    normed = 2 * FP32 + number  # what a norm reads, what silu reads, what a convolution reads
    found = widths[0] * pixels[0] * normed
    for width, area in zip(widths, pixels, strict=True):
        found += width * area * normed * (BLOCKS * 2 + (BLOCKS + 1) * 3)  # on the way up two widths come in
    for (above, below), fine in zip(pairwise(widths), pixels, strict=False):
        found += number * (above + below) * fine  # what halving and doubling read
    attention = FP32 + 8 * number  # of each pixel: what the norm reads; its output for q, k and v, these, and two of out
    return found + (2 * BLOCKS - 1) * widths[-1] * pixels[-1] * attention


def ways_to_fit(run: Run, machines: Machines) -> Iterator[str]:
    """Each change that alone would make the run fit; if none does, those that do together with recompute."""
    with_recompute = replace(run, parallel=replace(run.parallel, activation_checkpointing=True))
    found = [*_changes(run, machines)]
    if not run.parallel.activation_checkpointing:
        if memory(with_recompute, machines).all <= machines.memory:
            found.insert(0, "--parallel.activation-checkpointing")
        elif not found:
            found = [f"--parallel.activation-checkpointing {way}" for way in _changes(with_recompute, machines)]
    yield from found


def _changes(run: Run, machines: Machines) -> Iterator[str]:
    """Fewer rows, more GPUs: the least of each that will do."""
    for rows in range(run.data.rows - 1, 0, -1):
        if memory(replace(run, data=replace(run.data, rows=rows)), machines).all <= machines.memory:
            yield f"--data.rows {rows}"
            break
    gpus = 2 * machines.gpus
    while gpus <= (MOST_GPUS if run.parallel.shard == "full" else machines.per_machine):
        if memory(run, replace(machines, gpus=gpus)).all <= machines.memory:
            yield f"--gpus {gpus}"
            break
        gpus *= 2
