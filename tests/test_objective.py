"""The losses: equal to slow sums and independent of batching; t and noise depend only on the image."""

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
    positioned_chunks,
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


# Compared with slow sums


@few
@given(batches(min_images=1), configs, st.sampled_from((0.0, 0.1)))
@torch.no_grad()
def test_losses_equal_slow_sums(packed, config, z_loss):
    rows, batch = packed
    batch, samples = in_double(batch), sample_noise(batch, config)
    pairs = list(zip(batch.groups, samples, strict=True))
    x_t = [diffusion.add_noise(group.x0, s.noise, s.t, config) for group, s in pairs]
    prediction = MODEL(with_all_logits(batch), x_t, [s.t for s in samples])
    text_sum, tokens = 0.0, 0
    for b, begin, chunk in positioned_chunks(rows):
        for i, target in enumerate(chunk.targets.tolist()):
            if target != NO_TARGET:
                scores = [math.exp(x) for x in prediction.logits[b * LENGTH + begin + i].tolist()]
                text_sum += -math.log(scores[target] / sum(scores)) + z_loss * math.log(sum(scores)) ** 2
                tokens += 1
    image_sum, images = 0.0, 0
    for g, (group, s) in enumerate(pairs):
        expected = diffusion.target(group.x0, s.noise, s.t, config)
        for n in range(len(group.keys)):
            if group.loss[n]:
                error = (prediction.images[g][n] - expected[n]).flatten().tolist()
                image_sum += sum(x**2 for x in error) / len(error)
                images += 1
    losses = compute_losses(MODEL, batch, samples, config, z_loss)
    assert (losses.text_count, losses.image_count) == (tokens, images)
    assert math.isclose(float(losses.text_sum), text_sum, rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(float(losses.image_sum), image_sum, rel_tol=1e-5, abs_tol=1e-6)


@some
@given(st.integers(1, 6), st.floats(0, 2), st.integers(0, 2**31))
def test_z_loss_adds_the_squared_log_normaliser(tokens, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, 11, generator=generator)
    target = torch.randint(11, (tokens,), generator=generator)
    expected = 0.0
    for scores, token in zip(logits.tolist(), target.tolist(), strict=True):
        normaliser = math.log(sum(map(math.exp, scores)))
        expected += normaliser - scores[token] + weight * normaliser**2
    assert math.isclose(float(next_token_loss(logits, target, weight).sum()), expected, rel_tol=1e-5)


def test_total_loss_is_mean_text_plus_weighted_mean_image():
    losses = Losses(torch.tensor(6.0), torch.tensor(10.0), torch.tensor(0.0), text_count=3, image_count=2, code_count=0)
    assert total_loss(losses, 3, 2, image_weight=5.0) == 6 / 3 + 5 * 10 / 2
    assert total_loss(losses, 12, 40, image_weight=1.0) == 6 / 12 + 10 / 40  # one micro-batch of a larger step
    zero_losses = Losses(*torch.zeros(3), 0, 0, 0)
    assert total_loss(zero_losses, 0, 0, image_weight=5.0) == 0


# Weights of images


@dataclass
class Oracle:
    """A model that predicts the target of every image plus a given error."""

    samples: list[objective.NoiseSample]
    errors: list[Tensor]  # (N,) each
    config: DiffusionConfig

    def __call__(self, batch: Batch, x_t: list[Tensor], t: list[Tensor]) -> Prediction:
        predictions = [
            diffusion.target(group.x0, s.noise, s.t, self.config) + error.view(-1, 1, 1, 1)
            for group, s, error in zip(batch.groups, self.samples, self.errors, strict=True)
        ]
        return Prediction(torch.zeros(batch.text_count, VOCABULARY.size), predictions)


@some
@given(batches(min_images=2), configs, st.integers(0, 2**31))
def test_images_of_all_sizes_weigh_the_same_and_clean_ones_0(packed, config, seed):
    batch = in_double(packed[1])
    samples, generator = sample_noise(batch, config), torch.Generator().manual_seed(seed)
    errors = [torch.rand(len(group.keys), generator=generator) for group in batch.groups]
    losses = compute_losses(Oracle(samples, errors, config), batch, samples, config)
    expected = sum(
        float(error) ** 2
        for group, group_errors in zip(batch.groups, errors, strict=True)
        for error, has_loss, max_t in zip(group_errors, group.loss, group.max_t, strict=True)
        if has_loss and max_t > 0
    )
    assert math.isclose(float(losses.image_sum), expected, rel_tol=1e-5, abs_tol=1e-9)
    perfect = compute_losses(Oracle(samples, [0 * x for x in errors], config), batch, samples, config)
    assert float(perfect.image_sum) < 1e-10


@pytest.mark.parametrize(("loss", "max_t"), [(True, 0.0), (False, 1.0), (False, 0.0)])
def test_condition_image_has_no_loss(loss, max_t):
    document = Document((image((4, 4), 0, loss, max_t), Text((1, 2, 3))))
    batch = in_double(alone(encode_document(document, VOCABULARY)))
    model = build(TINY, seed=0)
    losses = compute_losses(model, batch, sample_noise(batch, DiffusionConfig()), DiffusionConfig())
    assert (float(losses.image_sum.detach()), losses.image_count) == (0, 0)
    total_loss(losses, losses.text_count, losses.image_count, 5.0).backward()
    assert not model.patches.proj_out.weight.grad.any()
    assert model.patches.proj_in.weight.grad.any()  # its content still contributes to the text loss


def test_batches_without_images_or_text_have_a_finite_loss():
    without_loss = image((4, 4), 0, loss=False), Text((), loss=False)
    for segments in ((Text((1, 2, 3)),), (image((4, 4), 0),), without_loss):
        losses = losses_of(alone(encode_document(Document(segments), VOCABULARY)), DiffusionConfig())
        loss = total_loss(losses, losses.text_count, losses.image_count, 5.0)
        loss.backward()
        assert loss.isfinite()


# Independence of batching

several_documents = st.lists(documents(min_images=1), min_size=2, max_size=5, unique_by=lambda d: d.key)


def loss_and_gradients(parts: list[Batch], config: DiffusionConfig, z_loss: float) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over these micro-batches."""
    MODEL.zero_grad()
    counts = [sum(part.text_count for part in parts), sum(part.image_count for part in parts)]
    value = 0.0
    for part in parts:
        loss = total_loss(losses_of(part, config, z_loss), *counts, image_weight=5.0)
        loss.backward()
        value += float(loss.detach())
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in MODEL.named_parameters()
    }
    MODEL.zero_grad()
    return value, grads


@few
@given(several_documents, st.integers(0, 99), configs, st.sampled_from((0, 0.01)))
def test_gradients_do_not_depend_on_batching(documents_, seed, config, z_loss):
    rows = pack(documents_, LENGTH, VOCABULARY, seed)
    one_batch = [collate(rows, LENGTH, VOCABULARY)]
    by_row = [collate([row], LENGTH, VOCABULARY) for row in rows]
    by_chunk = [alone(chunk) for row in rows for chunk in row.chunks]
    longer = [collate([Row(row.chunks) for row in rows[::-1]], LENGTH + 16, VOCABULARY)]
    value, expected = loss_and_gradients(one_batch, config, z_loss)
    for parts in (by_row, by_chunk, longer):
        other_value, gradient = loss_and_gradients(parts, config, z_loss)
        assert math.isclose(other_value, value, rel_tol=1e-5)
        for name in expected:
            scale = max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(gradient[name], expected[name], rtol=0, atol=1e-9 * scale, msg=name)


# t and noise


def samples_by_key(batch: Batch, samples: list[objective.NoiseSample]) -> dict[tuple, tuple[float, list]]:
    """(key, max_t) of each image -> its t and noise."""
    return {
        (key, float(max_t)): (float(t), noise.flatten().tolist())
        for group, s in zip(batch.groups, samples, strict=True)
        for key, max_t, t, noise in zip(group.keys, group.max_t, s.t, s.noise, strict=True)
    }


@some
@given(several_documents, configs, st.integers(0, 99))
def test_t_and_noise_do_not_depend_on_the_batch(documents_, config, seed):
    batch = collate(pack(documents_, LENGTH, VOCABULARY, seed), LENGTH, VOCABULARY)
    torch.manual_seed(seed)
    expected = samples_by_key(batch, sample_noise(batch, config))
    assert len(expected) == sum(len(group.keys) for group in batch.groups)
    t_values = [t for (_, max_t), (t, _) in expected.items() if max_t > 0]
    assert len(set(t_values)) == len(t_values)
    single = {}
    for document in documents_[::-1]:
        batch = alone(encode_document(document, VOCABULARY))
        single |= samples_by_key(batch, sample_noise(batch, config))
    assert single == expected


@some
@given(
    batches(min_images=1), configs, st.sampled_from(("uniform", "logit_normal")), st.sampled_from((1.0, 3.0))
)
def test_t_obeys_max_t_and_clean_images_stay_clean(packed, config, distribution, shift):
    batch, config = packed[1], replace(config, t_distribution=distribution, t_shift=shift)
    for group, s in zip(batch.groups, sample_noise(batch, config), strict=True):
        assert s.t.dtype == s.noise.dtype == torch.float32
        assert s.noise.shape == group.x0.shape
        assert (s.t <= group.max_t).all()
        assert ((s.t > 0) == (group.max_t > 0)).all()
        x_t = diffusion.add_noise(group.x0, s.noise, s.t, config)
        is_clean = group.max_t == 0
        torch.testing.assert_close(x_t[is_clean], group.x0[is_clean], rtol=0, atol=1e-6)


@some
@given(batches(min_images=1), st.integers(1, 7), st.integers(0, 99))
def test_noise_on_grid_is_fixed_for_each_image(packed, steps, seed):
    batch = packed[1]
    samples = sample_noise_on_grid(batch, steps)
    torch.manual_seed(seed)
    samples_again = sample_noise_on_grid(batch, steps)
    for group, s, again in zip(batch.groups, samples, samples_again, strict=True):
        assert torch.equal(s.t, again.t)
        assert torch.equal(s.noise, again.noise)
        for key, latent, max_t, t, noise in zip(group.keys, group.x0, group.max_t, s.t, s.noise, strict=True):
            single = alone(encode_document(Document((replace(image((4, 4), 0), content=latent.numpy()),)), VOCABULARY))
            single.groups[0].keys[0] = key
            expected = sample_noise_on_grid(single, steps)[0]
            assert torch.equal(expected.noise[0], noise)
            torch.testing.assert_close(expected.t[0] * max_t, t)


def test_grid_divides_t_evenly():
    documents_ = [Document(tuple(image((4, 4), n) for n in range(400)), key=1)]
    batch = collate([Row((encode_document(documents_[0], VOCABULARY),))], 8192, VOCABULARY)
    t_values, counts = sample_noise_on_grid(batch, 4)[0].t.unique(return_counts=True)
    torch.testing.assert_close(t_values, torch.tensor([0.125, 0.375, 0.625, 0.875]))
    assert counts.min() > 70


def test_noise_is_standard_normal_and_differs_between_images():
    documents_ = [Document(tuple(image((4, 4), n) for n in range(50)), key=1)]
    batch = collate(pack(documents_, 512, VOCABULARY, 0), 512, VOCABULARY)
    for samples in (sample_noise(batch, DiffusionConfig()), sample_noise_on_grid(batch, 5)):
        noise = samples[0].noise
        assert noise.shape == (50, CHANNELS, 4, 4)
        assert abs(float(noise.mean())) < 0.1
        assert abs(float(noise.std()) - 1) < 0.05
        assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.7  # between any two images
