"""Text to ids and back: byte-pair encoding through the `tokenizers` library, trained here or brought along."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

MARKERS = {  # what the special tokens are called that `sequence` can reuse
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
}


class Tokenizer:
    """Text that spells a special token is plain text, always: ids with a meaning are only ever put in by `sequence`."""

    def __init__(self, engine: Engine):
        values, known = json.loads(engine.to_str()), engine.get_vocab(with_added_tokens=False)
        values["added_tokens"] = [  # a single letter that the model itself can write is text: Gemma lists its newline here
            token for token in values.get("added_tokens") or ()
            if token["special"] or len(token["content"]) > 1 or token["content"] not in known
        ]  # fmt: skip
        for token in values["added_tokens"]:
            token["special"] = True  # only special tokens can be told to stay plain text
        self._engine = Engine.from_str(json.dumps(values))
        self._engine.encode_special_tokens = True
        self._special = {token["id"] for token in values["added_tokens"]}
        self._engine.no_truncation()
        self._engine.no_padding()

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "Tokenizer":
        """Byte-level BPE of at most `size` ids: any text can be written and read back to the byte."""
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if size < len(alphabet):
            raise ValueError(f"data.tokenizer_size must be at least {len(alphabet)}, one per byte, not {size}")
        engine.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        )
        return cls(engine)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """A `tokenizer.json`, ours or anyone's. ValueError when it is not one."""
        try:
            return cls(Engine.from_str(text))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """The same from a file. ValueError names it when it is none."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read a tokenizer from {path}: {str(error).splitlines()[0]}") from None

    def to_json(self) -> str:
        return self._engine.to_str()

    @property
    def markers(self) -> dict[str, int]:
        """The ids of its own bos, eos and pad, as far as it has them, each with one meaning only."""
        found: dict[str, int] = {}
        for marker, names in MARKERS.items():
            ids = (self._engine.token_to_id(name) for name in names)
            own = next((id_ for id_ in ids if id_ in self._special and id_ not in found.values()), None)
            found |= {} if own is None else {marker: own}
        return found

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._engine.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> tuple[int, ...]:
        found = self._engine.encode(text, add_special_tokens=False)
        if not self._special.intersection(found.ids):
            return tuple(found.ids)
        ids: list[int] = []  # some models look up whole words, special ones too: spell those letter by letter
        for id_, (begin, end) in zip(found.ids, found.offsets, strict=True):
            ids += self._spell(text[begin:end]) if id_ in self._special else [id_]
        return tuple(ids)

    def _spell(self, word: str) -> list[int]:
        spelt = (id_ for letter in word for id_ in self._engine.encode(letter, add_special_tokens=False).ids)
        return [id_ for id_ in spelt if id_ not in self._special]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._engine.decode(list(tokens), skip_special_tokens=True)
