"""Exports a run as a self-contained folder: config, weights, generation defaults, tokenizer, codec and model card."""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from transfusion.chat import list_roles
from transfusion.checkpoint.open import OpenedRun, open_checkpoint
from transfusion.checkpoint.read import GENERATION
from transfusion.checkpoint.save import fsync_and_hash, hash_config, versions
from transfusion.codecs.autoencoder import Autoencoder
from transfusion.codecs.codec import codec_to_bytes
from transfusion.codecs.vq import VQ
from transfusion.config import LoraConfig, to_json
from transfusion.disk import CONFIG, RUN_FORMAT, check_new, open_to_others, read_json, to_name, write_json, write_whole
from transfusion.model.transfusion import MODEL_TYPE
from transfusion.model.weights import MAX_SHARD_BYTES, write_weights

MANIFEST = "manifest"  # the key of results.json with the machine and the settings of the evaluation
CARD, TOKENIZER_CONFIG = "README.md", "tokenizer_config.json"


def export(
    run: str | Path, out: Path, weights: str = "ema", shard: int = MAX_SHARD_BYTES,
    dtype: Literal["float32", "float16"] = "float32", name: str | None = None, license: str | None = None, about: str = "",
) -> Path:  # fmt: skip
    """Write a run's newest checkpoint into the new folder `out`, which `open_run` opens like the run.

    weights: "ema", or "raw" for the ones that training updates; in files of at most `shard` bytes. dtype: of the weights in
    the files, also of the codec's network; opening converts them to float32. name: of the model; default the run's. license:
    as the hub names it, such as cc-by-sa-4.0. about: Markdown for the card, below its first paragraph. Paths of data and
    start on this machine are left out. On failure nothing is left. ValueError when the folder exists, a weight is too large
    for float16, or name or licence are not one word.
    """
    check_new(out)
    if name is not None and to_name(name) != name:
        raise ValueError(f"name must be one word of letters, digits, _, - and ., such as {to_name(name)}, not {name!r}")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license must be as the hub names it, such as apache-2.0 or cc-by-sa-4.0, not {license!r}")
    opened = open_checkpoint(run, weights, "cpu")
    opened.name = name or opened.name
    if dtype == "float16":
        _convert_to_half(opened.model, "the model")
        if isinstance(opened.codec, Autoencoder | VQ):
            _convert_to_half(opened.codec.network, "the codec")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        open_to_others(temporary)
        _write(opened, temporary, weights, shard, dtype)
        results = Path(run) / "results.json"
        card = write_card(opened, weights, dtype, license, about, read_json(results) if results.exists() else {})
        write_whole(temporary / CARD, card.encode())
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def _convert_to_half(network: nn.Module, owner: str) -> None:
    """Round the weights of a network to float16, in place. ValueError when one is too large."""
    for name, value in network.half().state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{name} of {owner} does not fit into float16, whose largest number is 65,504: keep float32")


def _write(opened: OpenedRun, folder: Path, weights: str, shard: int, dtype: str) -> None:
    """Write all files but the model card."""
    files = write_weights(opened.model.state_dict(), folder, shard)
    codec_bytes, tokenizer_bytes = codec_to_bytes(opened.codec), opened.tokenizer.to_json().encode()
    # An adapter is merged into the weights.
    values = to_json(replace(opened.run, data=replace(opened.run.data, prepared=()), lora=LoraConfig()))
    generation, vocabulary = values.pop("generation"), opened.vocabulary.to_json()
    notes = opened.notes
    if "start" in notes:
        notes = notes | {"start": {name: value for name, value in notes["start"].items() if name != "place"}}
    write_whole(folder / "codec.safetensors", codec_bytes)
    write_whole(folder / "tokenizer.json", tokenizer_bytes)
    write_json(folder / TOKENIZER_CONFIG, describe_tokenizer(opened))
    write_json(folder / GENERATION, generation)
    write_json(folder / CONFIG, {
        **MODEL_TYPE, "dtype": dtype, "format": RUN_FORMAT, "name": opened.name, "run": values, "vocabulary": vocabulary,
        "config_sha256": hash_config(values, vocabulary),
        "weights": {"kind": weights, "step": opened.step, "sha256": {path.name: fsync_and_hash(path) for path in files}},
        "codec": {"kind": opened.codec.kind, "sha256": hashlib.sha256(codec_bytes).hexdigest()},
        "tokenizer": {"sha256": hashlib.sha256(tokenizer_bytes).hexdigest()}, "versions": versions(), "notes": notes,
    })  # fmt: skip


def describe_tokenizer(opened: OpenedRun) -> dict:
    """tokenizer_config.json: `transformers.AutoTokenizer` encodes texts as training did, and knows bos, eos and pad. Those
    that tokenizer.json lacks are ids behind its own; `transformers` adds them."""
    vocabulary, config = opened.vocabulary, {}
    for marker in ("bos", "eos", "pad"):
        id_ = getattr(vocabulary, marker)
        config[f"{marker}_token"] = opened.tokenizer.token_name(id_) or f"<|{marker}|>"
        if id_ >= vocabulary.num_text_tokens:
            token = {"content": config[f"{marker}_token"], "special": True}
            token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
            config.setdefault("added_tokens_decoder", {})[str(id_)] = token
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": opened.run.data.seq_len,
        "split_special_tokens": True, "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def write_card(opened: OpenedRun, weights: str, dtype: str, license: str | None, about: str, results: dict) -> str:
    """The model card: architecture, use, limitations, licence, training data and results. Hub metadata is in its header."""
    run, model, vocabulary, codec = opened.run, opened.run.model, opened.vocabulary, opened.codec
    sizes = ", ".join(f"{x * codec.downsampling}x{y * codec.downsampling}" for y, x in vocabulary.boi)
    images = "codes" if model.patches == "codes" else f"{model.patches} patches of side {model.patch_size}"
    images += {"none": "", "full": ", with transformer weights of their own"}.get(
        model.untied, ", with feed-forward weights of their own"
    )
    kind = "the moving average (EMA)" if weights == "ema" else "the raw weights of the last step, without moving average"
    mixture = run.data.mixture_weights or (1.0,) * len(run.data.sources)
    sources = ", ".join(f"{name} ({weight / sum(mixture):.0%} of the positions)"
                        for name, weight in zip(run.data.sources, mixture, strict=True))  # fmt: skip
    about = f"{about.strip()}\n\n" if about.strip() else ""
    merged = "" if run.lora.rank is None else f", with LoRA of rank {run.lora.rank} on {run.lora.on}, which is merged"
    began = f" It began from {opened.notes['start']['name']}{merged}." if "start" in opened.notes else ""
    return f"""---
library_name: transfusion
pipeline_tag: any-to-any
license: {license or "unknown"}
tags:
- transfusion
- text-to-image
- image-to-text
---

# {opened.name}

A [Transfusion](https://arxiv.org/abs/2408.11039) model: one transformer that generates text and images, and takes both as
input. Images have {sizes} pixels. {opened.parameters:,} parameters: width {model.width}, {model.layers} layers,
{model.heads} heads, {vocabulary.size:,} token ids, images as {images}. The weights are {dtype}: {kind}.

{about}## How to use it

```
transfusion generate THIS "a prompt" --num-images 4 --out out
```

```python
import transfusion

engine = transfusion.open_run("THIS")
(answers,) = engine.generate([transfusion.Request(parts=("a prompt",), num_images=4)])
```

THIS is this folder, or `owner/name` on the hub. The folder has only safetensors and JSON; no code in it is executed.

{_write_chat(opened)}## Intended use

Research on models that generate text and images, and teaching. It is not intended for decisions about people, or for
products without an evaluation of its output.

## Limitations

- It follows the distribution of its training data, given below, and does not generalise beyond it. It repeats errors and
  biases of these data, and can reproduce parts of them.
- It was trained for {opened.step:,} steps and has {opened.parameters:,} parameters. Expect the quality of a model of this
  size: wrong text and wrong images are common in small models.
- It has no safety training and no filter, for prompts or for output.
- It supports only the image sizes above. A prompt and its answer together have at most {run.data.seq_len:,} positions.

## Training data

{sources or "The run does not name its data."}{"." if sources else ""} Training: {opened.step:,} steps of \
{run.training.batch_size} rows of {run.data.seq_len} positions, \
{run.diffusion.prediction} prediction on the
{run.diffusion.noise_schedule} noise schedule, image_weight {run.training.image_weight:g}.{began} The recipe is \
`{run.recipe}`; `config.json` has all settings.

Images are encoded by the codec `{codec.kind}`{_source_of(codec)}. `config.json` has the SHA-256 of each file.

## Licence

{_write_licence(opened, license)}

## Results

{_write_results(results)}
"""


def _write_chat(opened: OpenedRun) -> str:
    """The layout of a run that was trained on conversations."""
    if opened.chat is None:
        return ""
    rows = (f"| {role} | `{prefix!r}` | `{suffix!r}` |" for role, prefix, suffix in list_roles(opened.chat))
    return "\n".join([
        "## Chat", "", "Text before and after each message, in training and in `transfusion serve`:", "",
        "| message | before | after |", "|---|---|---|", *rows, "", "",
    ])  # fmt: skip


def _write_licence(opened: OpenedRun, license: str | None) -> str:
    """The licence of the weights, or what it depends on."""
    if license is not None:
        return f"The weights are licensed under `{license}`."
    return (f"No licence is set: it depends on the training data{_and_others(opened)}. The publisher of these weights must "
            "choose one: export again with `--license`, or set `license` in the header of this file.")  # fmt: skip


def _source_of(codec) -> str:
    """A pretrained autoencoder is named, not copied."""
    return f" ({codec.source}, which is not part of this folder)" if hasattr(codec, "source") else ""


def _and_others(opened: OpenedRun) -> str:
    """The other works that the licence depends on."""
    names = [opened.notes["start"]["name"]] if "start" in opened.notes else []
    names += [opened.codec.source] if hasattr(opened.codec, "source") else []
    return "".join(f" and on the licence of {name}" for name in names)


def _write_results(results: dict) -> str:
    """results.json as a table with one row per figure, and the settings of the evaluation below it."""
    rows = list(_flatten({name: value for name, value in results.items() if name != MANIFEST}))
    if not rows:
        return "It has not been measured: the run had no results.json."
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*table, "", "Evaluated with", "", "```", json.dumps(results.get(MANIFEST, []), indent=2), "```"])


def _flatten(values: dict, prefix: str = ""):
    for name, value in values.items():
        name = f"{prefix} {name}".strip().replace("_", " ")
        if isinstance(value, dict):
            yield from _flatten(value, name)
        elif isinstance(value, bool | int | str):
            yield name, f"{value:,}" if type(value) is int else value
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
