"""What is measured on, made on the spot: documents of the paper's kind, and engines whose weights are chance."""

from dataclasses import replace

import numpy as np

from benchmarks.measuring import Setting
from transfusion.checkpoint.open import OpenedRun
from transfusion.config import DataConfig
from transfusion.data.loader import Encoder, Loader
from transfusion.data.sources import fit
from transfusion.inference.engine import Engine
from transfusion.model.transfusion import build
from transfusion.parallel import lower_weights
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Document, Image, Text, Vocabulary

LATENT = 8, 32, 32  # of a picture of 256x256; patches of 2x2 make 256 positions of it
TEXT = 31_900  # ids; with the markers the vocabulary has the paper's 32,000 rows
IMAGES = 0.58  # captioned pictures' share of all positions: half of all are then patches
DOCUMENTS = 100_000


class Pictures:
    """Captions of 16 to 64 tokens, each with an image, all chance."""

    name = "pictures"

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, id: int) -> Document:
        chance = np.random.default_rng(id)
        caption = chance.integers(TEXT, size=chance.integers(16, 65)).tolist()
        image = Image(chance.standard_normal(LATENT, dtype=np.float32))
        return Document((Text(tuple(caption)), image), id, self.name, pairs=True)


class Passages:
    """Text alone, of 32 to 1,024 tokens, all chance."""

    name = "passages"

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, id: int) -> Document:
        chance = np.random.default_rng(id)
        return Document((Text(tuple(chance.integers(TEXT, size=chance.integers(32, 1025)).tolist())),), id, self.name)


def paper_loader(seq_len: int, rows: int) -> Loader:
    """Rows as the paper's models read them: half of the positions are patches, in images of 256."""
    config = DataConfig(mixture_weights=(IMAGES, 1 - IMAGES), seq_len=seq_len, rows=rows, shuffle_block=512)
    vocabulary = Vocabulary.build(TEXT, [LATENT[1:]], patch_size=2)
    return Loader([Pictures(), Passages()], Encoder(None, None, vocabulary, config, seed=0))


def engine(name: str, setting: Setting) -> Engine:
    """A named small run's engine for rows of 512. On CUDA with the network of 0.16b: a smaller one would measure Python."""
    run = named_run(name)
    encoder = fit(run.data, run.model.patch_size, seed=0)
    model = replace(SIZES["0.16b"], latent_channels=run.model.latent_channels) if setting.cuda else run.model
    model = replace(model, vocab_size=encoder.vocabulary.size)
    run = replace(run, model=model, data=replace(run.data, seq_len=512))
    weights = build(model, 0, setting.device).eval().requires_grad_(False)
    lower_weights(weights, setting.device)
    return Engine(
        OpenedRun(run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {}, weights, step=0, device=setting.device)
    )
