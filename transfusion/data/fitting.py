"""What documents are encoded with, fitted on the first of them: the tokenizer, the codec, and the size of the pictures."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from transfusion.codecs.codec import Codec, codec_from_bytes, codec_to_bytes, encode_many, fit_codec
from transfusion.codecs.pictures import to_pixels
from transfusion.codecs.pixels import BlockPCA, Pixels
from transfusion.codecs.pretrained import Pretrained, is_pretrained
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import PrepareConfig, parse_size
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import open_prepared
from transfusion.disk import OpenError, check_codec, read_checked, read_json, write_json, write_whole
from transfusion.sequence import Document, Image, Text, Vocabulary

FIT_PIXELS = 4_000_000  # of pictures that the codec is fitted on, over all sources
FIT_LETTERS = 20_000_000  # of text that the tokenizer is trained on
LOOK = 16  # pictures of a source that give its size and channels
MOST_IDS, LETTERS_PER_ID = 8192, 64  # of a tokenizer whose size nobody asked for

Firsts = Callable[[], Iterator[RawDocument]]  # the first training documents of a source, from the beginning


class PrepareError(ValueError):
    """The data set cannot be made; the message says why. What is finished stays, and the same command goes on from it."""


@dataclass(frozen=True)
class Encoders:
    """What documents are encoded with."""

    tokenizer: Tokenizer
    codec: Codec | VQ
    sizes: tuple[tuple[int, int], ...]  # (width, height)

    def cut(self, raw: RawDocument) -> RawDocument:
        """Its pictures cut to the nearest size."""
        segments = tuple(
            replace(part, pixels=to_pixels(part.pixels, self.sizes, self.codec.image_channels)) if isinstance(part, RawImage)
            else part for part in raw.segments
        )  # fmt: skip
        return replace(raw, segments=segments)

    def encode(self, raws: Sequence[RawDocument]) -> list[Document]:
        """Text to ids, and pictures, which are cut already, to latents or codes, all of them together."""
        pictures = [part.pixels for raw in raws for part in raw.segments if isinstance(part, RawImage)]
        contents = iter(encode_many(self.codec, pictures))
        return [
            Document(tuple(
                Text(self.tokenizer.encode(part.text), part.loss) if isinstance(part, RawText)
                else Image(next(contents), part.loss, part.max_t) for part in raw.segments
            ), pairs=raw.pairs)
            for raw in raws
        ]  # fmt: skip


def fit(firsts: Sequence[Firsts], config: PrepareConfig, folder: Path) -> None:
    """Train or take the tokenizer, fit or open the codec, on training documents only; write both, and what was decided."""
    if config.like is not None:
        return _take(Path(config.like), folder)
    sizes, image_channels = _geometry(firsts, config)
    brought = is_brought(config.codec)
    if brought:
        codec = open_codec(Path(config.codec))
        image_channels = codec.image_channels
    elif is_pretrained(config.codec):
        image_channels = 3
    texts: list[str] = []
    pictures: list[np.ndarray] = []
    for first in firsts:
        letters = pixels = 0
        for raw in first():
            for part in raw.segments:
                if isinstance(part, RawText) and letters < FIT_LETTERS // len(firsts):
                    texts.append(part.text)
                    letters += len(part.text)
                elif isinstance(part, RawImage) and pixels < FIT_PIXELS // len(firsts):
                    pictures.append(to_pixels(part.pixels, sizes, image_channels))
                    pixels += pictures[-1].shape[0] * pictures[-1].shape[1]
    if config.tokenizer is None:
        tokenizer = train_tokenizer(texts, config.tokenizer_size)
    else:
        tokenizer = Tokenizer.from_file(Path(config.tokenizer))
    codec = codec if brought else _fit_codec(config, sizes, pictures)
    for width, height in sizes:
        if width % codec.downsampling or height % codec.downsampling:
            raise PrepareError(
                f"a picture of {width}x{height} pixels cannot be cut into squares of {codec.downsampling} pixels"
            )
    text, encoded = tokenizer.to_json().encode(), codec_to_bytes(codec)
    write_whole(folder / "tokenizer.json", text)
    write_whole(folder / "codec.safetensors", encoded)
    write_json(folder / "fitted.json", {
        "tokenizer": {"size": tokenizer.size, "sha256": hashlib.sha256(text).hexdigest()},
        "codec": {"kind": codec.kind, "channels": codec.channels, "sha256": hashlib.sha256(encoded).hexdigest()},
        "sizes": sizes, "image_channels": image_channels,
    })  # fmt: skip


def open_codec(folder: Path) -> Codec | VQ:
    """A codec that `fit-codec` made. OpenError when the folder holds none, or it was changed."""
    about, path = about_codec(folder), folder / "codec.safetensors"
    try:
        return codec_from_bytes(about["kind"], read_checked(path, about["sha256"]))
    except KeyError as error:
        raise OpenError(f"{folder / 'codec.json'} is damaged: {error} is missing") from None
    except OpenError:
        raise
    except ValueError as error:  # without its statistics, say
        raise OpenError(f"{path} cannot be used: {error}") from None


def is_brought(codec: str) -> bool:
    """Is it a folder that `fit-codec` made, or ought to be?"""
    return codec not in ("auto", Pixels.kind, BlockPCA.kind) and not is_pretrained(codec)


def about_codec(folder: Path) -> dict:
    """Its codec.json. OpenError when there is none."""
    return read_json(check_codec(folder) / "codec.json")


def _fit_codec(config: PrepareConfig, sizes: Sequence[tuple[int, int]], pictures: Sequence[np.ndarray]) -> Codec:
    """One that needs no training, as asked or as suits the size of the pictures; or one that diffusers opens."""
    if is_pretrained(config.codec):
        return Pretrained.fit(config.codec, pictures)
    side = min(min(size) for size in sizes)
    kind = config.codec if config.codec != "auto" else Pixels.kind if side < 16 else BlockPCA.kind
    block = config.codec_block or (4 if side < 64 else 8)
    return fit_codec(kind, pictures, block, config.codec_components or (6 if block <= 4 else 8))


def _take(like: Path, folder: Path) -> None:
    """What another prepared folder, or a run, encodes with."""
    about = about_like(like)
    for name in ("tokenizer.json", "codec.safetensors"):
        write_whole(folder / name, (like / name).read_bytes())
    write_json(folder / "fitted.json", {name: about[name] for name in ("tokenizer", "codec", "sizes", "image_channels")})


def about_like(like: Path) -> dict:
    """What a prepared folder says of its tokenizer, codec and pictures, or a run, also an exported one. OpenError when it is
    none of these, or was changed."""
    found = next((like / name for name in ("dataset.json", "run.json", "config.json") if (like / name).exists()), None)
    if found is None or found.name == "dataset.json":
        return open_prepared(like).about
    values = read_json(found)
    try:
        kind, ids = values["codec"]["kind"], values["vocabulary"]
        codec = codec_from_bytes(kind, read_checked(like / "codec.safetensors", values["codec"]["sha256"]))
        text = read_checked(like / "tokenizer.json", values["tokenizer"]["sha256"]).decode()
        shapes = Vocabulary.from_json(ids).boi
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{found} is neither a run's nor that of an exported one: {error!r}") from None
    return {
        "tokenizer": {"size": Tokenizer.from_json(text).size, "sha256": values["tokenizer"]["sha256"]},
        "codec": {"kind": kind, "channels": codec.channels, "sha256": values["codec"]["sha256"]},
        "sizes": [(x * codec.downsampling, y * codec.downsampling) for y, x in shapes],
        "image_channels": codec.image_channels,
    }  # fmt: skip


def train_tokenizer(texts: Sequence[str], size: int | None) -> Tokenizer:
    """On these texts. Without a size as large as there is text for: else whole captions would become one token each."""
    room = 256 + sum(map(len, texts)) // LETTERS_PER_ID
    return Tokenizer.train(texts, min(MOST_IDS, room) if size is None else size)


def _geometry(firsts: Sequence[Firsts], config: PrepareConfig) -> tuple[tuple[tuple[int, int], ...], int]:
    """(width, height) of the pictures, as asked or as the first of them are, and their channels: 1 if all are grey."""
    found: list[tuple[int, ...]] = []
    for first in firsts:
        parts = (part for raw in first() for part in raw.segments)
        found += [part.pixels.shape for part in islice((p for p in parts if isinstance(p, RawImage)), LOOK)]
    if not found:
        raise PrepareError(
            "none of the first documents holds a picture: name a source that does beside this one, or --like a prepared "
            "folder whose codec and tokenizer are to be used"
        )
    image_channels = 1 if all(shape[2] == 1 for shape in found) else 3
    height, width = found[0][:2]
    alike = all(shape[:2] == (height, width) for shape in found)
    natural = (width, height) if alike and max(height, width) <= 256 else (256, 256)
    return tuple(map(parse_size, config.sizes)) or (natural,), image_channels


def open_tools(folder: Path) -> Encoders:
    """What `fit` has written."""
    about = read_json(folder / "fitted.json")
    tokenizer = Tokenizer.from_json(read_checked(folder / "tokenizer.json", about["tokenizer"]["sha256"]).decode())
    codec = codec_from_bytes(about["codec"]["kind"], read_checked(folder / "codec.safetensors", about["codec"]["sha256"]))
    return Encoders(tokenizer, codec, tuple(map(tuple, about["sizes"])))
