"""The config of a prepared data set. Imports nothing heavy."""

from dataclasses import dataclass, field, fields

from transfusion.config import ChatLayout, TokenizerSize, parse_size
from transfusion.fields import Config, NonNegativeInt, PositiveInt, Share, Size


@dataclass(frozen=True)
class PrepareConfig(Config):
    """How files become a prepared data set: the same files and settings always give the same one."""

    # Reuse tokenizer, codec, sizes and chat layout of this prepared folder, run, or model in the package or on the hub.
    like: str | None = None
    tokenizer: str | None = None  # The tokenizer.json to use; if not set, a tokenizer is trained on the first documents.
    tokenizer_size: TokenizerSize | None = None  # Largest vocabulary of a trained tokenizer; at most 8192 if not set.
    sizes: tuple[str, ...] = ()  # WIDTHxHEIGHT in pixels; if not set, their own if equal and at most 256x256, else 256x256.
    # Codec: pixels, block_pca, a folder from fit-codec, or an AutoencoderKL; auto is pixels below 16 a side, else block_pca.
    codec: str = "auto"
    codec_block: Size | None = None  # Side of a block of block_pca in pixels; if not set, 4 for images below 64, else 8.
    codec_components: Size | None = None  # Latent channels of block_pca; if not set, 6 for blocks of 4 pixels, else 8.
    fit_documents: PositiveInt = 2_000  # Number of documents of each source to which tokenizer and codec are fitted.
    # Expected number of held-out documents per source, on average; at most 0.05 of all pictures and texts are held out.
    heldout: NonNegativeInt = 1_000
    max_faults: Share = 0.02  # Largest share of a source's records that may be skipped as faulty.
    # Prepare a source although the rest of one of its files cannot be read, so that an unknown number of records is missing.
    allow_cut: bool = False
    records_per_shard: PositiveInt = 2048  # Number of records that are written as one shard.
    chat: ChatLayout = field(default_factory=ChatLayout)

    def __post_init__(self):
        super().__post_init__()
        names = "tokenizer", "tokenizer_size", "sizes", "codec", "codec_block", "codec_components", "fit_documents"
        changed = [f.name.replace("_", "-") for f in fields(self) if f.name in names and getattr(self, f.name) != f.default]
        if self.like is not None and changed:
            raise ValueError(f"like and --{changed[0]} cannot be combined: the folder decides tokenizer, codec and sizes")
        for size in self.sizes:
            parse_size(size, "sizes")
