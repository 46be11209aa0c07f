"""Guidance: its branches, their combination, and the number of forward passes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.documents import SHAPES
from tests.profile import examples
from tests.test_engine import assert_no_slot_is_lost, assert_same_answers, draw_now_and_then, generation, run_to_end
from tests.tiny import SIZES, build_engine, picture, prompt_segments, run_sampler, start_sampler, uncached
from transfusion.config import DiffusionConfig, GenerationConfig, from_json, to_json
from transfusion.inference.engine import Engine, ImageEvent, Request, TokenEvent
from transfusion.inference.image_mode import Branch, BranchRows, guide
from transfusion.inference.samplers import SamplingSchedule
from transfusion.sequence import Document, Image, Text, encode_document

few = examples(12, quick=5)
some = examples(25, quick=10)

seeds = st.integers(0, 2**31)
pictures = st.builds(picture, st.sampled_from(SHAPES), seeds)
words = st.text("ab é<>", min_size=1, max_size=6)
illustrated = st.tuples(st.lists(words | pictures, max_size=2), pictures, st.lists(words | pictures, max_size=2)).map(
    lambda spec: [*spec[0], spec[1], *spec[2]]
)  # prompts with at least one image
scales = st.sampled_from([(3.0, 1.5), (1.0, 2.5), (0.0, 0.5), (2.0, 0.0)])  # guidance_scale, image_guidance_scale


def images_of(segments) -> list[Image]:
    return [segment for segment in segments if isinstance(segment, Image)]


def draws(engine: Engine) -> list:
    return [call for call in engine.model.calls if call.kind.startswith("draw")]


def reads(engine: Engine) -> list:
    """Calls that read a prompt, tokens or a finished image; without the one call for bos and boi."""
    return [
        call for call in engine.model.calls
        if not call.kind.startswith("draw") and not call.is_uncond_prefix(engine.vocabulary)
    ]  # fmt: skip


def draw_uncached(engine: Engine, prefixes: list, options: GenerationConfig, combine, start: Tensor) -> np.ndarray:
    """The image of the sampler with combine(t, predictions), one uncached prediction after each of these prefixes."""
    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        image = Image(x_t[0].numpy())
        return combine(t.item(), [uncached(engine, [*prefix, image], t.item())[1] for prefix in prefixes])[None]

    schedule = SamplingSchedule(options.steps, engine.run.diffusion)
    x0, _ = run_sampler(start_sampler(options.sampler, start, schedule, engine.latent_range), predict)
    return x0[0].numpy().transpose(1, 2, 0)


# Combination of branches


@few
@given(seeds, scales)
def test_branches_are_combined_as_in_the_papers(seed, scale):
    cond, image_cond, uncond = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    text_scale, image_scale = scale
    expected = uncond + image_scale * (image_cond - uncond) + text_scale * (cond - image_cond)
    torch.testing.assert_close(guide([cond, image_cond, uncond], [*scale, 1.0]), expected)
    expected = uncond + text_scale * (cond - uncond)
    torch.testing.assert_close(guide([cond, uncond], [text_scale, 1.0]), expected)
    torch.testing.assert_close(guide([cond, image_cond, uncond], [text_scale, text_scale, 1.0]), expected)
    assert torch.equal(guide([cond], [text_scale]), cond)


@few
@given(seeds, scales, st.floats(0, 1))
def test_rescaled_guidance_equals_diffusers(seed, scale, rescale):
    predictions = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    rescaled = guide(predictions, [*scale, 1.0], rescale)
    expected = rescale_noise_cfg(guide(predictions, [*scale, 1.0])[None], predictions[:1], rescale)[0]
    torch.testing.assert_close(rescaled, expected, rtol=1e-5, atol=1e-5)
    if rescale == 1:
        torch.testing.assert_close(rescaled.std(), predictions[0].std())


def test_rescaled_zero_predictions_are_zero():
    """An untrained model predicts 0: its last layer starts at zero."""
    assert torch.equal(guide(torch.zeros(2, 3, 4, 4), [3.0, 1.0], rescale=0.7), torch.zeros(3, 4, 4))


@few
@given(
    st.lists(st.tuples(st.sampled_from([(), (3.0,), (3.0, 1.5), (0.0, 2.0)]), st.sampled_from((0.0, 0.3, 1.0))), min_size=1,
             max_size=4), seeds,
)  # fmt: skip
def test_images_with_any_numbers_of_branches_are_guided_together(specs, seed):
    """Each gets exactly what it gets alone."""
    branches = [[Branch(0, scale) for scale in (*scales_, 1.0)] for scales_, _ in specs]
    rows, rescale = BranchRows(branches), [factor for _, factor in specs]
    predictions = torch.randn(len(rows.slots), 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    guided = rows.guide(predictions, rescale)
    for n, (scales_, factor) in enumerate(specs):
        own = [predictions[row] for row, image in enumerate(rows.images) if image == n]
        assert torch.equal(guided[n], guide(own, [*scales_, 1.0], factor))
        assert len(own) == len(branches[n])


# Separate scales for text and images


@some
@given(illustrated, scales, st.integers(1, 3), st.sampled_from(SIZES), st.sampled_from(("1d", "2d")), seeds)
def test_edited_image_equals_the_sampler_with_three_uncached_branches(parts, scale, num, size, image_rope, seed):
    """The whole prompt; only its images, as when training drops the text; and nothing."""
    engine = build_engine(image_rope=image_rope)
    text_scale, image_scale = scale
    options = generation(engine, guidance_scale=text_scale, image_guidance_scale=image_scale)
    (answers,) = engine.generate([Request(tuple(parts), num, seed, options, size)])
    segments = prompt_segments(parts)
    first = draws(engine)[0]
    assert len(first.slots) == 3 * num
    for sample_index, answer in enumerate(answers):
        expected = draw_uncached(
            engine, [segments, images_of(segments), []], options,
            lambda _, p: p[2] + image_scale * (p[1] - p[2]) + text_scale * (p[0] - p[1]),
            first.x_t[0][sample_index : sample_index + 1],
        )  # fmt: skip
        np.testing.assert_allclose(answer.parts[0], expected, rtol=0, atol=1e-4)
    assert_no_slot_is_lost(engine)


@some
@given(illustrated, seeds)
def test_image_branch_of_free_generation_contains_only_the_images_of_the_prompt(parts, seed):
    """For any number and size of images that the sequence has drawn itself."""
    engine = build_engine(draw_now_and_then)
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=1.5, steps=2)
    engine.submit(Request(tuple(parts), seed=seed, generation=options))
    segments, tokens = list(prompt_segments(parts)), []
    prompt_images = images_of(segments)
    events = run_to_end(engine)
    calls = iter(draws(engine))
    for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        elif isinstance(event, ImageEvent):
            segments.append(Text(tuple(tokens)))
            for _ in range(options.steps):
                call = next(calls)
                for row, prefix in enumerate((segments, prompt_images, [])):
                    image, t = Image(call.x_t[0][row].numpy()), call.t[0][row].item()
                    prediction = uncached(engine, [*prefix, image], t)[1]
                    torch.testing.assert_close(call.prediction.images[0][row], prediction, rtol=0, atol=1e-5)
            segments.append(Image(event.pixels.transpose(2, 0, 1).copy()))
            tokens = []
    assert next(calls, None) is None
    assert_no_slot_is_lost(engine)


def test_free_generation_with_images_in_the_prompt_draws_several():
    """The test above is only valid if sequences have more than one image."""
    engine = build_engine(draw_now_and_then)
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=1.5, steps=2)
    requests = [Request((picture(SHAPES[0], 0),), seed=seed, generation=options) for seed in range(20)]
    counts = [sum(not isinstance(part, str) for part in answer.parts) for (answer,) in engine.generate(requests)]
    assert sum(count > 1 for count in counts) > 5


@few
@given(illustrated, st.integers(1, 3))
def test_prompt_and_its_images_are_read_in_one_forward_pass(parts, num):
    engine = build_engine()
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=1.5)
    engine.generate([Request(tuple(parts), num, generation=options)])
    segments, vocabulary = prompt_segments(parts), engine.vocabulary
    (call,) = reads(engine)
    boi = next(iter(vocabulary.boi.values()))
    for row, row_segments in enumerate((segments, images_of(segments))):
        expected = encode_document(Document(tuple(row_segments)), vocabulary, add_eos=False).append(boi).tokens.tolist()
        assert call.tokens[row].tolist()[: len(expected)] == expected
    assert len(call.slots) == 2
    assert [len(call.slots) for call in draws(engine)] == [3 * num] * options.steps


def test_boi_is_read_for_both_branches_in_one_forward_pass():
    engine = build_engine(lambda v: {v.boi[SHAPES[0]]: 1e4})
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=1.5, steps=1, max_tokens=3)
    engine.generate([Request(("a", picture(SHAPES[1], 0), "b"), generation=options)])
    assert [(call.kind, len(call.slots)) for call in reads(engine)] == [
        ("prefill", 2), *[("decode", 2), ("prefill", 1)] * 3,  # the prompt; each boi, and its image
    ]  # fmt: skip


@few
@given(illustrated, st.lists(words, min_size=1, max_size=2), st.sampled_from((1.0, 2.0)), seeds)
def test_without_image_scale_or_images_there_are_two_branches(parts, text, scale, seed):
    for prompt, image_scale in ((parts, None), (parts, scale), (text, 1.5)):
        engine, plain = build_engine(), build_engine()
        options = generation(engine, guidance_scale=scale)
        with_image_scale = replace(options, image_guidance_scale=image_scale)
        (answers,) = engine.generate([Request(tuple(prompt), 2, seed, with_image_scale)])
        (expected,) = plain.generate([Request(tuple(prompt), 2, seed, options)])
        assert all(np.array_equal(*map(lambda a: a.parts[0], pair)) for pair in zip(answers, expected, strict=True))
        assert [call.slots for call in engine.model.calls] == [call.slots for call in plain.model.calls]
        assert {len(call.slots) for call in draws(engine)} == {2 if scale == 1 else 4}


@few
@given(illustrated, seeds)
def test_nearly_equal_scales_draw_nearly_equal_images(parts, seed):
    """Equal scales leave one branch out; the result is continuous there."""
    images = []
    for image_scale in (2.0, 2.0 + 1e-5):
        engine = build_engine()
        options = generation(engine, guidance_scale=2.0, image_guidance_scale=image_scale)
        images.append(engine.generate([Request(tuple(parts), 1, seed, options)])[0][0].parts[0])
    np.testing.assert_allclose(*images, rtol=0, atol=1e-3)


# Negative prompts


@some
@given(
    st.lists(words | pictures, max_size=2), words, st.sampled_from([(3.0, None), (0.0, None), (3.0, 1.5), (0.5, 2.5)]),
    st.integers(1, 2), st.sampled_from(SIZES), seeds,
)  # fmt: skip
def test_negative_prompt_takes_the_place_of_the_empty_prompt(parts, negative, scale, num, size, seed):
    """With two branches, and with three if the prompt has images and they have their own scale."""
    engine = build_engine()
    text_scale, image_scale = scale
    options = generation(engine, guidance_scale=text_scale, image_guidance_scale=image_scale)
    (answers,) = engine.generate([Request(tuple(parts), num, seed, options, size, negative_prompt=negative)])
    segments, uncond = prompt_segments(parts), prompt_segments([negative])
    prefixes, scales_ = [segments, uncond], [text_scale, 1.0]
    if image_scale is not None and images_of(segments):
        prefixes, scales_ = [segments, images_of(segments), uncond], [text_scale, image_scale, 1.0]
    first = draws(engine)[0]
    assert len(first.slots) == len(prefixes) * num
    for sample_index, answer in enumerate(answers):
        start = first.x_t[0][sample_index : sample_index + 1]
        expected = draw_uncached(engine, prefixes, options, lambda _, predictions: guide(predictions, scales_), start)
        np.testing.assert_allclose(answer.parts[0], expected, rtol=0, atol=1e-4)
    assert not engine.uncond_prefixes
    assert_no_slot_is_lost(engine)


@few
@given(illustrated, words, st.booleans(), seeds)
def test_negative_prompt_of_free_generation_precedes_every_image(parts, negative, with_image_scale, seed):
    engine = build_engine(draw_now_and_then)
    image_scale = 1.5 if with_image_scale else None
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=image_scale, steps=2)
    engine.submit(Request(tuple(parts), seed=seed, generation=options, negative_prompt=negative))
    run_to_end(engine)
    uncond, images = prompt_segments([negative]), images_of(prompt_segments(parts))
    for call in draws(engine):
        prefixes = [images, uncond] if with_image_scale else [uncond]
        for row, prefix in enumerate(prefixes, start=1):
            prediction = uncached(engine, [*prefix, Image(call.x_t[0][row].numpy())], call.t[0][row].item())[1]
            torch.testing.assert_close(call.prediction.images[0][row], prediction, rtol=0, atol=1e-5)
    assert_no_slot_is_lost(engine)


@few
@given(illustrated, seeds)
def test_empty_negative_prompt_is_none(parts, seed):
    engines = [build_engine(draw_now_and_then) for _ in range(2)]
    for engine, negative in zip(engines, (None, ""), strict=True):
        engine.submit(Request(tuple(parts), seed=seed, negative_prompt=negative))
        run_to_end(engine)
    first, second = ([(call.slots, call.x_t, call.tokens.tolist()) for call in engine.model.calls] for engine in engines)
    assert str(first) == str(second)


@few
@given(
    st.lists(st.tuples(illustrated, st.sampled_from((None, "b", "long")), st.none() | st.integers(1, 2), seeds),
             min_size=2, max_size=3)
)  # fmt: skip
def test_batched_negative_prompts_equal_single_ones(specs):
    def request(parts, negative, num, seed):
        return Request(tuple(parts), num, seed, negative_prompt=negative)

    together = build_engine(draw_now_and_then)
    for spec, answers in zip(specs, together.generate([request(*spec) for spec in specs]), strict=True):
        assert_same_answers(answers, build_engine(draw_now_and_then).generate([request(*spec)])[0])
    assert_no_slot_is_lost(together)


@pytest.mark.parametrize(("fields", "options", "message"), [
    ({}, {"guidance_scale": 1.0}, "negative_prompt has no effect at guidance_scale 1: use a scale above 1"),
    ({"num_images": 1}, {"guidance_scale": 1.0}, "negative_prompt has no effect at guidance_scale 1"),
    ({"parts": ("a", picture((4, 4), 0))}, {"image_guidance_scale": 1.0}, "no effect at image_guidance_scale 1"),
    ({"allow_images": False}, {}, "negative_prompt has no effect: the request draws no images"),
    ({"num_images": 1, "negative_prompt": "a" * 195}, {}, "201 positions.*200"),
    ({"negative_prompt": "a" * 195}, {}, "201 positions.*200"),
])  # fmt: skip
def test_negative_prompt_without_effect_or_room_is_refused(fields, options, message):
    engine = build_engine()
    defaults = {"parts": "a", "negative_prompt": "b", "generation": generation(engine, **options)}
    with pytest.raises(ValueError, match=message) as raised:
        engine.submit(Request(**defaults | fields))
    assert len(str(raised.value).splitlines()) == 1
    assert_no_slot_is_lost(engine)


# Guidance interval and shift


@some
@given(
    illustrated, st.booleans(), st.lists(st.integers(0, 10), min_size=2, max_size=2), st.sampled_from((0.0, 0.7)), seeds
)
def test_outside_the_guidance_interval_only_one_branch_is_computed(parts, with_image_scale, ends, rescale, seed):
    """The interval includes its ends, although t is float32."""
    interval = tuple(sorted(end / 10 for end in ends))
    engine = build_engine()
    options = generation(
        engine, guidance_scale=2.0, image_guidance_scale=1.5 if with_image_scale else None, steps=10,
        guidance_interval=interval, guidance_rescale=rescale,
    )  # fmt: skip
    ((answer,),) = engine.generate([Request(tuple(parts), 1, seed, options)])
    is_guided = [min(ends) <= n <= max(ends) for n in range(10, 0, -1)]
    num_slots = [len(call.slots) for call in draws(engine)]
    assert num_slots == [(3 if with_image_scale else 2) if guided else 1 for guided in is_guided]
    segments, scales_ = prompt_segments(parts), [2.0, 1.5, 1.0] if with_image_scale else [2.0, 1.0]

    def combine(t: float, predictions: list[Tensor]) -> Tensor:
        guided = interval[0] - 1e-6 < t < interval[1] + 1e-6
        return guide(predictions, scales_, rescale) if guided else predictions[0]

    prefixes = [segments, images_of(segments), []] if with_image_scale else [segments, []]
    expected = draw_uncached(engine, prefixes, options, combine, draws(engine)[0].x_t[0][:1])
    np.testing.assert_allclose(answer.parts[0], expected, rtol=0, atol=1e-4)


@few
@given(illustrated, st.sampled_from((None, 0.5, 4.0)), st.sampled_from((1.0, 3.0)))
def test_t_shift_of_the_generation_replaces_the_runs(parts, shift, run_shift):
    engine = build_engine(diffusion=DiffusionConfig(prediction="velocity", t_shift=run_shift))
    options = generation(engine, steps=5, t_shift=shift)
    engine.generate([Request(tuple(parts), 1, generation=options)])
    diffusion = DiffusionConfig(t_shift=run_shift if shift is None else shift)
    expected = torch.tensor(SamplingSchedule(5, diffusion).times[:-1])
    torch.testing.assert_close(torch.stack([call.t[0][0] for call in draws(engine)]), expected, rtol=0, atol=0)


# Batches and cancellation

OPTIONS = [
    dict(zip("guidance_scale image_guidance_scale guidance_interval guidance_rescale".split(), values, strict=True))
    for values in (
        (2.0, 1.5, (0.0, 1.0), 0.0), (1.0, 1.0, (0.0, 1.0), 0.5), (3.0, 1.0, (0.3, 0.7), 0.5),
        (1.0, 2.0, (0.5, 1.0), 1.0), (2.0, 4.0, (0.0, 0.0), 0.0),
    )
]  # fmt: skip
requests_ = st.tuples(illustrated, st.none() | st.integers(1, 2), st.sampled_from(SIZES), seeds, st.sampled_from(OPTIONS))


def request_of(engine: Engine, spec) -> Request:
    parts, num, size, seed, changes = spec
    return Request(tuple(parts), num, seed, generation(engine, **changes), size if num else None)


@some
@given(st.lists(requests_, min_size=2, max_size=4))
def test_batched_guided_requests_equal_single_requests(specs):
    together = build_engine(draw_now_and_then)
    batched = together.generate([request_of(together, spec) for spec in specs])
    for spec, answers in zip(specs, batched, strict=True):
        alone = build_engine(draw_now_and_then)
        assert_same_answers(answers, alone.generate([request_of(alone, spec)])[0])
    assert_no_slot_is_lost(together)


@few
@given(st.lists(requests_, min_size=1, max_size=4))
def test_all_branches_of_one_shape_are_computed_in_one_forward_pass(specs):
    engine = build_engine(draw_now_and_then)
    for size in SIZES:  # reads bos and boi of each size
        engine.generate([Request((), 1, size=size, generation=generation(engine, steps=1))])
    for spec in specs:
        engine.submit(request_of(engine, spec))
    while engine.sequences:
        engine.model.calls.clear()
        engine.step()
        assert max(Counter(call.kind for call in engine.model.calls).values()) == 1
        assert all(len(set(call.slots)) == len(call.slots) for call in engine.model.calls)


@some
@given(st.lists(requests_, min_size=1, max_size=3), st.integers(0, 12))
def test_cancel_loses_no_slot_at_any_step(specs, steps):
    engine = build_engine(draw_now_and_then)
    numbers = [engine.submit(request_of(engine, spec)) for spec in specs]
    for _ in range(steps):
        engine.step()
    for number in numbers:
        engine.cancel(number)
        used = [slot for sequence in engine.sequences for slot in sequence.all_slots]
        assert sorted(engine.cache.free + used) == list(range(len(engine.cache.lengths)))
    assert_no_slot_is_lost(engine)


def test_cancelled_samples_release_three_slots_each():
    """The test above is only valid if requests are cancelled while they draw."""
    engine = build_engine()
    options = generation(engine, guidance_scale=2.0, image_guidance_scale=1.5)
    number = engine.submit(Request(("a", picture(SHAPES[0], 0)), 3, generation=options))
    engine.step()
    before = len(engine.cache.free)
    engine.cancel(number)
    assert len(engine.cache.free) == before + 9
    assert_no_slot_is_lost(engine)


# Refused options


@pytest.mark.parametrize(("changes", "words"), [
    ({"guidance_interval": (0.5,)}, r"guidance_interval must be 2 numbers, not \(0.5,\)"),
    ({"guidance_interval": (0.1, 0.2, 0.3)}, "guidance_interval must be 2 numbers"),
    ({"guidance_interval": (0.6, 0.4)}, "smaller number first, not 0.6 0.4"),
    ({"guidance_interval": (-0.1, 0.4)}, "between 0 and 1"), ({"guidance_interval": (0.1, 1.4)}, "between 0 and 1"),
    ({"guidance_interval": (float("nan"), 0.4)}, "guidance_interval must be a finite number"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, not 1.5"),
    ({"guidance_rescale": -0.5}, "guidance_rescale"), ({"guidance_rescale": float("nan")}, "guidance_rescale"),
    ({"image_guidance_scale": float("inf")}, "image_guidance_scale must be a finite number, not inf"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, not nan"),
    ({"guidance_scale": -1}, "guidance_scale must be between 0 and 100, not -1.0"),
    ({"t_shift": 0.0}, "t_shift must be between 0.001 and 1,000, not 0.0"), ({"t_shift": float("inf")}, "t_shift"),
])  # fmt: skip
def test_invalid_guidance_options_are_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as raised:
        GenerationConfig(**changes)
    assert len(str(raised.value).splitlines()) == 1


@few
@given(st.sampled_from(OPTIONS), st.none() | st.floats(0.1, 10))
def test_guidance_options_json_round_trip(changes, shift):
    config = GenerationConfig(**changes, t_shift=shift)
    assert from_json(GenerationConfig, to_json(config)) == config
    old = {"sampler": "ddim", "steps": 50, "guidance_scale": 2.0}  # from before guidance_interval existed
    assert from_json(GenerationConfig, old).guidance_interval == (0.0, 1.0)
