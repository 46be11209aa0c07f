"""Configurations with odd values: each must be constructed, or refused with a ValueError of one line.

`python -m tests.configurations [COUNT]` draws 5,000 of them and prints their number by kind of value.
"""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from decimal import Decimal
from typing import Any, get_args

import numpy as np

from transfusion.codecs.config import AutoencoderConfig  # noqa: F401 (makes its classes known to `config_classes`)
from transfusion.config import from_json, to_json
from transfusion.fields import Config, field_types
from transfusion.serving.limits import Limits  # noqa: F401

KINDS: dict[str, tuple] = {
    "negative": (-1, -0.5, -(2**63)), "zero": (0, 0.0, -0.0), "one": (1, 1.0), "small": (2, 8, 0.5, 1e-300),
    "huge": (10**12, 2**63, 10**400, 1e308, -(10**400)), "nan": (math.nan,), "inf": (math.inf, -math.inf),
    "wrong type": ("3", None, True, {}, {"a": 1}, b"1", 2.5, 1j, Decimal(1), object, "x\ny", "y" * 10_000),
    "wrong choice": ("Unet", "", "LINEAR"), "list": ([], [1], [1, 2], [0.5, 0.5], [0.6, 0.4], (0, 1, 2), ["a"], [[1]]),
    "NumPy": (np.int64(3), np.float32(0.5), np.float64("nan"), np.uint64(2**63), np.arange(2), np.array(2), np.True_),
}  # fmt: skip
Case = tuple[str, type[Config], dict[str, Any]]


def config_classes(base: type = Config) -> list[type[Config]]:
    """All classes of configs of the package."""
    found = [cls for child in base.__subclasses__() for cls in (child, *config_classes(child))]
    return [cls for cls in found if cls.__module__.startswith("transfusion.") and ".cli." not in cls.__module__]


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Configurations: a half with one odd value, of any field and kind, a half with several."""
    rng = random.Random(seed)
    classes = config_classes()
    choices = [(kind, cls, f.name, value) for cls in classes for f in fields(cls)
               for kind, values in KINDS.items() for value in values]  # fmt: skip
    rng.shuffle(choices)
    for kind, cls, name, value in choices[: count // 2]:
        yield kind, cls, {**required(cls), name: value}
    for _ in range(count - min(count // 2, len(choices))):
        cls = rng.choice(classes)
        names = rng.sample([f.name for f in fields(cls)], min(len(fields(cls)), rng.randint(2, 4)))
        yield "several", cls, {**required(cls), **{n: rng.choice(rng.choice([*KINDS.values()])) for n in names}}


def required(cls: type[Config]) -> dict[str, str]:
    return {f.name: "a" for f in fields(cls) if f.default is f.default_factory is MISSING}


def construct(cls: type[Config], values: dict[str, Any]) -> Config | str:
    """The config, or the message with which it is refused. Any other exception is a failure, and so is a vague message."""
    try:
        config = cls(**values)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and 10 < len(message) < 400, message
        assert any(name in message for name in values), message
        return message
    for name in dir(cls):
        if isinstance(getattr(cls, name), property):
            getattr(config, name)  # no overflow, no division by 0
    assert is_plain(config), config
    text = json.dumps(to_json(config), allow_nan=False)
    assert from_json(cls, json.loads(text)) == config
    return config


def is_plain(config: Config) -> bool:
    """Whether every field has exactly a type of its annotation: no bool as int, no int as float, nothing of NumPy."""
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            if not is_plain(value):
                return False
        elif not {type(item) for item in (value if isinstance(value, tuple) else (value,))} <= types_in(hint):
            return False
    return True


def types_in(hint: Any) -> set[type]:
    """The types at the leaves of an annotation."""
    arguments = get_args(hint)
    if not arguments:
        return {hint if isinstance(hint, type) else type(hint)}
    return set().union(*(types_in(argument) for argument in arguments if argument is not ...))


def check(case: Case) -> str:
    """Check a case in Python and, where JSON has its values, in JSON: "constructed" or "refused"."""
    _, cls, values = case
    result = construct(cls, values)
    try:
        values = json.loads(json.dumps(values))
    except (TypeError, ValueError):  # no JSON
        return "refused" if isinstance(result, str) else "constructed"
    if not any(isinstance(value, dict) for value in values.values()):  # in JSON, an object is a config in a config
        try:
            read = from_json(cls, values)
        except ValueError as error:
            read = str(error)
        assert type(read) is type(result), (case, read, result)
        assert isinstance(read, str) or asdict(read) == asdict(result), (case, read, result)
    return "refused" if isinstance(result, str) else "constructed"


def count_by_kind(count: int, seed: int = 0) -> Counter:
    """Check configurations; (kind, outcome) -> number."""
    return Counter((case[0], check(case)) for case in cases(count, seed))


if __name__ == "__main__":
    counts = count_by_kind(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
    print(f"{'value':14}{'constructed':>12}{'refused':>10}")
    for kind in (*KINDS, "several", "all"):
        row = (sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == outcome)
               for outcome in ("constructed", "refused"))  # fmt: skip
        print(f"{kind:14}{next(row):>12,}{next(row):>10,}")
