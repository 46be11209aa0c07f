"""Promise 7: FID, KID, precision, recall, density and coverage against scipy's root, closed forms and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from tests.profile import examples
from transfusion.evaluation import prdc
from transfusion.evaluation.fid import TooFewImagesError, fid, kid, mmd2
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.prdc import compute_prdc

many = examples(60)
seeds = st.integers(0, 2**32 - 1)


def random_features(seed: int, count: int, features: int, spread: float = 1.0) -> np.ndarray:
    """Correlated features with a mean other than 0."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((features, features))
    return (spread * rng.standard_normal((count, features)) @ mix + rng.standard_normal(features)).astype(np.float32)


def fid_by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """FID by the paper's formula."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    s, t = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)


# FID


@many
@given(seeds, st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 5))
def test_fid_equals_the_matrix_root_formula(seed, features, extra_a, extra_b, spread):
    a = random_features(seed, features + extra_a + 3, features)
    b = random_features(seed + 1, features + extra_b + 3, features, spread)
    assert fid(a, b) == pytest.approx(fid_by_matrix_root(a, b), rel=1e-6, abs=1e-6)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9, abs=1e-9)


@many
@given(seeds, st.integers(1, 6))
def test_fid_of_singular_covariances_equals_fid_in_their_subspace(seed, rank):
    """Zero padding and a rotation of the features do not change the FID."""
    a, b = (random_features(seed + n, 40, rank).astype(np.float64) for n in range(2))
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((9, 9)))[0]
    wide = [np.pad(side, ((0, 0), (0, 9 - rank))) @ rotation for side in (a, b)]
    assert fid(*wide) == pytest.approx(fid(a, b), rel=1e-9, abs=1e-9)


def test_fid_with_one_singular_covariance_is_exact():
    """The trace of the root is the sum of the singular values of the product of both sides' centred features."""
    a = np.pad(random_features(0, 60, 5).astype(np.float64), ((0, 0), (0, 35))) @ random_features(1, 40, 40)
    b = random_features(2, 60, 40).astype(np.float64)
    centred = [side - side.mean(0) for side in (a, b)]
    trace_root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 59
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * trace_root
    assert fid(a, b) == pytest.approx(expected, rel=1e-11)


@many
@given(seeds, st.integers(1, 10), st.floats(0.1, 4))
def test_fid_has_closed_forms(seed, features, scale):
    """The same set: 0. Shifted by d: |d|^2. Scaled about its mean by s: (s - 1)^2 times the variance."""
    x = random_features(seed, 3 * features + 3, features).astype(np.float64)
    d = np.random.default_rng(seed).standard_normal(features)
    variance = x.var(0, ddof=1).sum()
    assert fid(x + 1e5, x + 1e5 + d) == pytest.approx(d @ d, rel=1e-5, abs=1e-5 * variance)  # no cancellation far from 0
    assert fid(x, x) == pytest.approx(0, abs=1e-9 * variance)
    assert fid(x, x + d) == pytest.approx(d @ d, rel=1e-6, abs=1e-9 * variance)
    scaled = (x - x.mean(0)) * scale + x.mean(0)
    assert fid(x, scaled) == pytest.approx((scale - 1) ** 2 * variance, rel=1e-6, abs=1e-9 * variance)


@pytest.mark.parametrize(("real", "drawn"), [(8, 20), (20, 8)])
def test_fid_of_too_few_images_is_refused(real, drawn):
    with pytest.raises(TooFewImagesError, match=f"at least 9 real.* {real} and {drawn}$"):
        fid(random_features(0, real, 8), random_features(1, drawn, 8))
    fid(random_features(0, 9, 8), random_features(1, 9, 8))


# KID


def mmd2_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Means over pairs, without pairs of an image with itself."""

    def mean(pairs) -> float:
        return float(np.mean([(float(np.dot(x, y)) / len(x) + 1) ** 3 for x, y in pairs]))

    a, b = a.astype(np.float64), b.astype(np.float64)
    within = [mean([(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return sum(within) - 2 * mean([(x, y) for x in a for y in b])


@many
@given(seeds, st.integers(2, 9), st.integers(2, 9), st.integers(1, 5))
def test_kid_equals_plain_loops(seed, n, m, features):
    a, b = random_features(seed, n, features), random_features(seed + 1, m, features)
    assert mmd2(a, b) == pytest.approx(mmd2_by_loops(a, b), rel=1e-9, abs=1e-9)


def test_kid_is_a_mean_over_seeded_subsets(monkeypatch):
    a, b = random_features(3, 50, 4), random_features(4, 50, 4)
    first = kid(a, b)
    assert first == kid(a, b) != kid(a, b, seed=1)
    assert abs(first.mean - mmd2(a, b)) < first.std > 1e-3
    monkeypatch.setattr("transfusion.evaluation.fid.SUBSET_SIZE", 50)
    assert kid(a, b) == pytest.approx((mmd2(a, b), 0), abs=1e-9)  # every subset is the whole set


def test_kid_of_equal_distributions_is_0_on_average():
    """Unbiased: the same with few images as with many, unlike FID."""
    rng = np.random.default_rng(0)
    estimates = [mmd2(*rng.standard_normal((2, 6, 3))) for _ in range(3000)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 3000**0.5
    assert min(estimates) < 0


def test_kid_of_too_few_images_is_refused():
    with pytest.raises(TooFewImagesError, match="at least 4 real and 4 drawn images, not 3 and 9$"):
        kid(random_features(0, 3, 2), random_features(1, 9, 2))


# Precision, recall, density, coverage


def prdc_by_loops(real: np.ndarray, drawn: np.ndarray, k_pr: int, k_dc: int) -> dict[str, float]:
    """By their definitions, one image at a time. For integers, so that borders are exact."""

    def distance(x, y) -> int:
        return int(((x - y) ** 2).sum())

    def radius(n: int, points: np.ndarray, k: int) -> int:
        return sorted(distance(points[n], other) for m, other in enumerate(points) if m != n)[k - 1]

    def inside(x, points: np.ndarray, k: int) -> list[bool]:
        return [distance(x, y) <= radius(n, points, k) for n, y in enumerate(points)]

    return {
        "precision": float(np.mean([any(inside(x, real, k_pr)) for x in drawn])),
        "recall": float(np.mean([any(inside(x, drawn, k_pr)) for x in real])),
        "density": float(np.mean([sum(inside(x, real, k_dc)) / k_dc for x in drawn])),
        "coverage": float(np.mean(np.any([inside(x, real, k_dc) for x in drawn], axis=0))),
    }


@examples(30)
@given(seeds, st.tuples(st.integers(5, 14), st.integers(5, 14)), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 60))  # fmt: skip
def test_prdc_equals_plain_loops(seed, counts, features, k_pr, k_dc, max_distances):
    """For any number of distances in memory, with equal images and images on a border."""
    rng, (n, m) = np.random.default_rng(seed), counts
    real, drawn = rng.integers(0, 6, (n, features)), rng.integers(0, 6, (m, features)) + rng.integers(0, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prdc, "MAX_DISTANCES", max_distances)
        scores = compute_prdc(real.astype(np.float32), drawn.astype(np.float32), k_pr, k_dc)
    assert scores == pytest.approx(prdc_by_loops(real, drawn, k_pr, k_dc), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_equal_sets_have_full_precision_and_recall(seed):
    """Each ball contains its own image and 5 others: density 6 / 5."""
    real = random_features(seed, 40, 5)
    expected = {"precision": 1.0, "recall": 1.0, "density": 1.2, "coverage": 1.0}
    assert compute_prdc(real, real[::-1]) == pytest.approx(expected, abs=1e-12)
    assert set(compute_prdc(real, real + 1e4).values()) == {0.0}


def test_copies_of_one_image_have_precision_but_no_recall():
    real = np.random.default_rng(0).standard_normal((60, 2))
    scores = compute_prdc(real, np.repeat(real[:1], 20, 0))
    assert scores["precision"] == 1
    assert scores["recall"] < 0.1
    assert scores["coverage"] < 0.3


@many
@given(seeds)
def test_prdc_does_not_depend_on_a_common_offset(seed):
    real, drawn = (random_features(seed + n, 20, 3).astype(np.float64) for n in range(2))
    assert compute_prdc(real + 1e7, drawn + 1e7) == compute_prdc(real, drawn)


@pytest.mark.parametrize(("real", "drawn"), [(5, 9), (9, 3)])
def test_prdc_of_too_few_images_is_refused(real, drawn):
    with pytest.raises(TooFewImagesError, match=f"need at least 6 real and 4 drawn images, not {real} and {drawn}$"):
        compute_prdc(random_features(0, real, 2), random_features(1, drawn, 2))


# All of them


def test_image_scores_omit_fid_of_too_few_images():
    real, drawn = random_features(0, 30, 6), random_features(1, 20, 6)
    scores = image_scores(real, drawn, seed=5)
    assert scores["fid"] == fid(real, drawn)
    assert (scores["kid"], scores["kid_std"]) == kid(real, drawn, 5)
    assert scores.items() >= compute_prdc(real, drawn).items()
    assert (scores["real"], scores["drawn"]) == (30, 20)
    few = image_scores(real, drawn[:6], seed=5)
    assert "fid" not in few
    assert "at least 7 real and as many drawn images" in few["no_fid"]
    assert few.keys() - {"no_fid"} == scores.keys() - {"fid"}


def test_nan_features_are_an_error():
    features = random_features(0, 30, 6)
    features[0, 0] = np.nan
    with pytest.raises(ValueError, match="onverge|nan|finite"):
        image_scores(features, random_features(1, 30, 6))
