"""The command that trains a run with equal settings."""

import shlex
from collections.abc import Iterator
from dataclasses import astuple, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

from transfusion.checkpoint.start import fixed_model_fields
from transfusion.config import Run
from transfusion.data.sources import name_sources
from transfusion.disk import RUN
from transfusion.fields import Config, field_types
from transfusion.runs import NAMES, named_run

STARTS = {"run": "--from", "llama": "--init-from"}


def training_command(run: Run, folder: Path, start: dict | None = None) -> str:
    """`transfusion train` with the recipe of the run and the options that differ from it; for a run of no known recipe, with
    its run.json. Its output is the run's own folder, where it resumes the run. `start`: the note of run.json about
    other initial weights. Settings that data and start decide are left out."""
    start_words = [STARTS[start["kind"]], start["place"]] if start else []
    if run.recipe not in NAMES:
        return shlex.join(["transfusion", "train", str(folder / RUN), *start_words, "--out", str(folder)])
    default = named_run(run.recipe)
    if run.data.prepared or run.data.sources != default.data.sources:  # these options replace the run's own sources
        default = replace(default, data=replace(default.data, sources=(), mixture_weights=()))
    if run.data.prepared and name_sources(replace(run.data, sources=())).sources == run.data.sources:
        default = replace(default, data=replace(default.data, sources=run.data.sources))  # all of the folders
    decided = {field: getattr(default.model, field) for field in fixed_model_fields(start)}
    run = replace(run, model=replace(run.model, **decided))
    options = _options(default, run, "--")
    return shlex.join(["transfusion", "train", run.recipe, *options, *start_words, "--out", str(folder)])


def _options(before: Config, after: Config, prefix: str) -> Iterator[str]:
    """The words of the options for all fields that differ."""
    for f in fields(after):
        old, new, flag = getattr(before, f.name), getattr(after, f.name), f.name.replace("_", "-")
        if new == old:
            continue
        if is_dataclass(old) and is_dataclass(new) and type(None) not in get_args(field_types(type(after))[f.name]):
            yield from _options(old, new, f"{prefix}{flag}.")
        elif field_types(type(after))[f.name] is bool:
            yield prefix + flag if new else f"{prefix}no-{flag}"
        else:
            yield "--data" if prefix + flag == "--data.prepared" else prefix + flag
            yield from map(str, astuple(new) if is_dataclass(new) else new if isinstance(new, tuple) else (new,))
