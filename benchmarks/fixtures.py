"""Inputs of the benchmarks: random documents like the paper's, and engines with random weights."""

from dataclasses import replace

import numpy as np

from benchmarks.timing import Setting
from transfusion.checkpoint.open import OpenedRun
from transfusion.config import DataConfig
from transfusion.data.loader import DocumentEncoder, Loader
from transfusion.data.sources import fit
from transfusion.inference.engine import Engine
from transfusion.model.transfusion import build
from transfusion.parallel import lower_weights
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Batch, Document, Image, Text, Vocabulary, collate

LATENT_SHAPE = 8, 32, 32  # of an image of 256x256; with patches of 2x2 it takes 256 positions
NUM_TEXT_TOKENS = 31_900  # with the markers the vocabulary has the paper's 32,000 entries
PAIR_SHARE = 0.58  # positions of captioned images among all; half of all positions are then patches
NUM_DOCUMENTS = 100_000


class CaptionedImages:
    """Random images with random captions of 16 to 64 tokens."""

    name = "pictures"

    def __len__(self) -> int:
        return NUM_DOCUMENTS

    def __getitem__(self, id: int) -> Document:
        rng = np.random.default_rng(id)
        caption = rng.integers(NUM_TEXT_TOKENS, size=rng.integers(16, 65)).tolist()
        image = Image(rng.standard_normal(LATENT_SHAPE, dtype=np.float32))
        return Document((Text(tuple(caption)), image), id, self.name, pairs=True)


class Passages:
    """Random text of 32 to 1,024 tokens."""

    name = "passages"

    def __len__(self) -> int:
        return NUM_DOCUMENTS

    def __getitem__(self, id: int) -> Document:
        rng = np.random.default_rng(id)
        tokens = rng.integers(NUM_TEXT_TOKENS, size=rng.integers(32, 1025)).tolist()
        return Document((Text(tuple(tokens)),), id, self.name)


def make_paper_loader(seq_len: int, batch_size: int) -> Loader:
    """Rows like the paper's: half of the positions are patches, 256 per image."""
    config = DataConfig(mixture_weights=(PAIR_SHARE, 1 - PAIR_SHARE), seq_len=seq_len, shuffle_block=512)
    vocabulary = Vocabulary.build(NUM_TEXT_TOKENS, [LATENT_SHAPE[1:]], patch_size=2)
    return Loader([CaptionedImages(), Passages()], DocumentEncoder(None, None, vocabulary, config, seed=0), batch_size)


def make_paper_batch(seq_len: int, num_rows: int) -> Batch:
    """The first rows of this loader."""
    loader = make_paper_loader(seq_len, num_rows)
    return collate(next(loader.batches())[0], seq_len, loader.vocabulary)


def make_engine(name: str, setting: Setting) -> Engine:
    """The engine of a small recipe, with rows of 512. On CUDA the model is 0.16b: with a smaller one Python dominates."""
    run = named_run(name)
    encoder = fit(run.data, run.model.patch_size, seed=0)
    config = replace(SIZES["0.16b"], latent_channels=run.model.latent_channels) if setting.cuda else run.model
    config = replace(config, vocab_size=encoder.vocabulary.size)
    run = replace(run, model=config, data=replace(run.data, seq_len=512))
    model = build(config, 0, setting.device).eval().requires_grad_(False)
    lower_weights(model, setting.device)
    return Engine(
        OpenedRun(name, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {}, model, step=0, device=setting.device)
    )
