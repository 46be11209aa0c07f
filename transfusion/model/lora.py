"""LoRA (2106.09685): beside a frozen matrix W (out, in) of a block, trained A (r, in) and B (out, r); used is W + B A.

`peft` has the layers, and the format of an exported adapter; its scaling alpha / r is 1. Tensors of an adapter are called by
their layer: `transformer.blocks.0.attention.query.lora_A.weight`.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from transfusion.config import LoraConfig
from transfusion.model.untied import side_of

BLOCKS = "transformer.blocks."  # names of the parameters of blocks begin with it
IMAGE_PARTS = "patches", "image_tokens", "image_head"  # outside of the blocks, of images alone


def list_adapted(model: nn.Module, lora: LoraConfig) -> list[str]:
    """The names of the layers of a network without adapters that get one: linear layers of its blocks."""
    sides = lora.sides(model.config.untied)
    return [
        name.removesuffix(".weight") for name, parameter in model.named_parameters()
        if name.startswith(BLOCKS) and parameter.dim() == 2 and side_of(name, model.config.untied) in sides
    ]  # fmt: skip


def trained_shapes(model: nn.Module, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an adapter by name, for a network without one: A and B of its layers, and the parts that are
    trained in full."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pairs = {name: shapes[f"{name}.weight"] for name in list_adapted(model, lora)}
    return {
        **{f"{name}.lora_A.weight": (lora.rank, columns) for name, (_, columns) in pairs.items()},
        **{f"{name}.lora_B.weight": (rows, lora.rank) for name, (rows, _) in pairs.items()},
        **{name: shape for name, shape in shapes.items() if is_trained(name, lora)},
    }


def is_trained(name: str, lora: LoraConfig) -> bool:
    """Is this parameter of a network with adapters trained? Those of adapters are, and unless they are on text alone, the
    patch layers and the rows of ids that only images have."""
    return is_of_adapter(name) or (lora.on != "text" and name.partition(".")[0] in IMAGE_PARTS)


def is_of_adapter(name: str) -> bool:
    """Is this parameter an A or a B?"""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """The name of a parameter without the words that peft's layers add to it."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def check_peft() -> None:
    """ValueError when peft is not installed."""
    if find_spec("peft") is None:
        raise ValueError("--lora.rank needs peft: pip install '.[lora]' in a clone of the repository")


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Replace the layers that get an adapter by peft's, in a network on the meta device. ValueError without peft."""
    check_peft()
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(model, lora), model, low_cpu_mem_usage=True)


def peft_config(model: nn.Module, lora: LoraConfig, **options):
    """peft's LoraConfig. The layers are named by an expression that fits them and no layer of a U-Net. ValueError without
    peft."""
    check_peft()
    import peft

    layers = sorted({name.removeprefix(BLOCKS).partition(".")[2] for name in list_adapted(model, lora)})
    expression = rf"{re.escape(BLOCKS)}\d+\.({'|'.join(map(re.escape, layers))})"
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=expression, init_lora_weights=False, **options)


@torch.no_grad()
def merge(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Add an adapter, on the same device, to the weights of a network without one: W + B A, or for a part that was trained
    in full, its weights."""
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if name in adapter:
            parameter.copy_(adapter[name])
        elif f"{layer}.lora_A.weight" in adapter:
            parameter.addmm_(adapter[f"{layer}.lora_B.weight"], adapter[f"{layer}.lora_A.weight"])
