"""Weights of their own for image positions (Mixture-of-Transformers, 2411.04996): which positions and parameters they are.

Image weights have the names of the text's with "image_" before one word: `image_attention.query` beside `attention.query`.
`image_tokens` and `image_head` are the rows of ids that only images have: eoi, boi and codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transfusion.sequence import Sides

IMAGE = "image_"
SIDES = "text", "image", "transformer"  # of parameters; "transformer" is what text and images share


def side_of(name: str, untied: str) -> str:
    """The side of a parameter, one of SIDES: which learning rate scale it has."""
    first = name.partition(".")[0]
    if first == "patches" or first.startswith(IMAGE) or text_name(name) != name:
        return "image"
    has_image_weight = untied == "full" or (untied == "feed_forward" and ".feed_forward" in name)
    return "transformer" if first == "transformer" and not has_image_weight else "text"


def first_name(name: str, image_init: str) -> str:
    """The name of the weight that this one is initialised as."""
    return text_name(name) if image_init == "copy" else name


def text_name(name: str) -> str:
    """The name of the text weight beside an image weight of the transformer; any other name itself."""
    return name.replace(f".{IMAGE}", ".")


class Routing:
    """Sends hidden states to the weights of their side.

    They are a list: one tensor (B * L, ...) of all positions in order, or two, of text (n, ...) and images (m, ...). So each
    product is dense. The two meet in attention, which is joint.
    """

    def __init__(self, sides: Sides):
        self.sides = sides
        # In training both, even without positions: FSDP needs a gradient of every weight on every rank.
        self.used = [n for n, index in enumerate(sides) if torch.is_grad_enabled() or len(index)]

    def select(self, text: nn.Module, image: nn.Module | None) -> list[nn.Module]:
        """One module for all positions, if they share it or are all of one side; else those of text and of images."""
        return [text] if image is None else [(text, image)[n] for n in self.used]

    def arrange(self, x: list[Tensor], count: int) -> list[Tensor]:
        """Hidden states as one tensor or as two."""
        if len(x) == count:
            return x
        return [*_Split.apply(*x, *self.sides)] if count == 2 else [_Join.apply(*x, *self.sides)]

    def apply(self, functions: list[Callable[[Tensor], Tensor]], x: list[Tensor]) -> list[Tensor]:
        """Each function of its hidden states."""
        return [function(part) for function, part in zip(functions, self.arrange(x, len(functions)), strict=True)]


class _Split(torch.autograd.Function):
    """(B * L, ...) -> (n, ...) and (m, ...). As the indices are a permutation, its gradient is `_Join`, without sums."""

    @staticmethod
    def forward(ctx, x: Tensor, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(text, image)
        return x.index_select(0, text), x.index_select(0, image)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_text: Tensor, grad_image: Tensor) -> tuple[Tensor, None, None]:
        return _join(grad_text, grad_image, *ctx.saved_tensors), None, None


class _Join(torch.autograd.Function):
    """(n, ...) and (m, ...) -> (B * L, ...)."""

    @staticmethod
    def forward(ctx, text_part: Tensor, image_part: Tensor, text: Tensor, image: Tensor) -> Tensor:
        ctx.save_for_backward(text, image)
        return _join(text_part, image_part, text, image)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        text, image = ctx.saved_tensors
        return grad.index_select(0, text), grad.index_select(0, image), None, None


def _join(text_part: Tensor, image_part: Tensor, text: Tensor, image: Tensor) -> Tensor:
    joined = text_part.new_empty(len(text) + len(image), *text_part.shape[1:])
    return joined.index_copy_(0, text, text_part).index_copy_(0, image, image_part)
