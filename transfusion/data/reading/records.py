"""Records to documents: what people call their columns, and the nine forms in which they keep text and pictures.

A record is a dict, whatever file it came from. `form_of` names its form from its fields, `to_document` reads it.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading.containers import PICTURES

Form = Literal[
    "document", "pair", "text", "image", "conversation", "messages", "interleaved", "mmc4", "editing"
]
FORMS: tuple[str, ...] = get_args(Form)
NAMES = {  # our word -> what people call it, the first found counts
    "image": ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "gif", "bmp", "image_path", "image_bytes",
              "file_name", "filename", "path", "url"),
    "caption": ("caption", "text", "txt", "prompt", "description", "alt", "title", "label"),
    "text": ("text", "txt", "content", "body", "caption"),
    "id": ("id",),
    "source": ("source", "source_image", "source_img", "input_image", "input_images", "original_image", "raw_image"),
    "instruction": ("instruction", "edit_prompt", "edit", "prompt", "caption"),
    "target": ("target", "target_image", "target_img", "output_image", "edited_image", "out_image"),
}  # fmt: skip
LOOSE = ("path", "url", "file_name", "filename")  # any file's: they name a picture only where its suffix says so
PLACE = "<image>"  # where a picture stands in a conversation


class Pictures(Protocol):
    """Where the pictures of a source are found."""

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of what a record holds: bytes, {"bytes", "path"}, a path or an address. Fault if it fails."""
        ...


def form_of(record: dict) -> Form:
    """The form of a record. Fault when its fields fit none."""

    def has(*words: str) -> bool:
        return all(_first(record, NAMES.get(word, (word,))) is not None for word in words)

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
    raise Fault("missing column", f"no text and no picture among its columns: {_listed(record)}")


def to_document(form: Form, record: dict, pictures: Pictures) -> RawDocument:
    """The document that a record holds. Fault when something in it is missing, empty, or cannot be read."""
    pairs = False
    match form:
        case "document":
            segments, pairs = _segments(record, pictures), record.get("pairs") or False
            if not isinstance(pairs, bool):
                raise Fault("bad segment", f"pairs must be true or false, not {_shown(pairs)}")
        case "pair":
            segments, pairs = _pair(record, pictures), True
        case "text":
            segments = [RawText(_text(_field(record, "text"), "text"))]
        case "image":
            segments = [RawImage(pictures.read(_field(record, "image")))]
        case "conversation":
            segments = _conversation(record, pictures)
        case "messages":
            segments = _messages(record, pictures)
        case "interleaved":
            segments = _interleaved(record, pictures)
        case "mmc4":
            segments = _mmc4(record, pictures)
        case "editing":
            segments = _editing(record, pictures)
    if not any(isinstance(part, RawImage) or part.text.strip() for part in segments):
        raise Fault("empty document", "it holds neither text nor picture")
    if pairs:
        _check_pairs(segments)
    name = _first(record, NAMES["id"])
    name = "" if name is None else _string(str(name), "id")
    if form == "conversation":  # LLaVA's ids name the picture: there they may recur
        return RawDocument(tuple(segments), kin=name)
    return RawDocument(tuple(segments), pairs=pairs, name=name)


def columns_of(form: Form, columns: Collection[str]) -> list[str]:
    """Which of these columns a form reads."""
    match form:
        case "pair":
            words = ("image", "caption", "id")
        case "text" | "image":
            words = (form, "id")
        case "editing":
            words = ("source", "instruction", "target", "id")
        case "conversation":
            return [name for name in ("conversations", *NAMES["image"], "images") if name in columns]
        case _:
            own = ("segments", "pairs", "messages", "texts", "images", "text_list", "image_info", "id")
            return [name for name in own if name in columns]
    firsts = (next((name for name in NAMES[word] if name in columns), None) for word in words)
    return [name for name in firsts if name is not None]


def rename(record: dict, columns: dict[str, str]) -> dict:
    """The record with the columns that a person named under our words; an empty name takes a column away."""
    replaced = {name for ours in columns for name in NAMES.get(ours, (ours,))}
    others = {key: value for key, value in record.items() if key not in replaced}
    return {**others, **{ours: record[theirs] for ours, theirs in columns.items() if theirs in record}}


# The forms


def _segments(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """Our own form: {"segments": [{"text": ...}, {"image": ..., "loss": false, "max_t": 0.5}], "pairs": false}."""
    found = []
    for number, part in enumerate(_list(record, "segments"), 1):
        if isinstance(part, dict):
            part = {key: value for key, value in part.items() if value is not None}  # tables have all columns everywhere
        if not isinstance(part, dict) or ("text" in part) == ("image" in part):
            raise Fault("bad segment", f"segment {number} must be an object with either text or image, not {_shown(part)}")
        loss, max_t = part.get("loss", True), part.get("max_t", 1.0)
        if not isinstance(loss, bool):
            raise Fault("bad segment", f"segment {number}: loss must be true or false, not {_shown(loss)}")
        if isinstance(max_t, bool) or not isinstance(max_t, int | float) or not 0 <= max_t <= 1:
            raise Fault("bad segment", f"segment {number}: max_t must lie between 0 and 1, not {_shown(max_t)}")
        if "text" in part:
            found.append(RawText(_text(part["text"], "text"), loss))
        else:
            found.append(RawImage(pictures.read(part["image"]), loss, float(max_t)))
    return found


def _pair(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    caption = _text(_field(record, "caption"), "caption")
    return [RawText(caption), RawImage(pictures.read(_field(record, "image")))]


def _conversation(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """LLaVA: what the human says is not learnt, what the model says is; pictures condition and stand at their marks."""
    given = _first(record, (*NAMES["image"], "images"))
    waiting = [] if given is None else list(given) if isinstance(given, list) else [given]
    turns = _list(record, "conversations")
    said = [_string(_get(turn, "value"), "text") for turn in turns]
    marks = sum(text.count(PLACE) for text in said)
    segments: list[RawText | RawImage] = []
    if waiting and not marks:  # no mark: the picture stands first
        segments += [RawImage(pictures.read(value), loss=False, max_t=0.0) for value in waiting]
    elif marks != len(waiting):
        raise Fault("lists of different lengths", f"{marks} times {PLACE} for {len(waiting)} pictures")
    coming = iter(waiting)
    for turn, text in zip(turns, said, strict=True):
        parts = text.split(PLACE)
        learnt = str(_get(turn, "from")).lower() in ("gpt", "assistant", "model")
        for number, part in enumerate(parts):
            if number:
                segments.append(RawImage(pictures.read(next(coming)), loss=False, max_t=0.0))
            text = part.strip("\n") if len(parts) > 1 else part
            segments += [RawText(text, learnt)] if text else []
        segments.append(RawText("\n", learnt))
    return _joined(segments)


def _messages(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """OpenAI: the assistant's text and pictures are learnt; those of the user and the system condition.

    A part that only says that a picture stands there takes the next of the record's `images`, as TRL's data have it.
    """
    segments: list[RawText | RawImage] = []
    waiting = iter(record.get("images") if isinstance(record.get("images"), list) else ())
    for message in _list(record, "messages"):
        learnt, content = _get(message, "role") == "assistant", _get(message, "content")
        if not isinstance(content, str | list):
            raise Fault("bad segment", f"the content of a message must be text or a list, not {_shown(content)}")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = _get(part, "type")
            if kind == "text":
                segments.append(RawText(_string(_get(part, "text"), "text"), learnt))
            elif kind in ("image_url", "image"):
                value = next(waiting, None) if part.get(kind) is None else part[kind]
                if value is None:
                    raise Fault("lists of different lengths", "its messages name more pictures than it has")
                segments.append(RawImage(pictures.read(value), learnt, 1.0 if learnt else 0.0))
            else:
                raise Fault("bad segment", f"a part of a message must be text or image_url, not {_shown(kind)}")
        segments.append(RawText("\n", learnt))
    if next(waiting, None) is not None:
        raise Fault("lists of different lengths", "it has more pictures than its messages name")
    return _joined(segments)


def _interleaved(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """OBELICS: two lists of one length, at each place exactly one of text and picture."""
    texts, images = _list(record, "texts"), _list(record, "images")
    if len(texts) != len(images):
        raise Fault("lists of different lengths", f"{len(texts)} texts and {len(images)} images")
    segments: list[RawText | RawImage] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), 1):
        if (text is None or text == "") == (image is None or image == ""):
            raise Fault("bad segment", f"place {number} must hold either a text or an image")
        segments.append(RawText(_string(text, "text")) if image in (None, "") else RawImage(pictures.read(image)))
    return segments


def _mmc4(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """MMC4: sentences, and pictures that each stand before the sentence they match."""
    texts, infos = _list(record, "text_list"), [] if record.get("image_info") is None else _list(record, "image_info")
    at: dict[int, list[Any]] = {}
    for info in infos:
        index = _get(info, "matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise Fault("lists of different lengths", f"matched_text_index {_shown(index)} for {len(texts)} texts")
        at.setdefault(index, []).append(_get(info, "image_name", "raw_url", "image"))
    segments: list[RawText | RawImage] = []
    for number, text in enumerate(texts):
        segments += [RawImage(pictures.read(value)) for value in at.get(number, ())]
        segments.append(RawText(_string(text, "text") + (" " if number + 1 < len(texts) else "")))
    return _joined(segments)


def _editing(record: dict, pictures: Pictures) -> list[RawText | RawImage]:
    """Source pictures (clean, not learnt), what to change (not learnt), and the picture that comes of it (learnt)."""
    given = _field(record, "source")
    sources = given if isinstance(given, list) else [given]
    if not sources:
        raise Fault("missing picture", "it has no source")
    segments: list[RawText | RawImage] = [RawImage(pictures.read(value), loss=False, max_t=0.0) for value in sources]
    segments.append(RawText(_text(_field(record, "instruction"), "instruction"), loss=False))
    return [*segments, RawImage(pictures.read(_field(record, "target")))]


# Their parts


def _joined(segments: Sequence[RawText | RawImage]) -> list[RawText | RawImage]:
    """Neighbouring texts of one loss as one; no line break at the very end; what is empty goes."""
    found: list[RawText | RawImage] = []
    for part in segments:
        last = found[-1] if found else None
        if isinstance(part, RawText) and isinstance(last, RawText) and last.loss == part.loss:
            found[-1] = RawText(last.text + part.text, part.loss)
        elif not isinstance(part, RawText) or part.text:
            found.append(part)
    if found and isinstance(found[-1], RawText):
        text = found[-1].text.removesuffix("\n")
        found = [*found[:-1], RawText(text, found[-1].loss)] if text else found[:-1]
    return found


def _check_pairs(segments: Sequence[RawText | RawImage]) -> None:
    kinds = [isinstance(part, RawImage) for part in segments]
    if kinds != [False, True] * (len(kinds) // 2):
        raise Fault("bad segment", "a document of pairs holds captions and images in turn, the caption first")


def _field(record: dict, ours: str) -> Any:
    """The value of the first column that is called like this. Fault when there is none."""
    value = _first(record, NAMES[ours])
    if value is None:
        known = [name for name in NAMES[ours] if name in record]
        if known:
            raise Fault(f"empty {ours}", f"its {known[0]} is empty")
        raise Fault("missing column", f"no {ours} ({', '.join(NAMES[ours][:4])}, ...) among its columns: {_listed(record)}")
    return value


def _first(record: dict, names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None and _may_be(name, record[name])), None)


_ENDINGS = tuple(f".{suffix}" for suffix in PICTURES)


def _may_be(name: str, value: Any) -> bool:
    """A web page has a url and a program a path, too: these are pictures only where they end like one."""
    return name not in LOOSE or not isinstance(value, str) or value.partition("?")[0].lower().endswith(_ENDINGS)


def _list(record: dict, name: str) -> list:
    value = record.get(name)
    if not isinstance(value, list):
        raise Fault("missing column", f"{name} must be a list, not {_shown(value)}")
    return value


def _get(part: Any, *names: str) -> Any:
    """A value inside a list of objects, under the first of these names. Fault when it is not there."""
    found = _first(part, names) if isinstance(part, dict) else None
    if found is None:
        raise Fault("bad segment", f"{names[0]} is missing in {_shown(part)}")
    return found


def _text(value: Any, what: str) -> str:
    """Text that says something."""
    found = _string(value, what)
    if not found.strip():
        raise Fault(f"empty {what}", f"its {what} is empty")
    return found


def _string(value: Any, what: str) -> str:
    """Text that can be written down. Fault when it is none, or holds half a character."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Fault("wrong encoding", f"its {what} is not UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise Fault("bad segment", f"its {what} must be text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Fault("wrong encoding", f"its {what} holds half of a surrogate pair") from None
    return value


def _listed(record: dict) -> str:
    return ", ".join(map(str, _few(record))) or "there are none"


def _few(names: Any, most: int = 12) -> Iterator[str]:
    for number, name in enumerate(names):
        if number == most:
            yield "..."
            return
        yield name


def _shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
