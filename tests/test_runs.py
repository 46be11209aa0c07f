"""The recipes: every row of the paper's tables has one, with the paper's size and generation settings."""

from dataclasses import replace

import pytest

from transfusion.config import Run, from_json, to_json
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.paper import PAPER
from transfusion.runs import CHAMELEON_VOCAB_SIZE, NAMES, NUM_CODES, SIZES, named_run
from transfusion.sequence import Vocabulary

TRANSFORMERS = {"0.16b": 162, "0.37b": 374, "0.76b": 778, "1.4b": 1364, "7b": 6738}  # millions, with 32,000 ids
UNET = {"0.16b": 172}  # millions, from the 106.1 % of Table 7; 0.27 billion for the others


@pytest.mark.parametrize("name", NAMES)
def test_recipe_equals_its_json(name):
    run = named_run(name)
    assert run.recipe == name
    assert from_json(Run, to_json(run)) == run


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"{row.table} {row.label}")
def test_rows_have_the_papers_parameters(row):
    run = named_run(row.run)
    size = next(size for size in SIZES if run.model.layers == SIZES[size].layers and run.model.width == SIZES[size].width)
    assert size in run.recipe or run.recipe == "7b-large"
    count = count_parameters(build_on_meta(run.model))
    without_images = replace(run.model, patches="codes", patch_size=1, qk_norm=False, vocab_size=32_000)
    text_only = count_parameters(build_on_meta(without_images))
    assert text_only == pytest.approx(TRANSFORMERS[size] * 1e6, rel=3e-3)
    added = count - text_only
    match run.model.patches:
        case "linear":
            width = run.model.width  # two layers for patches, and two for the timestep: 256 -> D -> D
            assert added == pytest.approx(width * (2 * run.model.patch_width + 256 + width), rel=0.01)
        case "unet" if run.model.patch_size == 2:
            assert added == pytest.approx(UNET.get(size, 270) * 1e6, rel=0.05)
        case "unet":
            assert added > 0.15e9
        case "codes":
            added -= 2 * run.model.layers * run.model.head_size  # norms of queries and keys
            assert added == pytest.approx(2 * (CHAMELEON_VOCAB_SIZE - 32_000) * run.model.width, rel=0.01)


def test_rows_match_the_tables():
    counts = [sum(row.table == table for row in PAPER) for table in range(3, 10)]
    assert counts == [2, 4, 4, 7, 10, 4, 1]
    names = [[row.run for row in PAPER if row.table == table] for table in range(3, 10)]
    linear, unet = (["0.16b", "0.37b", "0.76b", "1.4b", "7b"], [f"{size}-unet" for size in SIZES])
    assert names == [
        ["7b", "chameleon-7b"], ["0.76b", "0.76b", "chameleon-text-0.76b", "chameleon-0.76b"],
        ["0.76b-causal", "0.76b", "0.76b-unet-causal", "0.76b-unet"],
        ["0.76b-patch1", "0.76b", "0.76b-patch4", "0.76b-patch8", "0.76b-unet", "0.76b-unet-patch4", "0.76b-unet-patch8"],
        linear + unet, ["0.76b-unet", "7b-unet", "0.76b-unet-limit", "7b-unet-limit"], ["7b-large"],
    ]  # fmt: skip
    settings = {3: (5.0, 30_000), 4: (None, None), 9: (None, 30_000)}
    for row in PAPER:
        assert (row.guidance_scale, row.fid_images) == settings.get(row.table, (3.0, 5_000)), row.label
    text_only = [(row.table, row.label, row.batch_size) for row in PAPER if row.sources == "text"]
    assert text_only == [(4, "Llama 2", 256), (4, "Chameleon: + stability modifications", 256)]


def test_batch_of_each_row():
    """2M positions, in Table 9 4M. Rows with text alone have half of the positions, which is their text."""
    for row in PAPER:
        run = named_run(row.run)
        assert run.training.batch_size * run.data.seq_len == 2**21 * (2 if row.table == 9 else 1), row.label
        assert row.batch_size == run.training.batch_size // (2 if row.sources == "text" else 1), row.label


def test_rows_differ_only_in_the_ablated_settings():
    runs = {name: to_json(named_run(name)) for name in NAMES}

    def differs(first: str, second: str) -> set[str]:
        return {f"{part}.{key}" for part, values in runs[first].items() if isinstance(values, dict)
                for key, value in values.items() if value != runs[second][part][key]}  # fmt: skip

    stability = {"model.qk_norm", "model.post_norm", "model.z_loss", "training.learning_rate"}
    assert differs("0.76b", "chameleon-text-0.76b") == stability
    images = {"model.patches", "model.patch_size", "model.vocab_size"}
    assert differs("chameleon-text-0.76b", "chameleon-0.76b") == images
    assert differs("0.76b", "0.76b-causal") == differs("0.76b-unet", "0.76b-unet-causal") == {"model.image_attention"}
    assert differs("0.76b", "0.76b-unet") == {"model.patches"}
    assert differs("0.76b-unet", "0.76b-unet-limit") == {"data.image_first_max_t"}
    assert differs("7b-unet", "7b-large") == {"training.steps", "training.batch_size"}


def test_chameleon_vocab_size():
    vocabulary = Vocabulary.build(32_000, [(32, 32)], patch_size=1, num_image_codes=NUM_CODES)
    assert vocabulary.size == CHAMELEON_VOCAB_SIZE
