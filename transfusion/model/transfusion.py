"""The network: one transformer with inputs and outputs for tokens and for image patches (section 3)."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transfusion.config import ModelConfig, from_json, to_json
from transfusion.disk import CONFIG, RUN, OpenError, check_run_format, find_folder, read_json, write_json
from transfusion.model.lora import plain_name
from transfusion.model.mask import Mask, packed_mask
from transfusion.model.patches import LinearPatches
from transfusion.model.transformer import Cache, Transformer, rotary_positions
from transfusion.model.unet import UNetPatches
from transfusion.model.untied import IMAGE, first_name
from transfusion.model.weights import load_weights, write_weights
from transfusion.seeding import derive_seed
from transfusion.sequence import Batch, Sides

RESIDUAL_OUTPUTS = ("out", "down")  # last layers of attention and convolution blocks, and of the feed-forward
MODEL_TYPE = {"architectures": ["Transfusion"], "model_type": "transfusion"}  # in config.json
Head = Callable[[Tensor, Tensor], Any]  # of hidden states (T, D) and weights (V, D)


class Prediction(NamedTuple):
    """Next-token logits (T, V) at the requested positions, or the result of another `head`, and one prediction (N, C, Y, X)
    per image group. A tuple: FSDP finds the tensors of a module's output only in tuples, lists and dicts."""

    logits: Tensor
    images: list[Tensor]


class Transfusion(nn.Module):
    """The network, independent of noise schedule, codec, loss and data. Create it with `build`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        num_image_rows = config.vocab_size - config.num_text_rows
        self.tokens = nn.Embedding(config.num_text_rows, config.width)
        self.image_tokens = nn.Embedding(num_image_rows, config.width) if num_image_rows else None
        match config.patches:
            case "linear":
                self.patches = LinearPatches(config)
            case "unet":
                self.patches = UNetPatches(config)
            case "codes":
                self.patches = None  # images are tokens
        self.transformer = Transformer(config)
        # Tied embeddings have no head module: one tensor with one name cannot be saved twice or untied by accident.
        has_head = not config.tie_word_embeddings
        self.head = nn.Linear(config.width, config.num_text_rows, bias=False) if has_head else None
        self.image_head = nn.Linear(config.width, num_image_rows, bias=False) if has_head and num_image_rows else None

    def forward(self, batch: Batch, x_t: list[Tensor], t: list[Tensor], head: Head | None = None) -> Prediction:
        """Packed rows. For each image group of the batch: latents x_t (N, C, Y, X) at times t (N,).

        head(hidden (T, D), lm_head (V, D)) replaces the logits (T, V) by a loss that never has all of them in memory. It is
        called in here because FSDP gathers the weights only for the forward pass."""
        mask = packed_mask(batch.document_ids, batch.image_ids, self.config.image_attention, batch.clean_starts)
        image_index = [group.index for group in batch.groups]
        positions = rotary_positions(batch.position_ids, batch.grid_offsets, self.config)
        return self._predict(
            batch.tokens, positions, mask, None, batch.text_index, x_t, t, image_index, batch.sides, head
        )

    def forward_cached(
        self, tokens: Tensor, position_ids: Tensor, mask: Mask | None, cache: Cache, text_index: Tensor,
        x_t: list[Tensor], t: list[Tensor], image_index: list[Tensor], sides: Sides,
    ) -> Prediction:  # fmt: skip
        """New positions after those in the cache: tokens (B, L) at `rotary_positions`; logits at text_index (T,) into B * L;
        x_t and t as in `forward`, at the positions image_index (N, P) into B * L; `sides` has all B * L. Without a mask they
        attend to all positions of their row."""
        return self._predict(tokens, position_ids, mask, cache, text_index, x_t, t, image_index, sides)

    def _predict(
        self, tokens, position_ids, mask, cache, text_index, x_t, t, image_index, sides, head=None
    ) -> Prediction:  # fmt: skip
        x = self._embed_tokens(tokens)  # (B, L, D)
        if self.patches is not None and not x_t and torch.is_grad_enabled():
            # Keep unused image weights in the graph with zero gradient: otherwise FSDP's reduce-scatter deadlocks when one
            # rank has no image.
            x = x + 0 * sum(parameter.sum() for parameter in self.patches.parameters())
        B, L, D = x.shape
        embedded = [self.patches.embed(*pair) for pair in zip(x_t, t, strict=True)]  # (N, P, D), and skips for `unembed`
        if embedded:
            patches = torch.cat([vectors.reshape(-1, D) for vectors, _ in embedded])  # (all patches, D)
            index = torch.cat([group.view(-1) for group in image_index])
            x = x.view(-1, D).index_copy(0, index, patches.to(x.dtype)).view(B, L, D)
        hidden = self.transformer(x, position_ids, mask, sides, cache).view(-1, D)  # (B * L, D)
        return Prediction(self._apply_head(hidden.index_select(0, text_index), head), [
            self.patches.unembed(hidden.index_select(0, index.view(-1)).view(*index.shape, D), skips)
            for index, (_, skips) in zip(image_index, embedded, strict=True)
        ])  # fmt: skip

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, D). Untied ids of images have rows of their own."""
        if self.image_tokens is None:
            return self.tokens(tokens)
        is_image = tokens >= self.config.num_text_rows
        text = self.tokens(tokens.masked_fill(is_image, 0))
        return torch.where(is_image[..., None], self.image_tokens((tokens - self.config.num_text_rows).clamp(min=0)), text)

    def _apply_head(self, hidden: Tensor, head: Head | None) -> Any:
        """The logits (T, V) of hidden states (T, D), or the result of `head`."""
        text, image = (self.tokens, self.image_tokens) if self.head is None else (self.head, self.image_head)
        if image is None:
            return (head or F.linear)(hidden, text.weight)
        if head is not None:
            return head(hidden, torch.cat([text.weight, image.weight]))
        return torch.cat([F.linear(hidden, text.weight), F.linear(hidden, image.weight)], -1)  # no copy of the weights

    @classmethod
    def from_pretrained(
        cls, place: str | Path, *, revision: str | None = None, local_files_only: bool = False,
        dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu",
    ) -> "Transfusion":  # fmt: skip
        """The network of an exported run or of `save_pretrained`. To generate text and images, open the whole run with
        `transfusion.open_run`.

        place: a folder, or `owner/name` on the hub. revision: its branch, tag or commit; default main. local_files_only: do
        not use the network. dtype: of all weights, for example torch.bfloat16 or "bfloat16"; default float32, whatever the
        file has. OpenError when the place is neither, ValueError when the dtype is not a floating one.
        """
        weights_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
        if not isinstance(weights_dtype, torch.dtype) or not weights_dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating one, such as torch.bfloat16 or 'bfloat16', not {dtype!r}")
        folder = find_folder(place, revision, local_files_only)
        model = build_uninitialized(read_config(folder), device).to(weights_dtype)
        load_weights(folder, model)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model*.safetensors: the network without tokenizer and codec."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(self.state_dict(), folder)
        write_json(folder / CONFIG, {**MODEL_TYPE, "run": {"model": to_json(self.config)}})

    def push_to_hub(self, name: str, private: bool = False) -> None:
        """Upload the files of `save_pretrained` to `owner/name` on the hub. A missing repository is created."""
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub = HfApi()
            hub.create_repo(name, private=private, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=folder)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig in config.json. OpenError when it is missing, damaged or of another model type."""
    if (folder / RUN).exists():
        raise OpenError(f"{folder} is a run with checkpoints: open it with transfusion.open_run, or transfusion export it")
    values = read_json(folder / CONFIG)
    if values.get("model_type") != MODEL_TYPE["model_type"]:
        raise OpenError(f"{folder} holds a model of type {values.get('model_type')}, not {MODEL_TYPE['model_type']}")
    if "format" in values:  # of an exported run; `save_pretrained` writes none
        check_run_format(folder, values)
    try:
        return from_json(ModelConfig, values["run"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise OpenError(f"{folder / CONFIG} is damaged: {error}") from None


def build(config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> Transfusion:
    """A new model with its starting weights, which do not depend on the device or the number of ranks."""
    model = build_uninitialized(config, device)
    init_weights(model, seed)
    return model


def build_uninitialized(config: ModelConfig, device: str | torch.device = "cpu") -> Transfusion:
    """A model whose weights are not set yet."""
    with torch.device(device), _SkipInit():
        return Transfusion(config)


def build_on_meta(config: ModelConfig) -> Transfusion:
    """A model without memory for its weights (on the meta device)."""
    return build_uninitialized(config, "meta")


class _SkipInit(TorchFunctionMode):
    """Skips PyTorch's own initialisation: `init_weights` follows, and on the meta device it would import sympy (1.5 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def init_weights(
    model: Transfusion, seed: int, overwrite: Callable[[str, Tensor], None] | None = None,
    is_chosen: Callable[[str], bool] = lambda name: True,
) -> None:  # fmt: skip
    """Set the starting weights, in float32 on the CPU, each parameter with a generator from (seed, its name). Of sharded
    weights each rank sets its own shard. `overwrite(name, values)` may replace values in place. Untied image weights have
    the generator of the text's; with `image_init` fresh their own. Names are those of a model without adapters. Parameters
    that are not `is_chosen(name)` stay as they are."""
    for name, parameter in [(plain_name(name), parameter) for name, parameter in model.named_parameters()]:
        if not is_chosen(name):
            continue
        values = torch.empty(parameter.shape, dtype=torch.float32)
        generator = torch.Generator().manual_seed(derive_seed(seed, first_name(name, model.config.image_init)))
        _init_parameter(values, *name.split(".")[-2:], model.config, generator)
        if overwrite is not None:
            overwrite(name, values)
        if hasattr(parameter, "device_mesh"):  # a DTensor; importing its module takes a second
            from torch.distributed.tensor import distribute_tensor

            values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(values)


def _init_parameter(values: Tensor, layer: str, kind: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Biases, `proj_out` of patches and `lora_B` of adapters: 0. Norms: 1. Embedding: N(0, 1), or N(0, 1 / width) if it is
    also the head. All others: N(0, 1 / fan_in), which keeps the variance of activations; outputs to a residual stream are
    also divided by sqrt(2 layers), so that its variance does not grow with depth."""
    std = values[0].numel() ** -0.5
    if kind == "bias" or layer in ("proj_out", "lora_B"):
        values.zero_()
    elif layer.endswith("norm"):
        values.fill_(1)
    else:
        if layer.removeprefix(IMAGE) == "tokens":
            std = config.width**-0.5 if config.tie_word_embeddings else 1
        elif layer in RESIDUAL_OUTPUTS:
            std = (2 * config.layers * values[0].numel()) ** -0.5
        values.normal_(0, std, generator=generator)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
