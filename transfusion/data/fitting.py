"""What documents are encoded with, fitted on the first of them: the tokenizer, the codec and the image sizes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from transfusion.codecs.codec import Codec, codec_from_bytes, codec_to_bytes, encode_many, fit_codec
from transfusion.codecs.pictures import to_pixels
from transfusion.codecs.pixels import BlockPCA, Pixels
from transfusion.codecs.pretrained import Pretrained, is_pretrained
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import ChatLayout, from_json, parse_size
from transfusion.data.config import PrepareConfig
from transfusion.data.heldout import SplitDocument
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import open_prepared
from transfusion.disk import (
    OpenError,
    check_codec,
    check_run_format,
    find_folder,
    read_checked,
    read_json,
    write_json,
    write_whole,
)  # fmt: skip
from transfusion.sequence import Document, Image, Text, Vocabulary

MAX_FIT_PIXELS = 4_000_000  # of the images that the codec is fitted on, over all sources
MAX_FIT_CHARS = 20_000_000  # of the text that the tokenizer is trained on
NUM_SIZE_SAMPLES = 16  # images of a source that decide the default size and the number of channels
MAX_DEFAULT_VOCAB, CHARS_PER_TOKEN = 8192, 64  # default tokenizer size: 256 + characters / 64, at most 8192

DocumentStream = Callable[[], Iterator[RawDocument]]  # returns the documents of a source, from the start


class PrepareError(ValueError):
    """The data set cannot be prepared; the message names the cause. Finished shards stay, and the same command resumes."""


@dataclass(frozen=True)
class TokenizerAndCodec:
    """Encodes raw documents: tokenizer, codec and image sizes."""

    tokenizer: Tokenizer
    codec: Codec | VQ
    sizes: tuple[tuple[int, int], ...]  # (width, height)

    def crop(self, raw: RawDocument) -> RawDocument:
        """The document with its images resized and cropped to the nearest size."""
        return crop_images(raw, self.sizes, self.codec.image_channels)

    def encode(self, raws: Sequence[RawDocument]) -> list[Document]:
        """Text to ids, and cropped images to latents or codes, the images of all documents in one batch."""
        images = [part.pixels for raw in raws for part in raw.segments if isinstance(part, RawImage)]
        contents = iter(encode_many(self.codec, images))
        return [
            Document(tuple(
                Text(self.tokenizer.encode(part.text, part.parse_special), part.loss) if isinstance(part, RawText)
                else Image(next(contents), part.loss, part.max_t) for part in raw.segments
            ), pairs=raw.pairs)
            for raw in raws
        ]  # fmt: skip


def crop_images(raw: RawDocument, sizes: Sequence[tuple[int, int]], image_channels: int) -> RawDocument:
    """The document with its images resized and cropped to the nearest of the sizes (width, height). PrepareError when there
    are none: `like` is a run without images."""
    if not sizes and any(isinstance(part, RawImage) for part in raw.segments):
        raise PrepareError("the run of --like was trained without images, so it has no sizes of images: use --like with the "
                           "data or a run with images, whose codec it has")  # fmt: skip
    segments = tuple(
        replace(part, pixels=to_pixels(part.pixels, sizes, image_channels)) if isinstance(part, RawImage) else part
        for part in raw.segments
    )  # fmt: skip
    return replace(raw, segments=segments)


def fit(streams: Sequence[DocumentStream], config: PrepareConfig, heldout_fraction: float, folder: Path) -> None:
    """Train or load the tokenizer, fit or load the codec, on the first training documents of each stream; write both and
    `fitted.json`. PrepareError when there are no images, the codec's downsampling does not divide a size, or the tokenizer
    does not have the special tokens of the chat layout."""
    if config.like is not None:
        return _copy_tokenizer_and_codec(find_folder(config.like), config.chat, folder)
    sizes, image_channels = _choose_sizes(streams, config)
    is_loaded = is_codec_folder(config.codec)
    if is_loaded:
        codec = open_codec(Path(config.codec))
        image_channels = codec.image_channels
    elif is_pretrained(config.codec):
        image_channels = 3
    texts: list[str] = []
    images: list[np.ndarray] = []
    for stream in streams:
        chars = pixels = 0
        cropped = (crop_images(raw, sizes, image_channels) for raw in stream())
        split = (SplitDocument.of(raw, heldout_fraction).document for raw in cropped)
        for raw in islice((raw for raw in split if raw.split == "train"), config.fit_documents):
            for part in raw.segments:
                if isinstance(part, RawText) and chars < MAX_FIT_CHARS // len(streams):
                    texts.append(part.text)
                    chars += len(part.text)
                elif isinstance(part, RawImage) and pixels < MAX_FIT_PIXELS // len(streams):
                    images.append(part.pixels)
                    pixels += part.pixels.shape[0] * part.pixels.shape[1]
    if not images:
        raise PrepareError("all images of the first documents are held out: add images, or use --heldout 0")
    if config.tokenizer is None:
        tokenizer = train_tokenizer(texts, config.tokenizer_size)
    else:
        tokenizer = Tokenizer.from_file(Path(config.tokenizer))
    _check_chat(config.chat, tokenizer)
    codec = codec if is_loaded else _fit_codec(config, sizes, images)
    for width, height in sizes:
        if width % codec.downsampling or height % codec.downsampling:
            raise PrepareError(f"--sizes {width}x{height}: width and height must be divisible by the codec's downsampling, "
                               f"{codec.downsampling}")  # fmt: skip
    text, encoded = tokenizer.to_json().encode(), codec_to_bytes(codec)
    write_whole(folder / "tokenizer.json", text)
    write_whole(folder / "codec.safetensors", encoded)
    write_json(folder / "fitted.json", {
        "tokenizer": {"size": tokenizer.size, "markers": tokenizer.markers, "sha256": hashlib.sha256(text).hexdigest()},
        "codec": {"kind": codec.kind, "channels": codec.channels, "sha256": hashlib.sha256(encoded).hexdigest()},
        "sizes": sizes, "image_channels": image_channels,
    })  # fmt: skip


def open_codec(folder: Path) -> Codec | VQ:
    """A codec written by `fit-codec`. OpenError if the folder has no codec, or the codec was changed."""
    info, path = read_codec_info(folder), folder / "codec.safetensors"
    try:
        return codec_from_bytes(info["kind"], read_checked(path, info["sha256"]))
    except KeyError as error:
        raise OpenError(f"{folder / 'codec.json'} is damaged: {error} is missing") from None
    except OpenError:
        raise
    except ValueError as error:  # for example without its statistics
        raise OpenError(f"{path} cannot be used: {error}") from None


def is_codec_folder(codec: str) -> bool:
    """Whether --codec means a folder written by `fit-codec`."""
    return codec not in ("auto", Pixels.kind, BlockPCA.kind) and not is_pretrained(codec)


def read_codec_info(folder: Path) -> dict:
    """The codec.json of a folder. OpenError if the folder has no codec."""
    return read_json(check_codec(folder) / "codec.json")


def _fit_codec(config: PrepareConfig, sizes: Sequence[tuple[int, int]], images: Sequence[np.ndarray]) -> Codec:
    """A codec without training: of the configured kind, or chosen by the image size; or a pretrained one of diffusers."""
    if is_pretrained(config.codec):
        return Pretrained.fit(config.codec, images)
    side = min(min(size) for size in sizes)
    kind = config.codec if config.codec != "auto" else Pixels.kind if side < 16 else BlockPCA.kind
    block = config.codec_block or (4 if side < 64 else 8)
    return fit_codec(kind, images, block, config.codec_components or (6 if block <= 4 else 8))


def _check_chat(chat: ChatLayout, tokenizer: Tokenizer) -> None:
    """PrepareError when the layout contains bos or pad, or a suffix of the assistant that cannot end an answer."""
    markers = tokenizer.markers
    ends = {markers.get("eos"), *markers.get("other_eos_ids", ())}
    for name, text in asdict(chat).items():
        option = f"--chat.{name.replace('_', '-')} {text!r}"
        special = tokenizer.find_special(text)
        for marker in ("bos", "pad"):
            if markers.get(marker) in special and markers[marker] not in ends:
                raise PrepareError(f"{option} contains the tokenizer's {marker}, which only training adds: leave it out")
        if name == "assistant_suffix" and text.strip() and not special:
            raise PrepareError(f"{option} has no special token of the tokenizer that could end an answer: "
                               f"{_advise_special(tokenizer)}")  # fmt: skip


def _advise_special(tokenizer: Tokenizer) -> str:
    names = tokenizer.special_tokens
    if not names:
        return "this tokenizer has none, so use white space, or --tokenizer with a tokenizer.json that has one"
    return f"use white space, or one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _copy_tokenizer_and_codec(like: Path, chat: ChatLayout, folder: Path) -> None:
    """Use the tokenizer, codec and sizes of another prepared folder, or of a run."""
    info = read_like_info(like)
    text = (like / "tokenizer.json").read_text(encoding="utf-8")
    _check_chat(chat, Tokenizer.from_json(text, info["tokenizer"].get("markers")))
    for name in ("tokenizer.json", "codec.safetensors"):
        write_whole(folder / name, (like / name).read_bytes())
    write_json(folder / "fitted.json", {name: info[name] for name in ("tokenizer", "codec", "sizes", "image_channels")})


def read_like_info(like: Path) -> dict:
    """The tokenizer, codec, sizes, image channels and chat layout (None without conversations) of a prepared folder, a run,
    or an exported run. OpenError when it is not one of these, or its files have changed."""
    path = next((like / name for name in ("dataset.json", "run.json", "config.json") if (like / name).exists()), None)
    if path is None or path.name == "dataset.json":
        prepared = open_prepared(like)
        return prepared.metadata | {"chat": prepared.chat_layout()}
    values = read_json(path)
    if "format" in values:
        check_run_format(like, values)
    try:
        kind, vocabulary = values["codec"]["kind"], Vocabulary.from_json(values["vocabulary"])
        codec = codec_from_bytes(kind, read_checked(like / "codec.safetensors", values["codec"]["sha256"]))
        read_checked(like / "tokenizer.json", values["tokenizer"]["sha256"])
        chat = from_json(ChatLayout, values["notes"]["chat"]) if values["notes"].get("chat") else None
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenError(f"{path} is neither a run's nor an exported run's: {error!r}") from None
    return {
        "tokenizer": {
            "size": vocabulary.num_text_tokens, "markers": vocabulary.tokenizer_markers,
            "sha256": values["tokenizer"]["sha256"],
        },
        "codec": {"kind": kind, "channels": codec.channels, "sha256": values["codec"]["sha256"]},
        "sizes": [(x * codec.downsampling, y * codec.downsampling) for y, x in vocabulary.boi],
        "image_channels": codec.image_channels, "chat": chat,
    }  # fmt: skip


def train_tokenizer(texts: Sequence[str], size: int | None) -> Tokenizer:
    """A tokenizer trained on these texts. The default size grows with the text: otherwise a whole caption is one token."""
    default = 256 + sum(map(len, texts)) // CHARS_PER_TOKEN
    return Tokenizer.train(texts, min(MAX_DEFAULT_VOCAB, default) if size is None else size)


def _choose_sizes(streams: Sequence[DocumentStream], config: PrepareConfig) -> tuple[tuple[tuple[int, int], ...], int]:
    """Image sizes (width, height), and the number of channels: 1 if the first images are all grey, otherwise 3. The default
    is the size of the first images if it is the same for all and at most 256; otherwise 256 x 256."""
    shapes: list[tuple[int, ...]] = []
    for stream in streams:
        parts = (part for raw in islice(stream(), config.fit_documents) for part in raw.segments)
        shapes += [part.pixels.shape for part in islice((p for p in parts if isinstance(p, RawImage)), NUM_SIZE_SAMPLES)]
    if not shapes:
        raise PrepareError("none of the first documents has an image: add a source with images, or use the codec and "
                           "tokenizer of another prepared folder with --like")  # fmt: skip
    image_channels = 1 if all(shape[2] == 1 for shape in shapes) else 3
    height, width = shapes[0][:2]
    is_same_size = all(shape[:2] == (height, width) for shape in shapes)
    default = (width, height) if is_same_size and max(height, width) <= 256 else (256, 256)
    return tuple(map(parse_size, config.sizes)) or (default,), image_channels


def open_tokenizer_and_codec(folder: Path) -> TokenizerAndCodec:
    """Open the tokenizer, the codec and the sizes that `fit` saved. OpenError when a file is missing or was changed."""
    info = read_json(folder / "fitted.json")
    text = read_checked(folder / "tokenizer.json", info["tokenizer"]["sha256"])
    tokenizer = Tokenizer.from_json(text.decode(), info["tokenizer"].get("markers"))
    codec = codec_from_bytes(info["codec"]["kind"], read_checked(folder / "codec.safetensors", info["codec"]["sha256"]))
    return TokenizerAndCodec(tokenizer, codec, tuple(map(tuple, info["sizes"])))
