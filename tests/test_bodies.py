"""Bodies: what is costly to parse is refused before it is parsed, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import json_bodies
from tests.profile import examples
from transfusion.serving import bodies, errors
from transfusion.serving.bodies import MAX_DEPTH, MAX_DIGITS, MAX_MARKS, MAX_VALUES, check_structure, parse_json
from transfusion.serving.errors import APIError
from transfusion.serving.schemas import ChatRequest, CompletionRequest

texts = st.text(st.characters(codec="utf-8"), max_size=30) | st.text('",[]{}\\:', max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=30,
)  # fmt: skip


def count_values(value) -> int:
    """The value and all values in it; two fewer marks for an empty list or object than for one element."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return 1 + (sum(map(count_values, inner)) or 1)
    return 1


def measure_depth(value) -> int:
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return 1 + max(map(measure_depth, inner), default=0)
    return 0


def is_refused(body: bytes, rule: str) -> bool:
    try:
        check_structure(body)
    except APIError as error:
        assert rule in error.message
        return True
    return False


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_values_and_depth_are_counted_outside_of_strings(monkeypatch, ensure_ascii):
    """The limits are exact: a body at the limit is accepted, one above is refused, whatever its strings contain."""

    @examples(300, 60)
    @given(json_values)
    def check(value):
        body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        num_values, depth = count_values(value), measure_depth(value)
        monkeypatch.setattr(bodies, "MAX_DEPTH", 99)
        monkeypatch.setattr(bodies, "MAX_VALUES", num_values)
        assert not is_refused(body, "")
        monkeypatch.setattr(bodies, "MAX_VALUES", num_values - 1)
        assert is_refused(body, f"{num_values} values")
        monkeypatch.setattr(bodies, "MAX_VALUES", num_values)
        monkeypatch.setattr(bodies, "MAX_DEPTH", depth)
        assert not is_refused(body, "")
        monkeypatch.setattr(bodies, "MAX_DEPTH", depth - 1)
        assert is_refused(body, f"{depth} levels")

    check()


@pytest.mark.parametrize("body", json_bodies(2**20), ids=lambda body: f"{body[:12]}...{body[-20:]}")
def test_the_input_of_json_loads_is_bounded(body, monkeypatch):
    """Whatever a body is, json.loads receives few values, few escapes, and no long number."""
    received = []

    def loads(text, parse_int, parse_float):
        received.append(text)
        return original(text, parse_int=parse_int, parse_float=parse_float)

    original = json.loads
    monkeypatch.setattr(bodies.json, "loads", loads)
    with pytest.raises(APIError) as caught:
        parse_json(body, CompletionRequest)
    assert caught.value.status == 400
    for text in received:
        assert text.count("\\") <= MAX_MARKS
        outside = "" if text.count('"') > 100 else "".join(text.split('"')[::2])
        assert sum(map(outside.count, ",[{")) <= MAX_VALUES


@pytest.mark.parametrize(("body", "words"), [
    (b"[" * (MAX_DEPTH + 1), f"{MAX_DEPTH + 1} levels"), (b"[1," * 100_000, "200,001 values"),
    (b'{"prompt": 1' + b"0" * MAX_DIGITS + b"}", "1,001 characters"), (b'{"prompt": -0.' + b"0" * 5000 + b"}", "characters"),
    (b'"' * (MAX_MARKS + 1), "quotes"), (b'{"prompt": "' + b"\\n" * (MAX_MARKS + 1) + b'"}', "backslashes"),
    ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"), (b'{"prompt": "\xff"}', "UTF-8"), (b"", "UTF-8"), (b"[", "UTF-8"),
])  # fmt: skip
def test_what_is_refused(body, words):
    with pytest.raises(APIError) as caught:
        parse_json(body, CompletionRequest)
    assert (caught.value.status, words in caught.value.message) == (400, True), caught.value.message


def test_a_long_value_is_not_written_into_the_error(monkeypatch):
    """Neither as JSON nor split into words: both hold the interpreter's lock, and the message keeps 40 characters of it."""
    written, original = [], errors.json.dumps
    for field in "tools", "temperature":
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], field: "x " * 10**5}).encode()
        with monkeypatch.context() as patch, pytest.raises(APIError, match=field) as caught:
            patch.setattr(errors.json, "dumps", lambda value, **options: written.append(value) or original(value, **options))
            parse_json(body, ChatRequest)
        assert len(caught.value.message) < 100
    assert all(len(value) < 100 for value in written)
    message = SplitOnce("the tag " + "x " * 10**5)
    errors.from_validation_errors([{"type": "union_tag_invalid", "msg": message, "loc": ("messages",), "input": {}}])


class SplitOnce(str):
    def split(self):
        raise AssertionError("a long text is split")


def test_what_is_accepted():
    """Byte order marks, a long text of marks and escapes, base64 of the largest body, and many token ids."""
    assert parse_json(b'\xef\xbb\xbf{"prompt": "a"}', CompletionRequest).prompt == ["a"]
    text = '",[]{}\\' * 12_000
    assert parse_json(json.dumps({"prompt": text}).encode(), CompletionRequest).prompt == [text]
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "ab+/" * 2**20}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "{" * 1000}, part]}]
    body = json.dumps({"messages": messages}).encode().replace(b"/", b"\\/", 2**17)  # as PHP writes it
    assert parse_json(body, ChatRequest).messages[0].content[1].image_url.url == part["image_url"]["url"]
    ids = [[1] * 1000] * 8
    assert parse_json(json.dumps({"prompt": ids}).encode(), CompletionRequest).prompt == ids
