"""Guidance: which branches an image is seen in, what they say together, and that none of them costs more than it must."""

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
from tests.test_engine import draw_now_and_then, generation, same_answers, settled, to_the_end
from tests.tiny import SIZES, engine, picture, prompt_segments, uncached
from transfusion.config import DiffusionConfig, GenerationConfig, from_json, to_json
from transfusion.inference.engine import Engine, ImageEvent, Request, TokenEvent
from transfusion.inference.image_mode import guide
from transfusion.inference.samplers import SamplingSchedule, get_sampler
from transfusion.sequence import Document, Image, Text, encode_document

few = examples(12, quick=5)
some = examples(25, quick=10)

seeds = st.integers(0, 2**31)
pictures = st.builds(picture, st.sampled_from(SHAPES), seeds)
words = st.text("ab é<>", min_size=1, max_size=6)
illustrated = st.tuples(st.lists(words | pictures, max_size=2), pictures, st.lists(words | pictures, max_size=2)).map(
    lambda made: [*made[0], made[1], *made[2]]
)  # prompts with at least one picture
scales = st.sampled_from([(3.0, 1.5), (1.0, 2.5), (0.0, -0.5), (2.0, 0.0)])  # of all and of the images


def images_of(segments) -> list[Image]:
    return [segment for segment in segments if isinstance(segment, Image)]


def draws(ours: Engine) -> list:
    return [call for call in ours.model.calls if call.kind.startswith("draw")]


def reads(ours: Engine) -> list:
    """All that was read, but bos and boi, which every engine reads once."""
    return [
        call for call in ours.model.calls
        if not call.kind.startswith("draw") and not set(call.slots) & set(ours.uncond_slots.values())
    ]  # fmt: skip


def drawn_by_hand(ours: Engine, prefixes: list, asked: GenerationConfig, say, start: Tensor) -> np.ndarray:
    """The sampler driven by say(t, predictions), one uncached prediction behind each of these prefixes."""
    diffusion = ours.run.diffusion
    sampler = get_sampler(asked.sampler, diffusion.noise_schedule)(
        start, SamplingSchedule(asked.steps, diffusion, ours.bound, torch.Generator())
    )
    noisy, t = next(sampler)
    while True:
        image = Image(noisy[0].numpy())
        said = [uncached(ours, [*prefix, image], t.item())[1] for prefix in prefixes]
        try:
            noisy, t = sampler.send(say(t.item(), said)[None])
        except StopIteration as finished:
            return finished.value[0].numpy().transpose(1, 2, 0)


# What the branches say together


@few
@given(seeds, scales)
def test_branches_are_mixed_as_the_papers_mix_them(seed, scale):
    everything, images, nothing = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    text_scale, image_scale = scale
    expected = nothing + image_scale * (images - nothing) + text_scale * (everything - images)
    torch.testing.assert_close(guide([everything, images, nothing], [*scale, 1.0]), expected)
    expected = nothing + text_scale * (everything - nothing)
    torch.testing.assert_close(guide([everything, nothing], [text_scale, 1.0]), expected)
    torch.testing.assert_close(guide([everything, images, nothing], [text_scale, text_scale, 1.0]), expected)
    assert torch.equal(guide([everything], [text_scale]), everything)


@few
@given(seeds, scales, st.floats(0, 1))
def test_rescaled_guidance_is_diffusers(seed, scale, rescale):
    said = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    found = guide(said, [*scale, 1.0], rescale)
    expected = rescale_noise_cfg(guide(said, [*scale, 1.0])[None], said[:1], rescale)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if rescale == 1:
        torch.testing.assert_close(found.std(), said[0].std())


def test_a_model_that_says_0_everywhere_is_rescaled_to_0():
    """A new one does: its way out begins with zeros."""
    assert torch.equal(guide(torch.zeros(2, 3, 4, 4), [3.0, 1.0], rescale=0.7), torch.zeros(3, 4, 4))


# Text and images apart


@some
@given(illustrated, scales, st.integers(1, 3), st.sampled_from(SIZES), seeds)
def test_an_edit_is_the_sampler_driven_by_three_uncached_branches(parts, scale, num, size, seed):
    """With everything; with the images and without the text, as training drops it; and with nothing."""
    ours = engine()
    text_scale, image_scale = scale
    asked = generation(ours, guidance_scale=text_scale, image_guidance_scale=image_scale)
    (answers,) = ours.generate([Request(tuple(parts), num, seed, asked, size)])
    segments = prompt_segments(parts)
    first = draws(ours)[0]
    assert len(first.slots) == 3 * num
    for draw, answer in enumerate(answers):
        expected = drawn_by_hand(
            ours, [segments, images_of(segments), []], asked,
            lambda _, said: said[2] + image_scale * (said[1] - said[2]) + text_scale * (said[0] - said[1]),
            first.noisy[0][draw : draw + 1],
        )  # fmt: skip
        np.testing.assert_allclose(answer.parts[0], expected, rtol=0, atol=1e-4)
    settled(ours)


@some
@given(illustrated, seeds)
def test_the_images_branch_of_a_free_run_has_read_the_prompts_images_and_nothing_since(parts, seed):
    """However many images the row has written and drawn itself, of whatever sizes."""
    ours = engine(draw_now_and_then)
    asked = generation(ours, guidance_scale=2.0, image_guidance_scale=1.5, steps=2)
    ours.submit(Request(tuple(parts), seed=seed, generation=asked))
    segments, written = list(prompt_segments(parts)), []
    given_images, steps = images_of(segments), iter(draws(ours))
    events = to_the_end(ours)
    steps = iter(draws(ours))
    for event in events:
        if isinstance(event, TokenEvent):
            written.append(event.token)
        elif isinstance(event, ImageEvent):
            segments.append(Text(tuple(written)))
            for _ in range(asked.steps):
                call = next(steps)
                for row, prefix in enumerate((segments, given_images, [])):
                    noisy, t = Image(call.noisy[0][row].numpy()), call.t[0][row].item()
                    said = uncached(ours, [*prefix, noisy], t)[1]
                    torch.testing.assert_close(call.said.images[0][row], said, rtol=0, atol=1e-5)
            segments.append(Image(event.pixels.transpose(2, 0, 1).copy()))
            written = []
    assert next(steps, None) is None
    settled(ours)


def test_free_runs_with_images_in_their_prompts_draw_several():
    """The test above must not pass because nothing is drawn, or never twice."""
    ours = engine(draw_now_and_then)
    asked = generation(ours, guidance_scale=2.0, image_guidance_scale=1.5, steps=2)
    requests = [Request((picture(SHAPES[0], 0),), seed=seed, generation=asked) for seed in range(20)]
    counts = [sum(not isinstance(part, str) for part in answer.parts) for (answer,) in ours.generate(requests)]
    assert sum(count > 1 for count in counts) > 5


@few
@given(illustrated, st.integers(1, 3))
def test_prompt_and_images_are_read_once_and_in_one_forward_pass(parts, num):
    ours = engine()
    asked = generation(ours, guidance_scale=2.0, image_guidance_scale=1.5)
    ours.generate([Request(tuple(parts), num, generation=asked)])
    segments, vocabulary = prompt_segments(parts), ours.vocabulary
    (call,) = reads(ours)
    boi = next(iter(vocabulary.boi.values()))
    for row, read in enumerate((segments, images_of(segments))):
        expected = encode_document(Document(tuple(read)), vocabulary, ends=False).append(boi).tokens.tolist()
        assert call.tokens[row].tolist()[: len(expected)] == expected
    assert len(call.slots) == 2
    assert [len(call.slots) for call in draws(ours)] == [3 * num] * asked.steps


def test_a_free_run_reads_a_boi_for_both_in_one_forward_pass():
    ours = engine(lambda v: {v.boi[SHAPES[0]]: 1e4})
    asked = generation(ours, guidance_scale=2.0, image_guidance_scale=1.5, steps=1, max_tokens=3)
    ours.generate([Request(("a", picture(SHAPES[1], 0), "b"), generation=asked)])
    assert [(call.kind, len(call.slots)) for call in reads(ours)] == [
        ("read", 2), *[("write", 2), ("read", 1)] * 3,  # the prompt; each boi, and the image it brought
    ]  # fmt: skip


@few
@given(illustrated, st.lists(words, min_size=1, max_size=2), st.sampled_from((1.0, 2.0)), seeds)
def test_without_a_scale_of_their_own_or_images_there_are_two_branches_as_ever(parts, text, scale, seed):
    for given_parts, image_scale in ((parts, None), (parts, scale), (text, 1.5)):
        ours, plain = engine(), engine()
        asked = generation(ours, guidance_scale=scale)
        apart = replace(asked, image_guidance_scale=image_scale)
        (found,) = ours.generate([Request(tuple(given_parts), 2, seed, apart)])
        (expected,) = plain.generate([Request(tuple(given_parts), 2, seed, asked)])
        assert all(np.array_equal(*map(lambda a: a.parts[0], pair)) for pair in zip(found, expected, strict=True))
        assert [call.slots for call in ours.model.calls] == [call.slots for call in plain.model.calls]
        assert {len(call.slots) for call in draws(ours)} == {2 if scale == 1 else 4}


@few
@given(illustrated, seeds)
def test_scales_that_are_nearly_equal_draw_nearly_what_equal_ones_draw(parts, seed):
    """So that leaving a branch out where they are equal is no jump."""
    images = []
    for image_scale in (2.0, 2.0 + 1e-5):
        ours = engine()
        asked = generation(ours, guidance_scale=2.0, image_guidance_scale=image_scale)
        images.append(ours.generate([Request(tuple(parts), 1, seed, asked)])[0][0].parts[0])
    np.testing.assert_allclose(*images, rtol=0, atol=1e-3)


# Not all the way


@some
@given(
    illustrated, st.booleans(), st.lists(st.integers(0, 10), min_size=2, max_size=2), st.sampled_from((0.0, 0.7)), seeds
)
def test_guidance_is_for_its_interval_and_elsewhere_only_one_branch_is_computed(parts, apart, ends, rescale, seed):
    """Its ends belong to it, though t is float32 and they are not."""
    interval = tuple(sorted(end / 10 for end in ends))
    ours = engine()
    asked = generation(
        ours, guidance_scale=2.0, image_guidance_scale=1.5 if apart else None, steps=10, guidance_interval=interval,
        guidance_rescale=rescale,
    )  # fmt: skip
    ((answer,),) = ours.generate([Request(tuple(parts), 1, seed, asked)])
    is_guided = [min(ends) <= n <= max(ends) for n in range(10, 0, -1)]
    rows = [len(call.slots) for call in draws(ours)]
    assert rows == [(3 if apart else 2) if guided else 1 for guided in is_guided]
    segments, factors = prompt_segments(parts), [2.0, 1.5, 1.0] if apart else [2.0, 1.0]

    def say(t: float, said: list[Tensor]) -> Tensor:
        guided = interval[0] - 1e-6 < t < interval[1] + 1e-6
        return guide(said, factors, rescale) if guided else said[0]

    prefixes = [segments, images_of(segments), []] if apart else [segments, []]
    expected = drawn_by_hand(ours, prefixes, asked, say, draws(ours)[0].noisy[0][:1])
    np.testing.assert_allclose(answer.parts[0], expected, rtol=0, atol=1e-4)


@few
@given(illustrated, st.sampled_from((None, 0.5, 4.0)), st.sampled_from((1.0, 3.0)))
def test_a_shift_for_drawing_takes_the_place_of_the_runs_own(parts, shift, own):
    ours = engine(diffusion=DiffusionConfig(prediction="velocity", t_shift=own))
    asked = generation(ours, steps=5, t_shift=shift)
    ours.generate([Request(tuple(parts), 1, generation=asked)])
    by = DiffusionConfig(t_shift=own if shift is None else shift)
    expected = SamplingSchedule(5, by, None, torch.Generator()).times()[:-1].float()
    torch.testing.assert_close(torch.stack([call.t[0][0] for call in draws(ours)]), expected, rtol=0, atol=0)


# Among others, and cut short

WAYS = [
    dict(zip("guidance_scale image_guidance_scale guidance_interval guidance_rescale".split(), values, strict=True))
    for values in (
        (2.0, 1.5, (0.0, 1.0), 0.0), (1.0, 1.0, (0.0, 1.0), 0.5), (3.0, 1.0, (0.3, 0.7), 0.5),
        (1.0, 2.0, (0.5, 1.0), 1.0), (2.0, 4.0, (0.0, 0.0), 0.0),
    )
]  # fmt: skip
requests_ = st.tuples(illustrated, st.none() | st.integers(1, 2), st.sampled_from(SIZES), seeds, st.sampled_from(WAYS))


def request_of(ours: Engine, made) -> Request:
    parts, num, size, seed, changes = made
    return Request(tuple(parts), num, seed, generation(ours, **changes), size)


@some
@given(st.lists(requests_, min_size=2, max_size=4))
def test_a_request_among_others_is_guided_as_it_is_alone(chosen):
    together = engine(draw_now_and_then)
    found = together.generate([request_of(together, made) for made in chosen])
    for made, answers in zip(chosen, found, strict=True):
        alone = engine(draw_now_and_then)
        same_answers(answers, alone.generate([request_of(alone, made)])[0])
    settled(together)


@few
@given(st.lists(requests_, min_size=1, max_size=4))
def test_all_branches_of_one_shape_go_through_one_forward_pass(chosen):
    ours = engine(draw_now_and_then)
    for size in SIZES:  # bos and boi of each are read
        ours.generate([Request((), 1, size=size, generation=generation(ours, steps=1))])
    for made in chosen:
        ours.submit(request_of(ours, made))
    while ours.sequences:
        ours.model.calls.clear()
        ours.step()
        assert max(Counter(call.kind for call in ours.model.calls).values()) == 1
        assert all(len(set(call.slots)) == len(call.slots) for call in ours.model.calls)


@some
@given(st.lists(requests_, min_size=1, max_size=3), st.integers(0, 12))
def test_no_slot_is_lost_wherever_a_request_is_cancelled(chosen, steps):
    ours = engine(draw_now_and_then)
    numbers = [ours.submit(request_of(ours, made)) for made in chosen]
    for _ in range(steps):
        ours.step()
    for number in numbers:
        ours.cancel(number)
        held = [slot for row in ours.sequences for slot in row.slots] + list(ours.uncond_slots.values())
        assert sorted(ours.cache.free + held) == list(range(len(ours.cache.lengths)))
    settled(ours)


def test_forks_that_are_cancelled_while_they_draw_give_three_slots_back_each():
    """The test above must not pass because nothing is under way when it cancels."""
    ours = engine()
    asked = generation(ours, guidance_scale=2.0, image_guidance_scale=1.5)
    number = ours.submit(Request(("a", picture(SHAPES[0], 0)), 3, generation=asked))
    ours.step()
    before = len(ours.cache.free)
    ours.cancel(number)
    assert len(ours.cache.free) == before + 9
    settled(ours)


# Numbers that cannot be meant


@pytest.mark.parametrize(("changes", "words"), [
    ({"guidance_interval": (0.5,)}, "guidance_interval must be two numbers .* not 0.5"),
    ({"guidance_interval": (0.1, 0.2, 0.3)}, "guidance_interval must be two numbers"),
    ({"guidance_interval": (0.6, 0.4)}, "smaller one first, not 0.6 0.4"),
    ({"guidance_interval": (-0.1, 0.4)}, "between 0 and 1"), ({"guidance_interval": (0.1, 1.4)}, "between 0 and 1"),
    ({"guidance_interval": (float("nan"), 0.4)}, "between 0 and 1"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must lie between 0 and 1, not 1.5"),
    ({"guidance_rescale": -0.5}, "guidance_rescale"), ({"guidance_rescale": float("nan")}, "guidance_rescale"),
    ({"image_guidance_scale": float("inf")}, "image_guidance_scale must be a finite number, not inf"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, not nan"),
    ({"t_shift": 0.0}, "t_shift must be a number above 0, not 0.0"), ({"t_shift": float("inf")}, "t_shift"),
])  # fmt: skip
def test_what_no_guidance_can_be_is_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as raised:
        GenerationConfig(**changes)
    assert len(str(raised.value).splitlines()) == 1


@few
@given(st.sampled_from(WAYS), st.none() | st.floats(0.1, 10))
def test_guidance_survives_the_way_to_disk_and_back(changes, shift):
    config = GenerationConfig(**changes, t_shift=shift)
    assert from_json(GenerationConfig, to_json(config)) == config
    old = {"sampler": "ddim", "steps": 50, "guidance_scale": 2.0}  # written before there was anything else
    assert from_json(GenerationConfig, old).guidance_interval == (0.0, 1.0)
