"""One shard of a prepared source: documents as ids and latents in an Arrow stream, written once, read at random."""

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from transfusion.codecs.pictures import encode_picture
from transfusion.data.heldout import SplitDocument
from transfusion.data.raw import RawImage
from transfusion.disk import OpenError, sha256_of
from transfusion.sequence import Document, Image, Text

MAX_BATCH_BYTES = 64 * 2**20  # bytes of ids, latents and images after which a batch of documents is written

SEGMENT = pa.struct([
    ("image", pa.bool_()), ("loss", pa.bool_()), ("max_t", pa.float32()),
    ("tokens", pa.int32()),  # number of tokens of a text
    ("height", pa.int32()), ("width", pa.int32()),  # of an image's latent
])  # fmt: skip
SEGMENT_DTYPES = (np.uint8, np.uint8, np.float32, np.int32, np.int32, np.int32)  # of its fields, as they are read


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
        ("checksum", pa.uint32()),  # `checksum` of what is trained on
    ])  # fmt: skip

def content_dtype(is_vq: bool) -> np.dtype:
    """Of codes or latents."""
    return np.dtype(np.int32 if is_vq else np.float16)


def checksum(pairs: bool, *arrays: np.ndarray) -> int:
    """The CRC-32 of a document: `pairs`, the fields of its segments (`SEGMENT_DTYPES`), its tokens, its latents or codes."""
    value = int(pairs)
    for array in arrays:
        value = zlib.crc32(array, value)
    return value


class ShardWriter:
    """Writes documents to one Arrow stream. The file gets its final name only when `close` succeeds."""

    def __init__(self, path: Path, is_vq: bool = False):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.schema, self.dtype = schema(is_vq), content_dtype(is_vq)
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
        columns = [np.array([segment[n] for segment in segments], dtype) for n, dtype in enumerate(SEGMENT_DTYPES)]
        crc = checksum(document.pairs, *columns, tokens, values)
        is_heldout = raw.split == "heldout"
        pngs = [encode_picture(part.pixels) for part in raw.segments if isinstance(part, RawImage)] if is_heldout else []
        self.rows.append((raw.where, raw.name or None, document.pairs, segments, tokens, values, pngs,
                          item.image_hashes, item.perceptual_hashes, item.text_hash, crc))  # fmt: skip
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
            where, name, pairs, segments, tokens, contents, images, *hashes, text_hash, crc = zip(*self.rows, strict=True)
            columns = [
                pa.array(where, pa.string()), pa.array(name, pa.string()), pa.array(pairs, pa.bool_()),
                _list_array(segments, _flatten(segments, SEGMENT)),
                _list_array(tokens, pa.array(np.concatenate(tokens))),
                _list_array(contents, pa.array(np.concatenate(contents))),
                _list_array(images, _flatten(images, pa.large_binary())),
                *(_list_array(values, _flatten(values, pa.uint64())) for values in hashes),
                pa.array(text_hash, pa.uint64()), pa.array(crc, pa.uint32()),
            ]  # fmt: skip
            self.stream.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows, self.size = [], 0


def _flatten(lists: Iterable[Sequence], type: pa.DataType) -> pa.Array:
    """The elements of all lists."""
    return pa.array([value for values in lists for value in values], type)


def _list_array(lists: Iterable[Sequence], values: pa.Array) -> pa.LargeListArray:
    """The values, which are the elements of all lists, as lists of the same lengths."""
    return pa.LargeListArray.from_arrays(pa.array([0, *accumulate(map(len, lists))], pa.int64()), values)


class Arrays(NamedTuple):
    """The columns of a batch that training reads, as arrays in the mapped file. Arrow packs truth values in bits."""

    segment_offsets: np.ndarray  # of each document, and the end of the last one
    token_offsets: np.ndarray
    content_offsets: np.ndarray
    pairs: np.ndarray  # bits
    is_image: np.ndarray  # bits, and so on: the fields of `SEGMENT`
    loss: np.ndarray
    max_t: np.ndarray
    num_tokens: np.ndarray
    height: np.ndarray
    width: np.ndarray
    tokens: np.ndarray
    contents: np.ndarray  # latents or codes


ARRAY_DTYPES = (np.int64, np.int64, np.int64, np.uint8, *SEGMENT_DTYPES, np.int32)  # of `Arrays`, without the last


class Shard:
    """An open shard. Offsets in a damaged file may be any numbers: they may lead to other values, but not out of the file,
    and then the checksum differs.

    `layout` (batches, arrays, 2): the first byte of each of the `Arrays`, and its size. With it the shard is opened again in
    microseconds. ValueError, OSError or ArrowException when the file is no shard.
    """

    def __init__(self, path: Path, is_vq: bool, layout: np.ndarray | None = None):
        buffer = pa.memory_map(str(path)).read_buffer()
        self.layout = _read_layout(buffer) if layout is None else layout
        dtypes = [np.dtype(dtype) for dtype in (*ARRAY_DTYPES, content_dtype(is_vq))]
        self.batches = [
            Arrays(*(np.frombuffer(buffer, dtype, size // dtype.itemsize, begin)
                     for dtype, (begin, size) in zip(dtypes, batch, strict=True)))
            for batch in self.layout.tolist()
        ]  # fmt: skip

    def document(self, row: int, id: int, source: str, leading_shape: tuple[int, ...], crc: int | None) -> Document:
        """The document in this row. ValueError when it is not there or has another checksum than `crc`, if that is given."""
        for batch in self.batches:
            if row < len(batch.segment_offsets) - 1:
                return _read_document(batch, row, id, source, leading_shape, crc)
            row -= max(0, len(batch.segment_offsets) - 1)
        raise ValueError("the row is missing")


def _read_document(
    batch: Arrays, row: int, id: int, source: str, leading_shape: tuple[int, ...], crc: int | None
) -> Document:
    (begin, end), tokens, contents = (
        offsets[row : row + 2].tolist() for offsets in (batch.segment_offsets, batch.token_offsets, batch.content_offsets)
    )
    tokens, contents = batch.tokens[slice(*tokens)], batch.contents[slice(*contents)]
    is_pairs = bool(batch.pairs[row >> 3] >> (row & 7) & 1)
    bits = (_read_bits(values, begin, end) for values in (batch.is_image, batch.loss))
    numbers = (values[begin:end] for values in (batch.max_t, batch.num_tokens, batch.height, batch.width))
    fields = [*bits, *numbers]
    if crc is not None and checksum(is_pairs, *fields, tokens, contents) != crc:
        raise ValueError("its checksum is not the recorded one")
    parts: list[Text | Image] = []
    token = content = 0
    for is_image, loss, max_t, num_tokens, height, width in zip(*(values.tolist() for values in fields), strict=True):
        if is_image:
            shape = (*leading_shape, height, width)
            first, content = content, content + math.prod(shape)
            parts.append(Image(contents[first:content].reshape(shape), bool(loss), max_t))
        else:
            first, token = token, token + num_tokens
            parts.append(Text(tuple(tokens[first:token].tolist()), bool(loss)))
    return Document(tuple(parts), id, source, pairs=is_pairs)


def _read_bits(bits: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Bits begin .. end - 1, each 0 or 1 as uint8."""
    return np.unpackbits(bits[begin >> 3 : (end + 7) >> 3], bitorder="little")[begin & 7 :][: end - begin]


def _read_layout(buffer: pa.Buffer) -> np.ndarray:
    layout = []
    for batch in pa.ipc.open_stream(buffer):
        _check_schema(batch)
        batch.validate()
        pairs, segments, tokens, contents = (batch.column(number) for number in (2, 3, 4, 5))
        fields = [segments.values.field(number) for number in range(SEGMENT.num_fields)]
        arrays = Arrays(segments, tokens, contents, pairs, *fields, tokens.values, contents.values)
        buffers = [array.buffers()[1] for array in arrays]
        layout.append([(part.address - buffer.address, part.size) if part and part.size else (0, 0) for part in buffers])
    return np.array(layout, np.int64).reshape(-1, len(Arrays._fields), 2)


def read_hashes(folder: Path, split: str, shards: Sequence[dict]) -> Iterator[tuple[int, np.ndarray, pa.RecordBatch]]:
    """Where the documents of a source are from, and their hashes, in batches, each with the number of its shard and the rows
    there. `shards`: as in dataset.json. OpenError when a shard is damaged."""
    for number, shard in enumerate(shards):
        row, skipped = 0, shard.get("skipped", {}).get(split, ())
        for batch in read_batches(folder / f"{split}-{number:05d}.arrow"):
            rows = np.arange(row, row + len(batch))
            row += len(batch)
            is_kept = ~np.isin(rows, skipped)
            if not is_kept.all():
                batch, rows = batch.filter(pa.array(is_kept)), rows[is_kept]
            yield number, rows, batch.select(["where", "image_hashes", "perceptual_hashes", "text_hash"])


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of a shard, memory-mapped."""
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        for batch in batches:
            _check_schema(batch)
            batch.validate(full=True)  # otherwise invalid offsets are followed without an error
        return batches
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise unreadable(path, error) from None


def _check_schema(batch: pa.RecordBatch) -> None:
    if not any(batch.schema.equals(schema(is_vq)) for is_vq in (False, True)):
        raise ValueError("its columns are not those of a shard")


def unreadable(path: Path, error: Exception) -> OpenError:
    return OpenError(f"cannot read {path}: {str(error).splitlines()[0]}; {validate_command(path)} checks all shards")


def validate_command(path: Path) -> str:
    """The command that checks the folder of a shard."""
    return f"transfusion data validate {path.parent.parent}"


