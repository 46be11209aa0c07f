"""The engine: cached equals uncached, batched equals single, one forward pass per phase and step, limits."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as Picture
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers import decoders as decoding

from tests.documents import CHANNELS, SHAPES
from tests.profile import THOROUGH, examples
from tests.tiny import (
    SIZES,
    Latents,
    build_engine,
    picture,
    prompt_segments,
    run_sampler,
    start_sampler,
    tokenizer,
    uncached,
)
from transfusion.codecs.text import Tokenizer
from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.inference import cache as cache_module
from transfusion.inference import image_mode, text_mode
from transfusion.inference.answer import Answer
from transfusion.inference.cache import Cache
from transfusion.inference.engine import Draw, Engine, FinishEvent, ImageEvent, PreviewEvent, Request, TokenEvent
from transfusion.inference.samplers import SamplingSchedule
from transfusion.model.mask import Mask, cached_mask
from transfusion.model.transformer import rotary_positions
from transfusion.seeding import derive_seed
from transfusion.sequence import Document, Image, Row, Sides, Text, collate, encode_document

few = examples(12, quick=5)
some = examples(25, quick=10)

seeds = st.integers(0, 2**31)
pictures = st.builds(picture, st.sampled_from(SHAPES), seeds)
words = st.text("ab é<>", max_size=6)
prompts = st.lists(words | pictures, min_size=1, max_size=4)
MODEL_OPTIONS = [
    {},
    {"kv_heads": 2, "qk_norm": True},
    {"image_attention": "causal"},
    {"kv_heads": 1, "post_norm": True, "tie_word_embeddings": True, "image_rope": "2d"},
    {"untied": "full", "image_init": "fresh", "qk_norm": True, "tie_word_embeddings": True},
    *([{"untied": "feed_forward", "image_init": "fresh"}] if THOROUGH else []),
]


def generation(engine: Engine, **changes) -> GenerationConfig:
    return replace(engine.run.generation, **changes)


def run_to_end(engine: Engine) -> list:
    """All events until every request is finished."""
    events = []
    while engine.sequences:
        events += engine.step()
    return events


def draw_now_and_then(vocabulary) -> dict[int, float]:
    """Logit biases: about every fourth token is a boi, and eos is rare."""
    return {token: 4.0 for token in vocabulary.boi.values()} | {vocabulary.eos: -1.0}


def never_end(vocabulary) -> dict[int, float]:
    """Logit biases: no eos, many images."""
    return {vocabulary.eos: -1e4} | {token: 3.0 for token in vocabulary.boi.values()}


def assert_same_answers(answers, expected_answers) -> None:
    """Equal texts and reasons; images within 1e-4."""
    for answer, expected in zip(answers, expected_answers, strict=True):
        assert answer.reason == expected.reason
        for part, expected_part in zip(answer.parts, expected.parts, strict=True):
            if isinstance(expected_part, str):
                assert part == expected_part
            else:
                np.testing.assert_allclose(part, expected_part, rtol=0, atol=1e-4)


def assert_no_slot_is_lost(engine: Engine) -> None:
    """No sequence is left, and every slot is free."""
    assert not engine.sequences
    assert sorted(engine.cache.free) == list(range(len(engine.cache.lengths)))


# Cached equals uncached


@pytest.mark.parametrize("model_options", MODEL_OPTIONS)
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.data())
def test_prefill_in_chunks_equals_one_prefill(model_options, prompt_list, data):
    """Sequences of different lengths, each split at its own positions, never inside an image."""
    engine = build_engine(**model_options)
    chunks, logits = [], []
    for parts in prompt_list:
        chunk = encode_document(Document(prompt_segments(parts)), engine.vocabulary, add_eos=False)
        image_positions = {
            p.start + n for p in chunk.images for n in range(1, engine.vocabulary.num_patches(p.image.shape))
        }
        break_positions = [n for n in range(1, len(chunk)) if n not in image_positions]
        cuts = sorted(data.draw(st.sets(st.sampled_from(break_positions), max_size=4))) if break_positions else []
        chunks.append([chunk.part(*ends) for ends in zip([0, *cuts], [*cuts, len(chunk)], strict=True)])
        logits.append(uncached(engine, prompt_segments(parts))[0])
    slots = [engine.cache.acquire() for _ in chunks]
    for turn in range(max(map(len, chunks))):
        rows = [n for n, parts in enumerate(chunks) if turn < len(parts)]
        new_logits = text_mode.extend_cache(
            engine.model, engine.cache, [slots[n] for n in rows], [chunks[n][turn] for n in rows], engine.vocabulary
        )
        for n, last_logits in zip(rows, new_logits, strict=True):
            last = engine.cache.lengths[slots[n]] - 1
            assert last == sum(map(len, chunks[n][: turn + 1])) - 1
            torch.testing.assert_close(last_logits, logits[n][last], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_options", MODEL_OPTIONS)
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.sampled_from(SHAPES), st.data())
def test_prediction_after_a_cached_prefix_equals_the_uncached_one(model_options, prompt_list, shape, data):
    engine = build_engine(**model_options)
    slots, x_t, times, expected = [], [], [], []
    for parts in prompt_list:
        slots.append(engine.cache.acquire())
        segments = prompt_segments(parts)
        prefix = encode_document(Document(segments), engine.vocabulary, add_eos=False)
        prefix = prefix.append(engine.vocabulary.boi[shape])
        text_mode.extend_cache(engine.model, engine.cache, slots[-1:], [prefix], engine.vocabulary)
        x_t.append(torch.from_numpy(Latents().encode(picture(shape, data.draw(seeds)))))
        times.append(data.draw(st.floats(0, 1)))
        expected.append(uncached(engine, [*segments, Image(x_t[-1].numpy())], times[-1])[1])
    lengths = list(engine.cache.lengths)
    for _ in range(2):  # a denoising step changes nothing in the cache
        predictions = image_mode.predict(engine.model, engine.cache, slots, torch.stack(x_t), torch.tensor(times))
        torch.testing.assert_close(predictions, torch.stack(expected), rtol=0, atol=1e-5)
    assert engine.cache.lengths == lengths


def check_against_uncached(engine: Engine, parts, events) -> None:
    """Compare all predictions for one sequence with uncached forward passes."""
    vocabulary, segments, tokens = engine.vocabulary, list(prompt_segments(parts)), []
    history = [list(segments)]  # the document at the start of each image
    for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        elif isinstance(event, ImageEvent):
            segments += [Text(tuple(tokens)), Image(event.pixels.transpose(2, 0, 1).copy())]
            history[-1].append(Text(tuple(tokens)))
            history.append(list(segments))
            tokens = []
    chunk = encode_document(Document((*segments, Text(tuple(tokens)))), vocabulary, add_eos=False)
    batch = collate([Row((chunk,))], len(chunk), vocabulary)
    positions = rotary_positions(batch.position_ids, batch.grid_offsets, engine.run.model)[0]
    logits = uncached(engine, [*segments, Text(tuple(tokens))])[0]
    text_calls = [
        call for call in engine.model.calls if call.kind in ("prefill", "decode") and not call.is_uncond_prefix(vocabulary)
    ]
    # Every token and marker was written to the cache once, in order; also sampled bois, and eois (B3, B5).
    assert torch.cat([call.tokens[0] for call in text_calls]).tolist() == chunk.tokens.tolist()
    assert torch.cat([call.positions[0] for call in text_calls]).tolist() == positions.tolist()
    for call in text_calls:
        torch.testing.assert_close(call.prediction.logits[0], logits[call.num_keys - 1], rtol=0, atol=1e-5)
    draw_calls = iter([call for call in engine.model.calls if call.kind.startswith("draw")])
    for before in history[:-1]:
        for _ in range(engine.run.generation.steps):
            call = next(draw_calls)
            for row, prefix in enumerate((before, [])):  # with the prompt, and without: only bos boi (B7)
                image = Image(call.x_t[0][row].numpy())
                prediction = uncached(engine, [*prefix, image], call.t[0][row].item())[1]
                torch.testing.assert_close(call.prediction.images[0][row], prediction, rtol=0, atol=1e-5)
    assert next(draw_calls, None) is None


@pytest.mark.parametrize("model_options", MODEL_OPTIONS)
@few
@given(prompts, seeds)
def test_predictions_while_generating_equal_uncached_ones(model_options, parts, seed):
    engine = build_engine(draw_now_and_then, **model_options)
    engine.submit(Request(tuple(parts), seed=seed))
    check_against_uncached(engine, parts, run_to_end(engine))


def test_free_generation_draws_and_continues_with_text():
    """The test above is only valid if sequences have images, and text after them."""
    engine = build_engine(draw_now_and_then)
    answers = [a for (a,) in engine.generate([Request(("a",), seed=seed) for seed in range(30)])]
    texts_after_images = [
        part for a in answers for before, part in zip(a.parts, a.parts[1:], strict=False)
        if isinstance(part, str) and not isinstance(before, str)
    ]  # fmt: skip
    shapes = Counter(part.shape[:2] for a in answers for part in a.parts if not isinstance(part, str))
    assert len(texts_after_images) > 10
    assert set(shapes) == set(SHAPES)


@some
@given(prompts, st.sampled_from(SIZES), st.sampled_from((1.0, 0.0, 2.5)), st.booleans(), seeds)
def test_image_equals_the_sampler_with_guided_uncached_predictions(parts, size, scale, clipped, seed):
    engine = build_engine()
    options = generation(engine, guidance_scale=scale, clip_x0=clipped)
    engine.submit(Request(tuple(parts), num_images=1, size=size, seed=seed, generation=options))
    (event,) = [event for event in run_to_end(engine) if isinstance(event, ImageEvent)]
    segments = prompt_segments(parts)
    first = next(call for call in engine.model.calls if call.kind.startswith("draw"))
    latent_range = engine.latent_range if clipped else None
    schedule = SamplingSchedule(options.steps, engine.run.diffusion)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        image = Image(x_t[0].numpy())
        cond, uncond = (uncached(engine, [*prefix, image], t.item())[1] for prefix in (segments, ()))
        return (uncond + scale * (cond - uncond))[None]

    x0, _ = run_sampler(start_sampler(options.sampler, first.x_t[0][:1], schedule, latent_range), predict)
    expected = x0[0].numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(event.pixels, expected, rtol=0, atol=1e-4)
    assert event.pixels.shape[1::-1] == size


@few
@given(st.lists(st.tuples(prompts, pictures).map(lambda spec: [*spec[0], spec[1]]), min_size=1, max_size=3))
def test_greedy_captions_are_reproducible_bit_by_bit(prompt_list):
    """Images of a prompt are always clean, t = 0 (B4)."""
    engine = build_engine(lambda v: dict.fromkeys(v.boi.values(), -1e4))
    requests = [Request(tuple(parts), generation=generation(engine, temperature=0.0)) for parts in prompt_list]
    results = []
    for _ in range(2):
        engine.model.calls.clear()
        answers = engine.generate(requests)
        results.append(([a.parts for (a,) in answers], [call.prediction.logits for call in engine.model.calls]))
    (first, logits), (second, logits_again) = results
    assert first == second
    assert all(torch.equal(*pair) for pair in zip(logits, logits_again, strict=True))


# Batch equals single

OPTIONS = [
    dict(zip("steps sampler guidance_scale max_tokens temperature top_p".split(), values, strict=True))
    for values in (
        (1, "ddim", 1.0, 9, 1.0, 1.0), (2, "ddpm", 2.0, 4, 0.0, 1.0), (3, "ddim", 2.0, 9, 1.0, 0.8),
        (4, "ddpm", 1.0, 1, 0.7, 0.5), (3, "dpm", 3.0, 9, 1.0, 1.0),
    )
]  # fmt: skip
requests_ = st.tuples(
    prompts, st.none() | st.integers(1, 3), st.sampled_from(SIZES), seeds, st.sampled_from(OPTIONS)
)


def request_of(engine: Engine, spec) -> Request:
    parts, num, size, seed, changes = spec
    return Request(tuple(parts), num, seed, generation(engine, **changes), size if num else None)


@some
@given(st.lists(requests_, min_size=2, max_size=4))
def test_batched_requests_equal_single_requests(specs):
    together = build_engine(draw_now_and_then)
    batched = together.generate([request_of(together, spec) for spec in specs])
    for spec, answers in zip(specs, batched, strict=True):
        alone = build_engine(draw_now_and_then)
        (expected,) = alone.generate([request_of(alone, spec)])
        assert_same_answers(answers, expected)
        assert len(answers) == (spec[1] or 1)
    assert_no_slot_is_lost(together)


@few
@given(st.lists(st.tuples(requests_, st.integers(0, 5)), min_size=2, max_size=4))
def test_later_requests_change_nothing(timed):
    """Requests are submitted some steps apart, so that sequences prefill, decode and draw in the same step."""
    engine, events, specs = build_engine(draw_now_and_then), [], [spec for spec, _ in timed]
    for spec, steps in timed:
        engine.submit(request_of(engine, spec))
        for _ in range(steps):
            events += engine.step()
    events += run_to_end(engine)
    for request_id, spec in enumerate(specs, 1):
        alone = build_engine(draw_now_and_then)
        alone.submit(request_of(alone, spec))
        expected = run_to_end(alone)
        for sample_index in range(spec[1] or 1):
            batched = [e for e in events if (e.request_id, e.sample_index) == (request_id, sample_index)]
            single = [e for e in expected if e.sample_index == sample_index]
            assert [type(e) for e in batched] == [type(e) for e in single]
            for event, expected_event in zip(batched, single, strict=True):
                match event:
                    case TokenEvent():
                        assert (event.token, event.text) == (expected_event.token, expected_event.text)
                    case ImageEvent():
                        np.testing.assert_allclose(event.pixels, expected_event.pixels, rtol=0, atol=1e-4)
                    case FinishEvent():
                        assert event.reason == expected_event.reason


@few
@given(st.lists(st.lists(pictures, min_size=1, max_size=1), min_size=2, max_size=4), seeds)
def test_old_cache_entries_change_nothing(prompt_list, seed):
    """Entries after a slot's length are never used."""
    new, used = build_engine(draw_now_and_then), build_engine(draw_now_and_then)
    for slot in [used.cache.acquire() for _ in range(8)]:
        used.cache.release(slot)
    used.cache.view([0], 150)
    for store in (used.cache.keys, used.cache.values):
        store.normal_(0, 100, generator=torch.Generator().manual_seed(seed))
    requests = [Request(tuple(parts), seed=seed) for parts in prompt_list]
    for answers, expected in zip(used.generate(requests), new.generate(requests), strict=True):
        assert_same_answers(answers, expected)


def test_on_step_is_called_after_each_step_with_the_answers_it_finished():
    engine, steps, finished = build_engine(draw_now_and_then), [], []
    step = engine.step
    engine.step, engine.on_step = lambda: steps.append(step()) or steps[-1], finished.append
    engine.generate([Request(("a",), 2), Request(("b",)), Request((), 1, size=SIZES[-1])])
    assert finished == [sum(isinstance(event, FinishEvent) for event in events) for events in steps]
    assert sum(finished) == 4 and len({*finished}) > 1


# Forward passes


def warm_up(engine: Engine) -> Engine:
    """Draw one image of each size: bos and boi of a size are read once, for its first image."""
    engine.generate([Request((), 1, size=size, generation=generation(engine, steps=1)) for size in SIZES])
    engine.model.calls.clear()
    return engine


@some
@given(st.lists(requests_, min_size=1, max_size=4))
def test_one_forward_pass_per_phase_and_step(specs):
    engine = warm_up(build_engine(draw_now_and_then))
    for spec in specs:
        engine.submit(request_of(engine, spec))
    while engine.sequences:
        reading = [sequence for sequence in engine.sequences if not isinstance(sequence.phase, Draw)]
        events = engine.step()
        calls = {call.kind: call for call in engine.model.calls}
        assert len(calls) == len(engine.model.calls)
        engine.model.calls.clear()
        num_slots = {call.kind: len(call.slots) for call in calls.values()}
        assert num_slots.pop("decode", 0) + num_slots.pop("prefill", 0) == len(reading)
        finished = [e for e in events if isinstance(e, ImageEvent)]
        drawing = [(s.request_id, s.phase.image.shape) for s in engine.sequences if isinstance(s.phase, Draw)]
        drawing += [(event.request_id, event.pixels.shape[:2]) for event in finished]
        branches = Counter()
        for request_id, shape in drawing:
            guided = specs[request_id - engine.num_requests + len(specs) - 1][4]["guidance_scale"] != 1
            branches[f"draw {shape}"] += 1 + guided
        assert num_slots == branches
        for call in calls.values():
            assert len(set(call.slots)) == len(call.slots)
            if call.kind.startswith("draw"):  # only the patches of the image
                y, x = call.x_t[0].shape[2:]
                assert call.tokens.numel() == len(call.slots) * y * x // 4


@few
@given(prompts, st.integers(1, 3), st.sampled_from((1.0, 3.0)))
def test_prompt_is_read_once_for_any_number_of_samples(parts, num, scale):
    engine = warm_up(build_engine())
    engine.generate([Request(tuple(parts), num, generation=generation(engine, guidance_scale=scale))])
    prompt = encode_document(Document(prompt_segments(parts)), engine.vocabulary, add_eos=False)
    reads = [call.tokens.shape for call in engine.model.calls if not call.kind.startswith("draw")]
    assert reads == [(1, len(prompt) + 1)]
    draws = [call for call in engine.model.calls if call.kind.startswith("draw")]
    assert len(draws) == engine.run.generation.steps
    assert {call.tokens.shape for call in draws} == {(num * (1 if scale == 1 else 2), 4)}


@few
@given(prompts, st.sampled_from(SIZES))
def test_without_guidance_there_is_one_branch(parts, size):
    assume(any(len(part) for part in parts))
    engine = build_engine(draw_now_and_then)
    options = generation(engine, guidance_scale=1.0)
    engine.generate([
        Request(tuple(parts), 1, size=size, generation=options), Request(tuple(parts), generation=options)
    ])  # fmt: skip
    assert not engine.uncond_prefixes
    assert all(len(call.slots) <= 2 for call in engine.model.calls)
    assert not any(call.tokens.tolist() == [[engine.vocabulary.bos, b]] for call in engine.model.calls
                   for b in engine.vocabulary.boi.values())  # fmt: skip


@few
@given(st.lists(requests_, min_size=1, max_size=3), st.sampled_from((0, 2, 100)))
def test_attention_without_a_mask_equals_masked_attention(specs, max_runs):
    """For rows of equal lengths, of several lengths, and for slots that are not adjacent."""
    engine, masked = build_engine(draw_now_and_then, kv_heads=2), build_engine(draw_now_and_then, kv_heads=2)
    answers = []
    for each, limit in ((engine, max_runs), (masked, -1)):
        held = [each.cache.acquire() for _ in range(4)]
        for slot in held[::2]:  # gaps between the slots of the requests
            each.cache.release(slot)
        with mock.patch.object(cache_module, "MAX_RUNS", limit):
            answers.append(each.generate([request_of(each, spec) for spec in specs]))
    for request_answers, expected in zip(*answers, strict=True):
        assert_same_answers(request_answers, expected)


@pytest.mark.parametrize("requests", [[Request(("a b",), 16)], [Request((word,), 1) for word in "abcdefgh"]])
def test_images_of_prompts_with_equal_lengths_are_drawn_without_a_mask_from_adjacent_slots(requests):
    """Also with guidance, whose second branches are shorter, and in a new engine, which has read no bos and boi yet."""
    engine, masked = build_engine(), build_engine()
    with mock.patch.object(image_mode, "cached_mask", side_effect=AssertionError):
        answers = engine.generate(requests)
    with mock.patch.object(cache_module, "MAX_RUNS", -1):
        expected = masked.generate(requests)
    for pair in zip(answers, expected, strict=True):
        assert_same_answers(*pair)
    num_images = sum(request.num_images for request in requests)
    for call in engine.model.calls:
        if call.kind.startswith("draw"):
            assert call.slots == list(range(2 * num_images))


def test_causal_images_and_prompts_need_a_mask():
    """The test above is only valid if masks are created elsewhere."""
    engine = build_engine(image_attention="causal")
    with mock.patch.object(image_mode, "cached_mask", side_effect=AssertionError("created")):
        with pytest.raises(RuntimeError, match="created"):
            engine.generate([Request(("a",), 1)])
    with mock.patch.object(text_mode, "cached_mask", side_effect=AssertionError("created")):
        with pytest.raises(RuntimeError, match="created"):
            engine.generate([Request(("a",), 1)])


@pytest.mark.parametrize("autocast", [False, True])
def test_mask_is_cast_once_and_not_in_every_layer(autocast):
    engine = build_engine()
    model = engine.model.model if autocast else engine.model.model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        view = engine.cache.view([engine.cache.acquire(), engine.cache.acquire()], 3)
        mask, zeros = cached_mask(view.lengths, 3), torch.zeros(2, 3, dtype=torch.int64)
        biases, attend = set(), Mask.attend

        def record(mask, q, k, v):
            assert mask.attn_bias.dtype == q.dtype == torch.bfloat16
            biases.add(mask.attn_bias.data_ptr())
            return attend(mask, q, k, v)

        with mock.patch.object(Mask, "attend", record), torch.no_grad():
            sides = Sides(torch.arange(6), torch.arange(0))
            model.forward_cached(zeros, view.position_ids, mask, view, zeros.new_zeros(0), [], [], [], sides)
    assert len(biases) == 1


# Seeds


@few
@given(prompts, st.integers(0, 1000), st.integers(0, 1000))
def test_equal_seeds_draw_equal_images_and_others_differ(parts, seed, other_seed):
    assume(seed != other_seed)
    engine = build_engine()
    first, second, others = (
        engine.generate([Request(tuple(parts), 2, seed=s)])[0] for s in (seed, seed, other_seed)
    )
    assert_same_answers(first, second)
    images = [answer.parts[0] for answer in (*first, *others)]
    for n, image in enumerate(images):  # two samples of two seeds: four images
        assert all(np.abs(image - before).max() > 1e-2 for before in images[:n])


def test_texts_depend_on_the_seed():
    engine = build_engine(lambda v: {v.eos: -1e4} | dict.fromkeys(v.boi.values(), -1e4))
    options = generation(engine, max_tokens=12)
    answers = engine.generate([Request(("a",), seed=seed, generation=options) for seed in (0, 0, 1, 2)])
    texts = [answer.parts for (answer,) in answers]
    assert texts[0] == texts[1]
    assert len({str(parts) for parts in texts}) == 3


def test_every_token_has_its_own_seed():
    engine, used, sample_tokens = build_engine(lambda v: {v.eos: -1e4}), [], text_mode.sample_tokens

    def record(logits, generations, seeds, allowed):
        used.extend(seeds)
        return sample_tokens(logits, generations, seeds, allowed)

    with mock.patch.object(text_mode, "sample_tokens", record):
        engine.generate([Request(("a",), seed=seed) for seed in range(3)])
    assert len(set(used)) == len(used) > 30


@few
@given(seeds)
def test_images_of_one_sequence_have_different_noise(seed):
    """Also images of one size."""
    engine = build_engine(lambda v: {v.boi[SHAPES[0]]: 1e4}, context=60)
    engine.submit(Request(("a",), seed=seed))
    run_to_end(engine)
    draws = [call for call in engine.model.calls if call.kind.startswith("draw")]
    starts = [call.x_t[0][0] for call in draws if call.t[0][0] == 1]
    assert len(starts) > 3
    assert all(not torch.equal(first, second) for n, first in enumerate(starts) for second in starts[:n])


def first_noise(parts, seed: int = 7, **build_options) -> np.ndarray:
    """The noise that the first image of this prompt begins with."""
    engine = build_engine(**build_options)
    engine.submit(Request(parts, 1, seed=seed))
    engine.step()
    return next(call for call in engine.model.calls if call.kind.startswith("draw")).x_t[0][0].numpy()


def test_pictures_of_the_prompt_are_part_of_the_seed():
    """A drawing and its edit with one seed do not begin with the same noise."""
    one, other = picture((4, 4), 0), picture((4, 4), 1)
    prompts_ = ["a", ("a", one), ("a", other), (one, other), (other, one), (one, one)]
    noise = [first_noise(parts) for parts in prompts_]
    assert len({values.tobytes() for values in noise}) == len(noise)
    changed = one.copy()
    changed[3, 3, 2] ^= 1
    assert not np.array_equal(first_noise(("a", changed)), noise[1])
    assert np.array_equal(first_noise((Picture.fromarray(one), "another text")), noise[1])


@few
@given(st.lists(words, min_size=1, max_size=3), seeds)
def test_noise_of_a_prompt_without_pictures_depends_on_the_seed_only(parts, seed):
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "image", 0))
    assert np.array_equal(first_noise(parts, seed), torch.randn((1, CHANNELS, *SHAPES[0]), generator=generator)[0])


# Ends and limits


@few
@given(prompts, st.integers(1, 4), st.sampled_from(SIZES), st.integers(1, 3))
def test_image_request_gives_num_images_of_its_size(parts, num, size, max_tokens):
    engine = build_engine()
    options = generation(engine, max_tokens=max_tokens)
    (answers,) = engine.generate([Request(tuple(parts), num, size=size, generation=options)])
    assert [answer.reason for answer in answers] == ["image"] * num
    assert [[part.shape[1::-1] for part in answer.parts] for answer in answers] == [[size]] * num


def test_images_of_several_sizes_in_one_batch_have_their_requested_size():
    """The decoded size is the requested one, for any other sizes in the same batch (B1, B2)."""
    engine = build_engine()
    answers = engine.generate([Request(("a",), 2, size=size) for size in (*SIZES, None)])
    sizes = [{answer.parts[0].shape[1::-1] for answer in request_answers} for request_answers in answers]
    assert sizes == [{size} for size in (*SIZES, SIZES[0])]


@few
@given(prompts, seeds, st.sampled_from((-1e4, 0.0, 8.0)))
def test_free_generation_ends_with_eos_or_at_max_tokens(parts, seed, eos_bias):
    engine = build_engine(lambda v: {v.eos: eos_bias})
    engine.submit(Request(tuple(parts), seed=seed))
    events = run_to_end(engine)
    assert [isinstance(event, FinishEvent) for event in events] == [False] * (len(events) - 1) + [True]
    num_tokens = sum(isinstance(event, TokenEvent | ImageEvent) for event in events)
    assert (events[-1].reason == "length") == (num_tokens == 12) or events[-1].reason == "eos"
    assert eos_bias == 0 or events[-1].reason == ("length" if eos_bias < 0 else "eos") or num_tokens == 12


def test_request_without_allow_images_gives_only_text():
    """Even with a strong bias for boi, and together with a request that allows images."""
    engine = build_engine(lambda v: {v.eos: -1e4} | dict.fromkeys(v.boi.values(), 1e3))
    requests = [Request(("a house",), seed=3, allow_images=allow_images) for allow_images in (True, False)]
    (with_images,), (text_only,) = engine.generate(requests)
    assert all(isinstance(part, np.ndarray) for part in with_images.parts)
    assert text_only.reason == "length" and [type(part) for part in text_only.parts] == [str]
    assert_same_answers([text_only], engine.generate(requests[1:])[0])


@few
@given(prompts, seeds, st.sampled_from((0.0, 0.5, 1.0)), st.sampled_from((0.01, 0.9, 1.0)))
def test_markers_padding_and_unused_ids_are_never_sampled(parts, seed, temperature, top_p):
    """Even with a strong bias for them (B12)."""
    engine = build_engine(lambda v: dict.fromkeys([v.bos, v.pad, v.eoi, *range(v.num_used, v.size)], 1e4))
    allowed = {*range(engine.vocabulary.num_text_tokens)}
    options = generation(engine, temperature=temperature, top_p=top_p)
    engine.submit(Request(tuple(parts), seed=seed, generation=options))
    written = [event.token for event in run_to_end(engine) if isinstance(event, TokenEvent)]
    assert set(written) <= allowed
    read = {call.tokens.item() for call in engine.model.calls if call.kind == "decode" and call.positions.item()}
    assert read <= allowed | set(engine.vocabulary.boi.values())


@some
@given(prompts, st.integers(1, 9), st.integers(0, 40), st.booleans(), seeds)
def test_max_tokens_and_context_are_never_exceeded(parts, max_tokens, free_positions, with_images, seed):
    prompt = encode_document(Document(prompt_segments(parts)), build_engine().vocabulary, add_eos=False)
    engine = build_engine(never_end if with_images else None, context=len(prompt) + free_positions)
    engine.submit(Request(tuple(parts), seed=seed, generation=generation(engine, max_tokens=max_tokens)))
    events = run_to_end(engine)
    assert sum(isinstance(event, TokenEvent | ImageEvent) for event in events) <= max_tokens
    for call in engine.model.calls:
        assert call.positions.max() < engine.max_positions
        assert call.num_keys <= engine.max_positions
    if with_images:
        assert events[-1].reason == "length"


@few
@given(prompts, st.sampled_from(SIZES))
def test_prompt_and_image_may_fill_the_context_exactly(parts, size):
    any_engine = build_engine()
    shape = size[::-1]
    prompt = encode_document(Document(prompt_segments(parts)), any_engine.vocabulary, add_eos=False)
    needed = len(prompt) + 1 + any_engine.vocabulary.num_patches(shape)
    exact = build_engine(context=needed)
    (answers,) = exact.generate([Request(tuple(parts), 2, size=size)])
    assert [answer.reason for answer in answers] == ["image", "image"]
    assert max(call.num_keys for call in exact.model.calls) == needed
    too_small = build_engine(context=needed - 1)
    with pytest.raises(ValueError, match=f"{needed} positions.*{needed - 1}"):
        too_small.submit(Request(tuple(parts), 2, size=size))
    assert_no_slot_is_lost(too_small)


# Cancelling

actions = st.lists(
    st.tuples(st.just("submit"), requests_)
    | st.tuples(st.just("cancel"), st.integers(1, 6))
    | st.just(("step", None)),
    max_size=14,
)


@some
@given(actions, requests_)
def test_cancel_frees_slots_and_does_not_change_later_answers(actions_, last):
    engine = build_engine(draw_now_and_then)
    cancelled = set()
    for action, value in actions_:
        match action:
            case "submit":
                engine.submit(request_of(engine, value))
            case "cancel":
                engine.cancel(value)
                cancelled |= {value} if value <= engine.num_requests else set()
            case "step":
                assert not {event.request_id for event in engine.step()} & cancelled
    for request_id in range(engine.num_requests + 1):
        engine.cancel(request_id)
    assert_no_slot_is_lost(engine)
    assert engine.step() == []
    alone = build_engine(draw_now_and_then)
    (expected,) = alone.generate([request_of(alone, last)])
    (answers,) = engine.generate([request_of(engine, last)])
    assert_same_answers(answers, expected)
    assert_no_slot_is_lost(engine)


def test_slots_are_reused():
    engine = build_engine()
    for seed in range(30):
        engine.generate([Request(("a",), 2, seed=seed)])
    assert len(engine.cache.lengths) <= 8  # the first allocation


@some
@given(st.lists(st.booleans(), max_size=40))
def test_slot_has_one_owner(acquires):
    cache, used = Cache(build_engine().run.model, torch.device("cpu")), []
    for is_acquire in acquires:
        if is_acquire:
            slot = cache.acquire()
            assert slot not in used
            assert cache.lengths[slot] == 0
            used.append(slot)
            cache.commit(slot, 3)
        elif used:
            cache.release(used.pop(0))


def test_generate_is_refused_while_other_requests_are_under_way():
    """Their events would be lost."""
    engine = build_engine()
    engine.submit(Request(("a",)))
    with pytest.raises(ValueError, match="under way"):
        engine.generate([Request(("b",), 1)])
    run_to_end(engine)
    (answers,) = engine.generate([Request(("b",), 1)])
    assert answers[0].reason == "image"


# Events


@few
@given(prompts, seeds)
def test_events_equal_the_answer(parts, seed):
    engine, answer = build_engine(draw_now_and_then), Answer()
    engine.submit(Request(tuple(parts), seed=seed))
    ((expected,),) = build_engine(draw_now_and_then).generate([Request(tuple(parts), seed=seed)])
    tokens, texts = [], []
    for event in run_to_end(engine):
        answer.add(event)
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        elif isinstance(event, ImageEvent | FinishEvent):
            texts += [tokenizer().decode(tokens)] if tokens else []
            tokens = []
    assert_same_answers([answer], [expected])
    assert [part for part in answer.parts if isinstance(part, str)] == texts


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
@few
@given(st.integers(1, 6), st.integers(0, 4))
def test_previews_come_at_their_interval_and_change_nothing(sampler, steps, every):
    """After completed steps only: heun calls the model twice per step."""
    rectified_flow = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity")
    engine = build_engine(diffusion=rectified_flow)
    options = generation(engine, steps=steps, sampler=sampler)
    engine.submit(Request(("a",), 1, seed=1, generation=options, preview_every=every))
    events = run_to_end(engine)
    previews = [event for event in events if isinstance(event, PreviewEvent)]
    assert [event.step for event in previews] == [n for n in range(1, steps + 1) if every and n % every == 0]
    (image,) = [event for event in events if isinstance(event, ImageEvent)]
    (answer,) = build_engine(diffusion=rectified_flow).generate([Request(("a",), 1, seed=1, generation=options)])[0]
    assert np.array_equal(image.pixels, answer.parts[0])
    calls = [call for call in engine.model.calls if call.kind.startswith("draw")]
    first_calls = calls[:: 2 if sampler == "heun" else 1]  # of every step
    assert len(first_calls) == steps
    for event in previews[: -1 if previews and previews[-1].step == steps else None]:  # x_t of the next step
        np.testing.assert_array_equal(event.x_t.transpose(2, 0, 1), first_calls[event.step].x_t[0][0])
    if previews and previews[-1].step == steps:
        np.testing.assert_array_equal(previews[-1].x_t, image.pixels)
        np.testing.assert_allclose(previews[-1].x0.clip(-3, 3), image.pixels, rtol=0, atol=1e-5)


# Inputs


def byte_tokenizer(added: bool) -> Tokenizer:
    """A byte tokenizer; with `added`, it also has special tokens and a normal added token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer_ = Library(models.BPE(vocab={character: n for n, character in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer_.decoder = decoding.ByteLevel()
    if added:
        tokenizer_.add_special_tokens(["<s>", "</s>", "<pad>", "<|image|>"])
        tokenizer_.add_tokens([AddedToken("<x>", special=False)])
    return Tokenizer.from_json(tokenizer_.to_str())


@some
@given(st.lists(st.sampled_from(("<s>", "</s>", "<pad>", "<|image|>", "<x>", " ", "a", "é")), max_size=6))
def test_text_that_contains_special_tokens_is_plain_text(strings):
    text, ids = "".join(strings), {}
    for special in (True, False):
        engine = build_engine(text=byte_tokenizer(special))
        engine.submit(Request((text,), generation=generation(engine, max_tokens=1)))
        engine.step()
        ids[special] = engine.model.calls[0].tokens[0].tolist()[1:]
        assert engine.opened.tokenizer.decode(ids[special]) == text
    assert ids[True] == ids[False]
    assert all(token < 256 for token in ids[True])


@few
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(("RGB", "L", "RGBA", "P")))
def test_pictures_of_any_size_and_mode_are_resized_to_a_supported_size(width, height, mode):
    engine = build_engine()
    engine.submit(Request((Picture.new(mode, (width, height)),), generation=generation(engine, max_tokens=1)))
    engine.step()
    assert tuple(engine.model.calls[0].x_t[0].shape[2:]) in SHAPES


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "the request is empty"),
        (Request(("a",), 1, size=(5, 7)), "cannot draw 5x7; it can draw 4x4, 6x2, 2x2"),
        (Request((picture((3, 3), 0),)), "is not supported; the run supports 4x4, 6x2, 2x2"),
        (Request((picture((4, 4), 0)[..., 0],)), "is not supported; the run supports"),
        (Request((picture((4, 4), 0)[..., :1],)), "is not supported; the run supports"),
        (Request(("a" * 201,)), "202 positions.*200"),
        (Request(("a" * 195,), 1), "201 positions.*200"),
        (Request((picture((4, 4), 0),) * 34), "205 positions.*200"),
        (Request(("a",), generation=GenerationConfig(sampler="euler")), "euler"),
        (Request(("a",), generation=GenerationConfig(sampler="heun")), "heun"),
    ],
)
def test_invalid_requests_are_refused_at_once(request_, message):
    engine = build_engine()
    with pytest.raises(ValueError, match=message) as raised:
        engine.submit(request_)
    assert len(str(raised.value).splitlines()) == 1
    assert_no_slot_is_lost(engine)
    assert engine.step() == []
    assert not engine.model.calls


@few
@given(prompts, st.integers(1, 2), st.sampled_from(("euler", "heun", "dpm")))
def test_rectified_flow_samplers_draw(parts, num, sampler):
    engine = build_engine(diffusion=DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity"))
    options = generation(engine, sampler=sampler)
    (answers,) = engine.generate([Request(tuple(parts), num, generation=options)])
    assert all(np.isfinite(answer.parts[0]).all() for answer in answers)
    assert len(answers) == num
