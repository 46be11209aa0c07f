"""Promise 7: FID, KID, precision, recall, density and coverage against scipy's root, closed forms, and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from tests.profile import examples
from transfusion.evaluation import prdc
from transfusion.evaluation.fid import TooFew, fid, kid, mmd2
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.prdc import neighbour_scores

many = examples(60)
seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, count: int, features: int, spread: float = 1.0) -> np.ndarray:
    """Features whose dimensions depend on each other, of a mean that is not 0."""
    chance = np.random.default_rng(seed)
    mix = chance.standard_normal((features, features))
    return (spread * chance.standard_normal((count, features)) @ mix + chance.standard_normal(features)).astype(np.float32)


def by_root(one: np.ndarray, other: np.ndarray) -> float:
    """FID as it is written in the paper."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    s, t = np.atleast_2d(np.cov(one.T)), np.atleast_2d(np.cov(other.T))
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)


# FID


@many
@given(seeds, st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 5))
def test_fid_is_that_of_the_matrix_root(seed, features, more, others, spread):
    one = drawn(seed, features + more + 3, features)
    other = drawn(seed + 1, features + others + 3, features, spread)
    assert fid(one, other) == pytest.approx(by_root(one, other), rel=1e-6, abs=1e-6)
    assert fid(one, other) == pytest.approx(fid(other, one), rel=1e-9, abs=1e-9)


@many
@given(seeds, st.integers(1, 6))
def test_fid_of_singular_covariances_is_that_of_the_space_they_fill(seed, rank):
    """Features that repeat others have no variance of their own: FID is that of fewer ones, turned."""
    one, other = (drawn(seed + n, 40, rank).astype(np.float64) for n in range(2))
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((9, 9)))[0]
    wide = [np.pad(side, ((0, 0), (0, 9 - rank))) @ turn for side in (one, other)]
    assert fid(*wide) == pytest.approx(fid(one, other), rel=1e-9, abs=1e-9)


def test_fid_of_one_singular_covariance_is_exact():
    """The trace of the root is the sum of the singular values of the products of all pictures' centred features."""
    one = np.pad(drawn(0, 60, 5).astype(np.float64), ((0, 0), (0, 35))) @ drawn(1, 40, 40)
    other = drawn(2, 60, 40).astype(np.float64)
    centred = [side - side.mean(0) for side in (one, other)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 59
    moved = one.mean(0) - other.mean(0)
    expected = moved @ moved + one.var(0, ddof=1).sum() + other.var(0, ddof=1).sum() - 2 * shared
    assert fid(one, other) == pytest.approx(expected, rel=1e-11)


@many
@given(seeds, st.integers(1, 10), st.floats(0.1, 4))
def test_closed_forms(seed, features, scale):
    """The same set: 0. Moved by d: |d|^2. Stretched about its mean by s: (s - 1)^2 times the variance."""
    one = drawn(seed, 3 * features + 3, features).astype(np.float64)
    d = np.random.default_rng(seed).standard_normal(features)
    variance = one.var(0, ddof=1).sum()
    assert fid(one + 1e5, one + 1e5 + d) == pytest.approx(d @ d, rel=1e-5, abs=1e-5 * variance)  # far from 0 nothing cancels
    assert fid(one, one) == pytest.approx(0, abs=1e-9 * variance)
    assert fid(one, one + d) == pytest.approx(d @ d, rel=1e-6, abs=1e-9 * variance)
    stretched = (one - one.mean(0)) * scale + one.mean(0)
    assert fid(one, stretched) == pytest.approx((scale - 1) ** 2 * variance, rel=1e-6, abs=1e-9 * variance)


@pytest.mark.parametrize(("real", "fake"), [(8, 20), (20, 8)])
def test_fid_of_too_few_pictures_is_refused(real, fake):
    with pytest.raises(TooFew, match=f"at least 9 pictures on both sides.* {real} and {fake}$"):
        fid(drawn(0, real, 8), drawn(1, fake, 8))
    fid(drawn(0, 9, 8), drawn(1, 9, 8))


# KID


def by_pairs(one: np.ndarray, other: np.ndarray) -> float:
    """Means over pairs, none of a picture with itself."""

    def mean(pairs) -> float:
        return float(np.mean([(float(np.dot(x, y)) / len(x) + 1) ** 3 for x, y in pairs]))

    one, other = one.astype(np.float64), other.astype(np.float64)
    within = [mean([(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (one, other)]
    return sum(within) - 2 * mean([(x, y) for x in one for y in other])


@many
@given(seeds, st.integers(2, 9), st.integers(2, 9), st.integers(1, 5))
def test_kid_is_that_of_plain_loops(seed, n, m, features):
    one, other = drawn(seed, n, features), drawn(seed + 1, m, features)
    assert mmd2(one, other) == pytest.approx(by_pairs(one, other), rel=1e-9, abs=1e-9)


def test_kid_is_a_mean_over_subsets_that_follow_from_the_seed(monkeypatch):
    one, other = drawn(3, 50, 4), drawn(4, 50, 4)
    first = kid(one, other)
    assert first == kid(one, other) != kid(one, other, seed=1)
    assert abs(first.mean - mmd2(one, other)) < first.std > 1e-3
    monkeypatch.setattr("transfusion.evaluation.fid.SUBSET", 50)
    assert kid(one, other) == pytest.approx((mmd2(one, other), 0), abs=1e-9)  # every subset is everything


def test_kid_of_one_kind_is_0_on_average():
    """Unbiased: no more with few pictures than with many, unlike FID."""
    chance = np.random.default_rng(0)
    found = [mmd2(*chance.standard_normal((2, 6, 3))) for _ in range(3000)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 3000**0.5
    assert min(found) < 0


def test_kid_of_too_few_pictures_is_refused():
    with pytest.raises(TooFew, match="at least 4 pictures.* 3 and 9$"):
        kid(drawn(0, 3, 2), drawn(1, 9, 2))


# Precision, recall, density, coverage


def by_balls(real: np.ndarray, fake: np.ndarray, near: int, wide: int) -> dict[str, float]:
    """By their definitions, a picture at a time. Whole numbers, so that borders are exact."""

    def between(x, y) -> int:
        return int(((x - y) ** 2).sum())

    def radius(n: int, points: np.ndarray, k: int) -> int:
        return sorted(between(points[n], other) for m, other in enumerate(points) if m != n)[k - 1]

    def inside(x, points: np.ndarray, k: int) -> list[bool]:
        return [between(x, y) <= radius(n, points, k) for n, y in enumerate(points)]

    return {
        "precision": float(np.mean([any(inside(x, real, near)) for x in fake])),
        "recall": float(np.mean([any(inside(x, fake, near)) for x in real])),
        "density": float(np.mean([sum(inside(x, real, wide)) / wide for x in fake])),
        "coverage": float(np.mean(np.any([inside(x, real, wide) for x in fake], axis=0))),
    }


@examples(30)
@given(seeds, st.tuples(st.integers(5, 14), st.integers(5, 14)), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 60))  # fmt: skip
def test_neighbour_scores_are_those_of_plain_loops(seed, counts, features, near, wide, at_once):
    """However many distances are held at a time; pictures that are the same, and ones on a border, among them."""
    chance, (n, m) = np.random.default_rng(seed), counts
    real, fake = chance.integers(0, 6, (n, features)), chance.integers(0, 6, (m, features)) + chance.integers(0, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prdc, "AT_ONCE", at_once)
        found = neighbour_scores(real.astype(np.float32), fake.astype(np.float32), near, wide)
    assert found == pytest.approx(by_balls(real, fake, near, wide), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_pictures_are_all_precise_and_all_found(seed):
    """Each ball holds its own picture and 5 others: density 6 / 5."""
    real = drawn(seed, 40, 5)
    expected = {"precision": 1.0, "recall": 1.0, "density": 1.2, "coverage": 1.0}
    assert neighbour_scores(real, real[::-1]) == pytest.approx(expected, abs=1e-12)
    assert set(neighbour_scores(real, real + 1e4).values()) == {0.0}


def test_one_good_picture_many_times_is_precise_and_not_diverse():
    real = np.random.default_rng(0).standard_normal((60, 2))
    found = neighbour_scores(real, np.repeat(real[:1], 20, 0))
    assert found["precision"] == 1
    assert found["recall"] < 0.1
    assert found["coverage"] < 0.3


@many
@given(seeds)
def test_where_all_pictures_lie_together_changes_nothing(seed):
    real, fake = (drawn(seed + n, 20, 3).astype(np.float64) for n in range(2))
    assert neighbour_scores(real + 1e7, fake + 1e7) == neighbour_scores(real, fake)


@pytest.mark.parametrize(("real", "fake"), [(5, 9), (9, 3)])
def test_pictures_without_neighbours_are_refused(real, fake):
    with pytest.raises(TooFew, match=f"need 6 real and 4 drawn.* {real} and {fake}$"):
        neighbour_scores(drawn(0, real, 2), drawn(1, fake, 2))


# All of them


def test_image_scores_leave_out_fid_where_pictures_are_too_few_and_say_why():
    real, fake = drawn(0, 30, 6), drawn(1, 20, 6)
    found = image_scores(real, fake, seed=5)
    assert found["fid"] == fid(real, fake)
    assert (found["kid"], found["kid_deviation"]) == kid(real, fake, 5)
    assert found.items() >= neighbour_scores(real, fake).items()
    assert (found["real"], found["drawn"]) == (30, 20)
    few = image_scores(real, fake[:6], seed=5)
    assert "fid" not in few
    assert "at least 7 pictures" in few["no_fid"]
    assert few.keys() - {"no_fid"} == found.keys() - {"fid"}


def test_what_is_no_number_is_not_taken_for_too_few():
    bad = drawn(0, 30, 6)
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="onverge|nan|finite"):
        image_scores(bad, drawn(1, 30, 6))
