"""Prepared data on disk: documents as ids and latents in memory-mapped Arrow files, with random access.

A prepared folder has `dataset.json` (settings, counts, hashes), `tokenizer.json`, `codec.safetensors`, `quarantine.jsonl`
(records that were left out, and why), and for each source a folder of shards: `train-00000.arrow` and `heldout-00000.arrow`
(Arrow streams, which `datasets` also reads), and `00000.json` (their counts); beside them `train-sizes.bin` and
`heldout-sizes.bin`, the size and the checksum of each document (`lengths.SIZES`).

A document is one row of `shards.schema`. Latents are normalised float16, codes of a VQ codec int32. Held-out documents also
keep their original images, so generated images are compared with those and not with the codec's reconstructions. The hashes
that decide the split (`heldout.py`) are kept, so that leaks can be counted.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, compress
from pathlib import Path

import numpy as np
import pyarrow as pa

from transfusion.codecs.codec import Codec, codec_from_bytes
from transfusion.codecs.pictures import pixels_of, read_picture
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import ChatLayout, DataConfig, from_json
from transfusion.data.lengths import SIZES, Lengths, lengths_of_sizes, sizes_of_segments
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.reading.columns import CONVERSATIONS
from transfusion.data.shards import SEGMENT, Shard, read_batches, unreadable, validate_command
from transfusion.disk import OpenError, check_format, check_prepared, read_checked, read_json, sha256_of
from transfusion.sequence import Document, Image, Text, Vocabulary

FORMAT = 6  # of a prepared folder; other formats are not supported
SPLITS = ("train", "heldout")
MAX_OPEN_SHARDS = 2**14  # of a folder, memory-mapped: 3 kB each, and one of the 65,530 maps that Linux allows a process


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
        return shapes_of(shard for source in self.metadata["sources"].values() for shard in source["shards"])

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
        """Compare the SHA-256 of every file of the sources with the recorded one. OpenError names the first that differs."""
        for name, source in self.metadata["sources"].items():
            for files in (source, *source["shards"]):
                for file, digest in files["sha256"].items():
                    _check_file(self.folder / name / file, digest)


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


def _check_file(path: Path, digest: str) -> None:
    """OpenError when a file is missing or its SHA-256 differs."""
    if not path.is_file():
        raise OpenError(f"{path} is missing")
    if sha256_of(path) != digest:
        raise OpenError(f"{path} was changed after it was written: its SHA-256 is not the recorded one")


class StoredSource:
    """The documents of one source and split, by number. Shards are memory-mapped: data are read when they are used. The
    checksum of a document is checked whenever it is read; a shard's SHA-256 before original images and places are read."""

    def __init__(self, prepared: PreparedFolder, name: str, split: str):
        self.prepared, self.name, self.split = prepared, name, split
        self.metadata = prepared.metadata["sources"][name]
        codec = prepared.codec
        self.leading_shape = () if isinstance(codec, VQ) else (codec.channels,)  # of an image, before Y and X
        self._ends = list(accumulate(shard["documents"][split] for shard in self.metadata["shards"]))
        self._shard = lru_cache(maxsize=max(1, MAX_OPEN_SHARDS // len(prepared.names)))(self._open_shard)
        self._batches = lru_cache(maxsize=4)(self._open_batches)
        self._layouts: dict[int, np.ndarray] = {}  # of shards that were open

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, id: int) -> Document:
        return self._read(id, is_checked=True)

    def outline(self, id: int) -> Document:
        """The same without a check, so that its latents are not read before they are used."""
        return self._read(id, is_checked=False)

    def _read(self, id: int, is_checked: bool) -> Document:
        if not 0 <= id < len(self):
            raise IndexError(f"{self.name} ({self.split}) has documents 0 to {len(self) - 1}, not {id}")
        number, row = self._find(id)
        crc = self.sizes["checksum"][id] if is_checked else None
        shard = self._shard(number)
        try:
            return shard.document(row, id, self.name, self.leading_shape, crc)
        except (ValueError, IndexError) as error:
            path = self._path(number)
            raise OpenError(f"{path} was changed after it was written: document {id} of {self.name} is damaged ({error}); "
                            f"{validate_command(path)} checks all shards") from None  # fmt: skip

    @cached_property
    def sizes(self) -> np.ndarray:
        """`SIZES` of all documents, memory-mapped. OpenError when the file is damaged."""
        path = self.prepared.folder / self.name / f"{self.split}-sizes.bin"
        try:
            _check_file(path, self.metadata["sha256"][path.name])
        except OpenError as error:
            dataset = self.prepared.folder / "dataset.json"
            raise OpenError(f"{error}; delete {dataset} and run the same `transfusion data prepare` again, which writes the "
                            "sizes from the shards") from None  # fmt: skip
        return np.frombuffer(pa.memory_map(str(path)).read_buffer(), SIZES)

    def lengths(self, ids: np.ndarray, patch_size: int) -> Lengths:
        """The lengths of these documents (n,), without reading them."""
        return lengths_of_sizes(self.sizes[ids], self._shapes, patch_size)

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        return shapes_of(self.metadata["shards"])

    def where(self, id: int) -> str:
        """File and row of the document's record."""
        return self._column("where", id)

    def original_images(self, id: int) -> list[np.ndarray]:
        """The images (Y, X, channels) uint8 of a held-out document before the codec; empty for training documents."""
        return [pixels_of(read_picture(png, f"in {self.where(id)}")) for png in self._column("original_images", id)]

    def content_hash(self) -> str:
        """A SHA-256 over the digests of its shards and the rows that are skipped in them."""
        shards = [[shard["sha256"], shard.get("skipped", {})] for shard in self.metadata["shards"]]
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()

    def mean_positions(self, vocabulary: Vocabulary, config: DataConfig) -> float:
        """Mean positions of a document, without the effect of conditions that are dropped."""
        shards, documents = self.metadata["shards"], max(1, len(self))
        tokens, captions = (sum(shard[key][self.split] for shard in shards) for key in ("tokens", "caption_tokens"))
        images = sum(
            count * (vocabulary.num_patches(_parse_shape(name)) + 2)
            for shard in shards for name, count in shard["images"][self.split].items()
        )  # fmt: skip
        copies = 0.0
        if config.clean_copies:
            shares = (1 - config.image_first, "copied"), (config.image_first, "copied_first")
            copies = sum(share * self.sizes[name].sum(dtype=np.int64) for share, name in shares) / vocabulary.patch_size**2
        caption_dropout = (1 - config.image_first) * config.caption_dropout  # of single pairs
        return 2 + (tokens - caption_dropout * captions + images + copies) / documents

    def min_seq_len(self, vocabulary: Vocabulary, config: DataConfig) -> int:
        """The shortest row that fits every image with its caption and its noisy copy, which are never split."""
        applies = True, config.clean_copies, config.clean_copies and config.image_first > 0
        return max((
            overhead + times * vocabulary.num_patches(_parse_shape(name))
            for shard in self.metadata["shards"] for name, overheads in shard["max_image_overhead"].items()
            for overhead, times in compress(zip(overheads, (1, 2, 2), strict=True), applies) if overhead
        ), default=1)  # fmt: skip

    def _column(self, name: str, id: int):
        """The value of a document in a column of its shard."""
        number, row = self._find(id)
        for batch in self._batches(number):
            if row < len(batch):
                return batch.column(name)[row].as_py()
            row -= len(batch)
        raise OpenError(f"{self._path(number)} has fewer documents than dataset.json records")

    def _open_batches(self, number: int) -> list[pa.RecordBatch]:
        path = self._path(number)
        try:
            _check_file(path, self.metadata["shards"][number]["sha256"][path.name])
        except OpenError as error:
            raise OpenError(f"{error}; {validate_command(path)} checks all shards") from None
        return read_batches(path)

    def _find(self, id: int) -> tuple[int, int]:
        """The number of a document's shard, and its row there."""
        number = bisect_right(self._ends, id)
        row = id - (self._ends[number - 1] if number else 0)
        if skipped := self.metadata["shards"][number].get("skipped", {}).get(self.split):
            row += bisect_right(range(len(skipped)), row, key=lambda n: skipped[n] - n)
        return number, row

    def _path(self, number: int) -> Path:
        return self.prepared.folder / self.name / f"{self.split}-{number:05d}.arrow"

    def _open_shard(self, number: int) -> Shard:
        path = self._path(number)
        try:
            shard = Shard(path, isinstance(self.prepared.codec, VQ), self._layouts.get(number))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(path, error) from None
        self._layouts[number] = shard.layout
        return shard


def shapes_of(shards: Iterable[dict]) -> list[tuple[int, int]]:
    """Every latent shape (Y, X) in these shards, sorted."""
    return sorted({_parse_shape(name) for shard in shards for name in shard["max_image_overhead"]})


def write_sizes(folder: Path, split: str, shards: Sequence[dict]) -> dict[str, str]:
    """Write `SIZES` of all documents of a source that are not skipped; the file's name and its SHA-256. `shards`: as in
    dataset.json."""
    path, shapes = folder / f"{split}-sizes.bin", shapes_of(shards)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for number, shard in enumerate(shards):
            batches = [_sizes_of_batch(batch, shapes) for batch in read_batches(folder / f"{split}-{number:05d}.arrow")]
            sizes = np.concatenate([np.empty(0, SIZES), *batches])
            file.write(np.delete(sizes, shard["skipped"][split]).tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return {path.name: sha256_of(path)}


def _sizes_of_batch(batch: pa.RecordBatch, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    segments = batch.column("segments")
    fields = dict(zip(SEGMENT.names, segments.values.flatten(), strict=True))
    names = "image", "loss", "max_t", "tokens", "height", "width"
    values = (fields[name].to_numpy(zero_copy_only=False) for name in names)
    pairs, checksums = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("pairs", "checksum"))
    return sizes_of_segments(pairs, segments.offsets.to_numpy(), *values, checksums, shapes)


def _parse_shape(name: str) -> tuple[int, int]:
    """"8x6" -> (8, 6), the height and the width of a latent."""
    height, width = map(int, name.split("x"))
    return height, width


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
