"""Images of conversations: each of the ways in which data sets write them."""

import base64
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layouts import picture, turns
from tests.profile import examples
from tests.reading import close_account, read_at, write_lines
from transfusion.config import ChatLayout
from transfusion.data.raw import Fault, RawImage, RawText
from transfusion.data.reading.readers import open_reader
from transfusion.data.reading.records import to_document

ANSWER = "A robin."
BASE64 = base64.b64encode(picture(1)).decode()
INLINE = ("1.png", {"url": "1.png"}, {"path": "1.png"}, f"data:image/png;base64,{BASE64}", BASE64,
          {"type": "base64", "media_type": "image/png", "data": BASE64}, {"bytes": BASE64})  # fmt: skip
TEXT_PART = {"type": "text", "text": "See <image> there"}


class Names:
    """A reader of images whose values are their names: it notes them."""

    def __init__(self):
        self.names = []

    def read(self, value):
        self.names.append(value)
        return value


def outline(record: dict) -> list[str]:
    """The texts of a conversation's document, and the values of its images."""
    form = "messages" if "messages" in record else "conversation"
    document = to_document(form, record, Names())
    return [part.pixels if isinstance(part, RawImage) else part.text for part in document.segments][:-2]


def question(content, *images: str, **fields) -> dict:
    return {"messages": turns(content, ANSWER), **({"images": [*images]} if images else {}), **fields}


# Marks

MARKS = (
    "<image>", "<Image>", "<IMAGE>", "<|image|>", "<image_placeholder>", "<ImageHere>", "<Img><ImageHere></Img>",
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
    "Picture 7: <|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>",
)  # fmt: skip
NUMBERED = ("<image {}>", "<image_{}>", "<image{}>", "<image-{}>", "<|image_{}|>", "<image_{:02d}>")


@examples(100)
@given(st.lists(st.sampled_from(MARKS), min_size=1, max_size=4), st.booleans())
def test_marks_are_the_places_of_the_images_in_order(marks, is_llava):
    names = [f"{n}.png" for n in range(len(marks))]
    text = "".join(f"{mark}\ntext {n}\n" for n, mark in enumerate(marks))
    expected = [item for n, name in enumerate(names) for item in (name, f"text {n}")]
    record = {"conversations": turns(text, ANSWER, keys=("from", "value"))} if is_llava else question(text)
    assert outline({**record, "images": names}) == expected


@examples(100)
@given(st.sampled_from(NUMBERED), st.permutations(range(4)), st.sampled_from((0, 1)), st.booleans())
def test_numbers_of_marks_choose_the_images(mark, order, first, repeats):
    """They count from 1, or from 0 if there is a 0."""
    order = [*order, order[0]] if repeats else order
    text = "and".join(mark.format(n + first) for n in order)
    expected = [item for n in order for item in (f"{n}.png", "and")][:-1]
    assert outline(question(text, "0.png", "1.png", "2.png", "3.png")) == expected
    for names in (("0.png", "1.png", "2.png"), tuple("01234")):
        with pytest.raises(Fault, match=f"{len(order)} places") as raised:
            outline(question(text, *names))
        assert raised.value.kind == "lists of different lengths"


@pytest.mark.parametrize("text", [
    "The tag <video> of HTML, <audio> too", "Use <video> here", "a < image > b", "<imagery>", "<images>", "<image src='a'>",
    "<img src='a'>", "<image>", "See <image 1>", "<|image|>", "<img></img>", "```\n<video>\n</video>\n```",
])  # fmt: skip
def test_mark_in_messages_without_images_is_text(text):
    assert outline(question(text)) == [text]
    assert outline({"messages": turns("What?", text)}) == ["What?"]


# Parts


@pytest.mark.parametrize("images", [
    {}, {"images": ["1.png"]}, {"images": [{"bytes": b"1", "path": "1.png"}]}, {"image": "1.png"},
])  # fmt: skip
@pytest.mark.parametrize("value", ["1.png", {"url": "1.png"}, {"path": "1.png"}])
def test_mark_beside_an_image_part_is_its_place(images, value):
    part = {"type": "image_url", "image_url": value}
    assert outline(question([part, TEXT_PART], **images)) == ["See ", value, " there"]
    assert outline(question([TEXT_PART, part], **images)) == ["See ", value, " there"]
    assert outline(question([part, {"type": "text", "text": "See"}], **images)) == [value, "See"]


def test_images_of_parts_and_of_the_list_each_have_one_place():
    place, second = {"type": "image"}, {"type": "image", "image": "2.png"}
    assert outline(question([place, TEXT_PART], "1.png")) == ["See ", "1.png", " there"]
    assert outline(question([place, TEXT_PART], "1.png", "2.png")) == ["1.png", "See ", "2.png", " there"]
    assert outline(question([second, TEXT_PART], "1.png")) == ["2.png", "See ", "1.png", " there"]
    both = [second, place, {"type": "text", "text": "<image 2>, <image 1>"}]
    assert outline(question(both, "1.png")) == ["1.png", ", ", "2.png"]
    for content, names in (([second], ("1.png",)), ([place, second], ()), ([place, TEXT_PART, TEXT_PART], ("1.png",)),
                           ([TEXT_PART, second], ("1.png", "3.png"))):  # fmt: skip
        with pytest.raises(Fault, match=" places for "):
            outline(question(content, *names))


@pytest.mark.parametrize("value", INLINE, ids=range(len(INLINE)))
def test_image_of_a_message_may_be_written_in_any_way(value, tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    key = "source" if isinstance(value, dict) and "data" in value else "image"
    contents = [[{"type": "image", key: value}, {"type": "text", "text": "Which?"}], [{key: value}, {"text": "Which?"}]]
    if isinstance(value, str) and value != "1.png":
        contents.append(value)
    for document in read_at(write_lines(tmp_path / "a.jsonl", *map(question, contents))):
        image = document.segments[0]
        assert isinstance(image, RawImage) and image.pixels.shape == (4, 4, 3), document
        assert not any(BASE64[:20] in getattr(part, "text", "") for part in document.segments)


def test_base64_may_have_line_breaks_but_no_damage(tmp_path):
    lines = base64.encodebytes(picture(1)).decode()
    records = [{"image": text, "caption": "a bird"} for text in (lines, BASE64[:-9], BASE64[:-40])]
    records += [{"b64": BASE64, "caption": "a bird"}, {"text": "Qk" + "short"}]
    items = read_at(write_lines(tmp_path / "a.jsonl", *records))
    assert [getattr(item, "kind", "") or len(item.segments) for item in items] == [
        2, "unreadable image", "unreadable image", 2, 1]  # fmt: skip


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdin", "file:///dev/zero", "pipe", "folder", "gone.png"])
def test_path_of_a_message_that_is_no_file_is_a_fault(name, tmp_path):
    """A pipe without a writer would block a reader for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "none")
    contents = [[{"type": "image", "image": name}], f"Picture 1: <img>{name}</img>\nWhich?", [{"type": "image"}]]
    lines = [question(content, *([name] if content == [{"type": "image"}] else [])) for content in contents]
    items = read_at(write_lines(tmp_path / "a.jsonl", *lines))
    assert [item.kind for item in items] == ["missing image"] * 3


# Fields beside the messages


@pytest.mark.parametrize("system", ["Be kind.", [{"type": "text", "text": "Be kind."}]])
@pytest.mark.parametrize("is_message", [False, True])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_column_of_the_system_is_the_first_message(form, system, is_message, tmp_path):
    keys = ("role", "content") if form == "messages" else ("from", "value")
    messages = [{keys[0]: "system", keys[1]: system}] * is_message + turns("Which?", ANSWER, keys=keys)
    reader = open_reader(str(write_lines(tmp_path / "a.jsonl", {form: messages, "system": system}, {form: messages})))
    texts = [[part.text for part in document.segments] for unit in reader.units(9) for document in reader.read(unit)]
    talk = ["Which?", "\n", ANSWER]
    assert texts == [["Be kind.", "\n", *talk], ["Be kind.", "\n", *talk] if is_message else talk]
    assert not close_account(reader).tallies["fields"].passed_over


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize(("fields", "has_loss"), [
    ({"weight": 0}, False), ({"weight": 1}, True), ({"loss": False}, False), ({"loss": True}, True), ({"loss": None}, True),
])  # fmt: skip
def test_answers_that_are_not_to_be_learnt_have_no_loss(fields, has_loss, form):
    keys, image = ("role", "content") if form == "messages" else ("from", "value"), {"type": "image", "image": "1.png"}
    messages = turns("Which?", [image, {"type": "text", "text": "A cat."}], "Sure?", ANSWER, keys=keys)
    messages[1] |= fields
    layout = ChatLayout(assistant_suffix="<|end|>")
    document = to_document("messages" if form == "messages" else "conversation", {form: messages}, Names(), layout)
    is_learnt = has_loss and form == "messages"  # an image of a LLaVA conversation never is
    assert [(part.loss, part.max_t) for part in document.segments if isinstance(part, RawImage)] == [(is_learnt, is_learnt)]
    learnt = [part.text for part in document.segments if not isinstance(part, RawImage) and part.loss]
    assert learnt == ["A cat.", "<|end|>"] * has_loss + [ANSWER, "<|end|>"]


# Other media


def test_conversations_with_other_media_are_counted_and_named(tmp_path):
    lines = [question("Which?"), question("Which?", videos=["a.mp4"]), question("Which?", videos=[], audio=None),
             question([{"type": "audio_url", "audio_url": {"url": "a.mp3"}}])]  # fmt: skip
    reader = open_reader(str(write_lines(tmp_path / "a.jsonl", *lines)))
    tally = close_account(reader).tallies["records"]
    assert tally.passed_over == {"unsupported media": 2}
    assert tally.examples == {"unsupported media": ["a.jsonl:2", "a.jsonl:4"]}


# Random records

marks = st.sampled_from(("<image>", "<image 1>", "<image 2>", "text", ""))
parts = st.sampled_from(({"type": "image"}, {"type": "image", "image": "1.png"}, {"type": "image", "image": "x.png"})) | \
    st.lists(marks, max_size=3).map(" ".join).map(lambda text: {"type": "text", "text": text})  # fmt: skip


@examples(300)
@given(st.lists(st.lists(parts, max_size=3), min_size=1, max_size=3), st.integers(0, 3))
def test_every_image_of_a_conversation_is_read_or_it_is_a_fault(contents, count):
    """No image is lost, and no mark beside read images stays in the text of a record with a list."""
    names, reader = [f"{n}.png" for n in range(1, count + 1)], Names()
    record = question("", **({"images": names} if names else {}))
    record["messages"] = [*turns(*contents)[: len(contents)], {"role": "assistant", "content": ANSWER}]
    record["messages"] = [{**message, "role": "user"} for message in record["messages"][:-1]] + record["messages"][-1:]
    given = [part["image"] for content in contents for part in content if "image" in part]
    try:
        document = to_document("messages", json.loads(json.dumps(record)), reader)
    except Fault as fault:
        assert fault.kind == "lists of different lengths"
        return
    assert {*reader.names} == {*names, *given}
    texts = "".join(part.text for part in document.segments if not isinstance(part, RawImage))
    assert not names or "<image" not in texts
    assert len(reader.names) >= len(given)


@pytest.mark.parametrize("values", [["1.png"], ["1.png", "2.png"], []])
@pytest.mark.parametrize("form", ["pair", "editing"])
@examples(60)
@given(st.lists(st.sampled_from(("<image>", "<|image_2|>", "<image 1>", "word", " ", "<img><|image_1|></img>")), max_size=4))
def test_no_mark_stays_in_a_text_beside_images(form, values, words):
    """Of a caption or an instruction: each image is read, and each mark is the place of one, or it is a fault."""
    text, reader = " ".join(words), Names()
    record = {"pair": {"images": values, "caption": text},
              "editing": {"source": values, "instruction": text, "target": "out.png"}}[form]  # fmt: skip
    num_marks = sum("image" in word for word in words)
    try:
        document = to_document(form, record, reader)
    except Fault as fault:
        assert not text.strip() or not values or num_marks or form == "pair", fault
        return
    assert values and {*reader.names} - {"out.png"} == {*values}  # a number may name one twice
    assert len(reader.names) - (form == "editing") == (num_marks or len(values))
    texts = [part.text for part in document.segments if not isinstance(part, RawImage)]
    assert texts and not any("image" in text or "img" in text for text in texts)
    assert document.pairs == ([*map(type, document.segments)] == [RawText, RawImage])


def test_keys_of_messages_that_are_not_read_are_counted(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Which bird?", "name": None},
                {"role": "assistant", "content": ANSWER, "reasoning_content": "It is red.", "tool_calls": [], "weight": 1},
                {"role": "assistant", "content": ANSWER, "reasoning_content": "Again.", "tool_calls": [{"id": 1}]}]},
                {"conversations": turns("Which bird?", ANSWER, keys=("from", "value"))})  # fmt: skip
    tally = close_account(open_reader(str(tmp_path))).tallies["fields"]
    assert tally.passed_over == {"in 'messages.reasoning_content'": 2, "in 'messages.tool_calls'": 1}
    assert (tally.total, tally.read.total()) == (5, 2)


@pytest.mark.parametrize("record", [
    {"instruction": "Which bird?", "input": "It is red.", "output": ANSWER}, {"conversation": turns("Which bird?", ANSWER)},
    {"query": "Which bird?", "response": ANSWER, "history": [["a", "b"]], "system": "s"}, {"items": turns("a", ANSWER)},
])  # fmt: skip
def test_a_file_may_be_one_conversation_and_its_columns_are_read(record, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**record, "lang": "en"}, indent=1))
    reader = open_reader(str(tmp_path))
    assert reader.form == "messages"
    tally = close_account(reader).tallies["fields"]
    assert (tally.total, tally.passed_over) == (len(record) + 1, {"in 'lang'": 1})


@pytest.mark.parametrize("items", [
    [{"role": "cook", "name": "Ann"}], [{"content": "x"}], ["x"], [], "[1", '["x"]', {"role": 1},
])  # fmt: skip
def test_other_lists_are_no_turns(items, tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "one", "items": items})
    assert [part.text for document in read_at(tmp_path) for part in document.segments] == ["one"]


@pytest.mark.parametrize(("history", "kind"), [
    ([], ""), (None, ""), ("", ""), ([["a", "b"]], ""), ("a", "bad segment"), (5, "bad segment"), ([["a"]], "bad segment"),
    ([5], "bad segment"), ([[5, "b"]], "bad segment"), ([["a", None]], "bad segment"),
])  # fmt: skip
def test_history_of_an_exchange_is_read_or_a_fault(history, kind, tmp_path):
    write_lines(tmp_path / "a.jsonl", {"query": "q", "response": "a", "history": history})
    (item,) = read_at(tmp_path)
    assert (item.kind if isinstance(item, Fault) else "") == kind
