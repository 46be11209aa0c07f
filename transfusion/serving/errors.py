"""Errors as OpenAI's API has them: a status, and one clear sentence."""

from collections.abc import Mapping, Sequence

from fastapi.responses import JSONResponse

LONGEST = 300  # letters of a sentence: it may quote what was sent
TAGS = {"text", "image_url", "image"}  # of the parts of a message: they say how it is read, and are no field
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request is not answered. `param` names what in it was wrong, where that can be said."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = readable(message), None if param is None else readable(param)

    def body(self) -> dict:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        if self.status == 429:
            headers = {"Retry-After": "1", **(headers or {})}
        return JSONResponse(self.body(), self.status, headers)


def readable(text: str) -> str:
    """One line without what a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:LONGEST])


def misread(errors: Sequence[Mapping]) -> APIError:
    """What pydantic says of a body as one sentence. Of several ways to read a value, the one that came farthest is told."""
    found = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    kind, reason = found["type"], " ".join(found["msg"].split())
    where = _place(found["loc"], kind == "extra_forbidden")
    if kind == "unsupported":
        return APIError(400, reason, found["ctx"]["name"], "unsupported_value")
    if not where and kind != "value_error":
        return APIError(400, "the body must be a JSON object, sent as application/json")
    if kind == "extra_forbidden":
        reason = "is not known here"
    elif kind == "missing":
        reason = "is missing"
    reason = reason.removeprefix("Value error, ").replace("Input should", "should", 1)
    return APIError(400, f"{where} {reason}".strip(), where or None)


def _place(loc: Sequence[str | int], unknown: bool) -> str:
    """messages[0].content[1].text, without pydantic's own words for the ways to read a value."""
    where, before = "", None
    for part in loc[1:] if loc[:1] == ("body",) else loc:
        if isinstance(part, int):
            where += f"[{part}]"
        elif unknown and part is loc[-1]:
            where += f".{part[:60]}" if where else part[:60]
        elif part.isidentifier() and part != "str" and not (isinstance(before, int) and part in TAGS):
            where += f".{part}" if where else part
        before = part
    return where
