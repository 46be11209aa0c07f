"""Prepared data on the disk: documents as ids and latents in Arrow files, which any of them can be read from alone.

A prepared folder holds `dataset.json` (what it is, counts, hashes), `tokenizer.json`, `codec.safetensors`,
`quarantine.jsonl` (what was left out, and why), and for each source a folder of shards: `train-00000.arrow`,
`heldout-00000.arrow` (Arrow streams, mapped into memory, also read by `datasets`), `00000.json` (what is in them).
A document is one row of `schema`; latents are float16, already normalised, and codes (of a VQ codec) int32. Held-out
documents also keep their pictures, for drawings are measured beside those and not beside what the codec makes of them.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.pictures import pixels_of, read_picture, to_png
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.disk import OpenError, check_prepared, read_checked, read_json, sha256_of
from transfusion.sequence import Document, Image, Text, Vocabulary

FORMAT = 3  # of a prepared folder; another number is refused
SPLITS = ("train", "heldout")
BATCH = 64 * 2**20  # bytes of latents after which a batch of documents is written
OPEN = 4096  # shards that are kept mapped

SEGMENT = pa.struct([
    ("image", pa.bool_()), ("loss", pa.bool_()), ("max_t", pa.float32()),
    ("tokens", pa.int32()),  # how many, of a text
    ("height", pa.int32()), ("width", pa.int32()),  # of an image's latent
])  # fmt: skip


def schema(codes: bool) -> pa.Schema:
    """The columns of documents whose images are latents, or codes."""
    return pa.schema([
        ("where", pa.string()),  # file and row it came from
        ("name", pa.string()),  # the id its source gave it, if any
        ("pairs", pa.bool_()),
        ("segments", pa.list_(SEGMENT)),
        ("tokens", pa.list_(pa.int32())),  # of all its texts, one after the other
        # (C, Y, X) or (Y, X) of all its images, one after the other
        ("codes", pa.list_(pa.int32())) if codes else ("latents", pa.list_(pa.float16())),
        ("pictures", pa.list_(pa.binary())),  # of a held-out document, its images as they were before the codec: PNG
    ])  # fmt: skip


class ShardWriter:
    """Documents to one Arrow stream. The file is there under its name only when `close` has ended well."""

    def __init__(self, path: Path, codes: bool = False):
        self.path, self.aside = path, path.with_name(path.name + ".tmp")
        self.schema, self.content = schema(codes), np.dtype(np.int32 if codes else np.float16)
        self.file = self.aside.open("wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        self.rows: list[tuple] = []  # in the order of the schema
        self.size = self.count = 0

    def add(self, document: Document, where: str, name: str, pictures: Sequence[np.ndarray] = ()) -> None:
        """A document, and its pictures (Y, X, channels) uint8 where they are kept."""
        segments, tokens, contents = [], [], []
        for part in document.segments:
            if isinstance(part, Text):
                tokens += part.tokens
                segments.append((False, part.loss, 1.0, len(part.tokens), 0, 0))
            else:
                contents.append(part.content.astype(self.content).ravel())
                segments.append((True, part.loss, part.max_t, 0, *part.shape))
        numbers = np.concatenate(contents) if contents else np.empty(0, self.content)
        kept = [to_png(pixels) for pixels in pictures]
        self.rows.append((where, name or None, document.pairs, segments, np.array(tokens, np.int32), numbers, kept))
        self.size, self.count = self.size + numbers.nbytes + sum(map(len, kept)), self.count + 1
        if self.size >= BATCH:
            self._flush()

    def close(self) -> str:
        """Everything on the disk, under its name; returns its SHA-256."""
        self._flush()
        self.stream.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)
        return sha256_of(self.path)

    def abandon(self) -> None:
        """Nothing of it stays."""
        self.file.close()
        self.aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self.rows:
            where, name, pairs, segments, tokens, contents, pictures = zip(*self.rows, strict=True)
            lengths = [len(parts) for parts in segments]
            parts = pa.array([part for document in segments for part in document], SEGMENT)
            columns = [
                pa.array(where, pa.string()), pa.array(name, pa.string()), pa.array(pairs, pa.bool_()),
                _lists(lengths, parts),
                _lists(map(len, tokens), pa.array(np.concatenate(tokens))),
                _lists(map(len, contents), pa.array(np.concatenate(contents))),
                _lists(map(len, pictures), pa.array([png for kept in pictures for png in kept], pa.binary())),
            ]  # fmt: skip
            self.stream.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows, self.size = [], 0


def _lists(lengths: Iterable[int], values: pa.Array) -> pa.ListArray:
    """Values cut into lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array([0, *accumulate(lengths)], pa.int32()), values)


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened: what its documents were made with, and its sources."""

    folder: Path
    about: dict  # dataset.json
    tokenizer: Tokenizer
    codec: Codec | VQ

    @property
    def names(self) -> tuple[str, ...]:
        """Its sources, in the order in which they were given."""
        return tuple(self.about["sources"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every latent shape (Y, X) that occurs."""
        shards = (shard for source in self.about["sources"].values() for shard in source["shards"])
        return sorted({_shape(name) for shard in shards for name in shard["unbreakable"]})

    def source(self, name: str, split: str) -> "Stored":
        """The training or held-out documents of one of its sources."""
        return Stored(self, name, split)

    def verify(self) -> None:
        """Read everything: each shard has the SHA-256 of the day it was written. OpenError names the first that has not."""
        for name, source in self.about["sources"].items():
            for shard in source["shards"]:
                for file, digest in shard["sha256"].items():
                    path = self.folder / name / file
                    if not path.is_file():
                        raise OpenError(f"{path} is missing")
                    if sha256_of(path) != digest:
                        raise OpenError(f"{path} was changed since it was written: its SHA-256 is not the recorded one")


def open_prepared(folder: Path) -> Prepared:
    """A prepared folder. OpenError when it is none, is not finished, is of another format, or was changed."""
    about = read_json(check_prepared(folder) / "dataset.json")
    if about.get("format") != FORMAT:
        written = (about.get("versions") or {}).get("transfusion", "unknown")
        raise OpenError(f"{folder} was prepared in format {about.get('format')} by transfusion {written}; "
                        f"this version reads format {FORMAT}: prepare it again")  # fmt: skip
    try:
        tokenizer = Tokenizer.from_json(read_checked(folder / "tokenizer.json", about["tokenizer"]["sha256"]).decode())
        codec = codec_from_bytes(
            about["codec"]["kind"], read_checked(folder / "codec.safetensors", about["codec"]["sha256"])
        )
        return Prepared(folder, about, tokenizer, codec)
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{folder / 'dataset.json'} is damaged: {error!r}") from None


class Stored:
    """The documents of one source and split, by number. What they hold is mapped, not read, until it is used."""

    def __init__(self, prepared: Prepared, name: str, split: str):
        self.prepared, self.name, self.split = prepared, name, split
        self.about = prepared.about["sources"][name]
        self.depth = () if isinstance(prepared.codec, VQ) else (prepared.codec.channels,)  # of an image, before Y and X
        self._counts = [shard["documents"][split] for shard in self.about["shards"]]
        self._ends = list(accumulate(self._counts))
        self._shard = lru_cache(maxsize=OPEN)(self._open_shard)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, id: int) -> Document:
        if not 0 <= id < len(self):
            raise IndexError(f"{self.name} ({self.split}) has documents 0 to {len(self) - 1}, not {id}")
        batch, row = self._find(id)
        try:
            return batch.document(row, id, self.name, self.depth)
        except (ValueError, IndexError) as error:
            raise OpenError(f"document {id} of {self.name} ({self.split}) is damaged: {error}") from None

    def where(self, id: int) -> str:
        """File and row from which the document came."""
        batch, row = self._find(id)
        return batch.where[row].as_py()

    def pictures(self, id: int) -> list[np.ndarray]:
        """The pictures (Y, X, channels) uint8 of a held-out document as they were before the codec; of any other none."""
        batch, row = self._find(id)
        return [pixels_of(read_picture(png, f"in {self.where(id)}")) for png in batch.pictures[row].as_py()]

    def mean_positions(self, vocabulary: Vocabulary, dropped: float = 0.0) -> float:
        """Positions of a document on average, where this share of the single captions is dropped."""
        shards, documents = self.about["shards"], max(1, len(self))
        tokens, captions = (sum(shard[what][self.split] for shard in shards) for what in ("tokens", "caption_tokens"))
        images = sum(
            count * (vocabulary.patches(_shape(name)) + 2)
            for shard in shards for name, count in shard["images"][self.split].items()
        )  # fmt: skip
        return 2 + (tokens - dropped * captions + images) / documents

    def shortest_row(self, vocabulary: Vocabulary) -> int:
        """The row length that holds every image with its caption, which are never cut apart."""
        return max((
            length + vocabulary.patches(_shape(name))
            for shard in self.about["shards"] for name, length in shard["unbreakable"].items()
        ), default=1)  # fmt: skip

    def _find(self, id: int) -> tuple["_Batch", int]:
        number = bisect_right(self._ends, id)
        row = id - (self._ends[number - 1] if number else 0)
        skipped = self.about["shards"][number].get("skipped", {}).get(self.split, ())
        for skip in skipped:  # sorted: each that lies before moves the row on
            row += skip <= row
        batches = self._shard(number)
        for batch in batches:
            if row < batch.rows:
                return batch, row
            row -= batch.rows
        raise OpenError(f"{self._path(number)} holds fewer documents than dataset.json says")

    def _path(self, number: int) -> Path:
        return self.prepared.folder / self.name / f"{self.split}-{number:05d}.arrow"

    def _open_shard(self, number: int) -> list["_Batch"]:
        path = self._path(number)
        try:
            return [_Batch(batch) for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise OpenError(
                f"cannot read {path}: {reason}; transfusion data validate {self.prepared.folder} checks all shards"
            ) from None


def _shape(name: str) -> tuple[int, int]:
    """"8x6" -> (8, 6), the height and the width of a latent."""
    height, width = map(int, name.split("x"))
    return height, width


class _Batch:
    """Some documents of a shard, their columns as arrays that lie in the mapped file."""

    def __init__(self, batch: pa.RecordBatch):
        if not any(batch.schema.equals(schema(codes)) for codes in (False, True)):
            raise ValueError("its columns are not those of a shard")
        batch.validate(full=True)  # offsets that point nowhere would be read all the same
        self.rows = len(batch)
        self.where = batch.column("where")
        self.pairs = batch.column("pairs").to_numpy(zero_copy_only=False)
        segments, tokens, contents, self.pictures = (batch.column(number) for number in (3, 4, 5, 6))
        self.segment_at, self.token_at, self.content_at = (
            column.offsets.to_numpy() for column in (segments, tokens, contents)
        )
        parts = [segments.values.field(n).to_numpy(zero_copy_only=False) for n in range(SEGMENT.num_fields)]
        self.segments = list(zip(*(part.tolist() for part in parts), strict=True))
        self.tokens, self.contents = tokens.values.to_numpy(), contents.values.to_numpy()

    def document(self, row: int, id: int, source: str, depth: tuple[int, ...]) -> Document:
        at_token, at_content = int(self.token_at[row]), int(self.content_at[row])
        found: list[Text | Image] = []
        for image, loss, max_t, tokens, Y, X in self.segments[self.segment_at[row] : self.segment_at[row + 1]]:
            if image:
                shape = (*depth, Y, X)
                end = at_content + math.prod(shape)
                found.append(Image(self.contents[at_content:end].reshape(shape), loss, max_t))
                at_content = end
            else:
                end = at_token + tokens
                found.append(Text(tuple(self.tokens[at_token:end].tolist()), loss))
                at_token = end
        return Document(tuple(found), id, source, pairs=bool(self.pairs[row]))


class DecodedSource:
    """A stored source as a person would see it: text from its ids, pictures as they were where they are kept, otherwise as
    the codec gives them back."""

    def __init__(self, stored: Stored):
        self.stored, self.name = stored, stored.name

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, id: int) -> RawDocument:
        document, tokenizer = self.stored[id], self.stored.prepared.tokenizer
        images = (part for part in document.segments if isinstance(part, Image))
        pixels = iter(self.stored.pictures(id) or map(self._decode, images))
        segments = tuple(
            RawText(tokenizer.decode(part.tokens), part.loss) if isinstance(part, Text)
            else RawImage(next(pixels), part.loss, part.max_t) for part in document.segments
        )  # fmt: skip
        return RawDocument(segments, id, document.pairs, where=self.stored.where(id))

    def _decode(self, image: Image) -> np.ndarray:
        content = image.content if image.is_codes else image.content.astype(np.float32)
        return self.stored.prepared.codec.decode(content)
