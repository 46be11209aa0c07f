"""Values of records and the faults of wrong ones."""

import ast
import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import Fault

UNSUPPORTED_SUFFIXES = ("heic", "heif", "jxl", "svg")
PICTURE_ENDINGS = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES))
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\"""", re.DOTALL)
TEXT_LIST = re.compile(rf"\[\s*(?:(?:{QUOTED.pattern})[\s,]*+)++\]\s*", re.DOTALL)
DATA_URL = re.compile(r"data:image/[\w.+-]+[;,]")
BASE64_PICTURE = re.compile(  # JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF
    r"(?:/9j/|iVBORw0KGgo|R0lGOD[dl]h|UklGR|Qk[0-3]|SUkqA|TU0AK|AAAA[A-Za-z0-9+/]GZ0eXBhdmlm)[A-Za-z0-9+/\s]{40,}+={0,2}+\s*"
)
MAX_PATH = 1024  # characters of a path of a picture
CAPTION_NUMBER = re.compile(r"#\d+$")  # behind the name of a picture: bird.jpg#0, as in Flickr8k


class ImageReader(Protocol):
    """Reads the images of records."""

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of bytes, {"bytes", "path"}, a path or a URL. Fault when it cannot be read."""
        ...


def is_empty(value: Any) -> bool:
    """Whether a value is only a placeholder: tables have every column in every row, and pandas writes NaN."""
    return value is None or (not value if isinstance(value, str | list | dict) else value != value)  # NaN is not itself


def is_text(value: Any) -> bool:
    """Whether a value is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def has_words(value: Any) -> bool:
    """Whether a value is text of several words."""
    return isinstance(value, str) and len(value.split()) > 1 and sum(map(str.isalpha, value)) > len(value) / 2


def looks_like_picture(value: Any) -> bool:
    """Whether a value is the path or address of a picture, its content, or a list of these."""
    if isinstance(value, str):
        if is_inline_picture(value):
            return True
        if len(value) > MAX_PATH:
            return False
        path = value.partition("?")[0].lower()
        path = CAPTION_NUMBER.sub("", path) if "#" in path else path
        if not path.endswith(PICTURE_ENDINGS):
            return False
        has_name = not path.rpartition("/")[2].startswith(PICTURE_ENDINGS)
        return has_name and ("/" in value or not any(map(str.isspace, value.strip())))
    if isinstance(value, bytes):
        return value.startswith(PICTURE_STARTS)
    if isinstance(value, dict):
        parts = (value.get("bytes"), value.get("path"))
        return any(isinstance(part, str | bytes) and looks_like_picture(part) for part in parts)
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str | bytes | dict) and looks_like_picture(item) for item in value)
    return False


def is_inline_picture(value: str) -> bool:
    """Whether a text is the content of a picture: a data: URL, or base64 alone."""
    return DATA_URL.match(value) is not None or BASE64_PICTURE.fullmatch(value) is not None


def possible_paths(path: str) -> Iterator[str]:
    """Where the picture of this name may be: there, in a folder of Windows, without the number of a caption, with a suffix,
    which Kaggle's tables omit, or with accents in another form of Unicode: macOS writes them apart from their letters."""
    yield path
    if not path.isascii():
        folder, slash, name = path.rpartition("/")
        for form in ("NFC", "NFD"):
            yield from (folder + slash + unicodedata.normalize(form, name), unicodedata.normalize(form, path))
    if "\\" in path:
        yield from possible_paths(path.replace("\\", "/"))
    elif CAPTION_NUMBER.search(path):
        yield CAPTION_NUMBER.sub("", path)
    elif not path.lower().endswith(PICTURE_ENDINGS):
        for suffix in IMAGE_SUFFIXES:
            yield from (f"{path}.{suffix}", f"{path}.{suffix.upper()}")


def parse_texts(value: str) -> list[str] | None:
    """The texts of a list that was written as text, by JSON, Python or NumPy; None for any other text."""
    if not value.startswith("[") or not TEXT_LIST.fullmatch(value):
        return None
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return [ast.literal_eval(text) for text in QUOTED.findall(value)]  # NumPy writes no commas
    except (SyntaxError, ValueError):
        return None


def is_address(value: Any) -> bool:
    """Whether a picture must be fetched from an address."""
    return isinstance(value, str) and "://" in value


def get_list(record: dict, name: str) -> list:
    value = record.get(name)
    if not isinstance(value, list):
        raise Fault("missing column", f"{name} must be a list, not {short_repr(value)}")
    return value


def get_value(part: Any, *names: str) -> Any:
    """The value of the first of these keys of an object. Fault when it is missing."""
    value = next((part[name] for name in names if part.get(name) is not None), None) if isinstance(part, dict) else None
    if value is None:
        raise Fault("bad segment", f"{' or '.join(names)} is missing in {short_repr(part)}")
    return value


def nonempty_text(value: Any, field: str) -> str:
    """A text that is not blank. Fault when it is."""
    text = check_text(value, field)
    if not text.strip():
        raise Fault(f"empty {field}", f"its {field} is empty")
    return text


def check_text(value: Any, field: str) -> str:
    """A text that can be encoded as UTF-8. Fault when it is not text, has a lone surrogate, or is UTF-16."""
    if isinstance(value, bytes):
        if 3 * value.count(0) > len(value):  # UTF-16 without a byte order mark is valid UTF-8
            raise Fault("wrong encoding", f"over a third of its {field} is zeros, as in UTF-16: save it as UTF-8")
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Fault("wrong encoding", f"its {field} is not UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise Fault("bad segment", f"its {field} must be text, not {short_repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Fault("wrong encoding", f"its {field} has half of a surrogate pair") from None
    return value


def unique_names(columns: Iterable[str]) -> list[str]:
    """The names of columns. Equal ones are numbered, as pandas does: in a record the last one would replace the others."""
    names, counts = [], Counter()
    for name in columns:
        names.append(f"{name}.{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return names


def strip_caption(content: bytes) -> bytes:
    """The content of a text file without byte order mark and surrounding white space."""
    return content.removeprefix(codecs.BOM_UTF8).strip()


def list_columns(record: dict) -> str:
    return ", ".join(map(str, _first_names(record))) or "it has no columns"


def _first_names(names: Any, limit: int = 12) -> Iterator[str]:
    for number, name in enumerate(names):
        if number == limit:
            yield "..."
            return
        yield name


def printable(text: str) -> str:
    """One line of text that can be encoded: names of files and columns may have any characters."""
    text = text.encode(errors="replace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def short_repr(value: Any) -> str:
    """A value for messages, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
