"""The engine: cached equals uncached, batch equals single, one forward pass per kind and step, limits."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as Picture
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers import decoders as decoding

from tests.documents import SHAPES
from tests.profile import examples
from tests.tiny import SIZES, engine, picture, prompt_segments, tokenizer, uncached
from transfusion.codecs.text import Tokenizer
from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.inference import image_mode, text_mode
from transfusion.inference.cache import Cache
from transfusion.inference.engine import Draw, Engine, FinishEvent, ImageEvent, PreviewEvent, Request, TokenEvent
from transfusion.inference.samplers import SamplingSchedule, get_sampler
from transfusion.sequence import Document, Image, Text, encode_document

few = examples(12, quick=5)
some = examples(25, quick=10)

seeds = st.integers(0, 2**31)
pictures = st.builds(picture, st.sampled_from(SHAPES), seeds)
words = st.text("ab é<>", max_size=6)
prompts = st.lists(words | pictures, min_size=1, max_size=4)
NETWORKS = [
    {},
    {"kv_heads": 2, "qk_norm": True},
    {"image_attention": "causal"},
    {"kv_heads": 1, "post_norm": True, "tie_word_embeddings": True},
]


def generation(engine: Engine, **changes) -> GenerationConfig:
    return replace(engine.run.generation, **changes)


def to_the_end(engine: Engine) -> list:
    """All events of what was submitted."""
    events = []
    while engine.sequences:
        events += engine.step()
    return events


def draw_now_and_then(vocabulary) -> dict[int, float]:
    """Makes about every fourth token a boi, and eos rare."""
    return {token: 4.0 for token in vocabulary.boi.values()} | {vocabulary.eos: -1.0}


def never_end(vocabulary) -> dict[int, float]:
    return {vocabulary.eos: -1e4} | {token: 3.0 for token in vocabulary.boi.values()}


def same_answers(found, expected) -> None:
    """The same tokens; images within 1e-4; the same ends."""
    for one, other in zip(found, expected, strict=True):
        assert one.reason == other.reason
        for part, wanted in zip(one.parts, other.parts, strict=True):
            if isinstance(wanted, str):
                assert part == wanted
            else:
                np.testing.assert_allclose(part, wanted, rtol=0, atol=1e-4)


def settled(engine: Engine) -> None:
    """No row is left, and every slot is free again, once, but those that hold bos and boi."""
    assert not engine.sequences
    held = list(engine.uncond_slots.values())
    assert sorted(engine.cache.free + held) == list(range(len(engine.cache.lengths)))


# Cached equals uncached


@pytest.mark.parametrize("network", NETWORKS)
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.data())
def test_reading_in_pieces_is_reading_at_once(network, chosen, data):
    """Rows of different lengths, each cut at its own places; inside an image there is no place to cut."""
    ours = engine(**network)
    chunks, logits = [], []
    for parts in chosen:
        chunk = encode_document(Document(prompt_segments(parts)), ours.vocabulary, ends=False)
        inside = {
            p.start + n for p in chunk.images for n in range(1, ours.vocabulary.patches(p.image.shape))
        }
        places = [n for n in range(1, len(chunk)) if n not in inside]
        cuts = sorted(data.draw(st.sets(st.sampled_from(places), max_size=4))) if places else []
        chunks.append([chunk.part(*ends) for ends in zip([0, *cuts], [*cuts, len(chunk)], strict=True)])
        logits.append(uncached(ours, prompt_segments(parts))[0])
    slots = [ours.cache.acquire() for _ in chunks]
    for turn in range(max(map(len, chunks))):
        rows = [n for n, parts in enumerate(chunks) if turn < len(parts)]
        found = text_mode.prefill(
            ours.model, ours.cache, [slots[n] for n in rows], [chunks[n][turn] for n in rows], ours.vocabulary
        )
        for n, after in zip(rows, found, strict=True):
            place = ours.cache.lengths[slots[n]] - 1
            assert place == sum(map(len, chunks[n][: turn + 1])) - 1
            torch.testing.assert_close(after, logits[n][place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.sampled_from(SHAPES), st.data())
def test_an_image_behind_its_cached_prefix_is_one_in_the_whole_sequence(network, chosen, shape, data):
    ours = engine(**network)
    slots, noisy, times, expected = [], [], [], []
    for parts in chosen:
        slots.append(ours.cache.acquire())
        segments = prompt_segments(parts)
        prefix = encode_document(Document(segments), ours.vocabulary, ends=False)
        prefix = prefix.append(ours.vocabulary.boi[shape])
        text_mode.prefill(ours.model, ours.cache, slots[-1:], [prefix], ours.vocabulary)
        noisy.append(torch.from_numpy(picture(shape, data.draw(seeds)).transpose(2, 0, 1).copy()))
        times.append(data.draw(st.floats(0, 1)))
        expected.append(uncached(ours, [*segments, Image(noisy[-1].numpy())], times[-1])[1])
    lengths = list(ours.cache.lengths)
    for _ in range(2):  # a denoising step leaves no trace in the cache
        said = image_mode.predict(ours.model, ours.cache, slots, torch.stack(noisy), torch.tensor(times))
        torch.testing.assert_close(said, torch.stack(expected), rtol=0, atol=1e-5)
    assert ours.cache.lengths == lengths


def check_against_uncached(ours: Engine, parts, events) -> None:
    """Everything that the model said while one row ran, against forward passes over what was there."""
    vocabulary, segments, written = ours.vocabulary, list(prompt_segments(parts)), []
    history = [list(segments)]  # the document as it stood when each image was begun
    for event in events:
        if isinstance(event, TokenEvent):
            written.append(event.token)
        elif isinstance(event, ImageEvent):
            segments += [Text(tuple(written)), Image(event.pixels.transpose(2, 0, 1).copy())]
            history[-1].append(Text(tuple(written)))
            history.append(list(segments))
            written = []
    whole = encode_document(Document((*segments, Text(tuple(written)))), vocabulary, ends=False)
    logits = uncached(ours, [*segments, Text(tuple(written))])[0]
    free = [call for call in ours.model.calls if call.slots[0] in ours.uncond_slots.values()]
    texts = [call for call in ours.model.calls if call.kind in ("read", "write") and call not in free]
    # Every token and marker went into the cache once, in its place; also sampled bois and eois (B3, B5).
    assert torch.cat([call.tokens[0] for call in texts]).tolist() == whole.tokens.tolist()
    assert torch.cat([call.position[0] for call in texts]).tolist() == list(range(len(whole)))
    for call in texts:
        torch.testing.assert_close(call.said.logits[0], logits[call.position[0, -1]], rtol=0, atol=1e-5)
    steps = iter([call for call in ours.model.calls if call.kind.startswith("draw")])
    for before in history[:-1]:
        for _ in range(ours.run.generation.steps):
            call = next(steps)
            for row, prefix in enumerate((before, [])):  # with the prompt, and without: exactly bos boi (B7)
                noisy = Image(call.noisy[0][row].numpy())
                said = uncached(ours, [*prefix, noisy], call.t[0][row].item())[1]
                torch.testing.assert_close(call.said.images[0][row], said, rtol=0, atol=1e-5)
    assert next(steps, None) is None


@pytest.mark.parametrize("network", NETWORKS)
@few
@given(prompts, seeds)
def test_all_that_a_free_run_computes_is_what_one_forward_pass_says(network, parts, seed):
    ours = engine(draw_now_and_then, **network)
    ours.submit(Request(tuple(parts), seed=seed))
    check_against_uncached(ours, parts, to_the_end(ours))


def test_free_runs_draw_and_write_on():
    """The test above must not pass because nothing is drawn, or nothing written after."""
    ours = engine(draw_now_and_then)
    answers = [a for (a,) in ours.generate([Request(("a",), seed=seed) for seed in range(30)])]
    after = [
        part for a in answers for before, part in zip(a.parts, a.parts[1:], strict=False)
        if isinstance(part, str) and not isinstance(before, str)
    ]  # fmt: skip
    shapes = Counter(part.shape[:2] for a in answers for part in a.parts if not isinstance(part, str))
    assert len(after) > 10
    assert set(shapes) == set(SHAPES)


@some
@given(prompts, st.sampled_from(SIZES), st.sampled_from((1.0, 0.0, 2.5)), st.booleans(), seeds)
def test_a_drawing_is_the_sampler_driven_by_guided_uncached_predictions(parts, size, scale, clipped, seed):
    ours = engine()
    asked = generation(ours, guidance_scale=scale, clip_x0=clipped)
    ours.submit(Request(tuple(parts), num_images=1, size=size, seed=seed, generation=asked))
    (drawn,) = [event for event in to_the_end(ours) if isinstance(event, ImageEvent)]
    segments = prompt_segments(parts)
    first = next(call for call in ours.model.calls if call.kind.startswith("draw"))
    walk = SamplingSchedule(asked.steps, ours.run.diffusion, ours.bound if clipped else None, torch.Generator())
    sampler = get_sampler(asked.sampler, ours.run.diffusion.noise_schedule)(first.noisy[0][:1], walk)
    noisy, t = next(sampler)
    while True:
        image = Image(noisy[0].numpy())
        given = uncached(ours, [*segments, image], t.item())[1]
        without = uncached(ours, [image], t.item())[1]
        try:
            noisy, t = sampler.send((without + scale * (given - without))[None])
        except StopIteration as finished:
            expected = finished.value[0].numpy().transpose(1, 2, 0)
            break
    np.testing.assert_allclose(drawn.pixels, expected, rtol=0, atol=1e-4)
    assert drawn.pixels.shape[1::-1] == size


@few
@given(st.lists(st.tuples(prompts, pictures).map(lambda made: [*made[0], made[1]]), min_size=1, max_size=3))
def test_greedy_captions_are_the_same_every_time_to_the_last_bit(chosen):
    """Images of a prompt are clean, t = 0, each time (B4)."""
    ours = engine(lambda v: dict.fromkeys(v.boi.values(), -1e4))
    requests = [Request(tuple(parts), generation=generation(ours, temperature=0.0)) for parts in chosen]
    said = []
    for _ in range(2):
        ours.model.calls.clear()
        answers = ours.generate(requests)
        said.append(([a.parts for (a,) in answers], [call.said.logits for call in ours.model.calls]))
    (first, logits), (second, again) = said
    assert first == second
    assert all(torch.equal(*pair) for pair in zip(logits, again, strict=True))


# Batch equals single

WAYS = [
    dict(zip("steps sampler guidance_scale max_tokens temperature top_p".split(), values, strict=True))
    for values in (
        (1, "ddim", 1.0, 9, 1.0, 1.0), (2, "ddpm", 2.0, 4, 0.0, 1.0), (3, "ddim", 2.0, 9, 1.0, 0.8),
        (4, "ddpm", 1.0, 1, 0.7, 0.5), (3, "dpm", 3.0, 9, 1.0, 1.0),
    )
]  # fmt: skip
requests_ = st.tuples(
    prompts, st.none() | st.integers(1, 3), st.sampled_from(SIZES), seeds, st.sampled_from(WAYS)
)


def request_of(engine: Engine, made) -> Request:
    parts, num, size, seed, changes = made
    return Request(tuple(parts), num, seed, generation(engine, **changes), size)


@some
@given(st.lists(requests_, min_size=2, max_size=4))
def test_a_request_among_others_gets_what_it_gets_alone(chosen):
    together = engine(draw_now_and_then)
    found = together.generate([request_of(together, made) for made in chosen])
    for made, answers in zip(chosen, found, strict=True):
        alone = engine(draw_now_and_then)
        (expected,) = alone.generate([request_of(alone, made)])
        same_answers(answers, expected)
        assert len(answers) == (made[1] or 1)
    settled(together)


@few
@given(st.lists(st.tuples(requests_, st.integers(0, 5)), min_size=2, max_size=4))
def test_requests_that_come_later_change_nothing(timed):
    """Each is submitted some steps after the one before, so that rows read, write and draw in one step."""
    ours, events, chosen = engine(draw_now_and_then), [], [made for made, _ in timed]
    for made, steps in timed:
        ours.submit(request_of(ours, made))
        for _ in range(steps):
            events += ours.step()
    events += to_the_end(ours)
    for number, made in enumerate(chosen, 1):
        alone = engine(draw_now_and_then)
        alone.submit(request_of(alone, made))
        expected = to_the_end(alone)
        for draw in range(made[1] or 1):
            mine = [e for e in events if (e.request, e.sample_index) == (number, draw)]
            theirs = [e for e in expected if e.sample_index == draw]
            assert [type(e) for e in mine] == [type(e) for e in theirs]
            for one, other in zip(mine, theirs, strict=True):
                match one:
                    case TokenEvent():
                        assert (one.token, one.text) == (other.token, other.text)
                    case ImageEvent():
                        np.testing.assert_allclose(one.pixels, other.pixels, rtol=0, atol=1e-4)
                    case FinishEvent():
                        assert one.reason == other.reason


@few
@given(st.lists(st.lists(pictures, min_size=1, max_size=1), min_size=2, max_size=4), seeds)
def test_a_cache_full_of_rubbish_changes_nothing(chosen, seed):
    """What lies behind a slot's length is never seen, whoever left it there."""
    clean, dirty = engine(draw_now_and_then), engine(draw_now_and_then)
    for slot in [dirty.cache.acquire() for _ in range(8)]:
        dirty.cache.release(slot)
    dirty.cache.view([0], 150)
    for store in (dirty.cache.keys, dirty.cache.values):
        store.normal_(0, 100, generator=torch.Generator().manual_seed(seed))
    requests = [Request(tuple(parts), seed=seed) for parts in chosen]
    for found, expected in zip(dirty.generate(requests), clean.generate(requests), strict=True):
        same_answers(found, expected)


# What is computed


def warm(ours: Engine) -> Engine:
    """bos and boi of a size are read once in an engine's life, when the first drawing of that size begins."""
    ours.generate([Request((), 1, size=size, generation=generation(ours, steps=1)) for size in SIZES])
    ours.model.calls.clear()
    return ours


@some
@given(st.lists(requests_, min_size=1, max_size=4))
def test_one_forward_pass_per_kind_and_step_and_none_for_rows_that_wait(chosen):
    ours = warm(engine(draw_now_and_then))
    for made in chosen:
        ours.submit(request_of(ours, made))
    while ours.sequences:
        reading = [row for row in ours.sequences if not isinstance(row.phase, Draw)]
        events = ours.step()
        calls = {call.kind: call for call in ours.model.calls}
        assert len(calls) == len(ours.model.calls)
        ours.model.calls.clear()
        own = {call.kind: len(call.slots) for call in calls.values()}
        assert own.pop("write", 0) + own.pop("read", 0) == len(reading)
        finished = [e for e in events if isinstance(e, ImageEvent)]
        drawn = [(row.request_number, row.phase.image.shape) for row in ours.sequences if isinstance(row.phase, Draw)]
        drawn += [(event.request, event.pixels.shape[:2]) for event in finished]
        branches = Counter()
        for number, shape in drawn:
            guided = chosen[number - ours.num_requests + len(chosen) - 1][4]["guidance_scale"] != 1
            branches[f"draw {shape}"] += 1 + guided
        assert own == branches
        for call in calls.values():
            assert len(set(call.slots)) == len(call.slots)
            if call.kind.startswith("draw"):  # an image's own patches, and nothing of what is before them
                y, x = call.noisy[0].shape[2:]
                assert call.tokens.numel() == len(call.slots) * y * x // 4


@few
@given(prompts, st.integers(1, 3), st.sampled_from((1.0, 3.0)))
def test_a_prompt_is_read_once_however_many_are_drawn_from_it(parts, num, scale):
    ours = warm(engine())
    ours.generate([Request(tuple(parts), num, generation=generation(ours, guidance_scale=scale))])
    prompt = encode_document(Document(prompt_segments(parts)), ours.vocabulary, ends=False)
    reads = [call.tokens.shape for call in ours.model.calls if not call.kind.startswith("draw")]
    assert reads == [(1, len(prompt) + 1)]
    draws = [call for call in ours.model.calls if call.kind.startswith("draw")]
    assert len(draws) == ours.run.generation.steps
    assert {call.tokens.shape for call in draws} == {(num * (1 if scale == 1 else 2), 4)}


@few
@given(prompts, st.sampled_from(SIZES))
def test_without_guidance_there_is_no_second_branch(parts, size):
    assume(any(len(part) for part in parts))
    ours = engine(draw_now_and_then)
    asked = generation(ours, guidance_scale=1.0)
    ours.generate([
        Request(tuple(parts), 1, size=size, generation=asked), Request(tuple(parts), generation=asked)
    ])  # fmt: skip
    assert not ours.uncond_slots
    assert all(len(call.slots) <= 2 for call in ours.model.calls)
    assert not any(call.tokens.tolist() == [[ours.vocabulary.bos, b]] for call in ours.model.calls
                   for b in ours.vocabulary.boi.values())  # fmt: skip


# Chance


@few
@given(prompts, st.integers(0, 1000), st.integers(0, 1000))
def test_the_same_seed_draws_the_same_and_another_another(parts, seed, other):
    assume(seed != other)
    ours = engine()
    one, same, another = (
        ours.generate([Request(tuple(parts), 2, seed=s)])[0] for s in (seed, seed, other)
    )
    same_answers(one, same)
    images = [answer.parts[0] for answer in (*one, *another)]
    for n, image in enumerate(images):  # two draws of two seeds: four images
        assert all(np.abs(image - before).max() > 1e-2 for before in images[:n])


def test_rows_of_one_request_and_requests_of_another_seed_write_differently():
    ours = engine(lambda v: {v.eos: -1e4} | dict.fromkeys(v.boi.values(), -1e4))
    asked = generation(ours, max_tokens=12)
    answers = ours.generate([Request(("a",), seed=seed, generation=asked) for seed in (0, 0, 1, 2)])
    texts = [answer.parts for (answer,) in answers]
    assert texts[0] == texts[1]
    assert len({str(parts) for parts in texts}) == 3


@few
@given(seeds)
def test_the_images_of_one_free_run_differ(seed):
    """Each of them has noise of its own, also where they are of one size."""
    ours = engine(lambda v: {v.boi[SHAPES[0]]: 1e4}, context=60)
    ours.submit(Request(("a",), seed=seed))
    to_the_end(ours)
    draws = [call for call in ours.model.calls if call.kind.startswith("draw")]
    starts = [call.noisy[0][0] for call in draws if call.t[0][0] == 1]
    assert len(starts) > 3
    assert all(not torch.equal(one, two) for n, one in enumerate(starts) for two in starts[:n])


# Ends and limits


@few
@given(prompts, st.integers(1, 4), st.sampled_from(SIZES), st.integers(1, 3))
def test_a_request_for_images_gives_so_many_of_that_size(parts, num, size, max_tokens):
    ours = engine()
    asked = generation(ours, max_tokens=max_tokens)
    (answers,) = ours.generate([Request(tuple(parts), num, size=size, generation=asked)])
    assert [answer.reason for answer in answers] == ["image"] * num
    assert [[part.shape[1::-1] for part in answer.parts] for answer in answers] == [[size]] * num


def test_two_sizes_in_one_run_are_each_drawn_at_their_own_latent_shape():
    """The decoded size is the one asked for, whichever others are drawn beside it (B1, B2)."""
    ours = engine()
    answers = ours.generate([Request(("a",), 2, size=size) for size in (*SIZES, None)])
    found = [{answer.parts[0].shape[1::-1] for answer in row} for row in answers]
    assert found == [{size} for size in (*SIZES, SIZES[0])]


@few
@given(prompts, seeds, st.sampled_from((-1e4, 0.0, 8.0)))
def test_a_free_run_ends_with_eos_or_at_its_limit(parts, seed, liking):
    ours = engine(lambda v: {v.eos: liking})
    ours.submit(Request(tuple(parts), seed=seed))
    events = to_the_end(ours)
    assert [isinstance(event, FinishEvent) for event in events] == [False] * (len(events) - 1) + [True]
    written = sum(isinstance(event, TokenEvent | ImageEvent) for event in events)
    assert (events[-1].reason == "length") == (written == 12) or events[-1].reason == "eos"
    assert liking == 0 or events[-1].reason == ("length" if liking < 0 else "eos") or written == 12


def test_a_request_that_may_not_draw_only_writes():
    """Even with a model that wants nothing else, and beside one that may."""
    ours = engine(lambda v: {v.eos: -1e4} | dict.fromkeys(v.boi.values(), 1e3))
    requests = [Request(("a house",), seed=3, allow_images=may) for may in (True, False)]
    (free,), (text,) = ours.generate(requests)
    assert all(isinstance(part, np.ndarray) for part in free.parts)
    assert text.reason == "length" and [type(part) for part in text.parts] == [str]
    same_answers([text], ours.generate(requests[1:])[0])


@few
@given(prompts, seeds, st.sampled_from((0.0, 0.5, 1.0)), st.sampled_from((0.01, 0.9, 1.0)))
def test_markers_padding_and_unused_ids_are_never_written(parts, seed, temperature, top_p):
    """Even by a model that wants nothing else (B12)."""
    ours = engine(lambda v: dict.fromkeys([v.bos, v.pad, v.eoi, *range(v.num_used, v.size)], 1e4))
    allowed = {*range(ours.vocabulary.num_text_tokens)}
    asked = generation(ours, temperature=temperature, top_p=top_p)
    ours.submit(Request(tuple(parts), seed=seed, generation=asked))
    written = [event.token for event in to_the_end(ours) if isinstance(event, TokenEvent)]
    assert set(written) <= allowed
    read = {call.tokens.item() for call in ours.model.calls if call.kind == "write" and call.position.item()}
    assert read <= allowed | set(ours.vocabulary.boi.values())


@some
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6), st.sets(st.integers(0, 5), min_size=1),
    st.just(0.0) | st.floats(0.1, 3), st.floats(0.01, 1), seeds,
)  # fmt: skip
def test_a_token_is_chosen_among_the_likeliest_that_are_allowed(logits, allowed, temperature, top_p, seed):
    values = torch.tensor(logits)
    may = torch.tensor([n in allowed for n in range(6)])
    config = GenerationConfig(temperature=temperature, top_p=top_p)
    token = text_mode.sample_token(values, may, config, torch.Generator().manual_seed(seed))
    assert token in allowed
    if temperature == 0:
        assert logits[token] == max(logits[n] for n in allowed)
        return
    weights = {n: np.exp((values[n].item() - max(logits)) / temperature) for n in allowed}
    likelier = sum(w for w in weights.values() if w > weights[token] * 1.0001)  # float32 may see a tie there
    assert likelier / sum(weights.values()) < top_p + 1e-4  # they alone do not reach top_p


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    config = GenerationConfig(temperature=temperature)
    values, may = torch.tensor([3.0, -20.0, 5.0, 30.0]), torch.tensor([True, True, True, False])
    assert text_mode.sample_token(values, may, config, torch.Generator()) == 2


@some
@given(prompts, st.integers(1, 9), st.integers(0, 40), st.booleans(), seeds)
def test_max_tokens_and_context_are_never_passed_images_included(parts, max_tokens, room, drawing, seed):
    prompt = encode_document(Document(prompt_segments(parts)), engine().vocabulary, ends=False)
    ours = engine(never_end if drawing else None, context=len(prompt) + room)
    ours.submit(Request(tuple(parts), seed=seed, generation=generation(ours, max_tokens=max_tokens)))
    events = to_the_end(ours)
    assert sum(isinstance(event, TokenEvent | ImageEvent) for event in events) <= max_tokens
    for call in ours.model.calls:
        assert call.position.max() < ours.context
        assert call.mask_keys <= ours.context
    if drawing:
        assert events[-1].reason == "length"


@few
@given(prompts, st.sampled_from(SIZES))
def test_the_context_holds_a_prompt_and_its_image_exactly_or_refuses(parts, size):
    measure = engine()
    shape = size[::-1]
    prompt = encode_document(Document(prompt_segments(parts)), measure.vocabulary, ends=False)
    needed = len(prompt) + 1 + measure.vocabulary.patches(shape)
    exact = engine(context=needed)
    (answers,) = exact.generate([Request(tuple(parts), 2, size=size)])
    assert [answer.reason for answer in answers] == ["image", "image"]
    assert max(call.mask_keys for call in exact.model.calls) == needed
    tight = engine(context=needed - 1)
    with pytest.raises(ValueError, match=f"{needed} positions.*{needed - 1}"):
        tight.submit(Request(tuple(parts), 2, size=size))
    settled(tight)


# Cancelling

actions = st.lists(
    st.tuples(st.just("submit"), requests_)
    | st.tuples(st.just("cancel"), st.integers(1, 6))
    | st.just(("step", None)),
    max_size=14,
)


@some
@given(actions, requests_)
def test_cancelling_frees_slots_and_later_requests_get_the_right_answer(done, last):
    ours = engine(draw_now_and_then)
    cancelled = set()
    for what, value in done:
        match what:
            case "submit":
                ours.submit(request_of(ours, value))
            case "cancel":
                ours.cancel(value)
                cancelled |= {value} if value <= ours.num_requests else set()
            case "step":
                assert not {event.request for event in ours.step()} & cancelled
    for number in range(ours.num_requests + 1):
        ours.cancel(number)
    settled(ours)
    assert ours.step() == []
    alone = engine(draw_now_and_then)
    (expected,) = alone.generate([request_of(alone, last)])
    (found,) = ours.generate([request_of(ours, last)])
    same_answers(found, expected)
    settled(ours)


def test_slots_are_used_again():
    ours = engine()
    for seed in range(30):
        ours.generate([Request(("a",), 2, seed=seed)])
    assert len(ours.cache.lengths) <= 8  # the first lot that is ever made


@some
@given(st.lists(st.booleans(), max_size=40))
def test_a_slot_has_one_owner(wanted):
    ours, held = Cache(engine().run.model, torch.device("cpu")), []
    for more in wanted:
        if more:
            slot = ours.acquire()
            assert slot not in held
            assert ours.lengths[slot] == 0
            held.append(slot)
            ours.commit(slot, 3)
        elif held:
            ours.release(held.pop(0))


def test_generate_is_refused_while_others_are_under_way():
    """Their events would be lost in it."""
    ours = engine()
    ours.submit(Request(("a",)))
    with pytest.raises(ValueError, match="under way"):
        ours.generate([Request(("b",), 1)])
    to_the_end(ours)
    (answers,) = ours.generate([Request(("b",), 1)])
    assert answers[0].reason == "image"


# Events


@few
@given(prompts, seeds)
def test_what_events_show_is_what_the_answer_says(parts, seed):
    """Letters are shown once they are whole: together they are the text, but for a letter that never was."""
    ours = engine(draw_now_and_then)
    ours.submit(Request(tuple(parts), seed=seed))
    (answer,) = engine(draw_now_and_then).generate([Request(tuple(parts), seed=seed)])[0]
    shown, tokens, found = "", [], []
    for event in to_the_end(ours):
        if isinstance(event, TokenEvent):
            shown += event.text
            tokens.append(event.token)
        if isinstance(event, ImageEvent | FinishEvent):
            text = tokenizer().decode(tokens)
            assert text.startswith(shown)
            assert shown == text or text.endswith("\ufffd")
            found += [text] if text else []
            found += [event.pixels] if isinstance(event, ImageEvent) else []
            shown, tokens = "", []
    assert [p if isinstance(p, str) else p.tolist() for p in found] == [
        p if isinstance(p, str) else p.tolist() for p in answer.parts
    ]


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
@few
@given(st.integers(1, 6), st.integers(0, 4))
def test_previews_come_every_so_many_steps_and_change_nothing(sampler, steps, every):
    """Of whole steps: heun, which asks twice in each, shows nothing of what it only tries."""
    straight = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity")
    ours = engine(diffusion=straight)
    asked = generation(ours, steps=steps, sampler=sampler)
    ours.submit(Request(("a",), 1, seed=1, generation=asked, previews=every))
    events = to_the_end(ours)
    shown = [event for event in events if isinstance(event, PreviewEvent)]
    assert [event.step for event in shown] == [n for n in range(1, steps + 1) if every and n % every == 0]
    (drawn,) = [event for event in events if isinstance(event, ImageEvent)]
    (answer,) = engine(diffusion=straight).generate([Request(("a",), 1, seed=1, generation=asked)])[0]
    assert np.array_equal(drawn.pixels, answer.parts[0])
    draws = [call for call in ours.model.calls if call.kind.startswith("draw")]
    firsts = draws[:: 2 if sampler == "heun" else 1]  # of each step
    assert len(firsts) == steps
    for event in shown[: -1 if shown and shown[-1].step == steps else None]:  # what the next step begins with
        np.testing.assert_array_equal(event.x_t.transpose(2, 0, 1), firsts[event.step].noisy[0][0])
    if shown and shown[-1].step == steps:
        np.testing.assert_array_equal(shown[-1].x_t, drawn.pixels)
        np.testing.assert_allclose(shown[-1].x0.clip(-3, 3), drawn.pixels, rtol=0, atol=1e-5)


# What goes in


def spelling_tokenizer(spelt: bool) -> Tokenizer:
    """Bytes, and with `spelt` tokens that a text could spell, special ones and one that is not."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    found = Library(models.BPE(vocab={letter: n for n, letter in enumerate(sorted(letters))}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoding.ByteLevel()
    if spelt:
        found.add_special_tokens(["<s>", "</s>", "<pad>", "<|image|>"])
        found.add_tokens([AddedToken("<x>", special=False)])
    return Tokenizer.from_json(found.to_str())


@some
@given(st.lists(st.sampled_from(("<s>", "</s>", "<pad>", "<|image|>", "<x>", " ", "a", "é")), max_size=6))
def test_text_that_spells_special_tokens_is_plain_text(spelt):
    text, ids = "".join(spelt), {}
    for special in (True, False):
        ours = engine(text=spelling_tokenizer(special))
        ours.submit(Request((text,), generation=generation(ours, max_tokens=1)))
        ours.step()
        ids[special] = ours.model.calls[0].tokens[0].tolist()[1:]
        assert ours.opened.tokenizer.decode(ids[special]) == text
    assert ids[True] == ids[False]
    assert all(token < 256 for token in ids[True])


@few
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(("RGB", "L", "RGBA", "P")))
def test_a_picture_of_any_size_and_mode_goes_in_at_a_size_of_the_run(width, height, mode):
    ours = engine()
    ours.submit(Request((Picture.new(mode, (width, height)),), generation=generation(ours, max_tokens=1)))
    ours.step()
    assert tuple(ours.model.calls[0].noisy[0].shape[2:]) in SHAPES


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "the request is empty"),
        (Request(("a",), 0), "num_images must be at least 1, not 0"),
        (Request(("a",), -2), "num_images must be at least 1, not -2"),
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
def test_what_cannot_be_done_is_refused_at_once(request_, message):
    ours = engine()
    with pytest.raises(ValueError, match=message) as raised:
        ours.submit(request_)
    assert len(str(raised.value).splitlines()) == 1
    settled(ours)
    assert ours.step() == []
    assert not ours.model.calls


@few
@given(prompts, st.integers(1, 2), st.sampled_from(("euler", "heun", "dpm")))
def test_the_straight_path_and_its_samplers_draw_too(parts, num, sampler):
    ours = engine(diffusion=DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity"))
    asked = generation(ours, sampler=sampler)
    (answers,) = ours.generate([Request(tuple(parts), num, generation=asked)])
    assert all(np.isfinite(answer.parts[0]).all() for answer in answers)
    assert len(answers) == num
