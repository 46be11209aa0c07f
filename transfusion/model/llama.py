"""Llama models in the format of `transformers`: their config as a ModelConfig, and their weights under our names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from transfusion.config import ModelConfig, RopeScaling
from transfusion.disk import CONFIG, OpenError, read_json
from transfusion.model.transfusion import build_on_meta
from transfusion.model.weights import Weights

# Fields of ModelConfig that the folder sets.
LLAMA_FIELDS = (
    "width", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "tie_word_embeddings", "norm_eps", "rope_theta",
    "rope_scaling", "qk_norm", "post_norm",
)  # fmt: skip
VOCAB_WEIGHTS = ("tokens.weight", "head.weight")  # (V, D), one row per token id
NAMES = {"tokens": "model.embed_tokens", "transformer.norm": "model.norm", "head": "lm_head"}
BLOCK_NAMES = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj", "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip


class Llama:
    """A folder with a Llama model. Only its safetensors and JSON files are read. OpenError when a file is missing, or for a
    feature that this network does not support: biases, other activations or RoPE types, quantised weights."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise OpenError(f"there is no folder {folder}")
        self.folder, self.values = folder, read_json(folder / CONFIG)
        if self.values.get("model_type") != "llama":
            raise OpenError(f"{folder} holds a model of type {self.values.get('model_type')}, not llama")
        self._check_supported()
        self.weights = Weights(folder)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config with the sizes of this folder; its patch and vocabulary fields are unchanged."""
        values, rope = self.values, self._rope()
        try:
            return replace(
                config, width=values["hidden_size"], layers=values["num_hidden_layers"], heads=values["num_attention_heads"],
                kv_heads=values.get("num_key_value_heads"), head_dim=values.get("head_dim"),
                intermediate_size=values["intermediate_size"],
                tie_word_embeddings=values.get("tie_word_embeddings", False), norm_eps=float(values["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta", 10_000.0)), rope_scaling=_scaling(rope),
                qk_norm=False, post_norm=False,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise OpenError(f"{self.folder / CONFIG} cannot be used: {reason}") from None

    def check_weights(self, config: ModelConfig, num_text_tokens: int) -> None:
        """OpenError unless names and shapes are those of `config`, with a row for every token id of the tokenizer."""
        names = llama_names(config)
        ignored = {name for name in self.weights.names if name.endswith("rotary_emb.inv_freq")}  # in early Llama files
        ignored |= {"lm_head.weight"} if config.tie_word_embeddings else set()
        for name in sorted((self.weights.names - ignored) ^ set(names.values())):
            problem = "has an unexpected tensor" if name in self.weights.names else "lacks the tensor"
            raise OpenError(f"{self.folder} {problem} {name}: it must have exactly the tensors of its config.json")
        for ours, parameter in build_on_meta(config).named_parameters():
            if ours not in names:
                continue
            shape, expected = self.weights.shape(names[ours]), tuple(parameter.shape)
            if ours in VOCAB_WEIGHTS:
                expected = (max((num_text_tokens, *shape[:1])), expected[1])
            if shape != expected:
                raise OpenError(f"{self.folder}: {names[ours]} is {shape}; config.json and the tokenizer require {expected}")

    def fill(self, config: ModelConfig, num_text_tokens: int, name: str, values: Tensor) -> None:
        """Copy the parameter of this name into `values`, if Llama has it; of VOCAB_WEIGHTS, only the text tokens' rows."""
        llama_name = llama_names(config).get(name)
        if llama_name is not None:
            source = self.weights.read(llama_name)
            rows = num_text_tokens if name in VOCAB_WEIGHTS else len(source)
            values[:rows].copy_(source[:rows])

    def _rope(self) -> dict[str, Any]:
        """The RoPE options: one object since transformers 5, two fields in older versions."""
        for name in ("rope_parameters", "rope_scaling"):
            if not isinstance(self.values.get(name) or {}, dict):
                raise OpenError(f"{self.folder / CONFIG} cannot be used: {name} is {self.values[name]!r}, not an object")
        older = {"rope_theta": self.values.get("rope_theta", 10_000.0), **(self.values.get("rope_scaling") or {})}
        return self.values.get("rope_parameters") or older

    def _check_supported(self) -> None:
        rope = self._rope()
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "attention biases": self.values.get("attention_bias"), "MLP biases": self.values.get("mlp_bias"),
            f"the activation {self.values.get('hidden_act')}": self.values.get("hidden_act", "silu") != "silu",
            f"RoPE of type {rope_type}": rope_type not in ("default", "llama3"),
            "RoPE on a part of each head": rope.get("partial_rotary_factor", 1) != 1,
            "quantised weights": self.values.get("quantization_config"),
        }  # fmt: skip
        for feature, is_present in unsupported.items():
            if is_present:
                raise OpenError(f"{self.folder} has {feature}: this network does not support it")


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    return RopeScaling(
        float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )  # fmt: skip


def llama_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter name -> Llama's, for all parameters that a Llama has."""
    names = {
        f"{ours}.weight": f"{theirs}.weight"
        for ours, theirs in NAMES.items()
        if ours != "head" or not config.tie_word_embeddings
    }
    for n in range(config.layers):
        for ours, theirs in BLOCK_NAMES.items():
            names[f"transformer.blocks.{n}.{ours}.weight"] = f"model.layers.{n}.{theirs}.weight"
    return names
