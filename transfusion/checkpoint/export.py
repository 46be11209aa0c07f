"""A run as a folder that others open: config.json, model*.safetensors, generation defaults, tokenizer, codec, model card."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from transfusion.checkpoint.open import GENERATION, OpenedRun, open_checkpoint
from transfusion.checkpoint.save import FORMAT, fsync_and_hash, hash_config, versions
from transfusion.codecs.codec import codec_to_bytes
from transfusion.config import to_json
from transfusion.disk import CONFIG, check_new, open_to_others, read_json, write_json, write_whole
from transfusion.model.transfusion import MODEL_TYPE
from transfusion.model.weights import MAX_SHARD_BYTES, write_weights

MANIFEST = "manifest"  # in results.json: on what machine, with which settings
CARD = "README.md"


def export(run: str | Path, out: Path, weights: str = "ema", shard: int = MAX_SHARD_BYTES) -> Path:
    """Write a run's newest checkpoint in float32 into a new folder, all of it or nothing: `open_run` opens it like the run.

    Its moving average, or with weights="raw" what training goes on from; in files of `shard` bytes at most. Where its data
    and its start lie on this machine is left out. ValueError when the folder is there already.
    """
    check_new(out)
    opened = open_checkpoint(run, weights, "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        open_to_others(aside)
        _write(opened, aside, weights, shard)
        results = Path(run) / "results.json"
        card = write_card(opened, weights, read_json(results) if results.exists() else {})
        write_whole(aside / CARD, card.encode())
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def _write(opened: OpenedRun, folder: Path, weights: str, shard: int) -> None:
    """All but the card."""
    files = write_weights(opened.model.state_dict(), folder, shard)
    encoded, text = codec_to_bytes(opened.codec), opened.tokenizer.to_json().encode()
    values = to_json(replace(opened.run, data=replace(opened.run.data, prepared=())))
    generation, ids = values.pop("generation"), opened.vocabulary.to_json()
    notes = opened.notes
    if "start" in notes:
        notes = notes | {"start": {name: value for name, value in notes["start"].items() if name != "place"}}
    write_whole(folder / "codec.safetensors", encoded)
    write_whole(folder / "tokenizer.json", text)
    write_json(folder / GENERATION, generation)
    write_json(folder / CONFIG, {
        **MODEL_TYPE, "format": FORMAT, "run": values, "vocabulary": ids, "config_sha256": hash_config(values, ids),
        "weights": {"kind": weights, "step": opened.step, "sha256": {path.name: fsync_and_hash(path) for path in files}},
        "codec": {"kind": opened.codec.kind, "sha256": hashlib.sha256(encoded).hexdigest()},
        "tokenizer": {"sha256": hashlib.sha256(text).hexdigest()}, "versions": versions(), "notes": notes,
    })  # fmt: skip


def write_card(opened: OpenedRun, weights: str, results: dict) -> str:
    """The model card: what it is, what it was trained on, how it was measured, how to use it."""
    run, model, vocabulary, codec = opened.run, opened.run.model, opened.vocabulary, opened.codec
    sizes = ", ".join(f"{x * codec.downsampling}x{y * codec.downsampling}" for y, x in vocabulary.boi)
    pictures = "codes" if model.patches == "codes" else f"{model.patches} patches of side {model.patch_size}"
    kept = "their moving average" if weights == "ema" else "the last ones, not their moving average"
    shares = run.data.mixture_weights or (1.0,) * len(run.data.sources)
    sources = ", ".join(f"{name} ({share / sum(shares):.0%} of the positions)"
                        for name, share in zip(run.data.sources, shares, strict=True))  # fmt: skip
    began = f" It began from {opened.notes['start']['name']}." if "start" in opened.notes else ""
    return f"""---
library_name: transfusion
pipeline_tag: any-to-any
tags:
- transfusion
- text-to-image
- image-to-text
---

# {run.name}

A [Transfusion](https://arxiv.org/abs/2408.11039) model: one transformer that reads and writes text, and reads and draws
pictures of {sizes} pixels. {opened.parameters:,} parameters: width {model.width}, {model.layers} layers, {model.heads}
heads, {vocabulary.size:,} ids, pictures as {pictures}. Weights are float32, {kept}.

## What it was trained on

{sources or "Nothing that is named"}: {opened.step:,} steps of {run.data.rows * run.training.accumulate} rows of \
{run.data.seq_len} positions on each process, {run.diffusion.prediction} prediction on the
{run.diffusion.noise_schedule} noise schedule, \
image_weight {run.training.image_weight:g}.{began} `config.json` has every number.

Pictures go through the codec `{codec.kind}`{_source_of(codec)}. `config.json` has the SHA-256 of each file.

## How it was measured

{_measured(results)}

## How to use it

```
transfusion generate THIS "a prompt" --num-images 4 --out out
```

```python
import transfusion

engine = transfusion.open_run("THIS")
(answers,) = engine.generate([transfusion.Request(parts=("a prompt",), num_images=4)])
```

THIS is this folder, or `owner/name` where it lies on the hub. Nothing in it is executed: safetensors and JSON.
"""


def _source_of(codec) -> str:
    """Other people's autoencoders are named, not copied."""
    return f" ({codec.source}, which is not part of this folder)" if hasattr(codec, "source") else ""


def _measured(results: dict) -> str:
    """results.json as a table, one row for each figure, and the settings below it."""
    figures = list(_figures({name: value for name, value in results.items() if name != MANIFEST}))
    if not figures:
        return "It has not been measured: the run had no results.json."
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures)]
    return "\n".join([*table, "", "Measured with", "", "```", json.dumps(results.get(MANIFEST, []), indent=2), "```"])


def _figures(values: dict, before: str = ""):
    for name, value in values.items():
        name = f"{before} {name}".strip().replace("_", " ")
        if isinstance(value, dict):
            yield from _figures(value, name)
        elif isinstance(value, bool | int | str):
            yield name, f"{value:,}" if type(value) is int else value
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
