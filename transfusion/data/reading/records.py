"""Records to documents: common column names, and the nine forms of records with text and images.

A record is a dict, from any kind of file. `detect_form` finds its form from its columns, `to_document` reads it.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText

Form = Literal["document", "pair", "text", "image", "conversation", "messages", "interleaved", "mmc4", "editing"]
FORMS: tuple[str, ...] = get_args(Form)
COLUMN_NAMES = {  # our name -> names in data sets; the first one present is read
    "image": ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "gif", "bmp", "image_path", "image_bytes",
              "file_name", "filename", "path", "url"),
    "caption": ("caption", "text", "txt", "prompt", "description", "alt", "title", "label"),
    "text": ("text", "txt", "content", "body", "caption"),
    "id": ("id",),
    "source": ("source", "source_image", "source_img", "input_image", "input_images", "original_image", "raw_image"),
    "instruction": ("instruction", "edit_prompt", "edit", "prompt", "caption"),
    "target": ("target", "target_image", "target_img", "output_image", "edited_image", "out_image"),
}  # fmt: skip
AMBIGUOUS_NAMES = ("path", "url", "file_name", "filename")  # images only if the value has an image suffix
IMAGE_MARK = "<image>"  # the position of an image in a conversation


class ImageReader(Protocol):
    """Reads the images of records."""

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of bytes, {"bytes", "path"}, a path or a URL. Fault when it cannot be read."""
        ...


def detect_form(record: dict) -> Form:
    """The form of a record. Fault when its columns fit no form."""

    def has(*names: str) -> bool:
        return all(_first_value(record, COLUMN_NAMES[name]) is not None for name in names)

    if isinstance(record.get("segments"), list):
        return "document"
    if isinstance(record.get("conversations"), list):
        return "conversation"
    if isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(record.get("text_list"), list):
        return "mmc4"
    if isinstance(record.get("images"), list) and isinstance(record.get("texts"), list):
        return "interleaved"
    if has("source", "instruction", "target"):
        return "editing"
    if has("image"):
        return "pair" if has("caption") else "image"
    if has("text"):
        return "text"
    raise Fault("missing column", f"it has neither a text nor an image column, only: {_list_columns(record)}")


def to_document(form: Form, record: dict, images: ImageReader) -> RawDocument:
    """The document of a record. Fault when a part of it is missing, empty, or cannot be read."""
    pairs = False
    match form:
        case "document":
            segments, pairs = _read_segments(record, images), record.get("pairs") or False
            if not isinstance(pairs, bool):
                raise Fault("bad segment", f"pairs must be true or false, not {_short_repr(pairs)}")
        case "pair":
            segments, pairs = _read_pair(record, images), True
        case "text":
            segments = [RawText(_nonempty_text(_get_field(record, "text"), "text"))]
        case "image":
            segments = [RawImage(images.read(_get_field(record, "image")))]
        case "conversation":
            segments = _read_conversation(record, images)
        case "messages":
            segments = _read_messages(record, images)
        case "interleaved":
            segments = _read_interleaved(record, images)
        case "mmc4":
            segments = _read_mmc4(record, images)
        case "editing":
            segments = _read_editing(record, images)
    if not any(isinstance(part, RawImage) or part.text.strip() for part in segments):
        raise Fault("empty document", "it has neither text nor an image")
    if pairs:
        _check_pairs(segments)
    name = _first_value(record, COLUMN_NAMES["id"])
    name = "" if name is None else _check_text(str(name), "id")
    if form == "conversation":  # LLaVA's ids name the image, so they are not unique
        return RawDocument(tuple(segments))
    return RawDocument(tuple(segments), pairs=pairs, name=name)


def used_columns(form: Form, columns: Collection[str]) -> list[str]:
    """Those of the columns that a form reads."""
    match form:
        case "pair":
            fields = ("image", "caption", "id")
        case "text" | "image":
            fields = (form, "id")
        case "editing":
            fields = ("source", "instruction", "target", "id")
        case "conversation":
            return [name for name in ("conversations", *COLUMN_NAMES["image"], "images") if name in columns]
        case _:
            names = ("segments", "pairs", "messages", "texts", "images", "text_list", "image_info", "id")
            return [name for name in names if name in columns]
    present = (next((name for name in COLUMN_NAMES[field] if name in columns), None) for field in fields)
    return [name for name in present if name is not None]


def rename_columns(record: dict, columns: dict[str, str]) -> dict:
    """The record with columns renamed as {our name: column name}; an empty column name removes a column."""
    replaced = {name for ours in columns for name in COLUMN_NAMES.get(ours, (ours,))}
    others = {key: value for key, value in record.items() if key not in replaced}
    return {**others, **{ours: record[theirs] for ours, theirs in columns.items() if theirs in record}}


# The forms


def _read_segments(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """This package's form: {"segments": [{"text": ...}, {"image": ..., "loss": false, "max_t": 0.5}], "pairs": false}."""
    segments = []
    for number, part in enumerate(_get_list(record, "segments"), 1):
        if isinstance(part, dict):
            part = {key: value for key, value in part.items() if value is not None}  # in tables every column is present
        if not isinstance(part, dict) or ("text" in part) == ("image" in part):
            raise Fault("bad segment", f"segment {number} must have either text or image, not {_short_repr(part)}")
        loss, max_t = part.get("loss", True), part.get("max_t", 1.0)
        if not isinstance(loss, bool):
            raise Fault("bad segment", f"segment {number}: loss must be true or false, not {_short_repr(loss)}")
        if isinstance(max_t, bool) or not isinstance(max_t, int | float) or not 0 <= max_t <= 1:
            raise Fault("bad segment", f"segment {number}: max_t must be between 0 and 1, not {_short_repr(max_t)}")
        if "text" in part:
            segments.append(RawText(_nonempty_text(part["text"], "text"), loss))
        else:
            segments.append(RawImage(images.read(part["image"]), loss, float(max_t)))
    return segments


def _read_pair(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    caption = _nonempty_text(_get_field(record, "caption"), "caption")
    return [RawText(caption), RawImage(images.read(_get_field(record, "image")))]


def _read_conversation(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """LLaVA: the model's turns are in the loss, the human's are not; images are conditions at the positions of marks."""
    value = _first_value(record, (*COLUMN_NAMES["image"], "images"))
    values = [] if value is None else list(value) if isinstance(value, list) else [value]
    turns = _get_list(record, "conversations")
    texts = [_check_text(_get(turn, "value"), "text") for turn in turns]
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    segments: list[RawText | RawImage] = []
    if values and not marks:  # without marks the images are first
        segments += [RawImage(images.read(value), loss=False, max_t=0.0) for value in values]
    elif marks != len(values):
        raise Fault("lists of different lengths", f"{marks} times {IMAGE_MARK} for {len(values)} images")
    remaining = iter(values)
    for turn, text in zip(turns, texts, strict=True):
        parts = text.split(IMAGE_MARK)
        loss = str(_get(turn, "from")).lower() in ("gpt", "assistant", "model")
        for number, part in enumerate(parts):
            if number:
                segments.append(RawImage(images.read(next(remaining)), loss=False, max_t=0.0))
            text = part.strip("\n") if len(parts) > 1 else part
            segments += [RawText(text, loss)] if text else []
        segments.append(RawText("\n", loss))
    return _merge_texts(segments)


def _read_messages(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """OpenAI: the assistant's text and images are in the loss; those of the user and the system are conditions. An image
    part without content takes the next of the record's `images`, as in TRL's data sets."""
    segments: list[RawText | RawImage] = []
    remaining = iter(record.get("images") if isinstance(record.get("images"), list) else ())
    for message in _get_list(record, "messages"):
        loss, content = _get(message, "role") == "assistant", _get(message, "content")
        if not isinstance(content, str | list):
            raise Fault("bad segment", f"the content of a message must be text or a list, not {_short_repr(content)}")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = _get(part, "type")
            if kind == "text":
                segments.append(RawText(_check_text(_get(part, "text"), "text"), loss))
            elif kind in ("image_url", "image"):
                value = next(remaining, None) if part.get(kind) is None else part[kind]
                if value is None:
                    raise Fault("lists of different lengths", "its messages have more image parts than it has images")
                segments.append(RawImage(images.read(value), loss, 1.0 if loss else 0.0))
            else:
                raise Fault("bad segment", f"a part of a message must be text or image_url, not {_short_repr(kind)}")
        segments.append(RawText("\n", loss))
    if next(remaining, None) is not None:
        raise Fault("lists of different lengths", "it has more images than its messages have image parts")
    return _merge_texts(segments)


def _read_interleaved(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """OBELICS: two lists of the same length; at each index either the text or the image is present."""
    texts, values = _get_list(record, "texts"), _get_list(record, "images")
    if len(texts) != len(values):
        raise Fault("lists of different lengths", f"{len(texts)} texts and {len(values)} images")
    segments: list[RawText | RawImage] = []
    for number, (text, value) in enumerate(zip(texts, values, strict=True), 1):
        if (text is None or text == "") == (value is None or value == ""):
            raise Fault("bad segment", f"item {number} must be either a text or an image")
        segments.append(RawText(_check_text(text, "text")) if value in (None, "") else RawImage(images.read(value)))
    return segments


def _read_mmc4(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """MMC4: sentences, and images that are each inserted before the matching sentence."""
    texts = _get_list(record, "text_list")
    infos = [] if record.get("image_info") is None else _get_list(record, "image_info")
    by_index: dict[int, list[Any]] = {}
    for info in infos:
        index = _get(info, "matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise Fault("lists of different lengths", f"matched_text_index {_short_repr(index)} for {len(texts)} texts")
        by_index.setdefault(index, []).append(_get(info, "image_name", "raw_url", "image"))
    segments: list[RawText | RawImage] = []
    for number, text in enumerate(texts):
        segments += [RawImage(images.read(value)) for value in by_index.get(number, ())]
        segments.append(RawText(_check_text(text, "text") + (" " if number + 1 < len(texts) else "")))
    return _merge_texts(segments)


def _read_editing(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """Source images (without noise and loss), the instruction (without loss), and the target image (with loss)."""
    source = _get_field(record, "source")
    sources = source if isinstance(source, list) else [source]
    if not sources:
        raise Fault("missing image", "the list of source images is empty")
    segments: list[RawText | RawImage] = [RawImage(images.read(value), loss=False, max_t=0.0) for value in sources]
    segments.append(RawText(_nonempty_text(_get_field(record, "instruction"), "instruction"), loss=False))
    return [*segments, RawImage(images.read(_get_field(record, "target")))]


# Values and checks


def _merge_texts(segments: Sequence[RawText | RawImage]) -> list[RawText | RawImage]:
    """Merge neighbouring texts with the same loss; remove empty texts and one line break at the end."""
    merged: list[RawText | RawImage] = []
    for part in segments:
        last = merged[-1] if merged else None
        if isinstance(part, RawText) and isinstance(last, RawText) and last.loss == part.loss:
            merged[-1] = RawText(last.text + part.text, part.loss)
        elif not isinstance(part, RawText) or part.text:
            merged.append(part)
    if merged and isinstance(merged[-1], RawText):
        text = merged[-1].text.removesuffix("\n")
        merged = [*merged[:-1], RawText(text, merged[-1].loss)] if text else merged[:-1]
    return merged


def _check_pairs(segments: Sequence[RawText | RawImage]) -> None:
    kinds = [isinstance(part, RawImage) for part in segments]
    if kinds != [False, True] * (len(kinds) // 2):
        raise Fault("bad segment", "a document of pairs must alternate captions and images, caption first")


def _get_field(record: dict, field: str) -> Any:
    """The value of the first column with one of the field's names. Fault if all are empty or missing."""
    names = COLUMN_NAMES[field]
    value = _first_value(record, names)
    if value is None:
        if present := [name for name in names if name in record]:
            raise Fault(f"empty {field}", f"its {present[0]} is empty")
        raise Fault("missing column", f"no {field} ({', '.join(names[:4])}, ...) among its columns: {_list_columns(record)}")
    return value


def _first_value(record: dict, names: Sequence[str]) -> Any:
    return next((record[n] for n in names if record.get(n) is not None and _may_be_value(n, record[n])), None)


_IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


def _may_be_value(name: str, value: Any) -> bool:
    """Whether a column can be read: text pages also have a url, so ambiguous columns need an image suffix."""
    if name not in AMBIGUOUS_NAMES or not isinstance(value, str):
        return True
    return value.partition("?")[0].lower().endswith(_IMAGE_ENDINGS)


def _get_list(record: dict, name: str) -> list:
    value = record.get(name)
    if not isinstance(value, list):
        raise Fault("missing column", f"{name} must be a list, not {_short_repr(value)}")
    return value


def _get(part: Any, *names: str) -> Any:
    """The value of the first of these keys of an object. Fault when it is missing."""
    value = _first_value(part, names) if isinstance(part, dict) else None
    if value is None:
        raise Fault("bad segment", f"{names[0]} is missing in {_short_repr(part)}")
    return value


def _nonempty_text(value: Any, field: str) -> str:
    """A text that is not blank. Fault when it is."""
    text = _check_text(value, field)
    if not text.strip():
        raise Fault(f"empty {field}", f"its {field} is empty")
    return text


def _check_text(value: Any, field: str) -> str:
    """A text that can be encoded as UTF-8. Fault when it is not text, or has a lone surrogate."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Fault("wrong encoding", f"its {field} is not UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise Fault("bad segment", f"its {field} must be text, not {_short_repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Fault("wrong encoding", f"its {field} has half of a surrogate pair") from None
    return value


def _list_columns(record: dict) -> str:
    return ", ".join(map(str, _first_names(record))) or "it has no columns"


def _first_names(names: Any, limit: int = 12) -> Iterator[str]:
    for number, name in enumerate(names):
        if number == limit:
            yield "..."
            return
        yield name


def _short_repr(value: Any) -> str:
    """A value for messages, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
