"""The text of tokens while they are sampled."""

from transfusion.codecs.text import Tokenizer

REPLACEMENT = "\ufffd"  # a decoder writes it for an incomplete character


class TextStream:
    """Decodes the tokens of one text one by one. What `add` and `flush` return, joined, is the text of all of them.

    follows_text: is there text before this one, in the prompt or before an image? Decoders of SentencePiece's kind remove
    the space before the first word of a document, and only there.

    Only a window of the last tokens is decoded, so that the cost for a token does not grow with the text: tokens whose text
    is sent, as context, and those whose text is held back. `tokenizers.decoders.DecodeStream` has the same algorithm, but it
    raises an exception where a byte changes the text of the byte tokens before it, and has no end.
    """

    def __init__(self, tokenizer: Tokenizer, follows_text: bool):
        self.tokenizer = tokenizer
        self.window = list(tokenizer.encode("a")) if follows_text else []  # "a" stands for any text
        self._set_context()

    def add(self, token: int) -> str:
        """The text that is complete with this token, or nothing."""
        if not self.tokenizer.is_decoded(token):
            return ""
        self.window.append(token)
        if token in self.tokenizer.byte_ids:
            return ""
        text = self.flush()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            self.window = self.window[self.num_sent :]
            self._set_context()
        return text

    def flush(self) -> str:
        """The text that is held back. Nothing may be added after it."""
        return self.tokenizer.decode(self.window)[self.num_sent_characters :]

    def _set_context(self) -> None:
        """The text of the window is sent."""
        self.num_sent, self.num_sent_characters = len(self.window), len(self.tokenizer.decode(self.window))
