"""A GPU does what a CPU does: attention, starting weights, steps, resuming, reading, writing and drawing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.test_mask import LONG, random_qkv
from tests.test_model import TINY, copy_parameters, same_weights
from tests.test_training import new_trainer, rows_of
from tests.tiny import small_run
from transfusion.checkpoint.open import open_checkpoint
from transfusion.inference import text_mode
from transfusion.inference.engine import Engine, Request
from transfusion.model import transfusion as network
from transfusion.model.mask import packed_mask
from transfusion.sequence import Document, Text, encode_document

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NEAR = 0.03  # bfloat16 has 8 bits


def near(one: torch.Tensor, other: torch.Tensor, within: float = NEAR) -> bool:
    """Do they differ by little of their norm? (What is not a number is not near.)"""
    one, other = one.float().cpu(), other.float().cpu()
    return ((one - other).norm() <= within * other.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flex_attention_equals_the_dense_mask_forward_and_backward(kv_heads, dtype):
    """Also where a query sees nothing of the first block that its neighbours see."""
    documents = torch.tensor([[0] * 100 + [1] * 250 + [-1] * 34, [0] * 384], dtype=torch.int32, device="cuda")
    images = torch.full_like(documents, -1)
    images[0, 20:60], images[0, 120:300], images[1, 5:133], images[1, 133:261] = 0, 1, 0, 1
    mask = packed_mask(documents, images)
    assert mask.uses_flex
    results = []
    for attend, kind in (mask.attend, dtype), (lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.dense, enable_gqa=kv_heads != 4), torch.float32):  # fmt: skip
        q, k, v = (x.requires_grad_() for x in random_qkv(2, LONG, kv_heads, 0, device="cuda", dtype=kind))
        out = attend(q, k, v)
        out.float().square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for name, mine, plain in zip("oqkv", *results, strict=True):
        assert near(mine, plain), name


def test_starting_weights_are_the_same():
    on_gpu = {name: x.cpu() for name, x in copy_parameters(network.build(TINY, 0, "cuda")).items()}
    assert same_weights(on_gpu, copy_parameters(network.build(TINY, 0)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of one small run: trained on a CPU, on the GPU (compiled, rows of whole blocks), there with a stop."""
    run = small_run(steps=8)
    run = replace(run, data=replace(run.data, seq_len=128))
    folders = [tmp_path_factory.mktemp(name) for name in ("cpu", "gpu", "resumed")]
    assert new_trainer(folders[0], run).train()
    assert new_trainer(folders[1], run, device="cuda").train()
    half = replace(run, training=replace(run.training, steps=4))
    assert new_trainer(folders[2], half, device="cuda").train()
    trainer = new_trainer(folders[2], run, device="cuda")
    trainer.loop.restore(print)
    assert trainer.loop.progress.step == 4
    assert trainer.train()
    return folders


def test_steps_learn_what_they_learn_on_a_cpu(trained):
    one, other = ([row for row in rows_of(folder) if "text_loss" in row] for folder in trained[:2])
    for row, expected in zip(one, other, strict=True):
        for name in ("text_loss", "image_loss", "gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=NEAR), (row["step"], name)


@torch.inference_mode()
def test_reading_and_drawing_give_what_they_give_on_a_cpu(trained):
    engines = [Engine(open_checkpoint(trained[1], device=device)) for device in ("cpu", "cuda")]
    logits, drawn = [], []
    for engine in engines:
        text = Text(engine.opened.tokenizer.encode("three"))
        chunk = encode_document(Document((text,)), engine.vocabulary, ends=False)
        with engine.opened.lower_precision():
            logits.append(
                text_mode.prefill(engine.model, engine.cache, [engine.cache.acquire()], [chunk], engine.vocabulary)
            )
        [answers] = engine.generate([Request(("three",), num_images=4)])
        drawn.append(np.stack([answer.parts[0] for answer in answers]).astype(np.float32))
        [[answer]] = engine.generate([Request(("three",))])
        assert answer.reason
    assert near(logits[1], logits[0])
    assert near(torch.from_numpy(drawn[1]), torch.from_numpy(drawn[0]), 3 * NEAR)
