"""The attention mask (promise 1): FlexAttention, the dense mask and the one-line rule are equal."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.documents import TINY, batches, few, mask_of, may_see, rows_of, some
from tests.profile import THOROUGH, examples
from transfusion.model import mask as mask_module
from transfusion.model import transfusion as network
from transfusion.model.mask import BLOCK_SIZE, Interval, Mask, cached_mask, packed_mask
from transfusion.sequence import Sides

LONG = 3 * BLOCK_SIZE


def rule_of(rows: Iterable[tuple], image_attention: str = "bidirectional") -> torch.Tensor:
    """The one-line rule, for rows of (document, image, clean), (L,) each: (B, 1, L, L)."""
    is_bidirectional = image_attention == "bidirectional"
    return torch.stack([may_see(document, image, is_bidirectional, clean) for document, image, clean in rows])[:, None]


def mask_of_runs(ids: tuple, image_attention: str = "bidirectional") -> Mask:
    return packed_mask(*ids[:2], image_attention, ids[2])


@st.composite
def runs(draw, length: int = LONG, min_rows: int = 1, max_rows: int = 3):
    """Document, image and first position of the clean image (B, L), as of a batch, of runs of any length, shorter and longer
    than a block. Some images have a noisy copy behind their document."""
    rows = []
    for _ in range(draw(st.integers(min_rows, max_rows))):
        document, image, clean, number = [], [], [], 0
        for d in range(length):
            copies = []
            for _ in range(draw(st.integers(1, 4))):
                n = draw(st.sampled_from((1, 2, 5, 40, 127, 128, 200)))
                is_image = draw(st.booleans())
                copies += [(len(document), n)] * (is_image and draw(st.booleans()))
                document += [d] * n
                image += [number if is_image else -1] * n
                clean += [-1] * n
                number += is_image
            for start, n in copies:
                document, image, clean, number = document + [d] * n, image + [number] * n, clean + [start] * n, number + 1
            if len(document) >= length:
                break
        padding = draw(st.sampled_from((0, 1, 130)))
        for part in (document, image, clean):
            part[length - padding :] = [-1] * padding
        rows.append((document[:length], image[:length], clean[:length]))
    document, image, clean = (torch.tensor(part, dtype=torch.int32) for part in zip(*rows, strict=True))
    return document, image, clean if (clean >= 0).any() else None


def rows_of_runs(ids: tuple) -> list[tuple]:
    document, image, clean = ids
    return list(zip(document, image, [None] * len(image) if clean is None else clean, strict=True))


# The rule


@some
@given(batches(min_images=1), st.sampled_from(("bidirectional", "causal")))
def test_dense_mask_equals_the_rule(packed, image_attention):
    batch = packed[1]
    mask, rule = mask_of(batch, image_attention), rule_of(rows_of(batch), image_attention)
    assert torch.equal(mask.dense, rule)
    real = batch.document_ids >= 0
    assert mask.count_pairs(real) == int((rule[:, 0] & real[:, :, None]).sum())


@some
@given(runs(), st.sampled_from(("bidirectional", "causal")))
def test_dense_mask_equals_the_rule_for_runs_of_any_length(ids, image_attention):
    mask, rule = mask_of_runs(ids, image_attention), rule_of(rows_of_runs(ids), image_attention)
    assert torch.equal(mask.dense, rule)
    assert mask.count_pairs(torch.ones_like(ids[0], dtype=torch.bool)) == int(rule.sum())


@some
@given(batches(min_documents=2, min_images=2))
def test_attention_stays_in_the_document_and_is_causal_between_images(packed):
    batch = packed[1]
    dense = mask_of(batch).dense[:, 0]
    for b, q, k in dense.nonzero().tolist():
        assert batch.document_ids[b, q] == batch.document_ids[b, k]
        assert k <= q or batch.image_ids[b, q] == batch.image_ids[b, k] >= 0
    for number in range(int(batch.image_ids.max()) + 1):  # inside an image attention is bidirectional
        for b in range(len(batch.image_ids)):
            positions = (batch.image_ids[b] == number).nonzero()[:, 0]
            assert dense[b][positions][:, positions].all()


@some
@given(batches(min_images=1))
def test_padding_attends_only_to_padding(packed):
    batch = packed[1]
    dense = mask_of(batch).dense[:, 0]
    padding = batch.document_ids < 0
    assert not (dense & (padding[:, :, None] != padding[:, None, :])).any()
    assert dense.any(-1).all()  # every query has a key


# FlexAttention


def block_lists(counts: torch.Tensor, indices: torch.Tensor) -> list:
    """Sorted key block indices of a BlockMask per row and query block; the entries after `counts` are ignored."""
    return [
        [sorted(blocks[:n].tolist()) for n, blocks in zip(*row, strict=True)]
        for row in zip(counts[:, 0], indices[:, 0], strict=True)
    ]


@few
@given(runs(), st.sampled_from(("bidirectional", "causal")))
def test_block_mask_equals_create_block_masks(ids, image_attention):
    rule = rule_of(rows_of_runs(ids), image_attention)[:, 0]
    ours = mask_of_runs(ids, image_attention).block_mask
    theirs = create_block_mask(lambda b, h, q, k: rule[b, q, k], len(rule), None, LONG, LONG, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert block_lists(ours.kv_num_blocks, ours.kv_indices) == block_lists(theirs.kv_num_blocks, theirs.kv_indices)
    full = ours.full_kv_num_blocks, ours.full_kv_indices
    assert block_lists(*full) == block_lists(theirs.full_kv_num_blocks, theirs.full_kv_indices)
    for part in ("q_num_blocks", "full_q_num_blocks"):  # used by the backward pass
        assert torch.equal(getattr(ours, part), getattr(theirs, part))


def random_qkv(rows: int, length: int, kv_heads: int, seed: int, **kind) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, length, 16) for n in (4, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=generator).to(**kind) for shape in shapes)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@examples(10)
@given(runs(max_rows=2), st.sampled_from((1, 2, 4)), st.sampled_from(("bidirectional", "causal")))
def test_flex_attention_equals_sdpa(ids, kv_heads, image_attention):
    mask = mask_of_runs(ids, image_attention)
    q, k, v = random_qkv(len(ids[0]), LONG, kv_heads, seed=kv_heads)
    with torch.no_grad():
        output = flex_attention(q, k, v, block_mask=mask.block_mask, enable_gqa=kv_heads != 4)
    assert torch.allclose(output, mask.attend(q, k, v), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all: compiling takes 20 seconds")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@examples(10)
@given(runs(min_rows=2, max_rows=2))
def test_compiled_flex_attention_equals_sdpa(ids):
    """Only compiled kernels use the block lists; uncompiled FlexAttention evaluates `mask_mod` for every pair."""
    q, k, v = random_qkv(2, LONG, 2, seed=0)
    mask = mask_of_runs(ids)
    with torch.no_grad():
        output = compiled_flex()(q, k, v, block_mask=mask.block_mask, enable_gqa=True)
    assert torch.allclose(output, mask.attend(q, k, v), atol=1e-5)


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@few
@given(runs(length=40), st.sampled_from((1, 2, 4)))
def test_attend_equals_masked_softmax(ids, kv_heads):
    q, k, v = random_qkv(len(ids[0]), 40, kv_heads, seed=kv_heads)
    k_all, v_all = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    scores = (q @ k_all.mT / 16**0.5).masked_fill(~rule_of(rows_of_runs(ids)), float("-inf"))
    assert torch.allclose(mask_of_runs(ids).attend(q, k, v), F.softmax(scores, -1) @ v_all, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_compiled_before_the_blocks(monkeypatch):
    """If it were first compiled while a block is traced, uncompiled calls (held-out losses) would be eager."""
    monkeypatch.setattr(mask_module, "_flex", None)
    monkeypatch.setattr(Mask, "uses_flex", True)
    torch._dynamo.reset()
    model = network.build(replace(TINY, layers=1), 0)
    for block in model.transformer.blocks:
        block.compile(backend="eager")
    zeros, sides = torch.zeros(1, BLOCK_SIZE, dtype=torch.int32), Sides(torch.arange(BLOCK_SIZE), torch.arange(0))
    with torch.no_grad():
        model.transformer(torch.zeros(1, BLOCK_SIZE, TINY.width), zeros, packed_mask(zeros, zeros - 1), sides)
    assert mask_module._flex not in (None, flex_attention)


# With a cache


@some
@given(batches(min_images=1, clean_copies=st.just(False)), st.data(), st.sampled_from(("bidirectional", "causal")))
def test_cached_masks_are_rows_of_the_full_mask(packed, data, image_attention):
    """Positions of different documents in one call have the mask of their own document."""
    rows, _ = packed
    chunks = [chunk for row in rows for chunk in row.chunks if len(chunk) > 1]
    new = data.draw(st.integers(1, min(map(len, chunks))), label="new")
    lengths, new_image_ids, rules = [], [], []
    for chunk in chunks:
        image_ids = torch.full((len(chunk),), -1)
        for number, placed in enumerate(chunk.images):
            y, x = placed.image.shape
            image_ids[placed.start : placed.start + y * x // 4] = number
        is_same_image = (image_ids[1:] == image_ids[:-1]) & (image_ids[1:] >= 0)
        begins = [i for i in range(len(chunk) - new + 1) if i == 0 or not is_same_image[i - 1]]
        begins = [i for i in begins if i + new == len(chunk) or not is_same_image[i + new - 1]]  # an image is never split
        if begins:
            begin = data.draw(st.sampled_from(begins), label="begin")
            rule = may_see(torch.zeros(len(chunk)), image_ids, image_attention == "bidirectional")
            lengths.append(begin)
            new_image_ids.append(image_ids[begin : begin + new])
            rules.append(rule[begin : begin + new])
    if not rules:
        return
    mask = cached_mask(torch.tensor(lengths), new, torch.stack(new_image_ids), image_attention)
    assert mask.num_keys == max(lengths) + new
    for dense, rule, length in zip(mask.dense[:, 0], rules, lengths, strict=True):
        assert torch.equal(dense[:, : length + new], rule[:, : length + new])
        assert not dense[:, length + new :].any()
        assert not rule[:, length + new :].any()


@some
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 6))
def test_cached_text_attends_to_all_earlier_positions(lengths, new):
    mask = cached_mask(torch.tensor(lengths), new)
    for dense, length in zip(mask.dense[:, 0], lengths, strict=True):
        expected = [[k <= length + i for k in range(max(lengths) + new)] for i in range(new)]
        assert dense.tolist() == expected


def test_mask_is_defined_by_intervals():
    ends = torch.tensor([[[0, 2], [1, 4]], [[3, 0], [4, 0]]], dtype=torch.int32)  # the second query has no second interval
    first, second = (Interval(lo[None], hi[None]) for lo, hi in ends)
    assert Mask((first,), 4).dense.int().tolist() == [[[[1, 0, 0, 0], [0, 0, 1, 1]]]]
    mask = Mask((first, second), 4)
    assert mask.dense.int().tolist() == [[[[1, 0, 0, 1], [0, 0, 1, 1]]]]
    assert mask.count_pairs(torch.tensor([[True, True]])) == 4
    assert mask.count_pairs(torch.tensor([[True, False]])) == 2
