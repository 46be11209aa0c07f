"""The next-token loss in chunks of positions against the loss on all logits: time and memory of head and loss."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import MemoryCounter
from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.objective import next_token_loss
from transfusion.parallel import lower_precision

POSITIONS, VOCAB_SIZE, WIDTH = 4096, 32_000, 768  # with a text loss in a forward pass of 0.16b
TOLERANCE = 1e-5  # relative to the norm, of float32 gradients


def measure(setting: Setting) -> Iterator[Figure]:
    """Forward and backward pass, in the precision of training."""
    positions, vocab_size = setting.pick(POSITIONS, 300), setting.pick(VOCAB_SIZE, 500)
    generator = torch.Generator(setting.device).manual_seed(0)
    hidden = torch.randn(positions, WIDTH, device=setting.device, generator=generator)  # (T, D)
    lm_head = torch.randn(vocab_size, WIDTH, device=setting.device, generator=generator) / WIDTH**0.5  # (V, D)
    target = torch.randint(vocab_size, (positions,), device=setting.device, generator=generator)  # (T,)
    tensors = hidden.requires_grad_(), lm_head.requires_grad_()

    def forward_backward(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        with lower_precision(setting.device):
            total = loss(*tensors)
        return torch.autograd.grad(total / positions, tensors)

    functions = {
        "chunks": lambda: forward_backward(lambda *pair: next_token_loss(*pair, target).sum),
        "all logits": lambda: forward_backward(lambda *pair: F.cross_entropy(F.linear(*pair), target, reduction="sum")),
    }
    if not setting.cuda:
        check_close(*(function() for function in functions.values()))
    memory = {name: measure_memory(function, setting) for name, function in functions.items()}
    seconds = time_alternately(functions, setting.pick(20 if setting.cuda else 5, 1), setting.device)
    ratio = seconds["all logits"] / seconds["chunks"]
    yield Figure(f"{positions:,} positions, {vocab_size:,} ids, width {WIDTH}", beside="head and loss, forward and backward")
    yield Figure("  time in chunks", 1e3 * seconds["chunks"], "ms", ratio, "all logits at once")
    ratio = memory["all logits"] / memory["chunks"]
    yield Figure("  memory beyond the gradients", memory["chunks"], "MiB", ratio, "less than all logits")


def measure_memory(function: Callable[[], list[Tensor]], setting: Setting) -> float:
    """Peak MiB beyond the inputs and the gradients that it returns: of all tensors, or on CUDA of the allocator."""
    if setting.cuda:
        before = torch.cuda.memory_allocated(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        gradients = function()
        peak = torch.cuda.max_memory_allocated(setting.device) - before
    else:
        with MemoryCounter() as counter:
            gradients = function()
        peak = counter.peak
    return (peak - sum(gradient.nbytes for gradient in gradients)) / 2**20


def check_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """RuntimeError if the gradients differ by more than the error of float32, or contain NaN."""
    for name, ours, reference in zip(("hidden", "lm_head"), actual, expected, strict=True):
        difference = ((ours - reference).norm() / reference.norm()).item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the loss in chunks: the gradient of {name} differs by {difference:.3g} of its norm")
