"""The data of a run: its sources by name, and their tokenizer, codec and vocabulary."""

from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

from transfusion.chat import describe_layout
from transfusion.codecs.codec import Codec, codec_to_bytes, fit_codec
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import BUILT_IN, ChatLayout, DataConfig
from transfusion.data.loader import DocumentEncoder, Source
from transfusion.data.raw import RawImage, RawText
from transfusion.data.reading.built_in import open_built_in
from transfusion.data.store import DecodedSource, PreparedFolder, StoredSource, open_prepared
from transfusion.sequence import Vocabulary

NUM_HASHED_DOCUMENTS = 512  # of a built-in source
MARKERS = ("bos", "eos", "pad")  # of a tokenizer; folders that a run reads must agree on them


def open_sources(config: DataConfig, split: str) -> list[Source]:
    """The run's sources for the loader, "train" or "heldout". ValueError when none is configured or one is unknown."""
    if config.prepared:
        folders = _open_folders(config)
        sources = [_folder_of(name, folders).source(name, split) for name in config.sources or _names(folders)]
        return [source for source in sources if split == "train" or len(source)]
    if not config.sources:
        raise ValueError(f"this run has no data: give prepared folders, or sources ({', '.join(BUILT_IN)})")
    return [open_built_in(name, split, config.digits, config.shapes) for name in config.sources]


def open_raw(config: DataConfig, split: str) -> list[Source]:
    """The same sources as `RawDocument`s, with texts and pixels."""
    sources = open_sources(config, split)
    return [DecodedSource(source) for source in sources] if config.prepared else sources


def name_sources(config: DataConfig) -> DataConfig:
    """The same configuration with absolute paths of prepared folders, and all their sources by name."""
    if not config.prepared:
        return config
    folders = tuple(str(Path(folder).resolve()) for folder in config.prepared)
    config = replace(config, prepared=folders)
    return replace(config, sources=config.sources or _names(_open_folders(config)))


def hash_sources(config: DataConfig) -> dict[str, str]:
    """A SHA-256 of the content of each source: of a prepared one over the digests of its shards, of a built-in one over its
    first training documents. It depends on no path, date or version."""
    sources = open_sources(config, "train")
    return {s.name: s.content_hash() if isinstance(s, StoredSource) else _hash_documents(s) for s in sources}


def _hash_documents(source: Source) -> str:
    digest = sha256(str(len(source)).encode())
    for n in range(min(NUM_HASHED_DOCUMENTS, len(source))):
        for part in source[n].segments:
            digest.update(part.text.encode() if isinstance(part, RawText) else part.pixels.tobytes())
            digest.update(b"\0")  # so that no text can move to the next segment
    return digest.hexdigest()


def has_tokenizer_and_codec(config: DataConfig, tokenizer: Tokenizer, codec: Codec) -> bool:
    """Whether the prepared data were encoded with this tokenizer and codec."""
    first = _open_folders(config)[0]
    return (first.tokenizer.to_json(), codec_to_bytes(first.codec)) == (tokenizer.to_json(), codec_to_bytes(codec))


def chat_layout(config: DataConfig) -> ChatLayout | None:
    """The layout of the conversations in the run's data; None if they have none. ValueError when two folders have different
    ones."""
    folders = _open_folders(config) if config.prepared else []
    layouts = {}
    for folder in folders:
        names = [name for name in config.sources or folder.names if name in folder.names]
        if (layout := folder.chat_layout(names)) is not None:
            layouts[layout] = folder.folder
    if len(layouts) > 1:
        (a, first), (b, other) = [*layouts.items()][:2]
        raise ValueError(f"{first} and {other} have different chat layouts ({describe_layout(a)}; {describe_layout(b)}): "
                         f"prepare {other} with --like {first}")  # fmt: skip
    return next(iter(layouts), None)


def fit(config: DataConfig, patch_size: int, seed: int, tokenizer: Tokenizer | None = None) -> DocumentEncoder:
    """The encoder of a new run: that of its prepared data, or a tokenizer and a codec fitted now.

    `tokenizer`: of a pretrained language model; then none is fitted, and its markers are used. ValueError when prepared data
    have another tokenizer, or the data do not fit the configuration.
    """
    if config.prepared:
        folders = _open_folders(config)
        if tokenizer is not None and tokenizer.to_json() != folders[0].tokenizer.to_json():
            raise ValueError(f"{folders[0].folder} was prepared with another tokenizer than the language model's: prepare "
                             "it with --tokenizer and the language model's tokenizer.json")  # fmt: skip
        tokenizer, codec = tokenizer or folders[0].tokenizer, folders[0].codec
        shapes = sorted({shape for folder in folders for shape in folder.shapes})
        _check_patches(shapes, patch_size)
        codes = codec.codes if isinstance(codec, VQ) else 0
        vocabulary = Vocabulary.build(tokenizer.size, shapes, patch_size, codes, **tokenizer.markers)
        _check_seq_len(folders, config, vocabulary)
        return DocumentEncoder(tokenizer, codec, vocabulary, config, seed)
    texts, images = [], []
    for source in open_sources(config, "train"):
        for raw in islice((source[n] for n in range(len(source))), config.fit_documents):
            texts += [part.text for part in raw.segments if isinstance(part, RawText)]
            images += [part.pixels for part in raw.segments if isinstance(part, RawImage)]
    if not images:
        raise ValueError(f"the sources {', '.join(config.sources)} have no images: add a source with images")
    tokenizer = tokenizer or Tokenizer.train(texts, config.tokenizer_size)
    codec = fit_codec(config.codec, images, config.codec_block, config.codec_components)
    shapes = sorted({codec.encode(image).shape[1:] for image in images})
    _check_patches(shapes, patch_size)
    vocabulary = Vocabulary.build(tokenizer.size, shapes, patch_size, **tokenizer.markers)
    return DocumentEncoder(tokenizer, codec, vocabulary, config, seed)


def reuse(config: DataConfig, tokenizer: Tokenizer, codec: Codec, vocabulary: Vocabulary, seed: int) -> DocumentEncoder:
    """The encoder of a run that starts from another run: the same one. ValueError when the data do not fit it."""
    if config.prepared:
        folders = _open_folders(config)
        first, shapes = folders[0], sorted({shape for folder in folders for shape in folder.shapes})
        if not has_tokenizer_and_codec(config, tokenizer, codec):
            raise ValueError(f"{first.folder} was prepared with another tokenizer or codec than the initial run: prepare it "
                             "with --like and that run")  # fmt: skip
        _check_seq_len(folders, config, vocabulary)
    else:
        sources = open_sources(config, "train")
        images = [part.pixels for source in sources for part in source[0].segments if isinstance(part, RawImage)]
        for pixels in images:
            if pixels.shape[2] != codec.image_channels:
                raise ValueError(f"the new data have {pixels.shape[2]} image channels, but the initial run has "
                                 f"{codec.image_channels}")  # fmt: skip
        shapes = [codec.encode(pixels).shape[-2:] for pixels in images]
    for shape in shapes:
        if shape not in vocabulary.boi:
            supported = ", ".join(f"{y}x{x}" for y, x in vocabulary.boi) or "no images"
            raise ValueError(f"the new data have latents of {shape[0]}x{shape[1]}, the initial run supports {supported}: "
                             "only those of its prepared folders, also of sources that --data.sources leaves out")
    return DocumentEncoder(tokenizer, codec, vocabulary, config, seed)


def _check_patches(shapes: list[tuple[int, int]], patch_size: int) -> None:
    for shape in shapes:
        if shape[0] % patch_size or shape[1] % patch_size:
            raise ValueError(f"a latent of {shape[0]}x{shape[1]} cannot be divided into patches of side {patch_size}")


def _check_seq_len(folders: list[PreparedFolder], config: DataConfig, vocabulary: Vocabulary) -> None:
    """ValueError when an image with its caption does not fit into a row: before training, not at the first such image."""
    for name in config.sources or _names(folders):
        needed = _folder_of(name, folders).source(name, "train").min_seq_len(vocabulary, config)
        if needed > config.seq_len:
            parts = "its caption and its noisy copy" if config.clean_copies else "its caption"
            raise ValueError(f"an image of {name} needs {needed} positions with {parts}, a row has {config.seq_len}: "
                             "raise data.seq_len")  # fmt: skip


def _open_folders(config: DataConfig) -> list[PreparedFolder]:
    """All prepared folders. OpenError when one cannot be used, ValueError when they cannot be used together."""
    folders = [open_prepared(Path(folder)) for folder in config.prepared]
    first, names = folders[0], _names(folders)
    for other in folders[1:]:
        has_other = any(first.metadata[key]["sha256"] != other.metadata[key]["sha256"] for key in ("tokenizer", "codec"))
        if has_other or any(first.tokenizer.markers.get(name) != other.tokenizer.markers.get(name) for name in MARKERS):
            raise ValueError(f"{other.folder} was prepared with another tokenizer or codec than {first.folder}: prepare it "
                             f"with --like {first.folder}")  # fmt: skip
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two prepared sources are called {name}: prepare one of them with another name, NAME=SOURCE")
    return folders


def _names(folders: list[PreparedFolder]) -> tuple[str, ...]:
    return tuple(name for folder in folders for name in folder.names)


def _folder_of(name: str, folders: list[PreparedFolder]) -> PreparedFolder:
    for folder in folders:
        if name in folder.names:
            return folder
    paths = " and ".join(str(folder.folder) for folder in folders)
    raise ValueError(f"{paths}: there is no source {name!r}; there are {', '.join(_names(folders))}")
