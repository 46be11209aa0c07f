"""Writes small random language models to disk in the format of transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from tests.test_model import sizes_of
from transfusion.codecs.text import Tokenizer
from transfusion.config import ModelConfig

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
CONFIG = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, intermediate_size=48)
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # in transformers, by family


def write_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A byte tokenizer of 260 ids with these special tokens after them."""
    tokenizer = HFTokenizer.from_str(Tokenizer.train(["a small house"] * 3, 260).to_json())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(folder / "tokenizer.json")


def write_language_model(
    folder: Path, family: str = "llama", config: ModelConfig = CONFIG, rows: int = 300, shard: str = "5GB",
    dtype: torch.dtype = torch.float32, **changed,
):  # fmt: skip
    """Write a small random model with a tokenizer, with these changes of its config.json (...: without this field), and
    return it. It is written by transformers."""
    import transformers

    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(0)
    values = sizes_of(config) | {"vocab_size": rows, "bos_token_id": 260, "eos_token_id": 261}
    if family == "mistral":
        values["sliding_window"] = None
    name = CLASSES[family]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_("norm" in name, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    edit(folder, **changed)
    return model.eval()


def edit(folder: Path, **changed) -> None:
    """Change fields of config.json; ... removes one."""
    values = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
