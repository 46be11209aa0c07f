"""What must be known of the data before training: its sources, and the tokenizer, codec and ids fitted to them."""

from itertools import islice

from transfusion.codecs.pixels import BlockPCA, Codec, Pixels
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.digits import Digits
from transfusion.data.loader import Encoder, Source
from transfusion.data.readers import RawImage, RawText
from transfusion.data.shapes import Shapes
from transfusion.data.topics import Topics
from transfusion.sequence import Vocabulary

SOURCES = ("digits", "shapes", "topics")


def open_sources(config: DataConfig, split: str) -> list[Source]:
    """The run's sources, "train" or "heldout". ValueError when it names none, or an unknown one."""
    if not config.sources:
        raise ValueError(f"this run has no data of its own: name some, for example --data.sources {SOURCES[1]}")
    return [_open(name, config, split) for name in config.sources]


def _open(name: str, config: DataConfig, split: str) -> Source:
    match name:
        case "digits":
            return Digits(split, config.interleaved)
        case "shapes":
            return Shapes(level=config.level, split=split)
        case "topics":
            return Topics(split)
        case _:
            raise ValueError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")


def fit(config: DataConfig, patch_size: int, seed: int) -> Encoder:
    """Train the tokenizer and fit the codec on the first training documents of each source; number the ids."""
    texts, pictures = [], []
    for source in open_sources(config, "train"):
        for raw in islice((source[n] for n in range(len(source))), config.codec_documents):
            texts += [part.text for part in raw.segments if isinstance(part, RawText)]
            pictures += [part.pixels for part in raw.segments if isinstance(part, RawImage)]
    if not pictures:
        raise ValueError(f"the sources {', '.join(config.sources)} hold no image: add one that does")
    tokenizer = Tokenizer.train(texts, config.text_ids)
    codec = fit_codec(config, pictures)
    shapes = sorted({codec.encode(picture).shape[1:] for picture in pictures})
    for shape in shapes:
        if shape[0] % patch_size or shape[1] % patch_size:
            raise ValueError(f"a latent of {shape[0]}x{shape[1]} cannot be cut into patches of side {patch_size}")
    return Encoder(tokenizer, codec, Vocabulary.build(tokenizer.size, shapes, patch_size), config, seed)


def fit_codec(config: DataConfig, pictures: list) -> Codec:
    """The codec that the run asks for, with the statistics of these pictures."""
    match config.codec:
        case "pixels":
            return Pixels.fit(pictures)
        case "block_pca":
            return BlockPCA.fit(pictures, config.codec_block, config.codec_components)
