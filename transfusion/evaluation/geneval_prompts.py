"""GenEval's prompts: the 553 of the paper, drawn again by its rules and its seed, or any file in the same format."""

import hashlib
import json
from pathlib import Path

import numpy as np

from transfusion.evaluation.geneval import CATEGORIES, Prompt, Requirement

SEED = 43
DRAWN = 100  # prompts of each category but the first; those that were drawn before are left out
PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # SHA-256 of evaluation_metadata.jsonl

NAMES = (  # the 80 of COCO, in its order
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}


def published_prompts() -> list[Prompt]:
    """The 553 prompts of the paper, in their order, checked by the SHA-256 of the published file.

    ValueError when this numpy draws others from the same seed.
    """
    text = "".join(line + "\n" for line in dict.fromkeys(map(json.dumps, _draw(np.random.default_rng(SEED)))))
    if hashlib.sha256(text.encode()).hexdigest() != PUBLISHED:
        raise ValueError(
            f"numpy {np.__version__} does not draw GenEval's prompts any more: --prompts takes its evaluation_metadata.jsonl"
        )
    return [_to_prompt(json.loads(line)) for line in text.splitlines()]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts in the format of GenEval's `evaluation_metadata.jsonl`. ValueError names the file and the wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"cannot read GenEval's prompts (evaluation_metadata.jsonl) from {path}: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_to_prompt(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f"{path}, line {number} is not a prompt of GenEval: {line[:80]!r}") from None
    return prompts


def _to_prompt(values: dict) -> Prompt:
    """ValueError and its like when the values are no prompt."""
    if values["tag"] not in CATEGORIES:
        raise ValueError(f"no category {values['tag']!r}")
    wanted, unwanted = (tuple(map(_to_wanted, values.get(key, ()))) for key in ("include", "exclude"))
    if not wanted or any(it.other is not None and not 0 <= it.other < n for n, it in enumerate(wanted)):
        raise ValueError("nothing is wanted, or beside something that is not wanted before it")
    return Prompt(values["tag"], str(values["prompt"]), wanted, unwanted)


def _to_wanted(values: dict) -> Requirement:
    relation, other = values.get("position", (None, None))
    if relation not in (None, *RELATIONS):
        raise ValueError(f"no relation {relation!r}")
    return Requirement(str(values["class"]), int(values["count"]), values.get("color"), relation, other)


def _draw(chance: np.random.Generator) -> list[dict]:
    """All that the paper draws, in its order of categories and of calls for chance: prompts can be in it twice."""
    drawn = [_ask("single_object", _a(NAMES[n]), [_thing(n)]) for n in chance.choice(80, size=80, replace=False)]
    for _ in range(DRAWN):
        a, b = chance.choice(80, size=2, replace=False)
        drawn.append(_ask("two_object", f"{_a(NAMES[a])} and {_a(NAMES[b])}", [_thing(a), _thing(b)]))
    for _ in range(DRAWN):
        n, count = chance.choice(80), int(chance.integers(2, 4, endpoint=True))
        plural = NAMES[n] + ("es" if NAMES[n].endswith("s") else "s")
        too_many = {"exclude": [_thing(n, count=count + 1)]}
        drawn.append(_ask("counting", f"{COUNTS[count]} {plural}", [_thing(n, count=count)], too_many))
    for _ in range(DRAWN):  # from here on, persons have no colour
        n, colour = chance.choice(79) + 1, COLOURS[chance.choice(10)]
        drawn.append(_ask("colors", f"{_a(colour)} {NAMES[n]}", [_thing(n, color=colour)]))
    for _ in range(DRAWN):
        a, b = chance.choice(80, size=2, replace=False)
        relation = RELATIONS[chance.choice(4)]
        wanted = [_thing(b), _thing(a, position=[relation, 0])]
        drawn.append(_ask("position", f"{_a(NAMES[a])} {relation} {_a(NAMES[b])}", wanted))
    for _ in range(DRAWN):
        a, b = chance.choice(79, size=2, replace=False) + 1
        one, other = (COLOURS[n] for n in chance.choice(10, size=2, replace=False))
        wanted = [_thing(a, color=one), _thing(b, color=other)]
        drawn.append(_ask("color_attr", f"{_a(one)} {NAMES[a]} and {_a(other)} {NAMES[b]}", wanted))
    return drawn


def _ask(tag: str, text: str, include: list[dict], exclude: dict | None = None) -> dict:
    return {"tag": tag, "include": include, **(exclude or {}), "prompt": f"a photo of {text}"}


def _thing(number: int, count: int = 1, **more) -> dict:
    return {"class": NAMES[number], "count": count, **more}


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
