"""`data.clean_copies`: what follows an image reads it clean, and its loss is on a noisy copy behind the document."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import compress, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.mask import GREEN, read_mask
from tests.documents import (
    LENGTH,
    TINY,
    VOCABULARY,
    alone,
    build,
    documents,
    few,
    image,
    images,
    in_double,
    many,
    pair_documents,
    positioned_chunks,
)
from tests.profile import examples
from tests.test_loader import Documents, encoder, prepared
from tests.test_training import new_trainer
from tests.tiny import run_tensors, save, small_run
from transfusion import objective
from transfusion.cli.run_folder import RunFolder
from transfusion.cli.screen import UsageError
from transfusion.config import DataConfig, DiffusionConfig
from transfusion.data.lengths import IMAGE_FIRST, change
from transfusion.data.loader import Loader, heldout_batches, mean_positions
from transfusion.data.packing import pack, split_document
from transfusion.sequence import (
    NO_TARGET,
    Batch,
    Document,
    Image,
    Text,
    collate,
    encode_document,
    find_contexts,
    split_chunk,
)

DIFFUSION = DiffusionConfig(prediction="velocity")
MODELS = {
    name: build(config, seed=4) for name, config in {
        "plain": TINY, "causal images": replace(TINY, image_attention="causal"),
        "untied": replace(TINY, untied="full", image_init="fresh", text_vocab_size=VOCABULARY.text_size),
        "unet": replace(TINY, patches="unet", unet_width=16), "2d": replace(TINY, image_rope="2d"),
    }.items()
}  # fmt: skip
any_document = documents(min_images=1) | pair_documents()


@st.composite
def documents_with_copies(draw):
    """At least two images with a denoising loss, and a token after them."""
    document = draw(documents(max_segments=3))
    first, last = (draw(images(loss=st.just(True), max_t=st.sampled_from((0.5, 1.0)))) for _ in range(2))
    return replace(document, segments=(first, *document.segments, last, Text((1,))))


# Which images have a copy


def is_learnt_after(document: Document, number: int) -> bool:
    """Whether a position after this segment, but for the end of the document, is in a loss; from the encoded document."""
    chunk = encode_document(document, VOCABULARY)
    begin = len(encode_document(replace(document, segments=document.segments[: number + 1]), VOCABULARY, add_eos=False))
    learnt = chunk.targets[begin - 1 : -2] != NO_TARGET  # the last of these positions predicts the token before eos
    patches = [placed.image.is_denoised for placed in chunk.images if placed.start > begin]
    return bool(learnt.any() or any(patches))


@many
@given(any_document)
def test_images_before_something_learnt_are_clean_and_those_with_a_loss_have_a_noisy_copy(document):
    plain, chunk = (encode_document(document, VOCABULARY, clean_copies=copies) for copies in (False, True))
    images = [n for n, part in enumerate(document.segments) if isinstance(part, Image)]
    contexts = [is_learnt_after(document, n) for n in images]
    assert [n for n, is_context in zip(images, contexts, strict=True) if is_context] == [
        n for n, is_context in enumerate(find_contexts(document.segments)) if is_context and n in images
    ]
    assert chunk.tokens.tolist() == plain.tokens.tolist()
    assert chunk.targets.tolist() == plain.targets.tolist()
    for before, after, is_context in zip(plain.images, chunk.images, contexts, strict=True):
        assert (after.start, after.key) == (before.start, before.key)
        assert after.image.max_t == (0 if is_context else before.image.max_t)
        assert after.image.content is before.image.content
    expected = [p for p, is_context in zip(plain.images, contexts, strict=True)
                if is_context and p.image.loss and p.image.max_t > 0]  # fmt: skip
    assert [(c.start, c.key, c.image.max_t) for c in chunk.copies] == [(p.start, p.key, p.image.max_t) for p in expected]
    assert len(chunk) == len(plain) + sum(VOCABULARY.num_patches(p.image.shape) for p in expected)


def test_a_caption_before_its_only_image_needs_no_copy_and_after_it_one():
    caption, picture = Text((1, 2)), image((4, 4), 0)
    assert not encode_document(Document((caption, picture)), VOCABULARY, clean_copies=True).copies  # eos is no reason
    assert len(encode_document(Document((picture, caption)), VOCABULARY, clean_copies=True).copies) == 1
    assert not encode_document(Document((picture, replace(caption, loss=False))), VOCABULARY, clean_copies=True).copies
    assert not encode_document(Document((picture, Text(()))), VOCABULARY, clean_copies=True).copies
    edit = Document((replace(picture, loss=False, max_t=0.0), caption, picture))
    assert not encode_document(edit, VOCABULARY, clean_copies=True).copies


def test_images_before_their_caption_have_all_noise_again():
    document = Document((Text((1, 2)), image((4, 4), 0), Text((3,)), image((2, 2), 1, max_t=0.5)), pairs=True)
    for clean_copies, expected in ((False, [0.3, 0.3]), (True, [1.0, 0.5])):
        first = change(document, IMAGE_FIRST, DataConfig(image_first_max_t=0.3, clean_copies=clean_copies))
        assert [part.max_t for part in first.segments[::2]] == expected


def test_the_picture_shows_the_mask():
    """Each query of the picture has the keys of the rule, and only those of copies have their colour."""
    names, colours = read_mask()
    is_shown, is_green = colours[..., 3] > 0, (colours[..., :3] == GREEN).all(-1)
    assert is_shown.shape == (len(names), len(names)) == (25, 25)
    assert is_shown[:17, :17].sum() == is_shown[:17].sum() == 17 * 18 // 2 + 2 * 6  # two images of 2 x 2 patches
    assert [int(row.sum()) for row in is_shown[17:]] == [2 + 4] * 4 + [10 + 4] * 4
    assert (is_green.any(1) == (np.arange(25) >= 17)).all()


# The losses are those of separate forward passes


Pass = tuple[Batch, list[objective.NoiseSample]]


def losses_and_gradients(model, passes: list[Pass]) -> tuple[float, float, list[Tensor]]:
    """The sums of the text and image losses of these passes, and the gradients of both together."""
    model.zero_grad()
    text, images = 0.0, 0.0
    for batch, samples in passes:
        losses = objective.compute_losses(model, batch, samples, DIFFUSION)
        text, images = text + float(losses.text_sum.detach()), images + float(losses.image_sum.detach())
        (losses.text_sum + 3 * losses.image_sum).backward()
    return text, images, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def with_t(batch: Batch, clean: set[int], with_loss: set[int]) -> Pass:
    """The batch and its noise, where images with these keys are clean, and only those with the others have a loss."""
    batch = in_double(batch)
    samples, groups = objective.sample_noise(batch, DIFFUSION), []
    for group, sample in zip(batch.groups, samples, strict=True):
        sample.t[[key in clean for key in group.keys]] = 0
        loss = group.loss & torch.tensor([key in with_loss for key in group.keys])
        groups.append(replace(group, loss=loss, image_count=int(loss.sum())))
    return replace(batch, groups=groups), samples


def without_text(batch: Batch) -> Batch:
    return replace(batch, text_index=batch.text_index[:0], text_target=batch.text_target[:0])


def separate_passes(document: Document) -> Iterator[Pass]:
    """The document with all images clean that something learnt follows, for the losses on text and the other images; and for
    each of them what is before it, and the noisy image. No pass has a copy."""
    is_image = [isinstance(part, Image) for part in document.segments]
    chunk = encode_document(document, VOCABULARY)
    keys = [placed.key for placed in chunk.images]
    clean = {*compress(keys, compress(find_contexts(document.segments), is_image))}
    yield with_t(alone(chunk), clean, {*keys} - clean)
    for placed in chunk.images:
        if placed.key in clean:
            until_here = chunk.part(0, placed.start + placed.num_patches)
            yield with_t(without_text(alone(until_here)), {*keys} - {placed.key}, {placed.key})


@examples(50, quick=6)
@given(documents_with_copies() | any_document, st.sampled_from(sorted(MODELS)))
def test_losses_and_gradients_equal_those_of_separate_passes(document, name):
    batch = in_double(alone(encode_document(document, VOCABULARY, clean_copies=True)))
    model = MODELS[name]
    text, images, gradients = losses_and_gradients(model, [(batch, objective.sample_noise(batch, DIFFUSION))])
    passes = [*separate_passes(document)]
    assert batch.image_count == sum(other.image_count for other, _ in passes)
    assert batch.text_count == passes[0][0].text_count
    expected_text, expected_images, expected = losses_and_gradients(model, passes)
    assert text == pytest.approx(expected_text, rel=1e-9)
    assert images == pytest.approx(expected_images, rel=1e-5)  # summed in float32
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@examples(25, quick=6)
@given(
    st.lists(documents_with_copies(), min_size=2, max_size=3, unique_by=lambda d: d.key), st.integers(0, 99),
    st.sampled_from(sorted(MODELS)),
)  # fmt: skip
def test_losses_of_packed_rows_equal_those_of_their_chunks_alone(documents_, seed, name):
    rows = pack(documents_, LENGTH, VOCABULARY, seed, clean_copies=True)
    together = in_double(collate(rows, LENGTH, VOCABULARY))
    separate = [in_double(alone(chunk)) for row in rows for chunk in row.chunks]
    results = [
        losses_and_gradients(MODELS[name], [(batch, objective.sample_noise(batch, DIFFUSION)) for batch in batches_])
        for batches_ in ([together], separate)
    ]
    (text, images, gradients), (expected_text, expected_images, expected) = results
    assert (text, images) == pytest.approx((expected_text, expected_images), rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@few
@given(st.lists(documents_with_copies(), min_size=1, max_size=3), st.data())
def test_the_content_of_a_noisy_copy_changes_no_output_but_its_own(documents_, data):
    """Two images of one document never see each other's noisy copy, and no text sees one."""
    batch = in_double(collate(pack(documents_, LENGTH, VOCABULARY, 0, clean_copies=True), LENGTH, VOCABULARY))
    is_copy = [(batch.clean_starts.view(-1)[group.index[:, 0]] >= 0) for group in batch.groups]
    g, n = data.draw(st.sampled_from([(g, n) for g, flags in enumerate(is_copy) for n in flags.nonzero()[:, 0].tolist()]))
    x_t, t = [group.x0 for group in batch.groups], [torch.rand(len(group.keys)).double() for group in batch.groups]
    with torch.no_grad():
        before = MODELS["plain"](batch, x_t, t)
        x_t[g] = x_t[g].clone()
        x_t[g][n] += 1
        after = MODELS["plain"](batch, x_t, t)
    assert torch.equal(before.logits, after.logits)
    for group, (one, other) in enumerate(zip(before.images, after.images, strict=True)):
        same = (one == other).flatten(1).all(1)
        assert same.tolist() == [(group, number) != (g, n) for number in range(len(same))]


def test_clean_images_are_exactly_their_latents_and_have_no_loss():
    document = Document((image((4, 4), 0), Text((1,)), image((4, 4), 1), Text((2,))), key=7)
    batch = alone(encode_document(document, VOCABULARY, clean_copies=True))
    [group], [sample] = batch.groups, objective.sample_noise(batch, DIFFUSION)
    assert group.loss.tolist() == [False, False, True, True]  # both where they belong, then both copies
    assert group.keys[:2] == group.keys[2:]
    assert torch.equal(group.x0[:2], group.x0[2:])
    assert sample.t[:2].tolist() == [0, 0]
    assert (sample.t[2:] > 0).all()
    assert batch.image_count == 2
    plain = objective.sample_noise(alone(encode_document(document, VOCABULARY)), DIFFUSION)[0]
    assert torch.equal(plain.t, sample.t[2:])  # copies change the t and the noise of no image
    assert torch.equal(plain.noise, sample.noise[2:])


# Splits


@many
@given(any_document, st.integers(6, 40))
def test_a_copy_stays_in_the_row_of_its_image(document, length):
    chunk = encode_document(document, VOCABULARY, clean_copies=True)
    try:
        parts = split_chunk(chunk, length)
    except ValueError as error:
        assert "noisy copy does not fit in a row" in str(error) or not chunk.copies
        with pytest.raises(ValueError, match=f"document {document.id} of"):
            split_document(document, length, VOCABULARY, clean_copies=True)
        return
    assert all(len(part) <= length for part in parts)
    assert np.concatenate([part.tokens for part in parts]).tolist() == chunk.tokens.tolist()
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    copies = [(start + c.start, c.key) for start, part in zip(starts, parts, strict=False) for c in part.copies]
    assert copies == [(c.start, c.key) for c in chunk.copies]
    for part in parts:
        assert {c.start for c in part.copies} <= {placed.start for placed in part.images}
    ends, in_copies = split_document(document, length, VOCABULARY, clean_copies=True)
    assert ends == starts[1:].tolist()
    assert [end - begin + n for (begin, end), n in zip(pairwise([0, *ends]), in_copies, strict=True)] == [*map(len, parts)]


def test_rows_of_a_loader_have_room_for_copies():
    """Of documents that are split, by lengths that are known before they are read."""
    long = [Document(tuple(part for n in range(6) for part in (image((4, 4), n), Text((n,) * k))), k) for k in range(1, 7)]
    loader = Loader([Documents("long", long)], encoder(seq_len=24, shuffle_block=6, clean_copies=True), 1)
    chunks = [row.chunks for row in loader.block(0)]
    assert all(sum(map(len, row)) <= 24 for row in chunks)
    assert sum(len(chunk.copies) for row in chunks for chunk in row) == 6 * 6
    for chunk in (chunk for row in chunks for chunk in row):
        assert [c.start for c in chunk.copies] == [placed.start for placed in chunk.images]


def test_rows_keep_images_with_their_copies():
    document = Document(tuple(part for n in range(6) for part in (image((4, 4), n), Text((n,)))), key=3)
    rows = pack([document], 20, VOCABULARY, seed=0, clean_copies=True)
    assert len(rows) > 2
    for _, _, chunk in positioned_chunks(rows):
        assert len(chunk) <= 20
        assert [c.start for c in chunk.copies] == [placed.start for placed in chunk.images]
    with pytest.raises(ValueError, match="and its noisy copy does not fit in a row of 9 positions: raise data.seq_len"):
        pack([document], 9, VOCABULARY, seed=0, clean_copies=True)  # an image and its copy have 4 + 4 patches, boi and eoi
    assert pack([document], 9, VOCABULARY, seed=0)


# Data and training


def test_heldout_figures_are_of_the_same_images_with_copies():
    """Images before their caption have t = 0 and no loss; the others have their t and noise, on a copy if text follows."""
    pairs = [Document((Text((n,)), image((4, 4), n)) * (1 + n % 2), n, pairs=True) for n in range(8)]
    for image_first in (0.0, 1.0):
        plain, copied = (
            heldout_batches(Documents("a", pairs), encoder(image_first=image_first, clean_copies=copies), 8, 4)
            for copies in (False, True)
        )
        counts = [[sum(batch.image_count for batch in batches_), sum(batch.text_count for batch in batches_)]
                  for batches_ in (plain, copied)]  # fmt: skip
        assert counts[0] == counts[1]
        assert counts[0][0] == (0 if image_first else 12)
        keys = [sorted(key for batch in batches_ for group in batch.groups
                       for key, has_loss in zip(group.keys, group.loss, strict=True) if has_loss)
                for batches_ in (plain, copied)]  # fmt: skip
        assert keys[0] == keys[1]
        positions = [sum(batch.positions for batch in batches_) for batches_ in (plain, copied)]
        assert positions[1] - positions[0] == (0 if image_first else 4 * 4)  # the first image of two has 4 patches


def test_mixture_weights_count_copies_as_positions():
    pairs = [Document((Text((n,)), image((4, 4), n)), n, pairs=True) for n in range(8)]
    for source in (Documents("a", pairs), prepared()[0][0]):
        for image_first in (0.0, 1.0):
            fitted = encoder(image_first=image_first, clean_copies=True, caption_dropout=0.0)
            chunks = [
                encode_document(fitted.to_document(document, source.name, 0), VOCABULARY, clean_copies=True)
                for document in (source[n] for n in range(len(source)))
            ]
            expected = np.mean([len(chunk) for chunk in chunks])
            if isinstance(source, Documents):  # the metadata of the others have no counts
                assert mean_positions(source, fitted) == expected
            else:
                plain = mean_positions(source, replace(fitted, config=replace(fitted.config, clean_copies=False)))
                copies = np.mean([len(chunk) - len(chunk.tokens) for chunk in chunks])
                assert mean_positions(source, fitted) - plain == pytest.approx(copies)


def test_a_run_trains_with_copies_and_does_not_depend_on_its_micro_batches(tmp_path):
    weights, have_copies = [], []

    def record(batch: Batch, _: int) -> Batch:
        have_copies.append(batch.clean_starts is not None)
        return batch

    for name, micro_batch_size in (("whole", None), ("parts", 1)):
        run = small_run(2, micro_batch_size=micro_batch_size, batch_size=3)
        run = replace(run, data=replace(run.data, clean_copies=True, image_first=0.5))
        trainer = new_trainer(tmp_path / name, run, change=record)
        trainer.train()
        assert any(have_copies)
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_run_with_copies_may_start_from_one_without(tmp_path):
    first = RunFolder.draft(small_run(), tmp_path / "first", None)
    first.write()
    save(first.path, 2, run_tensors(first.run, 0), {"step": 2})
    run = replace(first.run, data=replace(first.run.data, clean_copies=True))
    assert RunFolder.draft(run, tmp_path / "second", ("run", str(first.path))).run.data.clean_copies
    with pytest.raises(UsageError, match="data.clean_copies is False in the folder, True in this command"):
        RunFolder.draft(run, first.path, None)
