"""Images as codes, the paper's baseline (Chameleon): layout, losses, sampling, guidance, commands."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import build
from tests.profile import examples
from tests.test_cli import command, fails
from tests.tiny import tokenizer
from transfusion.checkpoint.open import OpenedRun
from transfusion.config import DataConfig, DiffusionConfig, GenerationConfig, ModelConfig, Run
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.store import open_prepared
from transfusion.disk import read_json
from transfusion.inference import text_mode
from transfusion.inference.engine import Engine, ImageEvent, PreviewEvent, Request
from transfusion.objective import Losses, compute_losses, mean_losses, total_loss
from transfusion.sequence import NO_TARGET, Document, Image, Row, Text, Vocabulary, collate, encode_document

few = examples(12, quick=6)
CODES = 16
SHAPES = ((2, 3), (4, 4))
VOCABULARY = Vocabulary.build(tokenizer().size, SHAPES, patch_size=1, num_image_codes=CODES)

grids = st.sampled_from(SHAPES).flatmap(
    lambda shape: st.lists(st.integers(0, CODES - 1), min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda codes: np.array(codes).reshape(shape)
    )
)
words = st.text("ab é", min_size=1, max_size=6)
segments = st.lists(
    st.builds(lambda text, loss: Text(tokenizer().encode(text), loss), words, st.booleans())
    | st.builds(Image, grids, st.booleans()),
    min_size=1, max_size=5,
).map(tuple)  # fmt: skip


class IdentityCodec:
    """A codec whose pixels are the codes."""

    kind, downsampling, image_channels, codes = "vq", 1, 1, CODES

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[..., 0].astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes[..., None].astype(np.uint8)


def build_engine(seed: int = 0, context: int = 120, untied: str = "none", image_rope: str = "1d", **options) -> Engine:
    """An engine with random weights; qk_norm and post_norm make its logits differ clearly."""
    config = ModelConfig(width=32, layers=2, heads=4, intermediate_size=48, vocab_size=VOCABULARY.size,
                         text_vocab_size=VOCABULARY.text_size, untied=untied, image_init="fresh",
                         image_rope=image_rope, patches="codes", patch_size=1, qk_norm=True, post_norm=True)  # fmt: skip
    generation = GenerationConfig(**{"guidance_scale": 2.0, "max_tokens": 8, "temperature": 0.0} | options)
    run = Run("tiny", config, DiffusionConfig(), DataConfig(seq_len=context), generation=generation)
    model = build(config, seed, torch.float32).eval().requires_grad_(False)
    return Engine(OpenedRun("tiny", run, tokenizer(), IdentityCodec(), VOCABULARY, {}, model, 0, torch.device("cpu")))


def logits_after(engine: Engine, parts: tuple, tail: list[int]) -> torch.Tensor:
    """Logits (V,) after these segments and these tokens, in one forward pass without a cache."""
    chunk, columns, n = encode_document(Document(parts), VOCABULARY, add_eos=False), 0, 0
    for token in tail:
        if token < VOCABULARY.first_code:
            chunk, n = chunk.append(token), 0
            columns = VOCABULARY.shape_of(token)[1] if token in VOCABULARY.boi.values() else 0
        else:
            chunk, n = chunk.append(token, [n // columns - n, n % columns - n]), n + 1
    batch = collate([Row((chunk,))], len(chunk), VOCABULARY)
    batch = replace(batch, text_index=torch.tensor([len(chunk) - 1]))
    with torch.no_grad():
        return engine.model(batch, [], []).logits[0]


def sample_uncached(engine: Engine, parts: tuple, shape: tuple[int, int], scale: float, negative: tuple = ()) -> np.ndarray:
    """Greedy codes with guidance, each from two uncached passes: with the prompt, and with the negative prompt."""
    tail = [VOCABULARY.boi[shape]]
    for _ in range(math.prod(shape)):
        cond, uncond = logits_after(engine, parts, tail), logits_after(engine, negative, tail)
        guided = uncond + scale * (cond - uncond)
        tail.append(VOCABULARY.first_code + int(guided[VOCABULARY.first_code : VOCABULARY.num_used].argmax()))
    return np.array(tail[1:]).reshape(shape) - VOCABULARY.first_code


# Layout and losses


@given(segments)
def test_codes_replace_patches_and_have_text_loss(parts):
    chunk = encode_document(Document(parts), VOCABULARY)
    expected, loss_mask = [VOCABULARY.bos], []
    for part in parts:
        if isinstance(part, Text):
            expected, loss_mask = expected + list(part.tokens), loss_mask + [part.loss] * len(part.tokens)
        else:
            codes = [VOCABULARY.first_code + code for row in part.content for code in row]
            expected += [VOCABULARY.boi[part.shape], *codes, VOCABULARY.eoi]
            loss_mask += [part.loss] * (1 + len(codes)) + [False]  # eoi is appended, never predicted
    expected, loss_mask = [*expected, VOCABULARY.eos], [*loss_mask, parts[-1].loss]
    assert chunk.tokens.tolist() == expected
    targets = [token if has_loss else NO_TARGET for token, has_loss in zip(expected[1:], loss_mask, strict=True)]
    assert chunk.targets.tolist() == [*targets, NO_TARGET]
    assert not chunk.images  # nothing to denoise
    code_counts = np.array([part.content.size for part in parts if isinstance(part, Image)], int)
    break_positions = np.flatnonzero(chunk.can_break)
    image_positions = [n for n, token in enumerate(expected) if token >= VOCABULARY.first_code or token == VOCABULARY.eoi]
    assert not set(break_positions) & set(image_positions)
    assert code_counts.sum() + len(code_counts) == len(image_positions)


def test_ids_of_codes_follow_the_markers():
    assert VOCABULARY.first_code == max(VOCABULARY.boi.values()) + 1
    assert VOCABULARY.num_used == VOCABULARY.first_code + CODES <= VOCABULARY.size
    assert Vocabulary.from_json(VOCABULARY.to_json()) == VOCABULARY
    allowed = text_mode.allowed_tokens(VOCABULARY)
    assert not allowed[VOCABULARY.first_code : VOCABULARY.num_used].any()  # text mode samples no codes


@few
@given(st.lists(segments, min_size=1, max_size=3), st.integers(0, 99))
def test_loss_is_the_mean_over_all_tokens_and_logged_separately(documents, seed):
    engine = build_engine(seed)
    rows = [Row((encode_document(Document(parts), VOCABULARY),)) for parts in documents]
    batch = collate(rows, 120, VOCABULARY)
    losses = compute_losses(engine.model, batch, [], engine.run.diffusion)
    nll = -engine.model(batch, [], []).logits.log_softmax(-1)[torch.arange(batch.text_count), batch.text_target]  # (T,)
    is_code = batch.text_target >= VOCABULARY.first_code
    assert (losses.text_count, losses.image_count, losses.code_count) == (len(nll), 0, int(is_code.sum()))
    assert math.isclose(
        total_loss(losses, losses.text_count, 0, 5.0), nll.sum() / max(1, len(nll)), rel_tol=1e-5, abs_tol=1e-9
    )
    means = mean_losses(losses.sums.tolist(), (losses.text_count, 0, losses.code_count))
    for name, is_selected in (("text_loss", ~is_code), ("image_loss", is_code)):
        if is_selected.any():
            assert math.isclose(means[name], float(nll[is_selected].mean()), rel_tol=1e-4)


def test_mean_losses_of_latents():
    losses = Losses(torch.tensor(6.0), torch.tensor(1.0), torch.tensor(0.0), 3, 2, 0)
    assert mean_losses(losses.sums.tolist(), (3, 2, 0)) == {"text_loss": 2.0, "image_loss": 0.5}
    assert mean_losses([6.0, 0.0, 0.0], (3, 0, 0)) == {"text_loss": 2.0}


# Sampling


@few
@given(
    words, st.sampled_from(SHAPES), st.sampled_from([1.0, 2.0, 3.5]), st.sampled_from(("none", "feed_forward", "full")),
    st.sampled_from(("1d", "2d")), st.integers(0, 99),
)
def test_cached_sampling_equals_uncached_sampling(text, shape, scale, untied, image_rope, seed):
    engine = build_engine(seed, untied=untied, image_rope=image_rope, guidance_scale=scale)
    (answer,) = engine.generate([Request((text,), num_images=1, size=shape[::-1])])[0]
    expected = sample_uncached(engine, (Text(tokenizer().encode(text)),), shape, scale)
    assert np.array_equal(answer.parts[0][..., 0], expected)


@few
@given(st.lists(st.tuples(words, st.sampled_from(SHAPES)), min_size=2, max_size=4), st.integers(0, 99))
def test_batched_requests_equal_single_requests(specs, seed):
    requests = [
        Request((text,), num_images=2, size=shape[::-1], seed=n) for n, (text, shape) in enumerate(specs)
    ]
    engine = build_engine(3, temperature=1.0, top_p=0.9)
    batched = engine.generate(requests)
    for request, answers in zip(requests, batched, strict=True):
        (single,) = engine.generate([request])
        assert all(np.array_equal(a.parts[0], b.parts[0]) for a, b in zip(answers, single, strict=True))
    assert len(engine.cache.free) == len(engine.cache.lengths)  # no slot is lost


@few
@given(words, words, st.sampled_from(SHAPES), st.integers(0, 99))
def test_negative_prompt_takes_the_place_of_the_empty_prompt(text, negative, shape, seed):
    engine = build_engine(seed, guidance_scale=3.0)
    (answer,) = engine.generate([Request(text, num_images=1, size=shape[::-1], negative_prompt=negative)])[0]
    prompts = [(Text(tokenizer().encode(part)),) for part in (text, negative)]
    expected = sample_uncached(engine, prompts[0], shape, 3.0, prompts[1])
    assert np.array_equal(answer.parts[0][..., 0], expected)
    assert len(engine.cache.free) == len(engine.cache.lengths)


def test_pictures_of_the_prompt_are_part_of_the_seed():
    engine = build_engine()
    pictures = [np.full((4, 4, 1), code, np.uint8) for code in range(2)]
    for parts in ("a", ("a", pictures[0]), ("a", pictures[1]), ("b", pictures[0])):
        engine.submit(Request(parts, num_images=1))
    engine.step()
    seeds = [sequence.phase.image.seed for sequence in engine.sequences]
    assert seeds[1] == seeds[3]
    assert len(set(seeds[:3])) == 3


def test_every_code_has_its_own_seed():
    engine, used, sample_tokens = build_engine(temperature=1.0), [], text_mode.sample_tokens

    def record(logits, generations, seeds, allowed=None):
        used.extend(seeds)
        return sample_tokens(logits, generations, seeds, allowed)

    with mock.patch.object(text_mode, "sample_tokens", record):
        engine.generate([Request(("a",), num_images=2, size=(4, 4))])
    assert len(set(used)) == len(used) == 2 * 16


@pytest.mark.parametrize("image_rope", ["1d", "2d"])
def test_text_after_an_image_depends_on_it(image_rope):
    """Text after a drawn image equals text after the same image in a prompt."""
    engine = build_engine(1, temperature=0.0, image_rope=image_rope)
    boi = VOCABULARY.boi[SHAPES[0]]
    engine.allowed_tokens[:] = False
    engine.allowed_tokens[[boi, *range(97, 105)]] = True
    sample_tokens = text_mode.sample_tokens
    first_tokens = iter([[boi]])

    def sample_boi_first(logits, generations, seeds, allowed=None):
        is_text = allowed is not None
        return (next(first_tokens, None) if is_text else None) or sample_tokens(logits, generations, seeds, allowed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_mode, "sample_tokens", sample_boi_first)
        (answer,) = engine.generate([Request(("ab",))])[0]
    image = answer.parts[0]
    second_engine = build_engine(1, temperature=0.0, image_rope=image_rope, max_tokens=7)
    second_engine.allowed_tokens = engine.allowed_tokens
    (expected,) = second_engine.generate([Request(("ab", image))])[0]
    assert answer.parts[1] and answer.parts[1] == expected.parts[0]


def test_separate_scales_use_the_images_of_the_prompt():
    engine = build_engine(2, image_guidance_scale=1.5, guidance_scale=3.0)
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    (answer,) = engine.generate([Request(("a", pixels), num_images=1, size=(3, 2))])[0]
    tail, image = [VOCABULARY.boi[2, 3]], Image(pixels[..., 0].astype(np.int64))
    for _ in range(6):
        logits = [logits_after(engine, parts, tail) for parts in ((Text(tokenizer().encode("a")), image), (image,), ())]
        guided = logits[2] + 1.5 * (logits[1] - logits[2]) + 3.0 * (logits[0] - logits[1])
        tail.append(VOCABULARY.first_code + int(guided[VOCABULARY.first_code : VOCABULARY.num_used].argmax()))
    assert (answer.parts[0].ravel().astype(int) + VOCABULARY.first_code).tolist() == tail[1:]


def test_preview_shows_sampled_codes_and_grey():
    engine = build_engine()
    engine.submit(Request(("a",), num_images=1, size=(4, 4), preview_every=5))
    previews, pixels = [], None
    while engine.sequences:
        for event in engine.step():
            previews += [event] if isinstance(event, PreviewEvent) else []
            pixels = event.pixels if isinstance(event, ImageEvent) else pixels
    assert [event.step for event in previews] == [5, 10, 15]
    for event in previews:
        preview = event.x0.reshape(-1)
        assert (preview[event.step :] == 128).all()
        assert np.array_equal(preview[: event.step], pixels.reshape(-1)[: event.step])


# Commands


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VQ codec and prepared scenes, made by the commands."""
    folder = tmp_path_factory.mktemp("chameleon")
    command(
        "data", "fit-codec", "small", "shapes", "--shapes-size", "16", "--size", "16x16", "--max-images", "400",
        "--network.codes", str(CODES), "--network.width", "8", "--network.multipliers", "1", "1", "1",
        "--network.channels", "4", "--training.steps", "4", "--training.batch_size", "4", "--training.heldout", "4",
        "--out", str(folder / "codec"),
    )  # fmt: skip
    command("data", "prepare", "shapes", "--shapes-size", "16", "--sizes", "16x16", "--limit", "100", "--codec",
                   str(folder / "codec"), "--tokenizer-size", "300", "--out", str(folder / "data"))  # fmt: skip
    return folder


def train(folders, name: str, *options: str) -> list[str]:
    return [
        "train", "small", "--data", str(folders / "data"),
        "--model.width", "32", "--model.layers", "2", "--model.heads", "2", "--model.intermediate-size", "48",
        "--training.steps", "3", "--training.validate-every", "3", "--training.preview-every", "3",
        "--training.batch-size", "2", *options, "--out", str(folders / name),
    ]  # fmt: skip


def test_prepared_codes_equal_the_codecs(folders):
    prepared = open_prepared(folders / "data")
    source = prepared.source("shapes", "train")
    image = next(part for part in source[0].segments if isinstance(part, Image))
    assert image.is_codes
    assert image.content.shape == (4, 4)
    assert 0 <= image.content.min() <= image.content.max() < CODES
    scenes = Shapes(size=16)
    expected = [prepared.codec.encode(scenes[n].pair[1]) for n in range(100)]
    assert any(np.array_equal(image.content, codes) for codes in expected)
    assert len({codes.tobytes() for codes in expected}) > 1  # scenes have different codes


def test_commands_train_generate_evaluate_and_report(folders, capsys):
    command(*train(folders, "run", "--model.patches", "codes", "--model.patch-size", "1"))
    heldout = [line for line in (folders / "run" / "metrics.jsonl").read_text().splitlines() if "heldout" in line]
    assert "heldout_image_loss/" in heldout[-1]
    command("generate", str(folders / "run"), "a red disc", "--num-images", "2", "--out", str(folders / "out"))
    assert (folders / "out" / "001.png").exists()
    command("evaluate", str(folders / "run"))
    results = read_json(folders / "run" / "results.json")
    assert 0 <= results["shapes"]["drawings"]["everything"] <= 1
    assert results["shapes"]["conditioning"]["image_loss"] > 0
    command("report", str(folders / "run"))
    for words in (("generate", "--num-images", "1", "--sampler", "ddim"), ("evaluate", "--steps", "5")):
        message = fails(capsys, 2 if words[0] == "generate" else 1, words[0], str(folders / "run"), *words[1:])
        assert "images as codes" in message and words[-2].removeprefix("--") in message


def test_model_that_does_not_fit_the_data_is_refused(folders, capsys):
    assert "--model.patches codes" in fails(capsys, 2, *train(folders, "wrong", "--model.patch-size", "1"))
    message = fails(capsys, 2, *train(folders, "wrong", "--model.patches", "codes", "--model.patch-size", "2"))
    assert "--model.patch-size must be 1" in message
