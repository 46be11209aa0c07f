"""Promise 1: flex == dense == the one-line rule. No image sees another's future; documents are islands."""

import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.documents import TINY, batches, few, may_see, some
from tests.profile import THOROUGH, examples
from transfusion.model import mask as mask_module
from transfusion.model import transfusion as network
from transfusion.model.mask import BLOCK, Mask, cached_mask, packed_mask

LONG = 3 * BLOCK


def rule_of(
    document: torch.Tensor, image: torch.Tensor, image_attention: str = "bidirectional"
) -> torch.Tensor:
    """(B, L), (B, L) -> (B, 1, L, L) by the one-line rule."""
    both = image_attention == "bidirectional"
    return torch.stack([may_see(*row, both) for row in zip(document, image, strict=True)])[:, None]


@st.composite
def runs(draw, length: int = LONG, min_rows: int = 1, max_rows: int = 3):
    """Rows as runs of any length: whole blocks of one document or image, and slivers. (B, L) twice."""
    rows = []
    for _ in range(draw(st.integers(min_rows, max_rows))):
        document, image, number = [], [], 0
        for d in range(length):
            for _ in range(draw(st.integers(1, 4))):
                n = draw(st.sampled_from((1, 2, 5, 40, 127, 128, 200)))
                is_image = draw(st.booleans())
                document += [d] * n
                image += [number if is_image else -1] * n
                number += is_image
            if len(document) >= length:
                break
        padding = draw(st.sampled_from((0, 1, 130)))
        document[length - padding :], image[length - padding :] = [-1] * padding, [-1] * padding
        rows.append((document[:length], image[:length]))
    return tuple(torch.tensor(part, dtype=torch.int32) for part in zip(*rows, strict=True))


# The rule


@some
@given(batches(min_images=1), st.sampled_from(("bidirectional", "causal")))
def test_the_dense_mask_is_the_rule(found, image_attention):
    batch = found[1]
    mask = packed_mask(batch.document_ids, batch.image_ids, image_attention)
    rule = rule_of(batch.document_ids, batch.image_ids, image_attention)
    assert torch.equal(mask.dense, rule)
    real = batch.document_ids >= 0
    assert mask.count_pairs(real) == int((rule[:, 0] & real[:, :, None]).sum())


@some
@given(runs(), st.sampled_from(("bidirectional", "causal")))
def test_the_dense_mask_is_the_rule_for_runs_of_any_length(found, image_attention):
    assert torch.equal(packed_mask(*found, image_attention).dense, rule_of(*found, image_attention))


@some
@given(batches(min_documents=2, min_images=2))
def test_images_never_see_each_others_future_and_documents_are_islands(found):
    batch = found[1]
    dense = packed_mask(batch.document_ids, batch.image_ids).dense[:, 0]
    for b, q, k in dense.nonzero().tolist():
        assert batch.document_ids[b, q] == batch.document_ids[b, k]
        assert k <= q or batch.image_ids[b, q] == batch.image_ids[b, k] >= 0
    for number in range(int(batch.image_ids.max()) + 1):  # and inside an image everything is seen, both ways
        for b in range(len(batch.image_ids)):
            inside = (batch.image_ids[b] == number).nonzero()[:, 0]
            assert dense[b][inside][:, inside].all()


@some
@given(batches(min_images=1))
def test_padding_sees_only_itself_and_is_never_seen(found):
    batch = found[1]
    dense = packed_mask(batch.document_ids, batch.image_ids).dense[:, 0]
    padding = batch.document_ids < 0
    assert not (dense & (padding[:, :, None] != padding[:, None, :])).any()
    assert dense.any(-1).all()  # no query without a key


# FlexAttention's form of it


def listed(counts: torch.Tensor, indices: torch.Tensor) -> list:
    """The blocks that a BlockMask names, whatever stands behind them: per row and query block, sorted."""
    return [
        [sorted(chosen[:n].tolist()) for n, chosen in zip(*row, strict=True)]
        for row in zip(counts[:, 0], indices[:, 0], strict=True)
    ]


@few
@given(runs(), st.sampled_from(("bidirectional", "causal")))
def test_blocks_equal_those_that_torch_finds(found, image_attention):
    rule = rule_of(*found, image_attention)[:, 0]
    mine = packed_mask(*found, image_attention).blocks
    theirs = create_block_mask(lambda b, h, q, k: rule[b, q, k], len(rule), None, LONG, LONG, device="cpu")
    assert mine.shape == theirs.shape
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(mine.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(mine.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert listed(mine.kv_num_blocks, mine.kv_indices) == listed(theirs.kv_num_blocks, theirs.kv_indices)
    full = mine.full_kv_num_blocks, mine.full_kv_indices
    assert listed(*full) == listed(theirs.full_kv_num_blocks, theirs.full_kv_indices)
    for part in ("q_num_blocks", "full_q_num_blocks"):  # what the backward pass walks
        assert torch.equal(getattr(mine, part), getattr(theirs, part))


def heads(rows: int, length: int, kv_heads: int, seed: int, **kind) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, length, 16) for n in (4, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=generator).to(**kind) for shape in shapes)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@examples(10)
@given(runs(max_rows=2), st.sampled_from((1, 2, 4)), st.sampled_from(("bidirectional", "causal")))
def test_flex_attention_under_blocks_equals_sdpa_under_dense(found, kv_heads, image_attention):
    mask = packed_mask(*found, image_attention)
    q, k, v = heads(len(found[0]), LONG, kv_heads, seed=kv_heads)
    with torch.no_grad():
        flexed = flex_attention(q, k, v, block_mask=mask.blocks, enable_gqa=kv_heads != 4)
    assert torch.allclose(flexed, mask.attend(q, k, v), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all: compiling takes a third of a minute")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@examples(10)
@given(runs(min_rows=2, max_rows=2))
def test_a_compiled_flex_attention_skips_no_block_it_needs(found):
    """Uncompiled, FlexAttention asks `mask_mod` about every pair; only kernels go by the lists of blocks."""
    q, k, v = heads(2, LONG, 2, seed=0)
    mask = packed_mask(*found)
    with torch.no_grad():
        flexed = compiled_flex()(q, k, v, block_mask=mask.blocks, enable_gqa=True)
    assert torch.allclose(flexed, mask.attend(q, k, v), atol=1e-5)


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@few
@given(runs(length=40), st.sampled_from((1, 2, 4)))
def test_attend_is_softmax_over_what_may_be_seen(found, kv_heads):
    q, k, v = heads(len(found[0]), 40, kv_heads, seed=kv_heads)
    repeated = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    k_all, v_all = repeated
    scores = (q @ k_all.mT / 16**0.5).masked_fill(~rule_of(*found), float("-inf"))
    assert torch.allclose(packed_mask(*found).attend(q, k, v), F.softmax(scores, -1) @ v_all, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_stays_compiled_where_blocks_are_compiled_first(monkeypatch):
    """Made while a block is traced, it would be plain FlexAttention for whatever is not compiled: held-out losses."""
    monkeypatch.setattr(mask_module, "_flex", None)
    monkeypatch.setattr(Mask, "flex", True)
    torch._dynamo.reset()
    model = network.build(replace(TINY, layers=1), 0)
    for block in model.transformer.blocks:
        block.compile(backend="eager")
    one = torch.zeros(1, BLOCK, dtype=torch.int32)
    with torch.no_grad():
        model.transformer(torch.zeros(1, BLOCK, TINY.width), one, packed_mask(one, one - 1))
    assert mask_module._flex not in (None, flex_attention)


# With a cache


@some
@given(batches(min_images=1), st.data(), st.sampled_from(("bidirectional", "causal")))
def test_cached_masks_are_rows_of_the_full_mask(found, data, image_attention):
    """Any rows of any documents step together: each sees what it would see if its document were run whole."""
    rows, _ = found
    chunks = [chunk for row in rows for chunk in row.chunks if len(chunk) > 1]
    new = data.draw(st.integers(1, min(map(len, chunks))), label="new")
    lengths, image, rules = [], [], []
    for chunk in chunks:
        inside = torch.full((len(chunk),), -1)
        for number, placed in enumerate(chunk.images):
            y, x = placed.image.shape
            inside[placed.start : placed.start + y * x // 4] = number
        same = (inside[1:] == inside[:-1]) & (inside[1:] >= 0)
        safe = [i for i in range(len(chunk) - new + 1) if i == 0 or not same[i - 1]]
        safe = [i for i in safe if i + new == len(chunk) or not same[i + new - 1]]  # an image is run whole
        if safe:
            begin = data.draw(st.sampled_from(safe), label="begin")
            rule = may_see(torch.zeros(len(chunk)), inside, image_attention == "bidirectional")
            lengths.append(begin)
            image.append(inside[begin : begin + new])
            rules.append(rule[begin : begin + new])
    if not rules:
        return
    mask = cached_mask(torch.tensor(lengths), new, torch.stack(image), image_attention)
    assert mask.keys == max(lengths) + new
    for dense, rule, length in zip(mask.dense[:, 0], rules, lengths, strict=True):
        assert torch.equal(dense[:, : length + new], rule[:, : length + new])
        assert not dense[:, length + new :].any()
        assert not rule[:, length + new :].any()


@some
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 6))
def test_cached_text_sees_all_before_it(lengths, new):
    mask = cached_mask(torch.tensor(lengths), new)
    for dense, length in zip(mask.dense[:, 0], lengths, strict=True):
        expected = [[k <= length + i for k in range(max(lengths) + new)] for i in range(new)]
        assert dense.tolist() == expected


def test_an_interval_is_all_a_mask_holds():
    mask = Mask(torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[1, 4]], dtype=torch.int32), 4)
    assert mask.dense.int().tolist() == [[[[1, 0, 0, 0], [0, 0, 1, 1]]]]
    assert mask.count_pairs(torch.tensor([[True, True]])) == 3
    assert mask.count_pairs(torch.tensor([[True, False]])) == 1
