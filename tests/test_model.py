"""The network: sizes, promise 2 (packed equals alone), what changes what, first weights, Llama's logits."""

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
    places,
    some,
    times_of,
    with_all_logits,
)
from transfusion.config import ModelConfig, RopeScaling
from transfusion.model import transfusion as network
from transfusion.model.patches import patchify, timestep_embedding, unpatchify
from transfusion.model.transformer import RMSNorm
from transfusion.runs import SIZES
from transfusion.sequence import Batch, Document, Row, Text, collate, encode_document

VARIANTS = {
    "plain": TINY,
    "grouped to one": replace(TINY, kv_heads=1),
    "ungrouped, wide heads": replace(TINY, kv_heads=None, head_dim=12),
    "tie_word_embeddings": replace(TINY, tie_word_embeddings=True),
    "qk_norm": replace(TINY, qk_norm=True),
    "post_norm": replace(TINY, post_norm=True),
    "causal images": replace(TINY, image_attention="causal"),
    "scaled": replace(TINY, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
}
MODELS = {name: build(config, seed=3) for name, config in VARIANTS.items()}
variants = st.sampled_from(sorted(VARIANTS))


@torch.no_grad()
def run(model: network.Transfusion, batch: Batch, noisy: list[Tensor], t: list[Tensor]) -> network.Prediction:
    return model(batch, noisy, t)


def latents_of(batch: Batch) -> list[Tensor]:
    return [group.x0 for group in batch.groups]


# Sizes (Table 2 and Table 7)


@pytest.mark.parametrize(("name", "millions", "percent"), [
    ("0.16b", 162, 0.5), ("0.37b", 374, 0.4), ("0.76b", 778, 0.4), ("1.4b", 1364, 0.4), ("7b", 6738, 0.3),
])  # fmt: skip
def test_sizes_are_the_papers(name, millions, percent):
    with torch.device("meta"):
        model = network.Transfusion(SIZES[name])
    patches = network.count_parameters(model.patches)
    transformer = network.count_parameters(model) - patches
    assert round(transformer / 1e6) == millions
    assert round(100 * patches / transformer, 1) == percent


def test_tied_models_have_one_matrix():
    model, untied = network.build(VARIANTS["tie_word_embeddings"], 0), network.build(TINY, 0)
    is_shared = model.head is None and not any("head" in name for name in model.state_dict())
    assert is_shared
    saved = network.count_parameters(untied) - network.count_parameters(model)
    assert saved == TINY.vocab_size * TINY.width


# Promise 2


@few
@given(variants, batches(min_documents=2, min_images=1))
def test_a_packed_row_equals_its_documents_alone(variant, found):
    rows, batch = found
    model, batch = MODELS[variant], with_all_logits(in_double(batch))
    together = run(model, batch, latents_of(batch), times_of(batch))
    logits = together.logits.view(*batch.tokens.shape, -1)
    images = {  # by where their first patch lies
        int(index[0]): said
        for group, found in zip(batch.groups, together.images, strict=True)
        for index, said in zip(group.index, found, strict=True)
    }
    for b, begin, chunk in places(rows):
        single = with_all_logits(in_double(alone(chunk)))
        by_itself = run(model, single, latents_of(single), times_of(single))
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], by_itself.logits, rtol=0, atol=1e-9)
        for group, said in zip(single.groups, by_itself.images, strict=True):
            for index, one in zip(group.index, said, strict=True):
                there = images.pop(b * LENGTH + begin + int(index[0]))
                torch.testing.assert_close(there, one, rtol=0, atol=1e-9)
    assert not images


@few
@given(batches(min_images=1), st.integers(0, 2**31))
def test_logits_are_those_of_the_positions_asked_for(found, seed):
    batch = in_double(found[1])
    everything = run(MODELS["plain"], with_all_logits(batch), latents_of(batch), times_of(batch))
    asked = run(MODELS["plain"], batch, latents_of(batch), times_of(batch))
    torch.testing.assert_close(asked.logits, everything.logits[batch.text_index], rtol=0, atol=1e-12)


# What may change what


def changed(model, batch: Batch, change) -> tuple[Tensor, list[Tensor]]:
    """Where the logits (B, L), and which images (N,) per group, differ after `change(batch, noisy, t)`."""
    batch = with_all_logits(in_double(batch))
    noisy, t = latents_of(batch), times_of(batch)
    before = run(model, batch, noisy, t)
    batch, noisy, t = (
        replace(batch, tokens=batch.tokens.clone()),
        [x.clone() for x in noisy],
        [x.clone() for x in t],
    )
    change(batch, noisy, t)
    after = run(model, batch, noisy, t)
    logits = (before.logits - after.logits).abs().amax(1).view(batch.tokens.shape) > 1e-12
    images = [
        (one - other).flatten(1).abs().amax(1) > 1e-12
        for one, other in zip(before.images, after.images, strict=True)
    ]
    return logits, images


def seers(batch: Batch, b: int, keys, bidirectional: bool) -> Tensor:
    """Which positions (B, L) may see any of these positions of row b."""
    see = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    see[b] = may_see(batch.document_ids[b], batch.image_ids[b], bidirectional)[:, keys].any(1)
    return see


def images_of(batch: Batch, positions: Tensor) -> list[Tensor]:
    """Which images (N,) per group have a patch among these positions (B, L)."""
    return [positions.view(-1)[group.index].any(1) for group in batch.groups]


@few
@given(variants, batches(min_images=1), st.data())
def test_a_token_changes_what_may_see_it_and_nothing_else(variant, found, data):
    _, batch = found
    b = data.draw(st.integers(0, len(batch.tokens) - 1), label="row")
    text = ((batch.image_ids[b] < 0) & (batch.document_ids[b] >= 0)).nonzero()[:, 0].tolist()
    at = data.draw(st.sampled_from(text), label="position")

    def change(batch, noisy, t):
        batch.tokens[b, at] = (batch.tokens[b, at] + 7) % VOCABULARY.num_text_tokens

    logits, images = changed(MODELS[variant], batch, change)
    expected = seers(batch, b, [at], variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@few
@given(variants, batches(min_images=1), st.data())
def test_a_patch_changes_its_whole_image_what_follows_and_nothing_else(variant, found, data):
    _, batch = found
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip
    patch = data.draw(st.integers(0, batch.groups[g].index.shape[1] - 1), label="patch")

    def change(batch, noisy, t):
        columns = noisy[g].shape[3] // 2
        y, x = 2 * (patch // columns), 2 * (patch % columns)
        noisy[g][n, 0, y, x] += 1

    logits, images = changed(MODELS[variant], batch, change)
    b, at = divmod(int(batch.groups[g].index[n, patch]), LENGTH)
    expected = seers(batch, b, [at], variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]
    if variant != "causal images":
        assert logits.view(-1)[batch.groups[g].index[n]].all()


@few
@given(variants, batches(min_images=1), st.data())
def test_a_time_changes_its_image_what_follows_and_nothing_else(variant, found, data):
    _, batch = found
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip

    def change(batch, noisy, t):
        t[g][n] = (t[g][n] + 0.37) % 1

    logits, images = changed(MODELS[variant], batch, change)
    index = batch.groups[g].index[n]
    expected = seers(batch, int(index[0]) // LENGTH, (index % LENGTH).tolist(), variant != "causal images")
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@some
@given(st.permutations(range(4)), st.sampled_from([n for n in sorted(VARIANTS) if n != "causal images"]))
def test_the_order_of_patches_matters(order, variant):
    """A model whose patches share one position would answer permuted patches with its answer permuted."""
    document = Document((Text((1, 2)), image((4, 4), seed=5)))
    batch = in_double(alone(encode_document(document, VOCABULARY)))
    clean, t = batch.groups[0].x0, [torch.tensor([0.5], dtype=torch.float64)]

    def permute(latent):
        return unpatchify(patchify(latent, 2)[:, list(order)], (4, 4), 2)

    plain = run(MODELS[variant], batch, [clean], t).images[0]
    permuted = run(MODELS[variant], batch, [permute(clean)], t).images[0]
    difference = float((permuted - permute(plain)).abs().max() / plain.std())
    assert difference < 1e-9 if list(order) == [0, 1, 2, 3] else difference > 1e-2


@pytest.mark.parametrize(("variant", "other"), [
    ("qk_norm", "plain"), ("post_norm", "plain"), ("scaled", "plain"), ("causal images", "plain"),
])  # fmt: skip
def test_options_change_the_output(variant, other):
    document = Document((Text(tuple(range(20))), image((4, 4), seed=5), Text((3,))))
    batch = with_all_logits(in_double(alone(encode_document(document, VOCABULARY))))
    one, two = (run(MODELS[name], batch, latents_of(batch), times_of(batch)) for name in (variant, other))
    assert (one.logits - two.logits).abs().max() > 1e-3
    assert (one.images[0] - two.images[0]).abs().max() > 1e-3


# Patches


@some
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_undoes_patchify(N, C, rows, columns, p):
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


def test_time_is_described_finely_enough_to_tell_steps_apart():
    described = timestep_embedding(torch.arange(1001) / 1000)
    assert described.shape == (1001, 256)
    assert described.abs().max() <= 1
    assert (described[1:] - described[:-1]).norm(dim=1).min() > 0.1
    assert torch.equal(timestep_embedding(torch.tensor([0.25]))[0], described[250])  # each time by itself


# Starting weights


def numbers(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_starting_weights_follow_from_seed_and_name_alone(variant):
    config = VARIANTS[variant]
    expected = numbers(network.build(config, seed=5))
    torch.manual_seed(123)  # neither the process' own chance,
    assert same_weights(numbers(network.build(config, seed=5)), expected)
    backwards = network.Transfusion(config)  # nor what stood there, nor the order of parameters
    order = list(backwards.named_parameters())[::-1]
    backwards.named_parameters = lambda: iter(order)
    network.init_weights(backwards, seed=5)
    del backwards.named_parameters
    assert same_weights(numbers(backwards), expected)
    double = network.Transfusion(config).double()  # nor the precision they are kept in
    network.init_weights(double, seed=5)
    assert same_weights({name: x.float() for name, x in numbers(double).items()}, expected)


def test_starting_weights_are_all_different_and_of_any_seed():
    one, other = numbers(network.build(TINY, 0)), numbers(network.build(TINY, 1))
    random = {name: x for name, x in one.items() if x.std() > 0}
    assert all(not torch.equal(x, other[name]) for name, x in random.items())
    assert len({tuple(x.flatten()[:8].tolist()) for x in random.values()}) == len(random)
    constant = sorted(set(one) - set(random))
    assert all(
        name.endswith(("norm.weight", "bias")) or name == "patches.proj_out.weight" for name in constant
    )


def test_a_deeper_model_starts_with_the_same_first_tables():
    """A parameter's chance hangs on no other parameter: layers before it in the file do not move it."""
    one, deeper = numbers(network.build(TINY, 0)), numbers(network.build(replace(TINY, layers=4), 0))
    for name in (
        "tokens.weight",
        "head.weight",
        "patches.time.2.weight",
        "transformer.blocks.1.attention.query.weight",
    ):
        assert torch.equal(one[name], deeper[name])


def test_the_first_guess_of_the_image_head_is_zero():
    batch = alone(encode_document(Document((image((4, 4), 0),)), VOCABULARY))
    said = run(network.build(TINY, 0), batch, latents_of(batch), [torch.tensor([0.5])])
    assert torch.equal(said.images[0], torch.zeros(1, CHANNELS, 4, 4))
    assert said.logits.std() > 0.1


# Gradients


@some
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 9),
    st.floats(1e-6, 1),
    st.floats(0, 5),
    st.integers(0, 99),
)
def test_norms_are_torchs_forward_and_backward(shape, width, eps, size, seed):
    """Ours writes its gradient out; it is used only where there is one to compute."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, *shape, width, generator=generator, dtype=torch.float64)
    ours, plain = RMSNorm(width, eps).double(), torch.nn.RMSNorm(width, eps).double()
    with torch.no_grad():
        for norm in (ours, plain):
            norm.weight.copy_(torch.linspace(0.5, 2, width))
    found = []
    for norm in (ours, plain):
        inward = (size * x).requires_grad_()
        out = norm(inward)
        out.backward(gradient)
        found.append((out.detach(), inward.grad, norm.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(size * x), found[0][0], rtol=1e-12, atol=1e-12)


@few
@given(variants, batches(min_images=1))
def test_training_sees_the_outputs_that_generating_sees(variant, found):
    batch = with_all_logits(in_double(found[1]))
    inputs = batch, latents_of(batch), times_of(batch)
    plain, with_gradient = run(MODELS[variant], *inputs), MODELS[variant](*inputs)
    torch.testing.assert_close(with_gradient.logits.detach(), plain.logits, rtol=0, atol=1e-10)
    for one, other in zip(with_gradient.images, plain.images, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_lower_precision_gives_nearly_the_same(variant):
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5))))
    batch, model = alone(encode_document(document, VOCABULARY)), build(VARIANTS[variant], seed=1, dtype=torch.float32)
    inputs = batch, latents_of(batch), [torch.tensor([0.5])]
    exact = run(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    (rough.logits.float().sum() + rough.images[0].float().sum()).backward()
    for one, other in ((rough.logits, exact.logits), (rough.images[0], exact.images[0])):
        assert (one.detach().float() - other).std() < 0.05 * other.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def unused(batch: Batch, variant: str) -> tuple[set[str], set[str]]:
    """Which parameters a step on this batch leaves without a gradient, and with one of only zeros."""
    model = build(VARIANTS[variant], seed=1)
    batch = in_double(batch)
    said = model(batch, latents_of(batch), times_of(batch))
    (said.logits.logsumexp(1).sum() + sum(x.square().sum() for x in said.images)).backward()
    none = {name for name, p in model.named_parameters() if p.grad is None}
    return none, {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_text_and_images_together_use_every_parameter(variant):
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5)), image((2, 6), 1)))
    assert unused(alone(encode_document(document, VOCABULARY)), variant) == (set(), set())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_text_alone_gives_only_the_patch_layers_a_gradient_of_zero(variant):
    """And not none at all: with many processes each weight's gradients are added up."""
    none, zero = unused(alone(encode_document(Document((Text((1, 2, 3)),)), VOCABULARY)), variant)
    names = {name for name, _ in MODELS[variant].named_parameters()}
    assert zero == {name for name in names if name.startswith("patches.")}
    assert not none


def test_images_alone_leave_only_the_vocabulary_without_a_gradient():
    document = Document((image((4, 4), 0, loss=False), Text((), loss=False)))
    batch = alone(encode_document(document, VOCABULARY))
    assert batch.text_count == 0
    assert unused(batch, "plain") == (set(), {"head.weight"})


def test_a_batch_of_empty_rows_runs():
    batch = collate([Row(())], 8, VOCABULARY)
    assert run(MODELS["plain"], batch, [], []).logits.shape == (0, TINY.vocab_size)


# Promise 11: other people's decoders


def copy_weights(theirs, config: ModelConfig) -> network.Transfusion:
    """Ours with the weights of a transformers decoder: q, k, v in one matrix, gate and up in another."""
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
    renamed = {
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
    renamed |= dict(zip(norms, ("attention_norm", "feed_forward_norm"), strict=True))
    for n in range(layers):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in weights.items() if f".layers.{n}." in k}
        for theirs, ours in renamed.items():
            if f"{theirs}.weight" in layer:
                yield f"transformer.blocks.{n}.{ours}.weight", layer[f"{theirs}.weight"]


def sizes_of(config: ModelConfig) -> dict:
    """Our config in transformers' words."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_frequency_factor,
            "high_freq_factor": s.high_frequency_factor,
            "original_max_position_embeddings": s.original_length,
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
    """Packed rows of texts: our logits of each document are theirs."""
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
        places([Row(tuple(chunks[:2])), Row(tuple(chunks[2:]))]), lengths, strict=True
    ):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(chunk.tokens)[None]).logits[0]
        assert expected.std() > 0.1  # logits that say something
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], expected, rtol=0, atol=1e-4)


@st.composite
def decoders(draw):
    """Small decoders of any shape."""
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
        latent_channels=CHANNELS,
    )  # fmt: skip


@few
@given(decoders(), st.integers(0, 2**31))
def test_a_llamas_weights_give_its_logits(config, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    check_equal(LlamaForCausalLM(LlamaConfig(**sizes_of(config))), config, seed)


@few
@given(decoders(), st.integers(0, 2**31))
def test_qk_norm_is_that_of_qwen3(config, seed):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = replace(config, qk_norm=True)
    check_equal(Qwen3ForCausalLM(Qwen3Config(**sizes_of(config))), config, seed)


def test_post_norm_is_that_of_olmo2():
    """Theirs normalises queries and keys over all heads at once: the same as ours where there is one head."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = replace(TINY, heads=1, kv_heads=1, qk_norm=True, post_norm=True, tie_word_embeddings=False)
    check_equal(Olmo2ForCausalLM(Olmo2Config(**sizes_of(config))), config, 0)
