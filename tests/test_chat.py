"""The chat layout: training data and chat requests get the same ids, and text that people write stays plain text."""

import asyncio
import base64
import io
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as Picture
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from tests.profile import examples
from tests.serving import serving
from tests.sources import inline, picture, write_lines
from tests.test_cli import command
from tests.tiny import Latents, build_engine, run_tensors, save, small_run
from transfusion.chat import PLAIN, ROLES, Turn, lay_out, lay_out_prompt
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.read import describe_run
from transfusion.cli.run_folder import RunFolder
from transfusion.codecs.text import Tokenizer
from transfusion.config import ChatLayout, DataConfig, to_json
from transfusion.data.config import PrepareConfig
from transfusion.data.fitting import TokenizerAndCodec
from transfusion.data.prepare import PrepareError, prepare
from transfusion.data.raw import Fault
from transfusion.data.reading.readers import NUM_SAMPLES, ReaderOptions, open_reader
from transfusion.data.reading.records import to_document
from transfusion.data.sources import chat_layout
from transfusion.data.store import open_prepared
from transfusion.disk import read_json, write_json
from transfusion.inference.engine import open_run
from transfusion.sequence import Text, encode_document
from transfusion.serving.limits import Limits
from transfusion.serving.schemas import ChatRequest
from transfusion.serving.served import ServedRun

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>",
    "<|end_of_text|>", "<|pad|>",
)  # fmt: skip
CHATML = ChatLayout(
    "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n",
)  # fmt: skip
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_3 = ChatLayout(
    HEADER.format("system"), "<|eot_id|>", HEADER.format("user"), "<|eot_id|>", HEADER.format("assistant"), "<|eot_id|>",
)  # fmt: skip
ALPACA = ChatLayout("", "\n\n", "### Instruction:\n", "\n\n", "### Response:\n", "\n\n")
LAYOUTS = {"default": ChatLayout(), "chatml": CHATML, "llama 3": LLAMA_3, "alpaca": ALPACA, "plain": PLAIN}


def with_special(tokenizer: HFTokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return Tokenizer(tokenizer)


@cache
def byte_level() -> Tokenizer:
    texts = ["what is this? a bird in a nest, user and assistant:\n\n### Response:\nhello"] * 5
    return with_special(HFTokenizer.from_str(Tokenizer.train(texts, 300).to_json()))


@cache
def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: spaces become a mark, which every text begins with; other characters become bytes."""
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁b", "▁a"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = HFTokenizer(models.BPE(vocab, [("▁", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_special(tokenizer)


# Conversations

words = st.sampled_from([
    "a bird", " ", "\n", "\n\n", "Ünïcode 鳥", "### Response:\n", "?", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>",
    "<|end_of_text|>", "<|begin_of_text|>", "<image", "<|pad|>",
])  # fmt: skip
texts = st.lists(words, max_size=4).map("".join)
roles = st.sampled_from(["system", "developer", "user", "assistant"])
NUM_PICTURES = 3


@cache
def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@cache
def url(number: int) -> str:
    buffer = io.BytesIO()
    Picture.fromarray(pixels(number)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Pictures:
    """The reader of images for records: the values are numbers."""

    def read(self, value: int) -> np.ndarray:
        return pixels(value)


Content = list[str | int]  # texts, and numbers of pictures
contents = st.lists(texts | st.integers(0, NUM_PICTURES - 1), max_size=4)
conversations = st.lists(st.tuples(roles, contents), min_size=1, max_size=5)


def fill_answers(turns: list[tuple[str, Content]]) -> list[tuple[str, Content]]:
    """The turns with a word in answers that are blank: these are faults."""
    return [(role, content) if role != "assistant" or any(isinstance(part, int) or part.strip() for part in content)
            else (role, [*content, "a bird"]) for role, content in turns]  # fmt: skip


def asks_last(turns: list[tuple[str, Content]]) -> bool:
    """Is the last content not of the assistant? Otherwise an answer without prefix would continue it."""
    asked = [role for role, content in turns for part in content if part != ""]
    return bool(asked) and asked[-1] != "assistant"


def to_message(role: str, content: Content, image) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else image(part) for part in content]
    is_text = len(content) == 1 and isinstance(content[0], str)
    return {"role": role, "content": content[0] if is_text else parts}


def training_chunk(form: str, record: dict, layout: ChatLayout, engine):
    """The positions of a document in training, and its latents, as `prepare` makes them."""
    raw = to_document(form, record, Pictures(), layout)
    (document,) = TokenizerAndCodec(engine.opened.tokenizer, Latents(), ((4, 4),)).encode([raw])
    return encode_document(document, engine.vocabulary), document


def served_tokens(messages: list[dict], engine) -> tuple[list[int], list[np.ndarray]]:
    """The ids and latents that the model gets for a chat request."""
    body = ChatRequest.model_validate({"messages": messages, "seed": 1})
    served = ServedRun(engine, Limits(pictures=100))
    (request,) = asyncio.run(served.parse_chat(body))
    request_id = engine.submit(request)
    engine.model.calls.clear()
    engine.step()
    engine.cancel(request_id)
    call = engine.model.calls[0]
    return call.tokens[0].tolist(), [latent.numpy() for group in call.x_t for latent in group]


@cache
def engine_of(layout: ChatLayout, tokenizer: Tokenizer):
    engine = build_engine(context=4000, text=tokenizer)
    engine.opened.notes["chat"] = to_json(layout)
    return engine


def check_served_as_trained(form: str, record: dict, messages: list[dict], answer: str, engine, layout: ChatLayout) -> None:
    """The prompt of a request is the beginning of the document in which an answer follows, and the rest of this document is
    the answer and its end."""
    tokenizer = engine.opened.tokenizer
    chunk, document = training_chunk(form, record, layout, engine)
    prompt, latents = served_tokens(messages, engine)
    assert chunk.tokens[: len(prompt)].tolist() == prompt
    images = [part.content for part in document.segments if not isinstance(part, Text)]
    assert all(np.array_equal(a, b) for a, b in zip(images, latents, strict=True))
    ending = tokenizer.encode(layout.assistant_suffix, parse_special=True) if layout.assistant_suffix.strip() else ()
    rest = [*tokenizer.encode(answer), *ending, engine.vocabulary.eos]
    assert chunk.tokens[len(prompt) :].tolist() == rest
    assert chunk.targets[len(prompt) - 1 : -1].tolist() == rest  # all of it has loss


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@examples(200, quick=20)
@given(conversations.map(fill_answers), texts.filter(str.strip))
def test_messages_are_served_as_trained(layout, tokenizer, turns, answer):
    record = {"messages": [
        *(to_message(role, content, lambda n: {"type": "image", "image": n}) for role, content in turns),
        {"role": "assistant", "content": answer},
    ]}  # fmt: skip
    messages = [
        to_message(role, content, lambda n: {"type": "image_url", "image_url": {"url": url(n)}}) for role, content in turns
    ]
    engine = engine_of(layout, tokenizer())
    assume(layout != PLAIN or asks_last(turns))
    check_served_as_trained("messages", record, messages, answer, engine, layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@examples(200, quick=20)
@given(st.data())
def test_llava_is_served_as_trained(layout, data):
    """The marks are positions of images; the texts around them are stripped of line breaks."""
    has_marks = data.draw(st.booleans())
    turns = data.draw(st.lists(st.tuples(roles.filter(lambda role: role != "developer"), contents), min_size=1, max_size=4))
    pictures = [part for _, content in turns for part in content if isinstance(part, int)]
    if not has_marks:  # the images are in the first message of the user
        turns = [(role, [part for part in content if isinstance(part, str)]) for role, content in turns]
        turns = [("system", ["be brief"])] * data.draw(st.integers(0, 1)) + [("user", [*pictures, "which?"]), *turns]
    turns = fill_answers(turns)
    names = {"system": ("system",), "user": ("human", "user", "Human"), "assistant": ("gpt", "model", "assistant")}
    record = {"image": pictures, "conversations": [
        {"from": data.draw(st.sampled_from(names[role])),
         "value": "".join(part if isinstance(part, str) else "<image>\n" * has_marks for part in content)}
        for role, content in turns
    ] + [{"from": "gpt", "value": "a bird"}]}  # fmt: skip
    messages = []
    for role, content in turns:
        split = "".join(part if isinstance(part, str) else "<image>\n" * has_marks for part in content).split("<image>")
        numbers = [part for part in content if isinstance(part, int)]
        stripped = [text.strip("\n") if len(split) > 1 else text for text in split]
        marked = zip(["", *numbers], stripped, strict=has_marks)
        parts = [part for pair in marked for part in pair] if has_marks else numbers + split
        messages.append(to_message(role, parts, lambda n: {"type": "image_url", "image_url": {"url": url(n)}}))
    assume(layout != PLAIN or asks_last(turns))
    check_served_as_trained("conversation", record, messages, "a bird", engine_of(layout, byte_level()), layout)


@examples(200)
@given(st.lists(st.tuples(roles, texts), min_size=1, max_size=6))
def test_default_layout_ends_messages_with_line_breaks_but_the_last(turns):
    parts = lay_out([Turn(ROLES[role], [text]) for role, text in turns], ChatLayout())
    assert "".join(part.content for part in parts) == "\n".join(text for _, text in turns)
    for part in parts:
        assert not (part.parse_special and part.loss) and part.content
    in_loss = [part.content for part in parts if part.loss]
    assert "".join(in_loss) == "".join(text for role, text in turns if role == "assistant")


@examples(200)
@given(st.lists(st.tuples(roles, contents), max_size=5), st.sampled_from([*LAYOUTS.values()]))
def test_only_the_layout_is_parsed_for_special_tokens(turns, layout):
    turns = [Turn(ROLES[role], content) for role, content in turns]
    for parts in (lay_out(turns, layout), lay_out_prompt(turns, layout)):
        assert all(part.content in asdict(layout).values() for part in parts if part.parse_special)
        written = [part.content for part in parts if isinstance(part.content, str) and not part.parse_special]
        assert "".join(written) == "".join(part for turn in turns for part in turn.content if isinstance(part, str))
        learnt = [part.content for part in parts if part.loss and isinstance(part.content, str) and not part.parse_special]
        answers = [part for turn in turns if turn.role == "assistant" for part in turn.content if isinstance(part, str)]
        assert "".join(learnt) == "".join(answers)
        special = set(byte_level().find_special("".join(SPECIAL)))
        assert not any(special & {*byte_level().encode(text)} for text in written)


JINJA = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
               " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", JINJA)
@examples(100)
@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.sampled_from([
    "what is this?", "a bird", "a bird\nin a nest", "Ünïcode 鳥", "### Response:\nhello",
])), min_size=1, max_size=5))  # fmt: skip
def test_layouts_equal_the_templates_of_transformers(name, turns):
    """With text that does not spell special tokens, and that white space of the layout does not merge with."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = HFTokenizer.from_str(byte_level().to_json())
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=JINJA[name])
    messages = [{"role": role, "content": text} for role, text in turns]
    ours = [Turn(role, [text]) for role, text in turns]
    for parts, prompt in ((lay_out(ours, LAYOUTS[name]), False), (lay_out_prompt(ours, LAYOUTS[name]), True)):
        ids = [id_ for part in parts for id_ in byte_level().encode(part.content, part.parse_special)]
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def test_unknown_role_is_a_fault():
    for form, record in [
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}]}),
        ("conversation", {"conversations": [{"from": "observation", "value": "b"}]}),
    ]:  # fmt: skip
        with pytest.raises(Fault, match="the role of a message must be one of system, developer, user, human, assistant"):
            to_document(form, record, Pictures())
    turns = [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}]  # other people's keys
    raw = to_document("conversation", {"conversations": turns}, Pictures())
    assert [part.text for part in raw.segments] == ["a", "\n", "b"]


def test_question_and_answer_without_layout_stay_apart():
    parts = lay_out([Turn("system", ["a"]), Turn("user", ["b", "c"]), Turn("assistant", ["d", "e"])], PLAIN)
    assert [(part.content, part.loss) for part in parts] == [("abc", False), ("de", True)]


def test_conversation_without_content_is_a_fault_in_any_layout():
    with pytest.raises(Fault, match="neither text nor an image"):
        to_document("messages", {"messages": []}, Pictures(), CHATML)
    question = {"role": "user", "content": "a"}
    for messages in ([question], [question, {"role": "gpt", "content": " \n"}],
                     [{"role": "assistant", "content": []}, {"role": "assistant", "content": "b"}]):  # fmt: skip
        with pytest.raises(Fault, match="assistant") as raised:
            to_document("messages", {"messages": messages}, Pictures(), CHATML)
        assert raised.value.kind == "empty answer"


def test_names_of_roles():
    """In training data and requests."""
    turns = [{"from": name, "value": name} for name in ("system", "developer", "user", "Human", "assistant", "gpt", "model")]
    raw = to_document("conversation", {"conversations": turns}, Pictures(), CHATML)
    prefixes = [part.text for part in raw.segments if part.text.startswith("<|im_start|>")]
    roles = ["system"] * 2 + ["user"] * 2 + ["assistant"] * 3
    assert prefixes == [f"<|im_start|>{role}\n" for role in roles]
    assert [part.text for part in raw.segments if part.loss and not part.parse_special] == ["assistant", "gpt", "model"]


def test_conversation_that_edits_an_image_is_an_edit():
    """For the dropout of training and for the task `edits`; the texts between the images are its instruction."""
    from transfusion.data.loader import is_edit as is_edit_in_training
    from transfusion.evaluation.edits import is_edit

    def record(last_role: str, *content: str | int) -> dict:
        def image(number: int) -> dict:
            return {"type": "image", "image": number}

        between = [] if last_role == "assistant" else [{"role": "assistant", "content": "into which?"}]
        return {"messages": [to_message("user", content, image), *between, to_message(last_role, [2], image)]}

    for values, expected in [
        (record("assistant", 0, "make it blue"), True), (record("user", 0, "make it blue"), False),
        (record("assistant", "draw"), False), (record("assistant", 0, "with", 1), False),
    ]:  # fmt: skip
        raw = to_document("messages", values, Pictures())
        assert is_edit(raw) == expected
        assert is_edit_in_training(raw) or not expected


# The server


def test_special_token_of_the_suffix_ends_an_answer(tmp_path):
    """Nothing of it is text; a line break ends nothing."""
    tokenizer = byte_level()
    (end,) = tokenizer.find_special(CHATML.assistant_suffix)
    for layout, likely, reason in ((CHATML, end, "stop"), (ChatLayout(), tokenizer.encode("\n")[0], "length")):
        engine = build_engine(bias={likely: 50.0}, context=4000, text=tokenizer)
        engine.opened.notes["chat"] = to_json(layout)
        if layout == CHATML:
            engine.vocabulary = replace(engine.vocabulary, other_eos_ids=(end,))
        with serving(engine) as server, server.client() as client:
            body = {"messages": [{"role": "user", "content": "a bird"}], "max_tokens": 5, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert client.get("/v1/models").json()["data"][0]["chat"] == to_json(layout)
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("" if reason == "stop" else "\n" * 5, reason)
        parts = lay_out_prompt([Turn("user", ["a bird"])], layout)
        expected = [id_ for part in parts for id_ in tokenizer.encode(part.content, part.parse_special)]
        assert engine.model.calls[0].tokens[0].tolist() == [engine.vocabulary.bos, *expected]
        assert answer["usage"]["prompt_tokens"] == len(expected) + 1


def test_run_without_conversations_has_no_layout():
    """A captioner gets exactly its caption; several messages are one text."""
    engine = build_engine(text=byte_level())
    assert served_tokens([{"role": "user", "content": "three"}], engine)[0][1:] == [*byte_level().encode("three")]
    messages = [{"role": "system", "content": "wh"}, {"role": "user", "content": ""}, {"role": "user", "content": "at"}]
    assert served_tokens(messages, engine)[0][1:] == [*byte_level().encode("what")]
    assert byte_level().encode("what") != byte_level().encode("wh") + byte_level().encode("at")


# Prepared data and runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Conversations with images, texts, and a tokenizer with special tokens."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "tokenizer.json").write_text(byte_level().to_json())
    write_lines(folder / "talks.jsonl", [{"messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": inline(picture(n)[1])}},
                                     {"type": "text", "text": f"what is <|im_end|> {n}?"}]},
        {"role": "assistant", "content": "a bird\nin a nest"}, {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": f"yes {n}"},
    ]} for n in range(24)])  # fmt: skip
    write_lines(folder / "texts.jsonl", [{"text": f"<|im_end|> a bird {n}"} for n in range(24)])
    return folder


def prepared_with(folder: Path, out: Path, *names: str, **options):
    readers = [open_reader(f"{folder}/{name}.jsonl") for name in names]
    if "like" not in options:
        options = {"tokenizer": str(folder / "tokenizer.json"), "sizes": ("8x8",), "codec": "pixels"} | options
    prepare(readers, PrepareConfig(heldout=0, **options), out)
    return open_prepared(out)


@pytest.fixture(scope="module")
def chatml(folder):
    return prepared_with(folder, folder / "chatml", "talks", chat=CHATML)


def test_prepared_ids_have_special_tokens_of_the_layout_alone(chatml):
    tokenizer, start, end = chatml.tokenizer, *byte_level().find_special("<|im_start|><|im_end|>")
    source = chatml.source("talks", "train")
    for n in range(len(source)):
        tokens = [id_ for part in source[n].segments if isinstance(part, Text) for id_ in part.tokens]
        assert (tokens.count(start), tokens.count(end)) == (5, 5)  # the user's <|im_end|> is not one of them
        text = tokenizer.decode([id_ for id_ in tokens if id_ not in (start, end)])
        number = source.where(n).rpartition(":")[2]
        assert text == (
            f"system\nbe brief\nuser\nwhat is <|im_end|> {int(number) - 1}?\nassistant\na bird\nin a nest\nuser\nsure?\n"
            f"assistant\nyes {int(number) - 1}\n"
        )
        learnt = [tokenizer.decode(part.tokens) for part in source[n].segments if part.loss]
        assert learnt == ["a bird\nin a nest", "\n", f"yes {int(number) - 1}", "\n"]  # (the special token is not shown)


def test_other_documents_do_not_depend_on_the_layout(folder, tmp_path, chatml):
    both = prepared_with(folder, tmp_path / "both", "talks", "texts", chat=CHATML)
    alone = prepared_with(folder, tmp_path / "alone", "texts", like=str(folder / "chatml"))
    paths = [prepared.folder / "texts" / "train-00000.arrow" for prepared in (both, alone)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert both.chat_layout() == CHATML and both.chat_layout(["texts"]) is None and alone.chat_layout() is None
    assert all(tokens == byte_level().encode(f"<|im_end|> a bird {n}") for n, tokens in enumerate(
        both.source("texts", "train")[n].segments[0].tokens for n in range(24)))  # fmt: skip


def test_like_takes_the_layout_over(folder, tmp_path, chatml):
    other = prepared_with(folder, tmp_path / "other", "talks", like=str(folder / "chatml"))
    assert other.chat_layout() == CHATML
    assert read_json(tmp_path / "other" / "recipe.json")["settings"]["chat"] == to_json(CHATML)
    with pytest.raises(PrepareError, match="--chat declares another layout than .*chatml, which has system") as raised:
        prepared_with(folder, tmp_path / "wrong", "talks", like=str(folder / "chatml"), chat=LLAMA_3)
    assert "\n" not in str(raised.value)
    texts_only = prepared_with(folder, tmp_path / "texts", "texts", like=str(folder / "chatml"))
    declared = prepared_with(folder, tmp_path / "declared", "talks", like=str(texts_only.folder), chat=LLAMA_3)
    assert declared.chat_layout() == LLAMA_3  # the other folder has none


@pytest.mark.parametrize(("layout", "message"), [
    (replace(CHATML, assistant_suffix="[END]\n"), r"assistant-suffix '\[END\]\\n' has no special token .* <\|im_start"),
    (replace(CHATML, system_prefix="<|begin_of_text|>system\n"), "--chat.system-prefix .* contains the tokenizer's bos"),
    (replace(CHATML, user_suffix="<|pad|>"), "--chat.user-suffix .* contains the tokenizer's pad"),
])  # fmt: skip
def test_layout_that_cannot_be_used_is_refused_before_anything_is_written(folder, tmp_path, layout, message):
    with pytest.raises(PrepareError, match=message):
        prepared_with(folder, tmp_path / "out", "talks", chat=layout)
    assert prepared_with(folder, tmp_path / "out", "talks", chat=CHATML).chat_layout() == CHATML  # in the same folder
    with pytest.raises(PrepareError, match=message):
        prepared_with(folder, tmp_path / "like", "talks", chat=layout, like=str(prepared_with(
            folder, tmp_path / "texts", "texts", like=str(tmp_path / "out")).folder))  # fmt: skip


def test_eos_may_end_an_answer(folder, tmp_path):
    layout = replace(CHATML, assistant_suffix="<|end_of_text|>")
    prepared = prepared_with(folder, tmp_path / "out", "talks", chat=layout)
    run = chat_run(prepared.folder)
    description = RunFolder.draft(run, tmp_path / "run", None).description
    assert description.vocabulary.other_eos_ids == () and description.chat == layout


def test_source_with_a_few_conversations_has_the_layout(folder, tmp_path):
    lines = [(folder / name).read_text().splitlines(keepends=True) for name in ("texts.jsonl", "talks.jsonl")]
    (tmp_path / "mixed.jsonl").write_text("".join([*lines[0], *lines[1][:3]]))
    (tmp_path / "tokenizer.json").write_text(byte_level().to_json())
    mixed = prepared_with(tmp_path, tmp_path / "out", "mixed", chat=CHATML)
    assert mixed.metadata["sources"]["mixed"]["form"] == "text" and mixed.chat_layout() == CHATML
    end = byte_level().find_special("<|im_end|>")[0]
    source = mixed.source("mixed", "train")
    tokens = [[id_ for part in source[n].segments if isinstance(part, Text) for id_ in part.tokens] for n in range(27)]
    assert [ids.count(end) for ids in tokens] == [0] * 24 + [5] * 3


def test_layout_without_conversations_is_refused(folder, tmp_path):
    with pytest.raises(PrepareError, match="--chat has no effect: no source has conversations"):
        prepared_with(folder, tmp_path / "out", "texts", chat=CHATML)


def test_conversation_behind_any_number_of_other_records_has_the_layout(folder, tmp_path):
    """The form of a source is decided by its first records, not that of each record."""
    lines = [(folder / name).read_text().splitlines(keepends=True) for name in ("texts.jsonl", "talks.jsonl")]
    (tmp_path / "mixed.jsonl").write_text("".join([*(lines[0] * 10)[: 2 * NUM_SAMPLES], lines[1][0]]))
    (tmp_path / "tokenizer.json").write_text(byte_level().to_json())
    assert prepared_with(tmp_path, tmp_path / "out", "mixed", chat=CHATML).chat_layout() == CHATML
    reader, first = (open_reader(str(tmp_path / "mixed.jsonl"), ReaderOptions(limit=limit)) for limit in (None, NUM_SAMPLES))
    assert reader.has_conversations() and not first.has_conversations()


def test_older_folder_has_the_default_layout(folder, tmp_path):
    prepared_with(folder, tmp_path / "old", "talks")
    values = read_json(tmp_path / "old" / "dataset.json")
    assert values["settings"].pop("chat") == to_json(ChatLayout())
    write_json(tmp_path / "old" / "dataset.json", values)
    assert open_prepared(tmp_path / "old").chat_layout() == ChatLayout()


def chat_run(*folders: Path):
    run = small_run()
    return replace(run, data=DataConfig(prepared=tuple(map(str, folders)), seq_len=256))


def test_folders_with_different_layouts_are_refused(folder, tmp_path, chatml):
    texts_only = prepared_with(folder, tmp_path / "texts", "texts", like=str(chatml.folder))
    (folder / "other.jsonl").write_bytes((folder / "talks.jsonl").read_bytes())
    other = prepared_with(folder, tmp_path / "other", "other", like=str(texts_only.folder), chat=LLAMA_3)
    data = chat_run(chatml.folder, texts_only.folder, other.folder).data
    message = "chatml and .*other have different chat layouts .*: prepare .*other with --like"
    with pytest.raises(ValueError, match=message) as raised:
        chat_layout(data)
    assert "\n" not in str(raised.value)
    assert chat_layout(replace(data, sources=("talks", "texts"))) == CHATML
    assert chat_layout(replace(data, sources=("other", "texts"))) == LLAMA_3
    assert chat_layout(replace(data, sources=("texts",))) is None
    assert chat_layout(DataConfig(sources=("digits",))) is None


def test_run_keeps_the_layout_through_export_and_other_runs(folder, tmp_path, chatml):
    run_folder = RunFolder.draft(chat_run(chatml.folder), tmp_path / "run", None)
    run_folder.write()
    (end,) = byte_level().find_special("<|im_end|>")
    save(tmp_path / "run", 1, run_tensors(run_folder.run, 1), {"step": 1})
    resumed = RunFolder.draft(chat_run(chatml.folder), tmp_path / "run", None)
    assert resumed.encoder.vocabulary == run_folder.encoder.vocabulary
    export(tmp_path / "run", tmp_path / "exported")
    texts_only = prepared_with(folder, tmp_path / "texts", "texts", like=str(tmp_path / "exported"))
    start = ("run", str(tmp_path / "exported"))
    later = RunFolder.draft(chat_run(texts_only.folder), tmp_path / "later", start)
    reopened = map(describe_run, (tmp_path / "run", tmp_path / "exported"))
    for description in (run_folder.description, later.description, *reopened):
        assert description.chat == CHATML and description.vocabulary.eos_ids == (description.vocabulary.eos, end)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert r"| user | `'<|im_start|>user\n'` | `'<|im_end|>\n'` |" in card
    again = prepared_with(folder, tmp_path / "again", "talks", like=str(tmp_path / "exported"))
    assert again.chat_layout() == CHATML
    chat_layout(chat_run(chatml.folder, texts_only.folder).data)  # ends of answers do not make them incompatible
    engine = open_run(tmp_path / "exported")
    assert ServedRun(engine, Limits()).describe()["chat"] == to_json(CHATML)


def test_run_on_other_data_has_no_layout(written):
    opened = open_checkpoint(written, device="cpu")
    assert opened.chat is None


def test_command_line_declares_and_shows_the_layout(folder, tmp_path, capsys):
    options = [f"--chat.{name.replace('_', '-')}={text}".replace("\n", "\\n") for name, text in asdict(CHATML).items()]
    command("data", "prepare", folder / "talks.jsonl", "--out", tmp_path / "out", "--tokenizer", folder / "tokenizer.json",
            "--heldout", "0", *options)  # fmt: skip
    assert open_prepared(tmp_path / "out").chat_layout() == CHATML
    shown = r"user '<|im_start|>user\n' ... '<|im_end|>\n'"
    command("data", "stats", tmp_path / "out")
    assert shown in capsys.readouterr().out
    command("data", "inspect", tmp_path / "out", "--out", tmp_path / "page.html")
    assert "Chat layout: system" in (tmp_path / "page.html").read_text()
    command("data", "prepare", "--help")
    assert r"(default: '\n')" in capsys.readouterr().out
