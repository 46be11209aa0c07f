"""Writes a small random Llama model to disk in the format of transformers."""

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


def write_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A byte tokenizer of 260 ids with these special tokens after them."""
    tokenizer = HFTokenizer.from_str(Tokenizer.train(["a small house"] * 3, 260).to_json())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(folder / "tokenizer.json")


def write_llama(folder: Path, config: ModelConfig = CONFIG, rows: int = 300, shard: str = "5GB", **changed):
    """Write a small random model with a tokenizer, with these changes of its config.json, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(0)
    markers = {"bos_token_id": 260, "eos_token_id": 261}
    model = LlamaForCausalLM(LlamaConfig(**sizes_of(config) | {"vocab_size": rows} | markers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    values = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return model.eval()
