"""Rules of the fields of configs: annotations, which are checked where a config is made and printed by --help."""

import math
import operator
from dataclasses import dataclass, fields
from functools import cache
from numbers import Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

INT64 = range(-(2**63), 2**63)  # tensors, JSON readers and NumPy support no larger whole numbers


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have, as an annotation: Annotated[int, Range(at_least=1)]. Without bounds, any finite
    number. As text, its words in errors and help: "at least 1", "between 0 and 1". Numbers above `limit` could only overflow
    or take all memory; help does not mention it."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    limit: float | None = None

    def check(self, value: float, name: str) -> None:
        """ValueError, with the name, for a number outside the range."""
        bounds = self.at_least, self.at_most, self.above, self.below
        compare = operator.ge, operator.le, operator.gt, operator.lt
        if not all(bound is None or holds(value, bound) for holds, bound in zip(compare, bounds, strict=True)):
            raise ValueError(f"{name} must be {self}, not {value}")
        if self.limit is not None and value > self.limit:
            raise ValueError(f"{name} must be at most {self.limit:,}, not {value}")

    def __str__(self) -> str:
        if None not in (self.at_least, self.at_most):
            return f"between {self.at_least:,} and {self.at_most:,}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {bound:,}" for name, bound in words.items() if bound is not None)


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(at_least=0, below=1)]
Epsilon = Annotated[float, Range(1e-20, 1)]  # smaller ones are nearly 0 in float32
Seed = Annotated[int, Range()]
Size = Annotated[int, Range(at_least=1, limit=2**20)]  # of a tensor
VocabSize = Annotated[int, Range(at_least=1, limit=2**24)]
MAX_SECONDS = 10**9  # threads and sockets support no longer waits

TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "a list"}  # in errors


class Config:
    """Base class of all configs, which are frozen dataclasses. Making one checks every field by its annotation and stores
    plain Python values; ValueError in one line. A subclass with rules between fields adds them to __post_init__.

    `part` is the prefix of the fields in errors: "model." in model.width.
    """

    part = ""

    def __init_subclass__(cls, part: str = ""):
        cls.part = part or cls.part

    def __post_init__(self):
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, check_value(hint, getattr(self, name), f"{self.part}{name}"))


@cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind)}


def check_value(hint: Any, value: Any, name: str) -> Any:
    """The value as plain Python: int, float, bool, str, a tuple of them, or an instance of the annotated class. A number of
    NumPy becomes Python's, an int in a float field a float, a list a tuple. ValueError, with the name, for another value."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = check_value(arguments[0], value, name)
        for allowed in arguments[1:]:
            if isinstance(allowed, Range) and value is not None:
                allowed.check(value, name)
        return value
    if origin in (Union, UnionType):  # X | None
        return None if value is None else check_value(arguments[0], value, name)
    if origin is Literal:
        choice = next((choice for choice in arguments if type(choice) is type(value) and choice == value), None)
        if choice is None:
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, not {short_repr(value)}")
        return choice
    if origin is tuple:
        return _check_tuple(arguments, value, name)
    if hint in (int, float):
        return _check_number(hint, value, name)
    if not isinstance(value, hint):
        raise ValueError(f"{name} must be {TYPES.get(hint) or f'a {hint.__name__}'}, not {short_repr(value)}")
    return str(value) if hint is str else value


def _check_tuple(types: tuple, value: Any, name: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, not {short_repr(value)}")
    if types[1:] == (...,):
        types = types[:1] * len(value)
    if len(types) != len(value):
        raise ValueError(f"{name} must be {len(types)} numbers, not {short_repr(value)}")
    return tuple(check_value(hint, item, name) for hint, item in zip(types, value, strict=True))


def _check_number(kind: type, value: Any, name: str) -> int | float:
    """ValueError for a bool, text, a float as a whole number, infinity, nan, and a whole number of more than 64 bits."""
    try:
        if isinstance(value, bool) or not (kind is int or isinstance(value, Real)):
            raise TypeError(value)
        number = operator.index(value) if kind is int else float(value)
    except TypeError:
        raise ValueError(f"{name} must be {TYPES[kind]}, not {short_repr(value)}") from None
    except OverflowError:
        number = math.inf
    if kind is int and number not in INT64:
        raise ValueError(f"{name} must be a whole number between -2**63 and 2**63 - 1")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {number}")
    return number


def short_repr(value: Any) -> str:
    """A value as Python writes it, in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def range_of(hint: Any) -> str:
    """The range of an annotation as text for --help: "at least 1", for a tuple "each at least 1", or nothing."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((str(allowed) for allowed in arguments[1:] if isinstance(allowed, Range)), "")
    inner = range_of(arguments[0]) if origin in (Union, UnionType, tuple) else ""
    return f"each {inner}" if inner and origin is tuple else inner
