"""Streamed text equals the text of all tokens, for every kind of tokenizer and any ids."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from tests.profile import examples
from tests.tiny import build_engine, picture
from transfusion.codecs.text import Tokenizer
from transfusion.inference.request import ImageEvent, Request, TokenEvent
from transfusion.inference.text_stream import TextStream
from transfusion.sequence import Text

some = examples(400, quick=60)
few = examples(25, quick=8)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["cat", "c", "a", "t", "é", "日", "\ufffd", ".", ",", "'s", "n't", "the"]
LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def spaced(mark: str) -> list[str]:
    """Words without and with a mark for the space before them, and marks alone."""
    return [*WORDS, *(mark + word for word in WORDS), mark, mark * 2]


def build(model, decoder, pre_tokenizer=None) -> Tokenizer:
    library = HFTokenizer(model)
    library.decoder = decoder
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens([AddedToken("<x>", special=False)])
    return Tokenizer.from_json(library.to_str())


@cache
def build_tokenizer(kind: str) -> Tokenizer:
    def number(tokens):
        return {token: n for n, token in enumerate(tokens)}

    def pieces(byte_fallback: bool):  # whole words are likelier than their letters
        return models.Unigram([(piece, -30.0 / len(piece)) for piece in (*BYTES, *spaced("▁"))], 0, byte_fallback)

    match kind:
        case "byte level":
            tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ã©", "Ġa", "æĹ", "æĹ¥", "ï¿½", "Ġï¿½", "Ã©Ġ", "©Ġ"]
            return build(models.BPE(number(tokens), []), decoders.ByteLevel(), pre_tokenizers.ByteLevel(False))
        case "llama 2":
            return build(pieces(True), LLAMA_2, pre_tokenizers.Metaspace())
        case "gemma":
            return build(pieces(True), GEMMA, pre_tokenizers.Metaspace(prepend_scheme="never"))
        case "metaspace":
            return build(pieces(False), decoders.Metaspace(), pre_tokenizers.Metaspace())
        case "word pieces":
            model = models.WordPiece(number(["[UNK]", *spaced("##")]), unk_token="[UNK]")
            return build(model, decoders.WordPiece(), pre_tokenizers.BertPreTokenizer())
        case "suffixes":
            words = [*WORDS, *(word + "</w>" for word in WORDS)]
            return build(models.BPE(number(words), [], end_of_word_suffix="</w>"), decoders.BPEDecoder("</w>"))
        case "words":
            return build(models.WordLevel(number(WORDS), "cat"), decoders.Fuse(), pre_tokenizers.Whitespace())


KINDS = ["byte level", "llama 2", "gemma", "metaspace", "word pieces", "suffixes", "words"]
kinds = pytest.mark.parametrize("kind", KINDS)


def decode_after(tokenizer: Tokenizer, tokens: list[int], follows_text: bool) -> str:
    """The text of these tokens, alone or after a word."""
    before = list(tokenizer.encode("a")) if follows_text else []
    text = tokenizer.decode([*before, *tokens])
    assert text.startswith(tokenizer.decode(before))
    return text.removeprefix(tokenizer.decode(before))


def stream(tokenizer: Tokenizer, tokens: list[int], follows_text: bool) -> str:
    text_stream = TextStream(tokenizer, follows_text)
    return "".join([*map(text_stream.add, tokens), text_stream.flush()])


@kinds
@some
@given(st.data(), st.booleans())
def test_streamed_text_is_the_text_of_all_tokens(kind, data, follows_text):
    """Of any ids; those beyond the tokenizer's have no text."""
    tokenizer = build_tokenizer(kind)
    parts_of_characters = [tokenizer.encode(character) for character in "A日é"]
    special = range(tokenizer.size - 3, tokenizer.size)
    frequent = {0xFF % tokenizer.size, *special, tokenizer.size, *(id_ for ids in parts_of_characters for id_ in ids)}
    ids = st.sampled_from(sorted(frequent)) | st.integers(0, tokenizer.size)
    tokens = data.draw(st.lists(ids, max_size=20))
    assert stream(tokenizer, tokens, follows_text) == decode_after(tokenizer, tokens, follows_text)


@kinds
@some
@given(st.text("catthe é日\ufffd.,'n\n", max_size=12))
def test_encoded_text_is_streamed_as_it_is_decoded(kind, text):
    tokenizer = build_tokenizer(kind)
    ids = list(tokenizer.encode(text))
    assert stream(tokenizer, ids, False) == tokenizer.decode(ids)
    if kind == "byte level":
        assert stream(tokenizer, ids, True) == text


@kinds
def test_text_is_sent_with_the_token_that_completes_it(kind):
    tokenizer = build_tokenizer(kind)
    texts = list(map(TextStream(tokenizer, True).add, tokenizer.encode("cat the cat")))
    assert all(texts)


def test_cost_for_a_token_does_not_grow_with_the_text():
    """Ids that are decoded for each new token."""
    tokenizer, num_decoded = Tokenizer.from_json(build_tokenizer("llama 2").to_json()), []
    ids = list(tokenizer.encode("cat the 日 é, cat " * 200))
    decode = tokenizer.decode
    tokenizer.decode = lambda tokens: num_decoded.append(len(tokens)) or decode(tokens)
    assert stream(tokenizer, ids, True) == decode_after(build_tokenizer("llama 2"), ids, True)
    assert len(ids) > 1000
    assert sum(num_decoded) < 20 * len(ids)


# In the engine


def texts_and_ids(request: Request) -> list[tuple[str, list[int]]]:
    """Each text of an answer, and its ids. It has texts and images in turn, with a tokenizer of Llama 2's kind."""
    engine = build_engine(lambda v: {v.eos: -1e4} | dict.fromkeys(v.boi.values(), 2.0), text=build_tokenizer("llama 2"))
    ((answer,),) = engine.generate([request])
    engine.submit(request)
    texts, ids = [""], [[]]
    while engine.sequences:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                texts[-1] += event.text
                ids[-1].append(event.token)
            elif isinstance(event, ImageEvent):
                texts.append("")
                ids.append([])
    assert [part for part in answer.parts if isinstance(part, str)] == [text for text in texts if text]
    return list(zip(texts, ids, strict=True))


@few
@given(st.text("cat the", min_size=1, max_size=8), st.booleans(), st.integers(0, 1000))
def test_texts_of_an_answer_keep_their_first_space(prompt, as_ids, seed):
    """After the prompt, and after each image."""
    tokenizer = build_tokenizer("llama 2")
    request = Request(Text(tokenizer.encode(prompt)) if as_ids else prompt, seed=seed)
    for text, ids in texts_and_ids(request):
        assert text == decode_after(tokenizer, ids, True)


@few
@given(st.integers(0, 1000))
def test_first_text_of_a_document_is_decoded_from_its_beginning(seed):
    """The prompt is a picture."""
    tokenizer, follows_text = build_tokenizer("llama 2"), False
    for text, ids in texts_and_ids(Request(picture((4, 4), 0), seed=seed)):
        assert text == decode_after(tokenizer, ids, follows_text)
        follows_text |= bool(ids)


def test_first_word_of_an_answer_keeps_its_space():
    """https://github.com/InternLM/lmdeploy/issues/1743"""
    tokenizer = build_tokenizer("llama 2")
    (cat,) = tokenizer.encode("cat")
    for prompt, expected in (("the", " cat cat cat"), (picture((4, 4), 0), "cat cat cat")):
        engine = build_engine({cat: 1e4}, text=tokenizer)
        options = engine.make_generation_config(max_tokens=3)
        ((answer,),) = engine.generate([Request(prompt, generation=options)])
        assert answer.parts == [expected]
