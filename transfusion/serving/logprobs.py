"""Log probabilities of tokens, in the shapes of OpenAI's two text APIs."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cache

from transfusion.codecs.text import Tokenizer
from transfusion.inference.request import TokenLogprob
from transfusion.sequence import Vocabulary


class TokenNames:
    """The texts of token ids; each is computed once. A token of some bytes of a character is written as
    "bytes:\\\\xe2\\\\x82"."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer):
        self.tokenizer, self.num_text_tokens = tokenizer, vocabulary.num_text_tokens
        self.bos, self.eos_ids = vocabulary.bos, vocabulary.eos_ids
        self.markers = {vocabulary.bos: "<bos>", vocabulary.eos: "<eos>", vocabulary.eoi: "<eoi>", vocabulary.pad: "<pad>"}
        self.markers |= {id_: f"<boi {x}x{y}>" for (y, x), id_ in vocabulary.boi.items()}
        self.bytes_of, self.name = cache(self._bytes_of), cache(self._name)

    def _bytes_of(self, token: int) -> bytes:
        """What it adds to a text. Nothing for bos, eos and other special tokens."""
        return self.tokenizer.token_bytes(token) if token < self.num_text_tokens else b""

    def _name(self, token: int) -> str:
        content = self.bytes_of(token)
        if not content:
            return self.markers.get(token) or self.tokenizer.token_name(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def format_chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> dict:
    """`logprobs` of a choice of /v1/chat/completions. Without eos, which is not part of the message."""

    def describe(token: int, logprob: float) -> dict:
        return {"token": names.name(token), "logprob": logprob, "bytes": list(names.bytes_of(token))}

    content = [
        describe(entry.token, entry.logprob) | {"top_logprobs": [describe(*pair) for pair in entry.top]}
        for entry in entries if entry.token not in names.eos_ids
    ]  # fmt: skip
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Formats `logprobs` of one choice of /v1/completions. It remembers how long the text before the next token is."""

    def __init__(self, names: TokenNames):
        self.names, self.decoder, self.offset = names, getincrementaldecoder("utf-8")("replace"), 0

    def format(self, entries: Sequence[TokenLogprob | int]) -> dict:
        """An entry is only a token id if its log probability is unknown. Eos is included: lm_eval counts on an entry for
        each sampled token. top_logprobs has the token of the text too; of tokens with the same name, the most likely."""
        result: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token, logprob, top = (entry, None, ()) if isinstance(entry, int) else entry
            by_name: dict[str, float] = {}
            for other, value in (*top, (token, logprob)) if top else ():
                by_name.setdefault(self.names.name(other), value)
            result["tokens"].append(self.names.name(token))
            result["token_logprobs"].append(logprob)
            result["top_logprobs"].append(by_name or None)
            result["text_offset"].append(self.offset)
            self.offset += len(self.decoder.decode(self.names.bytes_of(token)))
        return result
