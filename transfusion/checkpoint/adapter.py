"""Exports the adapter of a run alone, in the format of `peft`: adapter_model.safetensors and adapter_config.json."""

from pathlib import Path

from safetensors.torch import save as to_safetensors

from transfusion.checkpoint.read import describe_run, find_newest_checkpoint, read_step, verify_checkpoint
from transfusion.checkpoint.start import read_adapter
from transfusion.disk import check_new, is_exported, write_whole
from transfusion.model.lora import is_of_adapter, peft_config
from transfusion.model.transfusion import build_on_meta

PREFIX = "base_model.model."  # of the names in peft's files


def export_adapter(run: Path, out: Path, weights: str = "ema") -> Path:
    """Write the adapter in a run's newest checkpoint into the new folder `out`. `peft.PeftModel.from_pretrained(model, out)`
    adds it to a network with the weights of the run's start.

    weights: "ema", or "raw" for the ones that training updates. ValueError when the folder exists or the run has no adapter.
    """
    check_new(out)
    description = describe_run(run)
    if is_exported(run) or description.run.lora.rank is None:
        raise ValueError(f"{run} has no adapter: it was trained without --lora.rank, or exported with merged weights")
    checkpoint, start = find_newest_checkpoint(run), description.notes["start"]
    verify_checkpoint(checkpoint)
    adapter = read_adapter(description, checkpoint, weights)
    whole = sorted({name.partition(".")[0] for name in adapter if not is_of_adapter(name)})
    config = peft_config(build_on_meta(description.run.model), description.run.lora, modules_to_save=whole or None,
                         base_model_name_or_path=start["name"], inference_mode=True)  # fmt: skip
    out.mkdir(parents=True)
    config.save_pretrained(out)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.items()}
    write_whole(out / "adapter_model.safetensors", to_safetensors(tensors, metadata={"format": "pt"}))
    step = f" at step {start['step']}" if start["step"] is not None else ""
    write_whole(out / "README.md", f"""---
library_name: peft
tags:
- transfusion
- lora
---

# {description.name}

An adapter of rank {description.run.lora.rank} to {start["name"]}{step}, trained for {read_step(checkpoint):,} steps. The \
SHA-256 of the weights that it belongs to is

`{start["sha256"]}`

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "THIS")  # a `Transfusion` network with these weights
```
""".encode())  # fmt: skip
    return out
