"""The room of the tables: cells are made once, kept and shown; what a table types is understood."""

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as Picture
from scipy.stats import ttest_ind

from experiments import (
    attention,
    both,
    drawings,
    editing,
    emoji,
    lab,
    noise,
    patches,
    results,
    scaling,
    scenes,
    survival,
    text,
)  # fmt: skip
from experiments.lab import Claim, Column, Options, Table, Variant, cell
from experiments.scaling import PowerLaw
from tests.processes import Process, run
from tests.profile import THOROUGH, examples
from tests.test_cli import TINY, command
from transfusion.cli.codec import NAMED, FitCodec
from transfusion.cli.runs import Train, named, parse_run
from transfusion.cli.screen import parse
from transfusion.config import FaultToleranceConfig, Run
from transfusion.disk import write_json
from transfusion.evaluation import small_network
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.sequence import Vocabulary


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    one = ("digits", *TINY, "--data.sources", "digits", "--data.mixture-weights", "1")
    return [Variant(f"Width {width}", (*one, "--model.width", str(width))) for width in (32, 48)]


@pytest.fixture(scope="module")
def filled(variants, tmp_path_factory) -> tuple[Options, list[str]]:
    """A table of two variants by two seeds, three cells of it made; and the folders that were measured."""
    asked, seen = Options(tmp_path_factory.mktemp("table"), seeds=(0, 1)), []

    def measure(engine):
        seen.append(f"{engine.run.model.width} {engine.run.training.seed}")
        return {"width": engine.run.model.width}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "transfusion", command)  # in this process: a new one takes longer to begin than to train
        lab.fill(Options(asked.out, seeds=(0,)), variants, measure)
    lab.fill(Options(asked.out, ("Width 48",), (0, 1)), variants, measure)
    return asked, seen


def test_each_cell_is_made_once_whatever_the_table_calls_it(filled, variants):
    asked, seen = filled
    assert seen == ["32 0", "48 0", "48 1"]
    lab.fill(Options(asked.out, seeds=(0,)), [replace(variants[0], name="The narrow one")], lambda engine: 1 / 0)
    found = {path.parent for path in asked.out.rglob("measured.json")}
    assert found == {cell(asked, variants[n], seed) for n, seed in ((0, 0), (1, 0), (1, 1))}
    other = Options(asked.out, train=("--training.steps=5",))
    assert cell(other, variants[0], 0) != cell(asked, variants[0], 0)  # other settings, another cell


def test_options_for_training_add_up(monkeypatch):
    words = "--train=--training.steps=5", "--seeds", "0", "1", "--train=--training.warmup-steps=2"
    monkeypatch.setattr("sys.argv", ["table", *words])
    asked = lab.options("A table.")
    assert (asked.train, asked.seeds) == (("--training.steps=5", "--training.warmup-steps=2"), (0, 1))


def test_a_cell_says_what_was_measured_and_what_was_held_out(filled, variants):
    folder = cell(filled[0], variants[0], 0)
    values = json.loads((folder / "measured.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]["digits"]
    assert {name: values[name] for name in last} == last
    assert values["parameters"] > 0 and values["minutes"] > 0 and values["positions"] > 0
    assert values["commit"] and values["machine"]


def test_the_table_shows_means_and_spreads_of_what_is_there(filled, variants, capsys):
    asked, _ = filled
    cells = lab.measured(asked, variants[1])
    rows = [variants[0], replace(variants[1], paper={"width": "768"}), Variant("Not made", ())]
    claims = [Claim("wide is better", "text_loss", "Width 48", "Width 32"), Claim("none", "width", "Not made", "Width 32")]
    lab.show(asked, Table("widths", rows, {"width": Column(".0f"), "text_loss": Column(".3f", "lower")}, claims))
    shown = capsys.readouterr().out
    assert shown == (asked.out / "widths.md").read_text()
    head, _, narrow, wide, papers, *rest = shown.splitlines()
    assert head == "|  | seeds | width | text loss |"
    one, other = (cell["text_loss"] for cell in cells)
    spread = abs(one - other) / 2**0.5
    assert wide.split(" | ")[1:] == ["2", "48 ± 0", f"{(one + other) / 2:.3f} ± {spread:.3f} |"]
    assert narrow.startswith("| Width 32 | 1 | ") and "±" not in narrow
    assert papers == "| *paper* |  | 768 |  |"
    assert "wide is better" in rest[-2] and rest[-1] == "- 1 claim waits for rows that are not run yet"
    kept = json.loads((asked.out / "widths.json").read_text())
    assert kept["cells"]["Width 48"] == cells


def test_an_unknown_variant_is_named(filled, variants):
    with pytest.raises(SystemExit, match="there is no variant 'Width 64'"):
        lab.fill(Options(filled[0].out, ("Width 64",)), variants, lambda engine: {})


def test_what_was_stopped_is_not_measured(filled, variants, tmp_path, monkeypatch):
    """A stopped command leaves a checkpoint and exit code 0; its cell has to wait for the rest."""
    folder = cell(Options(tmp_path), variants[0], 0)
    shutil.copytree(cell(filled[0], variants[0], 0), folder)
    (folder / "measured.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    (folder / "checkpoints" / "latest").write_text("step-000002")
    monkeypatch.setattr(lab, "transfusion", lambda *arguments: None)
    with pytest.raises(SystemExit, match="stopped"):
        lab.fill(Options(tmp_path, seeds=(0,)), variants[:1], lambda engine: {})
    assert not (folder / "measured.json").exists()


def test_a_command_that_fails_ends_the_table_with_its_code():
    with pytest.raises(SystemExit) as caught:
        lab.transfusion("train", "nobody")
    assert caught.value.code == 2


# Verdicts


def judged(folder: Path, first: list[float], second: list[float], column: Column, **claim) -> str:
    """What becomes of "A is better than B", where each is known from so many seeds."""
    asked, rows = Options(folder, seeds=tuple(range(9))), [Variant("A", ("a",)), Variant("B", ("b",))]
    for row, values in zip(rows, (first, second), strict=True):
        for seed, value in enumerate(values):
            cell(asked, row, seed).mkdir(parents=True)
            write_json(cell(asked, row, seed) / "measured.json", {"x": value})
    return lab.judge(asked, Table("t", rows, {"x": column}), Claim("", "x", "A", "B", **claim))


@pytest.mark.parametrize(("first", "second", "better", "verdict"), [
    ([10, 11, 12], [1, 2, 3], "higher", "holds"),
    ([10, 11, 12], [1, 2, 3], "lower", "does not hold"),
    ([1, 2, 3], [1.5, 2.5, 3.5], "higher", "within noise"),
    ([5], [1], "higher", "no verdict"),
    ([5], [], "higher", "not run yet"),
    ([10, 11], [1], "higher", "within noise"),  # one degree of freedom: Student's t is 12.7
])  # fmt: skip
def test_a_verdict_hangs_on_the_spread_of_seeds(tmp_path, first, second, better, verdict):
    assert verdict in judged(tmp_path, first, second, Column(".1f", better))


@pytest.mark.parametrize(("value", "verdict"), [(0.98, "holds"), (0.96, "does not hold"), (0.97001, "within noise")])
def test_as_good_is_to_a_margin_and_to_the_noise(tmp_path, value, verdict):
    found = judged(tmp_path, [value - 1e-4, value + 1e-4], [1 - 1e-4, 1 + 1e-4], Column(".2f"), margin=0.03)
    assert found.startswith(verdict)


spread = st.lists(st.floats(-5, 5), min_size=2, max_size=5).filter(lambda values: statistics.pstdev(values) > 0.01)


@examples(100)
@given(spread, spread, st.sampled_from(("higher", "lower")))
def test_a_verdict_is_that_of_an_independent_t_test(first, second, better):
    """scipy's, two-sided at 5 %, of two samples with one spread."""
    found = ttest_ind(first, second, equal_var=True)
    assume(abs(found.pvalue - 0.05) > 1e-6)
    ahead = found.statistic > 0 if better == "higher" else found.statistic < 0
    expected = "within noise" if found.pvalue > 0.05 else "holds" if ahead else "does not hold"
    with TemporaryDirectory() as folder:
        assert judged(Path(folder), first, second, Column(".1f", better)).startswith(expected)


# Laws


@given(st.floats(-2, 2).filter(lambda slope: abs(slope) > 0.01), st.floats(0.1, 10), st.lists(
    st.floats(1e9, 1e14), min_size=2, max_size=5, unique=True).filter(lambda xs: max(xs) > 1.5 * min(xs)))  # fmt: skip
def test_a_law_finds_the_line_that_points_lie_on(slope, factor, flops):
    found = PowerLaw.of([(x, factor * (x / 1e12) ** slope) for x in flops])
    assert math.isclose(found.slope, slope, rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(found.reaches(found.at(3e12)), 3e12, rel_tol=1e-3)


def test_the_parity_ratio_is_the_compute_that_is_spared(tmp_path):
    """Two families on lines of the same slope, one of which needs a quarter of the compute for the same."""
    asked = Options(tmp_path, seeds=(0,))
    for n, row in enumerate(scaling.table("cpu").variants):
        flops, ahead = 6e12 * 2 ** (n % 3), 4 if row.name.startswith("Transfusion") else 1
        cell(asked, row, 0).mkdir(parents=True)
        write_json(cell(asked, row, 0) / "measured.json", {
            "parameters": 1e6, "positions": flops / 6e6, "fid": (flops * ahead) ** -0.5, "cider": 0.0,
            "bits_per_byte": (flops * ahead) ** 0.1})  # fmt: skip
    assert math.isclose(scaling.parity(asked, "fid"), 0.25, rel_tol=1e-6)
    assert scaling.parity(asked, "cider") is None  # no logarithm
    assert PowerLaw(0.0, -1e-3).reaches(5.0) is None and PowerLaw(0.0, 0.0).reaches(5.0) is None  # flat
    assert scaling.parity(asked, "bits_per_byte") is None  # it gets worse with size
    scaling.plot(asked, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    told = scaling.tell(asked)
    assert "0.25" in told and "paper 0.029" in told and told.count("no line can be drawn") == 2


@pytest.mark.parametrize(("ahead", "beyond"), [(4, False), (0.25, True)])
def test_a_parity_beyond_what_was_trained_is_called_so(tmp_path, ahead, beyond):
    asked = Options(tmp_path, seeds=(0,))
    for n, row in enumerate(scaling.table("cpu").variants):
        flops, factor = 6e12 * 2 ** (n % 3), ahead if row.name.startswith("Transfusion") else 1
        cell(asked, row, 0).mkdir(parents=True)
        write_json(cell(asked, row, 0) / "measured.json", {
            "parameters": 1e6, "positions": flops / 6e6, "fid": (flops * factor) ** -0.5, "cider": 0.0,
            "bits_per_byte": 0.0})  # fmt: skip
    assert ("by fid: **4**, beyond its largest run" in scaling.tell(asked)) == beyond
    assert ("by fid: **0.25** (paper" in scaling.tell(asked)) != beyond


# The tables


TABLES = [attention, patches, noise, text, scaling]
SCALES = ["cpu", "gpu"]


@cache
def understood(*words: str) -> Run:
    """The run that is typed; tables share rows."""
    return parse_run(Train, "train", *named("train", list(words)))[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("module", TABLES, ids=lambda module: module.__name__)
def test_what_a_table_types_is_understood(module, scale):
    """Every variant is a run; every claim is about rows and columns that are there."""
    table, of = module.table(scale), scenes.SCALES[scale]
    names = [variant.name for variant in table.variants]
    assert len(set(names)) == len(names)
    for variant in table.variants:
        run = understood(*variant.arguments, *(("--data", "data") if variant.data else ()))
        built = build_on_meta(run.model)
        kind = {"linear": "LinearPatches", "unet": "UNetPatches", "codes": "NoneType"}[run.model.patches]
        assert type(built.patches).__name__ == kind
        assert (run.data.seq_len, run.training.steps) == (320, (2 if run.data.prepared else 1) * of.steps)
        assert run.data.rows == of.rows // (3 if run.data.sources == ("topics",) else 1)
    for claim in table.claims:
        assert {claim.first, claim.second} <= set(names) and claim.column in table.columns


@pytest.mark.parametrize("scale", SCALES)
def test_patches_are_as_many_as_their_names_say(scale):
    for variant in patches.table(scale).variants:
        run = understood(*variant.arguments)
        found = Vocabulary.build(300, [(8, 8)], run.model.patch_size).patches((8, 8))
        assert found == int(variant.name.split()[1])


@pytest.mark.parametrize("scale", SCALES)
def test_tables_share_what_they_have_in_common(scale):
    def keys(module) -> set[Path]:
        return {cell(Options(), variant, 0) for variant in module.table(scale).variants}

    for one, other, common in ((attention, patches, 2), (attention, noise, 1), (text, scaling, 2)):
        assert len(keys(one) & keys(other)) == common


def test_rates_are_written_as_people_write_them():
    assert [scenes.rate(value) for value in (4e-3, 2e-3, 1e-3, 5e-4)] == ["4e-3", "2e-3", "1e-3", "5e-4"]


def test_what_scenes_measure_is_measured(tmp_path, monkeypatch):
    """Once through all of it, on a run that has learnt nothing; and its drawings beside those of no other."""
    monkeypatch.setattr(scenes, "SCENES", 60)
    monkeypatch.setattr(scenes, "SEEN", 200)
    monkeypatch.setattr(small_network, "STEPS", 10)
    monkeypatch.setattr(lab, "transfusion", command)
    scenes.small_network.cache_clear()
    row = scenes.variant("cpu", "tiny", "linear", 4, "S", "--generation.steps", "2", "--data.fit-documents", "50",
                         "--data.rows", "1", "--data.shuffle-block", "16")  # fmt: skip
    asked = Options(tmp_path, seeds=(0,), train=("--training.steps=2", "--training.warmup-steps=1"))
    lab.fill(asked, [row], partial(scenes.measure, "cpu"))
    scenes.small_network.cache_clear()
    (found,) = lab.measured(asked, row)
    assert scenes.COLUMNS.keys() <= found.keys()
    assert statistics.mean(found[name] for name in ("count", "colour", "shape", "size", "place")) == found["attributes"]

    both_rows = Table("t", [row, replace(row, name="the same"), replace(row, name="not made", arguments=())], {})
    monkeypatch.setattr(drawings, "TABLES", [SimpleNamespace(table=lambda scale: both_rows)])
    drawn = drawings.draw(asked)
    assert {name: len(row) for name, row in drawn.items()} == {"tiny": drawings.COUNT}
    drawings.picture(drawn, tmp_path / "drawings.png")
    assert Picture.open(tmp_path / "drawings.png").width > 1000


def test_both_codecs_are_the_same_network_but_for_the_codebook(tmp_path, monkeypatch):
    typed = []
    monkeypatch.setattr(both, "transfusion", lambda *words: typed.append([str(word) for word in words]))
    both.prepare(Options(tmp_path))
    folder_of = partial(both.folder_of, Options(tmp_path))
    fits, prepares = ([words for words in typed if words[1] == verb] for verb in ("fit-codec", "prepare"))
    assert len(fits) == len(prepares) == 2
    assert [word for word in fits[1] if word not in fits[0]] == ["--network.codes", "512", str(folder_of("vq"))]
    assert prepares[1][prepares[1].index("--tokenizer") + 1] == str(folder_of("latents") / "tokenizer.json")
    before = folder_of("codes")
    monkeypatch.setattr(both, "CODEC", (*both.CODEC, "--training.seed", "1"))
    assert folder_of("codes") != before  # made in another way, they lie elsewhere


def test_an_edit_changes_one_thing_and_says_which(tmp_path, monkeypatch):
    for before, words, after in editing.edits("heldout", 50):
        (one,), (other,) = before.things, after.things
        assert before.centres == after.centres and one.size == other.size
        asked = words.split()[2] if words.startswith("make it a ") is False else words.split()[3]
        assert asked in (other.colour, other.shape) and asked not in (one.colour, one.shape)
        assert (one.colour == other.colour) != (one.shape == other.shape)
    monkeypatch.setattr(editing, "EDITS", 3)
    lines = editing.write_edits(tmp_path / "files").read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / "files" / json.loads(lines[2])["target"]).exists()


def test_edits_wait_for_their_base_before_anything_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit, match="first python -m experiments.scaling --variants 'Transfusion L' --seeds 3 4"):
        editing.main(Options(tmp_path, seeds=(3, 4)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}  # the table so far
    with pytest.raises(SystemExit, match="there is no variant 'tuned'"):
        editing.main(Options(tmp_path, variants=("tuned",)))


def test_what_is_there_becomes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DOCS", tmp_path)
    asked = Options(tmp_path / "lab", seeds=(0,))
    for row in (*noise.table("cpu").variants, *text.table("cpu").variants):
        cell(asked, row, 0).mkdir(parents=True, exist_ok=True)
        write_json(cell(asked, row, 0) / "measured.json", {
            "commit": "abc", "machine": "a", "threads": 1, "minutes": 2.0,
            "fid": 3.0, "captions": 0.5, "right": 0.5, "attributes": 0.5, "gap": 0.1,
            "image_loss": 0.1, "text_loss": 1.0, "bits_per_byte": 2.0, "cider": 1.0, "parameters": 10, "positions": 10,
        })  # fmt: skip
    page = results.write(asked).read_text()
    (counts,) = (line.split(" | ") for line in page.splitlines() if line.startswith("| Table 8 in miniature"))
    assert counts[1:] == ["", "", "", "3", " |"]  # none holds: of each row there is one seed
    assert "## Table 8 in miniature" in page and "## Table 4 in miniature" in page and "## Section 4.5" not in page
    assert "`python -m experiments.noise`: 3 runs of 0.0 million positions, 6 minutes" in page and "no verdict" in page
    assert "several sizes of both" in page  # rows that others share are there too: two of Table 3, one of 5 and of 6
    shown = {path.stem for path in (tmp_path / "results").iterdir()}
    assert shown == {"noise", "text", "scaling", "attention", "patches"}


def test_the_words_for_emoji_are_options_and_make_what_is_said():
    """On two cores and on a GPU; the path itself takes minutes, and is a run's folder beside a page."""
    for words, millions in ((emoji.SMALL, 2), (emoji.LARGE, 40)):
        run, _ = parse_run(Train, "train", *named("train", ["small", "--data", "data", *words]))
        built = build_on_meta(replace(run.model, vocab_size=640, latent_channels=8))
        assert round(count_parameters(built) / 1e6) == millions
        assert run.data.seq_len % 128 == 0  # whole blocks: FlexAttention's, on a GPU
    parsed = parse(FitCodec, "data fit-codec small", [*emoji.LARGE_CODEC, "--size", emoji.SIZE], FitCodec(
        Path("codec"), NAMED["small"].network, NAMED["small"].training, FaultToleranceConfig(), ("emoji",)))  # fmt: skip
    assert (parsed.network.width, parsed.network.downsampling) == (64, 4)


def survive(folder: Path, monkeypatch, faults: int, steps: int, seed: int) -> object:
    """The script on a tiny run, whose processes are forked; those that are disturbed have this seed. Its exit code."""
    run(print)  # the first start is no measure of how long a run takes
    words = ("train", *survival.RUN, *TINY, "--training.steps", steps, "--training.seed")
    monkeypatch.setattr(survival, "_start", lambda asked, folder: Process(
        command, *words, 0 if folder.name == "peaceful" else seed, "--out", folder))  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        survival.main(survival.Options(folder, faults))
    return ended.value.code


@pytest.mark.slow
def test_a_run_withstands_a_fault(tmp_path, monkeypatch, capsys):
    """A hundred faults are for whoever has the time."""
    code, told = survive(tmp_path / "it", monkeypatch, 10 if THOROUGH else 2, 12, 0), capsys.readouterr().out
    assert code == 0, told
    assert "faults: 0 runs did not go on, 0 ended with other weights" in told


def test_a_run_that_ends_with_other_weights_is_told(tmp_path, monkeypatch, capsys):
    assert survive(tmp_path / "it", monkeypatch, 1, 2, 1) == 1
    assert re.search(r"1 faults: 0 runs did not go on, [1-9]\d* ended with other weights", capsys.readouterr().out)
