"""Matrix products of training on a CPU: which CPUs use oneDNN, where it is on, and that it changes only rounding."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.profile import examples
from tests.test_training import new_trainer
from tests.tiny import small_run
from transfusion import parallel
from transfusion.config import ParallelConfig
from transfusion.model import mask as mask_module
from transfusion.model.attention import attention
from transfusion.model.mask import MAX_PLAIN_KEYS, packed_mask
from transfusion.parallel import CPUINFO, cpu_flags, fast_matmul, has_cpu_bfloat16, lower_precision, onednn_is_faster

CPU = torch.device("cpu")
HAS_AMX = "amx_tile" in cpu_flags(CPUINFO)  # oneDNN would compute in bfloat16


def is_on() -> bool:
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.fixture
def measured_cpu(monkeypatch):
    """A CPU on which oneDNN is used, whatever this one is."""
    if HAS_AMX:
        pytest.skip("this CPU has AMX: oneDNN would compute in bfloat16")
    monkeypatch.setattr(parallel, "onednn_is_faster", lambda: True)


# The choice


CPUS = {  # the vendor and some flags of a CPU, and whether it uses oneDNN
    ("AuthenticAMD", "fpu avx2 avx512f avx512vl avx512_bf16"): True,
    ("AuthenticAMD", "fpu avx2 fma"): False,
    ("AuthenticAMD", "fpu avx2 avx512f amx_tile amx_bf16"): False,
    ("GenuineIntel", "fpu avx2 avx512f avx512vl"): False,
    ("GenuineIntel", "fpu avx2 avx512f amx_tile amx_bf16"): False,
}


def plant_cpu(monkeypatch, folder: Path, vendor: str, flags: str) -> None:
    path = folder / "cpuinfo"
    path.write_text(f"vendor_id\t: {vendor}\nmodel name\t: AuthenticAMD avx512f\nflags\t\t: {flags}\nbugs\t\t: x\n")
    monkeypatch.setattr(parallel, "CPUINFO", path)


@pytest.mark.parametrize(("cpu", "expected"), CPUS.items())
def test_choice_is_by_vendor_and_instructions(monkeypatch, tmp_path, cpu, expected):
    plant_cpu(monkeypatch, tmp_path, *cpu)
    monkeypatch.setattr(parallel, "_onednn_error", lambda: 2e-7)
    assert onednn_is_faster.__wrapped__() == expected
    monkeypatch.setattr(parallel, "_onednn_error", lambda: 3e-3)  # of a product in bfloat16
    assert not onednn_is_faster.__wrapped__()


def test_unknown_cpu_uses_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "CPUINFO", tmp_path / "missing")
    assert cpu_flags(parallel.CPUINFO) == set()
    assert not onednn_is_faster.__wrapped__()


def test_error_of_a_product_is_measured(monkeypatch):
    def matmul_in_bfloat16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return product(a.bfloat16(), b.bfloat16()).to(a.dtype) if a.dtype == torch.float32 and is_on() else product(a, b)

    assert parallel._onednn_error() < parallel.MAX_ONEDNN_ERROR or HAS_AMX
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul_in_bfloat16)
    assert 1e-3 < parallel._onednn_error() < 1e-2


# The scope


def test_setting_is_restored(measured_cpu):
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert not is_on()
    with fast_matmul(CPU):
        with fast_matmul(CPU):
            assert is_on()
        assert is_on()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError, match="stop"), fast_matmul(CPU):
        raise RuntimeError("stop")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for device, choice in ((torch.device("cuda"), "auto"), (CPU, "default"), (CPU, "bfloat16")):
        with fast_matmul(device, choice):
            assert not is_on()


def test_setting_is_on_only_in_forward_and_backward_passes(measured_cpu, tmp_path, monkeypatch):
    where = {}
    plain, optimize = mask_module.attention, torch.optim.AdamW.step

    def attend(*args):
        where["forward"] = is_on()
        output = plain(*args)
        output.register_hook(lambda grad: where.update(backward=is_on()))
        return output

    def step(*args, **kwargs):
        where["optimizer"] = is_on()
        return optimize(*args, **kwargs)

    def on_preview(model, step):
        where["preview"] = is_on()

    monkeypatch.setattr(mask_module, "attention", attend)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer = new_trainer(tmp_path, small_run(steps=1), on_preview)
    evaluate = trainer.evaluate_heldout
    trainer.evaluate_heldout = lambda reset_watchdog: where.update(heldout=is_on()) or evaluate(reset_watchdog)
    trainer.train()
    assert where == {"forward": True, "backward": True, "optimizer": False, "preview": False, "heldout": False}


def test_failed_step_restores_the_setting(measured_cpu, tmp_path, monkeypatch):
    def fail(*args):
        assert is_on()
        raise RuntimeError("stop")

    trainer = new_trainer(tmp_path, small_run(steps=1))
    monkeypatch.setattr("transfusion.objective.total_loss", fail)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert not is_on()


# Attention


@st.composite
def shapes(draw):
    B, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    return B, kv_heads * group, kv_heads, draw(st.integers(1, 20)), draw(st.sampled_from((1, 4, 16)))


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """q, k, v as the model makes them (transposed), and the gradient of the output."""
    (B, H, Hkv, L, h), generator = shape, torch.Generator().manual_seed(seed)
    return [torch.randn(B, L, n, h, dtype=dtype, generator=generator).transpose(1, 2) for n in (H, Hkv, Hkv, H)]


def random_bias(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The bias of packed rows with images."""
    (B, *_, L, _), generator = shape, torch.Generator().manual_seed(seed)
    documents = torch.randint(2, (B, L), generator=generator).cumsum(1)
    images = torch.randint(-1, 2, (B, L), generator=generator) + 2 * documents
    return packed_mask(documents.int(), images.int()).attn_bias.to(dtype)


def output_and_gradients(function, q, k, v, grad) -> list[torch.Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    output = function(q, k, v)
    return [output, *torch.autograd.grad(output, (q, k, v), grad)]


@given(shapes(), st.integers(0, 2**32))
@examples(200)
def test_plain_attention_equals_sdpa(shape, seed):
    inputs, bias = random_inputs(shape, torch.float64, seed), random_bias(shape, seed, torch.float64)
    expected = output_and_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True), *inputs
    )
    for ours, theirs in zip(
        output_and_gradients(lambda q, k, v: attention(q, k, v, bias), *inputs), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_of_plain_attention_is_numerically_right():
    shape = 2, 4, 2, 5, 3
    q, k, v, _ = (tensor.requires_grad_() for tensor in random_inputs(shape, torch.float64, 0))
    assert torch.autograd.gradcheck(lambda *args: attention(*args, random_bias(shape, 0, torch.float64)), (q, k, v))


def test_rows_too_long_for_plain_attention_use_sdpa(measured_cpu, monkeypatch):
    used = []
    monkeypatch.setattr(mask_module, "attention", lambda *args: used.append(1) or attention(*args))
    for length, choice, expected in (
        (MAX_PLAIN_KEYS, "auto", True), (MAX_PLAIN_KEYS + 1, "auto", False), (8, "default", False),
    ):  # fmt: skip
        used.clear()
        zeros = torch.zeros(1, length, dtype=torch.int32)
        with fast_matmul(CPU, choice):
            packed_mask(zeros, zeros - 1).attend(*random_inputs((1, 1, 1, length, 2), torch.float32, 0)[:3])
        assert bool(used) == expected


# Training


def gradient_of_a_step(trainer, choice: str) -> torch.Tensor:
    trainer.run = replace(trainer.run, parallel=replace(trainer.run.parallel, cpu_matmul=choice))
    micro_batches, _ = next(trainer.batches(None))
    trainer._backward(micro_batches, 10, 10)
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    trainer.optimizer.zero_grad()
    return gradient


def relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_differs_only_by_rounding(measured_cpu, tmp_path, checkpointing):
    run = small_run()
    model = replace(run.model, heads=4, kv_heads=2, qk_norm=True)
    trainer = new_trainer(tmp_path, replace(run, model=model))
    trainer.model.transformer.activation_checkpointing = checkpointing
    for name, parameter in trainer.model.named_parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    expected, actual = (gradient_of_a_step(trainer, choice) for choice in ("default", "auto"))
    assert 0 < relative_distance(actual, expected) < 2e-6


@pytest.mark.skipif(not has_cpu_bfloat16(), reason="this CPU has no bfloat16 instructions")
def test_bfloat16_trains_as_well(tmp_path):
    run, losses = small_run(steps=30), {}
    for choice in ("default", "bfloat16"):
        (tmp_path / choice).mkdir()
        trainer = new_trainer(tmp_path / choice, replace(run, parallel=ParallelConfig(cpu_matmul=choice)))
        expected, actual = (gradient_of_a_step(trainer, name) for name in ("default", choice))
        assert (1e-3 < relative_distance(actual, expected) < 0.05) == (choice == "bfloat16")
        trainer.run = replace(run, parallel=ParallelConfig(cpu_matmul=choice))
        batches, steps = trainer.batches(None), count()
        for _ in range(run.training.steps):
            read = next(batches)[0]
            step = trainer.step(next(steps), read, trainer.count(read), trainer.loop.guard)
        losses[choice] = step()["text_loss"]
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["default"], rel=0.05)


def test_bfloat16_without_instructions_is_refused(monkeypatch, tmp_path):
    plant_cpu(monkeypatch, tmp_path, "AuthenticAMD", "fpu avx2 avx512f")
    message = "parallel.cpu_matmul bfloat16: this CPU has no bfloat16 instructions; use auto or default"
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, replace(small_run(), parallel=ParallelConfig(cpu_matmul="bfloat16")))
    for flags in ("avx512_bf16", "avx512f amx_bf16"):
        plant_cpu(monkeypatch, tmp_path, "GenuineIntel", flags)
        assert lower_precision(CPU, "bfloat16").fast_dtype == torch.bfloat16
