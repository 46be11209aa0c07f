"""Muon for the matrices of blocks: torch's, and resumed bit for bit. `test_parallel.py` tests it with sharded weights."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.documents import TINY, build
from tests.test_training import assert_same_tensors, copy_tensors, new_trainer, resumed_trainer, stop_at_step
from tests.tiny import small_run
from transfusion.config import TrainingConfig
from transfusion.model.untied import side_of
from transfusion.training.optimizer import build_optimizer, optimizer_tensors

CONFIG = TrainingConfig(learning_rate=3e-3, weight_decay=0.1, betas=(0.8, 0.9), optimizer="muon")


def is_matrix_of_block(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("transformer.blocks.") and parameter.dim() == 2


def test_muon_is_torchs_for_matrices_of_blocks_and_adamw_for_the_rest():
    """Bit for bit, each parameter alone, with its learning rate and weight decay."""
    ours = build(replace(TINY, patches="unet", unet_width=16, qk_norm=True), dtype=torch.float32)
    theirs = copy.deepcopy(ours)
    scales = {"transformer": 0.5, "text": 2.0, "image": 1.0}
    optimizer, references, generator = build_optimizer(ours, CONFIG, scales, "muon"), [], torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        decay, scale = CONFIG.weight_decay if p.dim() > 1 else 0.0, scales[side_of(name, "none")]
        if is_matrix_of_block(name, p):
            references.append(torch.optim.Muon([p], scale * 3e-3, decay, adjust_lr_fn="match_rms_adamw"))
        else:
            adamw = torch.optim.AdamW([p], scale * 3e-3, CONFIG.betas, CONFIG.eps, decay, fused=True)
            references.append(adamw)
    for group in optimizer.param_groups:
        group["lr"] = CONFIG.learning_rate * group["lr_scale"]
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for each in (optimizer, *references):
            each.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_updates_of_muon_have_the_size_of_adamws():
    """So that learning rate and weight decay of AdamW can be kept: a root mean square of about 0.2 learning rates."""
    model = build(replace(TINY, width=128, layers=1), dtype=torch.float32)
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, replace(CONFIG, weight_decay=0.0), kind="muon")
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        if is_matrix_of_block(name, a):
            assert float((a - b).square().mean().sqrt()) / CONFIG.learning_rate == pytest.approx(0.2, rel=0.5), name


def test_new_state_has_the_names_and_shapes_of_a_used_one():
    model = build(TINY, dtype=torch.float32)
    optimizers = [build_optimizer(model, CONFIG, kind="muon") for _ in range(2)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    used, new = ({n: (v.shape, v.dtype) for n, v in optimizer_tensors(model, o).items()} for o in optimizers)
    assert used == new
    names = {name for name, p in model.named_parameters() if is_matrix_of_block(name, p)}
    assert {name.removesuffix(".momentum_buffer") for name in used if name.endswith(".momentum_buffer")} == names


def test_frozen_blocks_need_no_muon():
    model = build(TINY, dtype=torch.float32)
    model.transformer.requires_grad_(False)
    assert isinstance(build_optimizer(model, CONFIG, kind="muon"), torch.optim.AdamW)


def test_resumed_run_with_muon_equals_an_uninterrupted_one(tmp_path):
    """Bit for bit."""
    run = small_run(4, optimizer="muon", validate_every=100)
    trainer = new_trainer(tmp_path / "whole", run)
    assert trainer.train()
    assert not stop_at_step(new_trainer(tmp_path / "parts", run), 2).train()
    resumed = resumed_trainer(tmp_path / "parts", run)
    assert resumed.train()
    assert_same_tensors(copy_tensors(resumed), copy_tensors(trainer))
    assert any(name.endswith("momentum_buffer") for name in copy_tensors(trainer))
