"""transfusion export: a run as a folder that others open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from transfusion.cli.screen import parse, say
from transfusion.disk import check_new, check_run, find_folder


@dataclass(frozen=True)
class Export:
    """Write a run into a new folder for others: config, safetensors, tokenizer, codec and a model card. `generate` takes
    that folder like the run's, or owner/name once it lies on Hugging Face's hub; `train --from` begins with its weights."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path
    """The folder that is made."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the last ones."""


def export(arguments: list[str]) -> None:
    """Write the folder, and say what is to be done with it."""
    asked = parse(Export, "export", arguments)
    run = check_run(find_folder(asked.run))
    check_new(asked.out)

    from transfusion.checkpoint.export import export as write

    out = write(run, asked.out, asked.weights)
    say(f"wrote {out}; to publish it, look at its README.md, and: hf upload OWNER/NAME {out}")
