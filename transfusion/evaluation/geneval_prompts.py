"""GenEval's prompts: the paper's 553, generated again from its rules and its seed, or a file in the same format."""

import hashlib
import json
from pathlib import Path

import numpy as np

from transfusion.evaluation.geneval import CATEGORIES, Prompt, Requirement

SEED = 43
PROMPTS_PER_CATEGORY = 100  # except the first category; duplicates are removed
PUBLISHED_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of the file

NAMES = (  # the 80 classes of COCO, in its order
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
    """The paper's 553 prompts in their order, checked by the SHA-256 of the published evaluation_metadata.jsonl. ValueError
    if this numpy generates others from the same seed."""
    lines = dict.fromkeys(map(json.dumps, _generate(np.random.default_rng(SEED))))
    text = "".join(line + "\n" for line in lines)
    if hashlib.sha256(text.encode()).hexdigest() != PUBLISHED_SHA256:
        raise ValueError(
            f"numpy {np.__version__} does not generate GenEval's prompts: give its evaluation_metadata.jsonl with --prompts"
        )
    return [_to_prompt(json.loads(line)) for line in lines]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts in the format of GenEval's `evaluation_metadata.jsonl`. ValueError names the file and the wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read GenEval's prompts (evaluation_metadata.jsonl) from {path}: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_to_prompt(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f"{path}, line {number} is not a prompt of GenEval: {line[:80]!r}") from None
    return prompts


def _to_prompt(values: dict) -> Prompt:
    """ValueError, KeyError, ... if the values are not a prompt."""
    if values["tag"] not in CATEGORIES:
        raise ValueError(f"no category {values['tag']!r}")
    include, exclude = (tuple(map(_to_requirement, values.get(key, ()))) for key in ("include", "exclude"))
    if not include or any(it.relative_to is not None and not 0 <= it.relative_to < n for n, it in enumerate(include)):
        raise ValueError("include is empty, or a position refers to no earlier entry of it")
    return Prompt(values["tag"], str(values["prompt"]), include, exclude)


def _to_requirement(values: dict) -> Requirement:
    relation, relative_to = values.get("position", (None, None))
    if relation not in (None, *RELATIONS):
        raise ValueError(f"no relation {relation!r}")
    return Requirement(str(values["class"]), int(values["count"]), values.get("color"), relation, relative_to)


def _generate(rng: np.random.Generator) -> list[dict]:
    """All prompts with duplicates. The order of the calls of `rng` is the published script's."""
    lines = [_to_line("single_object", _a(NAMES[n]), [_object(n)]) for n in rng.choice(80, size=80, replace=False)]
    for _ in range(PROMPTS_PER_CATEGORY):
        a, b = rng.choice(80, size=2, replace=False)
        lines.append(_to_line("two_object", f"{_a(NAMES[a])} and {_a(NAMES[b])}", [_object(a), _object(b)]))
    for _ in range(PROMPTS_PER_CATEGORY):
        n, count = rng.choice(80), int(rng.integers(2, 4, endpoint=True))
        plural = NAMES[n] + ("es" if NAMES[n].endswith("s") else "s")
        exclude = {"exclude": [_object(n, count=count + 1)]}
        lines.append(_to_line("counting", f"{COUNTS[count]} {plural}", [_object(n, count=count)], exclude))
    for _ in range(PROMPTS_PER_CATEGORY):  # colours never apply to class 0, person
        n, colour = rng.choice(79) + 1, COLOURS[rng.choice(10)]
        lines.append(_to_line("colors", f"{_a(colour)} {NAMES[n]}", [_object(n, color=colour)]))
    for _ in range(PROMPTS_PER_CATEGORY):
        a, b = rng.choice(80, size=2, replace=False)
        relation = RELATIONS[rng.choice(4)]
        include = [_object(b), _object(a, position=[relation, 0])]
        lines.append(_to_line("position", f"{_a(NAMES[a])} {relation} {_a(NAMES[b])}", include))
    for _ in range(PROMPTS_PER_CATEGORY):
        a, b = rng.choice(79, size=2, replace=False) + 1
        colour_a, colour_b = (COLOURS[n] for n in rng.choice(10, size=2, replace=False))
        include = [_object(a, color=colour_a), _object(b, color=colour_b)]
        lines.append(_to_line("color_attr", f"{_a(colour_a)} {NAMES[a]} and {_a(colour_b)} {NAMES[b]}", include))
    return lines


def _to_line(tag: str, text: str, include: list[dict], exclude: dict | None = None) -> dict:
    return {"tag": tag, "include": include, **(exclude or {}), "prompt": f"a photo of {text}"}


def _object(number: int, count: int = 1, **more) -> dict:
    return {"class": NAMES[number], "count": count, **more}


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
