"""Mask construction against torch's create_block_mask, and attention with the mask against dense and causal attention."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.fixtures import make_paper_batch
from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.model.mask import packed_mask
from transfusion.parallel import precision
from transfusion.sequence import Batch

HEADS, HEAD_DIM = 12, 64  # of 0.16b
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 0.02  # relative to the norm; the error of bfloat16 against float32


def measure(setting: Setting) -> Iterator[Figure]:
    """Rows like the paper's; on a CPU fewer and shorter ones."""
    yield measure_mask(make_batch(setting, setting.pick(4096, 512)), setting)
    yield from measure_attention(make_batch(setting, 4096 if setting.cuda else setting.pick(1024, 512)), setting)


def make_batch(setting: Setting, length: int) -> Batch:
    return make_paper_batch(length, 8 if setting.cuda else 2).to(setting.device)


def measure_mask(batch: Batch, setting: Setting) -> Figure:
    """Time FlexAttention's BlockMask from intervals and from a mask function. RuntimeError if they differ."""
    document, image = batch.document_ids, batch.image_ids

    def mask_mod(b, h, q, k):
        same_image = (image[b, q] == image[b, k]) & (image[b, q] >= 0)
        return (document[b, q] == document[b, k]) & ((q >= k) | same_image)

    def from_function():
        batch_size, length = document.shape
        return create_block_mask(mask_mod, batch_size, None, length, length, device=str(setting.device))

    def from_intervals():
        return packed_mask(document, image).block_mask

    ours, reference = from_intervals(), from_function()
    is_same = torch.equal(ours.full_kv_num_blocks, reference.full_kv_num_blocks)
    if not is_same or not torch.equal(ours.to_dense(), reference.to_dense()):
        raise RuntimeError("the mask from intervals differs from that of create_block_mask")
    functions = {"intervals": from_intervals, "function": from_function}
    seconds = time_alternately(functions, setting.pick(20, 1), setting.device)
    ratio = seconds["function"] / seconds["intervals"]
    name = f"a mask for {document.shape[0]} x {document.shape[1]:,} positions"
    return Figure(name, 1e3 * seconds["intervals"], "ms", ratio, "torch's create_block_mask")


def measure_attention(batch: Batch, setting: Setting) -> Iterator[Figure]:
    """Time forward and backward of one layer's attention, by every kernel available on this device."""
    mask = packed_mask(batch.document_ids, batch.image_ids)
    mask.prepare()
    dtype = precision(setting.device)
    shape = (len(batch.tokens), HEADS, batch.tokens.shape[1], HEAD_DIM)
    generator = torch.Generator(setting.device).manual_seed(0)
    tensors = [torch.randn(shape, device=setting.device, dtype=dtype, generator=generator) for _ in range(4)]
    kernels = {
        "plain causal SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "SDPA with a dense mask": dense_attention(mask.attn_bias.to(dtype)),
    }
    ours = "SDPA with a dense mask"
    if mask.uses_flex:
        ours, kernels["FlexAttention"] = "FlexAttention", mask.attend
        reference = forward_backward(dense_attention(mask.attn_bias), *(tensor.float() for tensor in tensors))
        check_close(forward_backward(kernels[ours], *tensors), reference)
    functions = {name: lambda kernel=kernel: forward_backward(kernel, *tensors) for name, kernel in kernels.items()}
    seconds = time_alternately(functions, setting.pick(20, 1), setting.device)
    name = f"attention, {' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
    yield Figure(name, beside=f"forward and backward, by {ours}")
    for kernel in seconds:
        if kernel != ours:
            yield Figure(f"  {ours}", 1e3 * seconds[ours], "ms", seconds[kernel] / seconds[ours], kernel)


def dense_attention(attn_bias: Tensor) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)


def forward_backward(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    output = attention(q, k, v)
    return output.detach(), *torch.autograd.grad(output, (q, k, v), grad_output)


def check_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """RuntimeError if (output, dq, dk, dv) differ by more than the error of bfloat16, or contain NaN."""
    for name, ours, reference in zip(("output", "q", "k", "v"), actual, expected, strict=True):
        difference = ((ours.float() - reference).norm() / reference.norm()).item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f"FlexAttention and the dense mask: {name} differs by {difference:.3g} of its norm")
