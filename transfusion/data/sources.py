"""What a run reads: its sources by name, and the tokenizer, codec and ids that belong to them."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from transfusion.codecs.pixels import fit_codec
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.loader import Encoder, Source
from transfusion.data.raw import RawImage, RawText
from transfusion.data.readers import MADE, made
from transfusion.data.store import Decoded, Prepared, open_prepared
from transfusion.disk import sha256_of
from transfusion.sequence import Vocabulary


def open_sources(config: DataConfig, split: str) -> list[Source]:
    """The run's sources as the loader reads them, "train" or "heldout". ValueError when it names none, or an unknown one."""
    if config.prepared is not None:
        prepared = open_prepared(Path(config.prepared))
        sources = [prepared.source(name, split) for name in config.sources or prepared.names]
        return [source for source in sources if split == "train" or len(source)]
    if not config.sources:
        raise ValueError(
            f"this run has no data of its own: give it some, --data DIR (from transfusion data prepare) or "
            f"for example --data.sources {MADE[1]}"
        )
    return [made(name, split, config.interleaved, config.level) for name in config.sources]


def open_raw(config: DataConfig, split: str) -> list[Source]:
    """The same sources as a person reads them: `RawDocument`s, with texts and pixels."""
    if config.prepared is None:
        return open_sources(config, split)
    return [Decoded(source) for source in open_sources(config, split)]


def name_sources(config: DataConfig) -> DataConfig:
    """The same data with the folder of what is prepared in full, and every source that is read by name."""
    if config.prepared is None:
        return config
    folder = Path(config.prepared).resolve()
    return replace(config, prepared=str(folder), sources=config.sources or open_prepared(folder).names)


def fingerprint(config: DataConfig) -> str | None:
    """The SHA-256 of what is prepared, wherever it lies; None for sources that need no files."""
    return None if config.prepared is None else sha256_of(Path(config.prepared) / "dataset.json")


def fit(config: DataConfig, patch_size: int, seed: int) -> Encoder:
    """What a new run encodes with: what its prepared data were made with, or else a tokenizer and a codec fitted now."""
    if config.prepared is not None:
        prepared = open_prepared(Path(config.prepared))
        encoder = Encoder(prepared.tokenizer, prepared.codec, prepared.vocabulary(patch_size), config, seed)
        _check_patches(prepared.shapes, patch_size)
        _check_rows(prepared, config, encoder.vocabulary)
        return encoder
    texts, pictures = [], []
    for source in open_sources(config, "train"):
        for raw in islice((source[n] for n in range(len(source))), config.codec_documents):
            texts += [part.text for part in raw.segments if isinstance(part, RawText)]
            pictures += [part.pixels for part in raw.segments if isinstance(part, RawImage)]
    if not pictures:
        raise ValueError(f"the sources {', '.join(config.sources)} hold no image: add one that does")
    tokenizer = Tokenizer.train(texts, config.text_ids)
    codec = fit_codec(config.codec, pictures, config.codec_block, config.codec_components)
    shapes = sorted({codec.encode(picture).shape[1:] for picture in pictures})
    _check_patches(shapes, patch_size)
    return Encoder(tokenizer, codec, Vocabulary.build(tokenizer.size, shapes, patch_size), config, seed)


def _check_patches(shapes: list[tuple[int, int]], patch_size: int) -> None:
    for shape in shapes:
        if shape[0] % patch_size or shape[1] % patch_size:
            raise ValueError(f"a latent of {shape[0]}x{shape[1]} cannot be cut into patches of side {patch_size}")


def _check_rows(prepared: Prepared, config: DataConfig, vocabulary: Vocabulary) -> None:
    """Better now than when the loader comes to the first image that does not fit."""
    for name in config.sources or prepared.names:
        needed = max(prepared.source(name, split).shortest_row(vocabulary) for split in ("train", "heldout"))
        if needed > config.row_length:
            raise ValueError(
                f"an image of {name} takes {needed} positions with its caption, a row has {config.row_length}: "
                "raise data.row_length"
            )
