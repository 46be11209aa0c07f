"""Text to token ids and back: byte-pair encoding with the `tokenizers` library, trained here or from a tokenizer.json."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Encoding, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from transfusion.disk import CONFIG, OpenError, read_json
from transfusion.fields import short_repr

SPELLINGS = {  # of the special tokens that `sequence` uses, where no file names them
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
}
# The files beside a tokenizer.json that name them: by id (eos_token_id: 2), or by spelling (eos_token: "</s>").
NAMING_FILES = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# Byte-level tokenizers spell each byte as one character: printable ones as in Latin-1, the others from U+0100.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE}
BYTE_LEVEL |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Encodes text that spells a special token as plain text; only `sequence` adds special ids.

    markers: the ids of bos, eos and pad, as far as they are known, and `other_eos_ids`: the arguments of `Vocabulary.build`.
    byte_ids: ids of single bytes (`<0x0A>`), whose text depends on the bytes beside them.
    """

    def __init__(self, tokenizer: HFTokenizer, markers: dict | None = None):
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
        self.byte_ids = {vocab[token] for token in (f"<0x{byte:02X}>" for byte in range(256)) if token in vocab}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.markers = self._spelled_markers({}) if markers is None else markers

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
    def from_json(cls, text: str, markers: dict | None = None) -> "Tokenizer":
        """From the content of a tokenizer.json. `markers`: those in use; by default they are recognised by their spelling.
        ValueError when it is not a tokenizer."""
        try:
            return cls(HFTokenizer.from_str(text), markers)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """From a tokenizer.json. Its markers are those that NAMING_FILES in the same folder name, then those of a known
        spelling. A bos that is missing beside a named eos is this eos: it separates documents in the model's training.
        ValueError when the file cannot be read, OpenError when a name is wrong."""
        try:
            tokenizer = cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read a tokenizer from {path}: {str(error).splitlines()[0]}") from None
        named = tokenizer._named_markers(path.parent)
        default_bos = {"bos": named["eos"]} if "eos" in named else {}
        tokenizer.markers = default_bos | tokenizer._spelled_markers(named)
        return tokenizer

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def _named_markers(self, folder: Path) -> dict:
        """The markers that the files of a folder name. Every named eos ends an answer, and a document ends with the first.
        Of several bos the last is used: `transformers` begins texts with the tokenizer's. One token may be bos, eos and
        pad."""
        named: dict[str, list[int]] = {"bos": [], "eos": [], "pad": []}
        for name in NAMING_FILES:
            values = read_json(folder / name) if (folder / name).exists() else {}
            added = values.get("added_tokens_decoder")
            added = [*added.values()] if isinstance(added, dict) else []
            added = [token.get("content") for token in added if isinstance(token, dict)]
            for marker, ids in named.items():
                by_id, by_spelling = values.get(f"{marker}_token_id"), values.get(f"{marker}_token")
                for value in by_id if isinstance(by_id, list) else [by_id]:
                    if value not in (None, -1):  # -1: none, in early Llama files
                        ids.append(self._special_id(value, f"{folder / name}: {marker}_token_id"))
                if isinstance(by_spelling, dict):
                    by_spelling = by_spelling.get("content")
                is_ours = by_spelling in added and self._tokenizer.token_to_id(by_spelling) is None  # in an exported run
                if by_spelling is not None and not is_ours:
                    ids.append(self._special_id(by_spelling, f"{folder / name}: {marker}_token"))
        eos = [*dict.fromkeys(named["eos"])]
        markers = {"bos": named["bos"][-1:], "eos": eos, "pad": named["pad"]}
        return {marker: ids[0] for marker, ids in markers.items() if ids} | ({"other_eos_ids": eos[1:]} if eos[1:] else {})

    def _special_id(self, value: object, place: str) -> int:
        """The id of a special token, from its id or its spelling. OpenError for an unknown token, and for an ordinary one:
        text may contain it."""
        id_ = self._tokenizer.token_to_id(value) if isinstance(value, str) else value
        if type(id_) is not int or id_ not in self._special_ids:
            raise OpenError(f"{place} is {value!r}, which is no special token of tokenizer.json: correct one of the files")
        return id_

    def _spelled_markers(self, markers: dict) -> dict:
        """These markers, and the missing ones that have a known spelling. No id gets a second role."""
        for marker, names in SPELLINGS.items():
            ids = map(self._tokenizer.token_to_id, names)
            free = [id_ for id_ in ids if id_ in self._special_ids and id_ not in markers.values()]
            markers = {marker: free[0]} | markers if free else markers
        return markers

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, parse_special: bool = False) -> tuple[int, ...]:
        """The ids of a text; `parse_special`: special tokens in it become their ids, instead of plain text. ValueError for
        text with a lone surrogate."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[tuple[int, ...]]:
        """The ids of each text, as `encode`. Other threads run meanwhile: the library's encode_batch releases the
        interpreter's lock, its `encode` does not. Many texts in one call are faster: each call wakes other threads."""
        tokenizer = self._special_parser if parse_special else self._tokenizer
        try:
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        except TypeError:  # the library does not name the reason
            text = next(text for text in texts if _SURROGATE.search(text))
            raise ValueError(f"{short_repr(text)} is not valid Unicode (it has a lone surrogate)") from None
        if parse_special:
            return [tuple(encoding.ids) for encoding in encodings]
        return [self._without_special(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _without_special(self, text: str, encoding: Encoding) -> tuple[int, ...]:
        """Its ids. Word-level models find special tokens in the text: encode those character by character."""
        if not self._special_ids.intersection(encoding.ids):
            return tuple(encoding.ids)
        ids: list[int] = []
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

    def is_decoded(self, token: int) -> bool:
        """Has this id a text? Special tokens and ids that the tokenizer lacks have none."""
        return token not in self._special_ids and self._tokenizer.id_to_token(token) is not None

    def token_name(self, token: int) -> str:
        """Its entry in the vocabulary; nothing for an id that has none."""
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text in UTF-8: some bytes of a character alone, if the tokenizer has such tokens. Nothing
        for a special token."""
        name = self.token_name(token)
        if not self.is_decoded(token):
            return b""
        if token in self.byte_ids:
            return bytes([int(name[3:5], 16)])
        once, twice = self.decode([token]), self.decode([token, token])  # decoders may remove the space before the first
        text = twice[len(once) :]
        is_incomplete = "\ufffd" in text and BYTE_LEVEL.keys() >= {*name}
        return bytes(map(BYTE_LEVEL.get, name)) if is_incomplete else text.encode()

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)
