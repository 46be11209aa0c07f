"""AdamW or Muon, the learning rate schedule (warm-up, then cosine), and the moving average (EMA) of the weights (section
4.1; Muon is not in the paper)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from transfusion.config import LoraConfig, TrainingConfig
from transfusion.model.lora import BLOCKS, is_trained
from transfusion.model.untied import side_of
from transfusion.parallel import get_shard


class MuonWithAdamW:
    """Muon for some parameters and AdamW for the others, used as one optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw, self.defaults = muon, adamw, {"fused": False}
        self.param_groups = [*muon.param_groups, *adamw.param_groups]
        self.state = adamw.state = muon.state  # by parameter

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()


def build_optimizer(
    model: nn.Module, config: TrainingConfig, lr_scales: Mapping[str, float] | None = None,
    kind: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.AdamW | torch.optim.Muon | MuonWithAdamW:  # fmt: skip
    """AdamW with weight decay on matrices only, not on norms and biases. ValueError when all parameters are frozen.

    `lr_scales` scales the learning rate by the side of a parameter. Each group stores it as "lr_scale".
    `kind` muon: the matrices of the transformer's blocks use Muon (kellerjordan.github.io/posts/muon), with the learning
    rate and weight decay of AdamW, because updates are scaled to the size of AdamW's (2502.16982).
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector, lr_scale = parameter.dim() < 2, lr_scales[side_of(name, model.config.untied)] if lr_scales else 1.0
            uses_muon = kind == "muon" and name.startswith(BLOCKS) and not is_vector
            groups.setdefault((uses_muon, lr_scale, is_vector), []).append(parameter)
    if not groups:
        raise ValueError("all parameters of this model are frozen: nothing would be trained")
    sorted_groups = {
        key: {"params": parameters, "lr_scale": key[1], "weight_decay": 0.0 if key[2] else config.weight_decay}
        for key, parameters in sorted(groups.items(), key=lambda item: item[0])
    }
    muon_groups, adamw_groups = ([g for key, g in sorted_groups.items() if key[0] == muon] for muon in (True, False))
    if muon_groups:
        muon = torch.optim.Muon(muon_groups, config.learning_rate, adjust_lr_fn="match_rms_adamw")
        if not adamw_groups:  # adapters alone
            return muon
    fused = adamw_groups[0]["params"][0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
    return MuonWithAdamW(muon, adamw) if muon_groups else adamw


def freeze(model: nn.Module, lr_scales: Mapping[str, float], lora: LoraConfig) -> None:
    """Freeze the sides whose scale is 0, and with an adapter all weights but its own: they get no gradients, no moments, no
    weight decay and no new average."""
    for name, parameter in model.named_parameters():
        is_frozen = lora.rank is not None and not is_trained(name, lora)
        parameter.requires_grad_(not is_frozen and lr_scales[side_of(name, model.config.untied)] > 0)


def get_learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine down to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    decay = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + decay * (config.learning_rate - config.min_learning_rate)


def update_weights(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """`optimizer.step()` if `applied`, () bool. Fused optimizers read it on the device (as with a GradScaler)."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~applied).to(torch.float32)
        optimizer.step()
    elif applied:
        optimizer.step()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float, applied: Tensor) -> None:
    """ema += (1 - d) (model - ema), with d = min(decay, (1 + step) / (10 + step)): early steps soon replace the start.
    Nothing changes unless `applied`, () bool, which is not read on the CPU."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averages, values = zip(*[map(get_shard, pair) for pair in pairs if pair[1].requires_grad], strict=True)
    weight = applied.to(averages[0].dtype) * (1 - decay)
    torch._foreach_lerp_(averages, values, [weight] * len(values))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | MuonWithAdamW) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: AdamW's two moments and its step as a 0-d tensor, Muon's momentum. Parameters
    without a state get a zero state, except frozen ones."""
    tensors = {}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter not in groups:
            continue
        state, group = optimizer.state[parameter], groups[parameter]
        if not state and "momentum" in group:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        elif not state:
            device = parameter.device if group["fused"] else "cpu"  # where AdamW keeps its step
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors
