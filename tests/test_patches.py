"""The ways in and out of the transformer, linear and U-Net: sizes, who sees whom, cached equals uncached, what it costs."""

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
    places,
    times_of,
    with_all_logits,
)
from tests.profile import examples
from tests.test_model import changed, images_of, latents_of, numbers, run, same_weights, seers
from tests.tiny import begin_run, engine, picture, prompt_segments, run_tensors, save, small_run, uncached
from transfusion.config import ModelConfig, from_json, to_json
from transfusion.inference import image_mode, text_mode
from transfusion.inference.engine import Request, open_run
from transfusion.model import flops
from transfusion.model import transfusion as network
from transfusion.model.conv import Downsample, PixelAttention, ResidualBlock, Upsample, group_norm, to_grid, to_list
from transfusion.model.patches import FREQUENCIES, patchify
from transfusion.runs import SIZES, named_run
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.training.optimizer import build_optimizer

few = examples(12, quick=6)
some = examples(40, quick=15)

PATCH_SIZES = (1, 2, 4, 8)
KINDS = ("linear", "unet")
UNET = replace(TINY, patches="unet", unet_width=16)
WAYS = [(kind, p) for kind in KINDS for p in PATCH_SIZES]


def config_of(kind: str, p: int) -> ModelConfig:
    return replace(TINY, patches=kind, patch_size=p, unet_width=8 * p)


MODELS = {way: build(config_of(*way), seed=4) for way in WAYS}
TOGETHER = build(UNET, seed=5)
ways = st.sampled_from(WAYS)
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Sizes (Table 7)


@pytest.mark.parametrize(("name", "millions", "tolerance"), [
    ("0.16b", 172, 0.005), ("0.37b", 270, 0.035), ("0.76b", 270, 0.035), ("1.4b", 270, 0.035), ("7b", 270, 0.01),
])  # fmt: skip
def test_the_u_net_adds_as_many_parameters_as_the_papers(name, millions, tolerance):
    with torch.device("meta"):
        model = network.Transfusion(replace(SIZES[name], patches="unet"))
    assert network.count_parameters(model.patches) == pytest.approx(millions * 1e6, rel=tolerance)


@pytest.mark.parametrize("name", ["0.16b", "7b"])
def test_the_u_net_hardly_grows_with_the_patch_size(name):
    found = []
    for p in (2, 4, 8):
        with torch.device("meta"):
            found.append(network.count_parameters(network.UNetPatches(replace(SIZES[name], patch_size=p))))
    assert max(found) < 1.1 * min(found)


@some
@given(st.integers(1, 5000), st.sampled_from((1, 2, 4, 8, 16)))
def test_widths_double_with_every_halving_and_are_never_wider_than_asked(width, p):
    config = ModelConfig(width=width, heads=1, head_dim=2, patches="unet", patch_size=p)
    widths = config.unet_widths
    assert len(widths) == 1 + math.log2(p)
    assert all(2 * above == below for above, below in zip(widths, widths[1:], strict=False))
    assert widths[0] % 8 == 0 and widths[0] > 0
    assert widths[-1] <= max(8 * p, min(1.25 * width, 1184))
    assert widths[-1] > min(1.25 * width, 1184) - 8 * p - 1  # and as wide as that allows
    assert replace(config, unet_width=16 * p).unet_widths == tuple(16 * 2**n for n in range(len(widths)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch_size": 3}, "model.patch_size must be 1, 2, 4, 8 ..., not 3"),
    ({"patch_size": 12}, "not 12"),
    ({"unet_width": 24}, "multiple of 16 with patches of side 2, not 24"),
    ({"unet_width": 48, "patch_size": 4}, "multiple of 32 with patches of side 4, not 48"),
    ({"unet_width": 0}, "multiple of 16 .* not 0"),
    ({"unet_width": -16}, "multiple of 16 .* not -16"),
])  # fmt: skip
def test_a_u_net_that_cannot_be_is_refused_in_one_line(changes, message):
    linear = ModelConfig(**changes)  # which needs none of it
    with pytest.raises(ValueError, match=message) as raised:
        replace(linear, patches="unet")
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        from_json(ModelConfig, to_json(linear) | {"patches": "unet"})


def test_a_kind_of_patches_that_is_none_is_refused():
    with pytest.raises(ValueError, match="patches must be one of linear, unet, codes, not 'convolutions'"):
        from_json(ModelConfig, to_json(TINY) | {"patches": "convolutions"})


@pytest.mark.parametrize("name", ["digits", "shapes", "small"])
def test_the_small_runs_have_a_small_u_net(name):
    """Not one that takes most of the time: at most about as large as the transformer, as the paper's is at 0.16b."""
    config = replace(named_run(name).model, patches="unet", vocab_size=512)
    with torch.device("meta"):
        model = network.Transfusion(config)
    assert network.count_parameters(model.patches) < 1.1 * network.count_parameters(model.transformer)


# In and out


@some
@given(ways, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from((torch.float32, torch.float64)), seeds)
def test_latents_become_one_vector_per_patch_and_vectors_a_latent(way, N, rows, columns, dtype, seed):
    p, patches = way[1], MODELS[way].patches
    noisy, t = random(N, CHANNELS, rows * p, columns * p, seed=seed, dtype=dtype), torch.rand(N).to(dtype)
    try:
        vectors, carried = patches.to(dtype).embed(noisy, t)
        said = patches.unembed(random(N, rows * columns, TINY.width, seed=seed + 1, dtype=dtype), carried)
    finally:
        patches.double()
    assert (vectors.shape, vectors.dtype) == ((N, rows * columns, TINY.width), dtype)
    assert (said.shape, said.dtype) == (noisy.shape, dtype)
    assert N == 0 or (vectors.std() > 0.01 and said.std() > 0.01)


@some
@given(ways, st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), seeds)
@torch.no_grad()
def test_images_in_one_call_are_each_as_they_are_alone(way, N, rows, columns, seed):
    p, patches = way[1], MODELS[way].patches
    noisy, t = random(N, CHANNELS, rows * p, columns * p, seed=seed), random(N, seed=seed + 1).sigmoid()
    hidden = random(N, rows * columns, TINY.width, seed=seed + 2)
    vectors, carried = patches.embed(noisy, t)
    said = patches.unembed(hidden, carried)
    for n in range(N):
        mine, kept = patches.embed(noisy[n : n + 1], t[n : n + 1])
        torch.testing.assert_close(vectors[n], mine[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(said[n], patches.unembed(hidden[n : n + 1], kept)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_no_image_moves_another_by_a_single_bit(way):
    """An image that is 1000 times as bright would show in any statistic that images share."""
    p, patches = way[1], MODELS[way].patches
    noisy, t, hidden = random(3, CHANNELS, 2 * p, p), torch.full((3,), 0.3, dtype=torch.float64), random(3, 2, TINY.width)
    before, kept = patches.embed(noisy, t)
    said = patches.unembed(hidden, kept)
    noisy[1] *= 1000
    t[1], hidden[1] = 0.9, 5
    after, kept = patches.embed(noisy, t)
    moved = [(one - other).flatten(1).any(1).tolist()
             for one, other in ((before, after), (said, patches.unembed(hidden, kept)))]  # fmt: skip
    assert moved == [[False, True, False]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_vectors_stand_in_reading_order_and_come_back_to_their_places(way):
    """Without what mixes the whole image, a vector is made of its patch and those that touch it, and goes back there."""
    p, patches = way[1], build(config_of(*way), seed=4).patches
    for block in patches.modules():
        if isinstance(block, ResidualBlock | PixelAttention):
            nn.init.zeros_(block.out.weight)
    patches.proj_out_norm = nn.Identity()
    noisy = random(1, CHANNELS, 3 * p, 5 * p, seed=8).requires_grad_()
    hidden = random(1, 15, TINY.width, seed=9).requires_grad_()
    vectors, carried = patches.embed(noisy, torch.tensor([0.4], dtype=torch.float64))
    said = patchify(patches.unembed(hidden, carried), p)[0]  # (P, C * p * p)
    for n in range(15):
        (seen,) = torch.autograd.grad(vectors[0, n] @ random(TINY.width), noisy, retain_graph=True)
        (origin,) = torch.autograd.grad(said[n] @ random(said.shape[1]), hidden, retain_graph=True)
        touching = {m for m in range(15) if abs(m // 5 - n // 5) <= 1 and abs(m % 5 - n % 5) <= 1}
        for gradient in (patchify(seen, p)[0], origin[0]):  # (P, ...)
            found = set(gradient.abs().amax(1).nonzero()[:, 0].tolist())
            assert found == {n} if way[0] == "linear" else {n} < found <= touching


@some
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_a_list_of_pixels_is_patches_of_side_one(N, C, Y, X):
    latent = torch.arange(N * C * Y * X, dtype=torch.float32).view(N, C, Y, X)
    pixels = to_list(latent).contiguous()
    assert torch.equal(pixels, patchify(latent, 1))
    assert torch.equal(to_grid(pixels, (Y, X)), latent)
    assert to_grid(pixels, (Y, X)).is_contiguous()  # else PyTorch crashes, see there


# What is in a U-Net


def every_time_layer(patches: nn.Module) -> dict[str, nn.Module]:
    """By name: whatever adds the time to a residual block."""
    return {name: block.time for name, block in patches.named_modules() if isinstance(block, ResidualBlock)}


@pytest.mark.parametrize("p", PATCH_SIZES)
@torch.no_grad()
def test_time_enters_every_residual_block_of_both_halves(p):
    noisy, hidden = random(2, CHANNELS, 2 * p, p), random(2, 2, TINY.width)
    noisy[1], hidden[1] = noisy[0], hidden[0]
    t = torch.tensor([0.1, 0.8], dtype=torch.float64)

    def differs(*kept: str) -> tuple[bool, bool]:
        """Whether t shows in the vectors and in the prediction, when only these blocks are told of it."""
        patches = build(config_of("unet", p), seed=4).patches
        for name, layer in every_time_layer(patches).items():
            if name not in kept:
                layer.weight.zero_()
        vectors, carried = patches.embed(noisy, t)
        said = patches.unembed(hidden, carried)
        return bool((vectors[0] != vectors[1]).any()), bool((said[0] != said[1]).any())

    names = every_time_layer(MODELS["unet", p].patches)
    levels = 1 + math.log2(p)
    assert sum(name.startswith("down.") for name in names) == 2 * levels
    assert sum(name.startswith("up.") for name in names) == 3 * levels
    assert differs() == (False, False)
    for name in names:
        assert differs(name) == (name.startswith("down."), True)


@pytest.mark.parametrize("p", PATCH_SIZES)
@torch.no_grad()
def test_every_skip_connection_is_used_once(p):
    patches = MODELS["unet", p].patches
    noisy, hidden = random(1, CHANNELS, 2 * p, p), random(1, 2, TINY.width)
    _, carried = patches.embed(noisy, torch.tensor([0.4], dtype=torch.float64))
    said = patches.unembed(hidden, carried)
    assert torch.equal(patches.unembed(hidden, carried), said)  # what is carried is not used up
    assert len(carried.skips) == 3 * (1 + math.log2(p))
    for n, skip in enumerate(carried.skips):
        one_less = replace(carried, skips=[*carried.skips[:n], skip + 1, *carried.skips[n + 1 :]])
        assert (patches.unembed(hidden, one_less) - said).abs().max() > 1e-6
    with pytest.raises(StopIteration):
        patches.unembed(hidden, replace(carried, skips=carried.skips[1:]))


@pytest.mark.parametrize("p", PATCH_SIZES)
def test_attention_inside_an_image_is_bidirectional_and_at_the_lowest_resolution(p):
    patches = MODELS["unet", p].patches
    found = [module for module in patches.modules() if isinstance(module, PixelAttention)]
    assert {module.query.in_features for module in found} == {config_of("unet", p).unet_widths[-1]}
    for half, count in ((patches.down, 1), (patches.up, 2)):
        assert sum(isinstance(module, PixelAttention) for module in half.modules()) == count


@torch.no_grad()
def test_the_pixels_of_an_image_see_each_other_through_attention_alone():
    attention = PixelAttention(16).double()
    attention.norm = nn.Identity()  # which mixes them too
    x = random(2, 16, 3, 5)
    changed_ = x.clone()
    changed_[0, :, 2, 4] += torch.arange(16)
    moved = (attention(changed_) - attention(x)).abs().amax(1) > 1e-9
    assert moved[0].all()
    assert not moved[1].any()


def test_the_mask_of_the_transformer_does_not_reach_into_the_u_net():
    """Causal images (Table 5): the first patch still sees the last, through the U-Net."""
    document = Document((Text((1, 2)), image((4, 4), seed=5), Text((3, 4))))
    batch = alone(encode_document(document, VOCABULARY))
    first, last = batch.groups[0].index[0, 0].item(), batch.groups[0].index[0, -1].item()

    def change(batch, noisy, t):
        noisy[0][0, 0, 3, 3] += 1

    for kind, sees in (("linear", False), ("unet", True)):
        model = build(replace(UNET, patches=kind, image_attention="causal"), seed=3)
        logits, _ = changed(model, batch, change)
        assert logits[0, last]
        assert logits[0, first].item() == sees
        assert not logits[0, :first].any()


def test_blocks_of_convolutions_need_no_time():
    """An autoencoder is built of the same blocks."""
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
def test_groups_of_a_norm_are_as_many_as_there_can_be(width):
    groups = group_norm(width).num_groups
    assert width % groups == 0
    assert groups <= 32
    assert groups == 1 or width // groups >= 8
    assert groups == 32 or width % (2 * groups) or width // (2 * groups) < 8


# In the model: packed equals alone, who sees whom


@few
@given(batches(min_documents=2, min_images=2))
def test_a_packed_row_equals_its_documents_alone(found):
    rows, batch = found
    batch = with_all_logits(in_double(batch))
    together = run(TOGETHER, batch, latents_of(batch), times_of(batch))
    logits = together.logits.view(*batch.tokens.shape, -1)
    images = {int(index[0]): said for group, found in zip(batch.groups, together.images, strict=True)
              for index, said in zip(group.index, found, strict=True)}  # fmt: skip
    for b, begin, chunk in places(rows):
        single = with_all_logits(in_double(alone(chunk)))
        by_itself = run(TOGETHER, single, latents_of(single), times_of(single))
        torch.testing.assert_close(logits[b, begin : begin + len(chunk)], by_itself.logits, rtol=0, atol=1e-9)
        for group, said in zip(single.groups, by_itself.images, strict=True):
            for index, one in zip(group.index, said, strict=True):
                torch.testing.assert_close(images.pop(b * LENGTH + begin + int(index[0])), one, rtol=0, atol=1e-9)
    assert not images


@few
@given(batches(min_images=2), st.booleans(), st.data())
def test_an_image_or_its_time_changes_what_may_see_it_and_nothing_else(found, which, data):
    _, batch = found
    g, n = data.draw(st.sampled_from([(g, n) for g, group in enumerate(batch.groups)
                                      for n in range(len(group.keys))]), label="image")  # fmt: skip

    def change(batch, noisy, t):
        if which:
            noisy[g][n, 0, 1, 1] += 1
        else:
            t[g][n] = (t[g][n] + 0.37) % 1

    logits, images = changed(TOGETHER, batch, change)
    index = batch.groups[g].index[n]
    expected = seers(batch, int(index[0]) // LENGTH, (index % LENGTH).tolist(), True)
    assert torch.equal(logits, expected)
    assert [x.tolist() for x in images] == [x.tolist() for x in images_of(batch, expected)]


@pytest.mark.parametrize("p", PATCH_SIZES)
def test_images_of_several_shapes_in_one_batch_are_as_they_are_alone(p):
    """Each at its own shape: nothing is padded."""
    shapes = [(p, p), (2 * p, 3 * p), (3 * p, 2 * p)]
    vocabulary = Vocabulary.build(num_text_tokens=50, shapes=shapes, patch_size=p)
    model = build(replace(config_of("unet", p), vocab_size=vocabulary.size), seed=6)
    laid = [encode_document(Document((Text((n, 2)), image(shape, n), Text((3,))), key=n), vocabulary)
            for n, shape in enumerate([*shapes, *shapes])]  # fmt: skip
    batch = in_double(collate([Row(tuple(laid[:3])), Row(tuple(laid[3:]))], 48, vocabulary))
    assert [group.x0.shape[2:] for group in batch.groups] == sorted(shapes)
    together = run(model, batch, latents_of(batch), times_of(batch))
    for group, said in zip(batch.groups, together.images, strict=True):
        assert said.shape == (2, CHANNELS, *group.x0.shape[2:])
    for n, chunk in enumerate(laid):
        single = in_double(collate([Row((chunk,))], len(chunk), vocabulary))
        (expected,) = run(model, single, latents_of(single), times_of(single)).images
        place = sorted(shapes).index(shapes[n % 3])
        torch.testing.assert_close(together.images[place][n // 3], expected[0], rtol=0, atol=1e-9)


def test_a_batch_without_images_runs_and_gives_the_u_net_a_gradient_of_zero():
    """Not none at all: ranks with images wait for those without."""
    batch = alone(encode_document(Document((Text((1, 2, 3)),)), VOCABULARY))
    model = build(UNET, seed=1)
    model(batch, [], []).logits.logsumexp(1).sum().backward()
    assert {name for name, p in model.named_parameters() if not p.grad.any()} == {
        name for name, _ in model.named_parameters() if name.startswith("patches.")
    }


# Cached equals uncached


pictures = st.builds(picture, st.sampled_from(((4, 4), (2, 6), (2, 2))), seeds)
prompts = st.lists(st.text("ab é", max_size=5) | pictures, min_size=1, max_size=3)


@pytest.mark.parametrize("network_", [{}, {"image_attention": "causal", "kv_heads": 2}])
@few
@given(st.lists(prompts, min_size=1, max_size=3), st.sampled_from(((4, 4), (2, 6), (2, 2))), st.data())
def test_an_image_behind_its_cached_prefix_is_one_in_the_whole_sequence(network_, chosen, shape, data):
    ours = engine(patches="unet", unet_width=16, **network_)
    slots, noisy, times, expected = [], [], [], []
    for parts in chosen:
        slots.append(ours.cache.acquire())
        segments = prompt_segments(parts)
        prompt = encode_document(Document(segments), ours.vocabulary, ends=False)
        (logits,) = text_mode.prefill(ours.model, ours.cache, slots[-1:], [prompt], ours.vocabulary)  # its images are clean
        torch.testing.assert_close(logits, uncached(ours, segments)[0][-1], rtol=0, atol=1e-5)
        boi = encode_document(Document(()), ours.vocabulary, ends=False).append(ours.vocabulary.boi[shape]).part(1)
        text_mode.prefill(ours.model, ours.cache, slots[-1:], [boi], ours.vocabulary)
        noisy.append(torch.from_numpy(picture(shape, data.draw(seeds)).transpose(2, 0, 1).copy()))
        times.append(data.draw(st.floats(0, 1)))
        expected.append(uncached(ours, [*segments, Image(noisy[-1].numpy())], times[-1])[1])
    for _ in range(2):  # a denoising step leaves no trace in the cache
        said = image_mode.predict(ours.model, ours.cache, slots, torch.stack(noisy), torch.tensor(times))
        torch.testing.assert_close(said, torch.stack(expected), rtol=0, atol=1e-5)


@few
@given(prompts, seeds)
def test_all_that_a_drawing_computes_is_what_one_forward_pass_says(parts, seed):
    ours = engine(patches="unet", unet_width=16)
    ours.generate([Request(tuple(parts), num_images=2, seed=seed)])
    draws = [call for call in ours.model.calls if call.kind.startswith("draw")]
    assert len(draws) == ours.run.generation.steps
    for call in draws:
        for row, prefix in enumerate((parts, parts, (), ())):  # two draws, each with the prompt and without
            noisy = Image(call.noisy[0][row].numpy())
            _, said = uncached(ours, [*prompt_segments(prefix), noisy], call.t[0][row].item())
            torch.testing.assert_close(call.said.images[0][row], said, rtol=0, atol=1e-5)


def test_a_run_with_a_u_net_is_saved_opened_and_draws(tmp_path):
    base = small_run()
    asked = replace(base, model=replace(base.model, patches="unet", unet_width=16))
    written = begin_run(tmp_path, asked)
    tensors = run_tensors(written, 1)
    save(tmp_path, 1, tensors, {"step": 1}, keep=1)
    opened = open_run(tmp_path, device="cpu")
    assert opened.run == written
    assert same_weights(numbers(opened.model), tensors["ema"])
    answers = opened.generate([Request(("three",), 2)])[0]
    one, other = (answer.parts[0] for answer in answers)
    assert one.shape == other.shape == (8, 8, 1)
    assert not np.array_equal(one, other)


# Starting weights and gradients


@pytest.mark.parametrize("way", WAYS)
def test_starting_weights_follow_from_seed_and_name_alone(way):
    config = config_of(*way)
    expected = numbers(network.build(config, seed=5))
    torch.manual_seed(123)
    other = network.Transfusion(config).double()
    order = list(other.named_parameters())[::-1]
    other.named_parameters = lambda: iter(order)
    network.init_weights(other, seed=5)
    del other.named_parameters
    assert same_weights({name: x.float() for name, x in numbers(other).items()}, expected)
    again = numbers(network.build(config, seed=6))
    drawn = [name for name, x in expected.items() if x.std() > 0]
    assert all(not torch.equal(expected[name], again[name]) for name in drawn)
    constant = expected.keys() - set(drawn)
    assert all(name.endswith(("norm.weight", "bias")) or name == "patches.proj_out.weight" for name in constant)
    assert all(torch.equal(x, torch.full_like(x, name.endswith("norm.weight"))) for name, x in expected.items()
               if name in constant)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_first_guess_is_zero_and_signals_keep_their_size(way):
    p = way[1]
    patches = network.build(replace(config_of(*way), width=64, layers=8, unet_width=64), seed=0).patches
    vectors, carried = patches.embed(random(4, CHANNELS, 4 * p, 2 * p, dtype=torch.float32), torch.rand(4))
    assert 0.4 < vectors.std() < 2.5
    hidden = random(4, 8, 64, dtype=torch.float32)
    assert torch.equal(patches.unembed(hidden, carried), torch.zeros(4, CHANNELS, 4 * p, 2 * p))
    inside = []
    patches.proj_out.register_forward_pre_hook(lambda _, inputs: inside.append(inputs[0].std().item()))
    patches.unembed(hidden, carried)
    assert 0.4 < inside[0] < 2.5
    for name, block in patches.named_modules():  # a branch adds little to what it is added to
        if isinstance(block, ResidualBlock):
            x = random(4, block.first.in_channels, 4, 4, dtype=torch.float32)
            time = random(4, block.time.in_features, dtype=torch.float32)
            assert 0.05 < (block(x, time) - block.shortcut(x)).std() < 0.3, name


@pytest.mark.parametrize("way", WAYS)
def test_images_give_every_parameter_of_the_way_in_and_out_a_gradient(way):
    p = way[1]
    patches = build(config_of(*way), seed=7).patches
    noisy = random(3, CHANNELS, 2 * p, 3 * p)
    vectors, carried = patches.embed(noisy, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    (patches.unembed(vectors.tanh(), carried) * random(*noisy.shape, seed=1)).sum().backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in patches.named_parameters()}
    assert min(sizes.values()) > 1e-9, min(sizes, key=sizes.get)


@pytest.mark.parametrize("way", WAYS)
def test_two_steps_from_the_first_weights_move_every_parameter(way):
    """The last layer starts at zero: what lies before it must not stay there for ever."""
    p = way[1]
    patches = network.build(config_of(*way), seed=0).patches
    before = numbers(patches)
    optimizer = torch.optim.Adam(patches.parameters(), lr=1e-3)
    target = random(2, CHANNELS, 2 * p, 2 * p, dtype=torch.float32)
    losses = []
    for _ in range(2):
        vectors, carried = patches.embed(target, torch.tensor([0.2, 0.7]))
        loss = (patches.unembed(vectors, carried) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert not [name for name, x in patches.named_parameters() if torch.equal(x, before[name])]


def test_lower_precision_gives_nearly_the_same():
    document = Document((Text((1, 2, 3)), image((4, 4), 0), Text((4, 5))))
    batch, model = alone(encode_document(document, VOCABULARY)), build(UNET, seed=1, dtype=torch.float32)
    inputs = batch, latents_of(batch), [torch.tensor([0.5])]
    exact = run(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    (rough.logits.float().sum() + rough.images[0].float().sum()).backward()
    for one, other in ((rough.logits, exact.logits), (rough.images[0], exact.images[0])):
        assert (one.detach().float() - other).std() < 0.05 * other.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_kernels_decay_and_norms_and_biases_do_not():
    model = network.build(UNET, seed=0)
    decayed, others = build_optimizer(model, named_run("shapes").training).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(x)].rsplit(".")[-1] for x in decayed["params"]} == {"weight"}
    assert all(names[id(x)].endswith(("norm.weight", "bias")) for x in others["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert sum(x.dim() == 4 for x in decayed["params"]) > 15


# What it costs


@pytest.mark.parametrize("way", WAYS)
@examples(5, quick=2)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_counted_products_are_those_that_pytorch_counts(way, rows, columns, first, second):
    """Forward to the last one; backward too, but for gradients of what is given (latents, times), which nobody computes."""
    p, config = way[1], config_of(*way)
    shape, other = (rows * p, columns * p), (columns * p, (rows + 1) * p)
    vocabulary = Vocabulary.build(num_text_tokens=50, shapes=[shape, other], patch_size=p)
    config = replace(config, vocab_size=vocabulary.size)
    document = Document((Text((1, 2)), *[image(shape, n) for n in range(first)], *[image(other, n) for n in range(second)]))
    chunk = encode_document(document, vocabulary)
    batch = in_double(collate([Row((chunk,))], len(chunk), vocabulary))
    model = build(config)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        said = model(batch, latents_of(batch), times_of(batch))
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        (said.logits.sum() + sum(x.sum() for x in said.images)).backward()

    L, heads = len(chunk), config.heads * config.head_size
    attended = network.packed_mask(batch.document_ids, batch.image_ids).count_pairs(batch.document_ids >= 0)
    masked = 4 * heads * config.layers * (L * L - attended)  # PyTorch computes what the mask hides, and counts it
    counted = flops.training_flops(batch, config)
    assert forward.get_total_flops() == counted / 3 + masked
    images, pixels = first + second, first * math.prod(shape) + second * math.prod(other)
    if way[0] == "linear":
        given_ = images * FREQUENCIES * config.width + pixels * CHANNELS * config.width
    else:
        first_width, *_, lowest = (config.unet_widths * 2)[: 2 * len(config.unet_widths)]
        given_ = images * 2 * FREQUENCIES * lowest + pixels * 9 * CHANNELS * first_width
    assert backward.get_total_flops() == 2 * counted / 3 + 2 * masked - 2 * given_


def test_at_the_papers_sizes_the_u_net_costs_more_than_the_linear_layers():
    """Of the forward pass of a 7b model over one picture of 256 patches with a caption, about a tenth."""
    config = SIZES["7b"]
    unet = flops.patch_products(replace(config, patches="unet"), (32, 32))
    transformer = 258 * config.layers * flops.block_weights(config)
    assert flops.patch_products(config, (32, 32)) < 0.001 * transformer
    assert 0.03 < unet / transformer < 0.15
