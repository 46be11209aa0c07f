"""Conversations to turns, as LLaVA, ShareGPT, OpenAI, TRL, LLaMA-Factory, ms-swift and Qwen write them.

The content of a message is a text or a list of parts. An image is the content of a part, a path in an <img> tag, a text that
is nothing but a picture in base64, or one of the record's list of images. The places of the list's images are marks in the
texts, and parts without content.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from transfusion.chat import ROLES, Turn
from transfusion.data.raw import Fault, RawImage
from transfusion.data.reading.columns import MORE_OF_EXCHANGES, find_exchange
from transfusion.data.reading.values import (
    ImageReader,
    check_text,
    get_list,
    get_value,
    is_empty,
    is_inline_picture,
    nonempty_text,
    short_repr,
)  # fmt: skip

TAG = re.compile(r"(?:Picture \d+: ?)?<img>([^<>\n]+)</img>")  # Qwen-VL
MARK = re.compile("|".join((
    r"<image(?:[ _-]?([0-9]{1,4}))?>",  # LLaVA and most others; MMMU: <image 1>; MiniCPM-V: <image_00>
    r"(?:<img>)?<\|image(?:_([0-9]{1,4}))?\|>(?:</img>)?",  # Llama 3.2; Phi-3: <|image_1|>; OmniGen: in <img>
    r"<image[_-]placeholder>",  # DeepSeek-VL
    r"(?:<img>)?<ImageHere>(?:</img>)?",  # MiniGPT-4, InternLM-XComposer
    r"(?:Picture \d+: ?)?<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>",  # Qwen2-VL
    r"<start_of_image>",  # Gemma 3
)), re.IGNORECASE)  # fmt: skip
TEXT_KINDS = ("text", "input_text", "output_text")  # of parts of a message
IMAGE_KINDS = ("image", "image_url", "input_image")
IMAGE_FIELDS = ("image", "image_url", "url", "path", "source", "inline_data", "inlineData")  # the content of such a part
MEDIA = re.compile(r"(input_)?(video|audio)(s|_url|_path)?")  # kinds of parts, and columns of records; not supported
MEDIA_MARK = re.compile(r"""
    \A\s*<(?:video|audio)> | \n[ \t]*<(?:video|audio)>\s*\Z  # elsewhere in a text it is the element of HTML
    | <\|(?:video|audio)(?:_\d+|_pad)?\|> | <(?:video|audio)>\S{1,1000}\.\w{2,4}</(?:video|audio)>
""", re.VERBOSE | re.IGNORECASE)  # fmt: skip

READ_KEYS = {"role", "from", "content", "value", "parts", "weight", "loss"}  # of a message; Gemini's content is parts

# a text, the value of an image, or the place of one of the record's images: the number in its mark, or None
Part = tuple[Literal["text", "image", "place"], Any]


def read_conversation(record: dict, values: Sequence[Any], images: ImageReader) -> list[Turn]:
    """{"conversations": [{"from": ..., "value": ...}]}: images are conditions for the model's text, which is in the loss."""
    turns = _read_turns(record, "conversations", values, images, has_list=True)
    return [replace(turn, content=[_as_condition(part) for part in turn.content]) for turn in turns]


def read_messages(record: dict, values: Sequence[Any], images: ImageReader) -> list[Turn]:
    """{"messages": [{"role": ..., "content": ...}]}: the assistant's text and images are in the loss; those of others are
    conditions. A mark without an image is text."""
    has_list = bool(values) or any(record.get(name) is not None for name in ("image", "images"))
    return _read_turns(record, "messages", values, images, has_list)


def place_at_marks(text: str, values: Sequence[Any], field: str) -> list[Part] | None:
    """The text of a field with its images at its marks; None without marks. Fault unless each mark has an image and each
    image a mark, and when there are only marks."""
    parts = list(_split_text(text, MARK))
    places = _list_places([parts])
    if not places:
        return None
    indices = iter(_order_images(places, len(values)))
    parts = [("image", values[next(indices)]) if kind == "place" else (kind, value) for kind, value in parts]
    parts = [(kind, value) for kind, value in parts if kind == "image" or value.strip()]
    if all(kind == "image" for kind, _ in parts):
        raise Fault(f"empty {field}", f"its {field} has marks of images, but no words")
    return parts


def unread_keys(record: dict) -> Iterator[str]:
    """The keys of messages with values that are not read, such as tool_calls."""
    for name in ("conversations", "messages"):
        messages = record[name] if isinstance(record.get(name), list) else ()
        for message in (message for message in messages if isinstance(message, dict)):
            yield from (f"{name}.{key}" for key in message if key not in READ_KEYS and not is_empty(message[key]))


def _as_condition(part: str | RawImage) -> str | RawImage:
    return replace(part, loss=False, max_t=0.0) if isinstance(part, RawImage) else part


def _read_turns(record: dict, column: str, values: Sequence[Any], images: ImageReader, has_list: bool) -> list[Turn]:
    """The turns with their images. `values`: the record's list of images; `has_list`: marks are places of these."""
    if media := next((name for name in record if MEDIA.fullmatch(name) and not is_empty(record[name])), None):
        raise _media_fault(f"its column {media}")
    messages, system = _list_messages(record, column), record.get("system")  # a column of LLaMA-Factory and Anthropic
    if not is_empty(system) and system not in [_get_content(message) for message in messages[:1]]:
        messages = [{"role": "system", "content": system}, *messages]
    roles = [_get_role(message) for message in messages]
    contents = [list(_split_parts(_get_content(message))) for message in messages]
    turns = [Turn(role, [], _has_loss(message)) for role, message in zip(roles, messages, strict=True)]
    for turn, content in zip(turns, _place_images(contents, roles, values, has_list), strict=True):
        is_answer = turn.role == "assistant"
        has_loss = is_answer and turn.has_loss
        turn.content.extend(
            value if kind == "text" else RawImage(images.read(value), has_loss, 1.0 if has_loss else 0.0)
            for kind, value in content
        )
        if is_answer and not any(isinstance(part, RawImage) or part.strip() for part in turn.content):
            raise Fault("empty answer", "a message of the assistant has neither text nor an image")
    if turns and "assistant" not in roles:
        raise Fault("empty answer", "it has no message of the assistant")
    return turns


def _list_messages(record: dict, column: str) -> list:
    """The messages of a record: its list, or its question and answer, behind those of its history."""
    if column != "messages" or "messages" in record:
        return get_list(record, column)
    if (exchange := find_exchange(record)) is None:
        return get_list(record, column)
    question, answer = exchange
    asked = [nonempty_text(record[question] or "", "question")]
    answer = nonempty_text(record[answer] or "", "answer")
    *more, history = (record.get(name) for name in MORE_OF_EXCHANGES)
    if not is_empty(history) and not (isinstance(history, list) and all(map(_is_exchange, history))):
        raise Fault("bad segment", f"its history must be a list of [question, answer], not {short_repr(history)}")
    asked += [check_text(text, "input") for text in more if not is_empty(text)]
    texts = [*(text for turn in history or () for text in turn), "\n".join(asked), answer]
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2


def _get_content(message: Any) -> Any:
    return get_value(message, "content", "value", "parts")


def _get_role(message: Any) -> str:
    """The role of a message in the chat layout. Fault when there is no such role."""
    role = get_value(message, "role", "from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Fault("bad segment", f"the role of a message must be one of {', '.join(ROLES)}, not {short_repr(role)}")
    return ROLES[role.lower()]


def _has_loss(message: Any) -> bool:
    """Whether an answer is learnt: OpenAI's weight and ms-swift's loss may exclude it."""
    return all(message.get(name) is None or bool(message[name]) for name in ("weight", "loss"))


def _split_parts(content: Any) -> Iterator[Part]:
    """The parts of the content of a message, with tags and marks in its texts."""
    if not isinstance(content, str | list):
        raise Fault("bad segment", f"the content of a message must be text or a list, not {short_repr(content)}")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if not isinstance(part, dict):
            raise Fault("bad segment", f"a part of a message must be an object, not {short_repr(part)}")
        kind = part.get("type") or next((name for name in ("text", *IMAGE_FIELDS) if part.get(name) is not None), None)
        if kind in IMAGE_KINDS or (part.get("type") is None and kind in IMAGE_FIELDS):
            value = next((part[name] for name in IMAGE_FIELDS if not is_empty(part.get(name))), None)
            yield ("place", None) if value is None else ("image", value)
        elif kind in TEXT_KINDS:
            text = check_text(get_value(part, "text"), "text")
            if mark := MEDIA_MARK.search(text):
                raise _media_fault(f"the mark {short_repr(mark[0].strip())}")
            yield ("image", text.strip()) if is_inline_picture(text.strip()) else ("text", text)
        elif isinstance(kind, str) and MEDIA.fullmatch(kind):
            raise _media_fault(f"a part of the kind {kind}")
        else:
            raise Fault("bad segment", f"a part of a message must be text or image_url, not {short_repr(kind)}")


def _media_fault(place: str) -> Fault:
    return Fault("unsupported media", f"it has a video or audio ({place}); only text and images are supported")


def _place_images(
    contents: Sequence[list[Part]], roles: Sequence[str], values: Sequence[Any], has_list: bool
) -> list[list[Part]]:
    """The contents with an image of the list at each place. Fault unless each place has an image and each image a place.
    Without any image or place in the messages the list's images are first in the first message of the user.

    The list may repeat the images of parts. In a message with as many parts as marks, the marks are the places of the
    parts, unless the list has an image for each of both.
    """
    names = {_get_name(value) for content in contents for kind, value in content if kind == "image"} - {None}
    values = [value for value in values if _get_name(value) not in names]
    placed = [_find_marks(content, has_list) for content in contents]
    if not has_list or len(_list_places(placed)) != len(values):
        placed = [_move_to_marks(old) or new for old, new in zip(contents, placed, strict=True)]
    if placed and values and all(kind == "text" for content in placed for kind, _ in content):
        first = roles.index("user") if "user" in roles else 0
        placed[first][:0] = [("place", None)] * len(values)
    indices = iter(_order_images(_list_places(placed), len(values)))
    return [[("image", values[next(indices)]) if kind == "place" else (kind, value) for kind, value in content]
            for content in placed]  # fmt: skip


def _find_marks(content: Sequence[Part], has_marks: bool) -> list[Part]:
    """The content with the images of tags, and if `has_marks` with a place for each mark."""
    found = [part for kind, value in content for part in (_split_text(value, TAG) if kind == "text" else [(kind, value)])]
    if not has_marks:
        return found
    return [part for kind, value in found for part in (_split_text(value, MARK) if kind == "text" else [(kind, value)])]


def _split_text(text: str, pattern: re.Pattern) -> Iterator[Part]:
    """A text with an image for each tag, or a place for each mark; without line breaks beside them."""
    end, matches = 0, list(pattern.finditer(text))
    for match in matches:
        yield "text", text[end : match.start()].strip("\n")
        yield "image" if pattern is TAG else "place", match[match.lastindex or 0] if match.lastindex else None
        end = match.end()
    yield "text", text[end:].strip("\n") if matches else text


def _move_to_marks(content: Sequence[Part]) -> list[Part] | None:
    """The content with its images at its marks, if it has as many; otherwise None."""
    parts = [part for part in content if part[0] != "text"]
    texts = _find_marks([part for part in content if part[0] == "text"], has_marks=True)
    places = _list_places([texts])
    if not parts or len(parts) != len(places):
        return None
    indices = iter(_order_images(places, len(parts)))
    return [parts[next(indices)] if kind == "place" else (kind, value) for kind, value in texts]


def _list_places(contents: Sequence[Sequence[Part]]) -> list[str | None]:
    return [value for content in contents for kind, value in content if kind == "place"]


def _order_images(places: Sequence[str | None], count: int) -> list[int]:
    """The index of the image at each place. A number counts from 1, or from 0 if one of them is 0; a place without a number
    has the next of the images that no number names. Fault unless all of `count` images have a place."""
    numbers = [None if place is None else int(place) for place in places]
    first = min([1, *(number for number in numbers if number is not None)])
    unnumbered = iter(n for n in range(count) if n + first not in numbers)
    indices = [next(unnumbered, count) if number is None else number - first for number in numbers]
    if {*indices} != {*range(count)}:
        named = ", ".join(str(number) for number in numbers if number is not None)
        raise Fault("lists of different lengths", f"{len(places)} places{f' (numbers {named})' * bool(named)} for {count} "
                    "images: each mark, or image part without content, is the place of one image")  # fmt: skip
    return indices


def _get_name(value: Any) -> str | None:
    """The path or address of an image, if it has one."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "url") if value.get(key) is not None), None)
    return value if isinstance(value, str) else None
