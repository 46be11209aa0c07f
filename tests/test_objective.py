"""The losses: equal to slow sums and independent of batching; t and noise depend only on the image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.memory import MemoryCounter
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
from transfusion.config import DiffusionConfig, LoraConfig, TrainingConfig
from transfusion.data.packing import pack
from transfusion.model.transfusion import Head, Prediction
from transfusion.objective import Losses, compute_losses, next_token_loss, sample_noise, sample_noise_on_grid, total_loss
from transfusion.sequence import NO_TARGET, Batch, Document, Row, Text, collate, encode_document
from transfusion.training.optimizer import freeze

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


# The loss in chunks


def plain_loss(hidden: Tensor, lm_head: Tensor, target: Tensor, z_loss: float) -> Tensor:
    """The losses (T,) from all logits at once."""
    logits = F.linear(hidden, lm_head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, reduction="none") + z_loss * logits.logsumexp(-1).square()


def loss_inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[Tensor, ...]:
    """hidden (T, 5), lm_head (11, 5), target (T,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64).to(dtype)
    lm_head = (size * torch.randn(11, 5, generator=generator, dtype=torch.float64)).to(dtype)
    return hidden, lm_head, torch.randint(11, (tokens,), generator=generator)


@some
@given(
    st.integers(0, 9), st.integers(1, 10), st.sampled_from((0.0, 0.1)), st.sampled_from((0.01, 1.0, 300.0)),
    st.sampled_from(((True, True), (True, False), (False, True))), st.integers(0, 2**31),
)  # fmt: skip
def test_chunked_loss_and_gradients_equal_those_of_all_logits(tokens, chunk, z_loss, size, trained, seed):
    *tensors, target = loss_inputs(tokens, seed, size=size)
    ours, plain = ([t.clone().requires_grad_(on) for t, on in zip(tensors, trained, strict=True)] for _ in range(2))
    expected = plain_loss(*plain, target, z_loss)
    (0.3 * expected.sum()).backward()
    with mock.patch.object(objective, "CPU_CHUNK", chunk):
        loss = next_token_loss(*ours, target, z_loss)
        (0.3 * loss.sum).backward()
    torch.testing.assert_close(loss.sum, expected.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.tokens, expected.detach(), rtol=1e-12, atol=1e-12)
    for tensor, reference in zip(ours, plain, strict=True):
        if reference.grad is None:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_in_bfloat16_is_as_accurate_as_from_all_logits(weight_dtype):
    """Against float64: float32 weights under autocast, and bfloat16 weights as FSDP gathers them. The gradient of the head
    is a sum over chunks in float32."""
    *tensors, target = loss_inputs(16 * objective.CPU_CHUNK, 3, weight_dtype)

    def results(dtype: torch.dtype, loss: Callable) -> list[Tensor]:
        hidden, lm_head = (tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            losses, total = loss(hidden, lm_head, target, 0.1)
        (total / len(target)).backward()
        assert hidden.grad.dtype == lm_head.grad.dtype == dtype
        return [losses.detach(), hidden.grad, lm_head.grad]

    def of_all_logits(*args) -> tuple[Tensor, Tensor]:
        losses = plain_loss(*args)
        return losses, losses.sum()

    exact = results(torch.float64, of_all_logits)
    ours, plain = results(weight_dtype, lambda *args: next_token_loss(*args)[::-1]), results(weight_dtype, of_all_logits)
    assert ours[0].dtype == torch.float32
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)] for values in (ours, plain)]
    assert all(error < 1.1 * other for error, other in zip(*errors, strict=True)), errors


def test_logits_are_never_all_in_memory(monkeypatch):
    """Of 64 chunks at most two are in memory. Without gradients there is no gradient of the head either."""
    monkeypatch.setattr(objective, "CPU_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    hidden, lm_head = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (64 * 4, 1000))
    target, chunk = torch.randint(1000, (len(hidden),), generator=generator), 4 * 1000 * 4  # bytes
    with MemoryCounter() as memory:
        next_token_loss(hidden, lm_head, target, 0.1).sum.backward()
    other = sum(tensor.nbytes for tensor in (hidden, lm_head, target))  # both gradients, and values of each position
    assert 2 * chunk < memory.peak < 2.5 * chunk + other
    with torch.no_grad(), MemoryCounter() as memory:
        next_token_loss(hidden, lm_head, target, 0.1)
    assert memory.peak < 2.5 * chunk


def test_second_backward_pass_of_a_loss_is_an_error():
    """Its gradients were scaled in place."""
    *tensors, target = loss_inputs(3, 0)
    loss = next_token_loss(*(tensor.requires_grad_() for tensor in tensors), target).sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@few
@given(batches(min_images=1), st.booleans(), st.sampled_from(("", "text", "transformer")), st.sampled_from((0.0, 0.1)))
def test_model_has_the_gradients_of_the_loss_on_all_logits(packed, tied, frozen, z_loss):
    batch, config = in_double(packed[1]), DiffusionConfig()
    model = build(replace(TINY, tie_word_embeddings=tied), seed=3)
    freeze(model, TrainingConfig(**{f"{frozen}_lr_scale": 0.0} if frozen else {}).lr_scales, LoraConfig())
    samples = sample_noise(batch, config)
    x_t = [diffusion.add_noise(group.x0, s.noise, s.t, config) for group, s in zip(batch.groups, samples, strict=True)]
    prediction = model(batch, x_t, [s.t for s in samples])
    text = F.cross_entropy(prediction.logits, batch.text_target, reduction="none")
    text = text + z_loss * prediction.logits.logsumexp(-1).square()
    images = sum(
        (diffusion.squared_error(group.x0, s.noise, x, predicted, s.t, config) * group.loss).sum()
        for group, s, x, predicted in zip(batch.groups, samples, x_t, prediction.images, strict=True)
    )
    expected = torch.autograd.grad(text.sum() / 3 + images, trained := [p for p in model.parameters() if p.requires_grad])
    with mock.patch.object(objective, "CPU_CHUNK", 4):
        losses = compute_losses(model, batch, samples, config, z_loss)
    actual = torch.autograd.grad(losses.text_sum / 3 + losses.image_sum, trained)
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


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

    def __call__(self, batch: Batch, x_t: list[Tensor], t: list[Tensor], head: Head) -> Prediction:
        predictions = [
            diffusion.target(group.x0, s.noise, s.t, self.config) + error.view(-1, 1, 1, 1)
            for group, s, error in zip(batch.groups, self.samples, self.errors, strict=True)
        ]
        return Prediction(head(torch.zeros(batch.text_count, 1), torch.zeros(VOCABULARY.size, 1)), predictions)


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
