"""GPU results equal CPU results: attention, starting weights, training, resuming, and generation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.sources import picture
from tests.test_mask import LONG, random_qkv
from tests.test_model import TINY, copy_parameters, same_weights
from tests.test_training import assert_same_tensors, copy_tensors, metrics_of, new_trainer, preview_every_step
from tests.tiny import small_run
from transfusion.checkpoint.open import open_checkpoint
from transfusion.codecs.autoencoder import Autoencoder, AutoencoderNetwork, build_network
from transfusion.codecs.codec import move_to
from transfusion.codecs.config import AutoencoderConfig
from transfusion.codecs.vq import VQ, QuantisedNetwork
from transfusion.config import FaultToleranceConfig
from transfusion.inference import text_mode
from transfusion.inference.engine import Engine, Request
from transfusion.model import transfusion as network
from transfusion.model.mask import packed_mask
from transfusion.sequence import Document, Text, encode_document

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = 0.03  # relative; bfloat16 has 8 significant bits


def is_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Is the norm of the difference small relative to the expected norm? False for NaN."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    return ((actual - expected).norm() <= tolerance * expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flex_attention_equals_the_dense_mask_forward_and_backward(kv_heads, dtype):
    """Also where a query attends to no key of its block's first key block."""
    documents = torch.tensor([[0] * 100 + [1] * 250 + [-1] * 34, [0] * 384], dtype=torch.int32, device="cuda")
    images = torch.full_like(documents, -1)
    images[0, 20:60], images[0, 120:300], images[1, 5:133], images[1, 133:261] = 0, 1, 0, 1
    mask = packed_mask(documents, images)
    assert mask.uses_flex
    results = []
    for attend, dtype_ in (mask.attend, dtype), (lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.dense, enable_gqa=kv_heads != 4), torch.float32):  # fmt: skip
        q, k, v = (x.requires_grad_() for x in random_qkv(2, LONG, kv_heads, 0, device="cuda", dtype=dtype_))
        out = attend(q, k, v)
        out.float().square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for name, flex, dense in zip("oqkv", *results, strict=True):
        assert is_near(flex, dense), name


def test_starting_weights_are_equal():
    on_gpu = {name: x.cpu() for name, x in copy_parameters(network.build(TINY, 0, "cuda")).items()}
    assert same_weights(on_gpu, copy_parameters(network.build(TINY, 0)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of one small run: on a CPU, on the GPU (compiled, rows of whole blocks), and on the GPU with a resume."""
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


def test_training_metrics_equal_those_of_a_cpu(trained):
    cpu_rows, gpu_rows = ([row for row in metrics_of(folder) if "text_loss" in row] for folder in trained[:2])
    for row, expected in zip(cpu_rows, gpu_rows, strict=True):
        for name in ("text_loss", "image_loss", "gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=TOLERANCE), (row["step"], name)


def test_rejected_update_changes_no_tensor(tmp_path):
    """The GPU decides, and the CPU reads its decision one step late."""

    def change(batch, number):
        if number == 2:
            batch.groups[0].x0[0] = torch.nan
        return batch

    run = small_run(steps=5, validate_every=100)
    run = replace(run, data=replace(run.data, seq_len=128), fault_tolerance=FaultToleranceConfig(skip_nonfinite=1))
    trainer, copies = new_trainer(tmp_path / "previews", run, change=change, device="cuda"), {}
    preview_every_step(trainer, lambda model, step: copies.update({step: copy_tensors(trainer)})).train()
    assert_same_tensors(copies[3], copies[2])
    assert not torch.equal(copies[4]["model head.weight"], copies[3]["model head.weight"])
    late = new_trainer(tmp_path / "late", run, change=change, device="cuda")
    assert late.train()
    assert copy_tensors(late)["optimizer head.weight.step"] == 4
    for folder in tmp_path.iterdir():
        assert [path.name for path in (folder / "faults").iterdir()] == ["step-000003.json"]
        assert [line["step"] for line in metrics_of(folder) if "learning_rate" in line] == [1, 2, 3, 4, 5]


@torch.inference_mode()
def test_logits_and_images_equal_those_of_a_cpu(trained):
    engines = [Engine(open_checkpoint(trained[1], device=device)) for device in ("cpu", "cuda")]
    logits, images = [], []
    for engine in engines:
        text = Text(engine.opened.tokenizer.encode("three"))
        chunk = encode_document(Document((text,)), engine.vocabulary, add_eos=False)
        with engine.opened.lower_precision():
            logits.append(
                text_mode.extend_cache(engine.model, engine.cache, [engine.cache.acquire()], [chunk], engine.vocabulary)
            )
        [answers] = engine.generate([Request(("three",), num_images=4)])
        images.append(np.stack([answer.parts[0] for answer in answers]).astype(np.float32))
        [[answer]] = engine.generate([Request(("three",))])
        assert answer.reason
    assert is_near(logits[1], logits[0])
    assert is_near(torch.from_numpy(images[1]), torch.from_numpy(images[0]), 3 * TOLERANCE)


@pytest.mark.parametrize("codes", [None, 16])
def test_codec_encodes_and_decodes_as_on_a_cpu(codes):
    config = AutoencoderConfig(width=16, multipliers=(1, 2), blocks=1, codes=codes)
    images = [picture(number, 32, 32)[1] for number in range(4)]
    network = build_network(config, 0, QuantisedNetwork if codes else AutoencoderNetwork)
    codec = VQ(network) if codes else Autoencoder.fit(network, images)
    expected = np.stack(codec.encode_many(images))
    pixels = codec.decode(expected[0]).astype(np.float32)
    move_to(codec, "cuda")
    latents = np.stack(codec.encode_many(images))
    assert (latents == expected).mean() > 0.99 if codes else is_near(torch.from_numpy(latents), torch.from_numpy(expected))
    assert np.abs(codec.decode(expected[0]).astype(np.float32) - pixels).mean() < 1
