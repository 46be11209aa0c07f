"""The statistics of the tables, the primary claims and the page: on values whose truth is known."""

import math
import statistics
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from experiments import (
    editing,
    error_rates,
    judge,
    lab,
    multimodal,
    parity,
    primary,
    results,
    scaling,
    scenes,
    tables,
    towers,
)
from experiments.emoji import families
from experiments.judge import NOT_SHOWN, OPEN, OPPOSITE, PARTLY, REPRODUCED, Evidence, Interval, compare, holm, welch
from experiments.lab import OLD_SEEDS, SEEDS, Options, Table, Variant, cell_folder
from tests.profile import THOROUGH, examples
from tests.test_experiments import PRESET_NAMES, parse_arguments
from transfusion.disk import read_json, write_json
from transfusion.model.transfusion import build_on_meta, count_parameters

samples = st.lists(st.floats(-5, 5), min_size=2, max_size=6).filter(lambda values: statistics.pstdev(values) > 0.01)


# Welch, Holm, and the bootstrap


@examples(100)
@given(samples, samples)
def test_welch_is_the_formula_of_unequal_variances(first, second):
    """The degrees of freedom are Welch's and Satterthwaite's."""
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    degrees = sum(parts) ** 2 / sum(part**2 / (len(row) - 1) for part, row in zip(parts, (first, second), strict=True))
    difference, error = statistics.mean(first) - statistics.mean(second), math.sqrt(sum(parts))
    interval, p = welch(first, second)
    half_width = student.ppf(0.975, degrees) * error
    expected = (difference, difference - half_width, difference + half_width)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert p == pytest.approx(2 * student.sf(abs(difference) / error, degrees), rel=1e-6, abs=1e-12)


def test_welch_of_constants_has_no_division_by_zero():
    assert welch([0.9, 0.9], [0.9, 0.9, 0.9]) == (Interval(0, 0, 0), 1)
    interval, p = welch([1.0, 1.0], [0.5, 0.5])
    assert (interval, p) == (Interval(0.5, 0.5, 0.5), 0)
    with warnings.catch_warnings(action="error"):
        interval, p = welch([0.95, 0.96, 0.97], [0.9975, 0.9975, 0.9975])
    half_width = student.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert (interval.low, interval.high) == pytest.approx((-0.0375 - half_width, -0.0375 + half_width))


@examples(100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_is_the_stepwise_procedure(p_values, level):
    """In ascending order each hypothesis is rejected at level / (number that remain), up to the first that is not."""
    rejected, order = set(), sorted(range(len(p_values)), key=lambda n: p_values[n])
    for step, n in enumerate(order):
        if p_values[n] * (len(order) - step) > level:
            break
        rejected.add(n)
    assert {n for n, p in enumerate(holm(p_values)) if p <= level} == rejected


@examples(50)
@given(samples, samples, st.sampled_from((0.0, 0.1)))
def test_advantage_is_that_of_the_better_direction(first, second, margin):
    """Less of an error is as good as more of a score, also within a margin of the second row."""
    higher = compare(first, second, "higher", margin)
    lower = compare([-value for value in first], [-value for value in second], "lower", -margin)
    assert lower == higher
    limit = statistics.mean(first) - (1 - margin) * statistics.mean(second)
    assert higher.seeds.estimate == pytest.approx(limit, abs=1e-9)
    errors = compare(first, second, "lower", margin).seeds.estimate
    assert errors == pytest.approx((1 + margin) * statistics.mean(second) - statistics.mean(first), abs=1e-9)


def make_counts(rng, shares: np.ndarray, num_seeds: int = 5, images: int = 20) -> list[dict[str, tuple[int, int]]]:
    return [{f"caption {n}": (int(rng.binomial(images, share)), images) for n, share in enumerate(shares)}
            for _ in range(num_seeds)]  # fmt: skip


def test_bootstrap_is_over_captions_that_both_rows_share():
    """A caption that is hard for both rows does not widen the interval, one that is hard for one row does. A caption counts
    by its images, whichever seeds have it."""
    rng = np.random.default_rng(0)
    hard = rng.random(40)
    both = judge.bootstrap(make_counts(rng, 0.8 * hard + 0.2, images=200), make_counts(rng, 0.8 * hard, images=200))
    assert both.low < 0.2 < both.high and both.high - both.low < 0.02
    apart = judge.bootstrap(make_counts(rng, hard, images=200), make_counts(rng, hard[::-1], images=200))
    expected = 2 * 1.96 * np.std(hard - hard[::-1]) / math.sqrt(40)
    assert apart.high - apart.low == pytest.approx(expected, rel=0.15)
    uneven = judge.bootstrap([{"a": (1, 1), "b": (0, 3)}, {"a": (2, 2)}], [{"a": (1, 2), "b": (1, 2)}])
    assert uneven.estimate == pytest.approx(3 / 6 - 2 / 4)


def make_evidence(p: float, estimate: float = 1.0, captions: Interval | None = None) -> Evidence:
    return Evidence(Interval(estimate, estimate, estimate), p, captions)


def test_verdicts():
    """Holm's correction counts the open claims too."""
    strong, weak = make_evidence(0.008), make_evidence(0.02)
    assert judge.judge([strong, weak, None, None, None, None]) == [REPRODUCED, NOT_SHOWN] + [OPEN] * 4
    assert judge.judge([strong, weak, make_evidence(0.5)]) == [REPRODUCED, REPRODUCED, NOT_SHOWN]
    assert judge.judge([make_evidence(0.008, -1.0)]) == [OPPOSITE]
    captions = [Interval(1.0, -0.1, 2.0), Interval(1.0, 0.1, 2.0)]
    assert [judge.judge([make_evidence(0.01, captions=it)])[0] for it in captions] == [PARTLY, REPRODUCED]


# How often the judge errs


@pytest.mark.parametrize("name", error_rates.DISTRIBUTIONS if THOROUGH else ["normal"])
def test_six_null_claims_rarely_have_a_false_verdict(name):
    """At most 6 % of tables, here with three standard errors; a test of each claim alone would be wrong in about 25 %.
    Welch's test of five seeds is a little too bold if one row is three times as wide."""
    count = 5_000 if THOROUGH else 300
    rate = error_rates.rate_of_false_verdicts(error_rates.Options(count), error_rates.DISTRIBUTIONS[name])
    highest = 0.07 if "three times" in name else 0.06
    assert 0.005 < rate <= highest + (0 if THOROUGH else 3 * math.sqrt(0.05 * 0.95 / count))


def test_power_grows_with_the_effect(capsys):
    options = error_rates.Options(tables=25)
    weak, strong = (error_rates.power(options, effect) for effect in (0.5, 4))
    assert max(weak) < 0.3 and min(strong) > 0.9
    error_rates.main(replace(options, tables=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 1", "| 2", "| 3"]


# Parity ratios


SIZES = 6e12, 1.2e13, 2.4e13


def make_points(factor: float, slope: float, seeds: int = 1, spread: float = 0.0, rng=None) -> parity.Points:
    """Metrics (factor * FLOPs)^slope of three sizes, with a relative spread over seeds."""
    noise = [1 + spread * rng.normal(size=seeds) if spread else np.ones(seeds) for _ in SIZES]
    return [(x, [*((factor * x) ** slope * it)]) for x, it in zip(SIZES, noise, strict=True)]


@given(st.floats(0.05, 20), st.floats(0.05, 2), st.booleans())
def test_parity_ratio_is_a_ratio_of_compute(factor, slope, is_higher_better):
    """The first family needs 1 / factor of the compute. Without a second seed there is no interval."""
    slope = slope if is_higher_better else -slope
    ratio = parity.parity_ratio(make_points(factor, slope), make_points(1, slope), is_higher_better)
    assert ratio.estimate == pytest.approx(1 / factor, rel=1e-6) and math.isnan(ratio.low) and math.isnan(ratio.high)
    intercept, fitted = parity.fit_line(make_points(factor, slope))
    assert math.exp(intercept + fitted * math.log(1e13)) == pytest.approx((factor * 1e13) ** slope, rel=1e-6)
    assert parity.parity_ratio(make_points(1, -slope), make_points(1, slope), is_higher_better) == parity.NO_LINE


def test_each_size_is_one_point():
    """More seeds of one size do not pull the line to it."""
    first, second = make_points(2, -0.5), make_points(1, -0.5)
    first[1] = (first[1][0], [first[1][1][0] * 1.1])
    expected = parity.parity_ratio(first, second, False).estimate
    first[1] = (first[1][0], [first[1][1][0] * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.1)])
    assert parity.parity_ratio(first, second, False).estimate == pytest.approx(expected)


def test_interval_of_the_parity_ratio_covers_it_and_flat_lines_have_none():
    rng = np.random.default_rng(0)
    ratios = [parity.parity_ratio(make_points(4, -0.5, 3, 0.03, rng), make_points(1, -0.5, 3, 0.03, rng), False)
              for _ in range(100)]  # fmt: skip
    assert 88 <= sum(ratio.low < 0.25 < ratio.high for ratio in ratios) <= 99
    flat = [parity.parity_ratio(make_points(1, 0.0, 3, 0.03, rng), make_points(1, -0.5, 3, 0.03, rng), False)
            for _ in range(40)]  # fmt: skip
    assert flat.count(parity.NO_LINE) >= 36
    assert parity.parity_ratio(make_points(1, -0.5), make_points(1, 0.0, 3, 0.03, rng), False) == parity.NO_LINE
    assert parity.parity_ratio([(1e12, [0.0]), (2e12, [0.0])], make_points(1, -0.5), False) == parity.NO_FIT
    assert parity.parity_ratio(make_points(1, -0.5)[:1], make_points(1, -0.5), False) == parity.NO_FIT


# The share of the steps


CURVE = {0.25: 0.2, 0.5: 0.3, 1.0: 0.4}  # images correct by share of the steps


@given(st.sampled_from([*CURVE]), st.floats(0, 1), st.floats(0.1, 2))
def test_share_of_steps_is_where_the_line_through_the_means_reaches_the_target(end, part, factor):
    """The line begins at 0; the unit of the metric has no influence."""
    shares = [0.0, *CURVE]
    before = shares[shares.index(end) - 1]
    values = {0.0: 0.0} | CURVE
    target = factor * (values[before] + part * (values[end] - values[before]))
    found = towers.share_of_steps({share: [factor * value] for share, value in CURVE.items()}, [target])
    assert found.estimate == pytest.approx(before + part * (end - before), abs=1e-6)
    assert math.isnan(found.low) and math.isnan(found.high)  # one seed of each row


def test_share_of_steps_is_the_first_of_a_curve_that_falls_again_or_none():
    curve = {0.25: [0.1], 0.5: [0.4], 1.0: [0.2]}
    assert towers.share_of_steps(curve, [0.3]).estimate == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert towers.share_of_steps(curve, [0.5]).estimate == math.inf
    assert towers.share_of_steps(curve, [0.0]).estimate == 0


def test_interval_of_the_share_of_steps_covers_it():
    """Three seeds of each row, as in the table. A target just below the end is often not reached: the bound is then inf."""
    rng = np.random.default_rng(0)
    found = [towers.share_of_steps({share: rng.normal(value, 0.02, 3) for share, value in CURVE.items()},
                                   rng.normal(0.25, 0.02, 3)) for _ in range(60)]  # fmt: skip
    assert 52 <= sum(it.low < 0.375 < it.high for it in found) <= 59
    beyond = towers.share_of_steps({share: [value, value + 0.02] for share, value in CURVE.items()}, [0.40, 0.42])
    assert beyond.estimate <= 1 and beyond.high == math.inf


# Cells of the tables


VALUES = {
    "commit": "abc1234", "machine": "a", "threads": 1, "fid": 3.0, "captions": 0.5, "right": 0.5, "attributes": 0.5,
    "gap": 0.1, "image_loss": 0.1, "text_loss": 1.0, "bits_per_byte": 2.0, "cider": 1.0, "parameters": 10**6,
    "positions": 10**6, "flops": 6 * 10**12,
}  # fmt: skip


def write_cell(options: Options, table: Table, variant: Variant, seed: int, **values) -> None:
    """Write a measured cell of this code. Its minutes differ from those of all other runs."""
    folder = cell_folder(options, table, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    code = folder.parent.name.partition("-")[2]
    words = {"seed": seed, **variant.describe(), "code": code}
    minutes = 1 + int(folder.parent.name[:6], 16) / 16**6 + seed / 10**9
    write_json(folder / "measured.json", words | VALUES | {"minutes": minutes} | values)


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    """An empty lab, whose page and committed cells are in another empty folder."""
    for module in (lab, results, tables):
        monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    return Options(tmp_path / "lab", seeds=SEEDS)


def write_row(options: Options, table: Table, name: str, column: str, values, seeds=SEEDS, **more) -> None:
    (variant,) = (variant for variant in table.variants if variant.name == name)
    for seed, value in zip(seeds, values, strict=True):
        write_cell(options, table, variant, seed, **{column: value}, **more)


def test_rows_of_old_seeds_are_replaced_and_not_compared_with_new_ones(options):
    table, claim = primary.CLAIMS[4].find("cpu")
    write_row(options, table, claim.first, "captions", (0.99, 0.98, 1.0), OLD_SEEDS, code=None)
    write_row(options, table, claim.second, "captions", (0.9, 0.91, 0.92), OLD_SEEDS, code=None)
    old = lab.compare_rows(options, table, claim)
    assert old.seeds.estimate == pytest.approx(0.08) and lab.describe_claim(options, table, claim) == (
        "99.0% and 91.0%", lab.format_interval(old.seeds, table.columns["captions"]))  # fmt: skip
    write_row(options, table, claim.first, "captions", (0.95, 0.97), SEEDS[:2])
    assert lab.compare_rows(options, table, claim) is None
    assert lab.describe_claim(options, table, claim) == ("", "runs of different code: not compared")
    page = results.write_page(options).read_text(encoding="utf-8")
    assert "| **open, 2 of 10 runs** | runs of different code: not compared |" in page
    write_row(options, table, claim.second, "captions", (0.95,), SEEDS[:1])
    assert lab.describe_claim(options, table, claim) == ("96.0% and 95.0%", "one seed: no interval")
    write_row(options, table, claim.second, "captions", (0.95,), SEEDS[1:2], code="0a1b2c3d")
    assert lab.compare_rows(options, table, claim) is None  # one run of other code is enough
    write_row(options, table, claim.second, "captions", (0.95,), SEEDS[1:2])
    assert lab.compare_rows(options, table, claim) is not None


def test_intervals_of_shares_are_in_points():
    interval = Interval(0.064, -0.0401, 0.0882)
    assert lab.format_interval(interval, scenes.COLUMNS["right"]) == "+6.4 [-4.0, +8.8] points"
    assert lab.format_interval(interval, multimodal.COLUMNS["bits_per_byte"]) == "+0.064 [-0.040, +0.088]"


@pytest.mark.parametrize("preset", PRESET_NAMES if THOROUGH else ["cpu"])
def test_wide_linear_rows_have_the_parameters_of_the_unet(preset):
    """Within 2 %, with the vocabulary of `shapes`."""

    def count(patches: str, size: str) -> int:
        run = parse_arguments(*scenes.make_variant(preset, "", patches, 2, size).arguments)
        return count_parameters(build_on_meta(replace(run.model, vocab_size=384)))

    for size in scenes.SIZES:
        assert count("linear", f"{size} wide") == pytest.approx(count("unet", size), rel=0.02)
        assert count("unet", size) > 1.25 * count("linear", size)


# The primary claims


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_primary_claims_are_claims_of_the_tables(preset):
    found = [it.find(preset) for it in primary.CLAIMS]
    assert [table.name for table, _ in found] == ["continuous", "continuous", "attention", "patches", "noise", "text"]
    assert all(claim.first == "Transfusion M" for _, claim in found[:2])  # the middle of three sizes
    columns = ["bits_per_byte", "attributes", "right", "right", "captions", "bits_per_byte"]
    assert [claim.column for _, claim in found] == columns
    assert all(len(primary.find_rows(table, claim)) == 2 for table, claim in found)
    assert not {*SEEDS} & {*OLD_SEEDS} and len(SEEDS) == 5


def test_claims_are_open_until_their_ten_cells_exist(options):
    table, claim = primary.CLAIMS[2].find("cpu")
    counts = {"a large red circle": (6, 10), "a small blue square": (5, 10)}
    write_row(options, table, claim.first, "right", (0.5, 0.52, 0.54, 0.5, 0.52), right_by_caption=counts)
    write_row(options, table, claim.second, "right", (0.1, 0.12, 0.14, 0.1), SEEDS[:4],
              right_by_caption={name: (1, 10) for name in counts})  # fmt: skip
    verdicts = primary.judge_claims(options)
    assert [verdict for verdict, _ in verdicts] == [OPEN] * 6
    assert verdicts[2][1].seeds.estimate == pytest.approx(0.516 - 0.115)
    write_row(options, table, claim.second, "right", (0.12,), SEEDS[4:],
              right_by_caption={name: (1, 10) for name in counts})  # fmt: skip
    verdicts = primary.judge_claims(replace(options, seeds=(0,)))  # whatever seeds are shown
    assert [verdict for verdict, _ in verdicts] == [OPEN, OPEN, REPRODUCED, OPEN, OPEN, OPEN]
    assert verdicts[2][1].captions.estimate == pytest.approx(0.55 - 0.1)
    for seed in SEEDS:
        write_row(options, table, claim.first, "right", (0.5 + seed / 1e4,), (seed,),
                  right_by_caption={"a large red circle": (1, 10), "a small blue square": (10, 10)})  # fmt: skip
        write_row(options, table, claim.second, "right", (0.1 + seed / 1e4,), (seed,),
                  right_by_caption={"a large red circle": (2, 10), "a small blue square": (0, 10)})  # fmt: skip
    assert primary.judge_claims(options)[2][0] == PARTLY


# The page, and the command that makes all runs


def test_page_is_the_same_in_a_clone_that_has_only_the_committed_cells(options, tmp_path):
    """Tables share cells, and a run that is measured in two ways counts once."""
    table, claim = primary.CLAIMS[4].find("cpu")
    for n, row in enumerate(primary.find_rows(table, claim)):
        write_row(options, table, row.name, "captions", 0.9 - n / 10 + np.arange(5) / 1000)
    (base,) = (variant for variant in scaling.build_table("cpu").variants if variant.name == "Transfusion L")
    write_row(options, scaling.build_table("cpu"), base.name, "fid", (1.0,), OLD_SEEDS[:1], minutes=7.0)
    write_row(options, editing.build_table("cpu"), "without fine-tuning", "right", (0.0,), OLD_SEEDS[:1], minutes=7.0,
              changed=0.0, stayed=0.0)  # fmt: skip
    codecs = {"commit": "abc1234", "autoencoder": {"psnr": 37.2, "right": 1.0, "fid": 0.02}}
    (tmp_path / "docs" / "results").mkdir()
    write_json(tmp_path / "docs" / "results" / "codecs.json", codecs)
    page = results.write_page(replace(options, seeds=(0,))).read_text()
    names = {path.stem for path in (tmp_path / "docs" / "results").iterdir()}
    assert names == {"codecs", "noise", "attention", "patches", "scaling", "editing"}
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {primary.CLAIMS[4].paper} |"))
    assert "**reproduced**" in line and "caption exact match 90.2% and 80.2%: +10.0 [" in line
    assert "`python -m experiments.noise --variants 't up to 0.5' 'no limit' --seeds 10 11 12 13 14`" in line
    assert "5 of 6 claims are open" in page and page.count("**open, 0 of 10 runs**") == 4
    assert page.count("**open, 5 of 10 runs**") == 1  # the U-Net of two tables
    minutes = {cell["minutes"] for path in options.out.rglob("measured.json") for cell in [read_json(path)]}
    assert f"All 11 runs together took {sum(minutes) / 60:.1f} hours" in page and len(minutes) == 11
    assert "autoencoder 37.2 dB PSNR" in page and results.OLD in page
    (text_section,) = (section for section in page.split("\n## ") if section.startswith("Table 4 at small scale"))
    assert text_section.endswith("Not run yet: `python -m experiments.text`.\n")
    assert page.count("\n## ") == len(results.TABLES)
    (tmp_path / "docs" / "results.md").unlink()
    clone = replace(options, out=tmp_path / "clone")
    assert results.write_page(clone).read_text() == page
    assert len([*clone.out.rglob("measured.json")]) == len([*options.out.rglob("measured.json")])


def test_committed_cells_of_other_settings_are_not_restored(options, tmp_path):
    table, claim = primary.CLAIMS[4].find("cpu")
    write_row(options, table, claim.first, "captions", (0.9, 0.8), SEEDS[:2])
    (tmp_path / "docs" / "results").mkdir()
    lab.save_cells(options, table, tmp_path / "docs" / "results")
    clone, (row, _) = replace(options, out=tmp_path / "clone"), primary.find_rows(table, claim)
    others = [replace(row, arguments=(*row.arguments, "--model.width", "64")), replace(row, data="latents")]
    lab.restore_cells(clone, replace(table, variants=others))
    lab.restore_cells(replace(clone, train=("--training.steps=5",)), table)
    assert not clone.out.exists()
    lab.restore_cells(clone, table)
    assert lab.read_cells(clone, table, row) == lab.read_cells(options, table, row)


def test_tables_are_made_claims_first_and_every_cell_is_saved_at_once(options, tmp_path, monkeypatch):
    made, stops = [], [71]

    def fill(selected: Options, table: Table) -> None:
        ((name,), (seed,)) = selected.variants, selected.seeds
        saved = sum(len(cells) for path in (tmp_path / "docs" / "results").glob("*.json")
                    for cells in read_json(path)["cells"].values())  # fmt: skip
        assert (saved > 0) == bool(made)
        made.append((table.name, name, seed))
        if len(made) in stops:
            stops.clear()
            raise KeyboardInterrupt
        write_row(selected, table, name, "right", (0.5,), (seed,), changed=0.5, stayed=0.5)

    monkeypatch.setattr(lab, "fill_cells", fill)
    monkeypatch.setattr(results, "write_page", lambda common: None)
    command = tables.Options(options.out)
    with pytest.raises(KeyboardInterrupt):
        tables.main(command)
    claims = [("continuous", name, seed) for seed in SEEDS for name in ("Transfusion M", "Chameleon M")]
    assert made[:10] == claims and made[10][:2] == ("attention", "linear, bidirectional")
    assert made[30:35] == [("noise", "t up to 0.5", seed) for seed in SEEDS]  # the other row of this claim exists
    names = "Transfusion: + diffusion", "Llama, text alone"
    assert made[35:45] == [("text", name, seed) for seed in SEEDS for name in names]
    assert made[45:47] == [("continuous", "Transfusion S", 10), ("continuous", "Transfusion L", 10)]
    interrupted = made.pop()
    before = len(made)
    tables.main(replace(command, out=tmp_path / "another clone"))
    assert made[before] == interrupted and len(set(made)) == len(made)
    assert made[-1] == (families.build_table("cpu").name, "Chameleon M", 12)
    assert ("editing", "without fine-tuning", 10) in made
    seeds = {row: [seed for *names, seed in made if tuple(names) == row] for row in {tuple(names) for *names, _ in made}}
    assert {len(found) for found in seeds.values()} == {3, 5}
    before = len(made)
    tables.main(command)
    tables.main(replace(command, only_claims=True))
    assert len(made) == before
