"""Command-line options from dataclasses, read by tyro: help from the fields' comments, one line for each mistake."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructFieldSpec

from transfusion.cli.screen import UsageError, nearest
from transfusion.config import Run
from transfusion.disk import packaged_models
from transfusion.fields import check_value, range_of

ALIASES = {"--data.prepared": ("--data",), "--training.log": ("--log",)}  # shorter names of options

Device = Annotated[str, tyro.conf.arg(help="Device to use: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1 or mps.")]
RUN_HELP = (
    "Folder of a run or of an exported run, owner/name on the hub, or a model in the package: "
    f"{', '.join(packaged_models()) or 'none'}."
)
RunArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=RUN_HELP)]


class Overrides:
    """Base class of a config that is read as a dict of the options in the command; the run decides the others, and flags."""


def parse(cls: type, command: str, arguments: list[str], default: Any = tyro.MISSING_NONPROP) -> Any:
    """The arguments as an instance of a dataclass. UsageError for a mistake in them; --help prints the help and exits."""
    prefixes, flags, required, registry = dict(_prefixes(cls)), [], {}, ConstructorRegistry()
    see_help = f"transfusion {command} --help lists the options"

    @registry.struct_rule
    def read_dataclass(info):
        if (prefix := prefixes.pop(info.type, None)) is None:
            return None  # the next rule is tyro's own
        spec = ConstructorRegistry.get_struct_spec(info)
        prefixes[info.type] = prefix
        overrides = issubclass(info.type, Overrides)
        shown = (f for f in spec.fields if not (overrides and f.type is bool))
        described = [_describe(f, prefix, overrides, hidden=info.type is Run and f.name == "recipe") for f in shown]
        flags.extend(name for flag, _ in described if flag for name in (flag, *ALIASES.get(flag, ())))
        required.update({flag: f for flag, f in described if flag and f.default in (tyro.MISSING, tyro.MISSING_NONPROP)})

        @wraps(info.type, updated=())
        def create(**values):
            options = {name: value for name, value in values.items() if value is not None or not overrides}
            with as_usage_error(info.type, prefix):
                config = info.type(**options)
            return options if overrides else config

        return replace(spec, instantiate=create, fields=tuple(field for _, field in described))

    try:
        config, unknown = tyro.cli(
            cls, default=default, args=arguments, prog=f"transfusion {command}", return_unknown_args=True, registry=registry,
            console_outputs=bool({"-h", "--help"} & {*arguments}),
        )  # fmt: skip
    except SystemExit as exit_:
        if not exit_.code:
            raise
        needed = ", ".join([*required, "a value after each option"])
        raise UsageError(f"a value is missing: {command} needs {needed}; {see_help}") from None
    for word in unknown:
        is_option = word.startswith("-")
        wrong = f"there is no option {word}{nearest(word, {*flags})}" if is_option else f"nothing takes {word!r} here"
        raise UsageError(f"{wrong}; {see_help}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device := getattr(config, "device", "auto")):
        raise UsageError(f"there is no device {device}; there are auto, cpu, cuda, cuda:0, cuda:1 ... and mps")
    return config


@contextmanager
def as_usage_error(cls: type, prefix: str = "--") -> Iterator[None]:
    """A ValueError of this config becomes a UsageError that names the flag: model.kv_heads becomes --model.kv-heads."""
    try:
        yield
    except ValueError as error:
        word, *rest = str(error).split(" ", 1)
        name = word.rpartition(".")[2]
        known = name in {f.name for f in fields(cls)}
        raise UsageError(" ".join([prefix + name.replace("_", "-") if known else word, *rest])) from None


def _split(name: str, hint: Any) -> tuple[Any, list, str]:
    """The type of a field, its annotations, and its name on the command line."""
    inner, annotations = (get_args(hint)[0], [*hint.__metadata__]) if get_origin(hint) is Annotated else (hint, [])
    renamed = [a.name for a in annotations if getattr(a, "name", None) is not None]
    return inner, annotations, renamed[0] if renamed else name.replace("_", "-")


def _prefixes(cls: type, prefix: str = "--") -> Iterator[tuple[type, str]]:
    """The prefix of the flags of a dataclass, and of those of the dataclasses in it."""
    yield cls, prefix
    for inner, _, name in (_split(name, hint) for name, hint in get_type_hints(cls, include_extras=True).items()):
        if is_dataclass(inner):
            yield from _prefixes(inner, f"{prefix}{name}." if name else prefix)


def _describe(field: StructFieldSpec, prefix: str, override: bool, hidden: bool) -> tuple[str, StructFieldSpec]:
    """The flag of a field, and the field with our help and reader. Dataclasses and hidden fields have no flag."""
    hint, annotations, name = _split(field.name, field.type)
    if is_dataclass(hint) or hidden:
        return "", field if is_dataclass(hint) else replace(field, type=tyro.conf.Suppress[field.type])
    positional = tyro.conf.Positional in annotations
    flag = field.name.upper() if positional else prefix + name
    optional = get_origin(hint) in (Union, UnionType)
    reader = _reader(field.type, get_args(hint)[0] if optional else hint, flag, optional or override)
    allowed = range_of(field.type)
    unset = "the run's" if override else "not set" if field.default in (None, ()) else None

    def describe_default(default: str) -> str:
        return f"({allowed}{'; ' if allowed else ''}default: {unset or default})"

    required = field.default in (tyro.MISSING, tyro.MISSING_NONPROP)
    argument = tyro.conf.arg(
        help_behavior_hint=None if required else describe_default, aliases=ALIASES.get(flag),
        metavar=None if not positional else flag if reader.nargs == 1 else f"{flag} ...",
    )  # fmt: skip
    is_tyros = hint is bool or tyro.conf.UseAppendAction in annotations  # tyro itself reads flags and repeated options
    hint, readers = hint | None if override else hint, [] if is_tyros else [reader]
    annotated = Annotated[(hint, argument, *annotations, *readers)]
    default, text = None if override else field.default, field.helptext
    return flag, replace(field, type=annotated, default=default, helptext=lambda: " ".join((text() or "").split()))


def _reader(rule: Any, hint: Any, flag: str, optional: bool) -> PrimitiveConstructorSpec:
    """tyro's reader of a type, with plain metavar and errors. The value is checked by `rule`, the field's annotation. A
    dataclass is read as one word for each of its fields."""
    is_config = is_dataclass(hint)
    types = tuple[tuple(get_type_hints(hint).values())] if is_config else hint
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(types, set()))
    kind = "number" if "FLOAT" in spec.metavar else "whole number"
    several = f"{kind}s" if spec.nargs == "*" else f"{spec.nargs} {kind}s"
    needed = f"one of {', '.join(spec.choices)}" if spec.choices else f"a {kind}" if spec.nargs == 1 else several
    names = " ".join(f.name.partition("_")[0].upper() for f in fields(hint)) if is_config else ""

    def read(words: list[str]) -> Any:
        if optional and words == ["None"]:
            return None
        try:
            if (spec.choices and not {*words} <= {*spec.choices}) or spec.nargs not in ("*", len(words)):
                raise ValueError(words)
            value = spec.instance_from_str(words)
        except ValueError:
            raise UsageError(f"{flag} {' '.join(words)}: must be {needed}") from None
        try:
            return hint(*value) if is_config else check_value(rule, value, flag)
        except ValueError as error:
            raise UsageError(f"{flag} {' '.join(words)}: {error}" if is_config else error) from None

    def write(value: Any) -> list[str]:
        values = astuple(value) if is_dataclass(value) else value if isinstance(value, tuple) else (value,)
        return [str(value).replace("\n", "\\n") for value in values]

    return replace(
        spec, nargs="*" if is_config else spec.nargs, metavar=names or re.sub(r"\[(\S+) \[.*\]\]", r"\1 ...", spec.metavar),
        instance_from_str=read, str_from_instance=write, is_instance=lambda value: True, choices=None,
    )  # fmt: skip
