"""The network: sizes, packed equals alone (promise 2), dependencies, starting weights, logits of other decoders."""

from collections.abc import Iterator
from dataclasses import replace

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
    few,
    image,
    in_double,
    may_see,
    positioned_chunks,
    rows_of,
    some,
    times_of,
    with_all_logits,
)
from transfusion.config import ModelConfig, RopeScaling
from transfusion.model import transfusion as network
from transfusion.model.attention import attention
from transfusion.model.patches import patchify, timestep_embedding, unpatchify
from transfusion.model.transformer import RMSNorm
from transfusion.objective import next_token_loss
from transfusion.runs import SIZES
from transfusion.sequence import Batch, Document, Row, Text, collate, encode_document

VARIANTS = {
    "plain": TINY,
    "grouped to one": replace(TINY, kv_heads=1),
    "ungrouped, wide heads": replace(TINY, kv_heads=None, head_dim=12),
    "tie_word_embeddings": replace(TINY, tie_word_embeddings=True),
    "qk_norm": replace(TINY, qk_norm=True),
    "qkv_bias": replace(TINY, qkv_bias=True),
    "post_norm": replace(TINY, post_norm=True),
    "causal images": replace(TINY, image_attention="causal"),
    "rows and columns": replace(TINY, image_rope="2d"),
    "scaled": replace(TINY, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
    "untied feed-forward": replace(TINY, untied="feed_forward", image_init="fresh", text_vocab_size=VOCABULARY.text_size),
    "untied": replace(TINY, untied="full", image_init="fresh", text_vocab_size=VOCABULARY.text_size, post_norm=True),
}
MODELS = {name: build(config, seed=3) for name, config in VARIANTS.items()}
variants = st.sampled_from(sorted(VARIANTS))


@torch.no_grad()
def run(model: network.Transfusion, batch: Batch, x_t: list[Tensor], t: list[Tensor]) -> network.Prediction:
    return model(batch, x_t, t)


def latents_of(batch: Batch) -> list[Tensor]:
    return [group.x0 for group in batch.groups]


# Sizes (Table 2 and Table 7)


@pytest.mark.parametrize(("name", "millions", "percent"), [
    ("0.16b", 162, 0.5), ("0.37b", 374, 0.4), ("0.76b", 778, 0.4), ("1.4b", 1364, 0.4), ("7b", 6738, 0.3),
])  # fmt: skip
def test_sizes_equal_the_papers(name, millions, percent):
    with torch.device("meta"):
        model = network.Transfusion(SIZES[name])
    patches = network.count_parameters(model.patches)
    transformer = network.count_parameters(model) - patches
    assert round(transformer / 1e6) == millions
    assert round(100 * patches / transformer, 1) == percent


def test_tied_models_have_one_embedding_matrix():
    model, untied = network.build(VARIANTS["tie_word_embeddings"], 0), network.build(TINY, 0)
    is_shared = model.head is None and not any("head" in name for name in model.state_dict())
    assert is_shared
    saved = network.count_parameters(untied) - network.count_parameters(model)
    assert saved == TINY.vocab_size * TINY.width


# Promise 2


@few
@given(variants, batches(min_documents=2, min_images=1))
def test_packed_row_equals_its_documents_alone(variant, packed):
    rows, batch = packed
    model, batch = MODELS[variant], with_all_logits(in_double(batch))
    prediction = run(model, batch, latents_of(batch), times_of(batch))
    logits = prediction.logits.view(*batch.tokens.shape, -1)
    images = {  # by the index of their first patch
        int(index[0]): image_prediction
        for group, image_predictions in zip(batch.groups, prediction.images, strict=True)
        for index, image_prediction in zip(group.index, image_predictions, strict=True)
    }
    for b, begin, chunk in positioned_chunks(rows):
        single = with_all_logits(in_double(alone(chunk)))
        expected = run(model, single, latents_of(single), times_of(single))
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], expected.logits, rtol=0, atol=1e-9)
        for group, image_predictions in zip(single.groups, expected.images, strict=True):
            for index, image_prediction in zip(group.index, image_predictions, strict=True):
                in_row = images.pop(b * LENGTH + begin + int(index[0]))
                torch.testing.assert_close(in_row, image_prediction, rtol=0, atol=1e-9)
    assert not images


@few
@given(batches(min_images=1), st.integers(0, 2**31))
def test_logits_are_computed_at_text_index(packed, seed):
    batch = in_double(packed[1])
    all_logits = run(MODELS["plain"], with_all_logits(batch), latents_of(batch), times_of(batch)).logits
    prediction = run(MODELS["plain"], batch, latents_of(batch), times_of(batch))
    torch.testing.assert_close(prediction.logits, all_logits[batch.text_index], rtol=0, atol=1e-12)


# Which outputs an input changes


def changed_outputs(model, batch: Batch, change) -> tuple[Tensor, list[Tensor]]:
    """Positions (B, L) whose logits, and images (N,) per group whose predictions, differ after `change(batch, x_t, t)`."""
    batch = with_all_logits(in_double(batch))
    x_t, t = latents_of(batch), times_of(batch)
    before = run(model, batch, x_t, t)
    batch, x_t, t = (
        replace(batch, tokens=batch.tokens.clone()),
        [x.clone() for x in x_t],
        [x.clone() for x in t],
    )
    change(batch, x_t, t)
    after = run(model, batch, x_t, t)
    logits = (before.logits - after.logits).abs().amax(1).view(batch.tokens.shape) > 1e-12
    images = [
        (old - new).flatten(1).abs().amax(1) > 1e-12
        for old, new in zip(before.images, after.images, strict=True)
    ]
    return logits, images


def attending(batch: Batch, b: int, keys, bidirectional: bool) -> Tensor:
    """Positions (B, L) that attend to any of these positions of row b."""
    attends = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    document, image, clean = rows_of(batch)[b]
    attends[b] = may_see(document, image, bidirectional, clean)[:, keys].any(1)
    return attends


def images_of(batch: Batch, positions: Tensor) -> list[Tensor]:
    """Images (N,) per group with a patch at one of these positions (B, L)."""
    return [positions.view(-1)[group.index].any(1) for group in batch.groups]


@few
@given(variants, batches(min_images=1), st.data())
def test_token_changes_only_positions_that_attend_to_it(variant, packed, data):
    _, batch = packed
    b = data.draw(st.integers(0, len(batch.tokens) - 1), label="row")
    text = ((batch.image_ids[b] < 0) & (batch.document_ids[b] >= 0)).nonzero()[:, 0].tolist()
    position = data.draw(st.sampled_from(text), label="position")

    def change(batch, x_t, t):
        batch.tokens[b, position] = (batch.tokens[b, position] + 7) % VOCABULARY.num_text_tokens

    logits, images = changed_outputs(MODELS[variant], batch, change)
    expected = attending(batch, b, [position], variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@few
@given(variants, batches(min_images=1), st.data())
def test_patch_changes_only_positions_that_attend_to_it(variant, packed, data):
    _, batch = packed
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip
    patch = data.draw(st.integers(0, batch.groups[g].index.shape[1] - 1), label="patch")

    def change(batch, x_t, t):
        columns = x_t[g].shape[3] // 2
        y, x = 2 * (patch // columns), 2 * (patch % columns)
        x_t[g][n, 0, y, x] += 1

    logits, images = changed_outputs(MODELS[variant], batch, change)
    b, position = divmod(int(batch.groups[g].index[n, patch]), LENGTH)
    expected = attending(batch, b, [position], variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]
    if variant != "causal images":
        assert logits.view(-1)[batch.groups[g].index[n]].all()


@few
@given(variants, batches(min_images=1), st.data())
def test_t_changes_only_positions_that_attend_to_its_image(variant, packed, data):
    _, batch = packed
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip

    def change(batch, x_t, t):
        t[g][n] = (t[g][n] + 0.37) % 1

    logits, images = changed_outputs(MODELS[variant], batch, change)
    index = batch.groups[g].index[n]
    expected = attending(batch, int(index[0]) // LENGTH, (index % LENGTH).tolist(), variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@some
@given(st.permutations(range(4)), st.sampled_from([n for n in sorted(VARIANTS) if n != "causal images"]))
def test_model_depends_on_the_order_of_patches(order, variant):
    """If all patches shared one position, permuted patches would give a permuted prediction."""
    document = Document((Text((1, 2)), image((4, 4), seed=5)))
    batch = in_double(alone(encode_document(document, VOCABULARY)))
    x0, t = batch.groups[0].x0, [torch.tensor([0.5], dtype=torch.float64)]

    def permute(latent):
        return unpatchify(patchify(latent, 2)[:, list(order)], (4, 4), 2)

    plain = run(MODELS[variant], batch, [x0], t).images[0]
    permuted = run(MODELS[variant], batch, [permute(x0)], t).images[0]
    difference = float((permuted - permute(plain)).abs().max() / plain.std())
    assert difference < 1e-9 if list(order) == [0, 1, 2, 3] else difference > 1e-2


@pytest.mark.parametrize(("variant", "other"), [
    ("qk_norm", "plain"), ("qkv_bias", "plain"), ("post_norm", "plain"), ("scaled", "plain"), ("causal images", "plain"),
    ("rows and columns", "plain"),
])  # fmt: skip
def test_options_change_the_output(variant, other):
    document = Document((Text(tuple(range(20))), image((4, 4), seed=5), Text((3,))))
    batch = with_all_logits(in_double(alone(encode_document(document, VOCABULARY))))
    first, second = (run(MODELS[name], batch, latents_of(batch), times_of(batch)) for name in (variant, other))
    assert (first.logits - second.logits).abs().max() > 1e-3
    assert (first.images[0] - second.images[0]).abs().max() > 1e-3


# Patches


@some
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify(N, C, rows, columns, p):
    latent = torch.arange(N * C * rows * p * columns * p, dtype=torch.float32).view(
        N, C, rows * p, columns * p
    )
    patches = patchify(latent, p)
    assert patches.shape == (N, rows * columns, C * p * p)
    assert torch.equal(unpatchify(patches, latent.shape[2:], p), latent)
    for n in range(rows * columns):  # left to right, top to bottom
        y, x = n // columns * p, n % columns * p
        assert sorted(patches[:, n].flatten().tolist()) == sorted(
            latent[:, :, y : y + p, x : x + p].flatten().tolist()
        )


def test_timestep_embedding_differs_for_every_step():
    embeddings = timestep_embedding(torch.arange(1001) / 1000)
    assert embeddings.shape == (1001, 256)
    assert embeddings.abs().max() <= 1
    assert (embeddings[1:] - embeddings[:-1]).norm(dim=1).min() > 0.1
    assert torch.equal(timestep_embedding(torch.tensor([0.25]))[0], embeddings[250])  # independent of the batch


# Starting weights


def copy_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_starting_weights_depend_only_on_seed_and_name(variant):
    config = VARIANTS[variant]
    expected = copy_parameters(network.build(config, seed=5))
    torch.manual_seed(123)  # not on the global generator
    assert same_weights(copy_parameters(network.build(config, seed=5)), expected)
    reversed_model = network.Transfusion(config)  # not on earlier values or on the order of parameters
    order = list(reversed_model.named_parameters())[::-1]
    reversed_model.named_parameters = lambda: iter(order)
    network.init_weights(reversed_model, seed=5)
    del reversed_model.named_parameters
    assert same_weights(copy_parameters(reversed_model), expected)
    double_model = network.Transfusion(config).double()  # not on the dtype
    network.init_weights(double_model, seed=5)
    assert same_weights({name: x.float() for name, x in copy_parameters(double_model).items()}, expected)


def test_starting_weights_differ_by_parameter_and_seed():
    weights, other_weights = copy_parameters(network.build(TINY, 0)), copy_parameters(network.build(TINY, 1))
    random_weights = {name: x for name, x in weights.items() if x.std() > 0}
    assert all(not torch.equal(x, other_weights[name]) for name, x in random_weights.items())
    assert len({tuple(x.flatten()[:8].tolist()) for x in random_weights.values()}) == len(random_weights)
    constant = sorted(set(weights) - set(random_weights))
    assert all(
        name.endswith(("norm.weight", "bias")) or name == "patches.proj_out.weight" for name in constant
    )


def test_deeper_model_has_the_same_starting_weights():
    """The random numbers of a parameter do not depend on other parameters."""
    weights, deeper = copy_parameters(network.build(TINY, 0)), copy_parameters(network.build(replace(TINY, layers=4), 0))
    for name in (
        "tokens.weight",
        "head.weight",
        "patches.time.2.weight",
        "transformer.blocks.1.attention.query.weight",
    ):
        assert torch.equal(weights[name], deeper[name])


def test_image_predictions_start_at_zero():
    batch = alone(encode_document(Document((image((4, 4), 0),)), VOCABULARY))
    prediction = run(network.build(TINY, 0), batch, latents_of(batch), [torch.tensor([0.5])])
    assert torch.equal(prediction.images[0], torch.zeros(1, CHANNELS, 4, 4))
    assert prediction.logits.std() > 0.1


# Gradients


@some
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 9),
    st.floats(1e-6, 1),
    st.floats(0, 5),
    st.integers(0, 99),
)
def test_rms_norm_equals_torchs_forward_and_backward(shape, width, eps, size, seed):
    """The hand-written gradient is used only where gradients are enabled."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, *shape, width, generator=generator, dtype=torch.float64)
    ours, torchs = RMSNorm(width, eps).double(), torch.nn.RMSNorm(width, eps).double()
    with torch.no_grad():
        for norm in (ours, torchs):
            norm.weight.copy_(torch.linspace(0.5, 2, width))
    results = []
    for norm in (ours, torchs):
        scaled = (size * x).requires_grad_()
        out = norm(scaled)
        out.backward(gradient)
        results.append((out.detach(), scaled.grad, norm.weight.grad))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(size * x), results[0][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["norm", "attention", "loss"])
def test_written_gradients_are_not_differentiated_in_silence(name):
    """They are formulas of saved intermediate results, so a second derivative would be wrong."""
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    functions = {
        "norm": RMSNorm(4, 1e-5), "attention": lambda x: attention(x, x, x, torch.zeros(1, 1, 3, 3)),
        "loss": lambda x: next_token_loss(x[0, 0], torch.ones(5, 4), torch.tensor([0, 1, 2])).sum,
    }  # fmt: skip
    (gradient,) = torch.autograd.grad(functions[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rms", [1e-3, 1, 30, 3e3, 3e4])
def test_half_precision_norms_are_computed_in_float32(dtype, weight_dtype, rms):
    """Against float64, with the rounding of the result only. The squares of 300 are too large for float16."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 4, 1024, generator=generator)
    x = (x * (rms / x.square().mean().sqrt())).clamp(-65_000, 65_000).to(dtype).requires_grad_()
    norm = RMSNorm(1024, 1e-5).to(weight_dtype)
    exact = torch.nn.RMSNorm(1024, 1e-5).double()
    x_exact = x.detach().double().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 1024))
        exact.weight.copy_(norm.weight)
        without_gradients = norm(x)
    out, expected = norm(x), exact(x_exact)
    gradient = gradient.to(out.dtype)
    out.backward(gradient)
    expected.backward(gradient.double())
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    for result in (out, without_gradients):
        assert result.dtype == weight_dtype
        torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(weight_dtype).eps, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_exact.grad, rtol=8 * eps, atol=eps / rms)
    torch.testing.assert_close(norm.weight.grad.double(), exact.weight.grad, rtol=eps, atol=1e-5)


@few
@given(variants, batches(min_images=1))
def test_outputs_are_equal_with_and_without_gradients(variant, packed):
    batch = with_all_logits(in_double(packed[1]))
    inputs = batch, latents_of(batch), times_of(batch)
    plain, with_gradient = run(MODELS[variant], *inputs), MODELS[variant](*inputs)
    torch.testing.assert_close(with_gradient.logits.detach(), plain.logits, rtol=0, atol=1e-10)
    for actual, expected in zip(with_gradient.images, plain.images, strict=True):
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_bfloat16_outputs_are_close_to_float32(variant):
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5))))
    batch, model = alone(encode_document(document, VOCABULARY)), build(VARIANTS[variant], seed=1, dtype=torch.float32)
    inputs = batch, latents_of(batch), [torch.tensor([0.5])]
    exact = run(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        lower = model(*inputs)
    (lower.logits.float().sum() + lower.images[0].float().sum()).backward()
    for actual, expected in ((lower.logits, exact.logits), (lower.images[0], exact.images[0])):
        assert (actual.detach().float() - expected).std() < 0.05 * expected.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def unused_parameters(batch: Batch, variant: str) -> tuple[set[str], set[str]]:
    """Names of parameters that have no gradient, and of those with a gradient of zero, after a step on this batch."""
    model = build(VARIANTS[variant], seed=1)
    batch = in_double(batch)
    prediction = model(batch, latents_of(batch), times_of(batch))
    (prediction.logits.logsumexp(1).sum() + sum(x.square().sum() for x in prediction.images)).backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    return missing, {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_text_with_images_uses_every_parameter(variant):
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5)), image((2, 6), 1)))
    assert unused_parameters(alone(encode_document(document, VOCABULARY)), variant) == (set(), set())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_text_without_images_gives_patch_layers_zero_gradients(variant):
    """Not missing: with several ranks the gradients of every weight are summed. Also image weights of the transformer."""
    missing, zero = unused_parameters(alone(encode_document(Document((Text((1, 2, 3)),)), VOCABULARY)), variant)
    names = {name for name, _ in MODELS[variant].named_parameters()}
    of_images = "patches.", "image_tokens." if variant.startswith("untied") else "patches."
    assert zero == {name for name in names if name.startswith(of_images) or ".image_" in name}
    assert not missing


def test_images_without_text_leave_only_the_head_without_gradient():
    document = Document((image((4, 4), 0, loss=False), Text((), loss=False)))
    batch = alone(encode_document(document, VOCABULARY))
    assert batch.text_count == 0
    assert unused_parameters(batch, "plain") == (set(), {"head.weight"})


def test_batch_of_empty_rows_runs():
    batch = collate([Row(())], 8, VOCABULARY)
    assert run(MODELS["plain"], batch, [], []).logits.shape == (0, TINY.vocab_size)


# Decoders of transformers (promise 11)


def copy_weights(theirs, config: ModelConfig) -> network.Transfusion:
    """Our model with the weights of a decoder of transformers."""
    model = build(config, seed=9, dtype=torch.float32)
    names = dict(_names(theirs.state_dict(), config.layers, config.tie_word_embeddings))
    missing = {n for n, _ in model.named_parameters() if not n.startswith("patches.")} - names.keys()
    assert not missing
    assert not model.load_state_dict(names, strict=False).unexpected_keys
    return model


def _names(weights: dict, layers: int, is_tied: bool) -> Iterator[tuple[str, Tensor]]:
    yield "tokens.weight", weights["model.embed_tokens.weight"]
    yield "transformer.norm.weight", weights["model.norm.weight"]
    if not is_tied:
        yield "head.weight", weights["lm_head.weight"]
    block_names = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.out",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "mlp.gate_proj": "feed_forward.gate",
        "mlp.up_proj": "feed_forward.up",
        "mlp.down_proj": "feed_forward.down",
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    if "model.layers.0.post_feedforward_layernorm.weight" in weights:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    block_names |= dict(zip(norms, ("attention_norm", "feed_forward_norm"), strict=True))
    for n in range(layers):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in weights.items() if f".layers.{n}." in k}
        for theirs, ours in block_names.items():
            if f"{theirs}.weight" in layer:
                yield f"transformer.blocks.{n}.{ours}.weight", layer[f"{theirs}.weight"]


def sizes_of(config: ModelConfig) -> dict:
    """Our config as arguments of a config of transformers."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return dict(
        hidden_size=config.width, intermediate_size=config.feed_forward_size, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size, vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, max_position_embeddings=512, rope_parameters=rope,
        initializer_range=0.15, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def check_equal(theirs, config: ModelConfig, seed: int):
    """In packed rows, our logits of each document equal those of `theirs`."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    theirs = theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    model = copy_weights(theirs, config)
    lengths = (60, 23, 100)
    chunks = [
        encode_document(Document((Text(tuple(torch.randint(50, (n,), generator=generator).tolist())),)), VOCABULARY)
        for n in lengths
    ]
    batch = with_all_logits(collate([Row(tuple(chunks[:2])), Row(tuple(chunks[2:]))], 128, VOCABULARY))
    logits = run(model, batch, [], []).logits.view(2, 128, -1)
    for (b, begin, chunk), _ in zip(
        positioned_chunks([Row(tuple(chunks[:2])), Row(tuple(chunks[2:]))]), lengths, strict=True
    ):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(chunk.tokens)[None]).logits[0]
        assert expected.std() > 0.1  # not trivially equal
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], expected, rtol=0, atol=1e-4)


@st.composite
def decoders(draw):
    """Configs of small decoders."""
    heads = draw(st.sampled_from((2, 4)))
    scaling = st.builds(
        RopeScaling,
        factor=st.sampled_from((2.0, 8.0)),
        low_frequency_factor=st.just(1.0),
        high_frequency_factor=st.sampled_from((2.0, 4.0)),
        original_length=st.sampled_from((16, 64)),
    )
    return ModelConfig(
        width=32, layers=draw(st.integers(1, 3)), heads=heads, kv_heads=draw(st.sampled_from((None, 1, 2))),
        head_dim=draw(st.sampled_from((None, 12, 16))), intermediate_size=draw(st.sampled_from((40, 64))),
        vocab_size=VOCABULARY.size, tie_word_embeddings=draw(st.booleans()), norm_eps=draw(st.sampled_from((1e-5, 1e-2))),
        rope_theta=draw(st.sampled_from((10_000.0, 500_000.0))), rope_scaling=draw(st.none() | scaling),
        latent_channels=CHANNELS, image_rope=draw(st.sampled_from(("1d", "2d"))),
    )  # fmt: skip


@few
@given(decoders(), st.integers(0, 2**31))
def test_logits_equal_llamas(config, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    check_equal(LlamaForCausalLM(LlamaConfig(**sizes_of(config))), config, seed)


@few
@given(decoders(), st.integers(0, 2**31))
def test_logits_with_qk_norm_equal_qwen3s(config, seed):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = replace(config, qk_norm=True)
    check_equal(Qwen3ForCausalLM(Qwen3Config(**sizes_of(config))), config, seed)


def test_logits_with_post_norm_equal_olmo2s():
    """OLMo 2 normalises queries and keys over all heads together; with one head this equals ours."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = replace(TINY, heads=1, kv_heads=1, qk_norm=True, post_norm=True, tie_word_embeddings=False)
    check_equal(Olmo2ForCausalLM(Olmo2Config(**sizes_of(config))), config, 0)
