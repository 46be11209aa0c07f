"""Bodies of requests: JSON and forms to checked fields. What is costly to parse is refused before it is parsed.

A large body is parsed in a thread, but `json.loads` holds the interpreter's lock: only less input makes its time shorter.
"""

import asyncio
import json
import logging
import re
from itertools import accumulate
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from transfusion.serving.errors import APIError, from_validation_errors
from transfusion.serving.schemas import ImageRequest

SMALL_BYTES = 2**14  # a body of at most this size is parsed at once: it takes less than a few milliseconds
MAX_VALUES, MAX_DEPTH = 2**15, 64  # of the JSON in a body
MAX_MARKS = 2**18  # quotes, brackets, braces, commas and backslashes, also those in strings
MAX_DIGITS = 1000  # of one number
NOT_MARKS = bytes(set(range(256)) - set(b'"[]{},'))
DEPTH_CHANGES = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0, ord('"'): 0}
MAX_FORM_FIELDS, MAX_FIELD_BYTES = 32, 64 * 2**10  # of a form; MAX_FIELD_BYTES does not apply to files
JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)
FORM_TYPE = re.compile(r"multipart/form-data\s*;", re.IGNORECASE)
CHARSET = re.compile(r"charset\s*=\s*\"?([^\s;\"]*)", re.IGNORECASE)

Model = TypeVar("Model", bound=BaseModel)

logging.getLogger("python_multipart").setLevel("ERROR")  # any client can cause its warnings, as often as it likes


async def read_json(request: Request, model: type[Model]) -> Model:
    """APIError when the body is not JSON in UTF-8, not this model, or too costly."""
    if not JSON_TYPE.match(request.headers.get("content-type", "")):
        raise APIError(400, "the body must be a JSON object, sent as application/json")
    body = await request.body()
    if len(body) <= SMALL_BYTES:
        return parse_json(body, model)
    return await asyncio.to_thread(parse_json, body, model)


def parse_json(body: bytes, model: type[Model]) -> Model:
    check_structure(body)
    try:
        values = json.loads(body.decode("utf-8-sig"), parse_int=_parse_int, parse_float=_parse_float)
    except ValueError:  # of the decoding too
        raise APIError(400, "the body must be a JSON object in UTF-8, sent as application/json") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation_errors(error.errors(include_url=False)) from None


def check_structure(body: bytes) -> None:
    """APIError when JSON has too many values or is nested too deeply. Each step is one pass of a fast C function."""
    num_escapes = body.count(b"\\")
    if num_escapes <= MAX_MARKS:
        marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, NOT_MARKS)
    if num_escapes > MAX_MARKS or len(marks) > MAX_MARKS:
        raise APIError(400, f"the body has more than {MAX_MARKS:,} quotes, brackets, commas and backslashes")
    marks = re.sub(rb'"[^"]*"', b"", marks)  # without strings
    num_values = 1 + sum(map(marks.count, (b",", b"[", b"{")))
    if num_values > MAX_VALUES:
        raise APIError(400, f"the body has {num_values:,} values; at most {MAX_VALUES:,} are allowed")
    depth = max(accumulate(map(DEPTH_CHANGES.get, marks)), default=0)
    if depth > MAX_DEPTH:
        raise APIError(400, f"the body is nested {depth:,} levels deep; at most {MAX_DEPTH} are allowed")


async def read_form(request: Request, max_files: int) -> tuple[ImageRequest, list[bytes]]:
    """The fields of a multipart form, and the content of its pictures."""
    content_type = request.headers.get("content-type", "")
    if not FORM_TYPE.match(content_type):
        raise APIError(400, "the body must be multipart/form-data with the fields image and prompt")
    charset = CHARSET.search(content_type)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):  # Python also has encodings that take quadratic time
        raise APIError(400, "a form must be in UTF-8: leave charset out of Content-Type")
    fields, files = {}, []
    async with request.form(max_files=max_files, max_fields=MAX_FORM_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            is_file, param = isinstance(value, UploadFile), name[:60]
            if name in ("image", "image[]"):
                if not is_file:
                    raise APIError(400, "image must be a file", "image")
                files.append(await value.read())
            elif name in fields:
                raise APIError(400, f"the form field {param} comes twice: send it once", param)
            elif is_file and name not in ImageRequest.UNSUPPORTED:
                raise APIError(400, f"the form field {param} must be text, not a file", param)
            else:
                fields[name] = value
    try:
        return ImageRequest.model_validate_strings(fields, strict=False), files  # all values of a form are strings
    except ValidationError as error:
        raise from_validation_errors(error.errors(include_url=False)) from None


def _parse_int(digits: str) -> int:
    return int(_check_digits(digits))


def _parse_float(digits: str) -> float:
    return float(_check_digits(digits))


def _check_digits(digits: str) -> str:
    """The time of a conversion is quadratic in the number of digits."""
    if len(digits) > MAX_DIGITS:
        raise APIError(400, f"a number in the body has {len(digits):,} characters; at most {MAX_DIGITS} are allowed")
    return digits
