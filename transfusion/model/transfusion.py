"""One transformer, two ways in, two ways out: tokens and patches (section 3)."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transfusion.chance import seed_from
from transfusion.config import ModelConfig, from_json, to_json
from transfusion.disk import CONFIG, OpenError, find_folder, read_json, write_json
from transfusion.model.mask import Mask, packed
from transfusion.model.patches import LinearPatches
from transfusion.model.transformer import Cache, Transformer
from transfusion.model.unet import UNetPatches
from transfusion.model.weights import load_weights, write_weights
from transfusion.sequence import Batch

KIND = {"architectures": ["Transfusion"], "model_type": "transfusion"}  # of a config.json


class Prediction(NamedTuple):
    """What the model says: next-token logits (T, V) at the batch's text_index, and per group of images (N, C, Y, X).

    A tuple, because FSDP looks for the tensors in what a module returns.
    """

    logits: Tensor
    images: list[Tensor]


class Transfusion(nn.Module):
    """The network. It knows no schedule, codec, loss or data; build it with `build`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        match config.patches:
            case "linear":
                self.patches = LinearPatches(config)
            case "unet":
                self.patches = UNetPatches(config)
            case "codes":
                self.patches = None  # images are tokens
        self.transformer = Transformer(config)
        # Tied, the embedding is the head: one tensor under one name, so nothing can untie it or save it twice.
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(
        self, batch: Batch, noisy: list[Tensor], t: list[Tensor], mask: Mask | None = None, cache: Cache | None = None
    ) -> Prediction:
        """Latents (N, C, Y, X) at times t (N,) for each of the batch's groups, into the places that the group names.

        Without a mask the rows are packed documents; the engine gives its own, and a cache of earlier positions.
        """
        if mask is None:
            mask = packed(batch.document, batch.image, self.config.image_attention)
        x = self.tokens(batch.tokens)  # (B, L, D)
        if self.patches is not None and not noisy and torch.is_grad_enabled():
            # A gradient of zero, not none at all: ranks add up the gradients of the same weights, or wait for ever.
            x = x + 0 * sum(parameter.sum() for parameter in self.patches.parameters())
        B, L, D = x.shape
        entered = [self.patches.enter(*pair) for pair in zip(noisy, t, strict=True)]  # (N, P, D), and for the way out
        if entered:
            patches = torch.cat([vectors.reshape(-1, D) for vectors, _ in entered])  # (all patches, D)
            index = torch.cat([group.index.view(-1) for group in batch.groups])
            x = x.view(-1, D).index_copy(0, index, patches.to(x.dtype)).view(B, L, D)
        hidden = self.transformer(x, batch.position, mask, cache).view(-1, D)  # (B * L, D)
        outward = self.tokens.weight if self.head is None else self.head.weight  # (V, D)
        logits = F.linear(hidden.index_select(0, batch.text_index), outward)  # (T, V)
        return Prediction(logits, [
            self.patches.leave(hidden.index_select(0, g.index.view(-1)).view(*g.index.shape, D), carried)
            for g, (_, carried) in zip(batch.groups, entered, strict=True)
        ])  # fmt: skip

    @classmethod
    def from_pretrained(cls, place: str | Path, device: str | torch.device = "cpu") -> "Transfusion":
        """The network of an exported run, or what `save_pretrained` wrote: a folder, or `owner/name` on the hub.

        OpenError when it is neither. To write and draw with it, `transfusion.open_run` opens the whole run.
        """
        folder = find_folder(place)
        model = empty(read_config(folder), device)
        load_weights(folder, model)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """The network alone, without tokenizer and codec: config.json and model*.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(self.state_dict(), folder)
        write_json(folder / CONFIG, {**KIND, "run": {"model": to_json(self.config)}})

    def push_to_hub(self, name: str, private: bool = False) -> None:
        """The same into the hub's repository `owner/name`, which is made if it is not there."""
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub = HfApi()
            hub.create_repo(name, private=private, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=folder)


def read_config(folder: Path) -> ModelConfig:
    """What config.json says of the network. OpenError when it is not of this kind."""
    values = read_json(folder / CONFIG)
    if values.get("model_type") != KIND["model_type"]:
        raise OpenError(f"{folder} holds a model of type {values.get('model_type')}, not {KIND['model_type']}")
    try:
        return from_json(ModelConfig, values["run"]["model"], "model.")
    except (KeyError, TypeError, ValueError) as error:
        raise OpenError(f"{folder / CONFIG} is damaged: {error}") from None


def build(config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> Transfusion:
    """A new model with its starting weights, the same on any device or number of ranks."""
    model = empty(config, device)
    init_weights(model, seed)
    return model


def empty(config: ModelConfig, device: str | torch.device = "cpu") -> Transfusion:
    """A model whose weights are yet to be filled in."""
    with torch.device(device), _Unfilled():
        return Transfusion(config)


def blueprint(config: ModelConfig) -> Transfusion:
    """A model without memory for its weights (on the meta device)."""
    return empty(config, "meta")


class _Unfilled(TorchFunctionMode):
    """Layers do not fill what they make: it is done later, and on the meta device it would import sympy, in 1.5 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def init_weights(model: Transfusion, seed: int, given: Callable[[str, Tensor], None] | None = None) -> None:
    """Fill in the starting weights, fp32 on the CPU, each parameter's chance from (seed, its name). Of weights that are
    sharded over ranks each takes its own part. `given` may put other numbers into a parameter, by name, or into some rows.

    Matrices and kernels start as large as keeps a signal's size. Layers that write to a residual stream start smaller, so
    that depth does not make it grow; the image head starts at zero: its first guess is 0, the mean of what it learns to say.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        fresh = torch.empty(parameter.shape, dtype=torch.float32)
        fan_in = parameter[0].numel()
        generator = torch.Generator().manual_seed(seed_from(seed, name))
        match name.split(".")[-2:]:
            case [_, "bias"]:
                fresh.zero_()
            case [norm, "weight"] if norm.endswith("norm"):
                fresh.fill_(1)
            case ["outward", "weight"]:
                fresh.zero_()
            case ["tokens", "weight"]:
                fresh.normal_(0, 1 if not config.tied else config.width**-0.5, generator=generator)
            case ["out" | "down", "weight"]:
                fresh.normal_(0, (2 * config.layers * fan_in) ** -0.5, generator=generator)
            case _:
                fresh.normal_(0, fan_in**-0.5, generator=generator)
        if given is not None:
            given(name, fresh)
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose module takes a second to import
            from torch.distributed.tensor import distribute_tensor

            fresh = distribute_tensor(fresh, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(fresh)


def count_parameters(model: nn.Module) -> int:
    """Numbers that are learnt."""
    return sum(parameter.numel() for parameter in model.parameters())
