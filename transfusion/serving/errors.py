"""Errors in the format of OpenAI's API: an HTTP status and one clear sentence."""

import json
from collections.abc import Mapping, Sequence

from starlette.responses import JSONResponse

MAX_MESSAGE_CHARS, MAX_SHOWN_CHARS = 300, 40  # of a message, of a value of the request in it
PART_TYPES = {"text", "image_url", "image"}  # discriminators in pydantic's locations: they are not fields
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """The request fails with this status. `param` is the name of the wrong field, if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = sanitize(message), None if param is None else sanitize(param)

    def body(self) -> dict:
        error_type = ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        if self.status == 429:
            headers = {"Retry-After": "1", **(headers or {})}
        return JSONResponse(self.body(), self.status, headers)


def show(value: object) -> str:
    """A short value as JSON, for messages; nothing for a long one."""
    if not isinstance(value, str | int | float) or isinstance(value, str) and len(value) > MAX_SHOWN_CHARS:
        return ""  # before it is written: that would take long
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else ""


def sanitize(text: str) -> str:
    """One line of at most MAX_MESSAGE_CHARS, without control characters for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_MESSAGE_CHARS])


def from_validation_errors(errors: Sequence[Mapping]) -> APIError:
    """pydantic's errors as one sentence. If a field has several types, the error with the deepest location is reported."""
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    error_type, reason, location = error["type"], " ".join(error["msg"][:MAX_MESSAGE_CHARS].split()), error["loc"]
    if error_type == "field":  # of `schemas`, about a field of the object at this location
        field = _format_location((*location, error["ctx"]["field"]), True)
        return APIError(400, f"{field} {reason}", field, "unsupported_value")
    field = _format_location(location, error_type == "extra_forbidden")
    if not field and error_type != "value_error":
        return APIError(400, "the body must be a JSON object, sent as application/json")
    if error_type == "extra_forbidden":
        reason = "is not a supported field"
    elif error_type == "missing":
        reason = "is missing"
    elif error_type != "value_error" and (value := show(error["input"])):
        reason = f"{reason}, not {value}"
    reason = reason.removeprefix("Value error, ").replace("Input should", "should", 1)
    return APIError(400, f"{field} {reason}".strip(), field or None)


def _format_location(loc: Sequence[str | int], is_unknown: bool) -> str:
    """For example messages[0].content[1].text, without pydantic's names for the members of a union."""
    field, previous = "", None
    for part in loc[1:] if loc[:1] == ("body",) else loc:
        if isinstance(part, int):
            field += f"[{part}]"
        elif is_unknown and part is loc[-1]:
            field += f".{part[:60]}" if field else part[:60]
        elif part.isidentifier() and part != "str" and not (isinstance(previous, int) and part in PART_TYPES):
            field += f".{part}" if field else part
        previous = part
    return field
