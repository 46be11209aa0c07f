"""Text to token ids and back: byte-pair encoding with the `tokenizers` library, trained here or from a tokenizer.json."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

MARKERS = {  # names of the special tokens that `sequence` uses
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
}


class Tokenizer:
    """Encodes text that spells a special token as plain text; only `sequence` adds special ids."""

    def __init__(self, tokenizer: HFTokenizer):
        values, vocab = json.loads(tokenizer.to_str()), tokenizer.get_vocab(with_added_tokens=False)
        values["added_tokens"] = [  # a single character that the model also has is text: Gemma adds its newline
            token for token in values.get("added_tokens") or ()
            if token["special"] or len(token["content"]) > 1 or token["content"] not in vocab
        ]  # fmt: skip
        for token in values["added_tokens"]:
            token["special"] = True  # `encode_special_tokens` treats only special tokens as text
        self._tokenizer = HFTokenizer.from_str(json.dumps(values))
        self._tokenizer.encode_special_tokens = True
        self._special_ids = {token["id"] for token in values["added_tokens"]}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "Tokenizer":
        """Byte-level BPE with at most `size` ids; decoding returns any text exactly. ValueError when size < 256."""
        tokenizer = HFTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if size < len(alphabet):
            raise ValueError(f"data.tokenizer_size must be at least {len(alphabet)}, one per byte, not {size}")
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        )
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """From the content of a tokenizer.json. ValueError when it is not one."""
        try:
            return cls(HFTokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """From a tokenizer.json. ValueError names the file when it cannot be read."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read a tokenizer from {path}: {str(error).splitlines()[0]}") from None

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    @property
    def markers(self) -> dict[str, int]:
        """The ids of bos, eos and pad, for those that the tokenizer has. No id has two roles."""
        markers: dict[str, int] = {}
        for marker, names in MARKERS.items():
            ids = (self._tokenizer.token_to_id(name) for name in names)
            marker_id = next((id_ for id_ in ids if id_ in self._special_ids and id_ not in markers.values()), None)
            markers |= {} if marker_id is None else {marker: marker_id}
        return markers

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, parse_special: bool = False) -> tuple[int, ...]:
        """The ids of a text; `parse_special`: special tokens in it become their ids, instead of plain text."""
        if parse_special:
            return tuple(self._special_parser.encode(text, add_special_tokens=False).ids)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._special_ids.intersection(encoding.ids):
            return tuple(encoding.ids)
        ids: list[int] = []  # word-level models find special tokens in the text: encode those character by character
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            ids += self._encode_characters(text[start:end]) if id_ in self._special_ids else [id_]
        return tuple(ids)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as text, by id."""
        return [self._tokenizer.id_to_token(id_) for id_ in sorted(self._special_ids)]

    def find_special(self, text: str) -> list[int]:
        """The ids of the special tokens in a text, in order."""
        return [id_ for id_ in self.encode(text, parse_special=True) if id_ in self._special_ids]

    @cached_property
    def _special_parser(self) -> HFTokenizer:
        return HFTokenizer.from_str(self.to_json())  # a copy: `encode_special_tokens` is not stored in it

    def _encode_characters(self, word: str) -> list[int]:
        ids = (id_ for character in word for id_ in self._tokenizer.encode(character, add_special_tokens=False).ids)
        return [id_ for id_ in ids if id_ not in self._special_ids]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)
