"""Records to documents: the nine forms of records with text and images. `columns.py` detects the form of a record."""

import json
from collections.abc import Sequence
from typing import Any

from transfusion.chat import Turn, lay_out
from transfusion.config import ChatLayout
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading.columns import COLUMN_NAMES, PICTURE_FIELDS, Form, find_column
from transfusion.data.reading.conversations import place_at_marks, read_conversation, read_messages
from transfusion.data.reading.values import (
    ImageReader,
    check_text,
    get_list,
    get_value,
    is_empty,
    is_number,
    list_columns,
    nonempty_text,
    parse_texts,
    short_repr,
)  # fmt: skip


def split_captions(record: dict, form: Form) -> list[dict]:
    """One record for each caption of a picture that has a list of them, which in a table may be written as text. Ids of
    several captions are numbered."""
    name = find_column(record, "caption") if form == "pair" else None
    captions = record[name] if name else None
    captions = parse_texts(captions) or captions if isinstance(captions, str) else captions
    if not isinstance(captions, list):
        return [record]
    records = [{**record, name: caption} for caption in captions]
    if len(records) > 1 and find_column(record, "id"):
        records = [{**part, "id": f"{record['id']} caption {number}"} for number, part in enumerate(records, 1)]
    return records


def to_document(
    form: Form, record: dict, images: ImageReader, chat: ChatLayout = ChatLayout(), where: str = ""  # noqa: B008 (frozen)
) -> RawDocument:
    """The document of a record; `chat` is the layout of conversations, `where` its file and row. Fault when a part of it is
    missing, empty, or cannot be read."""
    pairs = False
    match form:
        case "document":
            segments, pairs = _read_segments(record, images), record.get("pairs") or False
            if not isinstance(pairs, bool):
                raise Fault("bad segment", f"pairs must be true or false, not {short_repr(pairs)}")
        case "pair":
            segments = _read_pair(record, images)
            pairs = [*map(type, segments)] == [RawText, RawImage]
        case "text":
            segments = [RawText(nonempty_text(_get_field(record, "text"), "text"))]
        case "image":
            segments = [RawImage(images.read(value)) for value in _list_images(record) or [_get_field(record, "image")]]
        case "conversation":
            segments = _lay_out(read_conversation(record, _list_images(record), images), chat)
        case "messages":
            segments = _lay_out(read_messages(record, _list_images(record), images), chat)
        case "interleaved":
            segments = _read_interleaved(record, images)
        case "mmc4":
            segments = _read_mmc4(record, images)
        case "editing":
            segments = _read_editing(record, images)
    if not any(isinstance(part, RawImage) or (part.text.strip() and not part.parse_special) for part in segments):
        raise Fault("empty document", "it has neither text nor an image")
    if pairs:
        _check_pairs(segments)
    name = check_text(str(record["id"]), "id") if find_column(record, "id") else ""
    if form == "conversation":  # LLaVA's ids name the image, so they are not unique
        name = ""
    return RawDocument(tuple(segments), pairs=pairs, name=name, where=where)


# The forms


def _read_segments(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """This package's form: {"segments": [{"text": ...}, {"image": ..., "loss": false, "max_t": 0.5}], "pairs": false}."""
    segments = []
    for number, part in enumerate(get_list(record, "segments"), 1):
        if isinstance(part, dict):
            part = {key: value for key, value in part.items() if value is not None}  # in tables every column is present
        if not isinstance(part, dict) or ("text" in part) == ("image" in part):
            raise Fault("bad segment", f"segment {number} must have either text or image, not {short_repr(part)}")
        loss, max_t = part.get("loss", True), part.get("max_t", 1.0)
        if not isinstance(loss, bool):
            raise Fault("bad segment", f"segment {number}: loss must be true or false, not {short_repr(loss)}")
        if isinstance(max_t, bool) or not isinstance(max_t, int | float) or not 0 <= max_t <= 1:
            raise Fault("bad segment", f"segment {number}: max_t must be between 0 and 1, not {short_repr(max_t)}")
        if "text" in part:
            segments.append(RawText(nonempty_text(part["text"], "text"), loss))
        else:
            segments.append(RawImage(images.read(part["image"]), loss, float(max_t)))
    return segments


def _read_pair(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """The caption and then the images, or the images at the caption's marks."""
    caption = check_caption(_get_field(record, "caption"))
    values = _list_images(record) or [_get_field(record, "image")]
    parts = place_at_marks(caption, values, "caption") or [("text", caption), *(("image", value) for value in values)]
    return [RawText(value) if kind == "text" else RawImage(images.read(value)) for kind, value in parts]


def _lay_out(turns: Sequence[Turn], chat: ChatLayout) -> list[RawText | RawImage]:
    return [
        RawText(part.content, part.loss, part.parse_special) if isinstance(part.content, str) else part.content
        for part in lay_out(turns, chat)
    ]


def _read_interleaved(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """OBELICS: two lists of the same length; at each index either the text or the image is present."""
    texts, values = get_list(record, "texts"), get_list(record, "images")
    if len(texts) != len(values):
        raise Fault("lists of different lengths", f"{len(texts)} texts and {len(values)} images")
    segments: list[RawText | RawImage] = []
    for number, (text, value) in enumerate(zip(texts, values, strict=True), 1):
        if (text is None or text == "") == (value is None or value == ""):
            raise Fault("bad segment", f"item {number} must be either a text or an image")
        segments.append(RawText(check_text(text, "text")) if value in (None, "") else RawImage(images.read(value)))
    return segments


def _read_mmc4(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """MMC4: sentences, and images that are each inserted before the matching sentence."""
    texts = get_list(record, "text_list")
    infos = [] if record.get("image_info") is None else get_list(record, "image_info")
    by_index: dict[int, list[Any]] = {}
    for info in infos:
        index = get_value(info, "matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise Fault("lists of different lengths", f"matched_text_index {short_repr(index)} for {len(texts)} texts")
        by_index.setdefault(index, []).append(get_value(info, "image_name", "raw_url", "image"))
    segments: list[RawText | RawImage] = []
    for number, text in enumerate(texts):
        segments += [RawImage(images.read(value)) for value in by_index.get(number, ())]
        segments.append(RawText(check_text(text, "text") + (" " if number + 1 < len(texts) else "")))
    return _merge_texts(segments)


def _read_editing(record: dict, images: ImageReader) -> list[RawText | RawImage]:
    """Source images (without noise and loss), the instruction (without loss), and the target image (with loss). Marks in
    the instruction are the places of the source images."""
    source = _get_field(record, "source")
    sources = source if isinstance(source, list) else [source]
    if not sources:
        raise Fault("missing image", "the list of source images is empty")
    text = nonempty_text(_get_field(record, "instruction"), "instruction")
    parts = place_at_marks(text, sources, "instruction") or [*(("image", value) for value in sources), ("text", text)]
    segments = [RawText(value, loss=False) if kind == "text" else RawImage(images.read(value), loss=False, max_t=0.0)
                for kind, value in parts]  # fmt: skip
    return [*segments, RawImage(images.read(_get_field(record, "target")))]


# Values and checks


def check_caption(value: Any) -> str:
    """The text of a caption. Fault when it is blank or of a labelling tool: numbers, or JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise Fault("bad segment", f"its caption is the number {value}: --columns caption=NAME chooses a column with text, "
                    "--columns caption= reads images alone")  # fmt: skip
    caption = nonempty_text(value, "caption")
    words = caption.replace(",", " ").split()
    if len(words) > 1 and all(map(is_number, words)):  # one number may be a picture's name, as of a digit
        raise Fault("bad caption", f"its caption is only numbers, as in a file of labels: {short_repr(caption)}")
    if caption.startswith(("{", "[{")) and _is_json(caption):
        raise Fault("bad caption", f"its caption is JSON, as of a labelling tool: {short_repr(caption)}")
    return caption


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _merge_texts(segments: Sequence[RawText | RawImage]) -> list[RawText | RawImage]:
    """Neighbouring texts as one; without empty texts, and without one line break at the end."""
    merged: list[RawText | RawImage] = []
    for part in segments:
        if isinstance(part, RawText) and merged and isinstance(merged[-1], RawText):
            merged[-1] = RawText(merged[-1].text + part.text)
        elif not isinstance(part, RawText) or part.text:
            merged.append(part)
    if merged and isinstance(merged[-1], RawText):
        text = merged[-1].text.removesuffix("\n")
        merged[-1:] = [RawText(text)] if text else []
    return merged


def _check_pairs(segments: Sequence[RawText | RawImage]) -> None:
    kinds = [isinstance(part, RawImage) for part in segments]
    if kinds != [False, True] * (len(kinds) // 2):
        raise Fault("bad segment", "a document of pairs must alternate captions and images, caption first")


def _get_field(record: dict, field: str) -> Any:
    """The value of the column with one of the field's names. Fault if all are empty or missing."""
    name = find_column(record, field)
    if name is None:
        names = COLUMN_NAMES[field]
        if present := [name for name in names if name in record]:
            kind = "missing image" if field in PICTURE_FIELDS else f"empty {field}"
            is_wrong = not is_empty(record[present[0]])
            raise Fault(kind, f"its {present[0]} is {'not the name of a picture' if is_wrong else 'empty'}")
        raise Fault("missing column", f"no {field} ({', '.join(names[:4])}, ...) among its columns: {list_columns(record)}")
    return record[name]


def _list_images(record: dict) -> list[Any]:
    """The values of the record's image column, which may be a list."""
    name = find_column(record, "image")
    value = record[name] if name else []
    return [item for item in value if not is_empty(item)] if isinstance(value, list) else [value]
