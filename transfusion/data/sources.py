"""What a run reads: its sources by name, and the tokenizer, codec and ids that belong to them."""

from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

from transfusion.codecs.codec import Codec, codec_to_bytes, fit_codec
from transfusion.codecs.text import Tokenizer
from transfusion.codecs.vq import VQ
from transfusion.config import BUILT_IN, DataConfig
from transfusion.data.loader import Encoder, Source
from transfusion.data.raw import RawImage, RawText
from transfusion.data.reading.readers import open_built_in
from transfusion.data.store import DecodedSource, Prepared, open_prepared
from transfusion.disk import sha256_of
from transfusion.sequence import Vocabulary


def open_sources(config: DataConfig, split: str) -> list[Source]:
    """The run's sources as the loader reads them, "train" or "heldout". ValueError when it names none, or an unknown one."""
    if config.prepared:
        folders = _open_folders(config)
        sources = [_folder_of(name, folders).source(name, split) for name in config.sources or _names(folders)]
        return [source for source in sources if split == "train" or len(source)]
    if not config.sources:
        raise ValueError(f"this run has no data: name prepared folders, or sources ({', '.join(BUILT_IN)})")
    return [open_built_in(name, split, config.digits, config.shapes) for name in config.sources]


def open_raw(config: DataConfig, split: str) -> list[Source]:
    """The same sources as a person reads them: `RawDocument`s, with texts and pixels."""
    sources = open_sources(config, split)
    return [DecodedSource(source) for source in sources] if config.prepared else sources


def name_sources(config: DataConfig) -> DataConfig:
    """The same data with the folders of what is prepared in full, and every source that is read by name."""
    if not config.prepared:
        return config
    folders = tuple(str(Path(folder).resolve()) for folder in config.prepared)
    config = replace(config, prepared=folders)
    return replace(config, sources=config.sources or _names(_open_folders(config)))


def fingerprint(config: DataConfig) -> str | None:
    """One hash of all that is prepared, wherever it lies; None for sources that need no files."""
    hashes = [sha256_of(Path(folder) / "dataset.json") for folder in config.prepared]
    return sha256(" ".join(hashes).encode()).hexdigest() if hashes else None


def fit(config: DataConfig, patch_size: int, seed: int, tokenizer: Tokenizer | None = None) -> Encoder:
    """What a new run encodes with: what its prepared data were made with, or else a tokenizer and a codec fitted now.

    With a tokenizer that is given (a language model's) none is fitted. ValueError when prepared data were made with another.
    """
    if config.prepared:
        folders = _open_folders(config)
        if tokenizer is not None and tokenizer.to_json() != folders[0].tokenizer.to_json():
            raise ValueError(f"{folders[0].folder} was made with another tokenizer than the language model's: prepare it "
                             "with --tokenizer and the tokenizer.json of that")  # fmt: skip
        tokenizer, codec = folders[0].tokenizer, folders[0].codec
        shapes = sorted({shape for folder in folders for shape in folder.shapes})
        _check_patches(shapes, patch_size)
        codes = codec.codes if isinstance(codec, VQ) else 0
        vocabulary = Vocabulary.build(tokenizer.size, shapes, patch_size, codes, **tokenizer.markers)
        _check_rows(folders, config, vocabulary)
        return Encoder(tokenizer, codec, vocabulary, config, seed)
    texts, pictures = [], []
    for source in open_sources(config, "train"):
        for raw in islice((source[n] for n in range(len(source))), config.fit_documents):
            texts += [part.text for part in raw.segments if isinstance(part, RawText)]
            pictures += [part.pixels for part in raw.segments if isinstance(part, RawImage)]
    if not pictures:
        raise ValueError(f"the sources {', '.join(config.sources)} hold no image: add one that does")
    tokenizer = tokenizer or Tokenizer.train(texts, config.tokenizer_size)
    codec = fit_codec(config.codec, pictures, config.codec_block, config.codec_components)
    shapes = sorted({codec.encode(picture).shape[1:] for picture in pictures})
    _check_patches(shapes, patch_size)
    vocabulary = Vocabulary.build(tokenizer.size, shapes, patch_size, **tokenizer.markers)
    return Encoder(tokenizer, codec, vocabulary, config, seed)


def reuse(config: DataConfig, tokenizer: Tokenizer, codec: Codec, vocabulary: Vocabulary, seed: int) -> Encoder:
    """What a run encodes with that begins where another ended: what that one does. ValueError when its data do not suit."""
    if config.prepared:
        folders = _open_folders(config)
        first, shapes = folders[0], sorted({shape for folder in folders for shape in folder.shapes})
        if (first.tokenizer.to_json(), codec_to_bytes(first.codec)) != (tokenizer.to_json(), codec_to_bytes(codec)):
            raise ValueError(f"{first.folder} was made with another tokenizer or codec than the run to begin from: prepare "
                             "it --like that run")  # fmt: skip
        _check_rows(folders, config, vocabulary)
    else:
        sources = open_sources(config, "train")
        firsts = [part.pixels for source in sources for part in source[0].segments if isinstance(part, RawImage)]
        for pixels in firsts:
            if pixels.shape[2] != codec.image_channels:
                raise ValueError(f"the run to begin from has pictures of {codec.image_channels} colours, the new data have "
                                 f"{pixels.shape[2]}")  # fmt: skip
        shapes = [codec.encode(pixels).shape[-2:] for pixels in firsts]
    for shape in shapes:
        if shape not in vocabulary.boi:
            known = ", ".join(f"{y}x{x}" for y, x in vocabulary.boi)
            raise ValueError(f"the run to begin from knows latents of {known}, and its new data hold {shape[0]}x{shape[1]}")
    return Encoder(tokenizer, codec, vocabulary, config, seed)


def _check_patches(shapes: list[tuple[int, int]], patch_size: int) -> None:
    for shape in shapes:
        if shape[0] % patch_size or shape[1] % patch_size:
            raise ValueError(f"a latent of {shape[0]}x{shape[1]} cannot be cut into patches of side {patch_size}")


def _check_rows(folders: list[Prepared], config: DataConfig, vocabulary: Vocabulary) -> None:
    """Better now than when the loader comes to the first image that does not fit."""
    for name in config.sources or _names(folders):
        needed = _folder_of(name, folders).source(name, "train").shortest_row(vocabulary)
        if needed > config.seq_len:
            raise ValueError(
                f"an image of {name} takes {needed} positions with its caption, a row has {config.seq_len}: "
                "raise data.seq_len"
            )


def _open_folders(config: DataConfig) -> list[Prepared]:
    """All prepared folders. OpenError when one cannot be used, ValueError when they do not go together."""
    folders = [open_prepared(Path(folder)) for folder in config.prepared]
    first, names = folders[0], _names(folders)
    for other in folders[1:]:
        if any(first.about[what]["sha256"] != other.about[what]["sha256"] for what in ("tokenizer", "codec")):
            raise ValueError(
                f"{other.folder} was made with another tokenizer or codec than {first.folder}: prepare it with "
                f"--like {first.folder}"
            )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two prepared sources are called {name}: prepare one of them under another name, NAME=SOURCE")
    return folders


def _names(folders: list[Prepared]) -> tuple[str, ...]:
    return tuple(name for folder in folders for name in folder.names)


def _folder_of(name: str, folders: list[Prepared]) -> Prepared:
    for folder in folders:
        if name in folder.names:
            return folder
    places = " and ".join(str(folder.folder) for folder in folders)
    raise ValueError(f"{places} holds no source {name!r}; there are {', '.join(_names(folders))}")
