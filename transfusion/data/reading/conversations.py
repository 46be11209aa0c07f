"""Conversations to turns, as LLaVA, ShareGPT, OpenAI, TRL, LLaMA-Factory, ms-swift and Qwen write them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transfusion.chat import ROLES, Turn
from transfusion.data.raw import Fault, RawImage
from transfusion.data.reading.values import ImageReader, check_text, get_list, get_value, is_empty, short_repr

IMAGE_MARK = "<image>"  # the position of the next of the record's images
MARKS = re.compile(r"<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|(?:Picture \d+: ?)?<img>(?P<path>.*?)</img>")
IMAGE_KINDS = ("image", "image_url", "input_image")  # of parts of a message
IMAGE_FIELDS = ("image", "image_url", "url", "path")  # of such a part; without content it takes the next of the images


def read_conversation(record: dict, values: Sequence[Any], images: ImageReader) -> list[Turn]:
    """{"conversations": [{"from": ..., "value": ...}]}: images are conditions for the model's text, which is in the loss."""
    turns = _read_turns(get_list(record, "conversations"), values, images, has_marks=True)
    return [replace(turn, content=[_as_condition(part) for part in turn.content]) for turn in turns]


def read_messages(record: dict, values: Sequence[Any], images: ImageReader) -> list[Turn]:
    """{"messages": [{"role": ..., "content": ...}]}: the assistant's text and images are in the loss; those of others are
    conditions. A mark without a list of images is text."""
    has_images = bool(values) or any(record.get(name) is not None for name in ("image", "images"))
    return _read_turns(get_list(record, "messages"), values, images, has_images)


def _as_condition(part: str | RawImage) -> str | RawImage:
    return replace(part, loss=False, max_t=0.0) if isinstance(part, RawImage) else part


def _read_turns(messages: list, values: Sequence[Any], images: ImageReader, has_marks: bool) -> list[Turn]:
    """The turns with their images: those in parts, at paths in <img> tags, and the record's `values` at marks and at parts
    without content. Without any such place the values are first in the first turn of the user."""
    turns, num_places = [], 0
    remaining = iter(values)
    for message in messages:
        turn = Turn(_get_role(message), [])
        is_answer = turn.role == "assistant"
        for kind, content in _split_parts(get_value(message, "value", "content"), has_marks):
            if kind == "text":
                turn.content.append(check_text(content, "text"))
                continue
            if content is None:
                num_places += 1
                content = next(remaining, None)
                if content is None:
                    raise Fault("lists of different lengths", f"{num_places} or more places for {len(values)} images")
            turn.content.append(RawImage(images.read(content), is_answer, 1.0 if is_answer else 0.0))
        turns.append(turn)
    if values and not num_places and turns:
        first = next((turn for turn in turns if turn.role == "user"), turns[0])
        first.content[:0] = [RawImage(images.read(value), loss=False, max_t=0.0) for value in remaining]
    elif num_places != len(values):
        raise Fault("lists of different lengths", f"{num_places} times {IMAGE_MARK} for {len(values)} images")
    return turns


def _get_role(message: Any) -> str:
    """The role of a message in the chat layout. Fault when there is no such role."""
    role = get_value(message, "from", "role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Fault("bad segment", f"the role of a message must be one of {', '.join(ROLES)}, not {short_repr(role)}")
    return ROLES[role.lower()]


def _split_parts(content: Any, has_marks: bool) -> Iterator[tuple[str, Any]]:
    """("text", text) and ("image", value or None) of the content of a message."""
    if not isinstance(content, str | list):
        raise Fault("bad segment", f"the content of a message must be text or a list, not {short_repr(content)}")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if not isinstance(part, dict):
            raise Fault("bad segment", f"a part of a message must be an object, not {short_repr(part)}")
        kind = part.get("type") or next((name for name in ("text", *IMAGE_FIELDS) if part.get(name) is not None), None)
        if kind in IMAGE_KINDS or (part.get("type") is None and kind in IMAGE_FIELDS):
            yield "image", next((part[name] for name in IMAGE_FIELDS if not is_empty(part.get(name))), None)
        elif kind in ("text", "input_text", "output_text"):
            yield from _split_marks(check_text(get_value(part, "text"), "text")) if has_marks else [("text", part["text"])]
        else:
            raise Fault("bad segment", f"a part of a message must be text or image_url, not {short_repr(kind)}")


def _split_marks(text: str) -> Iterator[tuple[str, Any]]:
    end, found = 0, list(MARKS.finditer(text))
    for mark in found:
        yield "text", text[end : mark.start()].strip("\n")
        yield "image", mark["path"]
        end = mark.end()
    yield "text", text[end:].strip("\n") if found else text
