"""The run that a command names, and its settings: from a file, and from the options, which override the file."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from transfusion.cli.options import parse
from transfusion.cli.screen import UsageError, nearest
from transfusion.config import Run, from_json, to_json
from transfusion.disk import RUN, OpenError, check_run, check_run_format, is_exported, read_json
from transfusion.runs import NAMES, named_run

DECIDED = "vocab_size", "latent_channels"  # fields of the model that training takes from its data
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # in YAML 1.1 a text without a point or without a sign


@dataclass(frozen=True)
class ChosenRun:
    """The run of a command's first word, and the words after it."""

    run: Run
    arguments: list[str]
    folder: Path | None = None  # if the word is a run's folder
    is_recipe: bool = False  # one of `runs.py`, whose model has not been fitted to data


def read_run(command: str, arguments: list[str]) -> ChosenRun:
    """The run of the first argument: a recipe, folder or file. Without it, the recipe that the file of --config names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = fill(", ".join(NAMES), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        print(f"usage: transfusion {command} RUN [options]\n\n"
              f"RUN is the folder of a run, the path of a run.json, or a recipe:\n{names}\n\n"
              f"transfusion {command} RUN --help lists every option with the run's own defaults.")  # fmt: skip
        sys.exit(0 if arguments else 2)
    word, rest = arguments[0], arguments[1:]
    if (file := config_file(arguments)) is not None and word.startswith("-"):
        word, rest = read_settings(file).get("recipe"), arguments
        if word not in NAMES:
            raise UsageError(f"{file} names no recipe: give RUN before --config, or in the file recipe: {NAMES[0]}")
    if word in NAMES:
        return ChosenRun(named_run(word), rest, is_recipe=True)
    path = Path(word)
    if path.is_dir():
        if is_exported(check_run(path)):
            raise UsageError(f"{path} is an exported run: give it with --from, after a recipe")
        return ChosenRun(_from_settings(path / RUN, read_settings(path / RUN)), rest, folder=path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UsageError(f"there is no recipe or folder {word!r}{nearest(word, NAMES)}; recipes are {', '.join(NAMES)}")
    return ChosenRun(_from_settings(path, read_settings(path)), rest)


def parse_run(
    cls: type, command: str, run: Run, arguments: list[str], keeps_sources: bool = False, **defaults: Any
) -> tuple[Run, Any]:
    """The run with the settings of the file of --config and of the options, and all options; `defaults` are those of options
    outside the run. Given data replace the run's sources, unless it `keeps_sources`: the same data in another place."""
    if (file := config_file(arguments)) is not None:
        run = _with_settings(run, file, keeps_sources)
    if not keeps_sources and option_names(arguments) & {"--data", "--data.prepared", "--data.sources"}:
        run = _without_sources(run)
    args = parse(cls, command, arguments, cls(run, **defaults))
    return args.run, args


def option_names(arguments: list[str]) -> set[str]:
    """The options in a command: "--data" also of --data=DIR, and "--log-every" also of --log_every."""
    return {word.partition("=")[0].replace("_", "-") for word in arguments}


def config_file(arguments: list[str]) -> Path | None:
    """The file of --config, if the command has it."""
    for number, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or arguments[number + 1 :]):
            return Path(value if equals else arguments[number + 1])
    return None


def _with_settings(run: Run, file: Path, keeps_sources: bool) -> Run:
    """The run with the settings of a file."""
    values = read_settings(file)
    if file.name == RUN and isinstance(values.get("model"), dict):
        values["model"] = _without_decided(values["model"])
    data = values.get("data")
    if not keeps_sources and isinstance(data, dict) and {"prepared", "sources"} & data.keys():
        run = _without_sources(run)
    return _from_settings(file, _merge(to_json(run), values))


def _from_settings(file: Path, values: dict) -> Run:
    """The run with all these settings of a file. UsageError names the file and the field."""
    try:
        return from_json(Run, values)
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from None


def _without_sources(run: Run) -> Run:
    return replace(run, data=replace(run.data, sources=(), mixture_weights=()))


def _merge(values: dict, others: dict) -> dict:
    """The values with those of `others`, in every section."""
    merged = {**values, **others}
    for name in values.keys() & others.keys():
        if isinstance(values[name], dict) and isinstance(others[name], dict):
            merged[name] = _merge(values[name], others[name])
    return merged


def read_settings(path: Path) -> dict:
    """The settings in a YAML or JSON file; of a run.json its run. OpenError when it has none, or is of another format."""
    if path.suffix not in (".yaml", ".yml"):
        values = read_json(path)
        if not isinstance(values.get("run"), dict):
            return values
        check_run_format(path.parent, values)
        return values["run"]
    import yaml

    try:
        values = _with_numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OpenError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise OpenError(f"{path} does not hold settings, such as `training: {{steps: 300}}`")
    return values


def _with_numbers(value: Any) -> Any:
    """The value with 1e-3 as a number also where YAML reads a text."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def to_yaml(run: Run) -> str:
    """All settings as YAML for --config, without those that training takes from its data."""
    import yaml

    values = to_json(run)
    values["model"] = _without_decided(values["model"])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _without_decided(model: dict) -> dict:
    return {name: value for name, value in model.items() if name not in DECIDED}
