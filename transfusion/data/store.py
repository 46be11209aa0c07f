"""Prepared data on disk: documents as ids and latents in memory-mapped Arrow files, with random access.

A prepared folder has `dataset.json` (settings, counts, hashes), `tokenizer.json`, `codec.safetensors`, `quarantine.jsonl`
(records that were left out, and why), and for each source a folder of shards: `train-00000.arrow` and `heldout-00000.arrow`
(Arrow streams, which `datasets` also reads), and `00000.json` (their counts).
A document is one row of `schema`. Latents are normalised float16, codes of a VQ codec int32. Held-out documents also keep
their original images, so generated images are compared with those and not with the codec's reconstructions. The hashes that
decide the split (`heldout.py`) are kept, so that leaks can be counted.
"""

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.pictures import encode_picture, pixels_of, read_picture
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import ChatLayout, from_json
from transfusion.data.heldout import SplitDocument
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.reading.columns import CONVERSATIONS
from transfusion.disk import OpenError, check_format, check_prepared, read_checked, read_json, sha256_of
from transfusion.sequence import Document, Image, Text, Vocabulary

FORMAT = 4  # of a prepared folder; other formats are not supported
SPLITS = ("train", "heldout")
MAX_BATCH_BYTES = 64 * 2**20  # bytes of ids, latents and images after which a batch of documents is written
MAX_OPEN_SHARDS = 4096  # shards that stay memory-mapped

SEGMENT = pa.struct([
    ("image", pa.bool_()), ("loss", pa.bool_()), ("max_t", pa.float32()),
    ("tokens", pa.int32()),  # number of tokens of a text
    ("height", pa.int32()), ("width", pa.int32()),  # of an image's latent
])  # fmt: skip


def schema(is_vq: bool) -> pa.Schema:
    """The columns of a shard; `is_vq`: images are codes, not latents."""
    return pa.schema([
        ("where", pa.string()),  # file and row of its record
        ("name", pa.string()),  # its id in the source, if any
        ("pairs", pa.bool_()),
        ("segments", pa.large_list(SEGMENT)),
        ("tokens", pa.large_list(pa.int32())),  # of all its texts, concatenated
        # (C, Y, X) or (Y, X) of all its images, concatenated
        ("codes", pa.large_list(pa.int32())) if is_vq else ("latents", pa.large_list(pa.float16())),
        ("original_images", pa.large_list(pa.large_binary())),  # of a held-out document, before the codec: PNG
        ("image_hashes", pa.large_list(pa.uint64())), ("perceptual_hashes", pa.large_list(pa.uint64())),  # of each image
        ("text_hash", pa.uint64()),  # of a document without images
    ])  # fmt: skip


class ShardWriter:
    """Writes documents to one Arrow stream. The file gets its final name only when `close` succeeds."""

    def __init__(self, path: Path, is_vq: bool = False):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.schema, self.dtype = schema(is_vq), np.dtype(np.int32 if is_vq else np.float16)
        self.file = self.temporary.open("wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        self.rows: list[tuple] = []  # values in the order of the schema
        self.size = 0

    def add(self, document: Document, item: SplitDocument) -> None:
        """Add a document that was encoded from `item`. A held-out one keeps its original images."""
        raw, segments, contents = item.document, [], []
        for part in document.segments:
            if isinstance(part, Text):
                segments.append((False, part.loss, 1.0, len(part.tokens), 0, 0))
            else:
                contents.append(part.content.astype(self.dtype).ravel())
                segments.append((True, part.loss, part.max_t, 0, *part.shape))
        tokens = [np.array(part.tokens, np.int32) for part in document.segments if isinstance(part, Text)]
        tokens = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        values = np.concatenate(contents) if contents else np.empty(0, self.dtype)
        is_heldout = raw.split == "heldout"
        pngs = [encode_picture(part.pixels) for part in raw.segments if isinstance(part, RawImage)] if is_heldout else []
        self.rows.append((raw.where, raw.name or None, document.pairs, segments, tokens, values, pngs,
                          item.image_hashes, item.perceptual_hashes, item.text_hash))  # fmt: skip
        self.size += tokens.nbytes + values.nbytes + sum(map(len, pngs))
        if self.size >= MAX_BATCH_BYTES:
            self._flush()

    def close(self) -> str:
        """Write everything to disk under the final name; returns the SHA-256 of the file."""
        self._flush()
        self.stream.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)
        return sha256_of(self.path)

    def abort(self) -> None:
        """Delete the temporary file."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self.rows:
            where, name, pairs, segments, tokens, contents, images, *image_hashes, text_hash = zip(*self.rows, strict=True)
            columns = [
                pa.array(where, pa.string()), pa.array(name, pa.string()), pa.array(pairs, pa.bool_()),
                _list_array(segments, _flatten(segments, SEGMENT)),
                _list_array(tokens, pa.array(np.concatenate(tokens))),
                _list_array(contents, pa.array(np.concatenate(contents))),
                _list_array(images, _flatten(images, pa.large_binary())),
                *(_list_array(hashes, _flatten(hashes, pa.uint64())) for hashes in image_hashes),
                pa.array(text_hash, pa.uint64()),
            ]  # fmt: skip
            self.stream.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows, self.size = [], 0


def _flatten(lists: Iterable[Sequence], type: pa.DataType) -> pa.Array:
    """The elements of all lists."""
    return pa.array([value for values in lists for value in values], type)


def _list_array(lists: Iterable[Sequence], values: pa.Array) -> pa.LargeListArray:
    """The values, which are the elements of all lists, as lists of the same lengths."""
    return pa.LargeListArray.from_arrays(pa.array([0, *accumulate(map(len, lists))], pa.int64()), values)


@dataclass(frozen=True)
class PreparedFolder:
    """An open prepared folder: tokenizer, codec and sources."""

    folder: Path
    metadata: dict  # dataset.json
    tokenizer: Tokenizer
    codec: Codec | VQ

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its sources, in the order of the `prepare` command."""
        return tuple(self.metadata["sources"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every latent shape (Y, X) in it."""
        shards = (shard for source in self.metadata["sources"].values() for shard in source["shards"])
        return sorted({_parse_shape(name) for shard in shards for name in shard["max_image_overhead"]})

    def chat_layout(self, names: Iterable[str] | None = None) -> ChatLayout | None:
        """The layout of the conversations in these sources (not given: all); None if they have no conversations."""
        sources = [self.metadata["sources"][name] for name in (self.names if names is None else names)]
        forms = {form for source in sources for form in source["account"]["forms"]}
        settings = self.metadata["settings"].get("chat", {})  # of older folders: the default layout
        return from_json(ChatLayout, settings) if forms & {*CONVERSATIONS} else None

    def source(self, name: str, split: str) -> "StoredSource":
        """The training or held-out documents of one source."""
        return StoredSource(self, name, split)

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the recorded one. OpenError names the first file that differs."""
        for name, source in self.metadata["sources"].items():
            for shard in source["shards"]:
                for file, digest in shard["sha256"].items():
                    _check_shard(self.folder / name / file, digest)


def open_prepared(folder: Path) -> PreparedFolder:
    """Open a prepared folder. OpenError when it is not one, is unfinished, has another format, or was changed."""
    metadata = read_json(check_prepared(folder) / "dataset.json")
    check_format(folder, metadata, FORMAT, "prepare it again")
    try:
        about, info = metadata["tokenizer"], metadata["codec"]
        tokenizer = Tokenizer.from_json(
            read_checked(folder / "tokenizer.json", about["sha256"]).decode(), about.get("markers")
        )
        codec = codec_from_bytes(info["kind"], read_checked(folder / "codec.safetensors", info["sha256"]))
        return PreparedFolder(folder, metadata, tokenizer, codec)
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{folder / 'dataset.json'} is damaged: {error!r}") from None


def _check_shard(path: Path, digest: str) -> None:
    """OpenError when a file is missing or its SHA-256 differs."""
    if not path.is_file():
        raise OpenError(f"{path} is missing")
    if sha256_of(path) != digest:
        raise OpenError(f"{path} was changed after it was written: its SHA-256 is not the recorded one")


class StoredSource:
    """The documents of one source and split, by number. Shards are memory-mapped: data are read when they are used. The
    SHA-256 of a shard is checked when it is first opened."""

    def __init__(self, prepared: PreparedFolder, name: str, split: str):
        self.prepared, self.name, self.split = prepared, name, split
        self.metadata = prepared.metadata["sources"][name]
        codec = prepared.codec
        self.leading_shape = () if isinstance(codec, VQ) else (codec.channels,)  # of an image, before Y and X
        self._counts = [shard["documents"][split] for shard in self.metadata["shards"]]
        self._ends = list(accumulate(self._counts))
        self._shard = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)
        self._checked: set[int] = set()  # numbers of shards

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, id: int) -> Document:
        if not 0 <= id < len(self):
            raise IndexError(f"{self.name} ({self.split}) has documents 0 to {len(self) - 1}, not {id}")
        batch, row = self._find(id)
        try:
            return batch.document(row, id, self.name, self.leading_shape)
        except (ValueError, IndexError) as error:
            raise OpenError(f"document {id} of {self.name} ({self.split}) is damaged: {error}") from None

    def where(self, id: int) -> str:
        """File and row of the document's record."""
        batch, row = self._find(id)
        return batch.where[row].as_py()

    def original_images(self, id: int) -> list[np.ndarray]:
        """The images (Y, X, channels) uint8 of a held-out document before the codec; empty for training documents."""
        batch, row = self._find(id)
        return [pixels_of(read_picture(png, f"in {self.where(id)}")) for png in batch.images[row].as_py()]

    def content_hash(self) -> str:
        """A SHA-256 over the digests of its shards and the rows that are skipped in them."""
        shards = [[shard["sha256"], shard.get("skipped", {})] for shard in self.metadata["shards"]]
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()

    def mean_positions(self, vocabulary: Vocabulary, caption_dropout: float = 0.0) -> float:
        """Mean positions of a document when this share of the captions of single pairs is dropped."""
        shards, documents = self.metadata["shards"], max(1, len(self))
        tokens, captions = (sum(shard[key][self.split] for shard in shards) for key in ("tokens", "caption_tokens"))
        images = sum(
            count * (vocabulary.num_patches(_parse_shape(name)) + 2)
            for shard in shards for name, count in shard["images"][self.split].items()
        )  # fmt: skip
        return 2 + (tokens - caption_dropout * captions + images) / documents

    def min_seq_len(self, vocabulary: Vocabulary) -> int:
        """The shortest row that fits every image with its caption, which are never split."""
        return max((
            overhead + vocabulary.num_patches(_parse_shape(name))
            for shard in self.metadata["shards"] for name, overhead in shard["max_image_overhead"].items()
        ), default=1)  # fmt: skip

    def _find(self, id: int) -> tuple["_ArrowBatch", int]:
        number = bisect_right(self._ends, id)
        row = id - (self._ends[number - 1] if number else 0)
        batches, skipped = self._shard(number)
        row += int(np.searchsorted(skipped, row, side="right"))
        for batch in batches:
            if row < batch.rows:
                return batch, row
            row -= batch.rows
        raise OpenError(f"{self._path(number)} has fewer documents than dataset.json records")

    def _path(self, number: int) -> Path:
        return self.prepared.folder / self.name / f"{self.split}-{number:05d}.arrow"

    def _open_shard(self, number: int) -> tuple[list["_ArrowBatch"], np.ndarray]:
        """The batches of a shard; and for each skipped row, how many of the documents are before it."""
        path, shard = self._path(number), self.metadata["shards"][number]
        if number not in self._checked:
            try:
                _check_shard(path, shard["sha256"][path.name])
            except OpenError as error:
                raise OpenError(f"{error}; {_validate(path)} checks all shards") from None
            self._checked.add(number)
        skipped = np.array(shard.get("skipped", {}).get(self.split, ()), int)
        return [_ArrowBatch(batch) for batch in _read_batches(path)], skipped - np.arange(len(skipped))


def read_hashes(folder: Path, split: str, shards: Sequence[dict]) -> Iterator[tuple[int, np.ndarray, pa.RecordBatch]]:
    """Where the documents of a source are from, and their hashes, in batches, each with the number of its shard and the rows
    there. `shards`: as in dataset.json. OpenError when a shard is damaged."""
    for number, shard in enumerate(shards):
        row, skipped = 0, shard.get("skipped", {}).get(split, ())
        for batch in _read_batches(folder / f"{split}-{number:05d}.arrow"):
            rows = np.arange(row, row + len(batch))
            row += len(batch)
            is_kept = ~np.isin(rows, skipped)
            if not is_kept.all():
                batch, rows = batch.filter(pa.array(is_kept)), rows[is_kept]
            yield number, rows, batch.select(["where", "image_hashes", "perceptual_hashes", "text_hash"])


def _read_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of a shard, memory-mapped."""
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        for batch in batches:
            if not any(batch.schema.equals(schema(is_vq)) for is_vq in (False, True)):
                raise ValueError("its columns are not those of a shard")
            batch.validate(full=True)  # otherwise invalid offsets are followed without an error
        return batches
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OpenError(f"cannot read {path}: {reason}; {_validate(path)} checks all shards") from None


def _validate(path: Path) -> str:
    """The command that checks the folder of a shard."""
    return f"transfusion data validate {path.parent.parent}"


def _parse_shape(name: str) -> tuple[int, int]:
    """"8x6" -> (8, 6), the height and the width of a latent."""
    height, width = map(int, name.split("x"))
    return height, width


class _ArrowBatch:
    """One record batch of a shard; its columns are arrays in the mapped file."""

    def __init__(self, batch: pa.RecordBatch):
        self.rows = len(batch)
        self.where = batch.column("where")
        self.pairs = batch.column("pairs").to_numpy(zero_copy_only=False)
        segments, tokens, contents, self.images = (batch.column(number) for number in (3, 4, 5, 6))
        self.segment_offsets, self.token_offsets, self.content_offsets = (
            column.offsets.to_numpy() for column in (segments, tokens, contents)
        )
        fields = [segments.values.field(n).to_numpy(zero_copy_only=False) for n in range(SEGMENT.num_fields)]
        self.segments = list(zip(*(values.tolist() for values in fields), strict=True))
        self.tokens, self.contents = tokens.values.to_numpy(), contents.values.to_numpy()

    def document(self, row: int, id: int, source: str, leading_shape: tuple[int, ...]) -> Document:
        token_start, content_start = int(self.token_offsets[row]), int(self.content_offsets[row])
        parts: list[Text | Image] = []
        for is_image, loss, max_t, tokens, Y, X in self.segments[self.segment_offsets[row] : self.segment_offsets[row + 1]]:
            if is_image:
                shape = (*leading_shape, Y, X)
                end = content_start + math.prod(shape)
                parts.append(Image(self.contents[content_start:end].reshape(shape), loss, max_t))
                content_start = end
            else:
                end = token_start + tokens
                parts.append(Text(tuple(self.tokens[token_start:end].tolist()), loss))
                token_start = end
        return Document(tuple(parts), id, source, pairs=bool(self.pairs[row]))


class DecodedSource:
    """A stored source as raw documents: text decoded from ids, original images where stored, otherwise decoded latents."""

    def __init__(self, stored: StoredSource):
        self.stored, self.name = stored, stored.name

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, id: int) -> RawDocument:
        document, tokenizer = self.stored[id], self.stored.prepared.tokenizer
        images = (part for part in document.segments if isinstance(part, Image))
        pixels = iter(self.stored.original_images(id) or map(self._decode, images))
        segments = tuple(
            RawText(tokenizer.decode(part.tokens), part.loss) if isinstance(part, Text)
            else RawImage(next(pixels), part.loss, part.max_t) for part in document.segments
        )  # fmt: skip
        return RawDocument(segments, id, document.pairs, where=self.stored.where(id))

    def _decode(self, image: Image) -> np.ndarray:
        content = image.content if image.is_codes else image.content.astype(np.float32)
        return self.stored.prepared.codec.decode(content)
