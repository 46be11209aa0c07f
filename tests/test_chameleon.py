"""The paper's baseline: images as codes among the tokens, from their place in the sequence to the picture that is drawn."""

import math
from dataclasses import replace

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


class Grids:
    """A codec whose pictures are their codes."""

    kind, downsampling, image_channels, codes = "vq", 1, 1, CODES

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[..., 0].astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes[..., None].astype(np.uint8)


def engine(seed: int = 0, context: int = 120, **asked) -> Engine:
    """With random weights that are steep enough for the likeliest code to be likely."""
    config = ModelConfig(width=32, layers=2, heads=4, intermediate_size=48, vocab_size=VOCABULARY.size,
                         patches="codes", patch_size=1,
                         qk_norm=True, post_norm=True)  # fmt: skip
    generation = GenerationConfig(**{"guidance_scale": 2.0, "max_tokens": 8, "temperature": 0.0} | asked)
    run = Run("tiny", config, DiffusionConfig(), DataConfig(seq_len=context), generation=generation)
    model = build(config, seed, torch.float32).eval().requires_grad_(False)
    return Engine(OpenedRun(run, tokenizer(), Grids(), VOCABULARY, {}, model, 0, torch.device("cpu")))


def logits_after(ours: Engine, parts: tuple, tail: list[int]) -> torch.Tensor:
    """(V,) of the whole sequence in one pass, without a cache: these segments, then these tokens."""
    chunk = encode_document(Document(parts), VOCABULARY, ends=False)
    for token in tail:
        chunk = chunk.append(token)
    batch = collate([Row((chunk,))], len(chunk), VOCABULARY)
    batch = replace(batch, text_index=torch.tensor([len(chunk) - 1]))
    with torch.no_grad():
        return ours.model(batch, [], []).logits[0]


def written_by_hand(ours: Engine, parts: tuple, shape: tuple[int, int], scale: float) -> np.ndarray:
    """The likeliest codes, each from two whole passes: behind the prompt, and behind nothing but bos and boi."""
    tail = [VOCABULARY.boi[shape]]
    for _ in range(math.prod(shape)):
        given, free = logits_after(ours, parts, tail), logits_after(ours, (), tail)
        guided = free + scale * (given - free)
        tail.append(VOCABULARY.first_code + int(guided[VOCABULARY.first_code : VOCABULARY.num_used].argmax()))
    return np.array(tail[1:]).reshape(shape) - VOCABULARY.first_code


# In the sequence


@given(segments)
def test_codes_stand_where_patches_would_and_are_learnt_like_text(parts):
    chunk = encode_document(Document(parts), VOCABULARY)
    expected, learnt = [VOCABULARY.bos], []
    for part in parts:
        if isinstance(part, Text):
            expected, learnt = expected + list(part.tokens), learnt + [part.loss] * len(part.tokens)
        else:
            codes = [VOCABULARY.first_code + code for row in part.content for code in row]
            expected += [VOCABULARY.boi[part.shape], *codes, VOCABULARY.eoi]
            learnt += [part.loss] * (1 + len(codes)) + [False]  # eoi is appended, never predicted
    expected, learnt = [*expected, VOCABULARY.eos], [*learnt, parts[-1].loss]
    assert chunk.tokens.tolist() == expected
    targets = [token if yes else NO_TARGET for token, yes in zip(expected[1:], learnt, strict=True)]
    assert chunk.targets.tolist() == [*targets, NO_TARGET]
    assert not chunk.images  # nothing to denoise
    whole = np.array([part.content.size for part in parts if isinstance(part, Image)], int)
    cut = np.flatnonzero(chunk.can_break)
    inside = [n for n, token in enumerate(expected) if token >= VOCABULARY.first_code or token == VOCABULARY.eoi]
    assert not set(cut) & set(inside)
    assert whole.sum() + len(whole) == len(inside)


def test_the_ids_of_codes_follow_the_markers():
    assert VOCABULARY.first_code == max(VOCABULARY.boi.values()) + 1
    assert VOCABULARY.num_used == VOCABULARY.first_code + CODES <= VOCABULARY.size
    assert Vocabulary.from_json(VOCABULARY.to_json()) == VOCABULARY
    allowed = text_mode.allowed_tokens(VOCABULARY)
    assert not allowed[VOCABULARY.first_code : VOCABULARY.num_used].any()  # text mode writes no codes


@few
@given(st.lists(segments, min_size=1, max_size=3), st.integers(0, 99))
def test_the_loss_is_the_mean_over_all_tokens_and_is_told_apart(documents, seed):
    ours = engine(seed)
    rows = [Row((encode_document(Document(parts), VOCABULARY),)) for parts in documents]
    batch = collate(rows, 120, VOCABULARY)
    found = compute_losses(ours.model, batch, [], ours.run.diffusion)
    wrong = -ours.model(batch, [], []).logits.log_softmax(-1)[torch.arange(batch.text_count), batch.text_target]  # (T,)
    codes = batch.text_target >= VOCABULARY.first_code
    assert (found.text_count, found.image_count, found.code_count) == (len(wrong), 0, int(codes.sum()))
    assert math.isclose(
        total_loss(found, found.text_count, 0, 5.0), wrong.sum() / max(1, len(wrong)), rel_tol=1e-5, abs_tol=1e-9
    )
    told = mean_losses(found.sums.tolist(), (found.text_count, 0, found.code_count))
    for name, chosen in (("text_loss", ~codes), ("image_loss", codes)):
        if chosen.any():
            assert math.isclose(told[name], float(wrong[chosen].mean()), rel_tol=1e-4)


def test_means_of_latents_are_what_they_were():
    found = Losses(torch.tensor(6.0), torch.tensor(1.0), torch.tensor(0.0), 3, 2, 0)
    assert mean_losses(found.sums.tolist(), (3, 2, 0)) == {"text_loss": 2.0, "image_loss": 0.5}
    assert mean_losses([6.0, 0.0, 0.0], (3, 0, 0)) == {"text_loss": 2.0}


# Drawn


@few
@given(words, st.sampled_from(SHAPES), st.sampled_from([1.0, 2.0, 3.5]), st.integers(0, 99))
def test_drawing_from_the_cache_equals_drawing_without_one(text, shape, scale, seed):
    ours = engine(seed, guidance_scale=scale)
    (answer,) = ours.generate([Request((text,), num_images=1, size=shape[::-1])])[0]
    expected = written_by_hand(ours, (Text(tokenizer().encode(text)),), shape, scale)
    assert np.array_equal(answer.parts[0][..., 0], expected)


@few
@given(st.lists(st.tuples(words, st.sampled_from(SHAPES)), min_size=2, max_size=4), st.integers(0, 99))
def test_together_they_are_drawn_as_alone(asked, seed):
    requests = [
        Request((text,), num_images=2, size=shape[::-1], seed=n) for n, (text, shape) in enumerate(asked)
    ]
    ours = engine(3, temperature=1.0, top_p=0.9)
    together = ours.generate(requests)
    for request, answers in zip(requests, together, strict=True):
        (alone,) = ours.generate([request])
        assert all(np.array_equal(a.parts[0], b.parts[0]) for a, b in zip(answers, alone, strict=True))
    assert len(ours.cache.free) == len(ours.cache.lengths) - len(ours.uncond_slots)  # no slot is lost


def test_what_follows_an_image_has_read_it():
    """Text behind a drawn image is the text behind the same image as a prompt."""
    ours = engine(1, temperature=0.0)
    boi = VOCABULARY.boi[SHAPES[0]]
    ours.allowed_tokens[:] = False
    ours.allowed_tokens[[boi, *range(97, 105)]] = True
    real = text_mode.sample_token
    turn = iter([boi])

    def choose(logits, allowed, *rest):
        return next(turn, None) or real(logits, allowed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_mode, "sample_token", lambda logits, allowed, *rest: (
            real if allowed is not ours.allowed_tokens else choose)(logits, allowed, *rest))  # fmt: skip
        (answer,) = ours.generate([Request(("ab",))])[0]
    drawn = answer.parts[0]
    again = engine(1, temperature=0.0, max_tokens=7)
    again.allowed_tokens = ours.allowed_tokens
    (plain,) = again.generate([Request(("ab", drawn))])[0]
    assert answer.parts[1] and answer.parts[1] == plain.parts[0]


def test_where_text_and_images_guide_apart_the_prompt_images_are_kept_as_they_were():
    ours = engine(2, image_guidance_scale=1.5, guidance_scale=3.0)
    given = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    (answer,) = ours.generate([Request(("a", given), num_images=1, size=(3, 2))])[0]
    tail, image = [VOCABULARY.boi[2, 3]], Image(given[..., 0].astype(np.int64))
    for _ in range(6):
        said = [logits_after(ours, parts, tail) for parts in ((Text(tokenizer().encode("a")), image), (image,), ())]
        guided = said[2] + 1.5 * (said[1] - said[2]) + 3.0 * (said[0] - said[1])
        tail.append(VOCABULARY.first_code + int(guided[VOCABULARY.first_code : VOCABULARY.num_used].argmax()))
    assert (answer.parts[0].ravel().astype(int) + VOCABULARY.first_code).tolist() == tail[1:]


def test_a_preview_shows_what_is_drawn_and_leaves_the_rest_grey():
    ours = engine()
    ours.submit(Request(("a",), num_images=1, size=(4, 4), previews=5))
    seen, drawn = [], None
    while ours.sequences:
        for event in ours.step():
            seen += [event] if isinstance(event, PreviewEvent) else []
            drawn = event.pixels if isinstance(event, ImageEvent) else drawn
    assert [event.step for event in seen] == [5, 10, 15]
    for event in seen:
        flat = event.x0.reshape(-1)
        assert (flat[event.step :] == 128).all()
        assert np.array_equal(flat[: event.step], drawn.reshape(-1)[: event.step])


# From pictures to pictures, through the commands


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VQ codec and what it made of some scenes, by the commands that anyone would type."""
    folder = tmp_path_factory.mktemp("chameleon")
    command(
        "data", "fit-codec", "small", "shapes", "--shapes-size", "16", "--size", "16x16", "--most", "400",
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
        "--data.rows", "2", *options, "--out", str(folders / name),
    ]  # fmt: skip


def test_a_grid_of_codes_goes_to_the_disk_and_comes_back(folders):
    prepared = open_prepared(folders / "data")
    source = prepared.source("shapes", "train")
    image = next(part for part in source[0].segments if isinstance(part, Image))
    assert image.is_codes
    assert image.content.shape == (4, 4)
    assert 0 <= image.content.min() <= image.content.max() < CODES
    scenes = Shapes(size=16)
    known = [prepared.codec.encode(scenes[n].pair[1]) for n in range(100)]
    assert any(np.array_equal(image.content, codes) for codes in known)
    assert len({codes.tobytes() for codes in known}) > 1  # the codec tells scenes apart


def test_the_same_commands_train_draw_and_measure(folders, capsys):
    command(*train(folders, "run", "--model.patches", "codes", "--model.patch-size", "1"))
    heldout = [line for line in (folders / "run" / "metrics.jsonl").read_text().splitlines() if "heldout" in line]
    assert '"image_loss"' in heldout[-1]
    command("generate", str(folders / "run"), "a red disc", "--num-images", "2", "--out", str(folders / "out"))
    assert (folders / "out" / "001.png").exists()
    command("evaluate", str(folders / "run"))
    results = read_json(folders / "run" / "results.json")
    assert 0 <= results["shapes"]["drawings"]["everything"] <= 1
    assert results["shapes"]["conditioning"]["image_loss"] > 0
    command("report", str(folders / "run"))
    for words in (("generate", "--num-images", "1", "--sampler", "ddim"), ("evaluate", "--steps", "5")):
        said = fails(capsys, 2 if words[0] == "generate" else 1, words[0], str(folders / "run"), *words[1:])
        assert "images as codes" in said and words[-2].removeprefix("--") in said


def test_a_model_that_does_not_suit_the_data_is_refused(folders, capsys):
    assert "--model.patches codes" in fails(capsys, 2, *train(folders, "wrong", "--model.patch-size", "1"))
    said = fails(capsys, 2, *train(folders, "wrong", "--model.patches", "codes", "--model.patch-size", "2"))
    assert "patch_size must be 1" in said
