"""Image positions with weights of their own (`model.untied`): which a position uses, learning rates by side, starts."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from tests.documents import (
    TINY,
    VOCABULARY,
    alone,
    batches,
    build,
    few,
    image,
    in_double,
    mask_of,
    times_of,
    with_all_logits,
)
from tests.language_models import write_language_model
from tests.profile import THOROUGH
from tests.sources import write_photos, write_texts
from tests.test_cli import TINY_FITTED, command, fails
from tests.test_language_models import DIGITS, FAST_LANGUAGE_MODEL
from tests.test_training import copy_tensors, new_trainer, resumed_trainer, stop_at_step
from tests.tiny import begin_run, prepared, run_tensors, save, small_run, write_run
from transfusion import parallel
from transfusion.checkpoint.export import export
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.start import OtherRunStart, open_start
from transfusion.config import Machines, ModelConfig, Run, TrainingConfig
from transfusion.model import transfusion as network
from transfusion.model.flops import count_training_flops
from transfusion.model.transformer import Transformer, apply_rotary_emb, rope_cos_sin
from transfusion.model.untied import side_of, text_name
from transfusion.parallel import SINGLE_PROCESS
from transfusion.plan import plan
from transfusion.sequence import NO_IMAGE, Batch, Chunk, Document, Image, Row, Text, Vocabulary, collate, encode_document

UNTIED = "feed_forward", "full"
CODES = Vocabulary.build(num_text_tokens=50, shapes=[(2, 3)], patch_size=1, num_image_codes=30)
CONFIGS = {
    "plain": TINY, "tied head": replace(TINY, tie_word_embeddings=True), "post_norm": replace(TINY, post_norm=True),
    "qk_norm": replace(TINY, qk_norm=True, kv_heads=None), "unet": replace(TINY, patches="unet", unet_width=16),
}  # fmt: skip
modes, configs = st.sampled_from(UNTIED), st.sampled_from(sorted(CONFIGS))


def untie(config: ModelConfig, untied: str, **changes) -> ModelConfig:
    return replace(config, **{"untied": untied, "text_vocab_size": VOCABULARY.text_size} | changes)


def randomized(config: ModelConfig) -> network.Transfusion:
    """With random weights everywhere, also in norms."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                seed = sum(map(ord, name))
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def predict(model: network.Transfusion, batch: Batch) -> network.Prediction:
    batch = with_all_logits(in_double(batch))
    return model(batch, [group.x0 for group in batch.groups], times_of(batch))


def assert_close(actual: network.Prediction, expected: network.Prediction, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=tolerance)
    for one, other in zip(actual.images, expected.images, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# Which weights a position uses


def choose_everywhere(transformer: Transformer, x: Tensor, batch: Batch, is_image: Tensor) -> Tensor:
    """The rule without sorting: both weights at every position (B, L, D), and of the results the one of its side."""
    config, mask = transformer.config, mask_of(batch)
    cos_sin = rope_cos_sin(batch.position_ids, config, x.dtype)

    def of(module, name: str) -> Callable[[Tensor], Tensor]:
        text, own = getattr(module, name), getattr(module, f"image_{name}", None)
        return lambda x: torch.where(is_image[..., None], (own or text)(x), text(x))

    def attend(block, x: Tensor) -> Tensor:
        sides = [block.attention, block.image_attention or block.attention]
        projected = [[part.view(*x.shape[:2], *part.shape[1:]) for part in a.project(x.flatten(0, 1))] for a in sides]
        q, k, v = (torch.where(is_image[..., None, None], image, text) for text, image in zip(*projected, strict=True))
        q, k = (apply_rotary_emb(part, cos_sin).transpose(1, 2) for part in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask.dense, enable_gqa=True)
        out = out.transpose(1, 2).flatten(2)
        return torch.where(is_image[..., None], sides[1].out(out), sides[0].out(out))

    for block in transformer.blocks:
        attention_norm, feed_forward_norm = of(block, "attention_norm"), of(block, "feed_forward_norm")
        feed_forward = of(block, "feed_forward")
        if config.post_norm:
            x = x + attention_norm(attend(block, x))
            x = x + feed_forward_norm(feed_forward(x))
        else:
            x = x + attend(block, attention_norm(x))
            x = x + feed_forward(feed_forward_norm(x))
    return of(transformer, "norm")(x)


@few
@given(modes, configs, batches(), st.booleans())
def test_every_position_uses_the_weights_of_its_side(untied, name, packed, checkpointing):
    """Values and gradients, in batches with text, images or both, equal those without sorting."""
    model, batch = randomized(untie(CONFIGS[name], untied, image_init="fresh")), packed[1]
    model.transformer.activation_checkpointing = checkpointing
    weights = dict(model.transformer.named_parameters())
    x = torch.randn(*batch.tokens.shape, TINY.width, dtype=torch.float64, requires_grad=True)
    mask = mask_of(batch)
    outputs = [
        model.transformer(x, batch.position_ids, mask, batch.sides),
        choose_everywhere(model.transformer, x, batch, batch.image_ids >= 0),
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    direction = torch.randn_like(x)
    gradients, expected = ([*torch.autograd.grad((out * direction).sum(), (x, *weights.values()))] for out in outputs)
    for key, one, other in zip(("x", *weights), gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad():
        plain = model.transformer(x, batch.position_ids, mask, batch.sides)
    torch.testing.assert_close(plain, outputs[0].detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("untied", UNTIED)
def test_codes_use_image_weights(untied):
    config = untie(TINY, untied, vocab_size=CODES.size, text_vocab_size=CODES.text_size, patches="codes", patch_size=1)
    model = randomized(replace(config, image_init="fresh"))
    document = Document((Text((1, 2)), Image(np.arange(6).reshape(2, 3)), Text((3,))))
    batch = alone_with(encode_document(document, CODES), CODES)
    x = torch.randn(*batch.tokens.shape, TINY.width, dtype=torch.float64)
    output = model.transformer(x, batch.position_ids, mask_of(batch), batch.sides)
    expected = choose_everywhere(model.transformer, x, batch, batch.tokens >= CODES.first_code)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@few
@given(batches(), st.booleans())
def test_patches_and_codes_are_image_positions_and_all_others_are_text(packed, codes):
    batch, vocabulary = packed[1], VOCABULARY
    if codes:
        document = Document((Text((1, 2)), Image(np.arange(6).reshape(2, 3)), Text((3,))))
        batch, vocabulary = alone_with(encode_document(document, CODES), CODES), CODES
    is_image = (batch.image_ids != NO_IMAGE).flatten() | (batch.tokens.flatten() >= vocabulary.first_code)
    assert batch.sides.image.tolist() == is_image.nonzero()[:, 0].tolist()
    assert sorted([*batch.sides.text.tolist(), *batch.sides.image.tolist()]) == [*range(batch.tokens.numel())]
    num_patches = 6 if codes else sum(group.index.numel() for group in batch.groups)
    assert len(batch.sides.image) == num_patches
    for marker in (vocabulary.eoi, *vocabulary.boi.values()):
        assert not is_image[batch.tokens.flatten() == marker].any()


def alone_with(chunk: Chunk, vocabulary: Vocabulary) -> Batch:
    return collate([Row((chunk,))], len(chunk), vocabulary)


# The shared model


def copied(shared: network.Transfusion, config: ModelConfig) -> network.Transfusion:
    """An untied model whose image weights are copies of those of a shared model, and whose rows of ids are its rows."""
    model, source = build(config), dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("image_"):
                parameter.copy_(source[name.removeprefix("image_")][VOCABULARY.text_size :])
            else:
                parameter.copy_(source[text_name(name)][: len(parameter)])
    return model


@few
@given(modes, configs, batches())
def test_copies_equal_the_shared_model(untied, name, packed):
    shared = build(CONFIGS[name])
    assert_close(predict(copied(shared, untie(CONFIGS[name], untied)), packed[1]), predict(shared, packed[1]))


@few
@given(modes, configs, batches(min_images=1))
def test_gradients_of_both_sides_sum_to_those_of_the_shared_model(untied, name, packed):
    shared = build(CONFIGS[name])
    model = copied(shared, untie(CONFIGS[name], untied))
    for each in (shared, model):
        prediction = predict(each, packed[1])
        (prediction.logits.logsumexp(-1).sum() + sum(x.square().sum() for x in prediction.images)).backward()
    sums = {name: torch.zeros_like(p) for name, p in shared.named_parameters()}
    for name_, p in model.named_parameters():
        first = VOCABULARY.text_size if name_.startswith("image_") else 0
        sums[text_name(name_).removeprefix("image_")][first : first + len(p)] += p.grad
    for name_, p in shared.named_parameters():
        torch.testing.assert_close(sums[name_], p.grad, rtol=0, atol=1e-9, msg=lambda text, n=name_: f"{n}: {text}")


@pytest.mark.parametrize("image_init", ["copy", "fresh"])
@pytest.mark.parametrize("untied", UNTIED)
def test_image_weights_begin_as_copies_or_with_values_of_their_own(untied, image_init):
    weights = dict(network.build(untie(TINY, untied, image_init=image_init), 0).named_parameters())
    images = [name for name in weights if text_name(name) != name and not name.endswith("norm.weight")]
    assert len(images) == TINY.layers * (7 if untied == "full" else 3)
    assert {torch.equal(weights[name], weights[text_name(name)]) for name in images} == {image_init == "copy"}
    shared = network.build(TINY, 0).transformer.state_dict()
    assert all(torch.equal(weights[f"transformer.{name}"], value) for name, value in shared.items())


# Cost


@pytest.mark.parametrize("untied", UNTIED)
def test_plan_counts_both_sides_and_no_more_flops(untied):
    shared = Run("", replace(TINY, vocab_size=128, patches="linear"), training=TrainingConfig(batch_size=2))
    run = replace(shared, model=untie(shared.model, untied))
    one, other = plan(shared, Machines()), plan(run, Machines())
    model = network.build_on_meta(run.model)
    sides = {side: sum(p.numel() for name, p in model.transformer.named_parameters()
                       if side_of(f"transformer.{name}", untied) == side)
             for side in ("transformer", "text", "image")}  # fmt: skip
    parts = other.parameters
    names = "transformer", "transformer, text only", "transformer, images only"
    assert [parts[name] for name in names] == [*sides.values()]
    assert sides["text"] == sides["image"] > 0
    assert sum(sides.values()) - sides["image"] == one.parameters["transformer"]
    assert (sides["transformer"] == 0) == (untied == "full")
    assert sum(parts.values()) == network.count_parameters(model)
    assert (other.flops, other.usual_flops) == (one.flops, one.usual_flops)
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4,))))
    batch = alone(encode_document(document, VOCABULARY))
    assert count_training_flops(batch, run.model) == count_training_flops(batch, shared.model)


@torch._dynamo.config.patch(recompile_limit=4)  # torch's is 8, which a longer training reaches
def test_compiled_untied_blocks_get_a_graph_for_any_number_of_images_and_one_for_none():
    """All blocks share them, in training and in evaluation."""
    config = untie(TINY, "full")
    plain, compiled = build(config), build(config)
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(parallel, "COMPILE_BACKEND", "eager"):
        parallel.parallelize(compiled, compiled.transformer.blocks, torch.device("cpu"), None, compiled=True, dynamic=None)
    counts = []
    for images in ((1, 1), (2, 1), (0, 0), (2, 2), (0, 0), (0, 1)):
        documents = [Document((Text((1, 2)), *(image((4, 4), n) for n in range(number)), Text((3,)))) for number in images]
        batch = collate([Row((encode_document(document, VOCABULARY),)) for document in documents], 64, VOCABULARY)
        expected = predict(plain, batch)
        assert_close(predict(compiled, batch), expected, 1e-12)
        with torch.no_grad():
            assert_close(predict(compiled, batch), expected, 1e-12)
        counts.append(counters["stats"]["unique_graphs"])
    assert not counters["unimplemented"]  # such as a limit that is reached
    assert counts[:2] == [2, 4] and counts[2] == counts[-1]  # with and without gradient


# Learning rates by side

SCALES = {"text": "text_lr_scale", "image": "image_lr_scale", "transformer": "transformer_lr_scale"}


def untied_run(untied: str, steps: int = 4, **training) -> Run:
    """A small run with weight decay."""
    run = small_run(steps, weight_decay=0.5, validate_every=100, preview_every=0, **training)
    return replace(run, model=replace(run.model, untied=untied))


def test_sides_of_all_parameters():
    """By the issue: embedding, head and text weights; patches, new ids and image weights; the rest is shared."""
    names = dict(network.build_on_meta(untie(TINY, "feed_forward")).named_parameters())
    block = "transformer.blocks.0."
    expected = {
        "tokens.weight": "text", "head.weight": "text", "image_tokens.weight": "image", "image_head.weight": "image",
        "patches.proj_in.weight": "image", "transformer.norm.weight": "transformer",
        f"{block}attention.query.weight": "transformer", f"{block}attention_norm.weight": "transformer",
        f"{block}feed_forward.up.weight": "text", f"{block}feed_forward_norm.weight": "text",
        f"{block}image_feed_forward.up.weight": "image", f"{block}image_feed_forward_norm.weight": "image",
    }  # fmt: skip
    assert expected.items() <= {name: side_of(name, "feed_forward") for name in names}.items()
    full = {name: side_of(name, "full") for name in dict(network.build_on_meta(untie(TINY, "full")).named_parameters())}
    assert {*full.values()} == {"text", "image"}
    assert full["transformer.norm.weight"] == "text" and full["transformer.image_norm.weight"] == "image"
    assert {side_of(name, "none") for name in names if name.startswith(block) and "image" not in name} == {"transformer"}


FROZEN = [("full", "text"), ("full", "image"), ("feed_forward", "transformer")]
MORE_FROZEN = [("feed_forward", "text"), ("feed_forward", "image")]


@pytest.mark.parametrize(("untied", "frozen"), [*FROZEN, *MORE_FROZEN] if THOROUGH else FROZEN)
def test_frozen_side_never_changes(tmp_path, untied, frozen):
    """Bit for bit, in spite of weight decay. Its average is itself, so that it exists once; it has no gradient and no
    moments, and all else trains, also after a resume."""
    run = untied_run(untied, **{SCALES[frozen]: 0.0})
    trainer = new_trainer(tmp_path / "whole", run)
    before = copy_tensors(trainer)
    for parameter, average in zip(trainer.model.parameters(), trainer.ema.parameters(), strict=True):
        assert (average is parameter) == (not parameter.requires_grad)
    assert trainer.train()
    after, parts = copy_tensors(trainer), {"model": set(), "ema": set(), "optimizer": set()}
    for key, value in after.items():
        part, name = key.split(" ")
        parts[part].add(side := side_of(name, untied))
        if side != frozen and part == "model" and value.dim() > 1:
            assert not torch.equal(value, before[key]), key
        elif side == frozen:
            assert torch.equal(value, before[key]), key
    assert frozen not in parts["optimizer"] and parts["model"] == parts["ema"] == parts["optimizer"] | {frozen}
    stop_at_step(new_trainer(tmp_path / "stopped", run), 2).train()
    again = resumed_trainer(tmp_path / "stopped", run)
    assert again.train()
    resumed = copy_tensors(again)
    assert all(torch.equal(value, after[key]) for key, value in resumed.items() if key.startswith("model"))


@pytest.mark.parametrize("slower", ["text", "image"])
def test_lr_scale_of_a_side_scales_its_updates_only(tmp_path, slower):
    updates = []
    for name, scale in (("default", 1.0), ("slower", 0.25)):
        trainer = new_trainer(tmp_path / name, untied_run("full", 1, **{SCALES[slower]: scale}))
        before = copy_tensors(trainer)
        trainer.train()
        after = copy_tensors(trainer)
        updates.append({key: after[key] - value for key, value in before.items() if key.startswith("model")})
    for key, update in updates[0].items():
        factor = 0.25 if side_of(key.split(" ")[1], "full") == slower else 1.0
        torch.testing.assert_close(updates[1][key], update * factor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("source", ["qwen3", "run"])
def test_text_of_a_frozen_language_model_is_unchanged_bit_for_bit(tmp_path, source):
    """Logits over the ids of text, in documents without images, of raw and averaged weights and of the exported run; also
    packed with images."""
    small = "train", "small"
    if source != "run":
        write_language_model(tmp_path / "source", source)
        options = (*FAST_LANGUAGE_MODEL, "--init-from", tmp_path / "source")
    else:  # a run on texts alone, whose prepared folder also has the images
        write_photos(tmp_path / "pairs", 30)
        write_texts(tmp_path / "texts.jsonl", 30)
        command("data", "prepare", tmp_path / "texts.jsonl", tmp_path / "pairs", "--out", tmp_path / "data")
        options = (*TINY_FITTED, "--training.preview-every", 0, "--data", tmp_path / "data")
        command(*small, "--out", tmp_path / "source", *options, "--data.sources", "texts")
        options = (*options, "--data.sources", "pairs", "--from", tmp_path / "source")
    command(*small, "--out", tmp_path / "run", *options, "--model.untied", "full", "--training.text-lr-scale", 0)
    export(tmp_path / "run", tmp_path / "exported")
    start = open_start("run" if source == "run" else "language_model", str(tmp_path / "source"))
    for name, weights in (("run", "raw"), ("run", "ema"), ("exported", "ema")):
        opened = open_checkpoint(tmp_path / name, weights)
        vocabulary, first = opened.vocabulary, network.build_uninitialized(opened.run.model)
        start.fill(first, 0, SINGLE_PROCESS)
        first_weights = dict(first.named_parameters())
        assert all(torch.equal(p, first_weights[text_name(name)]) for name, p in first_weights.items())
        latent = np.zeros((opened.run.model.latent_channels, *next(iter(vocabulary.boi))), np.float32)
        texts = [encode_document(Document((Text(tuple(range(n, n + 9))),)), vocabulary) for n in (0, 100)]
        picture = encode_document(Document((Text((7, 8)), Image(latent))), vocabulary)
        rows = [Row((texts[0],)), Row((texts[1], picture))]
        batch = with_all_logits(collate(rows, len(texts[1]) + len(picture), vocabulary))
        with torch.no_grad():
            inputs = batch, [group.x0 for group in batch.groups], [torch.zeros(1)]
            before, after = (model(*inputs).logits.view(2, -1, vocabulary.size) for model in (first, opened.model))
        for row, text in enumerate(texts):
            ids = before[row, : len(text), : vocabulary.text_size], after[row, : len(text), : vocabulary.text_size]
            assert torch.equal(*ids)
        assert not torch.equal(before, after)
        trained = dict(opened.model.named_parameters())
        changed = {side_of(name, "full") for name, p in first.named_parameters() if not torch.equal(p, trained[name])}
        assert changed == {"image"}


def test_freezing_everything_is_refused():
    frozen = {"text_lr_scale": 0.0, "image_lr_scale": 0.0}
    with pytest.raises(ValueError, match="text_lr_scale and image_lr_scale are both 0 with model.untied full"):
        untied_run("full", **frozen)
    untied_run("feed_forward", **frozen)  # attention is shared


def test_options_without_effect_are_refused(tmp_path, capsys):
    args = ("train", "digits", "--out", tmp_path / "run")
    message = fails(capsys, 2, *args, "--model.image-init", "fresh")
    assert "--model.image-init has no effect without --model.untied" in message
    untied = "--model.untied", "full"
    message = fails(capsys, 2, *args, *untied, "--training.transformer-lr-scale", 0.5)
    assert "--training.transformer-lr-scale has no effect with --model.untied full" in message
    begin_run(tmp_path / "untied", run := prepared(untied_run("full"))[0])
    save(tmp_path / "untied", 1, run_tensors(run, 1), {"step": 1})
    message = fails(capsys, 2, *args, *untied, *DIGITS, "--from", tmp_path / "untied", "--model.image-init", "fresh")
    assert "--model.image-init has no effect with --from a run whose weights are untied" in message


def test_run_on_data_without_images_has_no_image_weights_and_supports_no_images(tmp_path, capsys):
    write_photos(tmp_path / "photos", 30)
    write_texts(tmp_path / "texts.jsonl", 30)
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "pairs")
    command("data", "prepare", tmp_path / "texts.jsonl", "--like", tmp_path / "pairs", "--out", tmp_path / "texts")
    small = "train", "small", *TINY_FITTED, "--training.steps", 1
    message = fails(capsys, 2, *small, "--data", tmp_path / "texts", "--out", tmp_path / "run", "--model.untied", "full")
    assert "--model.untied has no effect on data without images" in message
    command(*small, "--data", tmp_path / "texts", "--out", tmp_path / "run")
    message = fails(capsys, 1, *small, "--data", tmp_path / "pairs", "--from", tmp_path / "run", "--out", tmp_path / "next")
    assert "latents of 4x4, the initial run supports no images: only those of its prepared folders" in message
    message = fails(capsys, 1, "data", "prepare", tmp_path / "photos", "--like", tmp_path / "run", "--out", tmp_path / "new")
    assert "trained without images, so it has no sizes of images" in message


# Starts


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("image_init", ["copy", "fresh"])
def test_untied_run_starts_from_a_shared_one(tmp_path, image_init, exported):
    """Its text weights, and the rows of all ids; image weights are copies of them, or as in any run."""
    run = write_run(tmp_path / "shared")
    if exported:
        export(tmp_path / "shared", tmp_path / "exported")
    start = OtherRunStart(str(tmp_path / ("exported" if exported else "shared")))
    shared = dict(open_checkpoint(tmp_path / "shared").model.named_parameters())
    model = network.build_uninitialized(start.adapt_config(replace(run.model, untied="full", image_init=image_init)))
    start.fill(model, 3, SINGLE_PROCESS)
    size = start.description.vocabulary.text_size
    random = dict(network.build(model.config, 3).named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("image_"):
            expected = shared[name.removeprefix("image_")][size:]
        elif text_name(name) == name or image_init == "copy":
            expected = shared[text_name(name)][: len(parameter)]
        else:
            expected = random[name]
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("exported", [False, True])
def test_run_starts_from_an_untied_one_of_its_kind_only(tmp_path, exported):
    """Image weights are the other run's, not copies of its text weights."""
    run, _ = prepared(untied_run("full"))
    run = replace(run, model=replace(run.model, image_init="fresh"))  # else image weights equal the text's
    begin_run(tmp_path / "run", run)
    tensors = run_tensors(run, 1)
    save(tmp_path / "run", 1, tensors, {"step": 1})
    if exported:
        export(tmp_path / "run", tmp_path / "exported")
    start = OtherRunStart(str(tmp_path / ("exported" if exported else "run")))
    config = start.description.run.model
    model = network.build_uninitialized(start.adapt_config(config))
    start.fill(model, 3, SINGLE_PROCESS)
    opened = open_checkpoint(start.folder).model
    for each in (model, opened):
        assert all(torch.equal(parameter, tensors["ema"][name]) for name, parameter in each.named_parameters())
    for untied in ("none", "feed_forward"):
        with pytest.raises(ValueError, match=f"model.untied is full in the folder, {untied} in this command"):
            start.adapt_config(replace(config, untied=untied))
