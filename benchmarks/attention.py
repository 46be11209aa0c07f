"""The mask and the attention under it: made from intervals beside torch's way, and run beside a dense and a causal one."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.made import paper_loader
from benchmarks.measuring import Figure, Setting, in_turn
from transfusion.model.mask import packed_mask
from transfusion.parallel import precision
from transfusion.sequence import Batch

HEADS, SIZE = 12, 64  # of 0.16b
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NEAR = 0.02  # of the norm: how far bfloat16 may be from float32


def measure(setting: Setting) -> Iterator[Figure]:
    """On rows of the paper's kind; on a CPU shorter and fewer ones."""
    yield construction(rows_of(setting, setting.pick(4096, 512)), setting)
    yield from kernels(rows_of(setting, 4096 if setting.cuda else setting.pick(1024, 512)), setting)


def rows_of(setting: Setting, length: int) -> Batch:
    batch, _ = next(paper_loader(length, 8 if setting.cuda else 2).batches())
    return batch.to(setting.device)


def construction(batch: Batch, setting: Setting) -> Figure:
    """FlexAttention's form of the mask, from the rows' documents and images. RuntimeError when the two ways differ."""
    document, image = batch.document_ids, batch.image_ids

    def rule(b, h, q, k):
        inside = (image[b, q] == image[b, k]) & (image[b, q] >= 0)
        return (document[b, q] == document[b, k]) & ((q >= k) | inside)

    def asked():
        return create_block_mask(rule, *document.shape[:1], None, *[document.shape[1]] * 2, device=str(setting.device))

    def computed():
        return packed_mask(document, image).block_mask

    one, other = computed(), asked()
    same = torch.equal(one.to_dense(), other.to_dense()) and torch.equal(one.full_kv_num_blocks, other.full_kv_num_blocks)
    if not same:
        raise RuntimeError("the mask from intervals is not the one that create_block_mask makes")
    seconds = in_turn({"computed": computed, "asked": asked}, setting.pick(20, 1), setting.device)
    ratio = seconds["asked"] / seconds["computed"]
    what = f"a mask for {document.shape[0]} x {document.shape[1]:,} positions"
    return Figure(what, 1e3 * seconds["computed"], "ms", ratio, "torch's create_block_mask")


def kernels(batch: Batch, setting: Setting) -> Iterator[Figure]:
    """Forward and backward of one layer's attention, every way there is on this device."""
    mask = packed_mask(batch.document_ids, batch.image_ids)
    mask.prepare()
    dtype = precision(setting.device)
    shape = (len(batch.tokens), HEADS, batch.tokens.shape[1], SIZE)
    generator = torch.Generator(setting.device).manual_seed(0)
    given = [torch.randn(shape, device=setting.device, dtype=dtype, generator=generator) for _ in range(4)]
    ways = {
        "plain causal SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "SDPA with a dense mask": dense(mask.attn_bias.to(dtype)),
    }
    mine = "SDPA with a dense mask"
    if mask.uses_flex:
        mine, ways["FlexAttention"] = "FlexAttention", mask.attend
        check(both_ways(ways[mine], *given), both_ways(dense(mask.attn_bias), *(part.float() for part in given)))
    seconds = in_turn(
        {name: lambda way=way: both_ways(way, *given) for name, way in ways.items()}, setting.pick(20, 1), setting.device
    )
    what = f"attention, {' x '.join(map(str, shape))}"
    yield Figure(f"{what}, {str(dtype).removeprefix('torch.')}", beside=f"forward and backward, by {mine}")
    for name in seconds:
        if name != mine:
            yield Figure(f"  {mine}", 1e3 * seconds[mine], "ms", seconds[name] / seconds[mine], name)


def dense(added: Tensor) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def both_ways(attend: Attend, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """What comes out, and the gradients of what goes in."""
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)


def check(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> None:
    """RuntimeError when they differ by more than bfloat16 explains."""
    for name, one, other in zip(("output", "q", "k", "v"), found, true, strict=True):
        difference = ((one.float() - other).norm() / other.norm()).item()
        if not difference <= NEAR:  # not a number is not near
            raise RuntimeError(f"FlexAttention is not the dense mask: {name} differs by {difference:.3g} of its norm")
