"""transfusion export: export a run as a self-contained folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from transfusion.cli.ignored import changed, refuse
from transfusion.cli.options import RunArgument, parse
from transfusion.cli.screen import check_exists, print_status
from transfusion.disk import check_new, check_run, find_folder


@dataclass(frozen=True)
class Export:
    """Export a run into a new folder: config, safetensors, tokenizer, codec and a model card. `generate` and `train --from`
    take that folder, or owner/name once it is on Hugging Face's hub."""

    run: RunArgument
    out: Path
    """The folder to create."""
    name: str | None = None
    """Name of the model, in its card and in the API of `serve`; the run's name if not set."""
    weights: Literal["ema", "raw"] = "ema"
    """Moving average of the weights, or the last weights."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the weights in the files, also of the codec's; float16 takes half the space and rounds the weights."""
    license: str | None = None
    """Licence of the weights, as the hub names it, such as apache-2.0 or cc-by-sa-4.0; unknown if not set."""
    adapter: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write only the adapter of a run with --lora.rank, in the format of peft; without it, the weights with the adapter."""
    about: Path | None = None
    """Markdown file for the model card, below its first paragraph: what the model is for, and the sources of its data."""


def export(arguments: list[str]) -> None:
    """Write the folder and print how to publish it."""
    args = parse(Export, "export", arguments)
    run = check_run(find_folder(args.run))
    check_new(args.out)
    if args.adapter:
        refuse(changed(Export(args.run, args.out), args), [
            (True, "name dtype license about", "with --adapter, which writes files of peft"),
        ])  # fmt: skip
        from transfusion.checkpoint.adapter import export_adapter

        return print_status(f"wrote {export_adapter(run, args.out, args.weights)}")
    check_exists(args.about)
    try:
        about = args.about.read_text(encoding="utf-8") if args.about else ""
    except UnicodeDecodeError:
        raise ValueError(f"--about {args.about} is not a text file in UTF-8") from None

    from transfusion.checkpoint.export import export as export_run

    options = {"dtype": args.dtype, "name": args.name, "license": args.license, "about": about}
    out = export_run(run, args.out, args.weights, **options)
    print_status(f"wrote {out}; to publish it, check its README.md, then: hf upload OWNER/NAME {out}")
