"""A language model of the Llama architecture, as `transformers` writes it: its sizes, and its weights under our names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from transfusion.config import ModelConfig, RopeScaling
from transfusion.disk import CONFIG, OpenError, read_json
from transfusion.model.transfusion import build_on_meta
from transfusion.model.weights import Weights

# Fields of ModelConfig that the folder decides.
DECIDED = (
    "width", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "tie_word_embeddings", "norm_eps", "rope_theta",
    "rope_scaling",
    "qk_norm", "post_norm",
)  # fmt: skip
BY_TOKEN = ("tokens.weight", "head.weight")  # one row for each id
OUTER = {"tokens": "model.embed_tokens", "transformer.norm": "model.norm", "head": "lm_head"}
OF_BLOCK = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj", "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip


class Llama:
    """The folder of one. Nothing of it but safetensors and JSON is read.

    OpenError says what is missing, or what of it this network cannot do: biases, another activation or stretch of the
    rotary frequencies, quantised weights.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise OpenError(f"there is no folder {folder}")
        self.folder, self.about = folder, read_json(folder / CONFIG)
        if self.about.get("model_type") != "llama":
            raise OpenError(f"{folder} holds a model of type {self.about.get('model_type')}, and it must be llama")
        self._check()
        self.weights = Weights(folder)

    def config(self, config: ModelConfig) -> ModelConfig:
        """These sizes in the place of the config's own; what it says of patches and vocabulary stays."""
        about, rope = self.about, self._rope()
        try:
            return replace(
                config, width=about["hidden_size"], layers=about["num_hidden_layers"], heads=about["num_attention_heads"],
                kv_heads=about.get("num_key_value_heads"), head_dim=about.get("head_dim"),
                intermediate_size=about["intermediate_size"],
                tie_word_embeddings=about.get("tie_word_embeddings", False), norm_eps=float(about["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta", 10_000.0)), rope_scaling=_scaling(rope),
                qk_norm=False, post_norm=False,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise OpenError(f"{self.folder / CONFIG} cannot be used: {said}") from None

    def check_weights(self, config: ModelConfig, text: int) -> None:
        """OpenError when they are not those of a network like this, with a row for each of the tokenizer's `text` ids."""
        names = names_of(config)
        unheard = {name for name in self.weights.names if name.endswith("rotary_emb.inv_freq")}  # early ones hold it
        unheard |= {"lm_head.weight"} if config.tie_word_embeddings else set()
        for name in sorted((self.weights.names - unheard) ^ set(names.values())):
            here = name in self.weights.names
            raise OpenError(f"{self.folder} {'holds' if here else 'lacks'} {name}, which a Llama has{' not' * here}")
        for ours, parameter in build_on_meta(config).named_parameters():
            if ours not in names:
                continue
            shape, expected = self.weights.shape(names[ours]), tuple(parameter.shape)
            if ours in BY_TOKEN:
                expected = (max(text, shape[0]), expected[1])
            if shape != expected:
                raise OpenError(f"{self.folder}: {names[ours]} is {shape}, and its config.json and tokenizer say {expected}")

    def fill(self, config: ModelConfig, text: int, name: str, fresh: Tensor) -> None:
        """Put its numbers into the parameter of this name, if it has it; of what has rows for ids into the first `text`."""
        theirs = names_of(config).get(name)
        if theirs is not None:
            found = self.weights.read(theirs)
            rows = text if name in BY_TOKEN else len(found)
            fresh[:rows].copy_(found[:rows])

    def _rope(self) -> dict[str, Any]:
        """What it says of rotary positions: since transformers 5 in one object, before that in two places."""
        before = {"rope_theta": self.about.get("rope_theta", 10_000.0), **(self.about.get("rope_scaling") or {})}
        return self.about.get("rope_parameters") or before

    def _check(self) -> None:
        rope = self._rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        cannot = {
            "a bias in attention": self.about.get("attention_bias"), "a bias in its MLP": self.about.get("mlp_bias"),
            f"the activation {self.about.get('hidden_act')}": self.about.get("hidden_act", "silu") != "silu",
            f"rotary positions of type {kind}": kind not in ("default", "llama3"),
            "rotary positions on a part of each head": rope.get("partial_rotary_factor", 1) != 1,
            "quantised weights": self.about.get("quantization_config"),
        }  # fmt: skip
        for what, is_there in cannot.items():
            if is_there:
                raise OpenError(f"{self.folder} has {what}, which this network has not")


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    return RopeScaling(
        float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )  # fmt: skip


def names_of(config: ModelConfig) -> dict[str, str]:
    """Each of our parameters that a Llama has too, and its name there."""
    names = {
        f"{ours}.weight": f"{theirs}.weight"
        for ours, theirs in OUTER.items()
        if ours != "head" or not config.tie_word_embeddings
    }
    for n in range(config.layers):
        for ours, theirs in OF_BLOCK.items():
            names[f"transformer.blocks.{n}.{ours}.weight"] = f"model.layers.{n}.{theirs}.weight"
    return names
