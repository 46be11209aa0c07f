"""Language models in the format of `transformers`: their config as a ModelConfig, and their weights under our names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.config import ModelConfig, RopeScaling
from transfusion.disk import ADAPTER_CONFIG, CONFIG, RUN, OpenError, read_json
from transfusion.fields import short_repr
from transfusion.model.transfusion import MODEL_TYPE, build_on_meta
from transfusion.model.untied import IMAGE
from transfusion.model.weights import Weights

# Families, and the defaults of `transformers` for fields that config.json omits, where the families differ.
FAMILIES = {
    "llama": {}, "mistral": {"num_key_value_heads": 8}, "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
# Fields of ModelConfig that the folder sets.
DECIDED_FIELDS = (
    "width", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "tie_word_embeddings", "norm_eps", "rope_theta",
    "rope_scaling", "qk_norm", "qkv_bias", "post_norm",
)  # fmt: skip
VOCAB_WEIGHTS = ("tokens.weight", "head.weight")  # (V, D), one row per token id
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {  # of a parameter's name, ours and theirs, where they differ
    "tokens": "model.embed_tokens", "head": "lm_head", "transformer": "model", "blocks": "layers",
    "attention": "self_attn", "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj",
    "feed_forward": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip


class LanguageModel:
    """A folder with a language model of one of the FAMILIES. Only its safetensors and JSON files are read. OpenError when a
    file is missing, or for a field of config.json with a value that this network does not support."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise OpenError(f"there is no folder {folder}")
        if (folder / ADAPTER_CONFIG).exists():  # `transformers` applies it to the model
            raise OpenError(f"{folder} holds an adapter ({ADAPTER_CONFIG}): merge it into its model, and save the result")
        if (folder / RUN).exists() or read_json(folder / CONFIG).get("model_type") == MODEL_TYPE["model_type"]:
            raise OpenError(f"{folder} is a run, not a language model: use --from")
        self.folder, self.values = folder, read_json(folder / CONFIG)
        try:
            _check("model_type", self.values.get("model_type"), [*FAMILIES], f"supported are {', '.join(FAMILIES)}")
            self.family = self.values["model_type"]
            self.values = FAMILIES[self.family] | self.values
            self._check_supported()
            self._config = ModelConfig(**self._read_sizes())
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise OpenError(f"{folder / CONFIG} cannot be used: {reason}") from None
        self.weights = Weights(folder)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config with the DECIDED_FIELDS of this folder."""
        return replace(config, **{name: getattr(self._config, name) for name in DECIDED_FIELDS})

    def check_weights(self, num_text_tokens: int) -> None:
        """OpenError unless names and shapes are those of config.json, with a row for every token id of the tokenizer."""
        parameters = {name: tuple(parameter.shape) for name, parameter in build_on_meta(self._config).named_parameters()
                      if not name.startswith("patches.")}  # fmt: skip
        ignored = {name for name in self.weights.names if name.endswith("rotary_emb.inv_freq")}  # in early Llama files
        if self._config.tie_word_embeddings:
            self._check_tied()
            ignored |= {EMBEDDING, HEAD} - {self._name("tokens.weight")}
        expected = {self._name(name) for name in parameters}
        for name in sorted((self.weights.names - ignored) ^ expected):
            problem = "has an unexpected tensor" if name in self.weights.names else "lacks the tensor"
            raise OpenError(f"{self.folder} {problem} {name}: it must have exactly the tensors of its config.json")
        for name, size in parameters.items():
            theirs = self._name(name)
            shape = self.weights.shape(theirs)
            if name in VOCAB_WEIGHTS:
                size = (max((num_text_tokens, *shape[:1])), size[1])
            if shape != size:
                raise OpenError(f"{self.folder}: {theirs} is {shape}; config.json and the tokenizer require {size}")

    def fill(self, num_text_tokens: int, name: str, values: Tensor) -> None:
        """Copy the parameter of this name into `values`, if the folder has it.

        Of VOCAB_WEIGHTS it has the rows of text tokens. Those of new ids keep their random values, scaled to the standard
        deviation of the others: language models have embeddings of about 0.02, beside which N(0, 1) would learn slowly.
        """
        theirs = self._name(name.removeprefix(IMAGE))
        if theirs not in self.weights.names:
            return
        source = self.weights.read(theirs)
        if theirs in (EMBEDDING, HEAD):
            source = source[:num_text_tokens]
            known = 0 if name.startswith(IMAGE) else num_text_tokens
            new = values[known:]
            if len(new):
                new.mul_(source.float().std() / new.std())
            source = source[:known]
        values[: len(source)].copy_(source)

    def _name(self, name: str) -> str:
        """The name in the folder of a parameter."""
        theirs = ".".join(WORDS.get(word, word) for word in name.split("."))
        # Of tied matrices, a file from `safetensors.torch.save_model` has only the first name in the alphabet.
        return HEAD if theirs == EMBEDDING and HEAD in self.weights.names and EMBEDDING not in self.weights.names else theirs

    def _check_tied(self) -> None:
        """OpenError when the folder has two matrices that its config ties: versions of `transformers` differ in which they
        use."""
        if {EMBEDDING, HEAD} <= self.weights.names and not torch.equal(*map(self.weights.read, (EMBEDDING, HEAD))):
            raise OpenError(f"{self.folder / CONFIG}: tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}: set it to "
                            f"false if the model was trained with both, else remove {HEAD}")  # fmt: skip

    def _read_sizes(self) -> dict[str, Any]:
        """The DECIDED_FIELDS."""
        values, rope = self.values, self._rope()
        scaling = None if _rope_type(rope) == "default" else RopeScaling(
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"],
        )  # fmt: skip
        return {
            "width": values["hidden_size"], "layers": values["num_hidden_layers"], "heads": values["num_attention_heads"],
            "kv_heads": values.get("num_key_value_heads"), "head_dim": values.get("head_dim"),
            "intermediate_size": values["intermediate_size"],
            "tie_word_embeddings": values.get("tie_word_embeddings", False), "norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": rope["rope_theta"], "rope_scaling": scaling, "qk_norm": self.family == "qwen3",
            "qkv_bias": self.family == "qwen2", "post_norm": False,
        }  # fmt: skip

    def _rope(self) -> dict[str, Any]:
        """The RoPE parameters: one object since transformers 5, two fields in older versions. As there, the older name is
        preferred, and a theta beside the object is used if the object has none."""
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(self.values.get(name) or {}, dict):
                raise ValueError(f"{name} is {short_repr(self.values[name])}, not an object")
        beside = {name: self.values[name] for name in ("rope_theta", "partial_rotary_factor") if name in self.values}
        rope = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        return {"rope_theta": 10_000.0} | beside | rope

    def _check_supported(self) -> None:
        """ValueError for the first field with a value that this network does not support."""
        values, rope = self.values, self._rope()
        for name, value in rope.items():  # an object for each type of layers
            _check(f"rope_parameters.{name}", value, not isinstance(value, dict), "supported is one RoPE for all layers")
        _check("rope_type", _rope_type(rope), ["default", "llama3"], "supported are default and llama3")
        _check("partial_rotary_factor", rope.get("partial_rotary_factor"), [None, 1], "supported is 1")
        names = values.get("architectures")
        _check("architectures", names, not names or "ForCausalLM" in str(names), "a language model is a ForCausalLM")
        _check("is_causal", values.get("is_causal"), [None, True], "supported is true")
        _check("hidden_act", values.get("hidden_act", "silu"), ["silu", "swish"], "supported is silu")
        for name in ("mlp_bias",) if self.family == "qwen2" else ("attention_bias", "mlp_bias"):
            _check(name, values.get(name), not values.get(name), "supported are the biases of query, key and value of qwen2")
        quantization = values.get("quantization_config")
        _check("quantization_config", quantization, not quantization, "save the model in bfloat16, float16 or float32")
        layer_types = values.get("layer_types") or []
        is_full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
        _check("layer_types", layer_types, is_full, "supported is full_attention in all layers")
        window = self._window()
        _check("sliding_window", window, window is None, f"set it to null if data.seq_len is at most {window}")

    def _window(self) -> Any:
        """The sliding window of attention, if any layer uses it, else None."""
        values = self.values
        is_used = self.family == "mistral" or (
            self.family != "llama" and values.get("use_sliding_window") and values.get("layer_types") is None
            and values.get("max_window_layers", 28) < values["num_hidden_layers"]
        )  # fmt: skip
        return values.get("sliding_window", 4096) if is_used else None


def _check(field: str, value: Any, supported: list | bool, fix: str) -> None:
    """ValueError unless the value is one of the supported ones, or `supported` is true."""
    if value not in supported if isinstance(supported, list) else not supported:
        raise ValueError(f"{field} is {short_repr(value)}, which is not supported: {fix}")


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))
