"""Table 3 on pictures of emoji, without the network: its rows, its pictures and codecs, and cells of two steps."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import lab, results
from experiments.emoji import dataset, families, judge, measures
from experiments.emoji.packages import STYLES
from experiments.lab import Options
from tests.profile import examples
from tests.test_cli import command
from tests.test_emoji import archives, packed, random_cells, read_lines  # noqa: F401  # two are fixtures
from tests.test_experiments import parse_arguments
from transfusion.cli.ignored import changed
from transfusion.disk import read_json

TINY = ("--training.steps=2", "--training.batch-size=2", "--training.warmup-steps=1", "--generation.steps=2",
        "--model.width=32", "--model.heads=2", "--model.layers=1", "--model.intermediate-size=32", "--data.seq-len=96",
        "--data.shuffle-block=16")  # fmt: skip
CODEC = ("--size", "32x32", "--network.width", "8", "--network.multipliers", "1", "1", "1", "--training.batch-size", "2",
         "--training.heldout", "4")  # fmt: skip


def test_rows_differ_in_the_family_and_in_the_size_alone():
    table = families.build_table("cpu")
    assert table.variants == families.build_table("gpu").variants
    rows = {row.name: parse_arguments(*row.arguments, "--data", "data") for row in table.variants}
    for size in families.SIZES:
        assert changed(rows[f"Transfusion {size}"], rows[f"Chameleon {size}"]) == [
            "model.post_norm", "model.z_loss", "model.patch_size", "model.patches"]  # fmt: skip
    for family in ("Transfusion", "Chameleon"):
        assert changed(rows[f"{family} S"], rows[f"{family} M"]) == [
            "model.width", "model.heads", "model.intermediate_size"]  # fmt: skip
    assert [row.data == families.data_name("codes") for row in table.variants] == [False, False, True, True]
    for claim in table.claims:
        assert {claim.first, claim.second} <= rows.keys() and claim.column in table.columns


@given(st.integers(0, 10**6))
@examples(60)
def test_concepts_of_the_table_have_all_styles_and_no_flag(seed):
    rng = np.random.default_rng(seed)
    cells = random_cells(rng, 60)
    flags, heldout = (f"concept {n}" for n in rng.permutation(5)[:2])
    cells = replace(cells, is_flag=[name == flags for name in cells.concepts],
                    kinds=["concept" if name == heldout else str(rng.choice(["train", "cell"])) for name in cells.concepts])
    chosen = measures.choose_concepts(cells)
    styles = {name: {s for c, s in zip(cells.concepts, cells.styles, strict=True) if c == name} for name in cells.concepts}
    assert chosen == {name for name, drawn in styles.items() if name not in (flags, heldout) and len(drawn) == 4}
    assert measures.choose_concepts(cells.take(rng.permutation(60))) == chosen
    for kind in ("train", "cell"):
        part = measures.take_cells(cells, kind, chosen)
        assert {*part.kinds} <= {kind} and {*part.concepts} <= chosen


@pytest.fixture
def small(packed, tmp_path, monkeypatch):  # noqa: F811
    """A lab whose packages are the test's, with few concepts, a judge of one step and small codecs of two steps."""
    monkeypatch.setattr(measures, "NUM_CONCEPTS", 8)
    monkeypatch.setattr(families, "NUM_CONCEPTS", 8)
    monkeypatch.setattr(measures, "NUM_DRAWINGS", 6)
    monkeypatch.setattr(families, "CODEC", CODEC)
    monkeypatch.setattr(families, "CODEC_STEPS", ("--training.steps", "2"))
    options = replace(dataset.Options(), packages=packed)
    monkeypatch.setattr(dataset, "Options", lambda out: replace(options, out=out))
    steps = judge.Options(steps=1)
    monkeypatch.setattr(judge, "Options", lambda data, out: replace(steps, data=data, out=out))
    measures.open_lab.cache_clear()
    yield Options(tmp_path / "lab", seeds=(3,), train=TINY)
    measures.open_lab.cache_clear()


def test_cells_are_made_from_nothing_and_judged(small, tmp_path, monkeypatch):
    """From the four archives to the table: both codecs learn from training pictures alone, for equal steps, and every cell
    has all columns."""
    commands, seeds = [], []
    monkeypatch.setattr(families, "run_command", lambda *words: (commands.append([*map(str, words)]), command(*words)))
    monkeypatch.setattr(lab, "run_command", command)
    draw = measures.draw
    monkeypatch.setattr(measures, "draw", lambda *words: (seeds.append((len(words[1]), words[2])), draw(*words))[1])
    table = families.build_table("cpu")
    table = replace(table, variants=[row for row in table.variants if row.name.endswith("S")], claims=[])
    lab.run_table(small, table)

    fits, prepares = ([words for words in commands if words[1] == verb] for verb in ("fit-codec", "prepare"))
    pictures = measures.pictures_folder(small.out)
    assert {words[3] for words in fits} == {str(pictures / "pictures" / "train")} and len(fits) == 2
    assert [{*fits[n]} - {*fits[1 - n]} for n in (0, 1)] == [
        {"--training.kl-weight", "1e-3", str(families.codec_folder(small, "latents"))},
        {"--network.codes", "512", str(families.codec_folder(small, "codes"))}]  # fmt: skip
    latents = lab.data_folder(small, families.data_name("latents"))
    assert prepares[1][prepares[1].index("--tokenizer") + 1] == str(latents / "tokenizer.json")
    for words, codec in zip(prepares, ("latents", "codes"), strict=True):
        assert words[2] == str(pictures / "pairs")
        assert words[words.index("--codec") + 1] == str(families.codec_folder(small, codec))

    rows = {split: read_lines(pictures / "pairs" / split / "metadata.jsonl") for split in ("train", "validation")}
    assert len({row["concept"] for row in rows["train"]}) == 8
    assert {row["concept"] for row in rows["validation"]} < {row["concept"] for row in rows["train"]}
    assert {row["heldout"] for row in rows["validation"]} == {"cell"} and not any("heldout" in row for row in rows["train"])
    assert Counter(row["style"] for split in rows.values() for row in split) == dict.fromkeys(STYLES, 8)
    count = min(6, 4 * len(rows["validation"]))
    assert seeds == [(count, 18), (6, 18)] * 2  # the starting noise is the run's

    for row in table.variants:
        (values,) = lab.read_cells(small, table, row).values()
        assert table.columns.keys() <= values.keys() and values["cell_count"] == count and values["train_count"] == 6
        assert all(0 <= values[name] <= 1 for name in values if name.endswith(("top5", "style", "concept")))
    before = len(commands)
    families.prepare(small)
    assert len(commands) == before  # all is there

    monkeypatch.setattr(results, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    text = results.describe_codecs(small, families)
    values = read_json(tmp_path / "results" / "codecs-emoji.json")
    assert values["cell"]["real pictures"].keys() < values["cell"]["VQ twin"].keys()
    assert values["train"]["autoencoder"]["count"] == len(rows["train"])
    assert results.describe_codecs(Options(tmp_path / "another clone"), families) == text
    lines = text.splitlines()
    assert len(lines) == 2 + 6 and lines[3].endswith(f" dB | {len(rows['validation'])} |")


def test_packages_that_cannot_be_fetched_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="error: npm is not installed"):
        families.prepare(Options(tmp_path / "lab"))
    assert families.measure_codecs(Options(tmp_path / "lab")) is None


def test_another_recipe_has_another_folder(monkeypatch):
    names = {families.data_name(name) for name in families.CODECS}
    monkeypatch.setattr(families, "CODEC_STEPS", ("--training.steps", "1"))
    assert len(names | {families.data_name(name) for name in families.CODECS}) == 4
