"""Columns of records: their names in data sets, what each is read as, and the form of a record that they show."""

import json
import re
from collections.abc import Mapping, Set
from functools import lru_cache
from typing import Any, Literal, get_args

from transfusion.data.raw import Fault
from transfusion.data.reading.values import is_address, is_empty, is_text, list_columns, looks_like_picture

Form = Literal["document", "pair", "text", "image", "conversation", "messages", "interleaved", "mmc4", "editing"]
FORMS: tuple[str, ...] = get_args(Form)
CONVERSATIONS: tuple[Form, ...] = ("conversation", "messages")  # these have a chat layout
COLUMN_NAMES = {  # our name -> names in data sets, in lower case; the first one with a value is read
    "image": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "gif", "bmp", "images", "image_path",
              "image_bytes", "image_file", "image_file_name", "image_filename", "image_name", "img_path", "file_name",
              "file_names", "filename", "filepath", "file_path", "path", "image_url", "img_url", "photo_url", "picture_url",
              "url"),
    "caption": ("caption", "captions", "text", "txt", "prompt", "description", "alt", "alt_text", "title", "comment",
                "sentence", "image_caption", "image_description", "caption_text", "caption_en", "caption_0", "caption_1",
                "caption1", "label"),
    "text": ("text", "txt", "content", "body", "caption"),
    "id": ("id",),
    "source": ("source", "source_image", "source_img", "input_image", "input_images", "original_image", "raw_image"),
    "instruction": ("instruction", "edit_prompt", "edit", "prompt", "caption"),
    "target": ("target", "target_image", "target_img", "output_image", "edited_image", "out_image"),
}  # fmt: skip
AMBIGUOUS_NAMES = ("path", "url", "file_name", "file_names", "filename", "filepath", "file_path", "image_name", "photo")
PICTURE_NAMES = {*COLUMN_NAMES["image"]} - {*AMBIGUOUS_NAMES}
PICTURE_FIELDS = ("image", "source", "target")
LIST_COLUMNS: dict[Form, tuple[str, ...]] = {  # of the forms that are recognised by a list; the first is that list
    "document": ("segments", "pairs"), "conversation": ("conversations", "system"), "messages": ("messages", "system"),
    "mmc4": ("text_list", "image_info"), "interleaved": ("texts", "images"),
}  # fmt: skip
KNOWN_NAMES = {name for names in (*COLUMN_NAMES.values(), *LIST_COLUMNS.values()) for name in names}
TURN_LISTS = ("conversations", "messages", "conversation", "contents", "items", "chatml")  # the names of lists of turns
EXCHANGES = (  # columns of a question and its answer: Alpaca, Dolly, ms-swift, VQA, TRL
    ("instruction", "output"), ("instruction", "response"), ("query", "response"), ("question", "answer"),
    ("prompt", "completion"),
)  # fmt: skip
MORE_OF_EXCHANGES = ("input", "context", "history")  # belong to the question
INNER_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def detect_form(record: dict) -> Form:
    """The form of a record. Fault when its columns fit no form."""
    for form, (name, *others) in LIST_COLUMNS.items():
        if isinstance(record.get(name), list) and (form != "interleaved" or isinstance(record.get(*others), list)):
            return form
    if all(find_column(record, field) for field in ("target", "source", "instruction")):
        return "editing"
    if find_exchange(record):
        return "messages"
    if find_column(record, "image"):
        return "pair" if find_column(record, "caption") else "image"
    if find_column(record, "text"):
        return "text"
    raise Fault("missing column", f"it has neither a text nor an image column, only: {list_columns(record)}")


def describe_record(record: dict) -> tuple[Form | None, bool]:
    """Its form, if it has one, and whether its image must be fetched from an address."""
    try:
        form = detect_form(record)
    except Fault:
        return None, False
    return form, form in ("pair", "image") and is_address(record[find_column(record, "image")])


def path_of_picture(record: dict) -> str | None:
    """The path of the picture of a pair or image."""
    form, has_address = describe_record(record)
    value = record[find_column(record, "image")] if form in ("pair", "image") and not has_address else None
    return str(value) if isinstance(value, str | int) else None  # Kaggle's names are numbers


def form_among(record: dict, form: Form, columns: Set[str]) -> Form:
    """The form of a record among records of `form`, which have these columns: its own form. But a record in which some of
    the columns are empty or wrong, so that it looks like a text or an image, is a bad record of `form`."""
    try:
        own = detect_form(record)
    except Fault:
        if columns <= record.keys() and any(is_empty(record[name]) for name in columns):
            return form
        raise
    if own == form or own not in ("text", "image") or not columns <= record.keys():
        return own
    return own if columns <= {*read_columns(record, own)} else form


def find_column(record: dict, field: str) -> str | None:
    """The column that is read as this field: the first of its names with a fitting value. For an image otherwise the only
    column that looks like a picture. Fault when there are several."""
    for name in _present_names(field, tuple(record)):
        if is_empty(value := record[name]):
            continue
        if field not in PICTURE_FIELDS:
            if field == "id" or not looks_like_picture(value):
                return name
        elif name not in AMBIGUOUS_NAMES or looks_like_picture(value) or not isinstance(value, str | list):
            if name != "url" or record.keys().isdisjoint(PICTURE_NAMES):  # the picture that is empty, or nothing
                return name
    if field != "image":
        return None
    pictures = [name for name, value in record.items() if name not in COLUMN_NAMES["image"] and looks_like_picture(value)
                and not is_address(value)]  # fmt: skip
    if len(pictures) > 1:
        raise Fault("missing column", f"{list_columns(pictures)} may all be its image: choose one with --columns image=")
    return pictures[0] if pictures else None


def find_exchange(record: dict) -> tuple[str, str] | None:
    """The columns of a question and of its answer, one of which may be empty, in a record without a text of both."""
    for question, answer in EXCHANGES:
        if question in record and answer in record:
            values = record[question], record[answer]
            are_texts = all(isinstance(value, str | None) and not looks_like_picture(value) for value in values)
            if are_texts and any(map(is_text, values)):
                has_both = any(is_text(record.get(name)) for name in ("text", "txt", "caption", "captions"))
                return None if has_both else (question, answer)
    return None


@lru_cache(4096)
def _present_names(field: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a field that are among these columns: usually the same for all records."""
    return tuple(name for name in COLUMN_NAMES[field] if name in columns)


def read_columns(record: dict, form: Form) -> list[str]:
    """The columns of a record that are read."""
    fields = {"pair": ("image", "caption", "id"), "editing": ("source", "instruction", "target", "id"),
              "text": ("text", "id"), "image": ("image", "id")}.get(form, ("id",))  # fmt: skip
    names = [find_column(record, field) for field in fields]
    if form in CONVERSATIONS:
        names.append(find_column(record, "image"))
    if form == "messages" and is_empty(record.get("messages")) and (exchange := find_exchange(record)):
        names += [*exchange, *MORE_OF_EXCHANGES]
    return [name for name in (*LIST_COLUMNS.get(form, ()), *names) if name and not is_empty(record.get(name))]


@lru_cache(4096)
def plain_name(name: str) -> str:
    """A name of a column in lower case, as a known one if it has spaces, hyphens or capitals: Alt Text and altText are
    alt_text."""
    known = "_".join(INNER_CAPITAL.sub(" ", name).lower().replace("-", " ").split())
    return known if known in KNOWN_NAMES else name.lower()


def rename_columns(record: dict, columns: Mapping[str, str]) -> dict:
    """The record with columns renamed as {our name: column name}; an empty column name removes a column. Names of columns
    are plain ones; a list of turns is `conversations` or `messages`, also if it was written as JSON."""
    replaced = {name for ours, theirs in columns.items() for name in (*COLUMN_NAMES.get(ours, (ours,)), plain_name(theirs))}
    chosen = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    others: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(key, str):  # of names that differ only in case, one is the plain name
            name = plain_name(key)
            others[key if name in others or (name in record and key != name) else name] = value
    renamed = {**{key: value for key, value in others.items() if key not in replaced}, **chosen}
    has_turns = any(isinstance(renamed.get(name), list) for name in TURN_LISTS[:2])
    return renamed if has_turns or renamed.keys().isdisjoint(TURN_LISTS) else _rename_turns(renamed)


def _rename_turns(record: dict) -> dict:
    """The record with the first list of turns under its name: those of `conversations` have "from"."""
    for name in TURN_LISTS:
        turns = _parse_json(record[name]) if isinstance(record.get(name), str) else record.get(name)
        if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
            form = name if name in TURN_LISTS[:2] else "conversations" if "from" in turns[0] else "messages"
            return {form if key == name else key: turns if key == name else value for key, value in record.items()}
    return record


def _is_turn(value: Any) -> bool:
    parts = ({"from", "role"}, {"value", "content", "parts"})
    return isinstance(value, dict) and all(value.keys() & names for names in parts)


def _parse_json(text: str) -> Any:
    """The value of a text in JSON, or None."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
