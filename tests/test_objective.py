"""What is learnt: both losses against slow sums, the same in any batch; and chance that follows the image."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.documents import (
    CHANNELS,
    LENGTH,
    TINY,
    VOCABULARY,
    alone,
    batches,
    build,
    documents,
    few,
    image,
    in_double,
    places,
    some,
    with_all_logits,
)
from transfusion import diffusion, objective
from transfusion.config import DiffusionConfig
from transfusion.data.packing import pack
from transfusion.model.transfusion import Prediction
from transfusion.objective import Losses, compute_losses, next_token_loss, sample_noise, sample_noise_on_grid, total_loss
from transfusion.sequence import NO_TARGET, Batch, Document, Row, Text, collate, encode_document

MODEL = build(TINY, seed=2)
configs = st.builds(
    DiffusionConfig,
    noise_schedule=st.sampled_from(("cosine", "rectified_flow")),
    prediction=st.sampled_from(("epsilon", "velocity", "x0")),
)


def losses_of(batch: Batch, config: DiffusionConfig, z_loss: float = 0.0) -> Losses:
    batch = in_double(batch)
    return compute_losses(MODEL, batch, sample_noise(batch, config), config, z_loss)


# Against slow sums


@few
@given(batches(min_images=1), configs, st.sampled_from((0.0, 0.1)))
@torch.no_grad()
def test_losses_are_the_sums_that_the_paper_describes(found, config, z_loss):
    rows, batch = found
    batch, drawn = in_double(batch), sample_noise(batch, config)
    pairs = list(zip(batch.groups, drawn, strict=True))
    noisy = [diffusion.add_noise(group.x0, d.noise, d.t, config) for group, d in pairs]
    said = MODEL(with_all_logits(batch), noisy, [d.t for d in drawn])
    text_sum, tokens = 0.0, 0
    for b, begin, chunk in places(rows):
        for i, target in enumerate(chunk.targets.tolist()):
            if target != NO_TARGET:
                scores = [math.exp(x) for x in said.logits[b * LENGTH + begin + i].tolist()]
                text_sum += -math.log(scores[target] / sum(scores)) + z_loss * math.log(sum(scores)) ** 2
                tokens += 1
    image_sum, images = 0.0, 0
    for g, (group, d) in enumerate(pairs):
        truth = diffusion.target(group.x0, d.noise, d.t, config)
        for n in range(len(group.keys)):
            if group.loss[n]:
                wrong = (said.images[g][n] - truth[n]).flatten().tolist()
                image_sum += sum(x**2 for x in wrong) / len(wrong)
                images += 1
    found = compute_losses(MODEL, batch, drawn, config, z_loss)
    assert (found.text_count, found.image_count) == (tokens, images)
    assert math.isclose(float(found.text_sum), text_sum, rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(float(found.image_sum), image_sum, rel_tol=1e-5, abs_tol=1e-6)


@some
@given(st.integers(1, 6), st.floats(0, 2), st.integers(0, 2**31))
def test_z_loss_pulls_on_the_normaliser(tokens, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, 11, generator=generator)
    target = torch.randint(11, (tokens,), generator=generator)
    by_hand = 0.0
    for scores, right in zip(logits.tolist(), target.tolist(), strict=True):
        normaliser = math.log(sum(map(math.exp, scores)))
        by_hand += normaliser - scores[right] + weight * normaliser**2
    assert math.isclose(float(next_token_loss(logits, target, weight).sum()), by_hand, rel_tol=1e-5)


def test_a_total_is_mean_text_and_weighted_mean_image():
    parts = Losses(torch.tensor(6.0), torch.tensor(10.0), torch.tensor(0.0), text_count=3, image_count=2, code_count=0)
    assert total_loss(parts, 3, 2, image_weight=5.0) == 6 / 3 + 5 * 10 / 2
    assert total_loss(parts, 12, 40, image_weight=1.0) == 6 / 12 + 10 / 40  # a part of a larger step
    nothing = Losses(*torch.zeros(3), 0, 0, 0)
    assert total_loss(nothing, 0, 0, image_weight=5.0) == 0


# Which images, and how much each weighs


@dataclass
class Oracle:
    """A model that knows the truth of every image, and is wrong by as much as it is told."""

    drawn: list[objective.NoiseSample]
    wrong: list[Tensor]  # (N,) each
    config: DiffusionConfig

    def __call__(self, batch: Batch, noisy: list[Tensor], t: list[Tensor]) -> Prediction:
        said = [
            diffusion.target(group.x0, d.noise, d.t, self.config) + wrong.view(-1, 1, 1, 1)
            for group, d, wrong in zip(batch.groups, self.drawn, self.wrong, strict=True)
        ]
        return Prediction(torch.zeros(batch.text_count, VOCABULARY.size), said)


@some
@given(batches(min_images=2), configs, st.integers(0, 2**31))
def test_every_image_weighs_the_same_whatever_its_size_and_clean_ones_nothing(found, config, seed):
    batch = in_double(found[1])
    drawn, generator = sample_noise(batch, config), torch.Generator().manual_seed(seed)
    wrong = [torch.rand(len(group.keys), generator=generator) for group in batch.groups]
    found = compute_losses(Oracle(drawn, wrong, config), batch, drawn, config)
    expected = sum(
        float(error) ** 2
        for group, errors in zip(batch.groups, wrong, strict=True)
        for error, counts, max_t in zip(errors, group.loss, group.max_t, strict=True)
        if counts and max_t > 0
    )
    assert math.isclose(float(found.image_sum), expected, rel_tol=1e-5, abs_tol=1e-9)
    perfect = compute_losses(Oracle(drawn, [0 * x for x in wrong], config), batch, drawn, config)
    assert float(perfect.image_sum) < 1e-10


@pytest.mark.parametrize(("loss", "max_t"), [(True, 0.0), (False, 1.0), (False, 0.0)])
def test_an_image_that_only_conditions_has_no_loss_and_no_gradient_of_one(loss, max_t):
    document = Document((image((4, 4), 0, loss, max_t), Text((1, 2, 3))))
    batch = in_double(alone(encode_document(document, VOCABULARY)))
    model = build(TINY, seed=0)
    found = compute_losses(model, batch, sample_noise(batch, DiffusionConfig()), DiffusionConfig())
    assert (float(found.image_sum.detach()), found.image_count) == (0, 0)
    total_loss(found, found.text_count, found.image_count, 5.0).backward()
    assert not model.patches.proj_out.weight.grad.any()
    assert model.patches.proj_in.weight.grad.any()  # but what it shows is learnt from


def test_batches_without_images_or_without_text_have_a_loss():
    no_loss = image((4, 4), 0, loss=False), Text((), loss=False)
    for segments in ((Text((1, 2, 3)),), (image((4, 4), 0),), no_loss):
        found = losses_of(alone(encode_document(Document(segments), VOCABULARY)), DiffusionConfig())
        loss = total_loss(found, found.text_count, found.image_count, 5.0)
        loss.backward()
        assert loss.isfinite()


# Batches are only a way to compute

several_documents = st.lists(documents(min_images=1), min_size=2, max_size=5, unique_by=lambda d: d.key)


def gradients(parts: list[Batch], config: DiffusionConfig, z_loss: float) -> tuple[float, dict[str, Tensor]]:
    """One step's loss and gradients, over these micro-batches."""
    MODEL.zero_grad()
    counts = [sum(part.text_count for part in parts), sum(part.image_count for part in parts)]
    value = 0.0
    for part in parts:
        loss = total_loss(losses_of(part, config, z_loss), *counts, image_weight=5.0)
        loss.backward()
        value += float(loss.detach())
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in MODEL.named_parameters()
    }
    MODEL.zero_grad()
    return value, found


@few
@given(several_documents, st.integers(0, 99), configs, st.sampled_from((0, 0.01)))
def test_a_step_is_the_same_however_its_documents_are_batched(found, seed, config, z_loss):
    rows = pack(found, LENGTH, VOCABULARY, seed)
    whole = [collate(rows, LENGTH, VOCABULARY)]
    by_row = [collate([row], LENGTH, VOCABULARY) for row in rows]
    one_by_one = [alone(chunk) for row in rows for chunk in row.chunks]
    longer = [collate([Row(row.chunks) for row in rows[::-1]], LENGTH + 16, VOCABULARY)]
    value, expected = gradients(whole, config, z_loss)
    for parts in (by_row, one_by_one, longer):
        same, gradient = gradients(parts, config, z_loss)
        assert math.isclose(same, value, rel_tol=1e-5)
        for name in expected:
            scale = max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(gradient[name], expected[name], rtol=0, atol=1e-9 * scale, msg=name)


# Chance


def chances(batch: Batch, drawn: list[objective.NoiseSample]) -> dict[tuple, tuple[float, list]]:
    """(image's key, max_t) -> its time and noise."""
    return {
        (key, float(max_t)): (float(t), noise.flatten().tolist())
        for group, d in zip(batch.groups, drawn, strict=True)
        for key, max_t, t, noise in zip(group.keys, group.max_t, d.t, d.noise, strict=True)
    }


@some
@given(several_documents, configs, st.integers(0, 99))
def test_chance_follows_the_image_into_any_batch(found, config, seed):
    batch = collate(pack(found, LENGTH, VOCABULARY, seed), LENGTH, VOCABULARY)
    torch.manual_seed(seed)
    expected = chances(batch, sample_noise(batch, config))
    assert len(expected) == sum(len(group.keys) for group in batch.groups)
    times = [t for (_, max_t), (t, _) in expected.items() if max_t > 0]
    assert len(set(times)) == len(times)
    alone_again = {}
    for document in found[::-1]:
        single = alone(encode_document(document, VOCABULARY))
        alone_again |= chances(single, sample_noise(single, config))
    assert alone_again == expected


@some
@given(
    batches(min_images=1), configs, st.sampled_from(("uniform", "logit_normal")), st.sampled_from((1.0, 3.0))
)
def test_times_obey_max_time_and_clean_images_stay_clean(found, config, law, shift):
    batch, config = found[1], replace(config, t_distribution=law, t_shift=shift)
    for group, d in zip(batch.groups, sample_noise(batch, config), strict=True):
        assert d.t.dtype == d.noise.dtype == torch.float32
        assert d.noise.shape == group.x0.shape
        assert (d.t <= group.max_t).all()
        assert ((d.t > 0) == (group.max_t > 0)).all()
        noisy = diffusion.add_noise(group.x0, d.noise, d.t, config)
        clean = group.max_t == 0
        torch.testing.assert_close(noisy[clean], group.x0[clean], rtol=0, atol=1e-6)


@some
@given(batches(min_images=1), st.integers(1, 7), st.integers(0, 99))
def test_a_grid_draw_is_each_images_own_and_fixed(found, steps, seed):
    batch = found[1]
    one = sample_noise_on_grid(batch, steps)
    torch.manual_seed(seed)
    other = sample_noise_on_grid(batch, steps)
    for group, d, again in zip(batch.groups, one, other, strict=True):
        assert torch.equal(d.t, again.t)
        assert torch.equal(d.noise, again.noise)
        for key, latent, limit, t, noise in zip(group.keys, group.x0, group.max_t, d.t, d.noise, strict=True):
            single = alone(encode_document(Document((replace(image((4, 4), 0), content=latent.numpy()),)), VOCABULARY))
            single.groups[0].keys[0] = key
            by_itself = sample_noise_on_grid(single, steps)[0]
            assert torch.equal(by_itself.noise[0], noise)
            torch.testing.assert_close(by_itself.t[0] * limit, t)


def test_a_grid_divides_time_evenly():
    found = [Document(tuple(image((4, 4), n) for n in range(400)), key=1)]
    batch = collate([Row((encode_document(found[0], VOCABULARY),))], 8192, VOCABULARY)
    times, counts = sample_noise_on_grid(batch, 4)[0].t.unique(return_counts=True)
    torch.testing.assert_close(times, torch.tensor([0.125, 0.375, 0.625, 0.875]))
    assert counts.min() > 70


def test_noise_is_noise():
    found = [Document(tuple(image((4, 4), n) for n in range(50)), key=1)]
    batch = collate(pack(found, 512, VOCABULARY, 0), 512, VOCABULARY)
    for drawn in (sample_noise(batch, DiffusionConfig()), sample_noise_on_grid(batch, 5)):
        noise = drawn[0].noise
        assert noise.shape == (50, CHANNELS, 4, 4)
        assert abs(float(noise.mean())) < 0.1
        assert abs(float(noise.std()) - 1) < 0.05
        assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.7  # no two images share theirs
