"""Sampled tokens: their distribution, the nucleus, and rows that do not depend on each other."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.profile import examples
from transfusion.config import GenerationConfig
from transfusion.inference import text_mode
from transfusion.inference.text_mode import sample_tokens

few = examples(12, quick=5)
some = examples(25, quick=10)

seeds = st.integers(0, 2**31)
top_ps = st.sampled_from((1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)) | st.floats(0.01, 1)
temperatures = st.just(0.0) | st.floats(0.1, 3)


def nucleus_by_sorting(probabilities: Tensor, top_p: float) -> Tensor:
    """The plain way: probabilities (V,) of the smallest set of the likeliest ids that has at least top_p in all."""
    values, ids = probabilities.double().sort(descending=True)
    is_kept = values.cumsum(0) - values < top_p
    kept = torch.zeros_like(values).index_copy(0, ids, values * is_kept)
    return kept / kept.sum()


@some
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6), st.sets(st.integers(0, 5), min_size=1), temperatures,
    top_ps, seeds,
)  # fmt: skip
def test_sampled_token_is_allowed_and_in_the_nucleus(logits, allowed, temperature, top_p, seed):
    values, mask = torch.tensor(logits), torch.tensor([n in allowed for n in range(6)])
    config = GenerationConfig(temperature=temperature, top_p=top_p)
    (token,) = sample_tokens([values], [config], [seed], [mask])
    assert token in allowed
    if temperature == 0:
        assert logits[token] == max(logits[n] for n in allowed)
        return
    probabilities = (values.masked_fill(~mask, -torch.inf) / temperature).softmax(0)
    likelier = probabilities[probabilities > probabilities[token] * 1.0001].sum()  # a tolerance for ties in float32
    assert likelier < top_p + 1e-4  # the likelier tokens alone do not reach top_p


@few
@given(st.sampled_from((2, 7, 40)), st.sampled_from((0.3, 1.0, 4.0)), top_ps, seeds)
def test_frequencies_are_those_of_the_sorted_nucleus(num_ids, sharpness, top_p, seed):
    """Within six standard deviations of 4,000 samples."""
    logits = sharpness * torch.randn(num_ids, generator=torch.Generator().manual_seed(seed))
    expected = nucleus_by_sorting(logits.softmax(0), top_p)
    count = 4000
    tokens = sample_tokens([logits] * count, [GenerationConfig(top_p=top_p)] * count, range(seed, seed + count))
    frequencies = torch.tensor(tokens).bincount(minlength=num_ids) / count
    assert ((frequencies - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_sample_after_a_rejected_one_is_independent():
    """Two likely ids follow many that are outside of the nucleus and have half of the probability."""
    logits = torch.tensor([0.49 / 40] * 40 + [0.255] * 2).log()
    tokens = sample_tokens([logits] * 2000, [GenerationConfig(top_p=0.5)] * 2000, range(2000))
    assert set(tokens) == {40, 41}
    assert abs(tokens.count(40) - 1000) < 150  # six standard deviations and more


def test_top_p_1_rejects_nothing():
    """Although rounded probabilities may be more than 1 in all."""
    probabilities = torch.tensor([[1.0, 0.5]]).expand(200, 2)
    assert set(text_mode._sample_nuclei(probabilities, [1.0] * 200, range(200))) == {0, 1}


@few
@given(seeds, top_ps, st.sampled_from((0.1, 3.0)))
def test_nucleus_of_many_ids_is_the_sorted_one(seed, top_p, sharpness):
    logits = sharpness * torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    is_kept = nucleus_by_sorting(logits.softmax(0), top_p) > 0
    tokens = sample_tokens([logits] * 50, [GenerationConfig(top_p=top_p)] * 50, range(50))
    assert sum(not is_kept[token] for token in tokens) <= 1  # the last of the set, by rounding


@some
@given(
    st.lists(st.tuples(seeds, temperatures, top_ps, st.booleans()), min_size=2, max_size=6),
    st.sampled_from((3, 300, 4096)), st.sampled_from((1, 1000, 2**17)), st.randoms(),
)  # fmt: skip
def test_rows_do_not_depend_on_each_other(specs, num_ids, max_cached, random):
    """Neither on their order, nor on how many are computed at once."""
    is_even = torch.arange(num_ids) % 2 == 0
    rows = [
        (torch.randn(num_ids, generator=torch.Generator().manual_seed(seed)),
         GenerationConfig(temperature=temperature, top_p=top_p), seed, is_even | (not even))
        for seed, temperature, top_p, even in specs
    ]  # fmt: skip
    alone = [sample_tokens(*([part] for part in row))[0] for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    with mock.patch.object(text_mode, "MAX_CACHED", max_cached):
        together = sample_tokens(*zip(*(rows[n] for n in order), strict=True))
    assert together == [alone[n] for n in order]


@few
@given(st.integers(2, 300), top_ps, seeds)
def test_rounding_of_logits_changes_few_tokens(num_ids, top_p, seed):
    """A batch adds numbers in another order, which must not change what is sampled."""
    logits = torch.randn(num_ids, generator=torch.Generator().manual_seed(seed))
    arguments = [GenerationConfig(top_p=top_p)] * 300, range(seed, seed + 300)
    tokens, others = (sample_tokens([values] * 300, *arguments) for values in (logits, logits * (1 + 1e-6)))
    assert sum(token != other for token, other in zip(tokens, others, strict=True)) <= 3


@given(st.integers(1, 50), st.sampled_from((1e-6, 0.3, 1.0)), seeds)
def test_equally_likely_ids_are_all_in_the_nucleus(num_ids, top_p, seed):
    """Also with a total of rounded probabilities below or above 1."""
    tokens = sample_tokens([torch.zeros(num_ids)] * 500, [GenerationConfig(top_p=top_p)] * 500, range(seed, seed + 500))
    assert len(set(tokens)) > 0.9 * num_ids


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_temperature_near_zero_is_greedy(temperature):
    values, mask = torch.tensor([3.0, -20.0, 5.0, 30.0]), torch.tensor([True, True, True, False])
    assert sample_tokens([values], [GenerationConfig(temperature=temperature)], [0], [mask]) == [2]


@pytest.mark.parametrize("top_p", [1e-6, 1e-12, 1e-13, 1e-300])
def test_top_p_near_zero_is_greedy(top_p):
    values, config = torch.tensor([3.0, 5.0, 4.9, 2.0]), GenerationConfig(top_p=top_p)
    assert sample_tokens([values] * 20, [config] * 20, range(20)) == [1] * 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    logits, allowed = torch.tensor([0.0, value, 1.0]), torch.tensor([True, True, True])
    config = GenerationConfig(temperature=temperature)
    with pytest.raises(ValueError, match="the logits are not finite"):
        sample_tokens([torch.zeros(3), logits], [config] * 2, [0, 1], [allowed] * 2)
    allowed[1] = False
    assert sample_tokens([logits], [config], [0], [allowed])[0] in (0, 2)  # this one is never sampled


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_largest_temperatures_sample_evenly_from_the_allowed_ids(temperature):
    values, mask = torch.tensor([3.0, -20.0, 5.0, 30.0]), torch.tensor([True, True, True, False])
    tokens = sample_tokens([values] * 300, [GenerationConfig(temperature=temperature)] * 300, range(300), [mask] * 300)
    assert all(abs(tokens.count(token) - 100) < 50 for token in range(3))  # six standard deviations


def test_largest_logits_are_sampled_at_a_small_temperature():
    values = torch.tensor([1e38, -1e38, 3e38])
    assert sample_tokens([values, -values], [GenerationConfig(temperature=1e-4)] * 2, [0, 1]) == [2, 1]


def test_ids_that_have_exactly_top_p_are_enough():
    probabilities = torch.tensor([[0.5, 0.25, 0.25]]).expand(50, 3)
    assert set(text_mode._sample_nuclei(probabilities, [0.5] * 50, range(50))) == {0}
