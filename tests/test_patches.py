"""The patch layers, linear and U-Net: sizes, dependencies, cached equals uncached, FLOPs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.documents import (
    CHANNELS,
    LENGTH,
    TINY,
    VOCABULARY,
    alone,
    batches,
    build,
    image,
    in_double,
    positioned_chunks,
    times_of,
    with_all_logits,
)
from tests.profile import examples
from tests.test_model import attending, changed_outputs, copy_parameters, images_of, latents_of, run, same_weights
from tests.tiny import Latents, begin_run, build_engine, picture, prompt_segments, run_tensors, save, small_run, uncached
from transfusion.config import ModelConfig, from_json, to_json
from transfusion.inference import image_mode, text_mode
from transfusion.inference.engine import Request, open_run
from transfusion.model import flops
from transfusion.model import transfusion as network
from transfusion.model.conv import Downsample, PixelAttention, ResidualBlock, Upsample, group_norm, to_grid, to_sequence
from transfusion.model.patches import TIME_FEATURES, patchify
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.optimizer import build_optimizer

few = examples(12, quick=6)
some = examples(40, quick=15)

PATCH_SIZES = (1, 2, 4, 8)
KINDS = ("linear", "unet")
UNET = replace(TINY, patches="unet", unet_width=16)
VARIANTS = [(kind, p) for kind in KINDS for p in PATCH_SIZES]


def config_of(kind: str, p: int) -> ModelConfig:
    return replace(TINY, patches=kind, patch_size=p, unet_width=8 * p)


MODELS = {variant: build(config_of(*variant), seed=4) for variant in VARIANTS}
UNET_MODEL = build(UNET, seed=5)
variants = st.sampled_from(VARIANTS)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from((torch.float32, torch.float64))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Sizes (Table 7)


@pytest.mark.parametrize(("name", "millions", "tolerance"), [
    ("0.16b", 172, 0.005), ("0.37b", 270, 0.035), ("0.76b", 270, 0.035), ("1.4b", 270, 0.035), ("7b", 270, 0.01),
])  # fmt: skip
def test_unet_parameter_counts_equal_the_papers(name, millions, tolerance):
    with torch.device("meta"):
        model = network.Transfusion(replace(SIZES[name], patches="unet"))
    assert network.count_parameters(model.patches) == pytest.approx(millions * 1e6, rel=tolerance)


@pytest.mark.parametrize("name", ["0.16b", "7b"])
def test_unet_parameter_count_hardly_depends_on_patch_size(name):
    counts = []
    for p in (2, 4, 8):
        with torch.device("meta"):
            counts.append(network.count_parameters(network.UNetPatches(replace(SIZES[name], patch_size=p))))
    assert max(counts) < 1.1 * min(counts)


@some
@given(st.integers(1, 5000), st.sampled_from((1, 2, 4, 8, 16)))
def test_unet_widths_double_with_every_halving_and_obey_their_limit(width, p):
    config = ModelConfig(width=width, heads=1, head_dim=2, patches="unet", patch_size=p)
    widths = config.unet_widths
    assert len(widths) == 1 + math.log2(p)
    assert all(2 * above == below for above, below in zip(widths, widths[1:], strict=False))
    assert widths[0] % 8 == 0 and widths[0] > 0
    assert widths[-1] <= max(8 * p, min(1.25 * width, 1184))
    assert widths[-1] > min(1.25 * width, 1184) - 8 * p - 1  # the widest within this limit
    assert replace(config, unet_width=16 * p).unet_widths == tuple(16 * 2**n for n in range(len(widths)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch_size": 3}, "model.patch_size must be a power of 2 with model.patches unet, not 3"),
    ({"patch_size": 12}, "not 12"),
    ({"unet_width": 24}, "multiple of 16 with patches of side 2, not 24"),
    ({"unet_width": 48, "patch_size": 4}, "multiple of 32 with patches of side 4, not 48"),
    ({"unet_width": 0}, "multiple of 16 .* not 0"),
    ({"unet_width": -16}, "multiple of 16 .* not -16"),
])  # fmt: skip
def test_invalid_unet_configs_are_refused_in_one_line(changes, message):
    linear = ModelConfig(**changes)  # linear layers have no such limit
    with pytest.raises(ValueError, match=message) as raised:
        replace(linear, patches="unet")
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        from_json(ModelConfig, to_json(linear) | {"patches": "unet"})


def test_unknown_patch_layers_are_refused():
    with pytest.raises(ValueError, match="patches must be one of linear, unet, codes, not 'convolutions'"):
        from_json(ModelConfig, to_json(TINY) | {"patches": "convolutions"})


@pytest.mark.parametrize("name", ["digits", "shapes", "small"])
def test_small_runs_have_a_small_unet(name):
    """At most about as large as the transformer, as the paper's at 0.16B."""
    config = replace(named_run(name).model, patches="unet", vocab_size=512)
    with torch.device("meta"):
        model = network.Transfusion(config)
    assert network.count_parameters(model.patches) < 1.1 * network.count_parameters(model.transformer)


# embed and unembed


@some
@given(variants, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), dtypes, seeds)
def test_embed_and_unembed_have_the_right_shapes_and_dtypes(variant, N, rows, columns, dtype, seed):
    p, patches = variant[1], MODELS[variant].patches
    x_t, t = random(N, CHANNELS, rows * p, columns * p, seed=seed, dtype=dtype), torch.rand(N).to(dtype)
    try:
        vectors, skips = patches.to(dtype).embed(x_t, t)
        prediction = patches.unembed(random(N, rows * columns, TINY.width, seed=seed + 1, dtype=dtype), skips)
    finally:
        patches.double()
    assert (vectors.shape, vectors.dtype) == ((N, rows * columns, TINY.width), dtype)
    assert (prediction.shape, prediction.dtype) == (x_t.shape, dtype)
    assert N == 0 or (vectors.std() > 0.01 and prediction.std() > 0.01)


@some
@given(variants, st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), seeds)
@torch.no_grad()
def test_batched_images_equal_single_images(variant, N, rows, columns, seed):
    p, patches = variant[1], MODELS[variant].patches
    x_t, t = random(N, CHANNELS, rows * p, columns * p, seed=seed), random(N, seed=seed + 1).sigmoid()
    hidden = random(N, rows * columns, TINY.width, seed=seed + 2)
    vectors, skips = patches.embed(x_t, t)
    prediction = patches.unembed(hidden, skips)
    for n in range(N):
        single_vectors, single_skips = patches.embed(x_t[n : n + 1], t[n : n + 1])
        torch.testing.assert_close(vectors[n], single_vectors[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(prediction[n], patches.unembed(hidden[n : n + 1], single_skips)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_do_not_influence_each_other(variant):
    """An image with values 1000 times as large would show in any shared statistic."""
    p, patches = variant[1], MODELS[variant].patches
    x_t, t, hidden = random(3, CHANNELS, 2 * p, p), torch.full((3,), 0.3, dtype=torch.float64), random(3, 2, TINY.width)
    vectors, skips = patches.embed(x_t, t)
    prediction = patches.unembed(hidden, skips)
    x_t[1] *= 1000
    t[1], hidden[1] = 0.9, 5
    new_vectors, skips = patches.embed(x_t, t)
    has_changed = [
        (old - new).flatten(1).any(1).tolist()
        for old, new in ((vectors, new_vectors), (prediction, patches.unembed(hidden, skips)))
    ]
    assert has_changed == [[False, True, False]] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_patch_vectors_are_in_row_order(variant):
    """Without attention and group norms, vectors and outputs depend only on the same patch and adjacent ones."""
    p, patches = variant[1], build(config_of(*variant), seed=4).patches
    for block in patches.modules():
        if isinstance(block, ResidualBlock | PixelAttention):
            nn.init.zeros_(block.out.weight)
    patches.proj_out_norm = nn.Identity()
    x_t = random(1, CHANNELS, 3 * p, 5 * p, seed=8).requires_grad_()
    hidden = random(1, 15, TINY.width, seed=9).requires_grad_()
    vectors, skips = patches.embed(x_t, torch.tensor([0.4], dtype=torch.float64))
    prediction = patchify(patches.unembed(hidden, skips), p)[0]  # (P, C * p * p)
    for n in range(15):
        (latent_grad,) = torch.autograd.grad(vectors[0, n] @ random(TINY.width), x_t, retain_graph=True)
        (hidden_grad,) = torch.autograd.grad(prediction[n] @ random(prediction.shape[1]), hidden, retain_graph=True)
        adjacent = {m for m in range(15) if abs(m // 5 - n // 5) <= 1 and abs(m % 5 - n % 5) <= 1}
        for gradient in (patchify(latent_grad, p)[0], hidden_grad[0]):  # (P, ...)
            sources = set(gradient.abs().amax(1).nonzero()[:, 0].tolist())
            assert sources == {n} if variant[0] == "linear" else {n} < sources <= adjacent


@some
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_to_sequence_equals_patchify_with_patch_size_1(N, C, Y, X):
    latent = torch.arange(N * C * Y * X, dtype=torch.float32).view(N, C, Y, X)
    pixels = to_sequence(latent).contiguous()
    assert torch.equal(pixels, patchify(latent, 1))
    assert torch.equal(to_grid(pixels, (Y, X)), latent)
    assert to_grid(pixels, (Y, X)).is_contiguous()  # else PyTorch crashes, see `to_grid`


# The U-Net


def time_layers(patches: nn.Module) -> dict[str, nn.Module]:
    """The time layer of each residual block, by the name of the block."""
    return {name: block.time for name, block in patches.named_modules() if isinstance(block, ResidualBlock)}


@pytest.mark.parametrize("p", PATCH_SIZES)
@torch.no_grad()
def test_t_enters_every_residual_block(p):
    x_t, hidden = random(2, CHANNELS, 2 * p, p), random(2, 2, TINY.width)
    x_t[1], hidden[1] = x_t[0], hidden[0]
    t = torch.tensor([0.1, 0.8], dtype=torch.float64)

    def t_changes(*enabled: str) -> tuple[bool, bool]:
        """Does t change the vectors, and the prediction, when only these blocks have time features?"""
        patches = build(config_of("unet", p), seed=4).patches
        for name, layer in time_layers(patches).items():
            if name not in enabled:
                layer.weight.zero_()
        vectors, skips = patches.embed(x_t, t)
        prediction = patches.unembed(hidden, skips)
        return bool((vectors[0] != vectors[1]).any()), bool((prediction[0] != prediction[1]).any())

    names = time_layers(MODELS["unet", p].patches)
    levels = 1 + math.log2(p)
    assert sum(name.startswith("down.") for name in names) == 2 * levels
    assert sum(name.startswith("up.") for name in names) == 3 * levels
    assert t_changes() == (False, False)
    for name in names:
        assert t_changes(name) == (name.startswith("down."), True)


@pytest.mark.parametrize("p", PATCH_SIZES)
@torch.no_grad()
def test_every_skip_connection_is_used_once(p):
    patches = MODELS["unet", p].patches
    x_t, hidden = random(1, CHANNELS, 2 * p, p), random(1, 2, TINY.width)
    _, skips = patches.embed(x_t, torch.tensor([0.4], dtype=torch.float64))
    prediction = patches.unembed(hidden, skips)
    assert torch.equal(patches.unembed(hidden, skips), prediction)  # the skips can be used again
    assert len(skips.tensors) == 3 * (1 + math.log2(p))
    for n, skip in enumerate(skips.tensors):
        changed_skips = replace(skips, tensors=[*skips.tensors[:n], skip + 1, *skips.tensors[n + 1 :]])
        assert (patches.unembed(hidden, changed_skips) - prediction).abs().max() > 1e-6
    with pytest.raises(StopIteration):
        patches.unembed(hidden, replace(skips, tensors=skips.tensors[1:]))


@pytest.mark.parametrize("p", PATCH_SIZES)
def test_unet_attention_is_at_the_lowest_resolution(p):
    patches = MODELS["unet", p].patches
    layers = [module for module in patches.modules() if isinstance(module, PixelAttention)]
    assert {module.query.in_features for module in layers} == {config_of("unet", p).unet_widths[-1]}
    for half, count in ((patches.down, 1), (patches.up, 2)):
        assert sum(isinstance(module, PixelAttention) for module in half.modules()) == count


@torch.no_grad()
def test_pixel_attention_is_bidirectional_inside_one_image():
    attention = PixelAttention(16).double()
    attention.norm = nn.Identity()  # the norm mixes pixels too
    x = random(2, 16, 3, 5)
    changed = x.clone()
    changed[0, :, 2, 4] += torch.arange(16)
    has_changed = (attention(changed) - attention(x)).abs().amax(1) > 1e-9
    assert has_changed[0].all()
    assert not has_changed[1].any()


def test_transformer_mask_does_not_apply_in_the_unet():
    """With causal images (Table 5) the first patch still depends on the last one, through the U-Net."""
    document = Document((Text((1, 2)), image((4, 4), seed=5), Text((3, 4))))
    batch = alone(encode_document(document, VOCABULARY))
    first, last = batch.groups[0].index[0, 0].item(), batch.groups[0].index[0, -1].item()

    def change(batch, x_t, t):
        x_t[0][0, 0, 3, 3] += 1

    for kind, depends in (("linear", False), ("unet", True)):
        model = build(replace(UNET, patches=kind, image_attention="causal"), seed=3)
        logits, _ = changed_outputs(model, batch, change)
        assert logits[0, last]
        assert logits[0, first].item() == depends
        assert not logits[0, :first].any()


def test_convolution_blocks_work_without_time():
    """The autoencoder uses the same blocks."""
    x = random(2, 24, 4, 6, dtype=torch.float32)
    plain, timed = ResidualBlock(24, 40), ResidualBlock(24, 40, 12)
    assert {name for name, _ in timed.named_parameters()} - {name for name, _ in plain.named_parameters()} == {"time.weight"}
    assert plain(x).shape == timed(x, random(2, 12, dtype=torch.float32)).shape == (2, 40, 4, 6)
    assert Downsample(24)(x).shape == (2, 24, 2, 3)
    assert Downsample(24, 8)(x).shape == (2, 8, 2, 3)
    assert Upsample(24)(x).shape == (2, 24, 8, 12)
    assert Upsample(24, 8)(x).shape == (2, 8, 8, 12)
    assert PixelAttention(24)(x).shape == x.shape


@some
@given(st.integers(1, 3000))
def test_group_norm_has_the_largest_possible_number_of_groups(width):
    groups = group_norm(width).num_groups
    assert width % groups == 0
    assert groups <= 32
    assert groups == 1 or width // groups >= 8
    assert groups == 32 or width % (2 * groups) or width // (2 * groups) < 8


# In the model: packed equals alone, dependencies


@few
@given(batches(min_documents=2, min_images=2))
def test_packed_row_equals_its_documents_alone(packed):
    rows, batch = packed
    batch = with_all_logits(in_double(batch))
    prediction = run(UNET_MODEL, batch, latents_of(batch), times_of(batch))
    logits = prediction.logits.view(*batch.tokens.shape, -1)
    images = {int(index[0]): image_prediction
              for group, image_predictions in zip(batch.groups, prediction.images, strict=True)
              for index, image_prediction in zip(group.index, image_predictions, strict=True)}  # fmt: skip
    for b, begin, chunk in positioned_chunks(rows):
        single = with_all_logits(in_double(alone(chunk)))
        expected = run(UNET_MODEL, single, latents_of(single), times_of(single))
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], expected.logits, rtol=0, atol=1e-9)
        for group, image_predictions in zip(single.groups, expected.images, strict=True):
            for index, image_prediction in zip(group.index, image_predictions, strict=True):
                in_row = images.pop(b * LENGTH + begin + int(index[0]))
                torch.testing.assert_close(in_row, image_prediction, rtol=0, atol=1e-9)
    assert not images


@few
@given(batches(min_images=2), st.booleans(), st.data())
def test_image_and_t_change_only_positions_that_attend_to_it(packed, change_x_t, data):
    _, batch = packed
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip

    def change(batch, x_t, t):
        if change_x_t:
            x_t[g][n, 0, 1, 1] += 1
        else:
            t[g][n] = (t[g][n] + 0.37) % 1

    logits, images = changed_outputs(UNET_MODEL, batch, change)
    index = batch.groups[g].index[n]
    expected = attending(batch, int(index[0]) // LENGTH, (index % LENGTH).tolist(), True)
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@pytest.mark.parametrize("p", PATCH_SIZES)
def test_images_of_several_shapes_in_one_batch_equal_single_images(p):
    """Images are not padded to a common shape."""
    shapes = [(p, p), (2 * p, 3 * p), (3 * p, 2 * p)]
    vocabulary = Vocabulary.build(num_text_tokens=50, shapes=shapes, patch_size=p)
    model = build(replace(config_of("unet", p), vocab_size=vocabulary.size), seed=6)
    chunks = [encode_document(Document((Text((n, 2)), image(shape, n), Text((3,))), key=n), vocabulary)
            for n, shape in enumerate([*shapes, *shapes])]  # fmt: skip
    batch = in_double(collate([Row(tuple(chunks[:3])), Row(tuple(chunks[3:]))], 48, vocabulary))
    assert [group.x0.shape[2:] for group in batch.groups] == sorted(shapes)
    prediction = run(model, batch, latents_of(batch), times_of(batch))
    for group, image_predictions in zip(batch.groups, prediction.images, strict=True):
        assert image_predictions.shape == (2, CHANNELS, *group.x0.shape[2:])
    for n, chunk in enumerate(chunks):
        single = in_double(collate([Row((chunk,))], len(chunk), vocabulary))
        (expected,) = run(model, single, latents_of(single), times_of(single)).images
        group_number = sorted(shapes).index(shapes[n % 3])
        torch.testing.assert_close(prediction.images[group_number][n // 3], expected[0], rtol=0, atol=1e-9)


def test_batch_without_images_gives_the_unet_zero_gradients():
    """Not missing gradients: ranks with images wait for those without."""
    batch = alone(encode_document(Document((Text((1, 2, 3)),)), VOCABULARY))
    model = build(UNET, seed=1)
    model(batch, [], []).logits.logsumexp(1).sum().backward()
    assert {name for name, p in model.named_parameters() if not p.grad.any()} == {
        name for name, _ in model.named_parameters() if name.startswith("patches.")
    }


# Cached equals uncached


pictures = st.builds(picture, st.sampled_from(((4, 4), (2, 6), (2, 2))), seeds)
prompts = st.lists(st.text("ab é", max_size=5) | pictures, min_size=1, max_size=3)


@pytest.mark.parametrize("model_options", [{}, {"image_attention": "causal", "kv_heads": 2}])
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.sampled_from(((4, 4), (2, 6), (2, 2))), st.data())
def test_prediction_after_a_cached_prefix_equals_the_uncached_one(model_options, prompt_list, shape, data):
    engine = build_engine(patches="unet", unet_width=16, **model_options)
    slots, x_t, times, expected = [], [], [], []
    for parts in prompt_list:
        slots.append(engine.cache.acquire())
        segments = prompt_segments(parts)
        prompt = encode_document(Document(segments), engine.vocabulary, add_eos=False)
        (logits,) = text_mode.extend_cache(engine.model, engine.cache, slots[-1:], [prompt], engine.vocabulary)
        torch.testing.assert_close(logits, uncached(engine, segments)[0][-1], rtol=0, atol=1e-5)
        boi = encode_document(Document(()), engine.vocabulary, add_eos=False).append(engine.vocabulary.boi[shape]).part(1)
        text_mode.extend_cache(engine.model, engine.cache, slots[-1:], [boi], engine.vocabulary)
        x_t.append(torch.from_numpy(Latents().encode(picture(shape, data.draw(seeds)))))
        times.append(data.draw(st.floats(0, 1)))
        expected.append(uncached(engine, [*segments, Image(x_t[-1].numpy())], times[-1])[1])
    for _ in range(2):  # a denoising step changes nothing in the cache
        prediction = image_mode.predict(engine.model, engine.cache, slots, torch.stack(x_t), torch.tensor(times))
        torch.testing.assert_close(prediction, torch.stack(expected), rtol=0, atol=1e-5)


@few
@given(prompts, seeds)
def test_predictions_while_drawing_equal_uncached_ones(parts, seed):
    engine = build_engine(patches="unet", unet_width=16)
    engine.generate([Request(tuple(parts), num_images=2, seed=seed)])
    calls = [call for call in engine.model.calls if call.kind.startswith("draw")]
    assert len(calls) == engine.run.generation.steps
    for call in calls:
        for row, prefix in enumerate((parts, parts, (), ())):  # two samples, each with the prompt and without
            image_ = Image(call.x_t[0][row].numpy())
            _, prediction = uncached(engine, [*prompt_segments(prefix), image_], call.t[0][row].item())
            torch.testing.assert_close(call.prediction.images[0][row], prediction, rtol=0, atol=1e-5)


def test_unet_run_is_saved_opened_and_draws(tmp_path):
    base = small_run()
    run = replace(base, model=replace(base.model, patches="unet", unet_width=16))
    saved_run = begin_run(tmp_path, run)
    tensors = run_tensors(saved_run, 1)
    save(tmp_path, 1, tensors, {"step": 1}, keep=1)
    opened = open_run(tmp_path, device="cpu")
    assert opened.run == saved_run
    assert same_weights(copy_parameters(opened.model), tensors["ema"])
    answers = opened.generate([Request(("three",), 2)])[0]
    first, second = (answer.parts[0] for answer in answers)
    assert first.shape == second.shape == (8, 8, 1)
    assert not np.array_equal(first, second)


# Starting weights and gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_starting_weights_depend_only_on_seed_and_name(variant):
    config = config_of(*variant)
    expected = copy_parameters(network.build(config, seed=5))
    torch.manual_seed(123)
    double_model = network.Transfusion(config).double()
    order = list(double_model.named_parameters())[::-1]
    double_model.named_parameters = lambda: iter(order)
    network.init_weights(double_model, seed=5)
    del double_model.named_parameters
    assert same_weights({name: x.float() for name, x in copy_parameters(double_model).items()}, expected)
    other_weights = copy_parameters(network.build(config, seed=6))
    random_names = [name for name, x in expected.items() if x.std() > 0]
    assert all(not torch.equal(expected[name], other_weights[name]) for name in random_names)
    constant = expected.keys() - set(random_names)
    assert all(name.endswith(("norm.weight", "bias")) or name == "patches.proj_out.weight" for name in constant)
    assert all(torch.equal(x, torch.full_like(x, name.endswith("norm.weight"))) for name, x in expected.items()
               if name in constant)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_first_prediction_is_zero_and_activations_keep_their_variance(variant):
    p = variant[1]
    patches = network.build(replace(config_of(*variant), width=64, layers=8, unet_width=64), seed=0).patches
    vectors, skips = patches.embed(random(4, CHANNELS, 4 * p, 2 * p, dtype=torch.float32), torch.rand(4))
    assert 0.4 < vectors.std() < 2.5
    hidden = random(4, 8, 64, dtype=torch.float32)
    assert torch.equal(patches.unembed(hidden, skips), torch.zeros(4, CHANNELS, 4 * p, 2 * p))
    stds = []
    patches.proj_out.register_forward_pre_hook(lambda _, inputs: stds.append(inputs[0].std().item()))
    patches.unembed(hidden, skips)
    assert 0.4 < stds[0] < 2.5
    for name, block in patches.named_modules():  # a residual branch is small compared with its input
        if isinstance(block, ResidualBlock):
            x = random(4, block.first.in_channels, 4, 4, dtype=torch.float32)
            time = random(4, block.time.in_features, dtype=torch.float32)
            assert 0.05 < (block(x, time) - block.shortcut(x)).std() < 0.3, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_patch_parameter_gets_a_gradient(variant):
    p = variant[1]
    patches = build(config_of(*variant), seed=7).patches
    x_t = random(3, CHANNELS, 2 * p, 3 * p)
    vectors, skips = patches.embed(x_t, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    (patches.unembed(vectors.tanh(), skips) * random(*x_t.shape, seed=1)).sum().backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in patches.named_parameters()}
    assert min(sizes.values()) > 1e-9, min(sizes, key=sizes.get)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_optimizer_steps_change_every_parameter(variant):
    """The last layer starts at zero; the layers before it must still be trained."""
    p = variant[1]
    patches = network.build(config_of(*variant), seed=0).patches
    before = copy_parameters(patches)
    optimizer = torch.optim.Adam(patches.parameters(), lr=1e-3)
    target = random(2, CHANNELS, 2 * p, 2 * p, dtype=torch.float32)
    losses = []
    for _ in range(2):
        vectors, skips = patches.embed(target, torch.tensor([0.2, 0.7]))
        loss = (patches.unembed(vectors, skips) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert not [name for name, x in patches.named_parameters() if torch.equal(x, before[name])]


def test_bfloat16_outputs_are_close_to_float32():
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5))))
    batch, model = alone(encode_document(document, VOCABULARY)), build(UNET, seed=1, dtype=torch.float32)
    inputs = batch, latents_of(batch), [torch.tensor([0.5])]
    exact = run(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        lower = model(*inputs)
    (lower.logits.float().sum() + lower.images[0].float().sum()).backward()
    for actual, expected in ((lower.logits, exact.logits), (lower.images[0], exact.images[0])):
        assert (actual.detach().float() - expected).std() < 0.05 * expected.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_only_weight_matrices_and_kernels_decay():
    model = network.build(UNET, seed=0)
    decayed, others = build_optimizer(model, named_run("shapes").training).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(x)].rsplit(".")[-1] for x in decayed["params"]} == {"weight"}
    assert all(names[id(x)].endswith(("norm.weight", "bias")) for x in others["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert sum(x.dim() == 4 for x in decayed["params"]) > 15


# FLOPs


@pytest.mark.parametrize("variant", VARIANTS)
@examples(5, quick=2)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_counted_flops_equal_pytorchs(variant, rows, columns, first, second):
    """Forward exactly; backward without the gradients of the inputs (latents and t), which are not computed."""
    p, config = variant[1], config_of(*variant)
    shape, other_shape = (rows * p, columns * p), (columns * p, (rows + 1) * p)
    vocabulary = Vocabulary.build(num_text_tokens=50, shapes=[shape, other_shape], patch_size=p)
    config = replace(config, vocab_size=vocabulary.size)
    images = [image(shape, n) for n in range(first)] + [image(other_shape, n) for n in range(second)]
    chunk = encode_document(Document((Text((1, 2)), *images)), vocabulary)
    batch = in_double(collate([Row((chunk,))], len(chunk), vocabulary))
    model = build(config)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        prediction = model(batch, latents_of(batch), times_of(batch))
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        (prediction.logits.sum() + sum(x.sum() for x in prediction.images)).backward()

    L, heads = len(chunk), config.heads * config.head_size
    pairs = network.packed_mask(batch.document_ids, batch.image_ids).count_pairs(batch.document_ids >= 0)
    masked = 4 * heads * config.layers * (L * L - pairs)  # PyTorch computes and counts masked pairs too
    counted = flops.count_training_flops(batch, config)
    assert forward.get_total_flops() == counted / 3 + masked
    pixels = first * math.prod(shape) + second * math.prod(other_shape)
    if variant[0] == "linear":
        input_macs = len(images) * TIME_FEATURES * config.width + pixels * CHANNELS * config.width
    else:
        first_width, *_, lowest = (config.unet_widths * 2)[: 2 * len(config.unet_widths)]
        input_macs = len(images) * 2 * TIME_FEATURES * lowest + pixels * 9 * CHANNELS * first_width
    assert backward.get_total_flops() == 2 * counted / 3 + 2 * masked - 2 * input_macs


def test_unet_of_the_7b_model_costs_about_a_tenth():
    """Its share of the transformer's forward pass over one image of 256 patches. The linear layers cost below 0.1 %."""
    config = SIZES["7b"]
    unet = flops.count_patch_macs(replace(config, patches="unet"), (32, 32))
    transformer = 258 * config.layers * flops.count_block_weights(config)
    assert flops.count_patch_macs(config, (32, 32)) < 0.001 * transformer
    assert 0.03 < unet / transformer < 0.15
