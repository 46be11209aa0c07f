"""The text of tokens while they are sampled."""

from collections.abc import Sequence

from transfusion.codecs.text import Tokenizer


class TextStream:
    """Decodes tokens one by one. The texts of `add` and `flush`, joined, are what the tokens add to the text before them.

    Only a window of the last tokens is decoded: those whose text is sent last, as context (a decoder may remove the space
    before the first token), and those whose text is not sent yet. So the cost does not grow with the text. This is the
    algorithm of `tokenizers.decoders.DecodeStream`, which repeats the context when it ends with an incomplete character,
    and fails when bytes after a complete character make it incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]):
        self.tokenizer = tokenizer
        self.window = list(context)
        self.num_sent = len(self.window)  # tokens of the window whose text is sent

    def add(self, token: int) -> str:
        """The text that is complete with this token, or nothing."""
        self.window.append(token)
        return "" if self.tokenizer.may_end_inside_character(token) else self._take(hold_incomplete=True)

    def flush(self) -> str:
        """The text that is held back, at the end of a text."""
        return self._take(hold_incomplete=False)

    def _take(self, hold_incomplete: bool) -> str:
        before, text = (self.tokenizer.decode(tokens) for tokens in (self.window[: self.num_sent], self.window))
        if hold_incomplete and text.endswith("\ufffd"):
            return ""
        start = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
        if start < len(text):
            self.window = self.window[self.num_sent :]
            self.num_sent = len(self.window)
        return text[start:]
